"""Whether any node has the labels that a pod selects, for a scheduler's message that a wrong selector and a missing toleration both give.

In a cluster of several teams "8 node(s) had untolerated taint {team: other}, 9 node(s) didn't match Pod's node affinity/selector" may mean
that the profile selects a label that no node has, or that its own nodes have a taint. Only the nodes tell.

Owns the request, how seldom it is sent, and what follows. Without the right to list nodes (k8s/nodes) the message's own order counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from orchestrator.errors import NotFound, OsctlError
from orchestrator.kube.client import Api
from orchestrator.kube.observed import Pod
from orchestrator.kube.scheduler_words import is_ambiguous
from orchestrator.ports import Life

log = logging.getLogger(__name__)

AGAIN_S = 300.0
"""How long an answer counts, also a refusal. An attempt that waits for nodes may wait for days."""


class NodeLookup:
    """Not safe for several threads."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, tuple[float, bool | None]] = {}
        """By selector: when it was asked (monotonic clock), and whether a node has these labels. None means that this is not known."""

    def clearer(self, life: Life, pods: Iterable[Pod]) -> Life:
        """The same life, with the cause that the nodes' labels show where the scheduler's message allows two."""
        if life.waits_on not in ("taint", "selector") or not is_ambiguous(life.waits):
            return life
        selector = next((pod.selector for pod in pods if pod.unscheduled), "")
        matched = self._any_node(selector) if selector else None
        return life if matched is None else replace(life, waits_on="taint" if matched else "selector")

    def _any_node(self, selector: str) -> bool | None:
        asked, known = self._known.get(selector, (float("-inf"), None))
        if time.monotonic() - asked < AGAIN_S:
            return known
        found: bool | None = None
        try:
            found = bool(self._api.list("nodes", selector)[0])
        except (NotFound, OsctlError) as error:
            log.info("nodes with %s are not looked up: %s", selector, error)
        self._known[selector] = time.monotonic(), found
        return found
