"""Why Kueue holds a preparation back, by one look. What Kueue itself says is tested in tests/cluster/test_queues.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_api_server import FakeApiServer, Fault, serve

from orchestrator.kube.client import Api
from orchestrator.kube.queue_look import why_held_now

KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
CREATED = "2026-11-23T10:00:00Z"
NOW = 1795428005.0
"""Five seconds later."""
JOB: dict[str, Any] = {
    "metadata": {"name": "films-prepare-1", "uid": "u1", "creationTimestamp": CREATED, "labels": {"kueue.x-k8s.io/queue-name": "train"}},
    "spec": {"suspend": True},
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[FakeApiServer, Api]]:
    with serve() as fake:
        one = [{"name": "one", "context": {"cluster": "c", "user": "u"}}]
        content = {"current-context": "one", "contexts": one, "clusters": [{"name": "c", "cluster": {"server": fake.url}}]}
        (tmp_path / "kubeconfig").write_text(json.dumps({**content, "users": [{"name": "u", "user": {"token": "t"}}]}))
        fake.objects["/apis/kueue.x-k8s.io"] = {"versions": [{"version": "v1beta2"}]}
        fake.objects[f"{KUEUE}/namespaces/osctl/localqueues/train"] = {"metadata": {"name": "train"}, "spec": {"clusterQueue": "cores"}}
        api = Api.connect(None, "osctl", {"KUBECONFIG": str(tmp_path / "kubeconfig")})
        yield fake, api
        api.close()


def waiting(fake: FakeApiServer, message: str) -> None:
    quota = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message, "lastTransitionTime": CREATED}
    metadata = {"name": "rayjob-films", "uid": "w1", "creationTimestamp": CREATED, "labels": {"kueue.x-k8s.io/job-uid": "u1"}}
    workload = {"metadata": metadata, "spec": {"queueName": "train"}, "status": {"conditions": [quota]}}
    fake.objects[f"{KUEUE}/namespaces/osctl/workloads/rayjob-films"] = workload


def test_what_kueue_says_of_its_quota_is_said(site: tuple[FakeApiServer, Api]) -> None:
    fake, api = site
    waiting(fake, "couldn't assign flavors to pod set cpu: insufficient unused quota for cpu in flavor nodes, 3 more needed")
    assert why_held_now(api, JOB, NOW) == "insufficient unused quota for cpu in flavor nodes, 3 more needed"


def test_a_job_without_a_queue_or_admitted_waits_for_nothing_of_it(site: tuple[FakeApiServer, Api]) -> None:
    _, api = site
    assert why_held_now(api, {**JOB, "spec": {"suspend": False}}, NOW) == ""
    assert why_held_now(api, {**JOB, "metadata": JOB["metadata"] | {"labels": {}}}, NOW) == ""


def test_a_kind_that_kueue_does_not_know_is_found_out(site: tuple[FakeApiServer, Api]) -> None:
    _, api = site
    assert why_held_now(api, JOB, NOW) == "waits for its turn in queue train"
    assert why_held_now(api, JOB, NOW + 600) == "Kueue has not taken it up in queue train"


def test_a_queue_that_is_not_there_or_stopped_is_named(site: tuple[FakeApiServer, Api]) -> None:
    fake, api = site
    fake.objects[f"{KUEUE}/clusterqueues/cores"] = {"metadata": {"name": "cores"}, "spec": {"stopPolicy": "Hold"}}
    assert why_held_now(api, JOB, NOW) == "cluster queue cores of queue train is stopped (Hold)"
    del fake.objects[f"{KUEUE}/namespaces/osctl/localqueues/train"]
    assert why_held_now(api, JOB, NOW) == "the namespace has no queue train"


def test_who_may_not_look_is_told_that_it_waits(site: tuple[FakeApiServer, Api]) -> None:
    fake, api = site
    fake.faults += [Fault(ends_with=name, status=403) for name in ("/workloads", "/train")]
    assert why_held_now(api, JOB, NOW + 600) == "waits for its turn in queue train"
