"""Pipelines with pools, and stages that shrink, for tests of the driver: who counts nodes is the test, and a driver dies at any effect."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver_rig import Clock, MemoryBackend, Rig, Script, pipeline
from effect_fates import Crash, Fate, When

from orchestrator.effects import watched_by
from orchestrator.errors import Refused, Unreachable
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores.folder import FolderStore

FATES: Sequence[tuple[When, bool]] = [("before", False), ("after", True), ("lost", True)]
"""What befalls a driver at an effect, and whether the next one comes a minute later, or as soon as the lease is over."""
FULL = "0/9 nodes are available"
PRICES = {"reserved": "1.00", "on-demand": "2.50", "spot": "0.70"}


def profile(**changes: Any) -> ClusterProfile:
    pools = [
        {
            "name": name,
            "region": f"{name}-region",
            "node_selector": {"pool": name},
            "price": {"usd_per_hour": usd, "source": "the contract", "date": "2026-11-01"},
            "wait_minutes": 2,
        }
        for name, usd in PRICES.items()
    ]
    content = {
        "name": "test", "image": "t", "driver_image": "d", "allow_unpinned": ("t", "d"), "device": "cpu-core", "cpu": "1", "memory": "1Gi",
        "shm": "64Mi", "start_deadline_s": 60, "pools": pools,
    }  # fmt: skip
    return ClusterProfile.model_validate(content | changes)


def in_pools(*pools: str, resources: dict[str, Any] | None = None, stages: int = 1, **changes: Any) -> Pipeline:
    """A pipeline whose stages name these pools; none: the profile's order."""
    of = pipeline(*[("one", None), ("two", "one")][:stages])
    update = {"pools": pools, "resources": of.stages[0].spec.resources.model_validate({"device": "cpu-core"} | (resources or {}))}
    made = tuple(stage.model_copy(update={"spec": stage.spec.model_copy(update=update)}) for stage in of.stages)
    return of.model_copy(update={"backend": "kubernetes", "cluster": profile(**changes), "stages": made})


def waiting(rounds: int = 5000) -> Script:
    return [("queued", FULL), *[("step",)] * rounds]


def found(rig: Rig, stage: str = "one") -> list[tuple[str | None, str, int]]:
    """(pool, class of the end, nodes) of each attempt."""
    (inputs_digest,) = rig.ledger.inputs_of(stage)
    rows = []
    for number in rig.ledger.attempts(stage, inputs_digest):
        intent = rig.ledger.intent(stage, inputs_digest, number)
        outcome = rig.ledger.outcome(stage, inputs_digest, number)
        placement = rig.ledger.placement(stage, inputs_digest, number)
        if intent is not None:
            rows.append((placement.pool if placement else None, outcome.class_ if outcome else "open", intent.nodes))
    return rows


def crash() -> None:
    raise Crash


@dataclass
class Counter:
    """`ports.NodeCounter`: the test says how many nodes there are."""

    nodes: dict[str | None, int] = field(default_factory=dict)
    forbidden: bool = False
    asked: int = 0

    def count(self, pool: str | None, devices_per_node: int) -> int:
        self.asked += 1
        if self.forbidden:
            raise Refused("the driver's account may not list nodes")
        return self.nodes.get(pool, 8)


def check_any_effect(folder: Path, of: Pipeline, script: Any, fates: Sequence[tuple[When, bool]], expected: Any) -> int:
    """Enumerates every effect of a launch; a driver meets its fate there, and the next one comes to the same end. Returns how many."""
    at = 0
    while True:
        at += 1
        when, late = fates[at % len(fates)]
        store, clock = FolderStore(folder / f"{at}/store"), Clock()
        rig = Rig(store, clock, MemoryBackend(store, clock, folder / f"{at}/work"), Counter())
        script(rig)
        fate = Fate(at, when)
        result = None
        # Refused: the answer to the renewal of its lease was lost.
        with watched_by(fate), contextlib.suppress(Crash, Unreachable, Refused):
            result = rig.runner(of).run()
        if result is None:
            clock.time += 60 if late else 16
            result = rig.launch(of)
        assert result.status == "succeeded", (at, result)
        assert [stage.attempts for stage in result.stages] and expected(found(rig)), (at, found(rig))
        assert len(set(rig.backend.submitted)) == len(rig.backend.submitted), (at, "an attempt was started twice")
        if not fate.reached:
            return at - 1


class ByPool(dict[tuple[str, int], Script]):
    """Scripts by pool, whatever number an attempt has."""

    def __init__(self, rig: Rig, **scripts: Script) -> None:
        self.rig, self.scripts = rig, scripts

    def get(self, key: tuple[str, int], default: Any = None) -> Script:
        stage, number = key
        (inputs_digest,) = self.rig.ledger.inputs_of(stage)
        placement = self.rig.ledger.placement(stage, inputs_digest, number)
        assert placement is not None and placement.pool is not None
        return self.scripts[placement.pool]
