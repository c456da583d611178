"""Every command that is printed is pasted, word for word, into the shell in which the launch was typed: it acts on the same pipeline in the
same store, as it was launched. The folder has a recipe of its own, which no such command may touch.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from live_attempts import STAND_IN, until
from proofs import Proof
from tiny_recipe import Osctl, warm_trainer, write

TYPED = {
    "-f": (["-f", "own rec"], "tiny", ".osctl/store"),
    "-f --store": (["-f", "own rec", "--store", "other store"], "tiny", "other store"),
    "-f --data": (["-f", "own rec", "--data", "my clips"], "tiny", ".osctl/store"),
    "--data --set name": (["-f", "own rec", "--data", "my clips", "--set", "name=mine", "--store", "other store"], "mine", "other store"),
}
SENTENCE = re.compile(r"`(osctl [^`]+)`|(?:: |with |see )(osctl [^`\n]+?)(?=\. [A-Z]|; |, or |\)$|$)", re.MULTILINE)


def printed(text: str) -> list[str]:
    """The commands in what was said."""
    found = [one for match in SENTENCE.finditer(text) for one in match.groups() if one and not one.startswith("osctl explain")]
    steps = [step for command in found for step in re.split(r" \| |, then |, (?=osctl )", command.removesuffix(" to go on"))]
    return [step for step in dict.fromkeys(steps) if not step.startswith("osctl mlflow")]  # it serves until it is ended


class Desk:
    """A folder with somebody else's recipe, a recipe of one's own below it, and clips."""

    def __init__(self, folder: Path, typed: str, *, real: bool = False, steps: int = 40) -> None:
        words, self.name, store = TYPED[typed]
        self.words, self.store = words, folder / store
        write(folder, stages=1, name="decoy")
        trainer = warm_trainer() if real else [sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", "10"]
        changes = {"steps": 2 if real else steps, "batch_size": 1, "checkpoint": {"every_steps": 2 if real else 10, "keep_last": 2}}
        write(folder / "own rec", stages=1, devices=1, changes=changes, trainer=trainer)
        clips = folder / "my clips"
        clips.mkdir()
        self.captions = clips / "captions.csv"
        self.captions.write_text("path,text\none.mp4,a grey 'square' & more\ntwo.mp4,- a dash first\n")
        for name in ("one", "two"):
            with av.open(str(clips / f"{name}.mp4"), "w") as out:
                stream = out.add_stream("libx264", rate=8)
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for level in range(8):
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * level, np.uint8), format="rgb24")))
                out.mux(stream.encode())
        self.osctl = Osctl(folder)

    def launch(self, *more: str, expect: int, fail: str = "") -> str:
        return Osctl(self.osctl.folder, {"OSCTL_STAND_IN_FAIL": fail})("launch", *self.words, "-q", *more, expect=expect).stderr

    def paste(self, command: str) -> None:
        """As a shell takes it: a real one makes words of it."""
        line = f"printf '%s\\0'{command.removeprefix('osctl')}"
        words = subprocess.run(line, shell=True, cwd=self.osctl.folder, capture_output=True, text=True, check=True).stdout
        done = self.osctl(*words.split("\0")[:-1])
        said = f"$ {command}\n{done.stdout}\n{done.stderr}"
        assert "decoy" not in done.stdout + done.stderr, said
        pipelines = {path.name for path in self.store.iterdir()} - {"datasets", ".tmp", "weights", ".osctl-probe"}
        assert {name for name in pipelines if not name.startswith(".")} == {self.name}, said
        default = self.osctl.folder / ".osctl" / "store"
        assert self.store == default or not default.exists(), said

    def source(self) -> str:
        """What the last attempt was trained on."""
        intents = sorted((self.store / self.name).glob("stages/*/attempts/*/intent.json"), key=lambda path: path.stat().st_mtime)
        return intents[-1].read_text()

    def follow(self, said: str, at_least: int = 1) -> None:
        steps = printed(said)
        assert len(steps) >= at_least, said
        for step in steps:
            self.paste(step)
        assert ("my clips" in self.source()) == ("--data" in self.words)


def after_a_success(folder: Path, typed: str) -> None:
    desk = Desk(folder, typed, real=True)
    said = desk.launch(expect=0)
    assert any("osctl sample" in step for step in printed(said))
    assert ("osctl sample" in said) and ("grey" in said) == ("--data" in desk.words), "words that the model was trained on"
    desk.follow(said, 4)


@pytest.mark.long
@pytest.mark.parametrize("typed", ["-f --store", "--data --set name"])
def test_after_a_success(tmp_path: Path, typed: str) -> None:
    after_a_success(tmp_path, typed)


ENDS = ["nan@15", "oom@15", "spike@15", "data@15", "code@15", "disk@15", "config@15", "exit@15"]


@pytest.mark.parametrize(("end", "typed"), [(end, list(TYPED)[number % len(TYPED)]) for number, end in enumerate(ENDS)])
def test_after_a_failure(tmp_path: Path, end: str, typed: str) -> None:
    desk = Desk(tmp_path, typed)
    said = desk.launch(expect=3, fail=end)
    looked = desk.osctl("status", desk.name, "--store", str(desk.store))
    events = desk.osctl("events", desk.name, "--store", str(desk.store)).stdout
    desk.follow(said)
    for text in (looked.stdout + looked.stderr, re.sub(r"\s+", " ", events)):
        for step in printed(text):
            desk.paste(step)


def after_a_stop(folder: Path, typed: str, by: str) -> None:
    desk = Desk(folder, typed, steps=5000)
    launcher = desk.osctl.start("launch", *desk.words, "-q")
    until(lambda: any(desk.store.glob(f"{desk.name}/stages/*/checkpoints/*/MANIFEST.json")), "a checkpoint")
    refused = desk.launch(expect=4)
    watch, cancel = printed(refused)
    assert "osctl watch" in watch and "osctl cancel" in cancel
    if by == "cancel":
        desk.paste(cancel)
    else:
        launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(60) == 130
    said = (folder / "launch.log").read_text()
    recipe = folder / "own rec" / "stage1.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 5000", "steps: 20"))
    desk.follow(said)


@pytest.mark.long
@pytest.mark.parametrize(("typed", "by"), [("-f --data", "signal"), ("--data --set name", "cancel")])
def test_after_a_stop_by_a_signal_or_by_cancel(tmp_path: Path, typed: str, by: str) -> None:
    after_a_stop(tmp_path, typed, by)


@pytest.mark.prove("pasted-steps")
def test_after_a_success_and_after_a_stop_whatever_was_typed(tmp_path: Path, proof: Proof) -> None:
    for number, typed in enumerate(TYPED):
        after_a_success(tmp_path / f"{number}", typed)
        for by in ("signal", "cancel"):
            after_a_stop(tmp_path / f"{number}-{by}", typed, by)
        proof.count(3)


def test_after_a_change_that_asks_for_a_decision(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "--data --set name")
    desk.launch(expect=3, fail="oom@15")
    desk.captions.write_text(desk.captions.read_text().replace("grey", "black"))
    refused = desk.launch(expect=4)
    (anew,) = printed(refused)
    assert "--anew stage1" in anew
    desk.paste(anew)
    shutil_said = desk.osctl("status", desk.name, "--store", str(desk.store))
    assert "1/1" not in shutil_said.stderr


def test_what_a_driver_wrote_is_shown_as_whoever_looks_has_to_type_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "--data --set name")
    desk.launch(expect=3, fail="nan@15")
    shown = desk.osctl("status", "mine", "--store", "other store").stderr
    assert "`osctl resume mine --store 'other store' --stage stage1 --set stage1.optimizer.lr=0.0005`" in shown
    (stored,) = [path.read_text() for path in desk.store.glob("mine/events/*.json") if '"ended"' in path.read_text()]
    assert "osctl launch stage1 --set stage1.optimizer.lr=0.0005" in stored, "in the store it is as short as it was"
