"""An API server of its own, with an empty etcd, on another port of this machine: a cluster without nodes.

It serves the kinds that a test gives it, and nobody acts on them.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cluster.kube_rig import until
from conftest import Cluster

ADDRESS = "10.89.0.1"
"""Of the test cluster, for which its API server's certificate holds."""


@dataclass
class BareServer:
    kubeconfig: Path
    cluster: Cluster
    start: Callable[[], None]
    """Starts its API server anew, with an empty place in etcd."""
    serves: set[str] = field(default_factory=set)
    """Names of the manifests of the test cluster whose kinds are there."""

    def serve(self, *names: str) -> None:
        """Makes it know the kinds of these manifests (`kueue`, `trainer`, ...) and no others of that sort.

        To delete kinds took more than a minute on a busy machine; a new API server takes a few seconds.
        """
        if not self.serves <= set(names):
            self.start()
            self.serves = set()
        for name in sorted(set(names) - self.serves):
            self._kubectl("apply", "--server-side", "-f", "-", kinds=self._kinds(name))
        self.serves = set(names)
        wanted = {one["metadata"]["name"] for name in names for one in self._kinds(name)}
        until(lambda: self._discovered() == wanted, "that the server says what it serves")  # a moment later than its CRDs are established

    def _discovered(self) -> set[str]:
        """Names of all kinds that come from CRDs, as a client finds them."""
        listed = self.cluster.kubectl(
            "--kubeconfig", self.kubeconfig, "api-resources", "--no-headers", "-o", "name", "--cached=false"
        ).split()
        return {name for name in listed if re.search(r"\.(kubeflow\.org|(jobset|kueue)\.x-k8s\.io)$", name)}

    def _kubectl(self, *words: str, kinds: Sequence[Mapping[str, Any]]) -> None:
        self.cluster.kubectl(
            "--kubeconfig", self.kubeconfig, *words, stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": kinds})
        )

    def _kinds(self, name: str) -> list[dict[str, Any]]:
        return _kinds(self.cluster.bin.parent / f"manifests/{name}.yaml")


@functools.cache
def _kinds(manifests: Path) -> list[dict[str, Any]]:
    """As the module ships them, but for their schemas, which take seconds to apply, and for who converts between their versions."""
    kinds = [one for one in yaml.load_all(manifests.read_text(), yaml.CSafeLoader) if one and one["kind"] == "CustomResourceDefinition"]
    assert kinds, manifests
    for kind in kinds:
        kind["spec"]["conversion"] = {"strategy": "None"}
        for version in kind["spec"]["versions"]:
            version["schema"] = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
            for path in ("selectableFields", "additionalPrinterColumns"):
                version.pop(path, None)
    return kinds


@contextmanager
def bare_server(cluster: Cluster, folder: Path) -> Iterator[BareServer]:
    """Runs until the end of the context. Needs the test cluster's programs and keys; nothing of it is touched."""
    conf, ports = cluster.kubeconfig.parent, free_ports(3)
    etcd = f"http://127.0.0.1:{ports[0]}"
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = server = f"https://{ADDRESS}:{ports[2]}"
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    etcd_words = [
        f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
        f"--listen-peer-urls=http://127.0.0.1:{ports[1]}", "--unsafe-no-fsync",
    ]  # fmt: skip
    words = [
        f"--etcd-servers={etcd}", f"--bind-address={ADDRESS}", f"--secure-port={ports[2]}", "--endpoint-reconciler-type=none",
        f"--tls-cert-file={conf / 'apiserver.crt'}", f"--tls-private-key-file={conf / 'apiserver.key'}",
        f"--token-auth-file={conf / 'tokens.csv'}",
        "--authorization-mode=RBAC", "--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.97.0.0/24",
        f"--service-account-key-file={conf / 'sa.pub'}", f"--service-account-signing-key-file={conf / 'sa.key'}",
    ]  # fmt: skip
    places = itertools.count()
    with ExitStack() as ends, ExitStack() as of_api:

        def start() -> None:
            of_api.close()
            log = of_api.enter_context((folder / "kube-apiserver.log").open("a"))
            command = [cluster.bin / "kube-apiserver", *words, f"--etcd-prefix=/cluster-{next(places)}"]
            process = of_api.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            of_api.callback(process.kill)
            wait_until_ready(server, config["users"][0]["user"]["token"], conf / "ca.crt", folder / "kube-apiserver.log")

        log = ends.enter_context((folder / "etcd.log").open("w"))
        process = ends.enter_context(subprocess.Popen([cluster.bin / "etcd", *etcd_words], stdout=log, stderr=log))
        ends.callback(process.kill)
        start()
        yield BareServer(folder / "kubeconfig", cluster, start)


def wait_until_ready(server: str, token: str, ca: Path, log: Path) -> None:
    context, deadline = ssl.create_default_context(cafile=ca), time.monotonic() + 120
    request = urllib.request.Request(f"{server}/readyz", headers={"Authorization": f"Bearer {token}"})
    while True:
        try:
            urllib.request.urlopen(request, timeout=5, context=context).read()
            return
        except OSError:  # not yet; HTTPError, which says 500 until all of it is up, is one too
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((ADDRESS, 0))
        return [one.getsockname()[1] for one in sockets]
