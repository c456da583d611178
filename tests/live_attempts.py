"""Real attempts on this machine: a folder store, a local backend, the real agent and the stand-in trainer, and a watcher from outside."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora import identity
from opensora.config import StageConfig
from orchestrator.ledger import lineage
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Committed, Intent, JournalPiece, ParentRef, Report, ResumeRef, Terms
from orchestrator.ledger.store import Ledger
from orchestrator.local.attempt_lock import AgentRecord, is_locked
from orchestrator.local.backend import LocalBackend
from orchestrator.local.processes import Process
from orchestrator.ports import Life
from orchestrator.stores.folder import FolderStore

STAND_IN = str(Path(__file__).parent / "stand_in_trainer.py")
PATIENCE_S = 60.0
"""For anything that takes a second on a machine that is not overloaded."""


def stage_config(*, steps: int = 20, every_steps: int = 5, seed: int = 1, evaluate: bool = False) -> StageConfig:
    return StageConfig.model_validate(
        {
            "objective": {"kind": "flow"},
            "sampling": {"method": "euler"},
            "data": {"source": {"kind": "digits", "clips": 4}, "frames": 2, "height": 16, "width": 16},
            "autoencoder": {"kind": "patch"},
            "text": {"kind": "words"},
            "steps": steps,
            "batch_size": 2,
            "checkpoint": {"every_steps": every_steps, "keep_last": 2},
            "seed": seed,
            "evaluate": {"kind": "digits", "frames": 2} if evaluate else None,
            "prompts": ("a digit 3 moving left",) if evaluate else (),
        }
    )


def until(fact: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + patience_s
    while not (answer := fact()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.005)
    return answer


class Attempts:
    """Attempts of one pipeline below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = FolderStore(root / "store")
        self.ledger = Ledger(self.store, "demo")
        self.backend = LocalBackend(self.store.url, root)

    def intend(
        self,
        *options: str,
        config: StageConfig | None = None,
        stage: str = "stage1",
        attempt: int = 1,
        devices: int = 1,
        nodes: int = 1,
        epoch: int = 0,
        parent: ParentRef | None = None,
        resume: ResumeRef | None = None,
        hang_timeout_s: float = 30.0,
        flush_s: float = 0.2,
        contents: identity.Contents | None = None,
        trainer: tuple[str, ...] = (sys.executable, STAND_IN, "{run_dir}", "{devices}"),
    ) -> Intent:
        """`options`: of the stand-in trainer."""
        config = config or stage_config()
        contents = contents or identity.Contents()
        inputs_digest = identity.name(config, nodes * devices, parent.committed_digest if parent else None, contents)
        self.ledger.write_terms(stage, inputs_digest, attempt, Terms(identity=identity.VERSION, contents=contents, price=None))
        return self.ledger.create_intent(
            Intent(
                run_key=run_key("demo", stage, inputs_digest, attempt),
                pipeline="demo",
                stage=stage,
                inputs_digest=inputs_digest,
                attempt=attempt,
                epoch=epoch,
                created=time.time(),
                config=config,
                config_digest=config.digest(),
                nodes=nodes,
                devices_per_node=devices,
                device="cpu-core",
                trainer=(*trainer, *options),
                hang_timeout_s=hang_timeout_s,
                flush_s=flush_s,
                parent=parent,
                resume=resume,
                code="test",
            )
        )

    def key(self, intent: Intent) -> str:
        return self.ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt)

    def run_dir(self, intent: Intent) -> Path:
        return self.backend.run_dir(intent.run_key)

    def submit(self, intent: Intent) -> None:
        self.backend.submit(self.key(intent), intent.run_key)

    def end(self, intent: Intent) -> Life:
        """Wait for the end of a submitted attempt."""
        until(lambda: self.backend.observe(intent.run_key).state == "ended", f"end of {intent.run_key}")
        return self.backend.observe(intent.run_key)

    def live(self, intent: Intent) -> tuple[Life, Report]:
        """Submit an attempt, wait for its end; it must leave a report."""
        self.submit(intent)
        life = self.end(intent)
        report = self.report(intent)
        assert report is not None, (self.run_dir(intent) / "agent.log").read_text()
        return life, report

    def report(self, intent: Intent) -> Report | None:
        return self.ledger.report(intent.stage, intent.inputs_digest, intent.attempt)

    def journal(self, intent: Intent) -> list[JournalPiece]:
        return Ledger(self.store, "demo").journal(intent.stage, intent.inputs_digest, intent.attempt)

    def published(self, intent: Intent) -> list[int]:
        return [
            manifest.step
            for _, manifest in self.ledger.checkpoints(intent.stage, intent.inputs_digest)
            if manifest.attempt == intent.attempt
        ]

    def weights(self, intent: Intent) -> str:
        """Weights digest of the newest published checkpoint of a stage."""
        return self.ledger.checkpoints(intent.stage, intent.inputs_digest)[-1][1].weights_digest

    def newest(self, intent: Intent) -> ResumeRef:
        key, manifest = self.ledger.checkpoints(intent.stage, intent.inputs_digest)[-1]
        return ResumeRef(key=key, manifest_digest=manifest.digest(), step=manifest.step)

    def commit(self, intent: Intent) -> ParentRef:
        """Commit a completed stage, as a driver does, and refer to it as a parent."""
        key, manifest = self.ledger.checkpoints(intent.stage, intent.inputs_digest)[-1]
        assert manifest.complete
        committed = Committed(
            run_key=intent.run_key, stage=intent.stage, inputs_digest=intent.inputs_digest, attempt=intent.attempt, step=manifest.step,
            manifest=key,
            manifest_digest=manifest.digest(), weights_digest=manifest.weights_digest,
            parent_committed=intent.parent.committed_digest if intent.parent else None, evaluation={}, time=1.0, epoch=0,
        )  # fmt: skip
        self.ledger.commit(committed)
        return lineage.parent_ref(self.ledger, intent.stage, intent.inputs_digest)

    def reaches(self, intent: Intent, step: int) -> None:
        """Wait until the trainer has published this step."""
        until(lambda: step in self.published(intent), f"{intent.run_key} publishes step {step}")

    def agent(self, intent: Intent) -> Process:
        """The agent's process, once there is one."""
        record: AgentRecord = until(lambda: AgentRecord.read(self.run_dir(intent)), f"an agent of {intent.run_key}")
        return record.agent

    def trainers(self, intent: Intent) -> list[int]:
        """Pids of the trainer's parent and ranks that live, the parent first."""
        return sorted(_with_argument(str(self.run_dir(intent)), but=("orchestrator.agent",)))

    def left_behind(self, intent: Intent) -> bool:
        """Whether any process of the attempt lives: agent, guard, trainer or rank."""
        return is_locked(self.run_dir(intent)) or bool(_with_argument(str(self.run_dir(intent)), but=()))


