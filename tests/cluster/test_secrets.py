"""Forty secrets, planted around and in a real cluster, come out nowhere: no manifest, log, event, ledger file, command line or error.

Real: API server, kubelet, operator, S3, the pods with their credentials from a Secret, and a trainer in one that tells all it knows.
Not here: MLflow, which gets what the ledger has (tests/orchestrator/test_secrets.py), and Secrets themselves, where secrets belong.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from cluster.pipelines import Site, installed
from conftest import Cluster
from planted import Planted
from tiny_recipe import Osctl

from orchestrator.stores.s3 import S3Store

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(420)]

TELLTALE = 'env; tr "\\0" "\\n" < /proc/1/environ; echo "KeyError: $AWS_SECRET_ACCESS_KEY"; exit 1'
"""A trainer that tells all it knows, and whose last words become the reason of its attempt's end."""
IN_ENVIRONMENT = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "GITLAB_TOKEN", "DOCKER_PASSWORD", "PGPASSWORD",
    "AZURE_CLIENT_SECRET", "OPENAI_API_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MY_SECRET",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN", "KUBE_TOKEN", "NPM_TOKEN",
)  # fmt: skip
IN_SECRET = ("MYSQL_PASSWORD", "HF_TOKEN", "SSH_KEY", "TLS_KEY", "DATABASE_URL", "NOTE")
"""Keys beside those that pods ask for."""


def test_forty_secrets_come_out_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    planted = Planted()
    (tmp_path / "site").mkdir()
    with installed(cluster, tmp_path / "site", mlflow=False, image_pull_secrets=["registry"]) as site, processes() as seen:
        plant_in_cluster(site, planted)
        osctl, said = plant_around(site, planted, tmp_path), dict[str, str | bytes]()

        def run(name: str, *words: str, expect: int, with_env: Mapping[str, str] = MappingProxyType({})) -> None:
            # One starts as a person's does, so that its command line is seen.
            typed = Osctl(osctl.folder, {**(osctl.env or {}), **with_env}, warm=name != "launch")
            done = typed(*words, expect=expect, timeout=300)
            said[f"osctl {name}"] = done.stdout + done.stderr

        run("render", "render", "--driver", expect=0)
        run("launch", "launch", "--wait", expect=3)
        for words in ("status -o json", "events -o json", "logs", "diff", "list"):
            run(words, *words.split(), expect=0, with_env={**cluster.s3, "OSCTL_STORE": site.store})
        run("doctor", "doctor", "-o", "json", expect=0)
        assert "AWS_SECRET_ACCESS_KEY=…" in str(said["osctl logs"]), "the trainer's output is there, but for them"
        reasons = [event["detail"] for event in json.loads(said["osctl events -o json"])]
        assert any("KeyError: …" in reason for reason in reasons), reasons

        wrong = {"AWS_SECRET_ACCESS_KEY": planted("a wrong key", "a/b+")}
        run("with a wrong key", "status", expect=4, with_env=wrong)
        proxy = f"http://me:{planted('proxy')}@127.0.0.1:9"
        run("behind a proxy", "launch", expect=5, with_env=dict.fromkeys(("HTTPS_PROXY", "https_proxy", "no_proxy"), proxy))
        broken = tmp_path / "broken.kubeconfig"
        content = yaml.safe_load(cluster.kubeconfig.read_text())
        content["users"][0]["user"] = {"token": planted("a stranger's token")}
        broken.write_text(yaml.safe_dump(content))
        run("as a stranger", "launch", expect=4, with_env={"KUBECONFIG": str(broken)})
        content["users"][0]["user"] = {"token": f"{planted('a token with a line break')}\nx"}
        broken.write_text(yaml.safe_dump(content))
        run("with a line break", "launch", expect=5, with_env={"KUBECONFIG": str(broken)})
        url = f"s3://AKIA:{planted('store')}@bucket/x"
        run("with keys in OSCTL_STORE", "status", expect=2, with_env={"OSCTL_STORE": url})
        url = f"http://me:{planted('tracking')}@mlflow:5000"
        run("with a password in OSCTL_TRACKING", "launch", expect=2, with_env={"OSCTL_TRACKING": url})
        profile = yaml.safe_load(site.profile.read_text())
        bad = tmp_path / "bad.yaml"
        for field, value in (
            ("s3_endpoint", f"http://me:{planted('s3_endpoint')}@s3:9000"),
            ("s3_secret", planted("s3_secret", "a/b+")),
            ("driver_image", f"me:{planted('driver_image')}@registry/osctl:1"),
            ("aws_secret_access_key", planted("unknown field")),
        ):
            bad.write_text(yaml.safe_dump(profile | {field: value}))
            run(f"with a bad {field}", "launch", "--cluster", str(bad), expect=2)

        said |= everything(site, osctl)
        said["command lines"] = "\n".join(sorted(seen))
        kinds = {name.partition("/")[0] for name in said}
        assert {"Pod", "PyTorchJob.kubeflow.org", "Job.batch", "Event", "log of", "ledger", "ConfigMap"} <= kinds, kinds
        assert "osctl launch --wait" in said["command lines"]
        assert len(planted.values) >= 40, len(planted.values)
        assert planted.found_in(said) == []

        leak(site, osctl, planted)
        found = planted.found_in(everything(site, osctl))
        places = {place.partition(" in ")[2].partition("/")[0] for place in found}
        assert places == {"ConfigMap", "Event", "Event.events.k8s.io", "ledger", ".osctl"}, found


