"""Latents that `osctl prepare` published in a bucket train through a whole launch as those of a folder do: two ranks, a small local space,
one of the ranks killed."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from raw_videos import package_film
from tiny_recipe import FORKED, Osctl, write

pytestmark = [pytest.mark.long, pytest.mark.s3]

ROOM = 1_300_000
"""Bytes: of the 6 clips' latents of 256 KiB each four fit, beside the captions."""
STAGE: dict[str, Any] = {
    "data": {"source": {"kind": "digits", "clips": 1}, "frames": 8, "height": 64, "width": 64},
    "autoencoder": {"kind": "patch", "factor": 2},
    "batch_size": 1,
    "steps": 50,
    "checkpoint": {"every_steps": 5},
    "freeze": "none",
    "prompts": ["bikes in a city"],
}


def kill_a_rank(launcher: int, published: Path) -> None:
    """With SIGKILL, once a checkpoint is in the store."""
    end = time.monotonic() + 240
    while not list(published.glob("tiny/**/checkpoints/**/*.safetensors")):
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.02)
    ranks = [one for one in psutil.Process(launcher).children(recursive=True) if any("forked_torchrun" in word for word in one.cmdline())]
    ranks[-1].send_signal(signal.SIGKILL)


@pytest.mark.timeout(600)
def test_ranks_that_stream_latents_and_die_end_with_the_weights_of_a_folder(s3: Any, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for name, caption in (("bikes", "bikes in a city"), ("bigbuckbunny", "a rabbit on a meadow")):
        shutil.copyfile(package_film(f"{name}.mp4"), films / f"{name}.mp4")
        (films / f"{name}.txt").write_text(caption)
    bucket = s3.root / s3.bucket / tmp_path.name
    shape = {"devices": 2, "stages": 1, "changes": STAGE, "trainer": FORKED}
    streamed = Osctl(
        write(tmp_path / "streamed", store=s3.url(tmp_path.name), **shape), {**s3.env, "OSCTL_LATENTS_GB": f"{ROOM / 1e9:.6f}"}
    )
    made = streamed.json("prepare", "run", str(films), "--name", "films", "--encode", "--quiet")
    launch = streamed.start("launch", "--data", "films")
    kill_a_rank(launch.pid, bucket)
    assert launch.wait(240) == 0, (streamed.folder / "launch.log").read_text()
    (stage,) = streamed.json("status")["stages"]
    assert len(streamed.json("cost", "--by-attempt")) >= 2 and stage["state"] == "committed"
    (here,) = streamed.folder.rglob("*.streamed")
    assert 0 < sum(path.stat().st_size for path in here.glob("*.slots")) <= ROOM

    copy = shutil.copytree(bucket / made["place"].removeprefix(f"{s3.url(tmp_path.name)}/"), tmp_path / "copy")
    mapped = Osctl(write(tmp_path / "mapped", **shape), {})
    mapped("launch", "--data", str(copy))
    assert not list(mapped.folder.rglob("*.slots"))
    assert mapped.digests() == streamed.digests() and set(mapped.digests()) == {"stage1"}
