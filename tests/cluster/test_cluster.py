"""The test cluster is what the other tests take it for: gangs, webhook, Pod Security, network, S3, images by digest."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Cluster

pytestmark = pytest.mark.cluster("gpus")

SAFE = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
SAFE_POD = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}


def apply(cluster: Cluster, namespace: str, manifest: dict[str, Any], **options: Any) -> str:
    return cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(manifest), **options)


def gang(name: str, workers: int) -> dict[str, Any]:
    """A PyTorchJob of whole fake nodes; its image is never pulled."""
    container = {"name": "pytorch", "image": "localhost/none:v1", "resources": {"limits": {"nvidia.com/gpu": 8}}, "securityContext": SAFE}
    pod = {
        "nodeSelector": {"type": "kwok"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "securityContext": SAFE_POD,
        "containers": [container],
    }
    worker = {"replicas": workers, "restartPolicy": "Never", "template": {"spec": pod}}
    run_policy = {"schedulingPolicy": {"minAvailable": workers}}
    spec = {"runPolicy": run_policy, "pytorchReplicaSpecs": {"Worker": worker}}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": name}, "spec": spec}


def pods(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    return list(json.loads(cluster.kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"])


def eventually(what: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.3)
    return True


def unschedulable(pod: dict[str, Any]) -> str:
    conditions = pod["status"].get("conditions", [])
    return " ".join(c.get("message", "") for c in conditions if c["type"] == "PodScheduled" and c.get("reason") == "Unschedulable")


def run(cluster: Cluster, namespace: str, image: str, script: str, **env: str) -> str:
    """What `script` prints in a restricted pod of that image."""
    container = {
        "name": "main",
        "image": image,
        "command": ["sh", "-c", script],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "securityContext": SAFE,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {"restartPolicy": "Never", "securityContext": SAFE_POD, "containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}
    apply(cluster, namespace, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": spec})

    def over() -> bool:
        return cluster.kubectl("-n", namespace, "get", "pod", "probe", "-o", "jsonpath={.status.phase}") in ("Succeeded", "Failed")

    assert eventually(over, 240), cluster.kubectl("-n", namespace, "describe", "pod", "probe")
    return cluster.kubectl("-n", namespace, "logs", "probe")


def test_one_real_node_and_eight_of_eight_gpus_are_ready(cluster: Cluster) -> None:
    gpus = {}
    for node in json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]:
        assert {"type": "Ready", "status": "True"}.items() <= next(c for c in node["status"]["conditions"] if c["type"] == "Ready").items()
        gpus[node["metadata"]["name"]] = node["status"]["allocatable"].get("nvidia.com/gpu", "0")
    assert gpus == {"node-0": "0", **{f"h800-{i}": "8" for i in range(8)}}


def elsewhere(cluster: Cluster) -> str:
    """Pods that hold fake GPUs, of tests before this one or of a person."""
    return "\n".join(line for line in cluster.kubectl("get", "pods", "-A", "-o", "wide", "--no-headers").splitlines() if " h800-" in line)


def test_a_gang_that_fits_runs_and_one_too_large_is_not_placed_at_all(cluster: Cluster, namespace: str) -> None:
    assert eventually(lambda: not elsewhere(cluster), 100), f"the cluster is taken:\n{elsewhere(cluster)}"
    apply(cluster, namespace, gang("eight", 8))
    assert eventually(lambda: [p["status"]["phase"] for p in pods(cluster, namespace)] == ["Running"] * 8), pods(cluster, namespace)
    assert len({p["spec"]["nodeName"] for p in pods(cluster, namespace)}) == 8
    cluster.kubectl("-n", namespace, "delete", "pytorchjob", "eight")
    assert eventually(lambda: not pods(cluster, namespace))

    apply(cluster, namespace, gang("nine", 9))
    assert eventually(lambda: sum(bool(unschedulable(p)) for p in pods(cluster, namespace)) == 9), pods(cluster, namespace)
    assert not any(p["spec"].get("nodeName") for p in pods(cluster, namespace))
    said = " ".join(unschedulable(p) for p in pods(cluster, namespace))
    assert "minMember of group: 9" in said
    assert "nvidia.com/gpu" in said, "the scheduler says of what there is too little"


def test_the_operators_webhook_and_the_schema_refuse(cluster: Cluster, namespace: str) -> None:
    job = gang("typo", 1)
    job["spec"]["pytorchReplicaSpecs"]["Wrker"] = job["spec"]["pytorchReplicaSpecs"].pop("Worker")
    assert "validator.pytorchjob.training-operator.kubeflow.org" in apply(cluster, namespace, job, check=False)
    assert "Invalid value" in apply(cluster, namespace, {**gang("upper", 1), "metadata": {"name": "UPPER"}}, check=False)
    assert cluster.kubectl("-n", namespace, "get", "pytorchjobs", "-o", "name") == ""


def test_a_pod_that_is_not_restricted_is_refused(cluster: Cluster, namespace: str) -> None:
    spec = {"containers": [{"name": "main", "image": "localhost/none:v1"}]}
    said = apply(cluster, namespace, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}, "spec": spec}, check=False)
    assert 'violates PodSecurity "restricted' in said


def test_a_pod_reaches_the_api_server_by_name_and_s3_with_conditional_writes(cluster: Cluster, namespace: str) -> None:
    script = """python - <<'P'
import os, pathlib, ssl, urllib.request, boto3, botocore.exceptions
there = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")
headers = {"Authorization": "Bearer " + (there / "token").read_text()}
request = urllib.request.Request("https://kubernetes.default.svc/version", headers=headers)
print(urllib.request.urlopen(request, context=ssl.create_default_context(cafile=there / "ca.crt")).status)
s3 = boto3.client("s3", endpoint_url=os.environ["OSCTL_S3_ENDPOINT"])
key = os.environ["NAMESPACE"]
s3.put_object(Bucket=os.environ["BUCKET"], Key=key, Body=b"one", IfNoneMatch="*")
try:
    s3.put_object(Bucket=os.environ["BUCKET"], Key=key, Body=b"two", IfNoneMatch="*")
except botocore.exceptions.ClientError as error:
    print(error.response["ResponseMetadata"]["HTTPStatusCode"])
print(s3.get_object(Bucket=os.environ["BUCKET"], Key=key)["Body"].read().decode())
P"""
    said = run(cluster, namespace, cluster.driver_image, script, BUCKET=cluster.bucket, NAMESPACE=namespace, **cluster.s3)
    assert said.split() == ["200", "412", "one"]


def test_the_trainers_image_runs_by_digest_without_rights_and_without_writing(cluster: Cluster, namespace: str) -> None:
    assert re.fullmatch(r"localhost/osctl-trainer@sha256:[0-9a-f]{64}", cluster.trainer_image)
    script = (
        "id -u; touch /opt/x 2>&1; python -c 'import torch, opensora, orchestrator; print(opensora.__file__, torch.ones(2).sum().item())'"
    )
    user, touch, imported = run(cluster, namespace, cluster.trainer_image, script).strip().splitlines()
    assert user == "1000"
    assert "Read-only file system" in touch
    assert imported.startswith("/opt/osctl/lib/") and imported.endswith("2.0")


def test_the_slim_image_has_the_cli_and_no_torch(cluster: Cluster, namespace: str) -> None:
    commands = (
        "osctl --version",
        "osctl plan -f demo >/dev/null",
        "osctl launch --help >/dev/null",
        "! python -c 'import torch' 2>/dev/null",
    )
    script = " && ".join((*commands, "echo slim"))
    assert run(cluster, namespace, cluster.driver_image, script).split()[-1] == "slim"
