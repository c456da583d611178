"""Laws of captions that name a side: what would be a lie in a mirror is found in many languages, and other words are not taken for it."""

from __future__ import annotations

import unicodedata

import pytest

from opensora.data.mirroring import names_a_side

SIDED = """
a car turns left|A car turns LEFT.|the right-hand drawer|moving rightwards|leftmost house|two left-handed players|a leftward pan
the camera pans clockwise|spins counter-clockwise|counterclockwise|anticlockwise|rotates ccw|facing west|a westward road|northeast wind
the south-eastern coast|an eastbound train|westernmost island|the starboard side|right_hand.mp4
ein Auto biegt links ab|die rechte Hand|gegen den Uhrzeigersinn|im Uhrzeigersinn|nach Osten|östlich der Stadt|westlicher Wind
der Linksabbieger|naar rechts|linker kant|une voiture tourne à gauche|à droite
vers l'ouest|sens horaire|gira a la izquierda|mano derecha|sentido antihorario
girar à direita|lado esquerdo|sentido anti-horário|svolta a sinistra|a destra|in senso orario|sola dönen araba|sağdaki ev|batıya
машина поворачивает налево|правый берег|слева направо|по часовой стрелке|на востоке|праворуч|ліворуч
汽车向左转|一个人在右边走|顺时针旋转|逆時針|东边的山|左に曲がる|時計回りに回る|왼쪽으로 도는 자동차|오른손|시계 방향|동쪽
سيارة تتجه إلى اليسار|دست راست|יד ימין|बाईं ओर मुड़ती कार|दाएँ हाथ
"""
PLAIN = """
a digit 3 moving up|a bright beast at breakfast|an upright cleft in a copyright notice|people in conversation|a man reads the newspaper
a solar eclipse|the weather is fine, at least|un cheval est dans le pré|este coche es rojo|ein Pferd steht auf der Wiese|link to a page
un soldato|la plage|лошадь бежит по полю|праздник в городе|一匹马在跑|馬が走る|말이 달린다|حصان يركض|घोड़ा दौड़ता है|a clock on a wall
"""


def listed(text: str) -> list[str]:
    return text.strip().replace("\n", "|").split("|")


@pytest.mark.parametrize("caption", listed(SIDED))
def test_a_caption_that_names_a_side_or_a_turn_is_found(caption: str) -> None:
    assert names_a_side(caption)
    assert names_a_side(caption.upper())
    assert names_a_side(unicodedata.normalize("NFD", caption))


@pytest.mark.parametrize("caption", listed(PLAIN))
def test_other_captions_are_not(caption: str) -> None:
    assert not names_a_side(caption)
