"""`osctl doctor` on clusters with and without each operator and Kueue: what it finds, what it does not see, and what it says to install.

Which kinds a cluster serves is tried on an API server of its own, whose kinds come and go; what Kueue does, on the real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from cluster.bare_server import BareServer, bare_server
from cluster.kube_rig import STORE, client, gpu_profile, pipeline, until
from conftest import Cluster

from orchestrator.kube.client import Api
from orchestrator.pipelines.checks import Check, of_cluster
from orchestrator.recipe.cluster_profile import ClusterProfile

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(300)]

V1, V2 = "PyTorchJob (training operator, v1)", "TrainJob (Trainer v2)"
WITH_KUEUE: Mapping[str, Any] = {"queue": "kueue", "kueue_queue": "train"}


def rows(api: Api, profile: ClusterProfile) -> dict[str, Check]:
    return {check.name: check for check in of_cluster(pipeline(profile), profile, api, STORE)}


# --- Four clusters, with and without Kueue ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareServer]:
    with bare_server(cluster, tmp_path_factory.mktemp("bare")) as server:
        yield server


CLUSTERS = {
    "none": (False, False, False), "v1": (True, False, False), "both": (True, True, False), "both and Kueue": (True, True, True),
    "v2": (False, True, False), "v2 and Kueue": (False, True, True),
    "Kueue": (False, False, True), "v1 and Kueue": (True, False, True),
}  # fmt: skip
"""Operator v1, v2, Kueue. In an order in which most add to the one before."""


@pytest.mark.parametrize(("v1", "v2", "kueue"), CLUSTERS.values(), ids=CLUSTERS)
def test_doctor_says_which_operator_is_there_which_is_used_and_what_to_install(bare: BareServer, v1: bool, v2: bool, kueue: bool) -> None:
    there = {"training-operator": v1, "trainer": v2, "jobset": v2, "kueue": kueue}
    bare.serve(*(name for name, is_there in there.items() if is_there))
    with client(bare.kubeconfig, "default") as api:
        gang, queued = rows(api, gpu_profile("default")), rows(api, gpu_profile("default", **WITH_KUEUE))
        insists = rows(api, gpu_profile("default", operator="trainjob"))["operators"]
    found = gang["operators"]
    assert found == queued["operators"]
    if v1 and v2:
        assert found.fact == f"the cluster serves {V1} and {V2}; osctl uses {V1}, which comes first where both are there"
        assert insists.fact == f"the cluster serves {V1} and {V2}; osctl uses {V2}, as the profile says"
    elif v1 or v2:
        assert found.fact == f"the cluster serves {V1 if v1 else V2} alone, and osctl uses it"
        assert insists.verdict == ("ok" if v2 else "failed")
        assert v2 or "the profile says operator: trainjob" in insists.fact
    else:
        assert found.verdict == insists.verdict == "failed" and V1 in found.fact and V2 in found.fact
        assert "kubectl apply --server-side -k k8s/operator, or kubectl apply --server-side -k k8s/trainer" in found.fix
    assert (found.verdict == "ok") is (v1 or v2)

    assert gang["kueue"].fact == f"{'there' if kueue else 'not there'}, and this profile does not use it"
    assert queued["kueue"].verdict == ("ok" if kueue else "failed")
    assert ("kubectl apply --server-side -k k8s/kueue" in queued["kueue"].fix) is not kueue
    held = queued["held back"]
    if kueue and v1:  # its kinds are there, and nobody acts on them
        assert held.verdict == "failed" and "Kueue does not run" in held.fact and "kubectl -n kueue-system get pods" in held.fix
    elif kueue:
        assert held.verdict == "not checked" and ("shows only with a job" if v2 else "no operator") in held.fact


# --- The real Kueue ----------------------------------------------------------------------------------------------------------------------

ALL = {"cpu": "960", "ephemeral-storage": "32Ti", "memory": "14400Gi", "nvidia.com/gpu": "64", "rdma/hca_shared_devices_a": "8"}


def cluster_queue(name: str, quota: Mapping[str, str], **spec: Any) -> dict[str, Any]:
    resources = [{"name": resource, "nominalQuota": amount} for resource, amount in sorted(quota.items())]
    group = {"coveredResources": sorted(quota), "flavors": [{"name": name, "resources": resources}]}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        "spec": {"namespaceSelector": {}, "resourceGroups": [group], **spec},
    }


def apply(cluster: Cluster, *objects: Mapping[str, Any]) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


@contextmanager
def queue(cluster: Cluster, namespace: str, quota: Mapping[str, str], **spec: Any) -> Iterator[None]:
    """LocalQueue `train` of this namespace, and what it needs outside of it under the namespace's name."""
    flavor = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": namespace}}
    local = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": "train", "namespace": namespace},
        "spec": {"clusterQueue": namespace},
    }
    apply(cluster, flavor, cluster_queue(namespace, quota, **spec), local)
    try:
        yield
    finally:
        cluster.kubectl("-n", namespace, "delete", "localqueue", "train", "--wait=false")
        cluster.kubectl("delete", f"clusterqueue/{namespace}", f"resourceflavor/{namespace}", "--wait=false")


