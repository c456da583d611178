"""Laws of kept results: whole or absent, found again, and what cannot be read counts as absent."""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import open_files

from opensora.dataset import kept_packs
from opensora.dataset.kept_packs import OPEN, line_of, name_of
from opensora.dataset.rows import Captioned, ClipFile, Drop, Leaves, Quarantine, to_json
from opensora.prepare import open_pack
from opensora.prepare.kept import Columns, Kept, KeptFiles, SingleFiles, place

Opened = Callable[..., Kept[Captioned]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """As each run does it; it is left as a kill leaves it."""
    (tmp_path / "temporary").mkdir()
    with contextlib.ExitStack() as at_the_end:

        def one(kind: type[Kept[Captioned]] = Kept) -> Kept[Captioned]:
            kept = kind(tmp_path / "kept", tmp_path / "temporary", "caption", "0123456789abcdef", Captioned)
            at_the_end.callback(kept.leave)
            return kept

        yield one


@pytest.fixture
def kept(opened: Opened) -> Kept[Captioned]:
    return opened()


def packs(kept: Kept[Captioned]) -> list[Path]:
    return sorted((kept.root / "caption/0123456789abcdef").glob("[!.]*.jsonl"))


CAPTION = Captioned('a "red" ball\n=of 漢字', "model", "what?", 3, 10, 2, 0.5, "en")
OUTCOMES = [CAPTION, Drop("too short", "2 words"), Quarantine("refused", "")]


def same(read: Captioned | Leaves | None, outcome: Captioned | Leaves) -> bool:
    if isinstance(outcome, Leaves):
        return isinstance(read, type(outcome)) and (read.reason, read.detail) == (outcome.reason, outcome.detail)
    return read == outcome


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("stamp", ["", "12-345"])
def test_what_is_written_is_read_at_once_in_its_pack_and_by_the_next_run(
    kept: Kept[Captioned], outcome: Captioned | Leaves, stamp: str, opened: Opened
) -> None:
    kept.write("abcdef", outcome, stamp)
    assert same(kept.read("abcdef", stamp), outcome)
    kept.finish()
    assert same(kept.read("abcdef", stamp), outcome)
    assert same(opened().read("abcdef", stamp), outcome)
    assert not list(kept.temporary.iterdir())


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_an_earlier_release_kept_in_files_of_their_own_is_read(outcome: Captioned | Leaves, tmp_path: Path, opened: Opened) -> None:
    opened(SingleFiles).write("abcdef", outcome)
    assert (tmp_path / "kept/caption/0123456789abcdef/ab/abcdef.json").is_file()
    later = opened()
    assert same(later.read("abcdef"), outcome) and later.read("abcde0") is None
    later.write("abcdef", CAPTION)
    assert later.read("abcdef") == CAPTION, "what is newer counts"


def test_a_pack_is_called_by_its_content_and_ends_with_its_number_of_results_or_its_age(
    kept: Kept[Captioned], monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    monkeypatch.setattr(open_pack, "MOST", 3)
    for number in range(7):
        kept.write(f"{number:020x}", CAPTION)
    assert [path.read_bytes().count(b"\n") for path in packs(kept)] == [3, 3]
    now = [0.0]
    kept._pack._clock = lambda: now[0]
    kept._pack._began = 0.0
    now[0] = open_pack.MOST_S
    kept.write(f"{7:020x}", CAPTION)
    assert len(packs(kept)) == 3
    assert all(path.name == name_of(path.read_bytes()) for path in packs(kept))
    assert all(opened().read(f"{number:020x}") == CAPTION for number in range(8))


def test_a_result_with_another_stamp_is_not_used(kept: Kept[Captioned]) -> None:
    kept.write("abcdef", CAPTION, "12-345")
    assert kept.read("abcdef", "13-345") is None
    assert kept.unreadable == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(cut=st.integers(0, 600), stamp=st.sampled_from(["", "1-2"]), zeros=st.booleans())
def test_a_pack_that_ends_anywhere_has_what_is_whole_and_goes_on(tmp_path: Path, opened: Opened, cut: int, stamp: str, zeros: bool) -> None:
    """As a kill leaves it. After a power cut a file system may also have its length, and zeros for what was not written."""
    shutil.rmtree(tmp_path / "kept", ignore_errors=True)
    kept = opened()
    for key in ("abcdef", "abcdee", "abcded"):
        kept.write(key, CAPTION, stamp)
    (pack,) = (kept.root / "caption/0123456789abcdef").iterdir()
    kept.leave()
    data = pack.read_bytes()
    length = len(data) // 3
    pack.write_bytes(data[:cut] + bytes(max(0, len(data) - cut) if zeros else 0))
    later = opened()
    assert [later.read(key, stamp) for key in ("abcdef", "abcdee", "abcded")] == [
        CAPTION if cut >= (number + 1) * length else None for number in range(3)
    ]
    later.write("abcded", CAPTION, stamp)
    last = opened()
    assert later.read("abcded", stamp) == CAPTION == last.read("abcded", stamp)
    later.leave()
    last.leave()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"row":{}}', b'{"row":{"x":1}}', b'{"drop":{}}', b"\xff", b'{"other":{"reason":"","detail":""}}']
)
def test_what_is_no_result_counts_as_absent_and_is_made_again_once(kept: Kept[Captioned], data: bytes, opened: Opened) -> None:
    place(data, kept.temporary, kept.path("abcdef"))
    assert kept.read("abcdef") is None
    assert kept.unreadable == 1
    (kept.root / "caption/0123456789abcdef/a.jsonl").write_bytes(line_of("abcde0", data) + b"\n" + data + b"\n")
    later = opened()
    assert later.read("abcde0") is None
    later.write("abcde0", CAPTION)
    later.close()
    assert opened().read("abcde0") == CAPTION


