"""How many cores an actor of Ray asks for, so that the node on which it runs has room for what hands rows out. Pure.

Owns the refusal of an actor that fits on no node: Ray would wait for ever for one. Refuses to ask a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

from opensora.errors import ConfigError

LEAVES_ROOM = 0.98
"""Of the cores that an actor was to have. With actors that fill each node the task that hands rows out is never started, and no row is
ever worked on (seen on the test cluster with pods of one core)."""
FEED = 0.01
"""Cores that this task asks for."""


def of_actor(wanted: float, nodes: Sequence[float]) -> float:
    """
    Args:
        wanted: cores, as `ray.num_cpus` says.
        nodes: cores that each node, or each pod, offers to Ray. Empty: none is known yet.

    Raises:
        ConfigError: an actor fits on none of them.
    """
    offered = [cores for cores in nodes if cores > 0]
    if not offered:
        return wanted
    if wanted > max(offered):
        raise ConfigError(
            f"ray.num_cpus {wanted:g}: the largest node of Ray offers {max(offered):g} cores, and an actor runs on one node. "
            f"Set ray.num_cpus to {max(offered):g} or less, or take larger nodes (prepare.cpu of a cluster profile)"
        )
    fill = all(cores % wanted < FEED or wanted - cores % wanted < FEED for cores in offered)
    return wanted * LEAVES_ROOM if fill else wanted
