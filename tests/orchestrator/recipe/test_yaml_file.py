"""What YAML would guess at is refused or read as YAML 1.2; what is wrong is said in one line with its place."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.recipe.yaml_file import MAX_BYTES, parse, parse_value, read

LAW = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""Deterministic, and indifferent to a busy machine."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("7", 7),
        ("-7", -7),
        ("80_000", 80000),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2026-11-01", "2026-11-01"),
        ("v1.0.0", "v1.0.0"),
        ("e5", "e5"),
        (".", "."),
        ("1e", "1e"),
        ("'7'", "7"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    found = parse_value(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_infinities_and_not_a_number_are_floats() -> None:
    assert parse_value("-.inf", "x") == -math.inf
    assert math.isnan(parse_value(".nan", "x"))


@LAW
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_as_python_writes_it_is_read_as_that_float(number: float) -> None:
    assert parse_value(repr(number), "x") == number


@LAW
@given(st.integers())
def test_an_integer_as_python_writes_it_is_read_as_that_integer(number: int) -> None:
    assert parse_value(str(number), "x") == number


def test_each_key_knows_its_line() -> None:
    document = parse("a: 1\nb:\n  c: 2\n  d:\n    - e: 3\n    - 4\n", "x.yaml")
    assert document.lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", 0): 5, ("b", "d", 0, "e"): 5, ("b", "d", 1): 6}
    assert document.at(("b", "d", 0, "absent")) == "x.yaml:5"


def test_an_override_replaces_one_value_and_is_blamed_for_it() -> None:
    document = parse("a: {b: 1, c: 2}\nl: [{n: 1}, {n: 2}]\n", "x.yaml")
    changed = (
        document.with_value(("a", "b"), 3, "--set a.b=3").with_value(("l", 1, "n"), 5, "--set l").with_value(("new", "deep"), 4, "env")
    )
    assert changed.value == {"a": {"b": 3, "c": 2}, "l": [{"n": 1}, {"n": 5}], "new": {"deep": 4}}
    assert changed.at(("a", "b")) == "--set a.b=3"
    assert changed.at(("a", "c")) == "x.yaml:1"
    assert document.value == {"a": {"b": 1, "c": 2}, "l": [{"n": 1}, {"n": 2}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x:3: a: given twice, first on line 1. Remove one"),
        ("a:\n  b: 1\n  b: 2\n", "x:3: a.b: given twice, first on line 2. Remove one"),
        ("a: [1, 2\nb: 3\n", "x:2: not YAML: expected ',' or ']', but got ':'. Correct the line, or quote the value"),
        ("a: @x\n", "x:1: not YAML: found character '@' that cannot start any token. Correct the line, or quote the value"),
        ("a: 1\n---\nb: 2\n", "x:2: not YAML: but found another document. Correct the line, or quote the value"),
        ("a: *b\n", "x:1: not YAML: found undefined alias 'b'. Correct the line, or quote the value"),
        ("a: &b [*b]\n", "x:1: nested more than 20 levels deep. Remove levels"),
        ("a: 1\nb: \x07\n", "x:2: character 0x0007 is not allowed in YAML. Remove it"),
        ("a: !!python/object/apply:os.system [ls]\n", "x:1: tag !!python/object/apply:os.system is not allowed. Write a plain value"),
        ("a: !!binary aGk=\n", "x:1: tag !!binary is not allowed. Write a plain value"),
        ("[1, 2]: 3\n", "x:1: a key is sequence, expected a name. Write `name: value`"),
        ("- 1\n", "x: expected keys and values, found a list of 1. See `osctl explain`"),
        ("", "x: expected keys and values, found nothing. See `osctl explain`"),
        ("just words\n", "x: expected keys and values, found 'just words'. See `osctl explain`"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, "x")
    assert str(caught.value) == message


def test_a_pipe_that_nobody_writes_to_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prepare.yaml")
    with pytest.raises(UsageError, match=r"prepare.yaml: is a pipe, which may never end. Name a YAML file"):
        read(tmp_path / "prepare.yaml")


def test_depth_is_bounded_even_where_the_parser_would_give_up_first() -> None:
    with pytest.raises(UsageError, match="nested more than 20 levels deep"):
        parse("a: " + "[" * 5000 + "]" * 5000, "x")


def test_aliases_cannot_stand_for_a_billion_values() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UsageError, match="more than 100,000 values, aliases followed"):
        parse("\n".join(lines), "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbfa: 1\n", "{path}:1: starts with a byte order mark, expected plain UTF-8. Save it without one"),
        (b"a: 1\nb: \xff\n", "{path}:2: byte 0xff is not UTF-8. Save the file as UTF-8"),
        (b"a:\n\tb: 1\n", "{path}:2: indented by a tab, YAML wants spaces. Replace the tab by spaces"),
        (b"#" * (MAX_BYTES + 1), "{path}: 1,000,001 bytes, a configuration has at most 1,000,000. Name a YAML file of stages"),
    ],
)
def test_a_file_that_is_no_plain_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value) == message.format(path=path)


def test_a_tab_inside_quotes_is_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 'b\tc'\n")
    assert read(path).value == {"a": "b\tc"}


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="is a folder, not a file"):
        read(tmp_path)
