"""The codes that a person may name are those that a caption can be told to be in."""

from __future__ import annotations

import py3langid  # type: ignore[import-untyped]
from py3langid import langid

from opensora.dataset.languages import CODES


def test_codes_are_those_of_the_library_that_tells_them() -> None:
    py3langid.classify("it loads its model once")
    assert {str(code) for code in langid.IDENTIFIER.nb_classes} - {"zxx"} == CODES, "zxx: no language at all"
