"""Laws of the driver, on a folder store and a backend in memory whose attempts follow a script. The clock is the test's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from faults import faults_of_thirty_kinds
from tiny_attempts import CONFIG, STEPS

from opensora import identity
from opensora.config import StageConfig
from orchestrator import inputs as inputs_module
from orchestrator.adapters.folder import FolderStore
from orchestrator.cluster import ClusterProfile
from orchestrator.config import Pipeline, Stage, StageSpec
from orchestrator.errors import CorruptCheckpoint, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.lease import LeaseHandle
from orchestrator.ledger import Ledger
from orchestrator.ports import Life, Store
from orchestrator.records import EXIT_CODES, DamagedCheckpoint, Event, ExitClass, Intent, JournalPiece, Report
from orchestrator.runner import Detached, Result, Runner, SystemClock, _HeldLease, code_version, held_time


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
("waits", why, what for) · ("deleted",): its job, with no trace left · ("do", callable)."""
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
        self.submitted.append(run_key)
        start = intent.resume.step if intent.resume else 0
        self.bodies[run_key] = Body(intent, iter(script), Life("running", bound=self.clock.time), start)

    def observe(self, run_key: str) -> Life:
        if self.blind:
            return Life("unknown")
        if run_key in self.faults and run_key not in self.bodies:
            return Life("absent", waits=self.faults[run_key], waits_for="fault", since=1000.0)
        return self.bodies[run_key].life if run_key in self.bodies else Life("absent")

    def drain(self, run_key: str) -> None:
        self.bodies[run_key].draining = True

    def kill(self, run_key: str) -> None:
        self._die(self.bodies[run_key], 137)

    def forget(self, run_key: str) -> None:
        assert self.ledger_has_outcome(run_key), "forgotten before its outcome was written"
        self.forgotten.append(run_key)

    def ledger_has_outcome(self, run_key: str) -> bool:
        stage, _, rest = run_key.partition("/")[2].partition("@")
        inputs, _, number = rest.partition("/a")
        return self.ledger.outcome(stage, inputs, int(number)) is not None

    def _die(self, body: Body, exit_code: int | None, cause: Cause | None = None) -> None:
        body.life = Life("ended", body.life.bound, self.clock.time, exit_code, cause)

    def live(self) -> None:
        """A moment passes for every running attempt."""
        for body in list(self.bodies.values()):
            if body.life.state != "running":
                continue
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
    directory = folder / f"{intent.stage}-{intent.inputs}-{intent.attempt}-{step}"
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

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store, "demo")

    def runner(self, of: Pipeline = CHAIN) -> Runner:
        return Runner(of, self.ledger, self.backend, self.clock)

    def launch(self, of: Pipeline = CHAIN, *targets: str) -> Result:
        return self.runner(of).run(list(targets) or None)

    def kinds(self, kind: str) -> list[str]:
        return [f"{event.stage} {event.detail}".strip() for event in self.ledger.events() if event.kind == kind]

    def outcomes(self, stage: str) -> list[str]:
        (inputs, *_) = self.ledger.inputs_of(stage)
        found = [self.ledger.outcome(stage, inputs, number) for number in self.ledger.attempts(stage, inputs)]
        return [outcome.class_ if outcome else "open" for outcome in found]


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers die here, machines do not: syncing every record to the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    store, clock = FolderStore(tmp_path / "store"), Clock()
    return Rig(store, clock, MemoryBackend(store, clock, tmp_path / "work"))


# --- Chains ------------------------------------------------------------------------------------------------------------------------


def test_every_stage_starts_from_the_committed_result_of_the_one_before(rig: Rig) -> None:
    result = rig.launch()
    assert (result.status, result.exit_code) == ("succeeded", 0)
    assert [(stage.name, stage.state, stage.step, stage.attempts) for stage in result.stages] == [
        (name, "committed", STEPS, 1) for name in ("one", "two", "three")
    ]
    (inputs,) = rig.ledger.inputs_of("three")
    links = list(rig.ledger.lineage("three", inputs, full=True))
    assert [link.stage for link in links] == ["three", "two", "one"] and all(link.ok for link in links), [link.faults for link in links]
    committed = rig.ledger.committed("three", inputs)
    assert committed is not None and committed.evaluation == {"accuracy": 0.5}


def test_launching_twice_does_nothing_twice(rig: Rig) -> None:
    rig.launch()
    before = sorted(rig.store.list("demo/stages/"))
    again = rig.launch()
    assert again.status == "succeeded"
    assert sorted(rig.store.list("demo/stages/")) == before
    assert len(rig.backend.submitted) == 3
    assert len(rig.kinds("committed")) == 3
    assert len(rig.ledger.revisions()) == 1


def test_hand_over_takes_one_look(rig: Rig) -> None:
    rig.launch()
    (one,), (two,) = rig.ledger.inputs_of("one"), rig.ledger.inputs_of("two")
    ended, born = rig.ledger.outcome("one", one, 1), rig.ledger.intent("two", two, 1)
    assert ended is not None and born is not None
    assert born.created - ended.ended <= 0.1


