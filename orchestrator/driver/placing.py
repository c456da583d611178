"""Where an attempt is made: in which pool of the cluster, and on how many nodes. Pure.

Owns the order of pools, when an attempt that waits is made elsewhere instead, when a stage goes on with fewer nodes, and when with all
again.
Refuses to count nodes (a `ports.NodeCounter` does) and to end an attempt (`decide` says so, `act` does it).

Every new attempt begins at the first pool, which is the one that a person prefers; only an attempt that has waited too long is made in the
next one. So a stage that lost spot nodes asks for the reserved ones again. To stay where it was would keep a stage for good at the price of
the one time when the better pool was full.

Times are counted from what is in the ledger (when an attempt was made, when an event first said that nodes are missing): a driver that
takes over goes on counting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opensora.config import StageConfig
from opensora.identity import global_batches
from orchestrator.driver.facts import AttemptView, Room, Size, StageView
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Stage

MOVES_ON, RESIZES = "moves on to pool ", "moves to another number of nodes: "
"""How events begin that are written before an attempt is asked to leave for one of these reasons."""
NEVER_STARTED = "its driver ended before it was started"
"""Reason of the end of an attempt that was intended, and nothing more."""
NO_POOL = "the ledger does not say in which pool it is"
"""Of an attempt that was made before the profile had pools, or whose placement.json was removed or cannot be read."""
COUNT_EVERY_S = 15.0
"""Seconds between two counts of nodes, while a stage that may shrink waits or has shrunk. Each is one request for the pool's nodes."""
COUNTED = re.compile(r"(?:pool (\S+)|the cluster) has (\d+) of (\d+) nodes")


@dataclass(frozen=True)
class NodeSet:
    """A number of nodes of a pool, on which an attempt is made."""

    pool: str | None
    """None: the profile has no pools."""
    nodes: int
    accumulate: int
    """Parts of a step, so that the global batch is the stage's."""
    why: str = ""
    """Why it is not in the first pool, or not on all nodes; empty: it is."""


@dataclass(frozen=True)
class Change:
    """An attempt is to be made anew elsewhere."""

    why: str
    pool: str | None
    """The next pool; None: the same pool, with another number of nodes."""
    save: bool
    """Whether it trains, so that it must save first."""


def choose(stage: Stage, order: Sequence[str], view: StageView, now: float) -> NodeSet:
    """Where the next attempt of a stage is made. `order`: its pools, the preferred one first."""
    pool, why = next_pool(order, view.attempts)
    size = wanted_size(stage, view, pool, now)
    return NodeSet(pool, size.nodes, size.accumulate, "; ".join(filter(None, (why, _fewer(stage, view, size)))))


def next_pool(order: Sequence[str], attempts: Sequence[AttemptView]) -> tuple[str | None, str]:
    """(pool of the next attempt, why it is not the first of the order).

    An attempt whose driver was killed before it started it does not count: the next is made where that one was to be made.
    """
    closed = [attempt for attempt in attempts if attempt.outcome is not None]
    if not order:
        return None, ""
    pool, why = order[0], ""
    if closed:
        last = closed[-1]
        assert last.outcome is not None
        unused = last.outcome.class_ == "lost" and last.outcome.reason == NEVER_STARTED
        if last.outcome.class_ == "moved" and last.outcome.next_pool is not None:
            pool, why = last.outcome.next_pool, f"attempt {last.number} {last.outcome.reason}"
        elif (last.outcome.class_ == "moved" or unused) and last.placement is not None and last.placement.pool is not None:
            pool, why = last.placement.pool, last.placement.why
    return (pool, why if pool != order[0] else "") if pool in order else (order[0], "")


def current_pool(order: Sequence[str], attempts: Sequence[AttemptView]) -> str | None:
    """The pool in which a stage's attempt lives, or in which the next one is made."""
    for attempt in attempts:
        if attempt.outcome is None and not attempt.never_started and attempt.placement is not None:
            return attempt.placement.pool
    return next_pool(order, attempts)[0]


def wanted_size(stage: Stage, view: StageView, pool: str | None, now: float) -> Size:
    """On how many nodes an attempt in this pool should run: all, unless the pool has had too few for the time that the stage says."""
    whole = Size(stage.spec.resources.nodes, stage.config.accumulate)
    due = short_until(stage, view, pool)
    if due is None or now < due:
        return whole
    assert view.room is not None and view.room.nodes is not None
    there = [size for size in view.sizes if size.nodes <= view.room.nodes and not size.unfit]
    return max(there, key=lambda size: size.nodes, default=whole)


def short_until(stage: Stage, view: StageView, pool: str | None) -> float | None:
    """Unix time at which the stage goes on with fewer nodes of this pool. None: it has enough of them, or it is not known, or none may be
    left out."""
    room, resources = view.room, stage.spec.resources
    if resources.min_nodes is None or room is None or room.pool != pool or room.nodes is None or room.short_since is None:
        return None
    return room.short_since + 60 * resources.shrink_after_minutes if room.nodes < resources.nodes else None


