"""Servers that are taken away from everybody for a while: the API server for a minute, the operator until the deadline.

No other test may use the cluster meanwhile: in one run all tests of the cluster have one worker (tests/conftest.py); start no second run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster.kube_rig import Drive, gpu_profile, pipeline, until
from cluster.played_agent import PlayedAgents

from orchestrator.adapters.kube.api import Api
from orchestrator.errors import Unreachable
from orchestrator.ledger import Ledger

pytestmark = pytest.mark.cluster
OPERATOR = ("-n", "kubeflow", "scale", "deployment/training-operator", "--replicas")


@contextmanager
def no_operator(cluster: Any) -> Iterator[None]:
    """Without it, its webhook does not answer either."""
    cluster.kubectl(*OPERATOR, "0")
    cluster.kubectl(
        "-n", "kubeflow", "wait", "--for=delete", "pod", "-l", "control-plane=kubeflow-training-operator", "--timeout=90s", timeout_s=100
    )
    try:
        yield
    finally:
        bring_back(cluster)


def bring_back(cluster: Any) -> None:
    cluster.kubectl(*OPERATOR, "1")
    cluster.kubectl("-n", "kubeflow", "rollout", "status", "deployment/training-operator", "--timeout=90s", timeout_s=100)


def test_an_api_server_that_is_away_for_a_minute_stops_nothing_and_starts_nothing(cluster: Any, api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace), stages=(("one", None),))
    with Drive.of(of, ledger, api) as drive:
        job = drive.trains("one")
        before = api.get("pytorchjobs", job)["metadata"]["uid"]
        cluster.stop("kube-apiserver")
        try:
            until(lambda: drive.life("one").state == "unknown", "that nobody can say")
            with pytest.raises(Unreachable):
                api.get("pytorchjobs", job)
            time.sleep(60)
            assert drive.thread.is_alive() and drive.outcomes("one") == ["open"]
            assert sum("cannot say" in event.detail for event in drive.events) == 1, "said once"
        finally:
            cluster.start()
        until(lambda: drive.life("one").state == "running", "that it is there", 60)
        assert api.get("pytorchjobs", job)["metadata"]["uid"] == before
        with PlayedAgents(api, ledger):
            assert drive.ends(120).exit_code == 0
    assert drive.outcomes("one") == ["completed"]


def test_an_api_server_that_comes_back_while_a_job_is_made_makes_it_once(cluster: Any, api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=300), stages=(("one", None),))
    cluster.stop("kube-apiserver")
    try:
        with Drive.of(of, ledger, api) as drive:
            until(lambda: drive.outcomes("one") == ["open"], "an intent")
            time.sleep(5)
            cluster.start()
            with PlayedAgents(api, ledger):
                assert drive.ends(240).exit_code == 0, "an operator that forgot the job is woken"
    finally:
        cluster.start()
    assert drive.outcomes("one") == ["completed"]


def test_without_its_operator_a_submission_waits_says_so_and_fails_at_the_deadline(cluster: Any, api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=10), stages=(("one", None),))
    with no_operator(cluster), Drive.of(of, ledger, api) as drive:
        until(lambda: "failed calling webhook" in drive.life("one").waits, "the reason")
        until(lambda: any("failed calling webhook" in event.detail for event in drive.events), "an event that says so")
        result = drive.ends(90)
        assert (result.exit_code, drive.outcomes("one")) == (3, ["unstarted"])
        assert "failed calling webhook" in result.reason
        assert api.list("pytorchjobs")[0] == []


def test_an_operator_that_comes_back_in_time_only_delays(cluster: Any, api: Api, ledger: Ledger) -> None:
    of = pipeline(gpu_profile(api.namespace, start_deadline_s=300), stages=(("one", None),))
    with PlayedAgents(api, ledger), no_operator(cluster), Drive.of(of, ledger, api) as drive:
        until(lambda: drive.life("one").waits_for == "fault", "the fault")
        bring_back(cluster)
        assert drive.ends(120).exit_code == 0
    assert drive.outcomes("one") == ["completed"]
