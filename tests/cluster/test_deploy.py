"""What is deployed, on the real API server: a release's life, and that each account may do what is written and nothing else.

Roles are tried in two ways: by the API server's own list of an account's rights, and by one real call for each verb of each resource that
the server knows (changes as dry runs), whose answer must be Forbidden unless the verb is written.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
import yaml
from deploy.rendering import CACHE, CHART, OVERLAYS, REPOSITORY, Manifest, ci, kustomize, merged, tool
from deploy.rights import OF_DRIVER, OF_TRAINER, OF_USER, Rights

from orchestrator.cluster import ClusterProfile
from orchestrator.document import read, validate

pytestmark = pytest.mark.cluster

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


def run(name: str, *words: str | Path, given: str | None = None, check: bool = True) -> str:
    """kubectl or helm, as the cluster's administrator; what it said."""
    command = [str(tool(name)), "--kubeconfig", str(CACHE / "conf/admin.kubeconfig"), *map(str, words)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=240)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout + ("" if check else done.stderr)


@dataclass
class Caller:
    """Somebody who talks HTTP to the API server."""

    token: str
    headers: dict[str, str]

    def __post_init__(self) -> None:
        config = yaml.safe_load((CACHE / "conf/admin.kubeconfig").read_text())["clusters"][0]["cluster"]
        context = ssl.create_default_context(cafile=config["certificate-authority"])
        self._connection = http.client.HTTPSConnection(urlsplit(config["server"]).netloc, timeout=30, context=context)

    def call(self, method: str, path: str, body: Any = None, content: str = "application/json") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": content, "Accept": "application/json", **self.headers}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self._connection.getresponse()
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
def up(require: Callable[[str, str], NoReturn]) -> None:
    """The cluster of tests/cluster/up answers."""
    if (
        tool("kubectl") is None
        or not (CACHE / "conf/admin.kubeconfig").exists()
        or "ok" not in run("kubectl", "get", "--raw", "/readyz", check=False)
    ):
        require("cluster", "it is not up; run tests/cluster/up")


