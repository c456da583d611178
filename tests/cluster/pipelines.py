"""A namespace with osctl's lasting parts in it, installed by the chart as a user does, and pipelines that run there."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import Cluster
from tiny_recipe import Osctl, write

CHART = Path(__file__).parents[2] / "helm/osctl"


@dataclass(frozen=True)
class Site:
    """One installed release."""

    cluster: Cluster
    namespace: str
    profile: Path
    store: str
    """s3://bucket/prefix of this namespace."""

    @property
    def env(self) -> Mapping[str, str]:
        """What a person's `osctl` needs: kubeconfig and keys of the store. The store's endpoint is in the profile."""
        keys = {key: value for key, value in self.cluster.s3.items() if key.startswith("AWS_")}
        return {"KUBECONFIG": str(self.cluster.kubeconfig), **keys}

    def osctl(self, folder: Path, **recipe: Any) -> Osctl:
        """The tiny recipe of `tiny_recipe.write`, on two nodes unless `nodes` says otherwise; two processes each."""
        nodes = recipe.pop("nodes", 2)
        where = {"backend": "kubernetes", "cluster": str(self.profile), "store": self.store, "name": folder.name.replace("_", "-")}
        write(folder, **(where | recipe))
        path = folder / "osctl.yaml"
        content = yaml.safe_load(path.read_text())
        for stage in content["stages"]:
            stage["resources"]["nodes"] = nodes
        path.write_text(yaml.safe_dump(content))
        return Osctl(folder, self.env)

    def json(self, *words: str) -> Any:
        return json.loads(self.cluster.kubectl("-n", self.namespace, *words, "-o", "json"))

    def pods(self, pipeline: str, role: str = "trainer") -> list[Any]:
        """Living ones, by name."""
        found = self.json("get", "pods", "-l", f"osctl/pipeline={pipeline},osctl/role={role}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] in ("Pending", "Running")]

    def evict(self, pod: Any) -> None:
        """As `kubectl drain` does, by the eviction API."""
        name = pod["metadata"]["name"]
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": self.namespace}}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/eviction"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    @contextmanager
    def port_forward(self, service: str, port: int) -> Iterator[str]:
        """URL of a Service, on this machine."""
        command = [self.cluster.bin / "kubectl", "--kubeconfig", self.cluster.kubeconfig, "-n", self.namespace, "port-forward"]
        with subprocess.Popen([*command, f"service/{service}", f":{port}"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield f"http://localhost:{process.stdout.readline().split('127.0.0.1:')[1].split(' ')[0]}"
            finally:
                process.terminate()


@contextmanager
def installed(cluster: Cluster, folder: Path, *, mlflow: bool, **profile: Any) -> Iterator[Site]:
    """The chart, installed into a namespace of its own; both go afterwards."""
    namespace = f"osctl-{secrets.token_hex(4)}"
    store = f"s3://{cluster.bucket}/{namespace}"
    host, _, port = cluster.s3["OSCTL_S3_ENDPOINT"].removeprefix("http://").partition(":")
    content = {
        "name": "test",
        "image": cluster.trainer_image,
        "driver_image": cluster.driver_image,
        "device": "cpu-core",
        "gpu_resource": None,
        "cpu": "300m",  # two pods, a driver, MLflow and all of Kubernetes share two cores
        "memory": "1536Mi",
        "shm": "256Mi",
        "scratch": "2Gi",
        "save_s": 15,
        "lost_node_s": 60,
        "s3_endpoint": cluster.s3["OSCTL_S3_ENDPOINT"],
        "s3_secret": "osctl-s3",
        "start_deadline_s": 120,
        "keep_s": 3600,
    }
    values = {
        "profile": content | profile,
        "store": store,
        "network": {"s3": {"cidrs": [f"{host}/32"], "port": int(port)}, "apiServer": {"cidrs": [f"{host}/32"]}},
        "mlflow": {"enabled": mlflow, **({"artifacts": f"{store}-mlflow", "cpu": "100m", "memory": "1536Mi"} if mlflow else {})},
    }
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    cluster.kubectl("create", "namespace", namespace)
    try:
        cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        keys = [f"--from-literal={key}={cluster.s3[key]}" for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        cluster.kubectl("-n", namespace, "create", "secret", "generic", "osctl-s3", *keys)
        cluster.helm("-n", namespace, "install", "osctl", CHART, "-f", folder / "values.yaml")
        written = cluster.kubectl("-n", namespace, "get", "configmap", "osctl-cluster", "-o", r"jsonpath={.data.cluster\.yaml}")
        (folder / "cluster.yaml").write_text(written)
        yield Site(cluster, namespace, folder / "cluster.yaml", store)
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")
        for kind in ("jobs", "pytorchjobs", "trainjobs"):
            cluster.kubectl("-n", namespace, "delete", kind, "--all", "--wait=false", check=False)
        cluster.kubectl("-n", namespace, "delete", "pods", "--all", "--grace-period=1", check=False, timeout_s=120)


def until(what: str, true: Callable[[], Any], seconds: float = 120, pause: float = 0.2) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(pause)
    return answer


def ended(osctl: Osctl, seconds: float = 300) -> Any:
    """`osctl status` once nobody drives the pipeline any more."""
    return until("the pipeline ends", lambda: (seen := osctl.json("status"))["state"] not in ("pending", "running") and seen, seconds, 1.0)


def step_of(osctl: Osctl, stage: int = 0) -> int:
    return int(osctl.json("status")["stages"][stage]["step"])


def processes_of(pod: Any, words: str) -> list[int]:
    """Pids, as this machine sees them, of a pod's processes whose command line holds `words`; ascending."""
    uid = pod["metadata"]["uid"]
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            inside = uid in (path / "cgroup").read_text() or uid.replace("-", "_") in (path / "cgroup").read_text()
            if inside and words in (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def shim_of(pod: Any) -> int:
    """Pid of the containerd shim that holds a pod."""
    (parent,) = {
        int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes_of(pod, "orchestrator.agent")[:1]
    }
    assert "containerd-shim" in Path(f"/proc/{parent}/cmdline").read_text()
    return parent


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
