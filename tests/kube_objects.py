"""Objects of a cluster as small as a watch needs them: one job of ours, pods and events."""

from __future__ import annotations

from typing import Any

from orchestrator.kube import names
from orchestrator.labels import Annotation, Label

STORE = "s3://bucket/prefix"
KEY = "demo/one@0a1b2c3d4e5f/a1"
JOB = names.job_name(STORE, KEY)


def labelled(name: str, run: str = "r", **changes: Any) -> dict[str, Any]:
    labels = {Label.MANAGED_BY: names.MANAGER, Label.RUN: run, Label.REPLICA_INDEX: "0"}
    return {"metadata": {"name": name, "labels": labels, **changes}}


def pod(name: str, **changes: Any) -> dict[str, Any]:
    return {**labelled(name), "spec": {"nodeName": "n"}, "status": {"phase": "Running"}, **changes}


def job(pods: int = 8) -> dict[str, Any]:
    spec = {"runPolicy": {}, "pytorchReplicaSpecs": {"Worker": {"replicas": pods}}}
    return {**labelled(JOB, uid="u-job", annotations={Annotation.STORE: STORE, Annotation.RUN_KEY: KEY}), "spec": spec}


def event(about: str, reason: str = "Pulling", kind: str = "Pod", message: str = "m", name: str = "e") -> dict[str, Any]:
    involved = {"kind": kind, "name": about, "uid": f"u-{about}"}
    return {"metadata": {"name": name}, "involvedObject": involved, "type": "Normal", "reason": reason, "message": message}
