"""Of events the cache keeps those about our jobs alone, and of those a bounded number."""

from __future__ import annotations

import gc
import time
from typing import Any

from kube_objects import JOB, event, job

from orchestrator.kube import watch_cache
from orchestrator.kube.observed import Notice
from orchestrator.kube.watch_cache import WatchCache

MANY = 20_000


def kept() -> list[Notice]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, Notice)]


def foreign(number: int) -> dict[str, Any]:
    return event(f"web-{number}", kind="Pod") if number % 3 else event(f"team-{number}", kind=("Deployment", "PyTorchJob")[number % 2])


def test_events_of_others_are_not_kept() -> None:
    cache = WatchCache(time.time)
    cache.on_update("pytorchjobs", job())
    for number in range(MANY):
        cache.on_update("events", foreign(number))
        cache.on_update("events", event(f"other-worker-{number}"))
    assert kept() == []


def test_events_about_our_job_that_come_before_it_are_kept_and_others_pass() -> None:
    cache = WatchCache(time.time)
    cache.on_update("events", event(JOB, "FailedCreatePod", kind="PyTorchJob"))
    cache.on_update("events", event(f"{JOB}-worker-1"))
    for number in range(MANY):
        cache.on_update("events", foreign(number))
    assert len(kept()) == 2
    cache.on_update("pytorchjobs", job())
    assert {note.about for note in cache.notices(JOB)} == {JOB, f"{JOB}-worker-1"}
    cache.forget(JOB, "r")
    assert kept() == []


def test_events_of_jobs_like_ours_that_are_never_seen_take_a_bounded_room() -> None:
    cache = WatchCache(time.time)
    for number in range(MANY):
        cache.on_update("events", event(f"demo-one-a{number}-{number:08x}", kind="PyTorchJob"))
        cache.on_update("events", event(f"demo-one-a1-00000001-worker-{number}"))
        cache.on_update("events", event("demo-one-a1-00000002-worker-0", reason=f"R{number}"))
    assert len(kept()) <= watch_cache.EARLY_JOBS + watch_cache.EARLY_PODS + watch_cache.NOTICES_OF_ONE


def test_a_noisy_job_of_ours_keeps_the_newest_words_of_each_pod() -> None:
    cache = WatchCache(time.time)
    cache.on_update("pytorchjobs", job(pods=8))
    for number in range(MANY):
        cache.on_update("events", event(f"{JOB}-worker-{number % 64}", f"Reason{number}", message="x" * 10_000))
    found = cache.notices(JOB)
    assert len(kept()) == len(found) == 8 * watch_cache.NOTICES_OF_ONE
    assert f"Reason{MANY - MANY % 64 - 57}" in {note.reason for note in found}, "the newest"
    assert sum(len(note.message) for note in found) < 100_000
