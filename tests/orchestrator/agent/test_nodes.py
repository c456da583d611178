"""Laws of an attempt on several nodes: real agents and real ranks on one machine, each node with a run directory of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live_attempts import STAND_IN, Attempts, stage_config, until
from tiny_recipe import FORKED, stage, warm_trainer

from opensora.config import StageConfig
from orchestrator.ledger.checkpoints import MANIFEST
from orchestrator.ledger.records import Intent, Manifest, Report

pytestmark = pytest.mark.long

SILENCE_S = 4.0


@dataclass
class Node:
    """One agent and its run directory."""

    number: int
    run_dir: Path
    agent: subprocess.Popen[bytes]

    def end(self) -> int:
        return self.agent.wait(timeout=90)

    def ranks(self) -> dict[int, int]:
        """Pid by rank, from the heartbeats."""
        beats = [json.loads(path.read_text()) for path in self.run_dir.glob("heartbeat-*.json")]
        return {beat["rank"]: beat["pid"] for beat in beats}


class Job:
    """The nodes of one attempt."""

    def __init__(
        self, attempts: Attempts, intent: Intent, dies: Mapping[int, tuple[str, ...]], numbers: Sequence[int] | None = None
    ) -> None:
        self.attempts, self.intent = attempts, intent
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.env = {
            **os.environ,
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
            "PET_RDZV_BACKEND": "c10d",
            "PET_NNODES": f"{intent.nodes}:{intent.nodes}",
        }
        self.nodes = [self.start(number, *dies.get(number, ())) for number in numbers or range(intent.nodes)]

    def start(self, number: int, program: str = "", *words: str) -> Node:
        run_dir = self.attempts.root / f"{self.intent.stage}-a{self.intent.attempt}-node{number}"
        run_dir.mkdir()
        argv = [sys.executable, *(("-c", program, *words) if program else ("-m", "orchestrator.agent"))]
        argv += ["--store", self.attempts.store.url, "--intent", self.attempts.key(self.intent)]
        argv += ["--run-dir", str(run_dir), "--node", str(number), "--peer-silence", str(SILENCE_S)]
        with (run_dir.parent / f"{run_dir.name}.log").open("wb") as log:
            return Node(
                number, run_dir, subprocess.Popen(argv, env=self.env | {"PET_LOCAL_ADDR": f"127.0.0.{1 + number}"}, stdout=log, stderr=log)
            )

    def end(self) -> tuple[list[int], list[Report]]:
        """Exit codes and reports by node."""
        codes = [node.end() for node in self.nodes]
        reports = self.attempts.ledger.reports(self.intent.stage, self.intent.inputs_digest, self.intent.attempt)
        return codes, sorted(reports, key=lambda report: report.node)

    def report(self) -> Report:
        report = self.attempts.report(self.intent)
        assert report is not None
        return report

    def manifest(self, step: int) -> Manifest:
        prefix = self.attempts.ledger.keys.checkpoint(self.intent.stage, self.intent.inputs_digest, step, self.intent.attempt)
        return Manifest.decode(self.attempts.store.read(f"{prefix}/{MANIFEST}").data)

    def explain(self) -> str:
        logs = [(node.run_dir.parent / f"{node.run_dir.name}.log").read_text() for node in self.nodes]
        return "\n".join([*logs, *((node.run_dir / "trainer.log").read_text() for node in self.nodes)])


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


@pytest.fixture
def jobs(attempts: Attempts) -> Iterator[Any]:
    """Starts jobs, and ends those that a failed test left."""
    started: list[Job] = []

    def start(intent: Intent, dies: Mapping[int, tuple[str, ...]] | None = None, numbers: Sequence[int] | None = None) -> Job:
        started.append(Job(attempts, intent, dies or {}, numbers))
        return started[-1]

    yield start
    for node in (node for job in started for node in job.nodes):
        if node.agent.poll() is None:
            node.agent.kill()
            node.agent.wait()


def files(manifest: Manifest) -> dict[str, str]:
    return {name: file.sha256 for name, file in manifest.files.items()}


# --- Publication, with a stand-in for the trainer -------------------------------------------------------------------------

STANDS_IN = (sys.executable, STAND_IN, "{run_dir}", "{devices}", "--node", "{node}", "--nodes", "{nodes}")
DIES_BEFORE_A_RECORD = """
import os, signal, sys
from orchestrator.stores.folder import FolderStore
create = FolderStore.create
def dies(self, key, data):
    if sys.argv[1] in key:
        os.kill(os.getpid(), signal.SIGKILL)
    return create(self, key, data)
