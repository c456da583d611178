"""Pods of a cluster in the books of a preparation: what was seen of them outlives whoever watched them, and is billed once."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import pytest
from prepare_bench import Bench, LateClock

from orchestrator.errors import Unreachable
from orchestrator.ledger.lease import TTL_S
from orchestrator.ledger.records import Price
from orchestrator.ledger.store import Ledger
from orchestrator.pipelines.prepare_pod import held_by, own_pod
from orchestrator.prepare import attempts, pods, run
from orchestrator.prepare.bill import BETWEEN, bill
from orchestrator.prepare.records import Intent, Keys, PodHeld
from orchestrator.prepare.run import Preparation
from orchestrator.prepare.watching import look

KEYS = Keys("mine")
PRICE = Price(usd_per_hour=Decimal("3.6"), is_gpu=False, basis="assumption", source="a test", date="2026-11-30")


def pod(name: str, bound: float, seen: float, cores: float = 2, gpus: int = 0) -> PodHeld:
    return PodHeld(name=name, group="cpu", cores=cores, gpus=gpus, bound=bound, seen=seen)


def on_pods(bench: Bench, watch: pods.Watch, *words: str) -> Preparation:
    preparation = bench.preparation(*words)
    preparation.asked = dataclasses.replace(preparation.asked, where="prepare-mine-1", pods=watch, price=PRICE)
    return preparation


def test_a_pod_that_went_keeps_what_it_held_until_it_was_seen_last(bench: Bench) -> None:
    seen = [[pod("a", 100, 110), pod("b", 100, 110)], [pod("a", 100, 130)]]
    book = pods.PodsObject(bench.store, KEYS.pods(1), lambda now: seen.pop(0), bench.clock)
    book.look()
    book.look()
    assert {one.name: one.core_seconds for one in pods.held(bench.store, KEYS, 1)} == {"a": 60, "b": 20}
    book.look_sometimes()  # not so soon again: nothing is left to be seen


def test_what_was_seen_is_there_after_whoever_watched_it_died(bench: Bench) -> None:
    """The head of a RayJob dies with the launcher in it; the workers were held all the same."""
    intent = Intent(
        name="mine", attempt=1, epoch=1, created=time.time(), config={}, stages=(), workers=2, device="cpu-core", price=PRICE,
        where="prepare-mine-1", code="",
    )  # fmt: skip
    lost = Ledger(bench.store, KEYS.folder).acquire(time.time())
    bench.store.create(KEYS.intent(1), intent.encode())
    pods.PodsObject(bench.store, KEYS.pods(1), lambda now: [pod("head", 0, 100), pod("worker", 50, 100)], bench.clock).look()
    lost.lost = True
    bench.clock = LateClock(2 * TTL_S)
    bench.run()
    first = attempts.all_of(bench.store, KEYS)[0]
    assert first.outcome is not None and (first.outcome.class_, first.outcome.device_seconds) == ("lost", 300)
    assert bill([first]).usd == Decimal("0.3")


def test_the_bill_is_of_all_that_pods_were_held_and_says_what_no_step_had(bench: Bench) -> None:
    began = time.time() - 30

    def watch(now: float) -> Sequence[PodHeld]:
        return [pod("head", began, now, cores=1), pod("worker", began, now, cores=4, gpus=1)]

    on_pods(bench, watch, "--gpu", "H800").run()
    state = look(bench.store, "mine", bench.folder / "elsewhere")
    (attempt,) = state.attempts
    held = sum(one.core_seconds for one in attempt.pods)
    assert held >= 5 * 30 and sum(line.seconds for line in state.bill.lines if not line.is_gpu) == pytest.approx(held)
    (between,) = (line.seconds for line in state.bill.lines if line.step == BETWEEN and not line.is_gpu)
    assert between == pytest.approx(held - 0.01), "the stand-in's step says that it held 0.01 core-seconds"
    gpu = [line for line in state.bill.lines if line.is_gpu]
    assert sum(line.seconds for line in gpu) == pytest.approx(sum(one.gpu_seconds for one in attempt.pods)), "4 s of it in a step"


def test_a_cluster_that_does_not_answer_holds_nothing_up(bench: Bench) -> None:
    def away(now: float) -> Sequence[PodHeld]:
        raise Unreachable("the API server: nobody answers")

    assert on_pods(bench, away).run().published is not None


def test_a_cancel_in_the_store_stops_it_as_a_signal_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CANCEL_POLL_S", 0.05)
    preparation = bench.preparation("--slow", "0.3")
    ledger = Ledger(bench.store, KEYS.folder)
    asked: list[bool] = []
    preparation.on_progress = lambda status: asked or asked.append(ledger.ask_cancel(time.time(), "by a test"))
    prepared = preparation.run()
    assert asked == [True] and prepared.published is None and preparation.cancelled
    assert [one.outcome.class_ for one in attempts.all_of(bench.store, KEYS) if one.outcome is not None] == ["drained"]
    assert bench.run().published is not None, "and goes on"


def test_a_pod_is_held_since_kubelet_has_got_it(tmp_path: Path) -> None:
    (tmp_path / "uid").write_text("1")
    os.utime(tmp_path / "uid", (1000.0, 1000.0))
    env = {"OSCTL_POD_CORES": "500m", "OSCTL_POD_GPUS": "2", "OSCTL_POD_NAME": "prepare-mine-0a-1-x7k2p"}
    (one,) = own_pod(env, tmp_path)(1010.0)
    assert (one.core_seconds, one.gpu_seconds, one.name) == (5.0, 20.0, "prepare-mine-0a-1-x7k2p")


def test_a_pod_is_held_from_its_binding_until_it_has_ended() -> None:
    """As the API server shows it to the head of Ray."""
    bound = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-30T18:00:00Z"}
    requests = {"cpu": "500m", "nvidia.com/gpu": "2"}
    pod = {
        "metadata": {"name": "worker", "labels": {"ray.io/node-type": "worker", "ray.io/group": "gpu"}},
        "spec": {"containers": [{"resources": {"requests": requests}}]},
        "status": {"phase": "Running", "conditions": [bound]},
    }
    now = 1796061600.0 + 20
    one = held_by(pod, now)
    assert one is not None and (one.group, one.core_seconds, one.gpu_seconds) == ("gpu", 10.0, 40.0)
    assert held_by({**pod, "status": {"phase": "Pending", "conditions": []}}, now) is None, "it waits for a node, at no cost"
    assert held_by({**pod, "status": {"phase": "Failed", "conditions": [bound]}}, now) is None
