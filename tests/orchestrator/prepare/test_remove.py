"""A source is taken out on request: nothing of it is left in the store, and no later preparation brings it back."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import prepare_steps
import pytest
from effect_fates import Crash, Fate
from prepare_bench import Bench
from pyarrow import parquet

from opensora.dataset.prepare_config import Filter
from opensora.dataset.rows import Fetched
from orchestrator.effects import watched_by
from orchestrator.errors import Refused, Unreachable
from orchestrator.inputs import datasets
from orchestrator.ledger.store import Ledger
from orchestrator.prepare import removed
from orchestrator.prepare.clip_rows import Clips
from orchestrator.prepare.kept import KeptResults, key_of
from orchestrator.prepare.publish import described
from orchestrator.prepare.records import Keys
from orchestrator.prepare.remove import Taken, find, take_out
from orchestrator.prepare.run import Prepared
from orchestrator.prepare.watching import look, steps_of
from orchestrator.prepare.why import why

BOTH = pytest.mark.parametrize("any_bench", ["folder", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
KEYS = Keys("mine")


def take(bench: Bench, wanted: str, **more: Any) -> Taken:
    now = bench.clock.now()
    handle = Ledger(bench.store, KEYS.folder).acquire(now)
    try:
        return take_out(bench.store, find(bench.store, wanted, None), bench.directory().path, handle, now=now, holder="me@here")
    finally:
        handle.release()


def texts(bench: Bench) -> list[str]:
    return [row.text for row in datasets.get_manifest(bench.store, datasets.of_name(bench.store, "mine")[-1].manifest).rows]


def everything(bench: Bench) -> bytes:
    """All bytes of all objects."""
    return b"".join(bench.store.read(key).data for key in bench.store.list(""))


@BOTH
@pytest.mark.parametrize("form", [(), ("--packs",)], ids=["files", "packs"])
def test_nothing_of_a_source_is_left_but_that_it_was_taken_out(any_bench: Bench, form: tuple[str, ...]) -> None:
    bench = any_bench
    first = bench.run("--parquet", *form)
    assert first.published is not None and b"clip of film b" in everything(bench)
    taken = take(bench, "b.mp4")
    assert b"clip of film b" not in everything(bench) and b"clip of film a" in everything(bench)
    assert texts(bench) == ["half 0 of a", "half 1 of a", "half 0 of c", "half 1 of c"]
    left = [key for key in bench.store.list("datasets/mine/") if b"half 0 of b" in bench.store.read(key).data]
    assert left == []
    about = taken.published.description
    assert (
        about.clips == 4 and about.digest != first.published.description.digest and [s["name"] for s in about.sources] == ["a.mp4", "c.mp4"]
    )
    assert about.steps["removed"] == {"in": 6, "kept": 4, "dropped": {"taken out on request": 2}, "quarantined": {}}
    assert len(bench.store.children("datasets/mine/prepared/")) == 1 and (bench.videos / "b.mp4").exists()
    for path, one in about.files.items():
        folder = taken.published.place.removeprefix(f"{bench.store.url}/")
        assert bench.store.digest(f"{folder}/{path}") == (one["size"], one["sha256"])


def test_the_digest_without_it_is_that_of_a_data_set_that_never_had_it(bench: Bench) -> None:
    bench.run("--parquet")
    shorter = take(bench, "b.mp4").published.description.digest
    (bench.videos / "b.mp4").unlink()
    never = Bench(bench.folder / "never", type(bench.store)(bench.folder / "never/store"), bench.videos).run("--parquet")
    assert never.published is not None and never.published.description.digest == shorter


def by_the_engine(bench: Bench) -> Prepared:
    """With the engine itself, over text files: its manifest has the columns of the real steps."""
    preparation = bench.preparation(filter=Filter(rules=(), text_area=True, duplicates=None), caption={"kind": "digits"})
    tests = Path(prepare_steps.__file__).parent
    env = {**preparation.asked.env, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = (sys.executable, str(tests / "prepare_steps.py"), "{run_dir}")
    preparation.asked = dataclasses.replace(preparation.asked, command=command, env=env)
    return preparation.run()


def test_the_next_preparation_gives_the_very_version_that_was_published_without_it(bench: Bench) -> None:
    bench.videos = bench.folder / "texts"
    prepare_steps.write_video(bench.videos, "a", (0, 10, 1.0, "a red ball"), (10, 30, 0.2, "nothing moves"))
    prepare_steps.write_video(bench.videos, "b", (0, 10, 1.5, "a green ball falls"))
    prepare_steps.write_video(bench.videos, "c", (5, 25, 3.0, "a yellow ball"))
    assert by_the_engine(bench).published is not None
    taken = take(bench, "b").published
    again = by_the_engine(bench).published
    assert again is not None and not again.new
    assert (again.place, again.description.digest) == (taken.place, taken.description.digest)
    metadata = parquet.read_schema(bench.directory().out / "manifest.parquet").metadata
    assert metadata[b"osctl.digest"].decode() == taken.description.digest


def test_until_the_next_preparation_status_and_why_tell_what_is_left(bench: Bench) -> None:
    bench.run("--parquet")
    gone = hashlib.sha256((bench.videos / "b.mp4").read_bytes()).hexdigest()
    taken = take(bench, "b.mp4").published
    digest = taken.description.digest[:16]
    for place in (bench.directory().path, bench.folder / "another machine"):
        state = look(bench.store, "mine", place)
        assert (state.word, state.reason) == ("prepared", f"b.mp4 taken out since its last run: 4 clips, digest {digest}")
        assert steps_of(state.status)[-1]["name"] == "removed" and (
            steps_of(state.status)[-1]["in"],
            steps_of(state.status)[-1]["kept"],
        ) == (6, 4)
    with Clips.in_store(bench.directory(), bench.store, "mine") as clips:
        assert why(clips, "a.mp4", None)["verdict"] == "2 of 2 clips are kept"
        for name in ("b.mp4", gone[:8], str(bench.videos / "b.mp4")):
            found = why(clips, name, None)
            assert (found["name"], found["step"], found["verdict"]) == ("b.mp4", "download", "taken out on request")
        assert {row.verdict for row in clips.rows()} == {"kept"} and len(list(clips.rows())) == 4
    bench.run("--parquet")
    assert look(bench.store, "mine", bench.directory().path).reason == "4 clips"
    with Clips.in_store(bench.directory(), bench.store, "mine") as clips:
        assert why(clips, "b.mp4", None)["verdict"] == "taken out on request"


def test_another_machine_that_has_the_older_set_still_tells_what_is_left(bench: Bench) -> None:
    bench.run("--parquet")
    bench.run("--parquet", run_dir="elsewhere")
    take(bench, "b.mp4")
    with Clips.in_store(bench.directory("elsewhere"), bench.store, "mine") as clips:
        assert why(clips, "b.mp4", None)["verdict"] == "taken out on request" and len(list(clips.rows())) == 4
        assert why(clips, "c.mp4", None)["verdict"] == "2 of 2 clips are kept"


def test_the_next_preparation_does_not_bring_it_back(bench: Bench) -> None:
    bench.run("--parquet")
    take(bench, hashlib.sha256((bench.videos / "b.mp4").read_bytes()).hexdigest()[:8])
    (bench.videos / "d.mp4").write_bytes(b"film d")
    again = bench.run("--parquet")
    assert again.published is not None and [one["name"] for one in again.published.description.sources] == ["a.mp4", "c.mp4", "d.mp4"]
    assert again.published.description.steps["download"]["dropped"] == {"taken out on request": 1}


def results_of(bench: Bench, sha256: str) -> int:
    """How many results of the steps, here and in the store, name a source."""
    names = [sha256[:20].encode(), sha256.encode()]
    here = [path.read_bytes() for path in bench.directory().kept.rglob("*") if path.is_file()]
    there = [bench.store.read(key).data for key in bench.store.list(f"{KEYS.kept}/")]
    by_name = [path.name.encode() for path in bench.directory().kept.rglob("*")]
    return sum(data.count(name) for data in (*here, *there, *by_name) for name in names)


@pytest.mark.parametrize("form", [(), ("--packs",)], ids=["files", "packs"])
def test_no_result_names_a_source_that_was_taken_out_and_those_of_others_are_used(bench: Bench, form: tuple[str, ...]) -> None:
    bench.run("--parquet", *form)
    sha256 = {name: hashlib.sha256((bench.videos / f"{name}.mp4").read_bytes()).hexdigest() for name in "abc"}
    before = {name: results_of(bench, one) for name, one in sha256.items()}
    assert min(before.values()) >= 3
    take(bench, "b.mp4")
    after = {name: results_of(bench, one) for name, one in sha256.items()}
    assert after["b"] == 0 and after["a"] >= before["a"] and after["c"] >= before["c"]
    sources = [row.source.name for _, row in KeptResults(bench.directory().path).sources() if isinstance(row, Fetched)]
    assert sorted(sources) == ["a.mp4", "c.mp4"]


def test_scores_of_clips_with_their_captions_go_too(bench: Bench) -> None:
    bench.run("--parquet")
    with Clips.of(bench.directory()) as clips:
        keys = {row.source: key_of(row.id, row.caption) for row in clips.rows()}
    for key in keys.values():
        path = bench.directory().kept / f"matches/{'5' * 16}/{key[:2]}/{key}.json"
        path.parent.mkdir(parents=True)
        path.write_text('{"row":{"values":{"clip":0.25}}}')
    bench.run("--parquet", filter={"rules": []})
    assert all(any(key in name for name in bench.store.list("datasets/mine/kept/matches/")) for key in keys.values())
    take(bench, "b.mp4")
    left = {key for key in keys.values() if any(key in name for name in bench.store.list("datasets/mine/kept/matches/"))}
    assert left == {keys["a.mp4"], keys["c.mp4"]} == {path.stem for path in (bench.directory().kept / "matches").rglob("*.json")}


@pytest.mark.parametrize("form", [(), ("--packs",)], ids=["files", "packs"])
@pytest.mark.parametrize("at", [1, 3, 8, 12, 20, 30])
def test_whoever_is_interrupted_may_ask_again(bench: Bench, at: int, form: tuple[str, ...]) -> None:
    bench.run("--parquet", *form)
    sha256 = hashlib.sha256((bench.videos / "b.mp4").read_bytes()).hexdigest()
    fate = Fate(at, "after" if at % 2 else "lost")
    with watched_by(fate):
        try:
            take(bench, "b.mp4")
        except (Crash, Unreachable):
            assert fate.reached
    bench.clock.ahead_s += 60
    take(bench, "b.mp4")
    assert b"clip of film b" not in everything(bench) and len(texts(bench)) == 4 and results_of(bench, sha256) == 0
    assert len(bench.store.children("datasets/mine/prepared/")) == 1


def test_who_it_means_must_be_clear(bench: Bench) -> None:
    bench.run("--parquet")
    (bench.videos / "b.mp4").rename(bench.videos / "e.mp4")
    with pytest.raises(Refused, match="no such source"):
        find(bench.store, "x.mp4", None)
    one = bench.asked()
    twin = Bench(bench.folder / "twin", bench.store, bench.videos)
    preparation = twin.preparation("--parquet")
    preparation.asked = type(one)(**{**vars(preparation.asked), "config": preparation.asked.config.model_copy(update={"name": "twin"})})
    preparation.run()
    with pytest.raises(Refused, match="means 2 sources"):
        find(bench.store, "a.mp4", None)
    assert find(bench.store, "a.mp4", "twin").name == "twin"


def test_the_only_source_is_not_taken_out(bench: Bench, videos: Path) -> None:
    for name in ("b", "c"):
        (videos / f"{name}.mp4").unlink()
    bench.run("--parquet")
    with pytest.raises(Refused, match="only source"):
        take(bench, "a.mp4")
    version = datasets.of_name(bench.store, "mine")[-1].source.rpartition("/")[2]
    assert described(bench.store, "mine", version).clips == 2 and removed.all_of(bench.store, KEYS) == []
