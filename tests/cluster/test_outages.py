"""Servers that are taken away from everybody for a while: the API server for many looks of a driver, the operator until the deadline.

No other test may use the cluster meanwhile: they wait for each of these, and it for them (tests/conftest.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster.kube_rig import Drive, folder_ledger, gpu_profile, pipeline, until
from cluster.played_agent import PlayedAgents

from orchestrator.errors import Unreachable
from orchestrator.kube.client import Api
from orchestrator.ledger.store import Ledger

pytestmark = [pytest.mark.cluster("pods", alone=True), pytest.mark.timeout(600)]


@contextmanager
def without(cluster: Any, server: str) -> Iterator[Callable[[], None]]:
    """Yields what brings it back. The end does so too, whatever became of the test: every other test needs the server."""
    bring_back = functools.cache(cluster.start)
    try:
        cluster.stop(server)
        yield bring_back
    finally:
        bring_back()


ONE = (("one", None),)
LOOKS = 15
"""A driver looks about once a second."""


def test_an_api_server_that_is_away_stops_nothing_starts_nothing_and_what_came_meanwhile_is_made_once(
    cluster: Any, api: Api, ledger: Ledger, tmp_path: Path
) -> None:
    profile, later = gpu_profile(api.namespace, start_deadline_s=300), folder_ledger(tmp_path / "later", "later")
    same = cluster.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
    with Drive.of(pipeline(profile, stages=ONE, nodes=4), ledger, api) as drive:
        job = drive.trains("one")
        before = api.get("pytorchjobs", job)["metadata"]["uid"]
        with without(cluster, "kube-apiserver") as bring_back, Drive.of(pipeline(profile, "later", ONE, nodes=4), later, api) as new:
            assert "refused" in cluster.kubectl("get", "nodes", check=False)
            until(lambda: drive.life("one").state == "unknown", "that nobody can say")
            with pytest.raises(Unreachable):
                api.get("pytorchjobs", job)
            looks, looks_of_new = drive.counts_looks(), new.counts_looks()
            until(lambda: new.outcomes("one") == ["open"], "an intent")
            until(lambda: looks() >= LOOKS, f"{LOOKS} looks at nothing")
            until(lambda: looks_of_new() >= 3, "a driver that looks for what it could not make")
            assert drive.thread.is_alive() and drive.outcomes("one") == ["open"]
            assert sum("cannot say" in event.detail for event in drive.events) == 1, "said once"
            bring_back()
            until(lambda: drive.life("one").state == "running", "that it is there", 60)
            assert api.get("pytorchjobs", job)["metadata"]["uid"] == before
            with PlayedAgents(api, ledger), PlayedAgents(api, later):
                assert drive.ends(120).exit_code == 0
                assert new.ends(240).exit_code == 0, "an operator that forgot the job is woken"
    assert (drive.outcomes("one"), new.outcomes("one")) == (["completed"], ["completed"])
    assert cluster.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}") == same, "it is the same cluster"


JOB = """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: somebody}
spec: {pytorchReplicaSpecs: {Worker: {replicas: 1, template: {spec: {containers: [{name: pytorch, image: localhost/none:v1}]}}}}}
"""


def test_without_its_operator_a_submission_waits_says_so_fails_at_the_deadline_and_goes_on_if_it_comes_back_in_time(
    cluster: Any, api: Api, ledger: Ledger, tmp_path: Path
) -> None:
    """Without the operator its webhook does not answer either."""
    hasty, patient = (gpu_profile(api.namespace, start_deadline_s=seconds) for seconds in (6, 300))
    other = folder_ledger(tmp_path / "other", "other")
    with without(cluster, "training-operator") as bring_back:
        assert "failed calling webhook" in cluster.kubectl("-n", api.namespace, "create", "-f", "-", stdin=JOB, check=False)
        with Drive.of(pipeline(patient, "other", ONE), other, api) as waits:
            with Drive.of(pipeline(hasty, stages=ONE), ledger, api) as drive:
                until(lambda: "failed calling webhook" in drive.life("one").waits, "the reason")
                until(lambda: any("failed calling webhook" in event.detail for event in drive.events), "an event that says so")
                result = drive.ends(90)
            assert (result.exit_code, drive.outcomes("one")) == (3, ["unstarted"])
            assert "failed calling webhook" in result.reason
            assert api.list("pytorchjobs")[0] == []
            until(lambda: waits.life("one").waits_for == "fault", "the fault")
            with PlayedAgents(api, other):
                bring_back()
                assert waits.ends(120).exit_code == 0
    assert waits.outcomes("one") == ["completed"]
    assert "created" in cluster.kubectl("-n", api.namespace, "create", "-f", "-", stdin=JOB)
