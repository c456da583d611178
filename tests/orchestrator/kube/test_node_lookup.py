"""Laws of the question to the nodes: it decides between two causes, is asked seldom, and nothing depends on the right to ask it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from seen_objects import LACKS, pod, unscheduled

from orchestrator.errors import Refused
from orchestrator.kube.node_lookup import NodeLookup
from orchestrator.ports import Life

TWO = "0/17 nodes are available: 8 node(s) had untolerated taint {team: other}, 9 node(s) didn't match Pod's node affinity/selector"
WAITS = Life("running", waits=TWO, waits_for="capacity", waits_on="taint")
PODS = [pod(0), replace(unscheduled(1, TWO), selector="pool=h800")]


class Nodes:
    """The one request of an API server that is needed here."""

    def __init__(self, found: list[dict[str, Any]] | Exception):
        self.found, self.asked = found, [""][:0]

    def list(self, kind: str, selector: str) -> tuple[list[dict[str, Any]], str]:
        self.asked.append(f"{kind} {selector}")
        if isinstance(self.found, Exception):
            raise self.found
        return self.found, "1"


def named(nodes: Nodes, life: Life = WAITS) -> Life:
    return NodeLookup(nodes).clearer(life, PODS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("found", "cause"), [([{"metadata": {"name": "n"}}], "taint"), ([], "selector"), (Refused("may not"), "taint")])
def test_the_nodes_decide_and_without_the_right_the_message_does(found: list[dict[str, Any]] | Exception, cause: str) -> None:
    nodes = Nodes(found)
    assert named(nodes) == replace(WAITS, waits_on=cause)
    assert nodes.asked == ["nodes pool=h800"]


def test_it_is_asked_once_in_a_while_and_only_where_two_causes_are_possible() -> None:
    nodes = Nodes([])
    lookup = NodeLookup(nodes)  # type: ignore[arg-type]
    for _ in range(5):
        assert lookup.clearer(WAITS, PODS).waits_on == "selector"
    full = Life("running", waits=LACKS, waits_for="capacity", waits_on="no_fit")
    assert lookup.clearer(full, PODS) == full
    assert len(nodes.asked) == 1
