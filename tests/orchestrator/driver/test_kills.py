"""Laws of the driver: it is killed at any effect, meets rivals and loses its lease."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from driver_rig import PAIR, Clock, MemoryBackend, Rig, pipeline, whole
from effect_fates import Crash, Fate, When
from faults import faults_of_thirty_kinds
from proofs import Proof

from orchestrator.driver.clock import SystemClock
from orchestrator.driver.held_lease import HeldLease
from orchestrator.driver.runner import Result, Runner
from orchestrator.effects import watched_by
from orchestrator.errors import Refused, StoreConflict, Unreachable
from orchestrator.ledger.lease import LeaseHandle
from orchestrator.stores.folder import FolderStore

BEYOND = 25
"""A launch of two stages, of which one loses an attempt, has more effects than this."""


def befallen(rig: Rig, fate: Fate) -> Result | None:
    """Launch with a driver that meets this fate; None: it did not come to its end."""
    with watched_by(fate):
        try:
            return rig.runner(PAIR).run()
        except (Crash, Unreachable):
            return None


def check_any_effect(folder: Path, fates: Sequence[tuple[When, bool]]) -> int:
    """Enumerates every effect of a launch whose second stage also loses an attempt. They meet these fates in turn. Returns how many.

    A fate: when the driver dies, or `lost`, and whether its attempts live on.
    """
    at, digests = 0, None
    while True:
        at += 1
        when, attempts_live_on = fates[at % len(fates)]
        store, clock = FolderStore(folder / f"{at}/store"), Clock()
        rig = Rig(store, clock, MemoryBackend(store, clock, folder / f"{at}/work"))
        rig.backend.scripts["two", 1] = [("publish", 10), ("vanish",)]
        fate = Fate(at, when)
        result = befallen(rig, fate)
        if result is None:
            for body in rig.backend.bodies.values():
                if body.life.state == "running" and not attempts_live_on:
                    rig.backend._die(body, None)
            clock.time += 60  # the lease of this very process would otherwise be seen alive
            result = rig.launch(PAIR)
        assert result.status == "succeeded", (at, result)
        found = [stage.weights_digest for stage in result.stages]
        digests = digests or found
        assert found == digests
        assert len(rig.kinds("committed")) == 2, (at, rig.kinds("committed"))
        assert len(set(rig.backend.submitted)) == len(rig.backend.submitted), (at, "an attempt was started twice")
        for stage, inputs_digest in rig.ledger.stages():
            numbers = rig.ledger.attempts(stage, inputs_digest)
            assert all(rig.ledger.outcome(stage, inputs_digest, number) for number in numbers), (at, stage)
            assert numbers == list(range(1, len(numbers) + 1))
        if not fate.reached:
            break
    assert at > BEYOND
    return at - 1


ANY: Sequence[tuple[When, bool]] = [("before", False), ("after", True), ("lost", True), ("before", True), ("after", False)]


@pytest.mark.long
def test_whatever_befalls_a_driver_at_any_effect_the_launch_comes_to_the_same_end(tmp_path: Path) -> None:
    check_any_effect(tmp_path, ANY)


@pytest.mark.prove("effects")
@pytest.mark.parametrize("fate", ANY, ids=[f"{when}-{'cluster' if live_on else 'local'}" for when, live_on in ANY])
def test_effects_of_a_driver_each_with_each_fate(tmp_path: Path, fate: tuple[When, bool], proof: Proof) -> None:
    proof.count(check_any_effect(tmp_path, [fate]), note=f"driver in memory, {fate[0]}")


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


def test_a_driver_whose_store_was_removed_stops_and_says_so(rig: Rig) -> None:
    def remove() -> None:
        shutil.rmtree(rig.store.root)
        rig.clock.time += 6  # a third of the lease's life is over

    rig.backend.scripts["one", 1] = [("do", remove), *whole()]
    with pytest.raises(Refused, match=r"demo: (the store .* is gone, or empty|its lease is gone: .*); nobody else has taken over"):
        rig.launch()
    assert len(rig.backend.submitted) == 1


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
    assert [rig.ledger.outcome("one", inputs_digest, 1) is not None for inputs_digest in rig.ledger.inputs_of("one")] == [True, True]
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
    with HeldLease(cast(LeaseHandle, handle), SystemClock(), 0.03, "demo"):
        deadline = time.monotonic() + 30
        while not handle.renewed and time.monotonic() < deadline:
            time.sleep(0.01)
    assert handle.renewed and not handle.faults
    said = [record.getMessage() for record in caplog.records if record.name == "orchestrator.driver.held_lease"]
    assert all(any(type(fault).__name__ in one or str(fault) in one for one in said) for fault in faults), said
    assert len(said) == len(set(said)), f"each is said once: {said}"
