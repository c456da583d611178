"""The pod of one node of an attempt."""

from __future__ import annotations

from pathlib import Path

import manifest_specs
import pytest
from manifest_specs import container, environment, job_of, worker

from orchestrator.agent import trainer_process
from orchestrator.recipe.cluster_profile import ClusterProfile


def test_the_hook_asks_for_a_save_and_leaves_time_to_hurry(profile: ClusterProfile) -> None:
    pod = worker(job_of(profile))
    assert pod["terminationGracePeriodSeconds"] == profile.grace_s == 300
    assert container(job_of(profile))["lifecycle"]["preStop"]["exec"]["command"] == ["sh", "-c", "kill -TERM 1; sleep 285"]


def test_a_lost_node_costs_a_minute_or_two_not_five(profile: ClusterProfile) -> None:
    waits = {each["key"]: each.get("tolerationSeconds") for each in worker(job_of(profile))["tolerations"]}
    assert waits["node.kubernetes.io/not-ready"] == waits["node.kubernetes.io/unreachable"] == profile.lost_node_s == 90
    assert "nvidia.com/gpu" in waits


def test_nothing_is_placed_on_an_excluded_node(profile: ClusterProfile) -> None:
    assert "affinity" not in worker(job_of(profile))
    job = job_of(profile.model_copy(update={"exclude_nodes": ("h800-7", "h800-1")}), exclude_nodes=["h800-3", "h800-1"])
    (term,) = worker(job)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["h800-1", "h800-3", "h800-7"]}]}


@pytest.mark.parametrize("nodes", [1, 8])
def test_a_variable_is_set_in_one_place(nodes: int, profile: ClusterProfile, tmp_path: Path) -> None:
    """The time of the meeting and NCCL's variables were set by manifest and agent, to different values, and one of them never acted."""
    pod = environment(job_of(profile, nodes=nodes))
    intent = manifest_specs.intent("p", "s", "0" * 12, 1, nodes, 8).model_copy(update={"device": "h800"})
    agent = trainer_process.environment(intent, {}, tmp_path)
    assert agent and not set(agent) & set(pod)
    assert ("PET_RDZV_CONF" in agent) == (nodes > 1)
    both = trainer_process.environment(intent, {"PET_RDZV_CONF": "join_timeout=1", **pod}, tmp_path)
    assert both == {**pod, **agent} | ({} if nodes > 1 else {"PET_RDZV_CONF": "join_timeout=1"})


def test_nccl_is_spoken_of_only_where_gpus_are(profile: ClusterProfile) -> None:
    with_gpus, without = environment(job_of(profile)), environment(job_of(profile.model_copy(update={"gpu_resource": None})))
    assert {name for name in with_gpus if "NCCL" in name} == {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX"} & set(with_gpus)
    assert with_gpus["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert with_gpus["OMP_NUM_THREADS"] == "15"
    assert not [name for name in without if "NCCL" in name or "CUDA" in name]
    assert without["OMP_NUM_THREADS"] == "1"
    assert with_gpus["HOME"] == without["HOME"] == "/tmp"


def test_the_room_for_streamed_latents_is_the_profiles_or_left_to_the_trainer(profile: ClusterProfile) -> None:
    bounded = profile.model_copy(update={"latents_gb": 0.5})
    assert "OSCTL_LATENTS_GB" not in environment(job_of(profile))
    for where in (bounded, bounded.model_copy(update={"gpu_resource": None})):
        assert float(environment(job_of(where))["OSCTL_LATENTS_GB"]) == 0.5


def test_what_a_pod_writes_lies_in_declared_volumes(profile: ClusterProfile) -> None:
    job = job_of(profile)
    mounts = {mount["mountPath"]: mount["name"] for mount in container(job)["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in worker(job)["volumes"]}
    assert mounts == {"/run/osctl": "scratch", "/tmp": "scratch", "/dev/shm": "shm"}
    assert volumes == {"scratch": {"sizeLimit": "500Gi"}, "shm": {"medium": "Memory", "sizeLimit": "64Gi"}}
    assert environment(job)["TRITON_CACHE_DIR"].startswith("/tmp/")
