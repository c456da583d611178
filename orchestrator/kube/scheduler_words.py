"""What a scheduler's message about a pod without a node means. Pure.

The message counts the nodes by the first filter that refused each (Kubernetes 1.34: cordon, taints, selector, resources, volumes). So a
node that lacks a resource has passed taints and selector, and says most. Owns reading the message. Refuses to say what follows (`waiting`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.ports import WaitCause

NODES = "nodes are available"
"""In a message that counts nodes. For the other pods of a gang the scheduler only writes that the gang is not complete."""
INCOMPLETE = "cannot find enough sibling pods"
"""In a message that counts nodes too: the pods of a gang are not all made yet, so the scheduler has looked at no node."""
VOLUME = re.compile(r"persistentvolume|persistent volume|volume node affinity|unbound immediate", re.IGNORECASE)
LACKING = re.compile(r"Insufficient ([\w./-]+\w)")
TAINT = re.compile(r"untolerated taint\(?s?\)? \{([^:}]+)[^}]*\}")
SELECTOR = "didn't match Pod's node affinity/selector"
SYSTEM_TAINTS = ("node-role.kubernetes.io/", "node.kubernetes.io/", "node.cloudprovider.kubernetes.io/", "ToBeDeletedByClusterAutoscaler")
"""Taints by which a cluster keeps work from nodes of its own, or from broken ones. They are no reason that a profile could mend."""


def clearest(messages: Sequence[str]) -> str:
    """The message that says what nodes lack, without what follows on preemption. The scheduler writes it for one pod of a gang."""
    counted = [message.partition(". ")[0] for message in messages if NODES in message]
    return next((message for message in counted if INCOMPLETE not in message), [*counted, messages[0]][0])


def cause_of(message: str) -> WaitCause:
    """The dominant cause: volume, no fit, taint, selector, and gang if the message counts no nodes."""
    if VOLUME.search(message):
        return "volume"
    if NODES not in message:
        return "gang"
    lacking, taints = set(LACKING.findall(message)), _taints(message)
    if lacking and not taints & lacking:
        return "no_fit"
    if taints:  # also if nodes without the resource are there: a taint with the resource's name is on those that have it
        return "taint"
    return "selector" if SELECTOR in message else "no_fit"


def is_ambiguous(message: str) -> bool:
    """Whether a missing toleration and a wrong selector both explain it: no node passed both, and some nodes failed at each."""
    return NODES in message and SELECTOR in message and not LACKING.search(message) and bool(_taints(message))


def _taints(message: str) -> set[str]:
    """Keys of the taints that a profile could tolerate."""
    return {key for key in TAINT.findall(message) if not key.startswith(SYSTEM_TAINTS)}