def test_one_stage_alone_finds_its_parent_in_the_ledger(rig: Rig) -> None:
    rig.launch(CHAIN, "one")
    result = rig.launch(CHAIN, "two")
    assert [stage.state for stage in result.stages] == ["committed", "committed", "not asked for"]


def test_one_stage_alone_without_its_parent_is_refused_before_anything_is_written(rig: Rig) -> None:
    with pytest.raises(Refused, match="osctl launch one"):
        rig.launch(CHAIN, "two")
    assert list(rig.store.list("")) == []


def test_a_parent_with_another_configuration_is_no_parent(rig: Rig) -> None:
    rig.launch(CHAIN, "one")
    changed = pipeline(("one", None), ("two", "one"), seeds={"one": 2})
    with pytest.raises(Refused, match="current configuration"):
        rig.launch(changed, "two")


def test_only_what_changed_and_what_hangs_on_it_runs_again(rig: Rig) -> None:
    rig.launch()
    changed = pipeline(("one", None), ("two", "one"), ("three", "two"), seeds={"two": 2})
    rig.launch(changed)
    assert [key.split("@")[0] for key in rig.backend.submitted] == ["demo/one", "demo/two", "demo/three", "demo/two", "demo/three"]


def test_an_unknown_stage_is_a_usage_error_that_names_the_others(rig: Rig) -> None:
    with pytest.raises(UsageError, match="one, two, three"):
        rig.launch(CHAIN, "four")


# --- Faults ------------------------------------------------------------------------------------------------------------------------


def test_a_lost_attempt_goes_on_from_its_newest_checkpoint(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), ("step",), ("vanish",)]
    result = rig.launch()
    assert result.status == "succeeded"
    assert rig.outcomes("two") == ["lost", "completed"]
    (inputs,) = rig.ledger.inputs_of("two")
    second = rig.ledger.intent("two", inputs, 2)
    assert second is not None and second.resume is not None and second.resume.step == 20
    assert any("from step 20" in detail for detail in rig.kinds("retry"))


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_broken_checkpoint_is_passed_over_for_an_older_one(rig: Rig, damage: str) -> None:
    def spoil() -> None:
        (path,) = (rig.store.root / "demo/stages").glob("two@*/checkpoints/step-00000020-a1/ema.safetensors")
        data = path.read_bytes()
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))

    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), ("do", spoil), ("vanish",)]
    result = rig.launch()
    assert result.status == "succeeded"
    (inputs,) = rig.ledger.inputs_of("two")
    second = rig.ledger.intent("two", inputs, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10
    assert any("ema.safetensors" in detail for detail in rig.kinds("observed"))


HALF = b'{"schema": 1, "run'


def spoil(rig: Rig, pattern: str, data: bytes = HALF) -> Path:
    [path] = (rig.store.root / "demo/stages").glob(pattern)
    path.unlink()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("steps", "start"), [((20,), "from step 10, as nothing newer can be used"), ((10, 20), "from one, as nothing newer can be used")]
)
def test_a_manifest_that_cannot_be_read_is_an_unpublished_checkpoint_and_people_hear_it(
    rig: Rig, steps: tuple[int, ...], start: str
) -> None:
    damages: Script = [("do", lambda: [spoil(rig, f"two@*/checkpoints/step-{step:08d}-a1/MANIFEST.json") for step in steps])]
    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), *damages, ("vanish",)]
    heard: list[Event] = []
    result = Runner(CHAIN, rig.ledger, rig.backend, rig.clock, on_event=heard.append).run()
    assert result.status == "succeeded" and rig.outcomes("two") == ["lost", "completed"]
    unused = [event for event in heard if event.says_unused]
    assert [event.kind for event in unused] == ["observed"] * len(steps) + ["retry"]
    assert "step 20 is not used" in unused[-2].detail and "half written" in unused[-2].detail
    assert (unused[-2].stage, unused[-2].attempt) == ("two", 1) and unused[-1].detail.startswith(start)


def test_a_checkpoint_whose_upload_was_not_finished_is_named_where_an_older_one_is_used(rig: Rig) -> None:
    def lose() -> None:
        [path] = (rig.store.root / "demo/stages").glob("two@*/checkpoints/step-00000020-a1/MANIFEST.json")
        path.unlink()

    rig.backend.scripts["two", 1] = [("publish", 10), ("publish", 20), ("do", lose), ("vanish",)]
    assert rig.launch().status == "succeeded"
    assert any("step 20 is not used" in detail and "upload was not finished" in detail for detail in rig.kinds("observed"))
    assert any("from step 10, as nothing newer can be used" in detail for detail in rig.kinds("retry"))