def change(stage: Stage, cluster: ClusterProfile, order: Sequence[str], view: StageView, attempt: AttemptView, now: float) -> Change | None:
    """Why a live attempt is to be made anew elsewhere. None: it stays."""
    pool = attempt.placement.pool if attempt.placement is not None else None
    waits = waits_for_nodes(attempt)
    if waits and order and pool not in order:
        named = f"pool {pool} is not among this stage's pools any more" if pool is not None else NO_POOL
        return Change(f"{named}: {attempt.life.waits}", order[0], save=False)
    if order and attempt.placement is None:  # it trains; how many nodes its pool has cannot be asked
        return None
    if waits and (due := waits_until(cluster, order, attempt)) is not None and now >= due:
        following = order[order.index(pool or "") + 1]
        minutes = cluster.pool(pool or "").wait_minutes
        return Change(f"waited {minutes:g} min for nodes of pool {pool}: {attempt.life.waits}", following, save=False)
    size = wanted_size(stage, view, pool, now)
    trains = attempt.life.bound is not None and not attempt.life.waits
    if size.nodes == attempt.nodes or not (waits or (trains and attempt.progressed and size.nodes > attempt.nodes)):
        return None
    if size.nodes > attempt.nodes:
        return Change(f"{_whose(pool)} has nodes for {size.nodes} again, it was made for {attempt.nodes}", None, save=trains)
    return Change(_fewer(stage, view, size), None, save=False)


def waits_for_nodes(attempt: AttemptView) -> bool:
    """Whether an attempt has not begun because nodes are missing. Where a scheduler without gangs has bound a part of them, others are."""
    return attempt.life.waits_for == "capacity" or attempt.life.waits_on == "gang"


def waits_until(cluster: ClusterProfile, order: Sequence[str], attempt: AttemptView) -> float | None:
    """Unix time until which an attempt may wait for nodes of its pool. None: without end, since there is no next pool."""
    pool = attempt.placement.pool if attempt.placement is not None else None
    if pool is None or pool not in order[:-1]:
        return None
    return attempt.made + 60 * cluster.pool(pool).wait_minutes


# --- Nodes -----------------------------------------------------------------------------------------------------------------------------


def sizes(stage: Stage, unfit: Callable[[StageConfig, int], str]) -> tuple[Size, ...]:
    """Numbers of nodes below all, ascending, on which the stage has the same global batch with whole parts of a step.

    The batch of a rank stays, since it is known to fit; only the number of parts of a step grows: 8 nodes of 8 devices at global batch 512
    are 4 nodes with 2 parts, and 7, 6 or 5 nodes do not divide it.

    Args:
        unfit: (configuration, devices) to why it does not fit the devices' memory; empty: it fits, or it is not known.
    """
    asked, config = stage.spec.resources, stage.config
    found = []
    for nodes in range(asked.min_nodes or asked.nodes, asked.nodes):
        devices = nodes * asked.devices_per_node
        readers, rest = divmod(devices, config.parallel.ranks_per_clip)
        parts, left = divmod(stage.devices // config.parallel.ranks_per_clip * config.accumulate, readers or 1)
        if rest or not readers or left:
            continue
        fewer = config.model_copy(update={"accumulate": parts})
        assert global_batches(fewer, devices) == global_batches(config, stage.devices), f"{stage.name} on {nodes} nodes"
        found.append(Size(nodes, parts, unfit(fewer, devices)))
    return tuple(found)


def obstacles(stage: Stage, view: StageView) -> list[str]:
    """Why a stage whose pool has too few nodes cannot go on with fewer, for people."""
    room = view.room
    if room is None:
        return []
    if room.blind:
        return [room.blind]
    if room.nodes is None or room.short_since is None:
        return []
    there = [size for size in view.sizes if size.nodes <= room.nodes]
    if any(not size.unfit for size in there):
        return []
    least = stage.spec.resources.min_nodes or 0
    if room.nodes < least:
        return [f"{_whose(room.pool)} has {room.nodes}, and min_nodes is {least}"]
    return [there[-1].unfit] if there else [f"the global batch does not divide over {least} to {room.nodes} nodes"]


def counted(room: Room | None, pool: str | None, nodes: int, asked: int, time: float) -> Room:
    """What is known of a pool after a count was written down at Unix time `time`."""
    since = room.short_since if room is not None and room.pool == pool else None
    return Room(pool, nodes, nodes, (since if since is not None else time) if nodes < asked else None)


def count_text(room: Room, asked: int) -> str:
    """What is written down of a count. Empty: nothing is, since the ledger says it already, or nobody has ever missed a node."""
    if room.nodes is None:
        return ""
    there = min(room.nodes, asked)
    if there == (room.said if room.said is not None else asked):
        return ""
    return f"{_whose(room.pool)} has {there} of {asked} nodes"


def _whose(pool: str | None) -> str:
    return f"pool {pool}" if pool is not None else "the cluster"


def _fewer(stage: Stage, view: StageView, size: Size) -> str:
    """Why an attempt has fewer nodes than asked for, in words; empty: it has all."""
    asked = stage.spec.resources
    if size.nodes == asked.nodes or view.room is None:
        return ""
    had = f"{_whose(view.room.pool)} has had fewer than {asked.nodes} nodes for {asked.shrink_after_minutes:g} min, now {view.room.nodes}"
    return f"{had}: goes on with {size.nodes} at the same global batch"