def _with_argument(word: str, but: tuple[str, ...]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if word in words and not any(other in words for other in but):
                found.append(int(entry.name))
    return found


class Watcher:
    """Sees a process from outside: when it was started, from the kernel, and when it died, by a pidfd."""

    def __init__(self, process: Process) -> None:
        self.started = time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - process.started)
        """To 10 ms: the kernel counts in ticks."""
        self._death: float | None = None
        handle = os.pidfd_open(process.pid)
        self._thread = threading.Thread(target=self._watch, args=(handle,), daemon=True)
        self._thread.start()

    def _watch(self, handle: int) -> None:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
        self._death = time.time()
        os.close(handle)

    @property
    def death(self) -> float:
        self._thread.join(PATIENCE_S)
        assert self._death is not None, "it lives"
        return self._death


def assert_books_balance(pieces: list[JournalPiece], life: Life, watcher: Watcher, devices: int) -> None:
    """Every device-second that an outside watcher sees is in exactly one category, what follows the last piece being unaccounted."""
    assert life.bound is not None and life.ended is not None
    assert [piece.seq for piece in pieces] == list(range(len(pieces)))
    edge = life.bound
    for piece in pieces:
        assert piece.devices == devices
        assert abs(piece.start - edge) < 1e-5
        assert abs(sum(piece.spent.values()) - (piece.end - piece.start)) < 1e-5
        edge = piece.end
    unaccounted = life.ended - edge
    assert unaccounted >= 0
    held = devices * (sum(sum(piece.spent.values()) for piece in pieces) + unaccounted)
    wall = devices * (watcher.death - watcher.started)
    assert abs(held - wall) <= max(0.001 * wall, 0.05 * devices), (held, wall, unaccounted)


LAUNCHER = """
import sys, time
from pathlib import Path
from orchestrator.local.backend import LocalBackend
LocalBackend(sys.argv[1], Path(sys.argv[2])).submit(sys.argv[3], sys.argv[4])
print("submitted", flush=True)
time.sleep(600)
"""


def start_launcher(attempts: Attempts, intent: Intent) -> subprocess.Popen[str]:
    """Another process that submits an attempt and then lives on."""
    argv = [sys.executable, "-c", LAUNCHER, attempts.store.url, str(attempts.root), attempts.key(intent), intent.run_key]
    launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "submitted\n"
    return launcher
