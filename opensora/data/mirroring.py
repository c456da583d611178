"""Whether a caption names a side or a turn, so that it would be wrong for the mirrored clip.

Owns the word list. When in doubt the answer is yes: a clip that is needlessly not mirrored costs a little variety, but a clip that is
wrongly mirrored teaches the model that left is right. So "right now" counts as a side. Text that is visible in a clip but not mentioned in
its caption is not detected: use `data.horizontal_flip` only for clips without text.

Words are compared without case. What counts:
- English: left and right, also with -ward, -wards, -most, -hand, -handed, -er, -ish; east and west, also north- and south-, -ern, -erly,
  -ward, -wards, -bound; clockwise, anticlockwise, counterclockwise, cw, ccw; starboard, larboard.
- German, Dutch, French, Spanish, Italian, Portuguese, Turkish: their words for left, right, clockwise and, where these mean nothing
  else ("est" and "este" do), east and west.
- Russian, Ukrainian: words that begin with those for left, right, west, east and clockwise.
- Chinese, Japanese, Korean, Arabic, Persian, Hebrew, Hindi: these words anywhere in the caption, because several of these scripts are
  written without spaces.

Clips with captions in other languages are mirrored: keep `data.horizontal_flip` off for them.
"""

from __future__ import annotations

import re
import unicodedata

_ENGLISH = (
    r"(?:left|right)(?:s|y|er|ish|wards?|most|hand|handed)?",
    r"(?:north|south)?(?:east|west)(?:ern|erly|wards?|bound|ernmost)?",
    r"(?:anti|counter)?clockwise|c?cw|starboard|larboard",
)
_EUROPEAN = (
    r"links\w*|linke[mnrs]?|linker\w*|rechts\w*|rechte[mnrs]?|rechter\w*|(?:gegen)?uhrzeigersinn\w*|(?:nord|süd)?(?:ost|west)(?:en|wärts)",
    r"(?:nord|süd)?(?:öst|west)lich\w*|linksom|rechtsom|(?:oost|west)(?:en|waarts)",
    r"gauches?|droite?s?|ouest|horaire|antihoraire",
    r"izquierd[ao]s?|derech[ao]s?|oeste|antihorario|horario",
    r"sinistr[aeo]|destr[aeo]|oraria|orario|antiorari[ao]|ovest",
    r"esquerd[ao]s?|direit[ao]s?|horário|horária|anti-?horári[ao]|leste",
    r"sol(?:a|da|dan|dak?i)?|sağ(?:a|da|dan|daki)?|saat yönünde|doğu(?:ya)?|bat[ıi](?:ya)?",
)
_SLAVIC = (
    r"(?:на|в|с)?лев\w+|(?:на|в|с)?прав(?:о|а|ый|ая|ое|ую|ой|ого|ому|ым|ом|ые|ых|ее)",
    r"(?:северо|юго)?-?(?:запад|восток|восточн|сход|схід)\w*",
    r"(?:по|против)\s+часовой|(?:лі|злі|налі|влі|пра|спра|напра|впра)в\w+",
)
_ANYWHERE = (
    r"[左右东東西]|[顺順逆][时時][针針]|時計回り|反時計",
    r"왼|오른|좌측|우측|좌회전|우회전|시계|동쪽|서쪽",
    r"يسار|يمين|شرق|غرب|عقارب|چپ|راست",
    r"שמאל|ימין|מזרח|מערב|כיוון השעון",
    r"बाएं|बाएँ|बायीं|बायें|बाईं|दाएं|दाएँ|दायीं|दायें|दाईं|दाहिन|पूर्व|पश्चिम|दक्षिणावर्त|वामावर्त",
)
_WORDS = "|".join((*_ENGLISH, *_EUROPEAN, *_SLAVIC))
_PATTERN = re.compile(rf"(?<!\w)(?:{_WORDS})(?!\w)|{'|'.join(_ANYWHERE)}")


def names_a_side(caption: str) -> bool:
    """Whether the caption has a word of the list above. Its clip is then never mirrored."""
    return _PATTERN.search(unicodedata.normalize("NFKC", caption).casefold().replace("_", " ")) is not None