@pytest.mark.parametrize("data", [HALF, b"", b'{"schema": 2}'])
def test_a_result_that_cannot_be_read_stops_its_stage_alone(rig: Rig, data: bytes) -> None:
    two_roots = pipeline(("one", None), ("two", "one"), ("other", None), seeds={"other": 7})
    rig.launch(two_roots, "one")
    path = spoil(rig, "one@*/COMMITTED.json", data)
    result = rig.launch(two_roots)
    assert (result.status, result.exit_code) == ("failed", 4) and "COMMITTED.json" in result.reason
    assert [stage.state for stage in result.stages] == ["failed", "blocked", "committed"]
    assert path.read_bytes() == data and rig.outcomes("one") == ["completed"]
    with pytest.raises(Refused, match=r"COMMITTED\.json"):
        rig.launch(two_roots, "two")


def test_an_outcome_that_cannot_be_read_is_an_end_and_the_next_attempt_goes_on(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("end", "nan")]
    rig.launch()
    path = spoil(rig, "one@*/attempts/1/outcome.json")
    assert rig.launch().status == "succeeded"
    (inputs,) = rig.ledger.inputs_of("one")
    second = rig.ledger.intent("one", inputs, 2)
    assert second is not None and second.resume is not None and second.resume.step == 10 and path.read_bytes() == HALF


def test_an_attempt_without_a_readable_intent_is_left_alone_and_never_doubled(rig: Rig) -> None:
    def detach() -> None:
        runner.detach()

    rig.backend.scripts["one", 1] = [("publish", 10), ("do", detach), *[("step",)] * 40, ("vanish",)]
    runner = rig.runner()
    with pytest.raises(Detached):
        runner.run()
    spoil(rig, "one@*/attempts/1/intent.json")
    with pytest.raises(Refused, match=r"one attempt 1 may hold devices.*intent\.json is half written"):
        rig.launch()
    [body] = rig.backend.bodies.values()
    rig.backend._die(body, 1)
    assert rig.launch().status == "succeeded"
    (inputs,) = rig.ledger.inputs_of("one")
    assert rig.ledger.attempts("one", inputs) == [1, 2], "its number is spent"


def test_half_written_terms_of_a_driver_that_died_spend_their_number(rig: Rig) -> None:
    runner = rig.runner()
    runner.detach()
    with pytest.raises(Detached):
        runner.run()
    inputs = inputs_module.name_of(CHAIN.stages[0], None)
    rig.store.create(rig.ledger.keys.terms("one", inputs, 1), HALF)
    assert rig.launch().status == "succeeded"
    assert [rig.ledger.intent("one", inputs, number) is None for number in (1, 2)] == [True, False]


@pytest.mark.parametrize("name", ["intent.json", "outcome.json", "terms.json"])
def test_what_cannot_be_read_of_earlier_inputs_holds_nothing_up(rig: Rig, name: str) -> None:
    rig.launch(CHAIN, "one")
    spoil(rig, f"one@*/attempts/1/{name}")
    assert rig.launch(pipeline(("one", None), seeds={"one": 7})).status == "succeeded"


@pytest.mark.parametrize("pattern", ["attempts/1/journal/000-000000.json", "attempts/1/report.json"])
def test_a_journal_or_a_report_that_cannot_be_read_holds_nothing_up(rig: Rig, pattern: str) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("end", "code")]
    end = rig.backend._end

    def end_and_spoil(body: Body, class_: ExitClass) -> None:
        end(body, class_)
        if (body.intent.stage, body.intent.attempt) == ("one", 1):
            spoil(rig, f"one@*/{pattern}")

    rig.backend._end = end_and_spoil  # type: ignore[method-assign]
    assert rig.launch().status == "succeeded"
    (inputs,) = rig.ledger.inputs_of("one")
    second = rig.ledger.intent("one", inputs, 2)
    assert second is not None and second.resume is not None and second.resume.step == 20


def damaged(rig: Rig, number: int, by: Literal["agent", "trainer"] = "agent") -> Script:
    """What an attempt does that was to go on from a checkpoint which is not what was published."""

    def say() -> None:
        (inputs,) = rig.ledger.inputs_of("one")
        intent = rig.ledger.intent("one", inputs, number)
        assert intent is not None and intent.resume is not None
        word = DamagedCheckpoint(key=intent.resume.key, step=intent.resume.step, reason="ema.safetensors: 7 bytes", by=by)
        rig.ledger.write_damaged(intent, word)

    return [("do", say), ("end", "parent")]


def resumed(rig: Rig, stage: str) -> list[int]:
    """Steps from which the attempts of a stage went on."""
    (inputs,) = rig.ledger.inputs_of(stage)
    intents = [rig.ledger.intent(stage, inputs, number) for number in rig.ledger.attempts(stage, inputs)]
    return [intent.resume.step if intent is not None and intent.resume is not None else 0 for intent in intents]


def test_a_checkpoint_that_an_agent_finds_damaged_is_passed_over_by_every_attempt_after_it(rig: Rig) -> None:
    one = pipeline(("one", None))
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("vanish",)]
    rig.backend.scripts["one", 2] = damaged(rig, 2)
    rig.backend.scripts["one", 3] = [("step",), ("vanish",)]
    assert rig.launch(one).status == "succeeded"
    assert resumed(rig, "one") == [0, 20, 10, 10]
    assert rig.outcomes("one") == ["lost", "store", "lost", "completed"]
    (said,) = [said for said in rig.kinds("retry") if "damaged" in said]
    assert "from step 10" in said and "step 20, from which it was to go on, is damaged: ema.safetensors: 7 bytes" in said


