"""k8s/: who may do what, who may talk to whom. Structure alone; tests/cluster/test_deploy.py asks the real API server about roles.

Network policies are only looked at: no cluster of these tests enforces them.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from deploy.rendering import CACHE, OVERLAYS, REPOSITORY, Manifest, identity, kustomize
from deploy.restricted import pods, weaknesses
from deploy.rights import OF_DRIVER, OF_USER, Rights
from manifest_specs import intent, open_sora
from pod_security import violations

from orchestrator.kube.jobs import driver_job
from orchestrator.kube.manifest import pytorch_job
from orchestrator.kube.nodes import quantity
from orchestrator.kube.operator import OPERATORS
from orchestrator.kube.prepare_job import prepare_job
from orchestrator.pipelines.cluster_checks import KUEUE_RIGHTS, RAY_RIGHTS, RIGHTS
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.files import shipped_folder
from orchestrator.recipe.yaml_file import read, validate

SITES = sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))
QUEUES = {"ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}
METADATA_SERVER = ipaddress.ip_address("169.254.169.254")

OF_OPERATORS = list(itertools.chain.from_iterable(one.rights for one in OPERATORS))


def test_the_shipped_overlays_are_found() -> None:
    """Else the tests below would pass by looking at nothing."""
    assert SITES == ["h800-64", "h800-64-kueue", "test"]


@pytest.fixture(scope="module", params=["base", *SITES])
def site(request: pytest.FixtureRequest, kubectl: Path) -> list[Manifest]:
    return kustomize(kubectl, OVERLAYS.parent / "base" if request.param == "base" else OVERLAYS / request.param)


@pytest.fixture(scope="module")
def h800(kubectl: Path) -> list[Manifest]:
    return kustomize(kubectl, OVERLAYS / "h800-64")


def profile(name: str) -> ClusterProfile:
    return validate(ClusterProfile, read(shipped_folder() / "clusters" / f"{name}.yaml"), "cluster profile")


def of_kind(objects: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in objects if manifest["kind"] == kind}


def rights(role: Manifest) -> Rights:
    return {
        (group, resource): tuple(rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"] for resource in rule["resources"]
    }


def addresses(policy: Manifest) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for rule in policy["spec"].get("egress", []):
        for peer in rule.get("to", []):
            if "ipBlock" in peer:
                yield peer["ipBlock"], rule.get("ports", [])


def test_every_kustomization_that_needs_no_network_builds(kubectl: Path) -> None:
    local = [path for path in sorted(REPOSITORY.glob("k8s/**/kustomization.yaml")) if "https://" not in path.read_text()]
    assert len(local) > 3
    for found in local:
        assert kustomize(kubectl, found.parent), found


def test_the_overlay_of_another_namespace_that_the_page_shows_leaves_nothing_in_osctl(kubectl: Path, tmp_path: Path) -> None:
    shown = re.findall(
        r"```yaml\n# kustomization.yaml, in a folder team-a[^\n]*\n(.*?)```", (REPOSITORY / "docs/cluster.md").read_text(), re.DOTALL
    )
    assert len(shown) == 1
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    (tmp_path / "k8s/overlays/team-a").mkdir()
    (tmp_path / "k8s/overlays/team-a/kustomization.yaml").write_text(shown[0])
    objects = kustomize(kubectl, tmp_path / "k8s/overlays/team-a")
    assert set(of_kind(objects, "Namespace")) == {"team-a"}
    for one in objects:
        assert one["metadata"].get("namespace") in (None, "team-a"), identity(one)
        assert {subject.get("namespace") for subject in one.get("subjects", ())} <= {None, "team-a"}, identity(one)


def version_in_cluster(module: str, of: str) -> str:
    """The version of a Go module that the test cluster runs."""
    return (REPOSITORY / f"tests/cluster/go/{of}/go.mod").read_text().partition(f"{module} ")[2].split()[0]


def test_the_operator_is_pinned_and_schedules_gangs() -> None:
    """Its remote base cannot be fetched here; tests/cluster runs the same version with the same flags."""
    (base,) = yaml.safe_load((REPOSITORY / "k8s/operator/kustomization.yaml").read_text())["resources"]
    assert base.endswith(f"?ref={version_in_cluster('github.com/kubeflow/training-operator', 'training-operator')}")
    ours, tested = (
        (REPOSITORY / folder / "kustomization.yaml").read_text() for folder in ("k8s/operator", "tests/cluster/conf/training-operator")
    )
    for flag in ("--enable-scheme=pytorchjob", "--gang-scheduler-name="):
        assert flag in ours and flag in tested


@pytest.mark.parametrize(("name", "module"), [("trainer", "github.com/kubeflow/trainer/v2"), ("kueue", "sigs.k8s.io/kueue")])
def test_trainer_and_kueue_are_those_of_the_test_cluster(name: str, module: str) -> None:
    """Their remote bases cannot be fetched here."""
    (base,) = yaml.safe_load((REPOSITORY / "k8s" / name / "kustomization.yaml").read_text())["resources"]
    assert re.search(rf"[=/]{re.escape(version_in_cluster(module, name))}(/|$)", base)


def test_kueues_settings_replace_its_own_and_are_those_that_were_tried(
    kubectl: Path, tmp_path: Path, require: Callable[[str, str], NoReturn]
) -> None:
    """On the manifests of the same version that tests/cluster/build takes out of Kueue's module."""
    manifests = CACHE / "manifests/kueue.yaml"
    if not manifests.exists():
        require("cluster", "no manifests of Kueue; tests/cluster/build brings them")
    (tmp_path / "manifests.yaml").write_text(manifests.read_text())
    (tmp_path / "settings.yaml").write_text((REPOSITORY / "k8s/kueue/settings.yaml").read_text())
    ours = yaml.safe_load((REPOSITORY / "k8s/kueue/kustomization.yaml").read_text())
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({**ours, "resources": ["manifests.yaml"]}))
    patched = of_kind(kustomize(kubectl, tmp_path), "ConfigMap")["kueue-manager-config"]["data"]
    settings = yaml.safe_load(patched["controller_manager_config.yaml"])
    tested = yaml.safe_load((REPOSITORY / "tests/cluster/conf/kueue/controller_manager_config.yaml").read_text())
    for key in ("apiVersion", "manageJobsWithoutQueueName", "integrations", "fairSharing"):
        assert settings[key] == tested[key], key