def test_of_two_packs_the_first_by_name_counts_whatever_was_brought_when(tmp_path: Path, opened: Opened) -> None:
    folder = tmp_path / "kept/caption/0123456789abcdef"
    folder.mkdir(parents=True)
    for name, words in (("b", "of b"), ("a", "of a"), ("c", "of c")):
        row = to_json(replace(CAPTION, text=words))
        (folder / f"{name}.jsonl").write_bytes(line_of("abcdef", b'{"row":' + row + b"}"))
    read = opened().read("abcdef")
    assert isinstance(read, Captioned) and read.text == "of a"


def test_many_results_are_found_by_their_keys(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among more packs than are held open, written and read in whatever order."""
    monkeypatch.setattr(open_pack, "MOST", 40)
    monkeypatch.setattr(kept_packs, "RECENT", 64)
    kept, draw = opened(), random.Random(0)
    keys = [f"{draw.getrandbits(80):020x}" for _ in range(600)]
    for number, key in enumerate(keys):
        kept.write(key, replace(CAPTION, seed=number))
        if number % 7 == 0:
            assert kept.read(keys[draw.randrange(number + 1)]) is not None
    for source in (kept, opened()):
        for number in draw.sample(range(600), 600):
            assert source.read(keys[number]) == replace(CAPTION, seed=number)
        assert source.read("f" * 20) is None


def test_a_full_disk_leaves_what_was_there_and_half_of_nothing(kept: Kept[Captioned], opened: Opened) -> None:
    kept.write("abcdef", CAPTION)
    pack = kept.root / "caption/0123456789abcdef" / OPEN
    size = pack.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(OSError):
            kept.write("abcdee", CAPTION)
        assert pack.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept.read("abcdef") == CAPTION and kept.read("abcdee") is None
    kept.write("abcdee", CAPTION)
    assert opened().read("abcdee") == CAPTION


def test_a_disk_that_is_full_before_the_first_result_leaves_no_pack_and_no_other_one_is_lost(opened: Opened) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for had in ([], ["abcdef"]):
        run = opened()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        try:
            with pytest.raises(OSError):
                run.write("abcdee", CAPTION)
            run.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [key for key in ("abcdef", "abcdee") if run.read(key) == CAPTION] == had
        assert len(packs(run)) == len(had) and not run.unreadable
        run.write("abcdef", CAPTION)
        run.close()
    assert opened().read("abcdef") == CAPTION


def test_a_pack_that_gets_no_name_is_not_left_open(kept: Kept[Captioned]) -> None:
    before = open_files()
    kept.write("abcdef", CAPTION)
    shutil.rmtree(kept.root)
    kept.close()
    assert open_files() == before


def test_a_file_whose_description_was_left_open_is_made_again_where_its_bytes_differ(tmp_path: Path) -> None:
    """A power cut may leave a file with its size and other bytes: what has a finished pack is known to be whole."""
    (tmp_path / "temporary").mkdir()

    def files() -> KeptFiles[ClipFile]:
        return KeptFiles(tmp_path / "kept", tmp_path / "temporary", "clips", "0", ClipFile)

    def row(data: bytes) -> ClipFile:
        return ClipFile("", hashlib.sha256(data).hexdigest(), len(data), 8, 64, 48, 8.0)

    first = files()
    for key in ("aaaa", "aaab", "aaac"):
        place(key.encode(), tmp_path / "temporary", first.path(key, ".mp4"))
        first.write(key, row(key.encode()))
    first.leave()
    first.path("aaab", ".mp4").write_bytes(b"\0\0\0\0")
    later = files()
    assert later.read("aaaa") == row(b"aaaa")
    assert [later.path(key, ".mp4").exists() for key in ("aaaa", "aaab", "aaac")] == [True, False, True]
    later.leave()


def test_an_absurd_count_that_was_kept_before_is_none_and_any_other_number_that_fits_no_column_is_made_again(kept: Kept[Captioned]) -> None:
    kept.write("abcdef", replace(CAPTION, tokens_in=10**30, tokens_out=-1))
    assert kept.read("abcdef") == replace(CAPTION, tokens_in=0, tokens_out=0)
    kept.write("abcdee", replace(CAPTION, seed=2**63))
    assert kept.read("abcdee") is None and kept.unreadable == 1


def test_columns_are_kept(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    kept = Kept(tmp_path / "kept", tmp_path / "temporary", "scores", "0", Columns, durable=True)
    kept.write("ff00", Columns({"aesthetic": 5.25}))
    assert kept.read("ff00") == Columns({"aesthetic": 5.25})
    kept.close()