def test_a_damaged_checkpoint_is_remembered_by_the_next_launch(rig: Rig) -> None:
    one = pipeline(("one", None))
    runner = rig.runner(one)
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("vanish",)]
    rig.backend.scripts["one", 2] = damaged(rig, 2)
    rig.backend.scripts["one", 3] = [("do", runner.kill), *[("step",)] * 9]
    assert runner.run().status == "suspended"
    assert rig.launch(one).status == "succeeded"
    assert resumed(rig, "one") == [0, 20, 10, 10]


def test_however_many_checkpoints_are_damaged_the_stage_goes_on_and_in_the_end_from_its_start(rig: Rig) -> None:
    one = pipeline(("one", None))
    rig.backend.scripts["one", 1] = [*(("publish", 5 * number) for number in range(1, 8)), ("vanish",)]
    for number in range(2, 9):
        rig.backend.scripts["one", number] = damaged(rig, number)
    assert rig.launch(one).status == "succeeded"
    assert resumed(rig, "one") == [0, 35, 30, 25, 20, 15, 10, 5, 0]
    assert "from the start" in rig.kinds("retry")[-1] and "step 5, from which" in rig.kinds("retry")[-1]
    assert rig.clock.slept < 60, "there is nothing to wait for"


def test_a_trainer_that_refuses_two_checkpoints_in_a_row_is_not_given_a_third(rig: Rig) -> None:
    """Beginning anew would throw good work away, where it is the trainer that cannot read them."""
    one = pipeline(("one", None))
    rig.backend.scripts["one", 1] = [("publish", 10), ("publish", 20), ("publish", 30), ("vanish",)]
    for number in (2, 3):
        rig.backend.scripts["one", number] = damaged(rig, number, by="trainer")
    result = rig.launch(one)
    assert (result.status, result.exit_code) == ("failed", 4) and "two checkpoints in a row" in result.reason
    assert resumed(rig, "one") == [0, 30, 20]


def test_a_permanent_end_fails_the_run_and_blocks_what_hangs_on_it(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("end", "nan")]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("failed", 3)
    assert [stage.state for stage in result.stages] == ["committed", "failed", "blocked"]
    assert "attempt 1 ended with nan" in result.reason
    assert rig.kinds("ended") == [f"None failed: {result.reason}"] or rig.kinds("ended")[-1].endswith(result.reason)


def test_three_stalls_fail_the_run_after_growing_pauses(rig: Rig) -> None:
    for number in (1, 2, 3):
        rig.backend.scripts["one", number] = [("vanish",)]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("failed", 3)
    assert rig.outcomes("one") == ["lost"] * 3
    assert rig.clock.slept >= 5
    del rig.backend.scripts["one", 3]
    assert rig.launch().status == "succeeded"


