"""Rules are refused by the names of their columns, and those are the names of what is measured."""

from __future__ import annotations

import pytest

from opensora.dataset import columns
from opensora.dataset.prepare_config import DEFAULT_RULES, Filter, Rule
from opensora.errors import ConfigError
from opensora.prepare.filters import BUILT_IN


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            Rule(column="moton", min=1),
            r"filter\.rules\[1\]: no column moton\. Is motion meant\? There are: aesthetic, .*width, words",
        ),
        (Rule(column="\x1b[31m", min=1), r"no column \\x1b\[31m\. There are"),
        (Rule(column="text_area", max=0.1), r"text_area is not measured\. Write filter\.text_area: true"),
        (Rule(column="aesthetic", min=5), r"aesthetic is not measured\. Write filter\.scores: FOLDER of a CLIP model"),
        (Rule(column="language", min=1), "min and max bound numbers, language is a text. Give any_of"),
        (Rule(column="width", any_of=("640",)), "any_of names texts, width is a number. Give min or max"),
    ],
)
def test_a_rule_that_cannot_be_judged_is_refused_with_what_to_write(rule: Rule, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        columns.check(Filter(rules=(DEFAULT_RULES[0], rule)))


def test_all_that_is_measured_may_be_bounded() -> None:
    rules = [Rule(column=name, min=0) for name in columns.NUMBERS] + [Rule(column=name, any_of=("a",)) for name in columns.TEXTS]
    columns.check(Filter(rules=tuple(rules), text_area=True, scores="/models/clip"))
    assert set(BUILT_IN) == {*columns.KNOWN, *columns.TEXTS} - {"language"}
