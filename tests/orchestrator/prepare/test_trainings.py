"""Whatever was or is being trained on a source is named when the source is taken out, each time that somebody asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from live_attempts import Attempts
from prepare_bench import Bench
from real_ledger import step_dir

from opensora.identity import Contents
from orchestrator.inputs import datasets
from orchestrator.ledger.records import Intent, Outcome, ParentRef
from orchestrator.ledger.store import Ledger
from orchestrator.prepare.records import Keys
from orchestrator.prepare.remove import Taken, find, manifests_with, take_out
from orchestrator.prepare.trainings import trainings_on


@pytest.fixture
def attempts(bench: Bench) -> Attempts:
    found = Attempts(bench.folder)
    assert found.store.url == bench.store.url
    return found


def begun(attempts: Attempts, stage: str, data: str, *, steps: tuple[int, ...] = (), parent: ParentRef | None = None) -> Intent:
    intent = attempts.intend(stage=stage, contents=Contents(data=data), parent=parent)
    for step in steps:
        attempts.ledger.publish(intent, step_dir(attempts.root / stage, step))
    return intent


def committed(attempts: Attempts, stage: str, data: str, parent: ParentRef | None = None) -> ParentRef:
    intent = begun(attempts, stage, data, steps=(300,), parent=parent)
    over(attempts, intent, "completed", 300)
    return attempts.commit(intent)


def over(attempts: Attempts, intent: Intent, how: str, step: int | None) -> None:
    content: dict[str, Any] = {"class": how, "exit_code": 1, "reason": "as the test says", "step": step, "bound": 1.0, "ended": 2.0}
    outcome = Outcome.model_validate(content | {"devices": 1, "unaccounted_s": 0.0, "by_person": False, "evaluation": {}, "epoch": 0})
    attempts.ledger.write_outcome(intent, outcome)


def take(bench: Bench, wanted: str) -> Taken:
    now = bench.clock.now()
    handle = Ledger(bench.store, Keys("mine").folder).acquire(now)
    try:
        return take_out(bench.store, find(bench.store, wanted, None), bench.directory().path, handle, now=now, holder="me@here")
    finally:
        handle.release()


def told(taken: Taken) -> dict[str, tuple[str, int]]:
    return {one.stage: (one.state, one.step) for one in taken.trainings}


def test_finished_open_and_failed_trainings_are_named_whenever_somebody_asks(bench: Bench, attempts: Attempts) -> None:
    bench.run("--parquet")
    older = datasets.of_name(bench.store, "mine")[-1].manifest
    (Path(bench.videos) / "d.mp4").write_bytes(b"one more")
    bench.run("--parquet")
    newer = datasets.of_name(bench.store, "mine")[-1].manifest
    finished = begun(attempts, "finished", older, steps=(100, 300))
    over(attempts, finished, "completed", 300)
    attempts.commit(finished)
    running = begun(attempts, "running", newer)
    over(attempts, begun(attempts, "drained", newer, steps=(100,)), "drained", 100)
    over(attempts, begun(attempts, "hopeless", newer), "config", None)
    begun(attempts, "other", "0" * 64, steps=(100,))
    expected = {"finished": ("committed", 300), "running": ("under way", 0), "drained": ("not finished", 100)}
    found = trainings_on(bench.store, manifests_with(bench.store, find(bench.store, "b.mp4", None)))
    assert {one.stage: (one.state, one.step) for one in found} == expected, "and before anything is taken out"
    assert told(take(bench, "b.mp4")) == expected
    assert told(take(bench, "b.mp4")) == expected, "its versions are gone, and what was trained on them is not"
    attempts.ledger.publish(running, step_dir(attempts.root / "running", 300))
    over(attempts, running, "completed", 300)
    attempts.commit(running)
    assert told(take(bench, "b.mp4")) == expected | {"running": ("committed", 300)}, "what was under way then is finished now"


def test_a_stage_on_other_data_that_began_from_such_weights_is_named_with_its_parent(bench: Bench, attempts: Attempts) -> None:
    bench.run("--parquet")
    parent = committed(attempts, "parent", datasets.of_name(bench.store, "mine")[-1].manifest)
    child = committed(attempts, "child", "0" * 64, parent)
    begun(attempts, "grandchild", "1" * 64, parent=child)
    begun(attempts, "orphan", "0" * 64, parent=committed(attempts, "other", "0" * 64))
    expected = {"parent": "", "child": parent.key.split("/")[2], "grandchild": child.key.split("/")[2]}
    for _ in range(2):
        assert {one.stage: one.parent for one in take(bench, "b.mp4").trainings} == expected


def test_what_never_had_the_source_is_not_named(bench: Bench, attempts: Attempts) -> None:
    bench.run("--parquet")
    before = datasets.of_name(bench.store, "mine")[-1].manifest
    (Path(bench.videos) / "d.mp4").write_bytes(b"one more")
    bench.run("--parquet")
    begun(attempts, "before", before)
    begun(attempts, "after", datasets.of_name(bench.store, "mine")[-1].manifest)
    assert told(take(bench, "d.mp4")) == {"after": ("under way", 0)}
    assert told(take(bench, "d.mp4")) == {"after": ("under way", 0)}


def test_of_a_version_that_went_for_one_source_the_trainings_are_named_for_another(bench: Bench, attempts: Attempts) -> None:
    bench.run("--parquet")
    begun(attempts, "before", datasets.of_name(bench.store, "mine")[-1].manifest, steps=(100,))
    assert set(told(take(bench, "b.mp4"))) == {"before"}
    begun(attempts, "after", datasets.of_name(bench.store, "mine")[-1].manifest)
    assert set(told(take(bench, "a.mp4"))) == {"before", "after"}
    assert set(told(take(bench, "b.mp4"))) == {"before"}