def test_a_completed_report_without_its_checkpoint_is_not_committed(rig: Rig) -> None:
    def lose() -> None:
        for path in (rig.store.root / "demo/stages").glob("one@*/checkpoints/step-*-a1/MANIFEST.json"):
            path.unlink()

    end = rig.backend._end

    def end_and_lose(body: Body, class_: ExitClass) -> None:
        end(body, class_)
        if body.intent.attempt == 1 and body.intent.stage == "one":
            lose()

    rig.backend._end = end_and_lose  # type: ignore[method-assign]
    result = rig.launch()
    assert result.status == "succeeded"
    assert rig.outcomes("one") == ["completed", "completed"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_parent_that_is_not_what_was_committed_is_refused_with_4(rig: Rig, damage: str) -> None:
    rig.launch(CHAIN, "one")
    (path,) = (rig.store.root / "demo/stages").glob("one@*/checkpoints/step-00000040-a1/model.safetensors")
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage != "remove":
        data[3] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    result = rig.launch(CHAIN, "two")
    assert (result.status, result.exit_code) == ("failed", 4)
    assert "model.safetensors" in result.reason
    assert rig.ledger.inputs_of("two") == []


def test_an_exchanged_result_is_refused(rig: Rig) -> None:
    rig.launch(CHAIN, "one")
    (path,) = (rig.store.root / "demo/stages").glob("one@*/COMMITTED.json")
    content = json.loads(path.read_bytes())
    path.unlink()
    path.write_text(json.dumps(content | {"time": content["time"] + 1}))
    result = rig.launch(CHAIN, "two")
    assert result.exit_code == 4 and "COMMITTED.json" in result.reason


def test_unknown_life_is_waited_for(rig: Rig) -> None:
    runner = rig.runner()
    looks = 0

    def blindness() -> None:
        nonlocal looks
        looks += 1
        rig.backend.blind = 2 <= looks < 40

    rig.clock.on_sleep.insert(0, blindness)
    result = runner.run()
    assert result.status == "succeeded" and looks > 40
    assert len(rig.backend.submitted) == 3
    assert any("cannot say" in detail for detail in rig.kinds("observed"))


def test_a_store_that_is_away_for_a_while_only_delays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, calls = rig.runner(), 0
    attempts = runner.ledger.attempts

    def flaky(stage: str, inputs: str) -> list[int]:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise Unreachable("store: did not answer")
        return attempts(stage, inputs)

    monkeypatch.setattr(runner.ledger, "attempts", flaky)
    assert runner.run().status == "succeeded"
    assert len(rig.backend.submitted) == 3


# --- Stops -------------------------------------------------------------------------------------------------------------------------


def test_drain_saves_and_suspends_and_the_next_launch_goes_on(rig: Rig) -> None:
    runner = rig.runner()
    rig.backend.scripts["two", 1] = [("publish", 10), ("do", runner.drain), ("step",), ("step",), ("step",)]
    result = runner.run()
    assert (result.status, result.exit_code) == ("suspended", 130)
    assert rig.outcomes("two") == ["drained"]
    assert rig.launch().status == "succeeded"
    (inputs,) = rig.ledger.inputs_of("two")
    second = rig.ledger.intent("two", inputs, 2)
    assert second is not None and second.resume is not None and second.resume.step == 11


def test_a_stage_that_completes_while_draining_is_committed(rig: Rig) -> None:
    runner = rig.runner()
    rig.backend.scripts["two", 1] = [("do", runner.drain), ("end", "completed")]
    rig.backend.drain = lambda run_key: None  # type: ignore[method-assign]
    result = runner.run()
    assert result.status == "suspended"
    assert [stage.state for stage in result.stages] == ["committed", "committed", "open"]


def test_kill_ends_at_once(rig: Rig) -> None:
    runner = rig.runner()
    rig.backend.drain = lambda run_key: None  # type: ignore[method-assign]
    rig.backend.scripts["one", 1] = [("do", runner.drain), ("step",), ("do", runner.kill), ("step",)]
    result = runner.run()
    assert (result.status, result.exit_code) == ("suspended", 130)
    assert rig.outcomes("one") == ["lost"]
    assert rig.launch().status == "succeeded"


def test_a_cancel_of_another_process_drains_the_driver(rig: Rig) -> None:
    other = rig.ledger
    rig.backend.scripts["two", 1] = [("publish", 10), ("do", lambda: other.ask_cancel(rig.clock.time)), *[("step",)] * 30]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("cancelled", 130)
    assert rig.outcomes("two") == ["drained"]
    assert rig.kinds("ended")[-1].split()[1].startswith("cancelled")
    assert rig.launch().status == "succeeded"


def test_a_cancel_that_does_not_save_kills(rig: Rig) -> None:
    def ask() -> None:
        rig.ledger.ask_cancel(rig.clock.time, "now, by a test")

    rig.backend.scripts["two", 1] = [("publish", 10), ("do", ask), *[("step",)] * 30]
    result = rig.launch()
    assert (result.status, result.exit_code) == ("cancelled", 130)
    assert rig.outcomes("two") == ["lost"]
    assert rig.launch().status == "succeeded"


def test_a_second_cancel_can_give_up_the_saving(rig: Rig) -> None:
    rig.backend.deaf = True
    asks = [("do", lambda: rig.ledger.ask_cancel(rig.clock.time)), *[("step",)] * 30]
    asks += [("do", lambda: rig.ledger.ask_cancel(rig.clock.time, "now, by a test")), *[("step",)] * 30]
    rig.backend.scripts["two", 1] = asks
    assert rig.launch().status == "cancelled"
    assert rig.outcomes("two") == ["lost"]


def test_a_detached_driver_leaves_its_attempt_running_for_the_next(rig: Rig) -> None:
    first = rig.runner()
    rig.backend.scripts["two", 1] = [("publish", 10), ("do", first.detach), *[("step",)] * 3, ("end", "completed")]
    with pytest.raises(Detached):
        first.run()
    assert rig.outcomes("two") == ["open"] and rig.ledger.holder(rig.clock.time) is None
    assert not rig.kinds("ended"), "the launch is not over"
    assert rig.launch().status == "succeeded"
    assert rig.outcomes("two") == ["completed"] and len(rig.backend.submitted) == 3


def test_a_cancel_outlives_the_driver_that_heard_it(rig: Rig) -> None:
    first = rig.runner()
    rig.backend.deaf = True
    script = [("do", lambda: rig.ledger.ask_cancel(rig.clock.time)), *[("step",)] * 30, ("do", first.detach), *[("step",)] * 30]
    rig.backend.scripts["two", 1] = [*script, ("do", lambda: setattr(rig.backend, "deaf", False)), *[("step",)] * 30]
    with pytest.raises(Detached):
        first.run()
    assert rig.launch().status == "cancelled" and rig.outcomes("two") == ["drained"]
    assert rig.launch().status == "succeeded"


# --- On a cluster ------------------------------------------------------------------------------------------------------------------


PROFILE = ClusterProfile.model_validate(
    {
        "name": "test", "image": "t", "driver_image": "d", "allow_unpinned": ("t", "d"), "device": "cpu-core", "cpu": "1", "memory": "1Gi",
        "shm": "64Mi", "start_deadline_s": 60,
    }
)  # fmt: skip
CLUSTER = CHAIN.model_copy(update={"backend": "kubernetes", "cluster": PROFILE})


def ends(rig: Rig, of: Pipeline = CLUSTER) -> tuple[int, list[str]]:
    result = rig.launch(of)
    (inputs, *_) = rig.ledger.inputs_of("two")
    for number, class_ in enumerate(rig.outcomes("two"), 1):
        assert class_ == "open" or f"demo/two@{inputs}/a{number}" in rig.backend.forgotten
    return result.exit_code, rig.outcomes("two")


def test_what_the_cluster_takes_away_is_started_again_and_not_counted(rig: Rig) -> None:
    for number in range(1, 8):
        rig.backend.scripts["two", number] = [("publish", number * 2), ("vanish", "preempted")]
    assert ends(rig) == (0, ["preempted"] * 7 + ["completed"])


def test_ten_preemptions_in_a_row_without_a_checkpoint_do_not_end_a_run(rig: Rig) -> None:
    for number in range(1, 11):
        rig.backend.scripts["two", number] = [("step",), ("vanish", "preempted")]
    assert ends(rig) == (0, ["preempted"] * 10 + ["completed"])


def test_saved_for_somebody_else_it_goes_on_by_itself(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("publish", 10), ("end", "drained")]
    assert ends(rig) == (0, ["preempted", "completed"])


def test_killed_for_memory_it_is_tried_once_more(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = rig.backend.scripts["two", 2] = [("step",), ("vanish", "oom_killed")]
    assert ends(rig) == (3, ["oom_killed", "oom_killed"])


def test_a_job_that_somebody_deletes_is_not_made_again_until_somebody_asks(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("publish", 10), ("vanish", "deleted")]
    result = rig.launch(CLUSTER)
    assert result.exit_code == 3
    assert "deleted by someone else" in result.reason and "osctl resume" in result.reason and "step 10" in result.reason
    assert rig.outcomes("two") == ["lost"]
    assert ends(rig) == (0, ["lost", "completed"])


@pytest.mark.parametrize("traces", [True, False])
def test_a_job_deleted_while_no_driver_looked_is_found_out(rig: Rig, traces: bool) -> None:
    def die() -> None:
        raise Crash

    if not traces:
        rig.backend._journal = lambda body: None  # type: ignore[method-assign]
    rig.backend.scripts["one", 1] = [("step",), ("do", die), ("deleted",)]
    with pytest.raises(Crash):
        rig.launch(CLUSTER)
    rig.clock.time += 60
    rig.backend.live()
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("one")) == (3, ["lost"])
    assert "deleted by someone else" in result.reason
    assert rig.launch(CLUSTER).exit_code == 0


def test_a_job_that_a_dead_driver_killed_is_not_taken_for_deleted(rig: Rig) -> None:
    runner = rig.runner(CLUSTER)

    def kill_and_die(run_key: str) -> None:
        del rig.backend.bodies[run_key]
        raise Crash

    rig.backend.kill = kill_and_die  # type: ignore[method-assign]
    rig.backend.scripts["one", 1] = [("step",), ("do", runner.kill), *[("step",)] * 50]
    with pytest.raises(Crash):
        runner.run()
    rig.clock.time += 60
    assert rig.launch(CLUSTER).exit_code == 0
    assert rig.outcomes("one") == ["lost", "completed"]


def test_what_the_cluster_refuses_ends_with_4_in_its_words_and_nothing_stays_open(rig: Rig) -> None:
    rig.backend.refusals["two", 1] = 'admission webhook "x" denied the request: no'
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("two")) == (4, ["refused"])
    assert "denied the request: no" in result.reason
    assert ends(rig) == (0, ["refused", "completed"])