FolderStore.create = dies
from orchestrator.agent.__main__ import main
os._exit(main(sys.argv[2:]))
"""


def test_each_node_publishes_its_files_and_node_0_the_whole(attempts: Attempts, jobs: Any) -> None:
    alone = attempts.intend(devices=4, stage="alone", config=stage_config(evaluate=True))
    attempts.live(alone)
    job = jobs(attempts.intend(devices=2, nodes=2, stage="nodes", config=stage_config(evaluate=True), trainer=STANDS_IN))
    codes, reports = job.end()
    assert codes == [0, 0], job.explain()
    assert [(report.class_, report.step, bool(report.evaluation)) for report in reports] == [
        ("completed", 20, True),
        ("completed", 20, False),
    ]
    assert job.report() == reports[0]
    newest = attempts.ledger.checkpoints("alone", alone.inputs_digest)[-1][1]
    assert files(job.manifest(20)).keys() == files(newest).keys()
    assert job.manifest(20).weights_digest == newest.weights_digest
    assert reports[0].ended <= reports[1].ended, "node 0 leaves first: a pod that leaves with 0 ends the job"
    resumed = jobs(attempts.intend(devices=2, nodes=2, stage="nodes", attempt=2, resume=attempts.newest(job.intent), trainer=STANDS_IN))
    assert resumed.end()[0] == [0, 0], "each node brought in the whole checkpoint, and none had a step to take"


@pytest.mark.parametrize(
    ("victim", "record"), [(1, "/parts/"), (0, MANIFEST), pytest.param(0, "/parts/", marks=pytest.mark.prove("nodes-publish"))]
)
def test_a_node_that_dies_while_it_publishes_leaves_no_manifest_and_nobody_says_completed(
    attempts: Attempts, jobs: Any, victim: int, record: str
) -> None:
    job = jobs(attempts.intend(nodes=2, config=stage_config(steps=5), trainer=STANDS_IN), {victim: (DIES_BEFORE_A_RECORD, record)})
    codes, reports = job.end()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 71, job.explain()
    assert [(report.node, report.class_) for report in reports] == [(1 - victim, "peer")]
    assert f"node {victim} has been silent" in reports[0].reason
    assert attempts.published(job.intent) == []
    prefix = attempts.ledger.keys.checkpoint(job.intent.stage, job.intent.inputs_digest, 5, 1)
    assert any(attempts.store.list(prefix)), "its files were on their way"


def test_a_node_that_cannot_publish_is_the_cause_and_the_other_does_not_wait_for_it(attempts: Attempts, jobs: Any) -> None:
    intent = attempts.intend(nodes=2, config=stage_config(steps=5), trainer=STANDS_IN)
    ours = f"{attempts.ledger.keys.checkpoint(intent.stage, intent.inputs_digest, 5, 1)}/ema.safetensors"
    attempts.store.create(ours, b"another writer's")
    job = jobs(intent)
    codes, reports = job.end()
    assert codes == [71, 69], job.explain()
    assert [report.class_ for report in reports] == ["peer", "store"]
    assert "node 1 ended before" in reports[0].reason
    assert job.report() == reports[1] and "ema.safetensors" in reports[1].reason
    assert attempts.published(intent) == []


@pytest.mark.parametrize("gone", ["rank", "agent"])
def test_a_save_that_a_dead_node_can_take_no_part_in_is_not_waited_for(attempts: Attempts, jobs: Any, gone: str) -> None:
    job = jobs(attempts.intend("--step-ms", "50", nodes=2, config=stage_config(steps=1000, every_steps=1000), trainer=STANDS_IN))
    until(lambda: all(node.ranks() for node in job.nodes), "training")
    os.kill(job.nodes[0].ranks()[0], signal.SIGSTOP)  # as a rank that waits for its peer in a collective
    os.kill(job.nodes[1].ranks()[1] if gone == "rank" else job.nodes[1].agent.pid, signal.SIGKILL)
    job.nodes[1].end()
    job.nodes[0].agent.send_signal(signal.SIGTERM)
    codes, reports = job.end()
    assert codes[0] == 71 and reports[0].class_ == "peer", job.explain()
    assert ("node 1 ended before (signal" if gone == "rank" else "node 1 has been silent") in reports[0].reason
    assert job.report().class_ == ("signal" if gone == "rank" else "peer")


def test_a_node_that_the_intent_does_not_have_starts_nothing(attempts: Attempts, jobs: Any) -> None:
    job = jobs(attempts.intend(), numbers=(1,))
    assert [node.end() for node in job.nodes] == [69]
    assert attempts.journal(job.intent) == []


# --- Training, with real ranks -------------------------------------------------------------------------------------------

STEPS, EVERY = 60, 30


def tiny(**changes: Any) -> StageConfig:
    """A stage of images that trains in a second or two."""
    content = stage(1, **({"steps": STEPS, "checkpoint": {"every_steps": EVERY}, "prompts": ["a digit 3 moving left"]} | changes))
    return StageConfig.model_validate(content)


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Digest of each file of each checkpoint of the tiny stage, as two ranks of one node make it."""
    attempts = Attempts(tmp_path_factory.mktemp("one-node"))
    intent = attempts.intend(config=tiny(), devices=2, trainer=tuple(warm_trainer()))
    attempts.live(intent)
    return {manifest.step: files(manifest) for _, manifest in attempts.ledger.checkpoints(intent.stage, intent.inputs_digest)}


