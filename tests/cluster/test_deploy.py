"""What is deployed, on the real API server: a trial with a store of its own, and each account, which may do what is written, nothing else.

Roles are tried in two ways: by the API server's own list of an account's rights, and by one real call for each verb of each resource that
the server knows (changes as dry runs), whose answer must be Forbidden unless the verb is written.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from cluster.releases import logged_artifact
from conftest import Cluster
from deploy.rendering import CACHE, CHART, OVERLAYS, REPOSITORY, Manifest, ci, kustomize, merged
from deploy.rights import OF_DRIVER, OF_TRAINER, OF_USER, Rights

from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.yaml_file import read, validate

pytestmark = pytest.mark.cluster("pods")

EVERYBODYS: Rights = {
    ("authentication.k8s.io", "selfsubjectreviews"): ("create",),
    ("authorization.k8s.io", "selfsubjectaccessreviews"): ("create",),
    ("authorization.k8s.io", "selfsubjectrulesreviews"): ("create",),
}
"""Kubernetes' own system:basic-user: who am I, what may I."""
METHODS = {
    "get": "GET", "list": "GET", "watch": "GET", "create": "POST", "update": "PUT", "patch": "PATCH",
    "delete": "DELETE", "deletecollection": "DELETE",
}  # fmt: skip
NEVER = "osctl-tests-no-such-object"
"""Name that calls for one object ask for: whoever is allowed is told that it is not there."""


@dataclass
class Caller:
    """Somebody who talks HTTP to the API server."""

    cluster: Cluster
    token: str
    headers: dict[str, str]

    def __post_init__(self) -> None:
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
        context = ssl.create_default_context(cafile=config["certificate-authority"])
        self._connection = http.client.HTTPSConnection(urlsplit(config["server"]).netloc, timeout=30, context=context)

    def call(self, method: str, path: str, body: Any = None, content: str = "application/json") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": content, "Accept": "application/json", **self.headers}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self._connection.getresponse()
        if "watch=true" in path and answer.status == 200:
            self._connection.close()  # it is allowed: what comes is not waited for
            return answer.status, b""
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Resource:
    group: str
    version: str
    name: str
    """With its subresource."""
    namespaced: bool
    verbs: tuple[str, ...]

    def path(self, verb: str, namespace: str) -> str:
        root = f"/api/{self.version}" if not self.group else f"/apis/{self.group}/{self.version}"
        plural, _, sub = self.name.partition("/")
        place = f"{root}/namespaces/{namespace}/{plural}" if self.namespaced else f"{root}/{plural}"
        if sub or verb in ("get", "update", "patch", "delete"):
            place += f"/{NEVER}"
        if sub:
            place += f"/{sub}"
        query = {"watch": "?watch=true&timeoutSeconds=1"}.get(verb, "" if METHODS[verb] == "GET" else "?dryRun=All")
        return place + query


@pytest.fixture(scope="module")
def make_namespace(cluster: Cluster) -> Iterator[Callable[[], str]]:
    """Namespaces as k8s/namespace writes them, under names of their own."""
    made: list[str] = []

    def make() -> str:
        (manifest,) = yaml.safe_load_all((REPOSITORY / "k8s/namespace/namespace.yaml").read_text())
        manifest["metadata"]["name"] = f"deploy-{secrets.token_hex(4)}"
        made.append(manifest["metadata"]["name"])
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        return made[-1]

    yield make
    if made:
        cluster.kubectl("delete", "namespace", "--wait=false", *made)


@pytest.fixture(scope="module")
def based(cluster: Cluster, make_namespace: Callable[[], str]) -> str:
    """A namespace with accounts, roles and policies of k8s/overlays/test."""
    namespace = make_namespace()
    objects = [
        moved(manifest, namespace) for manifest in of_overlay(cluster, "test") if manifest["kind"] not in ("Namespace", "PriorityClass")
    ]
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))
    return namespace


def token_of(cluster: Cluster, namespace: str, account: str) -> str:
    """A short-lived one, by TokenRequest."""
    return cluster.kubectl("-n", namespace, "create", "token", account, "--duration=10m").strip()


def of_overlay(cluster: Cluster, name: str) -> list[Manifest]:
    return kustomize(cluster.bin / "kubectl", OVERLAYS / name)