def test_a_fault_that_nobody_mends_ends_at_the_deadline_and_says_why(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("waits", "worker-0: ErrImagePull: not found", "fault"), *[("step",)] * 2000]
    began = rig.clock.time
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("two")) == (3, ["unstarted"])
    assert "ErrImagePull: not found" in result.reason and "60 s" in result.reason
    assert 60 <= rig.clock.time - began < 70
    assert sum("ErrImagePull" in said for said in rig.kinds("observed")) == 2, "once while it waited, and once when it was killed"


def test_a_fault_that_is_mended_in_time_only_delays(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("waits", "exceeded quota", "fault"), *[("step",)] * 300, ("waits", "", None), *whole()]
    assert ends(rig) == (0, ["completed"])


def test_a_wait_for_devices_has_no_end_and_is_said_once(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("waits", "0/9 nodes are available", "capacity"), *[("step",)] * 9000, ("waits", "", None), *whole()]
    assert ends(rig) == (0, ["completed"])
    assert rig.clock.slept > 900
    assert sum("0/9 nodes" in said for said in rig.kinds("observed")) == 1


def test_a_job_that_cannot_be_made_ends_at_the_deadline_too(rig: Rig) -> None:
    rig.launch(CLUSTER, "one")
    (inputs,) = rig.ledger.inputs_of("one")
    parent = rig.ledger.committed("one", inputs)
    assert parent is not None
    two = identity.name(CLUSTER.stage("two").config, 1, parent.digest())
    rig.backend.faults[f"demo/two@{two}/a1"] = "failed calling webhook: connection refused"
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("two")) == (3, ["unstarted"])
    assert "failed calling webhook" in result.reason
    assert sum("failed calling webhook" in said for said in rig.kinds("observed")) == 1
    rig.backend.faults.clear()
    assert ends(rig) == (0, ["unstarted", "completed"])


