"""What a driver knows of the nodes for stages that may go on with fewer of them (`resources.min_nodes`).

Owns when nodes are counted, what the ledger's events say of earlier counts, and on which fewer nodes a stage fits. Refuses to decide
anything (`placing` does), and to count while nothing depends on it: a stage that trains on all its nodes costs no request.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from opensora.config import StageConfig
from orchestrator.accounting import plan
from orchestrator.driver import placing
from orchestrator.driver.facts import Room, Size, StageView
from orchestrator.driver.launch import Launch
from orchestrator.errors import Refused, Unreachable, UsageError
from orchestrator.ports import NodeCounter
from orchestrator.recipe.pipeline import Stage
from orchestrator.recipe.prices import Prices

log = logging.getLogger(__name__)


class NodesSeen:
    def __init__(self, launch: Launch, counter: NodeCounter | None, prices: Prices) -> None:
        """
        Args:
            counter: None: this backend has no nodes to count, so no stage goes on with fewer.
            prices: of the devices, whose memory a stage on fewer nodes must fit.
        """
        self._launch, self._counter, self._prices = launch, counter, prices
        self._counts: dict[tuple[str, str | None], tuple[float, int | None, str]] = {}
        """By (stage, pool): when they were counted (elapsed seconds), how many there were, and why they cannot be counted."""
        self._sizes: dict[tuple[str, str | None], tuple[Size, ...]] = {}

    def seen(self, stage: Stage, view: StageView, wanted: bool) -> StageView:
        """The view of a stage, with the nodes of the pool where its attempt is, or comes."""
        if stage.spec.resources.min_nodes is None or self._counter is None or not wanted or view.committed or view.inputs_digest is None:
            return view
        pool = placing.current_pool(self._launch.pipeline.pools_of(stage), view.attempts)
        known = self._launch.rooms.get((stage.name, pool), Room(pool, None))
        alive = [attempt for attempt in view.attempts if attempt.alive]
        if alive and all(not one.life.waits and one.nodes == stage.spec.resources.nodes for one in alive):
            return view
        nodes, blind = self._count(stage, pool)
        room = replace(known, nodes=nodes, blind=blind)
        short = nodes is not None and nodes < stage.spec.resources.nodes
        return replace(view, room=room, sizes=self._sizes_of(stage, pool) if short else ())

    def remember(self, stage: str, detail: str, time: float) -> None:
        """Take up what an event about a stage says of a pool's nodes; one that says nothing of them is passed over."""
        found = placing.COUNTED.fullmatch(detail)
        if found is not None:
            pool, nodes, asked = found[1], int(found[2]), int(found[3])
            self._launch.rooms[stage, pool] = placing.counted(self._launch.rooms.get((stage, pool)), pool, nodes, asked, time)

    def _count(self, stage: Stage, pool: str | None) -> tuple[int | None, str]:
        assert self._counter is not None
        now = self._launch.clock.elapsed()
        when, nodes, blind = self._counts.get((stage.name, pool), (-math.inf, None, ""))
        if now - when < placing.COUNT_EVERY_S:
            return nodes, blind
        try:
            nodes, blind = self._counter.count(pool, stage.spec.resources.devices_per_node), ""
        except Refused as error:
            nodes, blind = None, f"its nodes cannot be counted: {error}"
        except Unreachable as error:
            log.info("nodes of %s are not counted now: %s", pool or "the cluster", error)
            nodes = None
        self._counts[stage.name, pool] = now, nodes, blind
        return nodes, blind

    def _sizes_of(self, stage: Stage, pool: str | None) -> tuple[Size, ...]:
        if (stage.name, pool) not in self._sizes:
            self._sizes[stage.name, pool] = placing.sizes(stage, self._unfit(stage, pool))
        return self._sizes[stage.name, pool]

    def _unfit(self, stage: Stage, pool: str | None) -> Callable[[StageConfig, int], str]:
        """Says why a stage does not fit the memory of so many devices; empty: it fits, or the memory is not known."""
        device = self._prices.devices.get(self._launch.pipeline.device_of(stage, pool))

        def unfit(config: StageConfig, devices: int) -> str:
            if device is None:
                return ""
            try:
                fit = plan.fit(config, devices, device)
            except UsageError as error:
                return str(error)
            if fit.fits is not False or fit.device_bytes is None:
                return ""
            needs, has = fit.memory.total / 1e9, fit.device_bytes / 1e9
            return f"{stage.name} needs {needs:.1f} GB of each of {devices} devices, which have {has:.1f} GB"

        return unfit
