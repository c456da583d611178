"""docs/architecture.md leads to what is there: each file that a table names defines what the table says to look at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
ROWS = [
    (re.findall(r"`([\w/]+\.py)`", line), re.findall(r"`(\w+)`", line.rpartition("| ")[2]))
    for line in (REPOSITORY / "docs/architecture.md").read_text().splitlines()
    if re.search(r"\| `[\w/]+\.py`", line)
]


def test_the_page_names_files() -> None:
    assert len(ROWS) > 25


@pytest.mark.parametrize(("files", "names"), ROWS, ids=[f"{files[0]}-{number}" for number, (files, _) in enumerate(ROWS)])
def test_a_file_that_is_named_defines_what_to_look_at(files: list[str], names: list[str]) -> None:
    for file in files:
        text = (REPOSITORY / file).read_text()
        for name in names:
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b.*=", text, re.MULTILINE), f"{file} defines no {name}"
