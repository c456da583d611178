"""A driver's surroundings for tests: a folder store, and a backend in memory whose attempts follow a script. The clock is the test's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tiny_attempts import CONFIG, STEPS

from opensora.config import StageConfig
from orchestrator.driver.runner import Result, Runner
from orchestrator.effects import perform, unwatched
from orchestrator.errors import Refused, Unreachable
from orchestrator.ledger.records import EXIT_CODES, ExitClass, Intent, JournalPiece, Report
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Life, NodeCounter, Store
from orchestrator.recipe.pipeline import Pipeline, Stage, StageSpec
from orchestrator.stores.folder import FolderStore


def config(seed: int = 1) -> StageConfig:
    return CONFIG.model_copy(update={"seed": seed})


def pipeline(*parents: tuple[str, str | None], seeds: dict[str, int] | None = None) -> Pipeline:
    return Pipeline.model_validate(
        {
            "name": "demo",
            "backend": "local",
            "store": "store",
            "tracking": "none",
            "experiment": "demo",
            "budget_usd": None,
            "flush_s": 1.0,
            "trainer": ("train", "{run_dir}"),
            "stages": tuple(
                Stage(spec=StageSpec(name=name, config="x.yaml", parent=parent), config=config((seeds or {}).get(name, 1)))
                for name, parent in parents
            ),
        }
    )


CHAIN = pipeline(("one", None), ("two", "one"), ("three", "two"))
PAIR = pipeline(("one", None), ("two", "one"))

Script = list[tuple[Any, ...]]
"""What an attempt does, one entry a look: ("step",) · ("publish", step) · ("end", class) · ("vanish", [cause]) ·
("waits", why, what for) · ("queued", why): it holds nothing, and waits for devices · ("begins",): it holds them ·
("deleted",): its job, with no trace left · ("do", callable)."""
Cause = Literal["preempted", "oom_killed", "deleted"]


def whole() -> Script:
    return [("publish", 10), ("publish", 20), ("publish", 30), ("end", "completed")]


@dataclass
class Clock:
    time: float = 1000.0
    on_sleep: list[Callable[[], None]] = field(default_factory=list)
    slept: float = 0.0

    def now(self) -> float:
        return self.time

    def elapsed(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept += seconds
        assert self.slept < 3600, "the driver waits for ever"
        for work in self.on_sleep:
            work()


@dataclass
class Body:
    intent: Intent
    script: Iterator[tuple[Any, ...]]
    life: Life
    step: int
    pieces: int = 0
    draining: bool = False


class MemoryBackend:
    """Attempts that live in this object. Obeys `ports.Backend`, refuses intents older than the lease as the agent does."""

    def __init__(self, store: Store, clock: Clock, folder: Path):
        self.ledger, self.clock, self.folder = Ledger(store, "demo"), clock, folder
        self.scripts: dict[tuple[str, int], Script] = {}
        self.bodies: dict[str, Body] = {}
        self.blind = False
        self.deaf = False
        """Takes its time with saving."""
        self.submitted: list[str] = []
        self.forgotten: list[str] = []
        self.refusals: dict[tuple[str, int], str] = {}
        """What the API server would say to a submission."""
        self.never: dict[int, str] = {}
        """Why no attempt on so many nodes could ever be submitted."""
        self.faults: dict[str, str] = {}
        """Why a submission cannot be made now, by run key."""
        clock.on_sleep.append(self.live)

    def submit(self, intent_key: str, run_key: str) -> None:
        intent = Intent.decode(self.ledger.store.read(intent_key).data)
        lease = self.ledger.lease()
        if run_key in self.bodies or (lease is not None and lease.epoch > intent.epoch):
            return
        if (intent.stage, intent.attempt) in self.refusals:
            raise Refused(self.refusals[intent.stage, intent.attempt])
        if run_key in self.faults:
            raise Unreachable(self.faults[run_key])
        script = self.scripts.get((intent.stage, intent.attempt), whole())
        assert not any(body.life.state == "running" and body.intent.stage == intent.stage for body in self.bodies.values())
        life = Life("running", bound=self.clock.time)
        if script and script[0][0] == "queued":
            life = Life("running", waits=script[0][1], waits_for="capacity", since=self.clock.time)
        body = Body(intent, iter(script), life, intent.resume.step if intent.resume else 0)
        perform("process.start", run_key, lambda: self._begin(run_key, body))

    def _begin(self, run_key: str, body: Body) -> None:
        self.submitted.append(run_key)
        self.bodies[run_key] = body

    def check(self, run_key: str, nodes: int) -> None:
        if nodes in self.never:
            raise Refused(self.never[nodes])

    def observe(self, run_key: str) -> Life:
        if self.blind:
            return Life("unknown")
        if run_key in self.faults and run_key not in self.bodies:
            return Life("absent", waits=self.faults[run_key], waits_for="fault", since=1000.0)
        return self.bodies[run_key].life if run_key in self.bodies else Life("absent")

    def drain(self, run_key: str) -> None:
        body = self.bodies[run_key]
        perform("process.drain", run_key, lambda: setattr(body, "draining", True))

    def kill(self, run_key: str) -> None:
        perform("process.kill", run_key, lambda: self._die(self.bodies[run_key], 137))

    def forget(self, run_key: str) -> None:
        assert self.ledger_has_outcome(run_key), "forgotten before its outcome was written"
        self.forgotten.append(run_key)

    def ledger_has_outcome(self, run_key: str) -> bool:
        stage, _, rest = run_key.partition("/")[2].partition("@")
        inputs_digest, _, number = rest.partition("/a")
        return self.ledger.outcome(stage, inputs_digest, int(number)) is not None

    def _die(self, body: Body, exit_code: int | None, cause: Cause | None = None) -> None:
        body.life = Life("ended", body.life.bound, self.clock.time, exit_code, cause)

    def live(self) -> None:
        """A moment passes for every running attempt. What attempts do is no effect of the driver."""
        with unwatched():
            self._live()

    def _live(self) -> None:
        for body in list(self.bodies.values()):
            if body.life.state != "running":
                continue
            if body.life.bound is not None:
                self._journal(body)
            if body.draining and not self.deaf:
                self._publish(body, body.step + 1)
                self._end(body, "drained")
                continue
            verb, *rest = next(body.script)
            if verb == "publish" and rest[0] > body.step:
                self._publish(body, rest[0])
            elif verb == "end":
                if rest[0] == "completed":
                    self._publish(body, STEPS)
                self._end(body, rest[0])
            elif verb == "vanish":
                self._die(body, None, *rest)
            elif verb == "deleted":
                del self.bodies[body.intent.run_key]
            elif verb == "waits":
                body.life = replace(body.life, waits=rest[0], waits_for=rest[1], since=self.clock.time if rest[0] else None)
            elif verb == "queued":
                since = body.life.since if body.life.waits_for == "capacity" else self.clock.time
                body.life = Life("running", waits=rest[0], waits_for="capacity", since=since)
            elif verb == "begins":
                body.life = Life("running", bound=self.clock.time)
            elif verb == "do":
                rest[0]()

    def _journal(self, body: Body) -> None:
        start = self.clock.time - 0.05
        piece = JournalPiece(node=0, seq=body.pieces, start=start, end=self.clock.time, devices=1, spent={"step": 0.05})
        self.ledger.append_journal(body.intent, piece)
        body.pieces += 1

    def _publish(self, body: Body, step: int) -> None:
        if step > body.step:
            publish(self.ledger, body.intent, self.folder, step)
            body.step = step

    def _end(self, body: Body, class_: ExitClass) -> None:
        evaluation = {"accuracy": 0.5} if class_ == "completed" else {}
        self.ledger.write_report(
            body.intent,
            Report.model_validate(
                {
                    "class": class_,
                    "reason": f"said {class_}",
                    "step": body.step,
                    "evaluation": evaluation,
                    "started": 1.0,
                    "ended": self.clock.time,
                }
            ),
        )
        self._die(body, EXIT_CODES.get(class_))


def publish(ledger: Ledger, intent: Intent, folder: Path, step: int) -> None:
    """Weights are a function of stage, parent and step alone: whoever trains them, they come out equal."""
    directory = folder / f"{intent.stage}-{intent.inputs_digest}-{intent.attempt}-{step}"
    directory.mkdir(parents=True)
    parent = intent.parent.manifest_digest if intent.parent else ""
    for name in ("model.safetensors", "ema.safetensors"):
        (directory / name).write_text(f"{name} {intent.stage} {bool(parent)} {step}")
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    (directory / "CHECKPOINT.json").write_text(
        json.dumps({"schema": 1, "step": step, "steps": STEPS, "complete": step == STEPS, "files": files})
    )
    ledger.publish(intent, directory)


@dataclass
class Rig:
    """A store and a backend that outlive any driver."""

    store: FolderStore
    clock: Clock
    backend: MemoryBackend
    nodes: NodeCounter | None = None

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store, "demo")

    def runner(self, of: Pipeline = CHAIN) -> Runner:
        return Runner(of, self.ledger, self.backend, self.clock, nodes=self.nodes)

    def launch(self, of: Pipeline = CHAIN, *targets: str) -> Result:
        return self.runner(of).run(list(targets) or None)

    def kinds(self, kind: str) -> list[str]:
        return [f"{event.stage} {event.detail}".strip() for event in self.ledger.events() if event.kind == kind]

    def outcomes(self, stage: str) -> list[str]:
        (inputs_digest, *_) = self.ledger.inputs_of(stage)
        found = [self.ledger.outcome(stage, inputs_digest, number) for number in self.ledger.attempts(stage, inputs_digest)]
        return [outcome.class_ if outcome else "open" for outcome in found]
