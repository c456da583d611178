"""Pods of an Indexed Job in a test's own process: each with a run directory of its own, over the steps of tests/prepare_steps.py."""

from __future__ import annotations

import dataclasses
import os
import sys
from decimal import Decimal

import prepare_steps
from prepare_bench import Bench

from opensora.dataset.prepare_config import Given
from orchestrator.ledger.records import Price
from orchestrator.prepare.records import Keys, PodHeld
from orchestrator.prepare.run import Asked, Preparation
from orchestrator.prepare.shard_worker import ShardWorker
from orchestrator.prepare.shards import Place, Shards

KEYS = Keys("mine")
PODS = 2
PRICE = Price(usd_per_hour=Decimal("3.6"), is_gpu=False, basis="assumption", source="a test", date="2026-11-30")


def calls(bench: Bench) -> list[str]:
    lines = (bench.folder / "calls.txt").read_text().splitlines()
    return sorted(line for line in lines if line.split()[0] not in ("filter", "publish"))


def asked(bench: Bench, run_dir: str, shard: int | None, job: str = "one") -> Asked:
    """Of a pod of its own: nothing of the others' run directories is there."""
    given = bench.asked(run_dir=run_dir, sources=[Given(path=str(bench.videos))], caption={"kind": "digits"}, limits={"deadline_s": 30})
    place = Place(job, shard, PODS) if shard is not None else None
    command = (sys.executable, prepare_steps.__file__, "{run_dir}")
    env = dict(given.env) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    own = dataclasses.replace(given, command=command, env=env, place=place, price=PRICE, where="prepare-mine-1" if place else "")
    if place is None:
        return own

    def watch(now: float) -> list[PodHeld]:
        return [PodHeld(name=run_dir, group="job", cores=2, bound=now - 100, seen=now)]

    return dataclasses.replace(own, pods=watch if shard else Shards(bench.store, KEYS, place).with_others(watch))


def worker(bench: Bench, shard: int, run_dir: str = "", job: str = "one") -> ShardWorker:
    given = asked(bench, run_dir or f"pod-{shard}", shard, job)
    assert given.place is not None
    return ShardWorker(given, given.place, f"pod-{shard}", bench.said.append)


def launcher(bench: Bench, run_dir: str = "pod-0", job: str = "one") -> Preparation:
    return Preparation(asked(bench, run_dir, 0, job), say=bench.said.append, clock=bench.clock)
