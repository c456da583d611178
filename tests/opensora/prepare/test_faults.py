"""Law: whatever ends a preparation (a signal, a full disk, a budget), it has its exit code and one line that says what to do next, and
the next run comes to the digest of a run that nothing disturbed. Real processes; the steps are those of tests/prepare_steps.py."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import caption_server
import prepare_steps
import pytest
import yaml

from opensora.prepare.engine import COMPLETED, DATA, DISK, DRAINED

if TYPE_CHECKING:
    from proofs import Proof

PHASES = ("download", "probe", "frames", "filter", "clips", "caption", "encode", "publish")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Run:
    """A folder with videos, and a run directory whose disk may be another."""

    def __init__(self, folder: Path, run: Path | None = None, **config: Any) -> None:
        self.folder, self.run, self.calls = folder, run or folder / "run", folder / "calls.txt"
        videos = folder / "videos"
        videos.mkdir(parents=True)
        self.calls.touch()
        self.run.mkdir(exist_ok=True)
        for name in "abc":
            prepare_steps.write_video(
                videos, name, (0, 10, 1.0, f"a red ball of {name}"), (10, 30, 2.0, "it moves up"), (30, 40, 0.1, "no")
            )
        (self.run / "stages").mkdir()
        (self.run / "stages/first.yaml").write_text("steps: 1\n")
        self.config: dict[str, Any] = {
            "name": "faults", "workers": 2, "sources": [{"path": str(videos)}], "limits": {"deadline_s": 60},
            "filter": {"rules": [{"column": "motion", "min": 0.5}], "duplicates": None}, "caption": {"kind": "digits"}, **config,
        }  # fmt: skip

    def begin(self, before: Callable[[], None] = lambda: None) -> subprocess.Popen[str]:
        (self.run / "prepare.yaml").write_text(yaml.safe_dump(self.config))
        command = [sys.executable, prepare_steps.__file__, str(self.run)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env, preexec_fn=before)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and the last line."""
        said, _ = process.communicate(timeout=300)
        assert "Traceback" not in said, said
        return process.returncode, said.strip().splitlines()[-1]

    def wait_for(self, phase: str, process: subprocess.Popen[str]) -> None:
        """Until a call of this phase is under way."""
        deadline = time.monotonic() + 240
        while f"{phase} " not in self.calls.read_text() and process.poll() is None:
            assert time.monotonic() < deadline, f"never came to {phase}"
            time.sleep(0.005)

    def digest(self) -> str:
        """Of the data set that the next run comes to."""
        (self.folder / "slow.txt").unlink(missing_ok=True)
        code, said = self.end(self.begin())
        assert code == COMPLETED, said
        return str(json.loads((self.run / "out/DATASET.json").read_text())["digest"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Run(tmp_path_factory.mktemp("undisturbed") / "it").digest()


def interrupted(folder: Path, number: signal.Signals, phase: str, undisturbed: str) -> None:
    run = Run(folder)
    (folder / "slow.txt").write_text("0.2")
    process = run.begin()
    run.wait_for(phase, process)
    process.send_signal(number)
    code, last = run.end(process)
    if phase == "publish":  # what is left to do takes less time than to leave it
        assert code in (COMPLETED, DRAINED)
    else:
        assert (code, last) == (DRAINED, "it was asked to leave; what is done is kept. To go on, run the same command again")
        assert not (run.run / "out").exists()
    assert run.digest() == undisturbed


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def filled(folder: Path, kilobytes: int, undisturbed: str) -> bool:
    """Whether so small a disk was too small."""
    folder.mkdir(parents=True)
    with small_disk(folder / "disk", kilobytes):
        run = Run(folder / "it", folder / "disk/run")
        code, last = run.end(run.begin())
        assert code in (COMPLETED, DISK), last
        if code == DISK:
            assert "No space left on device" in last and "Make room, and run again: what is done stays" in last
        subprocess.run(["mount", "-o", "remount,size=16m", str(folder / "disk")], check=True)
        assert run.digest() == undisturbed
    return code == DISK


def refused_size(folder: Path, most: int, undisturbed: str) -> bool:
    """Whether a limit on the bytes of a file was met."""
    run = Run(folder)
    code, last = run.end(run.begin(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))
    assert code in (COMPLETED, DISK), last
    if code == DISK:
        assert "File too large" in last and "what is done stays" in last
    assert run.digest() == undisturbed
    return code == DISK


def out_of_budget(folder: Path, limit: dict[str, float]) -> None:
    """A stub server asks for its money; the budget ends after some of nine clips."""
    caption = {"kind": "server", "model": caption_server.MODEL, "concurrency": 1, "usd_per_million_in": 1.0, "max_tokens": 20}
    with caption_server.serving(
        caption_server.Stub(answering=lambda number, body: "a red ball that moves up", prompt_tokens=lambda body: 12_000)
    ) as server:
        whole = Run(folder / "whole", caption={**caption, "url": server.url}, filter={"rules": [], "duplicates": None})
        digest, asked = whole.digest(), len(server.requests)
        run = Run(folder / "short", caption={**caption, "url": server.url, **limit}, filter={"rules": [], "duplicates": None})
        code, last = run.end(run.begin())
        made = len(server.requests) - asked
        assert code == DATA and 0 < made < asked, last
        assert "raise the budget and run the same command again" in last and f"{asked - made:,} of {asked:,} clips" in last
        assert json.loads((run.run / "spent.json").read_text())["requests"] == made
        run.config["caption"] = {**caption, "url": server.url}
        assert run.digest() == digest and len(server.requests) == 2 * asked, "none is asked for twice"


@pytest.mark.parametrize(("number", "phase"), [(signal.SIGINT, "frames"), (signal.SIGTERM, "caption")])
def test_an_interrupted_run_says_how_to_go_on_and_comes_to_the_same_data_set(
    tmp_path: Path, number: signal.Signals, phase: str, undisturbed: str
) -> None:
    interrupted(tmp_path / "run", number, phase, undisturbed)


def test_a_full_disk_ends_the_run_with_a_line_and_room_lets_it_go_on(tmp_path: Path, undisturbed: str) -> None:
    assert filled(tmp_path / "full", 48, undisturbed)


def test_a_limit_on_the_size_of_files_ends_the_run_with_a_line(tmp_path: Path, undisturbed: str) -> None:
    assert refused_size(tmp_path / "limit", 1500, undisturbed)


@pytest.mark.parametrize("limit", [{"budget_tokens": 50_000}, {"budget_usd": 0.05}], ids=["tokens", "dollars"])
def test_a_budget_that_is_reached_ends_the_run_and_more_of_it_lets_it_go_on(tmp_path: Path, limit: dict[str, float]) -> None:
    out_of_budget(tmp_path, limit)


@pytest.mark.prove("prepare-faults")
@pytest.mark.parametrize("number", SIGNALS)
def test_signals_in_each_phase(tmp_path: Path, proof: Proof, undisturbed: str, number: signal.Signals) -> None:
    for phase in PHASES:
        interrupted(tmp_path / phase, number, phase, undisturbed)
    proof.count(len(PHASES), number.name)


@pytest.mark.prove("prepare-faults")
def test_disks_of_each_size(tmp_path: Path, proof: Proof, undisturbed: str) -> None:
    full = [size for size in range(20, 116, 4) if filled(tmp_path / f"disk-{size}", size, undisturbed)]
    assert len(full) >= 5
    proof.count(24, f"{len(full)} full disks")


@pytest.mark.prove("prepare-faults")
def test_files_of_each_size(tmp_path: Path, proof: Proof, undisturbed: str) -> None:
    limited = [most for most in (50, 200, 400, 800, 1200, 2000, 3000) if refused_size(tmp_path / f"most-{most}", most, undisturbed)]
    proof.count(7, f"{len(limited)} limits met")


@pytest.mark.prove("prepare-faults")
def test_budgets_of_each_size(tmp_path: Path, proof: Proof) -> None:
    for tokens in (26_000, 50_000, 90_000):
        out_of_budget(tmp_path / f"tokens-{tokens}", {"budget_tokens": tokens})
    proof.count(3, "budgets")
