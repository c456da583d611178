"""A job, its pods and events as the real ones were seen, and as `orchestrator.kube.observed` reads them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from orchestrator.kube import names
from orchestrator.kube.observed import Job, Notice, Pod
from orchestrator.labels import Annotation, Label

NOW = 1_795_430_730.4
OWNER = ("s3://b/x", "demo/one@in/a1")
LACKS = "0/9 nodes are available: 8 Insufficient nvidia.com/gpu."


def stamp(time: float) -> str:
    """As Kubernetes writes times: whole seconds."""
    return datetime.fromtimestamp(int(time), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(*conditions: str, pods: int = 2, age: float = 3, suspend: bool = False, asked: bool = False, queue: str | None = None) -> Job:
    told = {
        "metadata": {
            "name": "j",
            "uid": "job-1",
            "creationTimestamp": stamp(NOW - age),
            "annotations": {
                Annotation.STORE: OWNER[0],
                Annotation.RUN_KEY: OWNER[1],
                **({Annotation.ASKED: "to leave"} if asked else {}),
            },
            "labels": {Label.MANAGED_BY: names.MANAGER, **({Label.QUEUE_NAME: queue} if queue else {})},
        },
        "spec": {"runPolicy": {"suspend": suspend}, "pytorchReplicaSpecs": {"Worker": {"replicas": pods}}},
        "status": {
            "conditions": [{"type": one.lstrip("-"), "status": "False" if one.startswith("-") else "True"} for one in conditions],
            **({"completionTime": stamp(NOW)} if "Succeeded" in conditions else {}),
        },
    }
    return Job.read(told, NOW)


def train_job(
    *conditions: str,
    pods: int = 2,
    suspend: bool = False,
    asked: bool = False,
    queue: str | None = None,
    generation: int = 1,
    **counts: int,
) -> Job:
    """A TrainJob; `counts`: what its jobsStatus says, which is not there without any."""
    status = [{"name": "w", "ready": 0, "succeeded": 0, "failed": 0, "active": 0, "suspended": 0, **counts}] if counts else []
    told = {
        "metadata": {
            "name": "j",
            "uid": "job-1",
            "generation": generation,
            "creationTimestamp": stamp(NOW - 3),
            "annotations": {
                Annotation.STORE: OWNER[0],
                Annotation.RUN_KEY: OWNER[1],
                **({Annotation.ASKED: "to leave"} if asked else {}),
            },
            "labels": {Label.MANAGED_BY: names.MANAGER, **({Label.QUEUE_NAME: queue} if queue else {})},
        },
        "spec": {"suspend": suspend, "trainer": {"numNodes": pods}},
        "status": {
            "conditions": [
                {"type": one.lstrip("-"), "status": "False" if one.startswith("-") else "True", "lastTransitionTime": stamp(NOW)}
                for one in conditions
            ],
            "jobsStatus": status,
        },
    }
    return Job.read_train_job(told, NOW)


def told(index: int = 0, phase: str = "Running", *, seen: float = NOW, **changes: Any) -> dict[str, Any]:
    """A pod; `changes`: conditions {type: fields}, state of its container, reason, leaving (seconds from now)."""
    conditions = {"PodScheduled": {"status": "True"}, **changes.get("conditions", {})}
    leaving = {"deletionTimestamp": stamp(NOW + changes["leaving"])} if "leaving" in changes else {}
    return {
        "metadata": {
            "name": f"j-worker-{index}",
            "uid": f"pod-{index}",
            "creationTimestamp": stamp(NOW - 3),
            "labels": {Label.RUN: "r", Label.REPLICA_INDEX: str(index)},
            **leaving,
        },
        "spec": {"nodeName": f"node-{index}"} if conditions["PodScheduled"].get("status") == "True" else {},
        "status": {
            "phase": phase,
            "reason": changes.get("reason"),
            "conditions": [{"type": key, "lastTransitionTime": stamp(NOW - 2), **value} for key, value in conditions.items() if value],
            "containerStatuses": [{"name": "pytorch", "state": changes["state"]}] if "state" in changes else [],
        },
    }


def pod(index: int = 0, phase: str = "Running", **changes: Any) -> Pod:
    return Pod.read(told(index, phase, **changes), NOW)


def over(index: int = 0, exit_code: int = 0, reason: str = "", ago: float = 0.0, message: str | None = None) -> Pod:
    terminated = {"exitCode": exit_code, "reason": reason, "finishedAt": stamp(NOW - ago), "message": message}
    return pod(index, "Failed" if exit_code else "Succeeded", state={"terminated": terminated})


def unscheduled(index: int, message: str = LACKS) -> Pod:
    return pod(index, "Pending", conditions={"PodScheduled": {"status": "False", "reason": "Unschedulable", "message": message}})


def stuck(index: int, reason: str, message: str = "") -> Pod:
    return pod(index, "Pending", state={"waiting": {"reason": reason, "message": message}})


def note(reason: str, message: str, about: str = "job-1", warning: bool = True, kind: str = "PyTorchJob") -> Notice:
    event = {
        "involvedObject": {"kind": kind, "name": "j", "uid": about},
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message,
        "lastTimestamp": stamp(NOW),
    }
    return Notice.read(event, NOW)
