"""Pods of an Indexed Job: each works on its shard, one merges. Processes of the real engine, with the steps of tests/prepare_steps.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import prepare_steps
import pytest
from prepare_bench import Bench
from shard_pods import KEYS, PODS, asked, calls, launcher, worker

from orchestrator.ledger.store import Ledger
from orchestrator.pipelines.prepare_in_cluster import cancel
from orchestrator.prepare import attempts
from orchestrator.prepare.records import ShardDone
from orchestrator.prepare.run import Preparation, Prepared
from orchestrator.prepare.shards import Place, Shards


@pytest.fixture
def films(bench: Bench) -> Bench:
    for path in bench.videos.iterdir():
        path.unlink()
    for number in range(9):
        prepare_steps.write_video(bench.videos, f"v{number}", (0, 10, 1.0, f"a ball {number}"), (10, 30, 2.0, "a cube"))
    prepare_steps.write_video(bench.videos, "crash", (0, 10, 1.0, "a ball"), first="crash")
    (bench.folder / "calls.txt").touch()
    return bench


def digest(prepared: Prepared) -> str:
    assert prepared.published is not None
    return prepared.published.description.digest


def test_pods_make_what_one_makes_each_source_once_and_all_are_billed(films: Bench, tmp_path: Path) -> None:
    elsewhere = Bench(tmp_path, type(films.store)(tmp_path / "other"), films.videos)
    whole = Preparation(asked(elsewhere, "whole", None), clock=films.clock).run()
    once = calls(films)
    (films.folder / "calls.txt").write_text("")

    others = threading.Thread(target=worker(films, 1).run)
    others.start()
    merged = launcher(films).run()
    others.join()
    assert merged.published is not None and digest(merged) == digest(whole) and calls(films) == once, (
        "a row that crashed is tried once, too"
    )
    (attempt,) = attempts.all_of(films.store, KEYS)
    assert {pod.name for pod in attempt.pods} == {"pod-0", "pod-1"}
    captions = 0.01 * merged.published.description.clips
    assert float(merged.usd) == pytest.approx(captions + 0.001 * sum(pod.core_seconds for pod in attempt.pods), rel=0.01)

    again = worker(films, 1, "another-pod")
    assert again.run() and "is done already" in films.said[-1] and calls(films) == once
    assert not Shards(films.store, KEYS, Place("one", 1, PODS)).commit(ShardDone(shard=1, of=PODS, pod="late", ended=0.0))


def test_a_pod_that_was_asked_to_leave_is_followed_by_one_that_does_the_rest_and_a_new_job_does_nothing_twice(films: Bench) -> None:
    (films.folder / "slow.txt").write_text("0.3")
    first = worker(films, 1)
    threading.Thread(target=lambda: (until(lambda: "frames" in (films.folder / "calls.txt").read_text()), first.drain())).start()
    assert not first.run()
    assert Shards(films.store, KEYS, Place("one", 0, PODS)).missing() == [0, 1]
    (films.folder / "slow.txt").write_text("0")
    before = done(films)
    assert worker(films, 1, "second").run()
    assert len(done(films)) == len(set(done(films))) > len(before)

    all_ = done(films)
    assert worker(films, 1, "third", "two").run() and done(films) == all_
    shards = Shards(films.store, KEYS, Place("two", 0, PODS))
    assert shards.missing() == [0]
    shards.forget_others()
    assert all("/shards/two/" in key for key in films.store.list(f"{KEYS.folder}/shards/"))


def done(bench: Bench) -> list[str]:
    """Calls about rows that can be worked on: another pod tries the others again."""
    return [call for call in calls(bench) if not call.endswith(" crash")]


def test_who_waits_for_shards_is_stopped_by_a_cancel(films: Bench) -> None:
    preparation = launcher(films)
    found: list[Prepared] = []
    thread = threading.Thread(target=lambda: found.append(preparation.run()))
    thread.start()
    until(lambda: any("1 of 2 shards are done" in said for said in films.said))
    assert "was asked to save" in cancel(films.store, "mine", None, now=False)
    thread.join(60)
    assert found and found[0].published is None and preparation.cancelled
    (attempt,) = attempts.all_of(films.store, KEYS)
    assert attempt.outcome is not None and attempt.outcome.class_ == "drained"
    assert Ledger(films.store, KEYS.folder).lenient().holder(time.time()) is None


def until(there: object, patience_s: float = 60.0) -> None:
    assert callable(there)
    end = time.monotonic() + patience_s
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)
