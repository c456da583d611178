"""Why a clip or a source is in a data set, or is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import Any

import pytest
from prepare_bench import Bench

from opensora.dataset.prepare_config import Filter, Given, Rule
from orchestrator.errors import Refused
from orchestrator.prepare.clip_rows import ClipRow, Clips
from orchestrator.prepare.why import why


def told(bench: Bench, wanted: str, place: str | None = None) -> dict[str, Any]:
    with Clips.of(bench.directory()) as clips:
        return why(clips, wanted, place)


def rows(bench: Bench) -> list[ClipRow]:
    with Clips.of(bench.directory()) as clips:
        return list(clips.rows())


def test_a_clip_that_is_kept_is_told_with_its_file_and_numbers(bench: Bench) -> None:
    bench.run()
    row = rows(bench)[0]
    found = told(bench, row.id[:8], "/store/mine")
    assert (found["verdict"], found["step"], found["source"]) == ("kept", "", "a.mp4")
    assert found["file"] == f"/store/mine/clips/{row.id}.mp4" and found["columns"]["motion"] == 0.5 and found["caption"] == "half 0 of a"
    assert told(bench, f"clips/{row.id}.mp4")["file"] == f"clips/{row.id}.mp4"


def leave(bench: Bench, step: str, kind: str, reason: str) -> str:
    """Make the first clip of a.mp4 leave at a step, as the engine keeps it; its id."""
    row = rows(bench)[0]
    bench.directory().description()
    (bench.directory().out / "DATASET.json").unlink()
    path = next((bench.directory().kept / step).rglob(f"{row.id}.json"))
    path.write_text(json.dumps({kind: {"reason": reason, "detail": "with 3 numbers"}}))
    return row.id


@pytest.mark.parametrize(("step", "kind"), [("clips", "quarantine"), ("caption", "drop")])
def test_a_clip_that_left_is_told_with_its_step_and_reason(bench: Bench, step: str, kind: str) -> None:
    bench.run(filter=Filter(rules=()))
    name = leave(bench, step, kind, "too slow")
    found = told(bench, name)
    assert (found["step"], found["verdict"], found["detail"]) == (step, "too slow", "with 3 numbers")


def test_a_rule_that_a_clip_breaks_is_told_with_both_numbers(bench: Bench) -> None:
    bench.run(filter=Filter(rules=(Rule(column="motion", max=1.0),)))
    (bench.directory().out / "DATASET.json").unlink()
    found = told(bench, rows(bench)[1].id)
    assert (found["step"], found["verdict"], found["detail"]) == ("filter", "motion above 1", "it is 1.5")


def test_a_near_duplicate_is_told_with_the_clip_that_it_is_near_to(bench: Bench) -> None:
    bench.run(filter=Filter(rules=(), duplicates=4))
    first, kept = rows(bench)[0], bench.directory().kept
    (bench.directory().out / "DATASET.json").unlink()
    path = next((kept / "frames").rglob(f"{hashlib.sha256((bench.videos / 'b.mp4').read_bytes()).hexdigest()[:20]}.json"))
    content = json.loads(path.read_text())
    content["row"]["shots"][0]["phash"] = f"{int(first.shot.phash, 16) ^ 0b1001:016x}"
    path.write_text(json.dumps(content))
    copy = next(row for row in rows(bench) if row.source == "b.mp4")
    next((kept / "clips").rglob(f"{copy.id}.json")).unlink()
    found = told(bench, copy.id)
    assert (found["step"], found["verdict"], found["detail"]) == ("filter", "near duplicate", f"of clip {first.id}")


def test_a_source_is_told_with_all_its_clips_and_cuts(bench: Bench) -> None:
    bench.run()
    found = told(bench, "b.mp4")
    assert found["verdict"] == "2 of 2 clips are kept" and found["cuts"] == [8] and found["detail"] == "1 scene was too short"
    assert told(bench, found["sha256"][:7])["name"] == "b.mp4" == told(bench, str(bench.videos / "b.mp4"))["name"]


def test_a_source_whose_name_is_not_utf_8_is_asked_for_as_the_data_set_lists_it(bench: Bench) -> None:
    (bench.videos / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"film caf")
    bench.run()
    (listed,) = [str(one["name"]) for one in bench.directory().description()["sources"] if str(one["name"]).startswith("caf")]
    found = told(bench, listed)
    assert (found["name"], found["verdict"], found["licence"]) == ("caf?.mp4", "2 of 2 clips are kept", "cc0")
    assert found == told(bench, found["sha256"]) and json.dumps(found).isascii() and listed in [row.source for row in rows(bench)]


def test_a_source_that_broke_the_probe_is_told_so(bench: Bench) -> None:
    bench.run()
    sha256 = told(bench, "b.mp4")["sha256"]
    path = next((bench.directory().kept / "probe").rglob(f"{sha256[:20]}.json"))
    aside = bench.directory().path / "quarantined" / path.relative_to(bench.directory().kept)
    aside.parent.mkdir(parents=True)
    path.unlink()
    aside.write_text(json.dumps({"quarantine": {"reason": "no video stream", "detail": "it has 1 stream, of audio"}}))
    found = told(bench, "b.mp4")
    assert (found["step"], found["verdict"], found["detail"]) == ("probe", "no video stream", "it has 1 stream, of audio")


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "under way"])
def test_of_one_content_under_two_names_the_first_source_has_the_clips_and_the_other_says_so(bench: Bench, finished: bool) -> None:
    content = (bench.videos / "a.mp4").read_bytes()
    folders = [bench.folder / name for name in ("s1", "s2")]
    for folder, name in zip(folders, ("z.mp4", "b.mp4"), strict=True):
        folder.mkdir()
        (folder / name).write_bytes(content)
    bench.run(sources=[Given(path=str(folders[0]), licence="mine"), Given(path=str(folders[1]), licence="cc")])
    if not finished:
        shutil.rmtree(bench.directory().out)
    first, other = (told(bench, name) for name in ("z.mp4", "b.mp4"))
    verdict = f"{2 * finished} of 2 clips are kept"
    assert (first["step"], first["verdict"], first["licence"]) == ("", verdict, "mine")
    assert (other["step"], other["verdict"], other["licence"]) == ("download", "same file as another source", "cc")
    assert other["detail"] == f"its content is that of z.mp4, whose clips they are: {verdict}" and other["same_as"] == "z.mp4"
    assert {(row.source, row.licence) for row in rows(bench)} == {("z.mp4", "mine")}
    assert told(bench, first["sha256"]) == first


def test_a_licence_that_was_corrected_is_told_as_the_set_has_it(bench: Bench) -> None:
    bench.run()
    path = bench.directory().out / "DATASET.json"
    about = json.loads(path.read_text())
    for one in about["sources"]:
        one["licence"] = "corrected"
    path.write_text(json.dumps(about))
    assert told(bench, "b.mp4")["licence"] == "corrected" == rows(bench)[0].licence


def test_what_nobody_has_seen_is_refused_with_what_to_type(bench: Bench) -> None:
    bench.run()
    with pytest.raises(Refused, match="osctl data show mine --about"):
        told(bench, "nothing")
    (bench.videos / "more").mkdir()
    (bench.videos / "more/b.mp4").write_bytes(b"another b")
    bench.run()
    with pytest.raises(Refused, match="means 2 sources"):
        told(bench, "b.mp4")
