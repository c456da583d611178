"""Whether a queue of Kueue leaves an attempt's pods as osctl writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifest_specs
import pytest
from fake_api_server import FakeApiServer, Fault, serve

from orchestrator.errors import Refused
from orchestrator.kube.client import Api
from orchestrator.pipelines import kueue_checks
from orchestrator.pipelines.cluster_checks import NotChecked
from orchestrator.pipelines.operator_checks import V1, V2

GROUP = "/apis/kueue.x-k8s.io"
PROFILE = manifest_specs.h800().model_copy(update={"queue": "kueue", "kueue_queue": "train", "namespace": "osctl"})
SPOT = [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeApiServer, Api]]:
    """A queue of two flavors, of which the second has tolerations."""
    with serve() as fake:
        one = [{"name": "one", "context": {"cluster": "c", "user": "u"}}]
        content = {"current-context": "one", "contexts": one, "clusters": [{"name": "c", "cluster": {"server": fake.url}}]}
        (tmp_path / "kubeconfig").write_text(json.dumps({**content, "users": [{"name": "u", "user": {"token": "t"}}]}))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        flavors: list[dict[str, Any]] = [{"name": "h800", "resources": []}, {"name": "spot", "resources": []}]
        fake.objects |= {
            GROUP: {"versions": [{"version": "v1beta2"}]},
            f"{GROUP}/v1beta2/namespaces/osctl/localqueues/train": {"spec": {"clusterQueue": "gpus"}},
            f"{GROUP}/v1beta2/clusterqueues/gpus": {"spec": {"resourceGroups": [{"coveredResources": [], "flavors": flavors}]}},
            f"{GROUP}/v1beta2/resourceflavors/h800": {"spec": {"nodeLabels": {"a": "b"}}},
            f"{GROUP}/v1beta2/resourceflavors/spot": {"spec": {"tolerations": SPOT}},
        }
        api = Api.connect(None, "osctl")
        yield fake, api
        api.close()


def test_a_flavor_with_tolerations_is_refused_for_train_jobs_alone(site: tuple[FakeApiServer, Api]) -> None:
    fake, api = site
    with pytest.raises(Refused) as caught:
        kueue_checks.flavors(api, PROFILE, V2)
    assert str(caught.value).startswith("flavor spot has tolerations, and Kueue puts them in place of those of a TrainJob's pods")
    assert f"300 s in place of {PROFILE.lost_node_s}" in str(caught.value)
    assert "adds" in kueue_checks.flavors(api, PROFILE, V1) and "adds" in kueue_checks.flavors(api, PROFILE, None)
    fake.objects[f"{GROUP}/v1beta2/resourceflavors/spot"] = {}
    assert kueue_checks.flavors(api, PROFILE, V2).startswith("no flavor of ClusterQueue gpus has tolerations")


def test_who_may_not_read_flavors_is_told_so(site: tuple[FakeApiServer, Api]) -> None:
    fake, api = site
    fake.faults.append(Fault("GET", "/resourceflavors/h800", status=403, message="forbidden"))
    with pytest.raises(NotChecked, match="you may not read the flavors of ClusterQueue gpus"):
        kueue_checks.flavors(api, PROFILE, V2)


def test_a_rayjob_that_kueue_does_not_know_would_never_start(site: tuple[FakeApiServer, Api]) -> None:
    fake, api = site
    with pytest.raises(NotChecked, match="serves no RayJobs"):
        kueue_checks.rayjobs(api, PROFILE)
    fake.objects["/apis/ray.io/v1"] = {"resources": [{"name": "rayjobs"}]}
    with pytest.raises(Refused, match=r"integrations\.frameworks lacks ray\.io/rayjob"):  # as an API server without that webhook answers
        kueue_checks.rayjobs(api, PROFILE)