@pytest.fixture(scope="module")
def images(up: None) -> dict[str, str]:
    """Digest-pinned references of both images, in the cluster."""
    done = subprocess.run([REPOSITORY / "tests/cluster/image"], capture_output=True, text=True, timeout=280, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def make_namespace(up: None) -> Iterator[Callable[[], str]]:
    """Namespaces as k8s/namespace writes them, under names of their own."""
    made: list[str] = []

    def make() -> str:
        (manifest,) = yaml.safe_load_all((REPOSITORY / "k8s/namespace/namespace.yaml").read_text())
        manifest["metadata"]["name"] = f"deploy-{secrets.token_hex(4)}"
        made.append(manifest["metadata"]["name"])
        run("kubectl", "apply", "-f", "-", given=json.dumps(manifest))
        return made[-1]

    yield make
    if made:
        run("kubectl", "delete", "namespace", "--wait=false", *made)


@pytest.fixture(scope="module")
def based(make_namespace: Callable[[], str]) -> str:
    """A namespace with accounts, roles and policies of k8s/overlays/test."""
    namespace = make_namespace()
    objects = [moved(manifest, namespace) for manifest in of_overlay("test") if manifest["kind"] not in ("Namespace", "PriorityClass")]
    run("kubectl", "apply", "-f", "-", given=yaml.safe_dump_all(objects))
    return namespace


def of_overlay(name: str) -> list[Manifest]:
    kubectl = tool("kubectl")
    assert kubectl is not None
    return kustomize(kubectl, OVERLAYS / name)


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
def administrator(up: None) -> Iterator[Caller]:
    caller = Caller(yaml.safe_load((CACHE / "conf/admin.kubeconfig").read_text())["users"][0]["user"]["token"], {})
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
def subject(request: pytest.FixtureRequest, based: str, administrator: Caller) -> Iterator[tuple[Caller, Rights]]:
    """An account by a short-lived token, or a member of the group that the overlay names; and what is written of it."""
    name = request.param
    if name == "osctl-testers":
        caller = Caller(administrator.token, {"Impersonate-User": "somebody", "Impersonate-Group": name})
    else:
        caller = Caller(run("kubectl", "-n", based, "create", "token", name, "--duration=10m").strip(), {})
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
def test_what_kubectl_lists_of_an_account_is_what_is_written(based: str, tmp_path: Path, account: str, written: Rights) -> None:
    config = yaml.safe_load((CACHE / "conf/admin.kubeconfig").read_text())
    config["users"][0]["user"] = {"token": run("kubectl", "-n", based, "create", "token", account, "--duration=10m").strip()}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    said = run("kubectl", "--kubeconfig", tmp_path / "kubeconfig", "-n", based, "auth", "can-i", "--list", "--no-headers")
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


def test_nobody_becomes_somebody_else(based: str) -> None:
    for account in ("osctl-driver", "osctl-trainer"):
        token = run("kubectl", "-n", based, "create", "token", account, "--duration=10m").strip()
        for headers in ({"Impersonate-User": "admin"}, {"Impersonate-User": "a", "Impersonate-Group": "system:masters"}):
            caller = Caller(token, headers)
            status, said = caller.call("GET", f"/api/v1/namespaces/{based}/pods")
            caller.close()
            assert status == 403 and "impersonate" in said["message"]


# --- Objects --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", ["h800-64", "test"])
def test_the_api_server_takes_every_overlay(based: str, overlay: str) -> None:
    objects = [moved(manifest, based) for manifest in of_overlay(overlay) if manifest["kind"] != "Namespace"]
    run("kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-", given=yaml.safe_dump_all(objects))


@pytest.mark.parametrize("example", sorted(path.stem for path in (REPOSITORY / "k8s/examples").iterdir()))
def test_the_api_server_takes_every_example(based: str, example: str) -> None:
    objects = yaml.safe_load_all((REPOSITORY / "k8s/examples" / f"{example}.yaml").read_text())
    given = yaml.safe_dump_all([moved(manifest, based) for manifest in objects])
    run("kubectl", "apply", "--server-side", "--dry-run=server", "-f", "-", given=given)


def test_the_namespace_refuses_a_pod_that_is_not_restricted(based: str) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "loose"},
        "spec": {"containers": [{"name": "a", "image": "localhost/a"}]},
    }
    said = run("kubectl", "-n", based, "create", "--dry-run=server", "-f", "-", given=json.dumps(pod), check=False)
    assert 'violates PodSecurity "restricted:v1.34"' in said


# --- A release ------------------------------------------------------------------------------------------------------------------------


