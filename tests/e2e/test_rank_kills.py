"""One of four ranks is killed, asked to leave, crashed and stopped at random steps: the run ends with the bits of an undisturbed one.

Real launches: driver, agent, elastic agent and four ranks of the real trainer over gloo. The driver goes on by itself, since none of
these ends is anybody's wish.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from proofs import Proof
from tiny_recipe import Osctl, warm_trainer, write

from orchestrator.ledger.store import Ledger
from orchestrator.stores.folder import FolderStore

RANKS, STEPS, EVERY, BATCH = 4, 60, 7, 2
SEED = 20261124
PATIENCE_S = 280.0
HANG_S, HANG_OF_TORCHRUN_S = 30.0, 80.0
"""Longer than a start on a machine that runs other tests beside this one: who has not spoken yet counts as silent. Ranks of plain torchrun
import everything for themselves, 5 CPU-seconds each; those of a warm trainer are there within a second of an idle machine."""

STRATEGIES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}, "sequence": {"sequence": 2}}
"""By name, what a stage says under `parallel`."""

SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV)
ENDS = {
    signal.SIGKILL: {"signal": "SIGKILL", "peer": "a rank"},
    signal.SIGSEGV: {"signal": "SIGSEGV", "peer": "a rank"},
    signal.SIGTERM: {"preempted": "saved"},
    signal.SIGSTOP: {"hang": "no heartbeat"},
}
"""Class and a word of the reason of the attempt's outcome. A rank that is asked to leave saves with all others; nobody of ours asked.
Of several failures an elastic agent that forks names one alone, which may be a rank that lost its peer."""


@dataclass(frozen=True)
class Kill:
    strategy: str
    signal: signal.Signals
    step: int
    rank: int


def draw(count: int, seed: int, strategies: Sequence[str] = tuple(STRATEGIES)) -> list[Kill]:
    """Random moments; signals and strategies in turn, so that few kills meet all of them."""
    choose = random.Random(seed)
    return [
        Kill(strategies[i % len(strategies)], SIGNALS[i % len(SIGNALS)], choose.randint(1, STEPS * 2 // 3), choose.randrange(RANKS))
        for i in range(count)
    ]


def in_turn(signals: Sequence[signal.Signals], seed: int) -> list[Kill]:
    """Kills that one run goes through, each at a random step of its part of the run."""
    choose, part = random.Random(seed), STEPS * 2 // 3 // len(signals)
    return [Kill("ddp", number, choose.randint(part * i + 1, part * (i + 1)), choose.randrange(RANKS)) for i, number in enumerate(signals)]


class Run:
    """A pipeline of one stage in a folder of its own."""

    def __init__(self, folder: Path, strategy: str, trainer: Sequence[str]) -> None:
        changes = {
            "steps": STEPS,
            "batch_size": BATCH,
            # More clips than the whole run takes: a clip that is met again was trained on twice.
            "data": {"source": {"kind": "digits", "clips": STEPS * BATCH * RANKS}, "frames": 2, "height": 16, "width": 16},
            "freeze": "none",
            "checkpoint": {"every_steps": EVERY, "keep_last": 2},
            "prompts": [],
            "parallel": STRATEGIES[strategy],
        }
        spec = {"hang_timeout_s": HANG_S if trainer else HANG_OF_TORCHRUN_S}
        write(folder, devices=RANKS, stages=1, changes=changes, trainer=list(trainer), spec=spec)
        self.osctl = Osctl(folder)
        self.ledger = Ledger(FolderStore(folder / ".osctl/store"), "tiny")
        self.hits: list[int] = []
        """Attempts that were hit. On a busy machine others may lie between them: a start may have been too slow for HANG_S."""

    def launch(self, kills: Sequence[Kill] = ()) -> Run:
        """Launch, and signal one rank after a step, once for each kill. The launch must come to its end by itself."""
        launcher = self.osctl.start("launch", "-q")
        try:
            for kill in kills:
                self._hit(kill, launcher)
            assert launcher.wait(PATIENCE_S) == 0, (kills, (self.osctl.folder / "launch.log").read_text())
        finally:
            launcher.kill()
            launcher.wait()
        return self

    def _hit(self, kill: Kill, launcher: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and launcher.poll() is None:
            for path in self.osctl.folder.glob(f".osctl/runs/*/heartbeat-{kill.rank}.json"):
                with suppress(FileNotFoundError, json.JSONDecodeError, ProcessLookupError):
                    beat, attempt = json.loads(path.read_text()), int(path.parent.name.rpartition("_a")[2])
                    if beat["step"] >= kill.step and attempt > max(self.hits, default=0):
                        os.kill(beat["pid"], kill.signal)
                        self.hits.append(attempt)
                        return
            time.sleep(0.002)
        raise AssertionError(f"{kill}: rank {kill.rank} was not met at step {kill.step}")

    # what is in the ledger

    @property
    def inputs_digest(self) -> str:
        (inputs_digest,) = self.ledger.inputs_of("stage1")
        return inputs_digest

    @property
    def weights(self) -> str:
        committed = self.ledger.committed("stage1", self.inputs_digest)
        assert committed is not None
        return committed.weights_digest

    @property
    def clips_seen(self) -> int:
        """As the committed checkpoint tells it."""
        committed = self.ledger.committed("stage1", self.inputs_digest)
        assert committed is not None
        record = self.osctl.folder / ".osctl/store" / Path(committed.manifest).parent / "CHECKPOINT.json"
        return int(json.loads(record.read_text())["clips_seen"])

    def steps(self) -> list[list[dict[str, Any]]]:
        """Lines of metrics by attempt, as its journal has them."""
        return [
            [line for piece in self.ledger.journal("stage1", self.inputs_digest, attempt) for line in piece.metrics if "step" in line]
            for attempt in self.ledger.attempts("stage1", self.inputs_digest)
        ]

    def starts(self) -> list[int]:
        """The step that each attempt went on from."""
        intents = [
            self.ledger.intent("stage1", self.inputs_digest, attempt) for attempt in self.ledger.attempts("stage1", self.inputs_digest)
        ]
        return [intent.resume.step if intent and intent.resume else 0 for intent in intents]

    def kept(self) -> list[dict[str, Any]]:
        """Lines of the steps that the result is made of: of each attempt those up to where the next one went on."""
        ends = [*self.starts()[1:], STEPS]
        return [line for lines, end in zip(self.steps(), ends, strict=True) for line in lines if line["step"] <= end]

    def repeated(self) -> list[list[dict[str, Any]]]:
        """Lines by attempt of the steps that a later one had to do again."""
        ends = [*self.starts()[1:], STEPS]
        return [[line for line in lines if line["step"] > end] for lines, end in zip(self.steps(), ends, strict=True)]


def check(kills: Sequence[Kill], run: Run, undisturbed: Run) -> None:
    """The law."""
    assert run.weights == undisturbed.weights, kills
    # Each step once, on the clips and the noise of the undisturbed run: else its loss would be another.
    kept, whole = run.kept(), undisturbed.kept()
    assert [line["step"] for line in kept] == list(range(1, STEPS + 1)), kills
    assert [line["loss"] for line in kept] == [line["loss"] for line in whole], kills
    assert sum(line["clips"] for line in kept) == run.clips_seen == undisturbed.clips_seen, kills
    # What was done twice is in the books as lost, and all of it.
    bills = run.osctl.json("cost", "--by-attempt")  # refuses to print a bill that does not balance
    for bill, lines in zip(bills, run.repeated(), strict=True):
        lost, spent = bill["device_seconds"]["lost"], RANKS * sum(line["step_s"] for line in lines)
        assert lost >= 0.5 * spent and (lost > 0) >= bool(lines), (kills, lost, spent)
    # Each attempt that was hit ended by that, the last one by itself.
    ends = [run.ledger.outcome("stage1", run.inputs_digest, attempt) for attempt in run.ledger.attempts("stage1", run.inputs_digest)]
    assert ends[-1] is not None and ends[-1].class_ == "completed", (kills, ends)
    for kill, hit in zip(kills, run.hits, strict=True):
        end, next_start = ends[hit - 1], run.starts()[hit]
        assert end is not None and ENDS[kill.signal].get(end.class_, "another class") in end.reason, (kill, end)
        if kill.signal is signal.SIGTERM:
            assert run.repeated()[hit - 1] == [] and next_start >= kill.step, f"{kill}: who is asked to leave loses nothing"
        else:
            assert next_start >= kill.step - 2 * EVERY, (
                f"{kill}: more is lost than a checkpoint that was being written, and the steps after it"
            )


def survive(folder: Path, runs: Sequence[Sequence[Kill]], trainer: Sequence[str] = (), *, at_once: int = 3) -> None:
    """All kills of each run, a few runs at once: who waits for a hang leaves the machine to the others."""
    with ThreadPoolExecutor(at_once) as pool:
        hit = [pool.submit(Run(folder / f"{i}", kills[0].strategy, trainer).launch, kills) for i, kills in enumerate(runs)]
        strategies = sorted({kill.strategy for kills in runs for kill in kills})
        whole = {name: pool.submit(Run(folder / name, name, trainer).launch) for name in strategies}
        for kills, run in zip(runs, hit, strict=True):
            check(kills, run.result(), whole[kills[0].strategy].result())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_each_way_one_of_four_ranks_may_end_and_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    hang = in_turn([signal.SIGSTOP], SEED)  # in a run of its own, since the wait for it leaves the machine to the other runs
    others = in_turn([number for number in SIGNALS if number is not signal.SIGSTOP], SEED)
    assert {kill.signal for kill in [*hang, *others]} == set(SIGNALS)
    survive(tmp_path, [hang, others], warm_trainer())


@pytest.mark.prove("rank-kills")
def test_fifty_times_under_plain_torchrun(tmp_path: Path, proof: Proof) -> None:
    kills = draw(50, SEED + 1 + proof.seed)
    assert len(kills) == 50
    survive(tmp_path, [[kill] for kill in kills], at_once=2)
    proof.count(len(kills))