def moved(manifest: Manifest, namespace: str) -> Manifest:
    """The same object in another namespace."""
    result: Manifest = json.loads(json.dumps(manifest))
    if "namespace" in result["metadata"]:
        result["metadata"]["namespace"] = namespace
    for subject in result.get("subjects", []):
        if "namespace" in subject:
            subject["namespace"] = namespace
    return result


# --- Roles ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def administrator(cluster: Cluster) -> Iterator[Caller]:
    caller = Caller(cluster, yaml.safe_load(cluster.kubeconfig.read_text())["users"][0]["user"]["token"], {})
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def resources(administrator: Caller) -> list[Resource]:
    """All that this API server knows, in each group's preferred version."""
    _, groups = administrator.call("GET", "/apis")
    versions = [("", "v1"), *(tuple(group["preferredVersion"]["groupVersion"].split("/")) for group in groups["groups"])]
    found = []
    for group, version in versions:
        _, listed = administrator.call("GET", f"/apis/{group}/{version}" if group else f"/api/{version}")
        found += [
            Resource(group, version, each["name"], each["namespaced"], tuple(verb for verb in each["verbs"] if verb in METHODS))
            for each in listed["resources"]
        ]
    assert {"secrets", "pods/exec", "pytorchjobs", "podgroups", "clusterroles"} <= {each.name for each in found}
    return found


@pytest.fixture(scope="module", params=["osctl-driver", "osctl-trainer", "osctl-testers"])
def subject(request: pytest.FixtureRequest, cluster: Cluster, based: str, administrator: Caller) -> Iterator[tuple[Caller, Rights]]:
    """An account by a short-lived token, or a member of the group that the overlay names; and what is written of it."""
    name = request.param
    if name == "osctl-testers":
        caller = Caller(cluster, administrator.token, {"Impersonate-User": "somebody", "Impersonate-Group": name})
    else:
        caller = Caller(cluster, token_of(cluster, based, name), {})
    yield caller, {"osctl-driver": OF_DRIVER, "osctl-trainer": OF_TRAINER, "osctl-testers": OF_USER}[name]
    caller.close()


