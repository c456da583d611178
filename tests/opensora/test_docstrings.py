"""The words of a field are those that stand under it."""

from __future__ import annotations

from opensora import docstrings
from opensora.config import Frozen


class Base(Frozen):
    speed: float = 1.0
    """Of the base, in steps a second."""
    silent: int = 0


class Derived(Base):
    """A class with fields of its own."""

    speed: float = 2.0
    """Its own words
    in two lines."""
    other: int = 0


def test_words_stand_under_the_field_in_the_source() -> None:
    assert docstrings.of_fields(Derived) == {"speed": "Its own words\nin two lines."}


def test_a_schema_has_the_words_of_a_class_and_of_those_that_it_is_made_from() -> None:
    fields = Derived.model_json_schema()["properties"]
    assert fields["speed"]["description"] == "Its own words\nin two lines."
    assert Base.model_json_schema()["properties"]["speed"]["description"] == "Of the base, in steps a second."
    assert "description" not in fields["silent"] and "description" not in fields["other"]
