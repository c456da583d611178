"""A data set is its contents and captions in their order, wherever they lie; and what differs between two is said row by row."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.dataset.manifest import UNKNOWN, DataManifest, Row, changed_since, renamed, rows_that_differ, told


def row(path: str, text: str, content: bytes | None = b"film") -> Row:
    return Row(path, text, None if content is None else len(content), None if content is None else hashlib.sha256(content).hexdigest())


ROWS = (row("a.mp4", "one", b"1"), row("b.mp4", "two", b"22"), row("more/c.mp4", "three", b"333"))
DATA = DataManifest(ROWS)

texts = st.text(max_size=12)
rows = st.lists(st.builds(row, texts, texts, st.one_of(st.none(), st.binary(max_size=4))), max_size=5, unique_by=lambda one: one.path)


@given(rows, st.sampled_from(["content", "name"]))
def test_a_manifest_comes_back_as_it_was(rows: list[Row], by: str) -> None:
    manifest = DataManifest(tuple(rows), by)  # type: ignore[arg-type]
    again = DataManifest.decode(manifest.encode())
    assert again == manifest and again.digest == manifest.digest and again.encode() == manifest.encode()


def test_the_same_data_elsewhere_is_the_same_data_set() -> None:
    elsewhere = DataManifest(tuple(replace(one, path=f"/other/{one.path}") for one in ROWS))
    assert elsewhere.digest == DATA.digest and rows_that_differ(DATA, elsewhere) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((*ROWS, row("d.mp4", "four")), ["d.mp4: added"]),
        (ROWS[:2], ["more/c.mp4: removed"]),
        ((replace(ROWS[0], text="uno"), *ROWS[1:]), ["a.mp4: caption was 'one', is 'uno'"]),
        ((row("a.mp4", "one", b"x"), *ROWS[1:]), ["a.mp4: content was 6b86b273ff34, is 2d711642b726"]),
        ((row("a.mp4", "one", None), *ROWS[1:]), ["a.mp4: content was 6b86b273ff34, is unreadable"]),
        ((ROWS[1], ROWS[0], ROWS[2]), ["the same rows in another order, from row 1 on"]),
        ((replace(ROWS[0], path="z.mp4", text="uno"), *ROWS[1:]), ["z.mp4: caption was 'one', is 'uno'"]),
    ],
    ids=["added", "removed", "caption", "content", "unreadable", "order", "moved and captioned anew"],
)
def test_what_differs_is_said_by_row_and_changes_the_digest(rows: tuple[Row, ...], said: list[str]) -> None:
    other = DataManifest(rows)
    assert other.digest != DATA.digest
    assert list(map(str, rows_that_differ(DATA, other))) == said


@given(rows, rows)
def test_digests_differ_exactly_where_rows_do(one: list[Row], other: list[Row]) -> None:
    old, new = DataManifest(tuple(one)), DataManifest(tuple(other))
    assert (old.digest != new.digest) == bool(rows_that_differ(old, new))


def test_by_name_a_path_counts_and_no_content() -> None:
    named = DataManifest(tuple(Row(one.path, one.text, None, None) for one in ROWS), "name")
    assert named.digest not in (DATA.digest, DataManifest(named.rows).digest) and named.unreadable == 0
    assert replace(named, rows=(replace(named.rows[0], path="x.mp4"), *named.rows[1:])).digest != named.digest


def test_many_differences_are_told_by_the_first_of_them() -> None:
    fewer = DataManifest((row("a.mp4", "uno", b"1"),))
    assert told(rows_that_differ(DATA, fewer), most=1) == "a.mp4: caption was 'one', is 'uno'; and 2 more"


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda _: b"{}", lambda _: b"", lambda data: data[:20] + b"\0" + data[21:]])
def test_a_damaged_manifest_is_not_believed(damage: object) -> None:
    with pytest.raises(ValueError):
        DataManifest.decode(damage(DATA.encode()))  # type: ignore[operator]


def test_an_edited_row_is_not_believed() -> None:
    import gzip

    with pytest.raises(ValueError, match="digest"):
        DataManifest.decode(gzip.compress(gzip.decompress(DATA.encode()).replace(b"three", b"seven")))


def test_what_a_trainer_finds_is_compared_by_caption_and_size() -> None:
    now = [(one.path, one.text) for one in ROWS]
    assert changed_since(DATA, now, [1, 2, 3]) == changed_since(DATA, now, [UNKNOWN] * 3) == []
    assert changed_since(DATA, [(f"/x/{path}", text) for path, text in now], [1, 2, 3]) == []
    assert list(map(str, changed_since(DATA, now, [1, 9, None]))) == [
        "b.mp4: content was 785f3ec7eb32, is 9 bytes",
        "more/c.mp4: content was 556d7dc3a115, is unreadable",
    ]
    assert list(map(str, changed_since(DATA, [("a.mp4", "uno"), *now[1:]], [1, 2, 3]))) == ["a.mp4: caption was 'one', is 'uno'"]
    assert list(map(str, changed_since(DATA, now[:2], [1, 2]))) == ["more/c.mp4: removed"]


FOUR = (*ROWS, row("z.mp4", "four", b"4444"))


@pytest.mark.parametrize(
    "names",
    [
        ("a.mp4", "zwei.mp4", "more/c.mp4", "z.mp4"),
        ("b.mp4", "more/c.mp4", "z.mp4", "a.mp4"),
        ("a.mp4", "b.mp4", "elsewhere/c.mp4", "z.mp4"),
    ],
    ids=["one", "each takes the next one's name", "one folder"],
)
def test_names_are_free_where_captions_and_sizes_are_those_of_the_rows(names: tuple[str, ...]) -> None:
    now = [(name, one.text) for name, one in zip(names, FOUR, strict=True)]
    data = DataManifest(FOUR)
    assert data.digest == DataManifest(tuple(replace(one, path=name) for one, name in zip(FOUR, names, strict=True))).digest
    assert changed_since(data, now, [1, 2, 3, 4]) == []
    assert changed_since(data, now, [1, 2, 3, 5]) and changed_since(data, [*now[:3], (now[3][0], "x")], [1, 2, 3, 4])
    assert changed_since(data, now, [UNKNOWN] * 4), "of a file whose size nobody asked, the name alone tells"
    assert renamed(data, now) == [number for number, name in enumerate(names) if name != FOUR[number].path]


def test_beside_a_renamed_file_what_really_differs_is_said_alone() -> None:
    now = [("a.mp4", "uno"), ("zwei.mp4", "two"), ("more/c.mp4", "three")]
    assert list(map(str, changed_since(DATA, now, [1, 2, 3]))) == ["a.mp4: caption was 'one', is 'uno'"]


def test_another_order_is_told_whatever_the_names() -> None:
    now = [(ROWS[number].path, ROWS[number].text) for number in (1, 0, 2)]
    assert list(map(str, changed_since(DATA, now, [2, 1, 3]))) == ["the same rows in another order, from row 1 on"]


def test_by_name_a_renamed_file_is_another_one() -> None:
    named = DataManifest(tuple(Row(one.path, one.text, None, None) for one in ROWS), "name")
    now = [("a.mp4", "one"), ("zwei.mp4", "two"), ("more/c.mp4", "three")]
    assert [one.kind for one in changed_since(named, now, [1, 2, 3])] == ["added", "removed"]