def listed(said: str) -> Rights:
    """`kubectl auth can-i --list` without what concerns no resource."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for line in said.splitlines():
        match = re.match(r"(\S+) +\[\] +\[(.*?)\] +\[(.*?)\]$", line)
        if match is None:
            assert re.match(r" +\[/", line), f"a row that this test cannot read: {line}"
            continue
        assert not match[2], f"a right on one name alone: {line}"
        name, _, sub = match[1].partition("/")
        resource, _, group = name.partition(".")
        found[group, f"{resource}/{sub}" if sub else resource] = tuple(match[3].split())
    return found


@pytest.mark.parametrize(("account", "written"), [("osctl-driver", OF_DRIVER), ("osctl-trainer", OF_TRAINER)])
def test_what_kubectl_lists_of_an_account_is_what_is_written(
    cluster: Cluster, based: str, tmp_path: Path, account: str, written: Rights
) -> None:
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token_of(cluster, based, account)}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    said = cluster.kubectl("--kubeconfig", tmp_path / "kubeconfig", "-n", based, "auth", "can-i", "--list", "--no-headers")
    assert {key: set(verbs) for key, verbs in listed(said).items()} == {key: set(verbs) for key, verbs in {**EVERYBODYS, **written}.items()}


def test_every_call_that_is_not_written_is_forbidden(subject: tuple[Caller, Rights], based: str, resources: list[Resource]) -> None:
    """Every verb of every resource, in the namespace: Forbidden, or written."""
    caller, written = subject
    wrong, calls = [], 0
    for resource in resources:
        allowed = {**EVERYBODYS, **written}.get((resource.group, resource.name), ())
        for verb in resource.verbs:
            calls += 1
            body = None if METHODS[verb] == "GET" else {} if METHODS[verb] != "DELETE" else None
            content = "application/merge-patch+json" if verb == "patch" else "application/json"
            status, said = caller.call(METHODS[verb], resource.path(verb, based), body, content)
            if (status == 403) is (verb in allowed):
                wrong.append(f"{verb} {resource.name}.{resource.group}: {status} {said if status == 403 else ''}")
    assert not wrong
    assert calls > 300


def test_what_is_written_ends_at_the_namespace(subject: tuple[Caller, Rights], resources: list[Resource]) -> None:
    caller, written = subject
    for resource in resources:
        if (resource.group, resource.name) in written and "list" in resource.verbs:
            everywhere = resource.path("list", "default").replace("/namespaces/default", "")
            for path in (resource.path("list", "default"), resource.path("list", "kube-system"), everywhere):
                assert caller.call("GET", path)[0] == 403, path


def test_nobody_becomes_somebody_else(cluster: Cluster, based: str) -> None:
    for account in ("osctl-driver", "osctl-trainer"):
        token = token_of(cluster, based, account)
        for headers in ({"Impersonate-User": "admin"}, {"Impersonate-User": "a", "Impersonate-Group": "system:masters"}):
            caller = Caller(cluster, token, headers)
            status, said = caller.call("GET", f"/api/v1/namespaces/{based}/pods")
            caller.close()
            assert status == 403 and "impersonate" in said["message"]


# --- Objects --------------------------------------------------------------------------------------------------------------------------


def taken(cluster: Cluster, objects: list[Manifest], *options: str) -> int:
    """How many of them the API server says it would apply. AssertionError with its words where it refuses one."""
    words = ("apply", "--server-side", "--dry-run=server", *options, "-f", "-")
    return cluster.kubectl(*words, stdin=yaml.safe_dump_all(objects)).count("serverside-applied (server dry run)")


@pytest.mark.parametrize("overlay", ["h800-64", "h800-64-kueue", "test"])
def test_the_api_server_takes_every_overlay(cluster: Cluster, based: str, overlay: str) -> None:
    objects = [moved(manifest, based) for manifest in of_overlay(cluster, overlay) if manifest["kind"] != "Namespace"]
    assert taken(cluster, objects, "--force-conflicts") == len(objects) > 0


@pytest.mark.parametrize("example", sorted(path.stem for path in (REPOSITORY / "k8s/examples").iterdir()))
def test_the_api_server_takes_every_example(cluster: Cluster, based: str, example: str) -> None:
    text = (REPOSITORY / "k8s/examples" / f"{example}.yaml").read_text()
    # Trainer's webhook looks for a TrainJob's runtime, which a dry run does not make: test_manifest_laws.py sends both.
    objects = [moved(manifest, based) for manifest in yaml.safe_load_all(text) if manifest["kind"] != "TrainJob"]
    assert taken(cluster, objects) == len(objects) > 0


def test_the_api_server_refuses_an_example_with_a_field_too_many(cluster: Cluster, based: str) -> None:
    """What the tests above rest on."""
    (path, *_) = sorted((REPOSITORY / "k8s/examples").iterdir())
    job = moved(next(yaml.safe_load_all(path.read_text())), based)
    job["spec"]["runPolicy"]["cleanPodPolicies"] = "Running"
    with pytest.raises(AssertionError, match="cleanPodPolicies"):
        taken(cluster, [job])


def test_the_namespace_refuses_a_pod_that_is_not_restricted(cluster: Cluster, based: str) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "loose"},
        "spec": {"containers": [{"name": "a", "image": "localhost/a"}]},
    }
    said = cluster.kubectl("-n", based, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod), check=False)
    assert 'violates PodSecurity "restricted:v1.34"' in said


# --- A trial: all other releases' life is in test_docs.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store_image(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of nothing but versitygw, in the cluster."""
    image, archive = "localhost/versitygw:deploy-test", tmp_path_factory.mktemp("image") / "versitygw.tar"
    script = """
    container=$(buildah from scratch)
    buildah add -q "$container" "$1" /bin/versitygw
    buildah commit -q --rm "$container" "$2"
    buildah push -q "$2" "docker-archive:$3:$2"
    buildah rmi "$2"
    ctr -a "$4" -n k8s.io images import "$3"
    """
    words = [(cluster.bin / "versitygw").resolve(), image, archive, CACHE / "run/containerd.sock"]
    subprocess.run(["bash", "-euc", script, "image", *map(str, words)], check=True, capture_output=True, timeout=120)
    archive.unlink()
    return image