def test_a_backend_that_cannot_tidy_up_keeps_nobody_waiting(rig: Rig) -> None:
    asked = []

    def away(run_key: str) -> None:
        asked.append(run_key)
        raise Unreachable("api: away")

    rig.backend.forget = away  # type: ignore[method-assign]
    assert rig.launch(CLUSTER).exit_code == 0
    assert len(asked) >= 3


# --- Crashes and rivals ------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Mortal:
    """A store or backend whose driver dies before or after its n-th effect."""

    effects = ("create", "replace", "upload", "submit", "drain", "kill")

    def __init__(self, inner: Any, count: list[int], at: int, after: bool):
        self._inner, self._count, self._at, self._after = inner, count, at, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in self.effects:
            return method

        def call(*arguments: Any) -> Any:
            self._count[0] += 1
            mine = self._count[0] == self._at
            if mine and not self._after:
                raise Crash
            answer = method(*arguments)
            if mine:
                raise Crash
            return answer

        return call


def crashed(rig: Rig, at: int, after: bool) -> bool:
    """Launch with a driver that dies at its n-th effect. False: it had fewer."""
    count = [0]
    store, backend = Mortal(rig.store, count, at, after), Mortal(rig.backend, count, at, after)
    runner = Runner(PAIR, Ledger(store, "demo"), backend, rig.clock)
    try:
        runner.run()
    except Crash:
        return True
    return False


@pytest.mark.parametrize(
    ("after", "attempts_live_on"),
    [
        pytest.param(False, False, id="before-local"),
        pytest.param(True, True, id="after-cluster"),
        pytest.param(True, False, id="after-local", marks=pytest.mark.prove),
        pytest.param(False, True, id="before-cluster", marks=pytest.mark.prove),
    ],
)
def test_killed_at_any_effect_the_next_driver_carries_on(tmp_path: Path, after: bool, attempts_live_on: bool) -> None:
    """Enumerates every effect of a launch whose second stage also loses an attempt."""
    at, digests = 0, None
    while True:
        at += 1
        store, clock = FolderStore(tmp_path / f"{at}/store"), Clock()
        rig = Rig(store, clock, MemoryBackend(store, clock, tmp_path / f"{at}/work"))
        rig.backend.scripts["two", 1] = [("publish", 10), ("vanish",)]
        died = crashed(rig, at, after)
        if died and not attempts_live_on:
            for body in rig.backend.bodies.values():
                if body.life.state == "running":
                    rig.backend._die(body, None)
        if died:
            clock.time += 60  # the lease of this very process would otherwise be seen alive
        result = rig.launch(PAIR)
        assert result.status == "succeeded", (at, result)
        found = [stage.weights_digest for stage in result.stages]
        digests = digests or found
        assert found == digests
        assert len(rig.kinds("committed")) == 2, (at, rig.kinds("committed"))
        for stage, inputs in rig.ledger.stages():
            numbers = rig.ledger.attempts(stage, inputs)
            assert all(rig.ledger.outcome(stage, inputs, number) for number in numbers), (at, stage)
            assert numbers == list(range(1, len(numbers) + 1))
        if not died:
            break
    assert at > 25


def test_a_second_driver_is_told_who_drives(rig: Rig) -> None:
    refusals: list[str] = []

    def rival() -> None:
        with pytest.raises(Refused) as caught:
            rig.runner().run()
        refusals.append(str(caught.value))

    rig.backend.scripts["one", 1] = [("do", rival), *whole()]
    assert rig.launch().status == "succeeded"
    assert len(refusals) == 1 and "driven by" in refusals[0]


def test_a_driver_that_slept_beyond_its_lease_does_nothing_more(rig: Rig) -> None:
    results: list[Result] = []

    def sleep_through() -> None:
        rig.clock.time += 60
        results.append(rig.launch())

    rig.backend.scripts["one", 1] = [("do", sleep_through), *whole()]
    with pytest.raises(Refused, match="taken over"):
        rig.launch()
    assert results[0].status == "succeeded"
    assert len(rig.backend.submitted) == 3
    assert {event.epoch for event in rig.ledger.events() if event.kind == "committed"} == {2}