def test_the_queues_cover_what_an_attempt_requests_and_hold_the_published_gang(kubectl: Path) -> None:
    """Kueue never admits a job that requests what its ClusterQueue does not name."""
    (queue,) = of_kind(kustomize(kubectl, OVERLAYS / "h800-64-kueue"), "ClusterQueue").values()
    (group,) = queue["spec"]["resourceGroups"]
    job = pytorch_job(intent("open-sora-1.0", "stage2", "0" * 12, 8, 8, 8), profile("h800-64"), "s3://osctl/runs")
    requests = [pod["spec"]["containers"][0]["resources"]["requests"] for _, pod in pods(job)] * 8
    quota = {one["name"]: one["nominalQuota"] for one in group["flavors"][-1]["resources"]}
    for name in requests[0]:
        assert sum(quantity(one[name]) for one in requests) <= quantity(quota[name]), name
    assert all([one["name"] for one in flavor["resources"]] == group["coveredResources"] for flavor in group["flavors"])


def test_the_operators_patch_fits_its_deployment(kubectl: Path, tmp_path: Path, require: Callable[[str, str], NoReturn]) -> None:
    """On the Deployment of the same version that tests/cluster/build takes out of the operator's module."""
    deployment = CACHE / "manifests/training-operator/deployment.yaml"
    if not deployment.exists():
        require("cluster", "no manifests of the operator; tests/cluster/build brings them")
    ours = yaml.safe_load((REPOSITORY / "k8s/operator/kustomization.yaml").read_text())
    (tmp_path / "deployment.yaml").write_text(deployment.read_text())
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({**ours, "resources": ["deployment.yaml"]}))
    (patched,) = kustomize(kubectl, tmp_path)
    arguments = patched["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["--enable-scheme=pytorchjob", "--gang-scheduler-name=scheduler-plugins-scheduler"]


def test_the_verbs_are_these_and_no_others(site: list[Manifest]) -> None:
    roles = of_kind(site, "Role")
    assert {name: rights(role) for name, role in roles.items()} == {"osctl-driver": OF_DRIVER, "osctl-user": OF_USER}
    assert not [manifest for manifest in site if manifest["kind"].startswith("ClusterRole")]
    words = {word for role in roles.values() for rule in role["rules"] for word in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])}
    assert not words & {"*", "secrets", "pods/exec", "pods/attach", "serviceaccounts/token", "impersonate", "escalate", "bind"}