@pytest.fixture
def queued(namespace: str) -> ClusterProfile:
    return gpu_profile(namespace, **WITH_KUEUE)


def is_active(api: Api, covered: Mapping[str, str] = ALL) -> bool:
    status = api.get("localqueues", "train").get("status", {})
    seen = {one["name"] for flavor in status.get("flavorsReservation", ()) for one in flavor["resources"]}
    return seen == set(covered) and any(one["type"] == "Active" and one["status"] == "True" for one in status["conditions"])


def test_doctor_finds_a_queue_that_holds_an_attempt_back_and_admits_it(cluster: Cluster, api: Api, queued: ClusterProfile) -> None:
    missing = rows(api, queued)["queue"]
    assert missing.verdict == "failed" and "no LocalQueue train; there is none" in missing.fact and "k8s/queues" in missing.fix
    with queue(cluster, api.namespace, ALL):
        until(lambda: is_active(api), "an active queue")
        found = rows(api, queued)
        for name in ("operators", "kueue", "held back", "queue", "queue's quota", "admission"):
            assert found[name].verdict == "ok", found[name]
        assert found["held back"].fact == f"Kueue holds back each {V1} with a queue"
        assert rows(api, gpu_profile(api.namespace))["held back"].fact == "Kueue holds back no job without a queue"


def test_doctor_finds_that_kueue_holds_a_train_job_back_by_its_settings(api: Api, queued: ClusterProfile) -> None:
    held = rows(api, queued.model_copy(update={"operator": "trainjob"}))["held back"]
    assert (held.verdict, held.fact) == ("ok", f"Kueue holds back each {V2} with a queue")


def test_doctor_looks_at_the_queue_of_the_driver(cluster: Cluster, api: Api) -> None:
    assert rows(api, gpu_profile(api.namespace))["driver's queue"].fact == "none: its Job starts at once"
    named = gpu_profile(api.namespace, driver_queue="train")
    assert "no LocalQueue train" in rows(api, named)["driver's queue"].fact
    with queue(cluster, api.namespace, {"cpu": "1", "memory": "1Gi"}):
        until(lambda: is_active(api, {"cpu": "1", "memory": "1Gi"}), "an active queue")
        assert rows(api, named)["driver's queue"].verdict == "ok"


def test_doctor_refuses_a_queue_that_never_admits(cluster: Cluster, api: Api, queued: ClusterProfile) -> None:
    few = {**ALL, "nvidia.com/gpu": "56"}
    lacking = {name: amount for name, amount in ALL.items() if not name.startswith("rdma")}
    with queue(cluster, api.namespace, few):
        until(lambda: is_active(api), "an active queue")
        small = rows(api, queued)["queue's quota"]
        assert small.verdict == "failed" and f"nvidia.com/gpu: needs 64, flavor {api.namespace} has 56 at most" in small.fact
        assert "--set one.resources.nodes=N" in small.fix
        # The same with a cohort that lends the rest: it fits.
        lender = f"{api.namespace}-lender"
        apply(cluster, cluster_queue(api.namespace, few, cohortName=api.namespace))
        mate = cluster_queue(lender, {"nvidia.com/gpu": "8"}, cohortName=api.namespace)
        mate["spec"]["resourceGroups"][0]["flavors"][0]["name"] = api.namespace
        apply(cluster, mate)
        try:
            assert rows(api, queued)["queue's quota"].verdict == "ok"
        finally:
            cluster.kubectl("delete", "clusterqueue", lender, "--wait=false")
        apply(cluster, cluster_queue(api.namespace, lacking))
        until(lambda: is_active(api, lacking), "a queue that covers less")
        uncovered = rows(api, queued)["queue"]
        assert uncovered.verdict == "failed" and "rdma/hca_shared_devices_a" in uncovered.fact.partition("request")[2]
        apply(cluster, cluster_queue(api.namespace, ALL, stopPolicy="Hold"))
        until(
            lambda: rows(api, queued)["queue"].verdict == "failed" and "not active" in rows(api, queued)["queue"].fact, "that it is stopped"
        )
        assert "stopped" in rows(api, queued)["queue"].fact


def test_doctor_says_what_a_person_may_not_see_of_kueue(cluster: Cluster, api: Api, queued: ClusterProfile) -> None:
    with queue(cluster, api.namespace, ALL), client(cluster.kubeconfig.parent / "alice.kubeconfig", api.namespace) as alice:
        until(lambda: is_active(api), "an active queue")
        for name, resources in (("queues", "localqueues.kueue.x-k8s.io"), ("jobs", "pytorchjobs.kubeflow.org")):
            cluster.kubectl("-n", api.namespace, "create", "role", name, "--verb=get,list,create", f"--resource={resources}")
            cluster.kubectl("-n", api.namespace, "create", "rolebinding", name, f"--role={name}", "--user=alice")
        found = rows(alice, queued)
        assert found["held back"].verdict == found["queue"].verdict == "ok", "her own rights show it"
        assert found["queue's quota"].verdict == "not checked" and "kueue-clusterqueue-viewer-role" in found["queue's quota"].fact