def test_a_release_lives_its_life(make_namespace: Callable[[], str], images: dict[str, str], tmp_path: Path) -> None:
    """Install, test, upgrade, rollback, uninstall; nothing of it is left, and the Secret, which is not its own, stays."""
    namespace = make_namespace()
    keys = dict(line.split("=", 1) for line in (CACHE / "conf/s3.env").read_text().splitlines() if "=" in line)
    literals = [f"--from-literal={name}={keys[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    run("kubectl", "-n", namespace, "create", "secret", "generic", "osctl-s3", *literals)
    values = merged(
        ci("test"),
        {
            "profile": {"image": images["trainer"], "driver_image": images["slim"], "allow_unpinned": []},
            "store": f"s3://osctl/{namespace}/runs",
            "mlflow": {"artifacts": f"s3://osctl/{namespace}/mlflow"},
        },
    )
    settings = ["-n", namespace, "--wait", "--timeout", "180s", "--values", "-"]

    def allowed_hosts() -> str:
        return run(
            "kubectl", "-n", namespace, "get", "deployment/osctl-mlflow", "-o", "jsonpath={.spec.template.spec.containers[0].args[4]}"
        )

    run("helm", "install", "osctl", CHART, *settings, given=yaml.safe_dump(values))
    first = allowed_hosts()

    said = run("helm", "test", "osctl", "-n", namespace, "--logs")
    assert "Phase:          Succeeded" in said
    assert "it holds its conditional writes" in said and "answers, and not to foreign host names" in said

    artifact = logged_artifact(namespace)
    assert (CACHE / "s3/data/osctl" / namespace / "mlflow" / artifact).read_text() == "kept in the object store\n"

    (tmp_path / "cluster.yaml").write_text(
        run("kubectl", "-n", namespace, "get", "configmap/osctl-cluster", "-o", r"jsonpath={.data.cluster\.yaml}")
    )
    profile = validate(ClusterProfile, read(tmp_path / "cluster.yaml"), "cluster profile")
    assert (profile.namespace, profile.driver_image, profile.gpu_resource) == (namespace, images["slim"], None)
    assert profile.tracking == f"http://osctl-mlflow.{namespace}.svc:5000"

    changed = merged(values, {"mlflow": {"allowedHosts": ["mlflow.example.com"]}})
    run("helm", "upgrade", "osctl", CHART, *settings, given=yaml.safe_dump(changed))
    assert allowed_hosts() == f"{first},mlflow.example.com"

    run("helm", "rollback", "osctl", "1", "-n", namespace, "--wait", "--timeout", "180s")
    assert allowed_hosts() == first
    assert "Phase:          Succeeded" in run("helm", "test", "osctl", "-n", namespace)
    history = json.loads(run("helm", "history", "osctl", "-n", namespace, "-o", "json"))
    assert [(each["revision"], each["status"]) for each in history] == [(1, "superseded"), (2, "superseded"), (3, "deployed")]

    run("helm", "uninstall", "osctl", "-n", namespace, "--wait", "--timeout", "60s")
    kinds = "all,serviceaccounts,roles,rolebindings,networkpolicies,configmaps,persistentvolumeclaims,secrets"
    left = run("kubectl", "-n", namespace, "get", kinds, "-o", "name").split()
    assert {name for name in left if "pod/" not in name} == {"serviceaccount/default", "configmap/kube-root-ca.crt", "secret/osctl-s3"}


@pytest.fixture(scope="module")
def store_image(up: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of nothing but versitygw, in the cluster."""
    if not (tool("buildah") and tool("ctr")):
        pytest.fail("the cluster is up, but buildah or ctr is missing; scripts/setup-test-servers installs them")
    image, archive = "localhost/versitygw:deploy-test", tmp_path_factory.mktemp("image") / "versitygw.tar"
    script = """
    container=$(buildah from scratch)
    buildah add -q "$container" "$1" /bin/versitygw
    buildah commit -q --rm "$container" "$2"
    buildah push -q "$2" "docker-archive:$3:$2"
    buildah rmi "$2"
    ctr -a "$4" -n k8s.io images import "$3"
    """
    words = [(CACHE / "bin/versitygw").resolve(), image, archive, CACHE / "run/containerd.sock"]
    subprocess.run(["bash", "-euc", script, "image", *map(str, words)], check=True, capture_output=True, timeout=120)
    archive.unlink()
    return image


def test_a_trial_brings_its_own_store(make_namespace: Callable[[], str], images: dict[str, str], store_image: str) -> None:
    namespace = make_namespace()
    literals = [f"--from-literal={name}={secrets.token_hex(16)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    run("kubectl", "-n", namespace, "create", "secret", "generic", "osctl-s3", *literals)
    profile = {"image": images["trainer"], "driver_image": images["slim"], "allow_unpinned": [store_image]}
    values = merged(ci("trial"), {"profile": profile, "s3": {"trial": {"image": store_image}}})
    run("helm", "install", "osctl", CHART, "-n", namespace, "--wait", "--timeout", "180s", "--values", "-", given=yaml.safe_dump(values))
    said = run("helm", "test", "osctl", "-n", namespace, "--logs")
    assert "it holds its conditional writes" in said and "answers, and not to foreign host names" in said
    run("helm", "uninstall", "osctl", "-n", namespace)


def logged_artifact(namespace: str) -> str:
    """Key, below the artifact root, of what a client of this MLflow has sent it: the client has no key of the object store."""
    script = f"""
import os
for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
    del os.environ[name]
import mlflow
mlflow.set_tracking_uri("http://osctl-mlflow.{namespace}.svc:5000")
mlflow.set_experiment("deploy")
with mlflow.start_run() as run:
    mlflow.log_text("kept in the object store\\n", "note.txt")
print("ARTIFACT", run.info.artifact_uri.removeprefix("mlflow-artifacts:/") + "/note.txt")
"""
    said = run("kubectl", "-n", namespace, "exec", "deployment/osctl-mlflow", "--", "python", "-c", script)
    return next(line.split()[1] for line in said.splitlines() if line.startswith("ARTIFACT"))