def test_nodes_of_which_one_is_asked_to_leave_save_the_same_step_and_end_with_the_weights_of_one(
    attempts: Attempts, jobs: Any, on_one_node: dict[int, dict[str, str]]
) -> None:
    """The first attempt by torchrun itself, as the operator's environment tells it to meet."""
    first = jobs(attempts.intend(config=tiny(), nodes=2, trainer=()))
    until(lambda: (first.nodes[0].run_dir / "metrics.jsonl").exists(), "training")
    first.nodes[1].agent.send_signal(signal.SIGTERM)
    codes, reports = first.end()
    assert codes == [143, 143], first.explain()
    (step,) = {report.step for report in reports}
    assert step is not None and 0 < step < STEPS
    assert [(report.class_, report.node) for report in reports] == [("drained", 0), ("drained", 1)]
    assert attempts.published(first.intent)[-1] == step

    second = jobs(attempts.intend(config=tiny(), nodes=2, trainer=tuple(warm_trainer()), attempt=2, resume=attempts.newest(first.intent)))
    codes, reports = second.end()
    assert codes == [0, 0], second.explain()
    assert [(report.class_, report.step, report.node) for report in reports] == [("completed", STEPS, 0), ("completed", STEPS, 1)]
    found = {every: files((first if every <= step else second).manifest(every)) for every in (EVERY, STEPS)}
    assert found == on_one_node, "every file, whichever node wrote it"
    assert second.manifest(STEPS).complete

    for job, steps in ((first, range(1, step + 1)), (second, range(step + 1, STEPS + 1))):
        pieces = attempts.journal(job.intent)
        assert [line["step"] for piece in pieces for line in piece.metrics] == list(steps), "metrics of node 0 alone"
        for node in (0, 1):
            mine = [piece for piece in pieces if piece.node == node]
            assert max(piece.last_step or 0 for piece in mine) == steps[-1]
            assert sum(piece.spent.get("step", 0) for piece in mine) > 0
        written = attempts.ledger.log(job.intent.stage, job.intent.inputs_digest, job.intent.attempt)
        log = b"".join(piece.text() for piece in written).decode()
        assert f"[rank0] {reports[0].class_ if job is second else 'drained'} at step {steps[-1]}" in log
        assert set(re.findall(r"^\[rank(\d+)\] ", log, re.MULTILINE)) <= {"0", "1"}
    assert attempts.ledger.samples(second.intent.stage, second.intent.inputs_digest, 2) != []


def test_a_node_that_is_asked_to_leave_while_it_waits_for_the_others_leaves(attempts: Attempts, jobs: Any) -> None:
    job = jobs(attempts.intend(config=tiny(), nodes=2, trainer=()), numbers=(1,))
    until(lambda: (job.nodes[0].run_dir / "trainer.log").exists(), "a trainer")
    job.nodes[0].agent.send_signal(signal.SIGTERM)
    codes, reports = job.end()
    assert codes == [143] and [report.class_ for report in reports] == ["drained"]
    assert "before the nodes had met" in reports[0].reason


def test_a_killed_rank_is_named_by_its_node_and_the_other_says_peer(attempts: Attempts, jobs: Any) -> None:
    config = tiny(steps=2000, checkpoint={"every_steps": 2000})
    job = jobs(attempts.intend(config=config, nodes=2, devices=2, trainer=tuple(FORKED)))
    until(lambda: (job.nodes[0].run_dir / "metrics.jsonl").exists(), "training")
    # The first of its node: where two ranks have ended, a forked gang names the first alone (torch.multiprocessing), torchrun names both.
    (rank, pid) = min(job.nodes[1].ranks().items())
    os.kill(pid, signal.SIGKILL)
    codes, reports = job.end()
    assert [(report.class_, report.rank) for report in reports] == [("peer", None), ("signal", rank)], job.explain()
    assert codes == [71, 137]
    merged = job.report()
    assert (merged.class_, merged.rank, merged.node) == ("signal", rank, 1)
    assert rank == 2 and "SIGKILL" in merged.reason
    assert attempts.published(job.intent) == []
