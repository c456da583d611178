"""Nothing that people wrote steers the terminal on which it is shown; what machines read stays exact."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import film_clips
import pytest
import yaml
from tiny_recipe import OSCTL, Osctl, warm_trainer, write
from written_ledger import Writer

from orchestrator.ledger.records import ClipsUsed, LeftOut
from orchestrator.ledger.store import Ledger
from orchestrator.recipe import adapt, resolve
from orchestrator.stores.folder import FolderStore

EVIL = "[red]evil\x1b]0;owned\x07\x1b[2J\u202egnp.\x9b31m\x08\r\x00[/red] :smile:"
STEERS = re.compile("\x1b\\]|\x07|\x1b\\[2J|\u202e|\x9b|\x08|\x00")
LOOKS = [
    ("status",), ("watch",), ("compare",), ("cost",), ("events",), ("logs", "stage2"), ("lineage",), ("list",), ("data", "show", "evil"),
    ("data", "show", "evil", "-o", "name"), ("data", "show", "evil", "-o", "yaml"), ("status", "-o", "yaml"),
]  # fmt: skip


@pytest.fixture(scope="module")
def osctl(tmp_path_factory: pytest.TempPathFactory) -> Osctl:
    """A pipeline, and a data set, in which everything that people write is evil."""
    folder = write(tmp_path_factory.mktemp("evil") / "recipe", changes={"steps": 30, "prompts": [f"a digit 3 {EVIL}"]})
    pipeline = adapt.on_devices(resolve.load(folder / "osctl.yaml", overrides={}, env={}), 0)
    writer = Writer(Ledger(FolderStore(folder / ".osctl" / "store"), "tiny"), pipeline)
    writer.launch()
    first = writer.begin("stage1")
    reasons = (LeftOut(reason=EVIL, clips=3, first=(EVIL,)),)
    writer.ledger.write_clips(first, ClipsUsed(clips=9, used=6, left_out=reasons, captions_cut=1, caption_tokens=8, remarks=(EVIL,)), None)
    writer.finish(first)
    lost = writer.begin("stage2")
    writer.train(lost, 15)
    writer.ledger.append_log(lost, 0, 0, f"\x1b[32mgreen\x1b[0m {EVIL}\n".encode(), writer.now)
    writer.close(lost, "code", reason=f"caption {EVIL}: unknown word")
    writer.end(f"failed: {EVIL}")
    clips = film_clips.make(folder / "clips", {"one.mp4": EVIL.replace("\0", ""), "two.mp4": "a square"})
    osctl = Osctl(folder)
    osctl("data", "register", "evil", str(clips))
    return osctl


def on_a_terminal(osctl: Osctl, *arguments: str) -> str:
    ours, theirs = pty.openpty()
    done = subprocess.Popen([OSCTL, *arguments], cwd=osctl.folder, env=osctl.environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while True:
            said += os.read(ours, 65536)
    except OSError:  # its end is closed
        pass
    os.close(ours)
    assert done.wait(60) in (0, 4), said  # 4: files of a ledger that was written by hand are not there
    return said.decode()


@pytest.mark.parametrize("look", LOOKS, ids=" ".join)
def test_what_people_wrote_steers_no_terminal(osctl: Osctl, look: tuple[str, ...]) -> None:
    said = on_a_terminal(osctl, *look)
    assert not STEERS.search(said), repr(said)
    if look[0] in ("status", "events", "logs", "data") and look != ("data", "show", "evil", "-o", "name"):
        assert "[red]evil" in said, "rich would take it for markup"


def test_a_trainers_colours_stay(osctl: Osctl) -> None:
    assert "\x1b[32mgreen\x1b[0m" in on_a_terminal(osctl, "logs", "stage2")
    assert "\x1b]0;owned" in osctl("logs", "stage2").stdout, "a pipe gets it as it was"


def test_what_machines_read_is_exact(osctl: Osctl) -> None:
    evil = EVIL.replace("\0", "")
    assert osctl.json("data", "show", "evil")[0]["text"] == evil
    assert yaml.safe_load(osctl("data", "show", "evil", "-o", "yaml").stdout)[0]["text"] == evil
    stage = osctl.json("status")["stages"][0]
    assert stage["data"]["remarks"] == [EVIL] and stage["data"]["left_out"][0]["reason"] == EVIL
    assert osctl.json("events")[-1]["detail"].startswith(f"failed: {EVIL}")


def missing(folder: Path, count: int) -> None:
    with (folder / "captions.csv").open("a", newline="") as rows:
        csv.writer(rows).writerows([(f"gone{number}\x1b.mp4", "a square") for number in range(count)])


@pytest.mark.long
def test_where_most_clips_are_missing_a_launch_refuses_before_a_device_is_held(tmp_path: Path) -> None:
    changes = {"steps": 1, "batch_size": 1, "checkpoint": {"every_steps": 1}}
    osctl = Osctl(write(tmp_path / "recipe", devices=1, stages=1, changes=changes, trainer=warm_trainer()))
    clips = film_clips.make(osctl.folder / "clips")
    missing(clips, 3)
    (clips / "two.mp4").write_bytes(b"")
    refused = osctl("launch", "--data", "clips", expect=4).stderr
    assert "4 of 6 clips are missing, empty or may not be read" in refused and "0.5" in refused and "\x1b" not in refused
    assert not list(osctl.folder.rglob("intent.json"))
    hint = re.search(r"train on what is left: osctl (launch .*)$", refused, re.MULTILINE)
    assert hint is not None, refused
    done = osctl(*hint[1].split(), "-q")
    assert "4 of 6 clips are left out" in done.stderr
    for look in (("status",), ("watch",), ("compare",)):
        said = osctl(*look)
        assert "4 of 6" in said.stdout + said.stderr, look
    row = osctl.json("status")["stages"][0]["data"]
    assert (row["clips"], row["clips_left_out"]) == (6, 4) and sum(each["clips"] for each in row["left_out"]) == 4
    (link,) = osctl.json("lineage")
    assert [remark for remark in link["remarks"] if "4 of 6 clips are left out" in remark]
    listing = osctl.folder / ".osctl" / "store" / row["listing"]
    with listing.open(newline="") as file:
        assert len(list(csv.reader(file))) == 5
    again = osctl(*hint[1].split(), "-q")
    assert "4 of 6 clips are left out" in again.stderr, "a launch with nothing left to do says the same"


def test_where_no_file_is_there_no_limit_is_offered(tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "recipe", devices=1, stages=1))
    (osctl.folder / "clips").mkdir()
    film_clips.captions(osctl.folder / "clips")
    refused = osctl("launch", "--data", "clips", "--set", "stage1.data.max_left_out=1", expect=4).stderr
    assert (
        "3 of 3 clips are missing" in refused and "Correct the names" in refused and "max_left_out" not in refused.rpartition("error: ")[2]
    )


@pytest.mark.long
def test_where_the_trainer_finds_too_little_it_ends_before_its_first_step_and_is_not_tried_again(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 1, "batch_size": 1, "checkpoint": {"every_steps": 1}, "freeze": "none"}
    changes["data"] = {"source": {"kind": "digits", "clips": 1}, "frames": 9, "height": 16, "width": 16}
    osctl = Osctl(write(tmp_path / "recipe", devices=1, stages=1, changes=changes, trainer=warm_trainer()))
    film_clips.make(osctl.folder / "clips")
    film_clips.film(osctl.folder / "clips" / "long.mp4", 90, frames=12)
    film_clips.captions(osctl.folder / "clips", film_clips.CAPTIONS | {"long.mp4": "a long square"})
    failed = osctl("launch", "--data", "clips", expect=3).stderr
    assert "3 of 4 clips are left out" in failed and "8 frames, 9 are needed" in failed
    assert [attempt["state"] for attempt in osctl.json("status")["stages"][0]["attempts"]] == ["data"]
    assert osctl.json("status")["stages"][0]["step"] == 0
    hint = re.search(r"`osctl (launch .*)` trains on the clips that are left", failed)
    assert hint is not None, failed
    osctl(*hint[1].split(), "-q")
    assert osctl.json("status")["state"] == "succeeded"


def test_json_of_a_look_has_no_letter_that_steers(osctl: Osctl) -> None:
    for look in (("status", "-o", "json"), ("events", "-o", "json"), ("data", "show", "evil", "-o", "json")):
        text = osctl(*look).stdout
        assert text.isascii() and not STEERS.search(text) and json.loads(text)
