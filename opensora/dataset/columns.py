"""Columns that a rule of `filter.rules` may bound: their names, which are texts, and which are measured only where that is asked for.

Owns the names (docs/datasets.md says what each is), so that a rule can be refused before a video is opened. Refuses to measure.
"""

from __future__ import annotations

import difflib

from opensora.dataset.prepare_config import Filter, Rule
from opensora.errors import ConfigError
from opensora.printable import quoted

KNOWN = ("seconds", "frames", "fps", "width", "height")
"""Numbers that each clip has."""
MEASURED = ("motion", "static", "black", "brightness", "contrast", "sharpness", "flashes", "fade")
"""Of the one decode."""
TEXTS = ("codec", "hdr", "source", "licence", "language")
ASKED = {"text_area": "filter.text_area: true"} | dict.fromkeys(("aesthetic", "clip"), "filter.scores: FOLDER of a CLIP model")
"""Numbers that are measured where the file says so, and what it says then."""
NUMBERS = (*KNOWN, *MEASURED, *ASKED, "words")


def check(settings: Filter) -> None:
    """Raises ConfigError where a rule is on a column that no clip will have, or bounds texts as numbers or numbers as texts."""
    for place, rule in enumerate(settings.rules):
        _check(f"filter.rules[{place}]", rule, settings)


def _check(subject: str, rule: Rule, settings: Filter) -> None:
    name = rule.column
    if name not in (*NUMBERS, *TEXTS):
        near = difflib.get_close_matches(name, (*NUMBERS, *TEXTS), n=1)
        hint = f"Is {near[0]} meant? " if near else ""
        raise ConfigError(f"{subject}: no column {quoted(name, 80)}. {hint}There are: {', '.join(sorted((*NUMBERS, *TEXTS)))}")
    if name in ASKED and not (settings.text_area if name == "text_area" else settings.scores):
        raise ConfigError(f"{subject}: {name} is not measured. Write {ASKED[name]}, or take the rule away")
    if name in TEXTS and (rule.min is not None or rule.max is not None):
        raise ConfigError(f"{subject}: min and max bound numbers, {name} is a text. Give any_of")
    if name in NUMBERS and rule.any_of:
        raise ConfigError(f"{subject}: any_of names texts, {name} is a number. Give min or max")
