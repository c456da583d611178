"""helm/osctl: what it renders for each site, what it refuses, and that it says the same as k8s/."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.rendering import CHART, OVERLAYS, REPOSITORY, Manifest, chart, ci, helm_template, identity, kustomize, merged, plain
from deploy.restricted import pods, weaknesses
from pod_security import violations

from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.files import shipped_folder
from orchestrator.recipe.yaml_file import read, validate

SITES = sorted(path.stem for path in CHART.glob("ci/*.yaml"))
COMPARED = ("ServiceAccount", "Role", "RoleBinding", "NetworkPolicy")
QUEUES = ("ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass")
OTHER = "registry.example.com/other@sha256:" + "2" * 64


@cache
def _rendered(helm: Path, site: str) -> list[Manifest]:
    return chart(helm, ci(site))


def named(objects: list[Manifest], kind: str, name: str) -> Manifest:
    return next(manifest for manifest in objects if identity(manifest) == (kind, name))


def profile_of(objects: list[Manifest], folder: Path) -> ClusterProfile:
    """As `osctl --cluster` reads it."""
    (folder / "cluster.yaml").write_text(named(objects, "ConfigMap", "osctl-cluster")["data"]["cluster.yaml"])
    return validate(ClusterProfile, read(folder / "cluster.yaml"), "cluster profile")


@pytest.mark.parametrize("site", SITES)
def test_lint_finds_nothing(helm: Path, site: str) -> None:
    done = subprocess.run([helm, "lint", "--strict", CHART, "--values", CHART / "ci" / f"{site}.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_chart_is_the_packages_version() -> None:
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert described["appVersion"] == tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def test_readme_and_schema_are_current() -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "scripts/chart-docs.py", "--check"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_the_schema_allows_no_value_that_values_yaml_does_not_have() -> None:
    """And each it does: `global` is Helm's own."""

    def compare(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        assert schema["additionalProperties"] is False, path
        assert schema["properties"].keys() - {"global"} == values.keys(), path
        for name, value in values.items():
            if isinstance(value, dict) and name not in ("profile", "annotations"):
                compare(schema["properties"][name], value, f"{path}.{name}")

    compare(json.loads((CHART / "values.schema.json").read_text()), yaml.safe_load((CHART / "values.yaml").read_text()), "values")


@pytest.mark.parametrize("site", ["base", "h800-64", "test"])
def test_accounts_roles_and_policies_are_those_of_kustomize(helm: Path, kubectl: Path, site: str) -> None:
    folder = OVERLAYS.parent / "base" if site == "base" else OVERLAYS / site
    source = {identity(manifest): plain(manifest) for manifest in kustomize(kubectl, folder) if manifest["kind"] in COMPARED}
    ours = {identity(manifest): plain(manifest) for manifest in _rendered(helm, site) if manifest["kind"] in COMPARED}
    assert ours.pop(("ServiceAccount", "osctl-mlflow"))["automountServiceAccountToken"] is False  # kustomize installs no MLflow
    for manifest in ours.values():
        if manifest["kind"] == "ServiceAccount":
            manifest["metadata"].pop("annotations", None)  # workload identity is the site's
    assert len(source) == 14
    assert ours == source


def test_queues_are_those_of_kustomize(helm: Path, kubectl: Path) -> None:
    def said(objects: list[Manifest]) -> dict[tuple[str, str], Manifest]:
        return {identity(manifest): as_text(plain(manifest)) for manifest in objects if manifest["kind"] in QUEUES}

    source = said(kustomize(kubectl, OVERLAYS / "h800-64-kueue"))
    assert {kind for kind, _ in source} == set(QUEUES)
    assert said(_rendered(helm, "h800-64-kueue")) == source


def as_text(value: Any) -> Any:
    """The same with numbers as text: Helm's values hold 1024 where k8s/ has "1024"."""
    if isinstance(value, dict):
        return {key: as_text(each) for key, each in value.items()}
    return [as_text(each) for each in value] if isinstance(value, list) else str(value)


def test_no_queue_is_made_unless_asked_for(helm: Path) -> None:
    values = merged(ci("h800-64-kueue"), {"kueue": {"create": False}})
    assert not [manifest for manifest in chart(helm, values) if manifest["kind"] in QUEUES]


def test_queues_of_two_teams_say_what_their_values_say(helm: Path) -> None:
    flavors = [{"name": "h800", "quota": {"nvidia.com/gpu": 32}, "borrowing": {"nvidia.com/gpu": 0}, "lending": {"nvidia.com/gpu": 16}}]
    queues = [
        {"name": "one", "cohort": "all", "weight": 2, "flavors": flavors, "strategy": "StrictFIFO"},
        {"name": "two", "cohort": "all", "flavors": flavors, "namespaces": ["a", "b"], "preemption": {"withinClusterQueue": "Never"}},
    ]
    locals_ = [{"name": "train", "clusterQueue": "one", "weight": "0.5"}]
    objects = chart(helm, merged(ci("base"), {"kueue": {"create": True, "clusterQueues": queues, "localQueues": locals_}}))
    one, two = (named(objects, "ClusterQueue", name)["spec"] for name in ("one", "two"))
    assert (one["cohortName"], one["fairSharing"], two["fairSharing"]) == ("all", {"weight": "2"}, {"weight": "1"})
    assert one["queueingStrategy"] == "StrictFIFO"
    assert two["namespaceSelector"]["matchExpressions"][0]["values"] == ["a", "b"]
    assert two["preemption"] == {"withinClusterQueue": "Never"}
    assert one["resourceGroups"][0]["flavors"][0]["resources"] == [
        {"name": "nvidia.com/gpu", "nominalQuota": "32", "borrowingLimit": "0", "lendingLimit": "16"}
    ]
    assert named(objects, "LocalQueue", "train")["spec"] == {"clusterQueue": "one", "fairSharing": {"weight": "0.5"}}


def test_every_chart_object_lies_in_the_releases_namespace(helm: Path) -> None:
    objects = chart(helm, ci("test"), namespace="elsewhere")
    assert not {manifest["metadata"].get("namespace", "elsewhere") for manifest in objects} - {"elsewhere"}
    assert {manifest["kind"] for manifest in objects} <= {
        *COMPARED, "ConfigMap", "Service", "Deployment", "Pod", "PersistentVolumeClaim",
    }  # fmt: skip
    text = yaml.safe_dump(objects)
    assert "osctl.svc" not in text and "namespace: osctl" not in text


@pytest.mark.parametrize("site", SITES)
def test_every_pod_is_restricted_and_more(helm: Path, site: str) -> None:
    found = [(manifest["metadata"]["name"], pod) for manifest in _rendered(helm, site) for _, pod in pods(manifest)]
    assert {name for name, _ in found} >= {"osctl-test"}
    for name, pod in found:
        assert not violations(pod) and not weaknesses(pod), name


@pytest.mark.parametrize("site", SITES)
def test_every_pod_is_selected_by_the_policy_of_its_role(helm: Path, site: str) -> None:
    """Default-deny shuts off whoever no policy names."""
    objects = _rendered(helm, site)
    policies = {manifest["metadata"]["name"]: manifest for manifest in objects if manifest["kind"] == "NetworkPolicy"}
    for manifest in objects:
        for _, pod in pods(manifest):
            role = pod["metadata"]["labels"]["osctl/role"]
            assert not policies or policies[f"osctl-{role}"]["spec"]["podSelector"]["matchLabels"] == {"osctl/role": role}


@pytest.mark.parametrize("site", SITES)
def test_selectors_hold_across_versions(helm: Path, site: str) -> None:
    """A Deployment's selector cannot be changed: what changes with a release must not be in it."""
    for manifest in _rendered(helm, site):
        if manifest["kind"] == "Deployment":
            selector = manifest["spec"]["selector"]["matchLabels"]
            assert selector.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance", "osctl/role"}
            assert selector == manifest["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("site", SITES)
def test_the_profile_is_one_that_osctl_reads(helm: Path, site: str, tmp_path: Path) -> None:
    profile = profile_of(_rendered(helm, site), tmp_path)
    assert (profile.namespace, profile.service_account, profile.driver_service_account) == ("osctl", "osctl-trainer", "osctl-driver")


@pytest.mark.parametrize(("site", "shipped"), [("h800-64", "h800-64"), ("trial", "kind-cpu")])
def test_the_profile_says_what_the_shipped_one_does(helm: Path, site: str, shipped: str, tmp_path: Path) -> None:
    ours = profile_of(_rendered(helm, site), tmp_path)
    theirs = validate(ClusterProfile, read(shipped_folder() / "clusters" / f"{shipped}.yaml"), "cluster profile")
    assert ours.model_copy(update={"allow_unpinned": ()}) == theirs.model_copy(update={"allow_unpinned": ()})


def test_every_field_of_a_profile_may_be_given() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["profile"]
    assert schema["properties"].keys() == ClusterProfile.model_fields.keys() - {"namespace", "service_account", "driver_service_account"}


def test_mlflow_is_told_each_of_its_names_with_and_without_the_port(helm: Path) -> None:
    """MLflow compares the whole Host header, and clients leave a port out where it is the scheme's own."""
    (pod,) = [pod for _, pod in pods(named(_rendered(helm, "h800-64"), "Deployment", "osctl-mlflow"))]
    (allowed,) = [word for word in pod["spec"]["containers"][0]["args"] if word.startswith("--allowed-hosts=")]
    hosts = allowed.partition("=")[2].split(",")
    for name in ("osctl-mlflow", "osctl-mlflow.osctl", "osctl-mlflow.osctl.svc", "osctl-mlflow.osctl.svc.cluster.local"):
        assert {name, f"{name}:5000"} <= set(hosts)
    assert "mlflow.example.com" in hosts and "*" not in hosts


def test_a_postgres_uri_is_named_and_never_held(helm: Path) -> None:
    (pod,) = [pod for _, pod in pods(named(_rendered(helm, "postgres"), "Deployment", "osctl-mlflow"))]
    (container,) = pod["spec"]["containers"]
    (variable,) = [each for each in container["env"] if each["name"] == "MLFLOW_BACKEND_STORE_URI"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "osctl-postgres", "key": "uri"}}
    assert not any("backend-store-uri" in word for word in container["args"])


def test_a_store_inside_the_cluster_is_off_unless_asked_for(helm: Path) -> None:
    for site in SITES:
        assert any(manifest["metadata"]["name"] == "osctl-s3" for manifest in _rendered(helm, site)) is (site == "trial")


def test_a_sqlite_that_stays_has_a_claim_and_one_writer(helm: Path) -> None:
    objects = _rendered(helm, "h800-64")
    deployment = named(objects, "Deployment", "osctl-mlflow")["spec"]
    assert named(objects, "PersistentVolumeClaim", "osctl-mlflow")["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "osctl-mlflow"}} in deployment["template"]["spec"]["volumes"]


REFUSED = {
    "an unknown key": ({"storr": "s3://osctl/runs"}, "storr"),
    "an unknown key deep inside": ({"mlflow": {"sqlite": {"sise": "5Gi"}}}, "sise"),
    "an unknown field of the profile": ({"profile": {"gpu_resourse": "nvidia.com/gpu"}}, "gpu_resourse"),
    "a field that the chart says itself": ({"profile": {"namespace": "other"}}, "namespace"),
    "a profile without its image": ({"profile": {"image": None}}, "image"),
    "a port above 65535": ({"network": {"s3": {"port": 70000}}}, "port"),
    "a port in quotes": ({"network": {"s3": {"port": "443"}}}, "port"),
    "port 0": ({"network": {"apiServer": {"ports": [0]}}}, "ports"),
    "an image by its tag": ({"profile": {"image": "registry.example.com/osctl-trainer:latest"}}, "image"),
    "a driver by its tag": ({"profile": {"driver_image": "registry.example.com/osctl:1.0"}}, "driver_image"),
    "a digest cut short": ({"profile": {"image": "registry.example.com/osctl-trainer@sha256:00"}}, "image"),
    "an MLflow by its tag": ({"mlflow": {"image": "registry.example.com/mlflow:3"}}, "mlflow.image"),
    "a tag where another one is allowed": (
        {"profile": {"allow_unpinned": ["registry.example.com/a:1"], "image": "registry.example.com/b:1"}}, "registry.example.com/b:1",
    ),
    "no store": ({"store": ""}, "store"),
    "a folder as store": ({"store": "/mnt/runs"}, "store"),
    "artifacts inside of the store": ({"mlflow": {"artifacts": "s3://osctl/runs/mlflow"}}, "inside of the store"),
    "no artifacts": ({"mlflow": {"artifacts": ""}}, "artifacts"),
    "every host": ({"mlflow": {"allowedHosts": ["*"]}}, "allowedHosts"),
    "two hosts in one": ({"mlflow": {"allowedHosts": ["a.example.com,*"]}}, "allowedHosts"),
    "no worker": ({"mlflow": {"workers": 0}}, "workers"),
    "no address of the store": ({"network": {"s3": {"cidrs": []}}}, "network.s3.cidrs"),
    "no address of the API server": ({"network": {"apiServer": {"cidrs": []}}}, "network.apiServer.cidrs"),
    "a name as address": ({"network": {"s3": {"cidrs": ["s3.example.com"]}}}, "cidrs"),
    "half of the internet": ({"network": {"s3": {"cidrs": ["128.0.0.0/1"]}}}, "cidrs"),
    "the metadata server": ({"network": {"s3": {"cidrs": ["169.254.169.254/32"]}}}, "169.254.169.254"),
    "the metadata server inside of more": ({"network": {"apiServer": {"cidrs": ["169.128.0.0/9"]}}}, "169.254.169.254"),
    "Postgres with the driver's image": ({"mlflow": {"postgres": {"secret": "db", "cidrs": ["10.0.0.1/32"]}}}, "mlflow.image"),
    "Postgres without an address": ({"mlflow": {"image": OTHER, "postgres": {"secret": "db"}}}, "mlflow.postgres.cidrs"),
    "two MLflows": ({"profile": {"tracking": "https://mlflow.example.com"}}, "profile.tracking"),
    "no group": ({"users": {"groups": []}}, "groups"),
    "everybody": ({"users": {"groups": ["system:authenticated"]}}, "groups"),
    "a trial store without an image": ({"s3": {"trial": {"enabled": True}}}, "image"),
    "a trial store without keys": ({"s3": {"trial": {"enabled": True, "image": OTHER}}}, "profile.s3_secret"),
    "a trial store beside another": (
        {"profile": {"s3_secret": "keys", "s3_endpoint": "https://s3.example.com"}, "s3": {"trial": {"enabled": True, "image": OTHER}}},
        "profile.s3_endpoint",
    ),
    "another MLflow without its address": (
        {"profile": {"tracking": "https://mlflow.example.com"}, "mlflow": {"enabled": False}}, "network.tracking.cidrs",
    ),
    "keys in the endpoint": ({"profile": {"s3_endpoint": "http://AKIA:hunter2@s3.example.com"}}, "profile.s3_endpoint: holds credentials"),
    "a password for MLflow": (
        {"profile": {"tracking": "http://me:hunter2@mlflow.example.com"}, "mlflow": {"enabled": False}},
        "profile.tracking: holds credentials",
    ),
    "keys in the store's URL": ({"store": "s3://AKIA:hunter2@osctl/runs"}, "store: holds credentials"),
    "keys in MLflow's store": ({"mlflow": {"artifacts": "s3://AKIA:hunter2@mlflow"}}, "mlflow.artifacts: holds credentials"),
    "flavors with quotas of different resources": (
        {
            "kueue": {
                "create": True,
                "clusterQueues": [
                    {"name": "q", "flavors": [{"name": "a", "quota": {"cpu": 1}}, {"name": "b", "quota": {"memory": "1Gi"}}]},
                ],
            }
        },
        "name the same resources in both",
    ),
    "a quota that is no quantity": (
        {"kueue": {"clusterQueues": [{"name": "q", "flavors": [{"name": "a", "quota": {"cpu": "four"}}]}]}}, "cpu",
    ),
    "a price that is no number": ({"profile": {"price": {"usd_per_hour": "two", "source": "us", "date": "2026-11-01"}}}, "usd_per_hour"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(helm: Path, name: str) -> None:
    changes, said = REFUSED[name]
    rendered = helm_template(helm, merged(ci("base"), changes))
    assert rendered.returncode, f"{name}: was rendered"
    assert said in rendered.stderr
    assert "hunter2" not in rendered.stderr


def test_an_image_by_its_tag_is_taken_where_it_is_allowed_by_name(helm: Path) -> None:
    tag = "registry.example.com/osctl:dev"
    objects = chart(helm, merged(ci("base"), {"profile": {"driver_image": tag, "allow_unpinned": [tag]}}))
    assert next(pods(named(objects, "Deployment", "osctl-mlflow")))[1]["spec"]["containers"][0]["image"] == tag


def test_the_whole_internet_leaves_out_what_is_private(helm: Path) -> None:
    policy = named(_rendered(helm, "h800-64"), "NetworkPolicy", "osctl-trainer")
    assert policy["spec"]["egress"][0]["to"][0]["ipBlock"]["except"] == [
        "10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
    ]  # fmt: skip


def test_the_notes_say_the_next_commands(helm: Path) -> None:
    command = [helm, "install", "osctl", CHART, "--dry-run=client", "--namespace", "osctl", "--values", CHART / "ci/test.yaml"]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("NOTES:")[2]
    for said in ("create secret generic osctl-s3", "helm test osctl -n osctl", "osctl launch", "--store s3://osctl/runs", "port-forward"):
        assert said in notes
