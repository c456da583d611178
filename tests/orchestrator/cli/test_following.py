"""What a launch says of its pods while it runs: each thing once, however many pods a gang has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from orchestrator.cli.following import pods_that_moved
from orchestrator.cli.run import tell
from orchestrator.ledger.records import Event
from orchestrator.pipelines.cluster_view import ClusterView, PodRow

LONG = "0/64 nodes are available: 1 node(s) had untolerated taint {a: b}, 63 Insufficient nvidia.com/gpu. preemption: " + 300 * "x"


def pods(phase: str, reason: Sequence[str], hosts: bool = False) -> ClusterView:
    return ClusterView(
        tuple(PodRow("one", 1, node, f"w-{node}", f"host-{node}" if hosts else None, phase, text) for node, text in enumerate(reason))
    )


def test_a_schedulers_message_to_each_pod_of_a_gang_is_one_line_with_the_count() -> None:
    said: dict[str, str] = {}
    view = pods("Pending", [f"{LONG} {node}" for node in range(8)])
    assert pods_that_moved(view, said) == ["w-0 and 7 more: Pending, without a node"]
    assert pods_that_moved(pods("Pending", [f"otherwise {node}" for node in range(8)]), said) == [], "why is said elsewhere"


def test_a_fault_of_all_pods_is_one_line_and_hosts_are_named() -> None:
    said: dict[str, str] = {}
    assert pods_that_moved(pods("Pending", ["ErrImagePull: no"] * 3, hosts=True), said) == ["w-0 and 2 more: Pending ErrImagePull: no"]
    assert pods_that_moved(pods("Running", ["", "", "exit code 1"], hosts=True), said) == [
        "w-0: Running on host-0", "w-1: Running on host-1", "w-2: Running exit code 1",
    ]  # fmt: skip


def test_a_reason_that_was_shown_is_not_said_again_as_the_drivers_event(capsys: pytest.CaptureFixture[str]) -> None:
    event = Event(epoch=1, seq=1, time=1.0, kind="observed", detail=f"one attempt 1 waits: {LONG}")
    tell(event, {"another reason"})
    assert LONG in capsys.readouterr().err.replace("\n", " ")
    tell(event, {LONG})
    assert capsys.readouterr().err == ""