def test_the_lease_is_renewed_while_waiting(rig: Rig) -> None:
    seen: list[float] = []

    def look() -> None:
        lease = rig.ledger.lease()
        assert lease is not None
        seen.append(lease.expires - rig.clock.time)

    rig.backend.scripts["one", 1] = [*[("do", look)] * 900, *whole()]
    assert rig.launch().status == "succeeded"
    assert min(seen) > 9 and rig.clock.slept > 45


def test_the_lease_is_renewed_while_acting(rig: Rig) -> None:
    """A submit that takes longer than the lease lives, on a real clock."""
    runner = Runner(pipeline(("one", None)), rig.ledger, rig.backend, SystemClock(), lease_ttl_s=0.3)
    submit = rig.backend.submit
    held: list[bool] = []

    def slow(intent_key: str, run_key: str) -> None:
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            time.sleep(0.1)
            lease = rig.ledger.lease()
            held.append(lease is not None and lease.expires > time.time())
        rig.clock.time = time.time()
        submit(intent_key, run_key)
        for _ in whole():
            rig.backend.live()

    rig.backend.submit = slow  # type: ignore[method-assign]
    assert runner.run().status == "succeeded"
    assert len(held) > 4 and all(held)


def test_what_an_earlier_configuration_left_running_is_drained_first(rig: Rig) -> None:
    one = pipeline(("one", None))
    assert crashed_while_running(rig)
    changed = pipeline(("one", None), seeds={"one": 2})
    result = rig.launch(changed)
    assert result.status == "succeeded"
    assert [rig.ledger.outcome("one", inputs, 1) is not None for inputs in rig.ledger.inputs_of("one")] == [True, True]
    assert sum(body.draining for body in rig.backend.bodies.values()) == 1
    assert one.stage("one").config != changed.stage("one").config


def crashed_while_running(rig: Rig) -> bool:
    def die() -> None:
        raise Crash

    rig.backend.scripts["one", 1] = [("publish", 10), ("do", die), *[("step",)] * 5]
    try:
        rig.launch()
    except Crash:
        rig.clock.time += 60
        del rig.backend.scripts["one", 1]
        return True
    return False


def test_another_result_than_the_committed_one_is_refused(rig: Rig) -> None:
    runner = rig.runner()

    def conflict(committed: Any) -> Any:
        raise StoreConflict("another manifest is committed")

    runner.ledger.commit = conflict  # type: ignore[method-assign]
    with pytest.raises(Refused, match="already committed"):
        runner.run()


class Faulty:
    """A lease that fails to be renewed by each of these in turn, then goes on."""

    def __init__(self, inner: LeaseHandle, faults: list[BaseException]) -> None:
        self.inner, self.faults, self.renewed = inner, faults, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def renew(self, now: float) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.renewed += 1
        self.inner.renew(now)


def test_no_fault_ends_the_keeper_of_the_lease(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    faults = list(faults_of_thirty_kinds())
    handle = Faulty(rig.ledger.acquire(0.0, 0.03), list(faults))
    with _HeldLease(cast(LeaseHandle, handle), SystemClock(), 0.03, "demo"):
        deadline = time.monotonic() + 30
        while not handle.renewed and time.monotonic() < deadline:
            time.sleep(0.01)
    assert handle.renewed and not handle.faults
    assert all(type(fault).__name__ in caplog.text or str(fault) in caplog.text for fault in faults)
    assert len(caplog.records) <= len(faults), "each is said once"


# --- Books -------------------------------------------------------------------------------------------------------------------------


def test_what_follows_the_last_piece_is_unaccounted(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("do", lambda: setattr(rig.clock, "time", rig.clock.time + 7)), ("vanish",)]
    journal = rig.backend._journal

    def only_two(body: Body) -> None:
        if body.pieces < 2:
            journal(body)

    rig.backend._journal = only_two  # type: ignore[method-assign]
    rig.launch()
    (inputs,) = rig.ledger.inputs_of("one")
    outcome, pieces = rig.ledger.outcome("one", inputs, 1), rig.ledger.journal("one", inputs, 1)
    assert outcome is not None and outcome.bound is not None
    assert outcome.unaccounted_s == pytest.approx(7.05)
    assert outcome.ended - outcome.bound == pytest.approx(sum(sum(piece.spent.values()) for piece in pieces) + outcome.unaccounted_s)


def test_an_attempt_that_was_never_started_holds_nothing(rig: Rig) -> None:
    rig.launch(pipeline(("one", None)))
    (inputs,) = rig.ledger.inputs_of("one")
    from orchestrator.decide import Attempt

    unborn = Attempt("one", inputs, 2, 1, 0, Life("absent"))
    assert held_time(unborn, [], 1, 5.0) == (None, 5.0, 0.0)


def test_the_version_names_the_package() -> None:
    assert code_version().split("+")[0][0].isdigit()


def test_refusals_are_of_one_kind() -> None:
    assert issubclass(CorruptCheckpoint, Refused)
