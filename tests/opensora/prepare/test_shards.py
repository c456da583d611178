"""Laws of shards of sources: together they are all sources, each once, and who merges makes what one process makes, of what they kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import prepare_steps
import pytest
import yaml

from opensora.dataset.rows import Provenance, Source
from opensora.prepare import engine
from opensora.prepare.engine import Ended
from opensora.prepare.shards import Shard

SHARDS = 3


def run(folder: Path, videos: Path, *, retry: bool = True, shard: Shard | None = None) -> Ended:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "name": "tiny", "workers": 2, "sources": [{"path": str(videos)}], "limits": {"deadline_s": 3, "memory_gb": 0.5},
        "filter": {"rules": [{"column": "motion", "min": 0.5}]}, "caption": {"kind": "digits"},
    }  # fmt: skip
    (folder / "prepare.yaml").write_text(yaml.safe_dump(config))
    ended = engine.run(folder, prepare_steps.STEPS, retry=retry, shard=shard)
    assert ended.kind == "completed", ended.reason
    return ended


def test_each_source_is_in_one_shard_wherever_it_stands_in_a_list() -> None:
    sources = [Source(f"s3://b/{number}.mp4", str(number), Provenance()) for number in range(200)]
    for of in (1, 3, 16):
        places = [[shard for shard in range(of) if Shard(shard, of).has(source)] for source in sources]
        assert all(len(one) == 1 for one in places) and {one[0] for one in places} == set(range(of))


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Shard.parse(text)


def test_shards_and_who_merges_them_make_what_one_process_makes_and_work_on_nothing_twice(tmp_path: Path) -> None:
    videos, calls = tmp_path / "videos", tmp_path / "calls.txt"
    for number in range(9):
        prepare_steps.write_video(videos, f"v{number}", (0, 10, 1.0, f"ball {number}"), (10, 30, 0.2, "still"), (30, 40, 2.0, "cube"))
    for first in ("crash", "bad"):
        prepare_steps.write_video(videos, first, (0, 10, 1.0, "a ball"), first=first)
    calls.touch()
    whole = run(tmp_path / "whole", videos)
    once = sorted(calls.read_text().splitlines())
    calls.write_text("")

    merged = tmp_path / "merged"
    for number in range(SHARDS):
        folder = tmp_path / f"shard-{number}"
        run(folder, videos, shard=Shard(number, SHARDS))
        assert not (folder / "out").exists()
        for part in ("kept", "quarantined"):
            shutil.copytree(folder / part, merged / part, dirs_exist_ok=True)
    before = calls.read_text()
    ended = run(merged, videos, retry=False)
    assert (ended.digest, ended.counts) == (whole.digest, whole.counts)
    assert {path.name: path.read_bytes() for path in (merged / "out/clips").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole/out/clips").iterdir()
    }
    assert sorted(calls.read_text().splitlines()) == once
    assert {line.split()[0] for line in calls.read_text()[len(before) :].splitlines()} == {"caption"}, "the rest was kept"


def test_a_shard_trusts_clips_that_lie_in_the_store_alone(tmp_path: Path) -> None:
    """Another pod has cut them: their rows come along, their files stay where they are."""
    videos, calls, folder = tmp_path / "videos", tmp_path / "calls.txt", tmp_path / "shard"
    prepare_steps.write_video(videos, "a", (0, 10, 1.0, "a ball"))
    run(folder, videos, shard=Shard(0, 1))
    for clip in (folder / "kept").rglob("*.mp4"):
        clip.unlink()
    calls.touch()
    run(folder, videos, shard=Shard(0, 1))
    assert calls.read_text() == ""
