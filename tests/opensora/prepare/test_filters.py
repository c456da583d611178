"""A clip is kept if every rule says so; a report knows what each rule alone would drop; nobody guesses at what was not measured."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from opensora.dataset.prepare_config import Filter, Rule
from opensora.dataset.rows import Clip, Media, Provenance, Shot, Source
from opensora.errors import ConfigError
from opensora.prepare.filters import DUPLICATE, judged, said

MEDIA = Media("mp4", "h264", 320, 180, 0, (1, 1), "yuv420p", 8, "", False, False, (1, 25), 0, 50, 50, 25.0, False, "")


def clip(name: str, phash: str = "", licence: str = "CC-BY", **measures: float | str) -> Clip:
    numbers = {column: value for column, value in measures.items() if not isinstance(value, str)}
    texts = {column: value for column, value in measures.items() if isinstance(value, str)}
    source = Source(f"/films/{name}.mp4", f"{name}.mp4", Provenance(set_name="films", licence=licence))
    return Clip(name, "0" * 64, source, MEDIA, Shot(0, 50, (1, 25), 0, 50, numbers, phash), measures=texts)


def rules(*given: Rule, duplicates: int | None = None) -> Filter:
    return Filter(rules=given, duplicates=duplicates)


def test_a_clip_leaves_with_the_first_rule_that_it_breaks_and_each_rule_is_counted_alone() -> None:
    clips = [
        clip("a", motion=1, black=0),
        clip("b", motion=0.1, black=0.9),
        clip("c", motion=1, black=0.8),
        clip("d", motion=0.5, black=0.5),
    ]
    found = judged(clips, rules(Rule(column="motion", min=0.5), Rule(column="black", max=0.5)))
    assert {name: (drop.reason, drop.detail) for name, drop in found.dropped.items()} == {
        "b": ("motion below 0.5", "0.1"),
        "c": ("black above 0.5", "0.8"),
    }
    assert found.alone == {"motion below 0.5": 1, "black above 0.5": 2}


def test_every_clip_is_kept_or_dropped_with_a_reason_and_dropping_a_rule_never_drops_more() -> None:
    dice = random.Random(0)
    clips = [
        clip(str(n), f"{dice.getrandbits(6):016x}", motion=dice.choice([dice.random(), math.nan]), black=dice.random()) for n in range(200)
    ]
    both = judged(clips, rules(Rule(column="motion", min=0.3, max=0.9), Rule(column="black", max=0.5), duplicates=1))
    assert both.dropped.keys() < {one.id for one in clips}
    for rule in (Rule(column="motion", min=0.3, max=0.9), Rule(column="black", max=0.5)):
        alone = judged(clips, rules(rule))
        assert both.alone[said(rule)] == len(alone.dropped)
        assert alone.dropped.keys() <= both.dropped.keys()
    assert both.alone[DUPLICATE] == len(judged(clips, rules(duplicates=1)).dropped)


def test_what_was_not_measured_is_dropped_and_never_taken_for_a_number() -> None:
    found = judged([clip("a", motion=math.nan), clip("b"), clip("c", motion=1)], rules(Rule(column="motion", max=5)))
    assert [drop.reason for drop in found.dropped.values()] == ["motion not measured"] * 2


def test_a_column_that_no_clip_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"filter\.rules: no column moton\. There are: black, codec, .*motion, seconds, source, width"):
        judged([clip("a", motion=1), clip("b", black=1)], rules(Rule(column="moton", min=1)))
    assert judged([clip("a")], rules(Rule(column="words", min=1)), later=["words"]).dropped == {}
    assert judged([], rules(Rule(column="moton", min=1))).dropped == {}


def test_texts_have_values_and_numbers_have_bounds() -> None:
    clips = [clip("a", licence="CC-BY", language="en"), clip("b", licence="", language="de"), clip("c", language="fr")]
    found = judged(clips, rules(Rule(column="licence", any_of=("CC-BY", "CC0")), Rule(column="language", any_of=("en", "de"))))
    assert {name: drop.reason for name, drop in found.dropped.items()} == {
        "b": "licence not CC-BY or CC0",
        "c": "language not en or de",
    }
    with pytest.raises(ConfigError, match="min and max bound numbers, language is a text"):
        judged(clips, rules(Rule(column="language", min=1)))
    with pytest.raises(ConfigError, match="any_of names texts, width is a number"):
        judged(clips, rules(Rule(column="width", any_of=("320",))))


def test_of_near_duplicates_the_first_that_the_rules_keep_stays() -> None:
    clips = [clip("black", "0f", black=1), clip("first", "0f", black=0), clip("twin", "1f", black=0), clip("other", "ffff", black=0)]
    clips.append(clip("no hash", "", black=0))
    found = judged(clips, rules(Rule(column="black", max=0.5), duplicates=1))
    assert found.dropped.keys() == {"black", "twin"}
    assert (found.dropped["twin"].reason, found.dropped["twin"].detail) == ("near duplicate", "of first.mp4 at 0.00 s")
    assert found.alone[DUPLICATE] == 2


def test_what_is_known_anyway_may_be_bounded_too() -> None:
    small = dataclasses.replace(clip("small"), media=dataclasses.replace(MEDIA, width=16))
    found = judged([clip("a"), small], rules(Rule(column="width", min=64), Rule(column="seconds", min=1, max=3)))
    assert found.dropped["small"].reason == "width below 64"
    assert list(found.alone) == ["width below 64", "seconds below 1 or above 3"]