def test_a_person_needs_what_doctor_looks_for() -> None:
    assert {(group, resource): verbs for group, resource, verbs in (*RIGHTS, *OF_OPERATORS, *KUEUE_RIGHTS, *RAY_RIGHTS)} == OF_USER


def test_roles_are_bound_to_the_driver_and_to_a_group_and_to_nobody_else(site: list[Manifest]) -> None:
    bound = {name: (binding["roleRef"]["name"], binding["subjects"]) for name, binding in of_kind(site, "RoleBinding").items()}
    assert bound["osctl-driver"] == ("osctl-driver", [{"kind": "ServiceAccount", "name": "osctl-driver", "namespace": "osctl"}])
    role, (subject,) = bound["osctl-user"]
    assert (role, subject["kind"], len(bound)) == ("osctl-user", "Group", 2)
    assert not subject["name"].startswith("system:")


def test_the_trainers_account_mounts_no_token(site: list[Manifest]) -> None:
    accounts = of_kind(site, "ServiceAccount")
    assert {name: account["automountServiceAccountToken"] for name, account in accounts.items()} == {
        "osctl-trainer": False,
        "osctl-driver": True,
    }


def test_the_namespace_enforces_restricted_at_a_pinned_version(site: list[Manifest]) -> None:
    labels = of_kind(site, "Namespace")["osctl"]["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"] == "v1.34"