def plant_in_cluster(site: Site, planted: Planted) -> None:
    """By standard input, so that no command line has them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        planted.add(f"{name} of the pods", site.cluster.s3[name])
    keys = {name: base64.b64encode(planted(f"{name} in the Secret").encode()).decode() for name in IN_SECRET}
    secret = site.json("get", "secret", "osctl-s3")
    site.cluster.kubectl("-n", site.namespace, "patch", "secret", "osctl-s3", "--patch-file=/dev/stdin", stdin=json.dumps({"data": keys}))
    login = {"username": "me", "password": planted("registry"), "auth": base64.b64encode(planted("registry, auth").encode()).decode()}
    pull = {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "registry", "namespace": site.namespace},
        "type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": json.dumps({"auths": {"registry.example": login}})},
    }  # fmt: skip
    site.cluster.kubectl("create", "-f", "-", stdin=json.dumps(pull))
    assert secret["data"]


def plant_around(site: Site, planted: Planted, folder: Path) -> Osctl:
    """In the environment of the person's commands, in their kubeconfig, and a trainer that tells all."""
    config = yaml.safe_load(site.cluster.kubeconfig.read_text())
    site.cluster.kubectl("-n", site.namespace, "create", "serviceaccount", "person")
    person = f"--serviceaccount={site.namespace}:person"
    site.cluster.kubectl("-n", site.namespace, "create", "rolebinding", "person", "--clusterrole=cluster-admin", person)
    token = site.cluster.kubectl("-n", site.namespace, "create", "token", "person").strip()
    planted.add("kubeconfig's token", token.rpartition(".")[2])  # its signature; the rest is in every token of this cluster
    config["users"][0]["user"] = {"token": token}
    config["users"].append({"name": "other", "user": {"token": planted("another user's token")}})
    config["users"].append({"name": "third", "user": {"username": "me", "password": planted("another user's password")}})
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    env = {**site.env, "KUBECONFIG": str(kubeconfig), **{name: planted(name) for name in IN_ENVIRONMENT}}
    env["DATABASE_URL"] = f"postgresql://me:{planted('DATABASE_URL')}@db/x"
    osctl = site.osctl(folder / "telltale", nodes=1, stages=1, devices=1, trainer=["sh", "-c", TELLTALE])
    path = osctl.folder / "osctl.yaml"
    content = yaml.safe_load(path.read_text())
    content["stages"][0]["max_attempts"] = 1
    path.write_text(yaml.safe_dump(content))
    return Osctl(osctl.folder, env)


def everything(site: Site, osctl: Osctl) -> dict[str, str | bytes]:
    """All objects of the namespace but Secrets, logs of its pods, the ledger, and what osctl left in its folder."""
    kubectl, found = site.cluster.kubectl, dict[str, str | bytes]()
    kinds = set(kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()) - {"secrets"}
    for one in json.loads(kubectl("-n", site.namespace, "get", ",".join(kinds), "-o", "json", "--show-managed-fields"))["items"]:
        group = one["apiVersion"].rpartition("/")[0]
        found[f"{one['kind']}{group and '.'}{group}/{one['metadata']['name']}"] = json.dumps(one, ensure_ascii=False)
    for pod in site.json("get", "pods")["items"]:
        name = pod["metadata"]["name"]
        found[f"log of/{name}"] = kubectl("-n", site.namespace, "logs", name, "--all-containers", check=False)
    store = S3Store(site.store, env={**site.cluster.s3})
    found |= {f"ledger/{key}": store.read(key).data for key in store.list("")}
    found |= {str(path.relative_to(osctl.folder)): path.read_bytes() for path in (osctl.folder / ".osctl").rglob("*") if path.is_file()}
    return found


def leak(site: Site, osctl: Osctl, planted: Planted) -> None:
    """One of them, where it must not be: the search has to find it."""
    value = planted.values["HF_TOKEN"]
    meta = {"name": "leak", "namespace": site.namespace}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"x": value}}
    about = {"kind": "Pod", "name": "leak", "namespace": site.namespace}
    event = {"apiVersion": "v1", "kind": "Event", "metadata": meta, "involvedObject": about, "reason": "Leak", "message": value}
    site.cluster.kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": [config, event]}))
    S3Store(site.store, env={**site.cluster.s3}).create("telltale/leak.json", json.dumps({"x": value}).encode())
    (osctl.folder / ".osctl/log").mkdir(parents=True, exist_ok=True)
    (osctl.folder / ".osctl/log/leak").write_text(value)


@contextlib.contextmanager
def processes() -> Iterator[set[str]]:
    """Command lines of all processes of this machine, pods' among them, as they come and go."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.3):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=look, name="processes")
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
