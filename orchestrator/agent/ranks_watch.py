"""What heartbeats tell of a node's ranks: whether they hang, which of them hold the others up, whether rank 0 is where it must be.

Owns the time since which nothing changed, by this process's clock alone. Refuses to end anything.
"""

from __future__ import annotations

import time

from orchestrator.agent.ending import Ending
from orchestrator.agent.run_directory import Heartbeat
from orchestrator.agent.trainer_process import JOIN_S
from orchestrator.ledger.records import Intent


class RanksWatch:
    def __init__(self, intent: Intent, node: int) -> None:
        self._intent, self._node = intent, node
        self._beats: list[Heartbeat] = []
        self._heard = time.monotonic()
        """When a heartbeat was last seen to change. Not by the heartbeats' own clock, which may be set."""

    def begin(self) -> None:
        """The trainer was started just now."""
        self._heard = time.monotonic()

    def misplaced(self, beats: list[Heartbeat]) -> Ending | None:
        """Global rank 0 must run on node 0: it draws samples, evaluates and keeps the metrics, and node 0 publishes them."""
        if self._node or not beats or beats[0].rank < self._intent.devices_per_node:
            return None
        fact = f"torchrun gave rank {beats[0].rank} to node 0, which must have rank 0"
        return Ending("config", f"{fact}; it orders nodes by host name (PET_LOCAL_ADDR), so the first node's must sort first")

    def hung(self, beats: list[Heartbeat]) -> Ending | None:
        """How it ends where no rank of this node changed its heartbeat for too long. One rank that works is enough: at the end
        of a stage the others are silent."""
        if beats != self._beats:
            self._beats, self._heard = beats, time.monotonic()
        silent_s = time.monotonic() - self._heard
        allowed_s = self._intent.hang_timeout_s + (JOIN_S if self._intent.nodes > 1 and not beats else 0)
        if silent_s < allowed_s:
            return None
        ranks, where = who_stands(beats, self._intent.devices_per_node, self._node)
        names = f"rank {ranks[0]} stands" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} stand"
        reason = f"no heartbeat for {silent_s:.1f} s (allowed: {allowed_s:g} s); {names if ranks else 'all ranks stand'} {where}"
        return Ending("hang", reason, rank=ranks[0] if len(ranks) == 1 else None)


def who_stands(beats: list[Heartbeat], devices: int, node: int) -> tuple[list[int], str]:
    """The ranks of a node that hold the others up, and where: those that never spoke, else those with the lowest step.

    Inside a collective all ranks stand at the same step; then all are named, since their heartbeats cannot tell who is to blame.
    Which ranks a node has is for torchrun to say: none are named while all are silent, but node 0 always has the first.
    """
    if not beats and node:
        return [], "before their first heartbeat"
    lowest = beats[0].rank // devices * devices if beats else 0
    silent = [rank for rank in range(lowest, lowest + devices) if rank not in {beat.rank for beat in beats}]
    if silent:
        return silent, "before their first heartbeat"
    step = min(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step == step]
    return [beat.rank for beat in behind], f"at step {step} in phase {'/'.join(sorted({beat.phase for beat in behind}))}"
