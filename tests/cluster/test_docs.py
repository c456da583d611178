"""docs/cluster.md, from an empty namespace to the first launch and back, typed word by word in one shell; and the life of its release.

Replaced are what the page itself calls somebody's own: images, addresses, the bucket, and the label by which a namespace asks for Pod
Security at the version of the cluster.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.releases import logged_artifact
from conftest import REPOSITORY, Cluster
from deploy.rendering import CACHE, CHART, merged
from doc_commands import Shell, commands_of

from orchestrator.labels import Label
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.yaml_file import read, validate

pytestmark = pytest.mark.cluster("pods")
PAGE, RUNNER = "docs/cluster.md", "tests/cluster/test_docs.py"


def values(cluster: Cluster, bucket: str) -> str:
    """The page's my-values.yaml, of this cluster."""
    (shown,) = re.findall(r"```yaml\n# my-values.yaml\n(.*?)```", (REPOSITORY / PAGE).read_text(), re.DOTALL)
    content = yaml.safe_load(shown)
    host, _, port = cluster.s3["OSCTL_S3_ENDPOINT"].removeprefix("http://").partition(":")
    content["profile"] |= {"image": cluster.trainer_image, "driver_image": cluster.driver_image}
    content["profile"]["s3_endpoint"] = cluster.s3["OSCTL_S3_ENDPOINT"]
    content["network"] = {"s3": {"cidrs": [f"{host}/32"], "port": int(port)}, "apiServer": {"cidrs": [f"{host}/32"]}}
    return yaml.safe_dump(content).replace("s3://my-bucket", bucket)


@pytest.fixture
def shell(cluster: Cluster, tmp_path: Path) -> Iterator[Shell]:
    for name in ("k8s", "helm"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    keys = {name: value for name, value in cluster.s3.items() if name.startswith("AWS_")}
    path = f"{Path(sys.executable).parent}:{cluster.bin}:{os.environ['PATH']}"
    yield Shell(tmp_path, dict(os.environ) | keys | {"KUBECONFIG": str(cluster.kubeconfig), "PATH": path, "HOME": str(tmp_path)})
    cluster.kubectl("delete", "namespace", "osctl", "--ignore-not-found", timeout_s=180)


def test_from_an_empty_cluster_to_the_first_launch_and_back(cluster: Cluster, shell: Shell) -> None:
    bucket = f"s3://{cluster.bucket}/docs-{secrets.token_hex(4)}"
    content = values(cluster, bucket)
    (shell.folder / "my-values.yaml").write_text(content)
    said = dict[str, str]()
    for command in commands_of(PAGE, RUNNER):
        if command.startswith("helm uninstall"):
            a_release_lives_its_life(cluster, shell, yaml.safe_load(content), bucket)
        said[command] = shell(command.replace("s3://my-bucket", bucket))
        if command.startswith("helm uninstall"):
            nothing_is_left_but_the_secret(cluster)
    assert "Phase:          Succeeded" in said["helm test osctl -n osctl"]
    assert "succeeded" in said["osctl watch -f demo"]
    assert all(f"stage{number}" in said["osctl compare demo"] for number in (1, 2, 3))
    assert "demo-stage1-a1" in said["kubectl -n osctl get pytorchjobs"]
    assert cluster.kubectl("get", "namespace", "osctl", "--ignore-not-found") == ""


NOT_LAUNCHED = f"!{Label.PIPELINE},!training.kubeflow.org/job-name"
"""Neither ours nor what the operator made of it."""
WELL = "it holds its conditional writes", "answers, and not to foreign host names"


def a_release_lives_its_life(cluster: Cluster, shell: Shell, values: dict[str, Any], bucket: str) -> None:
    """What the page installed: its profile and its MLflow are as they should be; it is upgraded, rolled back and tested again."""
    profile = validate(ClusterProfile, read(shell.folder / "cluster.yaml"), "cluster profile")
    assert (profile.namespace, profile.driver_image, profile.gpu_resource) == ("osctl", cluster.driver_image, None)
    assert profile.tracking == "http://osctl-mlflow.osctl.svc:5000"
    assert {check["verdict"] for check in json.loads(shell("osctl doctor -f demo -o json 2>/dev/null"))} == {"ok"}
    artifact = logged_artifact(cluster, "osctl")
    assert (CACHE / "s3/data" / bucket.removeprefix("s3://") / "mlflow" / artifact).read_text() == "kept in the object store\n"

    def allowed_hosts() -> str:
        of = "jsonpath={.spec.template.spec.containers[0].args[4]}"
        return cluster.kubectl("-n", "osctl", "get", "deployment/osctl-mlflow", "-o", of)

    first = allowed_hosts()
    changed = yaml.safe_dump(merged(values, {"mlflow": {"allowedHosts": ["mlflow.example.com"]}}))
    cluster.helm("upgrade", "osctl", CHART, "-n", "osctl", "--wait", "--timeout", "180s", "--values", "-", stdin=changed)
    assert allowed_hosts() == f"{first},mlflow.example.com"
    cluster.helm("rollback", "osctl", "1", "-n", "osctl", "--wait", "--timeout", "180s")
    assert allowed_hosts() == first
    said = cluster.helm("test", "osctl", "-n", "osctl", "--logs")
    assert "Phase:          Succeeded" in said and all(words in said for words in WELL)
    history = json.loads(cluster.helm("history", "osctl", "-n", "osctl", "-o", "json"))
    assert [(each["revision"], each["status"]) for each in history] == [(1, "superseded"), (2, "superseded"), (3, "deployed")]


def nothing_is_left_but_the_secret(cluster: Cluster) -> None:
    """And what was launched. The Secret is not the release's own."""
    kinds = "all,serviceaccounts,roles,rolebindings,networkpolicies,configmaps,persistentvolumeclaims,secrets"
    left = cluster.kubectl("-n", "osctl", "get", kinds, "-l", NOT_LAUNCHED, "-o", "name").split()
    assert {name for name in left if "pod/" not in name} == {"serviceaccount/default", "configmap/kube-root-ca.crt", "secret/osctl-s3"}