def test_nothing_passes_that_no_policy_names(site: list[Manifest]) -> None:
    deny = of_kind(site, "NetworkPolicy")["osctl-default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_no_policy_opens_to_everything(site: list[Manifest]) -> None:
    """An empty peer list, a peer without a selector and a rule without ports each mean "all"."""
    for name, policy in of_kind(site, "NetworkPolicy").items():
        for rule in policy["spec"].get("ingress", []):
            assert rule.get("from"), name
        for rule in policy["spec"].get("egress", []):
            assert rule.get("to"), name
            among_themselves = rule["to"] == [{"podSelector": policy["spec"]["podSelector"]}] and name in ("osctl-trainer", "osctl-prepare")
            assert rule.get("ports") or among_themselves, name
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            for peer in rule.get("from", rule.get("to")):
                assert all(peer.values()), f"{name}: {peer} selects everything"


def test_no_pod_reaches_the_clouds_metadata_server(site: list[Manifest]) -> None:
    for name, policy in of_kind(site, "NetworkPolicy").items():
        for block, _ in addresses(policy):
            left_out = [ipaddress.ip_network(each) for each in block.get("except", [])]
            open_to_it = METADATA_SERVER in ipaddress.ip_network(block["cidr"]) and not any(METADATA_SERVER in each for each in left_out)
            assert not open_to_it, f"{name}: {block}"


def test_the_api_server_is_open_to_the_driver_and_to_the_head_of_ray_alone(site: list[Manifest]) -> None:
    open_to = {
        name
        for name, policy in of_kind(site, "NetworkPolicy").items()
        for _, ports in addresses(policy)
        if {"protocol": "TCP", "port": 6443} in ports
    }
    assert open_to == {"osctl-driver", "osctl-prepare-head"}


def test_mlflow_is_open_to_the_driver_and_to_no_trainer(site: list[Manifest]) -> None:
    (rule,) = of_kind(site, "NetworkPolicy")["osctl-mlflow"]["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchExpressions"] == [{"key": "osctl/role", "operator": "In", "values": ["driver", "test"]}]


def test_the_bases_doors_are_shut_until_an_overlay_opens_them(kubectl: Path) -> None:
    nobody = ipaddress.ip_network("192.0.2.0/24")
    for policy in of_kind(kustomize(kubectl, OVERLAYS.parent / "base"), "NetworkPolicy").values():
        assert all(ipaddress.ip_network(block["cidr"]) == nobody for block, _ in addresses(policy))


@pytest.mark.parametrize("name", SITES)
def test_an_overlay_opens_every_door_that_the_base_has(kubectl: Path, name: str) -> None:
    for policy, manifest in of_kind(kustomize(kubectl, OVERLAYS / name), "NetworkPolicy").items():
        assert not any(block["cidr"].startswith("192.0.2.") for block, _ in addresses(manifest)), policy


@pytest.mark.parametrize("name", SITES)
def test_an_overlay_changes_addresses_and_the_group_and_adds_quota_and_priority(kubectl: Path, name: str) -> None:
    base = {identity(manifest): manifest for manifest in kustomize(kubectl, OVERLAYS.parent / "base")}
    overlay = {identity(manifest): manifest for manifest in kustomize(kubectl, OVERLAYS / name)}
    queues = QUEUES if name.endswith("-kueue") else set()
    assert {kind for kind, _ in overlay.keys() - base.keys()} == {"ResourceQuota", "PriorityClass"} | queues
    assert not base.keys() - overlay.keys()
    assert {kind for (kind, each), manifest in overlay.items() if base.get((kind, each), manifest) != manifest} == {
        "RoleBinding",
        "NetworkPolicy",
    }


def test_policies_select_the_pods_that_manifests_make(h800: list[Manifest]) -> None:
    """By the labels that are really on them: a policy that selects nothing protects nothing, and default-deny shuts the pod off."""
    site, pipeline = profile("h800-64"), open_sora().model_copy(update={"cluster": profile("h800-64")})
    trainer = pytorch_job(intent("open-sora-1.0", "stage2", "0" * 12, 1, 8, 8), site, "s3://osctl/runs")
    driver = driver_job(pipeline, "s3://osctl/runs", 1, 1, ["stage2"])
    prepare = prepare_job(site, "s3://osctl/runs", "mine", "0" * 16, 1)
    policies = of_kind(h800, "NetworkPolicy")
    for manifest, name in ((trainer, "osctl-trainer"), (driver, "osctl-driver"), (prepare, "osctl-prepare")):
        selector = policies[name]["spec"]["podSelector"]["matchLabels"]
        assert [selector.items() <= pod["metadata"]["labels"].items() for _, pod in pods(manifest)] == [True]


def test_what_manifests_name_is_there(h800: list[Manifest]) -> None:
    site = profile("h800-64")
    there = {identity(manifest) for manifest in h800}
    assert site.namespace == "osctl"
    for wanted in (
        ("ServiceAccount", site.service_account),
        ("ServiceAccount", site.driver_service_account),
        ("PriorityClass", site.priority_class),
    ):
        assert wanted in there


def test_manifests_pods_pass_the_same_checks_as_the_charts() -> None:
    site, pipeline = profile("h800-64"), open_sora().model_copy(update={"cluster": profile("h800-64")})
    trainer = pytorch_job(intent("open-sora-1.0", "stage2", "0" * 12, 1, 8, 8), site, "s3://osctl/runs")
    driver = driver_job(pipeline, "s3://osctl/runs", 1, 1, ["stage2"])
    prepare = prepare_job(site, "s3://osctl/runs", "mine", "0" * 16, 1)
    for manifest, token in ((trainer, False), (driver, True), (prepare, False)):
        for _, pod in pods(manifest):
            assert not violations(pod) and not weaknesses(pod, token=token)


def test_no_priority_class_throws_others_out_or_is_everybodys(h800: list[Manifest]) -> None:
    classes = of_kind(h800, "PriorityClass")
    assert classes and all(each["preemptionPolicy"] == "Never" and not each.get("globalDefault") for each in classes.values())


@pytest.mark.parametrize("name", SITES)
def test_the_quota_leaves_room_for_a_gang_that_waits_and_one_that_drains(kubectl: Path, name: str) -> None:
    """Their pods exist and count. A quota of just the cluster's GPUs would fail the second pipeline where it should wait."""
    hard = of_kind(kustomize(kubectl, OVERLAYS / name), "ResourceQuota")["osctl"]["spec"]["hard"]
    assert int(hard["requests.nvidia.com/gpu"]) >= 3 * 64
    assert int(hard["pods"]) >= 3 * 8 + 3