def test_a_trial_brings_its_own_store(cluster: Cluster, make_namespace: Callable[[], str], store_image: str) -> None:
    namespace = make_namespace()
    literals = [f"--from-literal={name}={secrets.token_hex(16)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    cluster.kubectl("-n", namespace, "create", "secret", "generic", "osctl-s3", *literals)
    profile = {"image": cluster.trainer_image, "driver_image": cluster.driver_image, "allow_unpinned": [store_image]}
    values = merged(ci("trial"), {"profile": profile, "s3": {"trial": {"image": store_image}}})
    cluster.helm("install", "osctl", CHART, "-n", namespace, "--wait", "--timeout", "180s", "--values", "-", stdin=yaml.safe_dump(values))
    said = cluster.helm("test", "osctl", "-n", namespace, "--logs")
    assert "it holds its conditional writes" in said and "answers, and not to foreign host names" in said
    cluster.helm("uninstall", "osctl", "-n", namespace)


@pytest.mark.prove(
    "releases"
)  # test_docs.py has the life of the release that docs/cluster.md installs; this one has the values of helm/osctl/ci/test.yaml
def test_a_release_lives_its_life(cluster: Cluster, make_namespace: Callable[[], str], tmp_path: Path) -> None:
    """Install, test, upgrade, rollback, uninstall; nothing of it is left, and the Secret, which is not its own, stays."""
    namespace = make_namespace()
    literals = [f"--from-literal={name}={cluster.s3[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    cluster.kubectl("-n", namespace, "create", "secret", "generic", "osctl-s3", *literals)
    values = merged(
        ci("test"),
        {
            "profile": {"image": cluster.trainer_image, "driver_image": cluster.driver_image, "allow_unpinned": []},
            "store": f"s3://{cluster.bucket}/{namespace}/runs",
            "mlflow": {"artifacts": f"s3://{cluster.bucket}/{namespace}/mlflow"},
        },
    )
    settings = ["-n", namespace, "--wait", "--timeout", "180s", "--values", "-"]

    def allowed_hosts() -> str:
        return cluster.kubectl(
            "-n", namespace, "get", "deployment/osctl-mlflow", "-o", "jsonpath={.spec.template.spec.containers[0].args[4]}"
        )

    cluster.helm("install", "osctl", CHART, *settings, stdin=yaml.safe_dump(values))
    first = allowed_hosts()

    said = cluster.helm("test", "osctl", "-n", namespace, "--logs")
    assert "Phase:          Succeeded" in said
    assert "it holds its conditional writes" in said and "answers, and not to foreign host names" in said

    artifact = logged_artifact(cluster, namespace)
    assert (CACHE / "s3/data" / cluster.bucket / namespace / "mlflow" / artifact).read_text() == "kept in the object store\n"

    (tmp_path / "cluster.yaml").write_text(
        cluster.kubectl("-n", namespace, "get", "configmap/osctl-cluster", "-o", r"jsonpath={.data.cluster\.yaml}")
    )
    profile = validate(ClusterProfile, read(tmp_path / "cluster.yaml"), "cluster profile")
    assert (profile.namespace, profile.driver_image, profile.gpu_resource) == (namespace, cluster.driver_image, None)
    assert profile.tracking == f"http://osctl-mlflow.{namespace}.svc:5000"
    doctor = [REPOSITORY / ".venv/bin/osctl", "doctor", "--cluster", "cluster.yaml", "--store", values["store"], "-o", "json"]
    env = {**os.environ, **cluster.s3, "KUBECONFIG": str(cluster.kubeconfig)}
    checks = json.loads(subprocess.run(doctor, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert {check["verdict"] for check in checks} == {"ok"}

    changed = merged(values, {"mlflow": {"allowedHosts": ["mlflow.example.com"]}})
    cluster.helm("upgrade", "osctl", CHART, *settings, stdin=yaml.safe_dump(changed))
    assert allowed_hosts() == f"{first},mlflow.example.com"

    cluster.helm("rollback", "osctl", "1", "-n", namespace, "--wait", "--timeout", "180s")
    assert allowed_hosts() == first
    assert "Phase:          Succeeded" in cluster.helm("test", "osctl", "-n", namespace)
    history = json.loads(cluster.helm("history", "osctl", "-n", namespace, "-o", "json"))
    assert [(each["revision"], each["status"]) for each in history] == [(1, "superseded"), (2, "superseded"), (3, "deployed")]

    cluster.helm("uninstall", "osctl", "-n", namespace, "--wait", "--timeout", "60s")
    kinds = "all,serviceaccounts,roles,rolebindings,networkpolicies,configmaps,persistentvolumeclaims,secrets"
    left = cluster.kubectl("-n", namespace, "get", kinds, "-o", "name").split()
    assert {name for name in left if "pod/" not in name} == {"serviceaccount/default", "configmap/kube-root-ca.crt", "secret/osctl-s3"}
