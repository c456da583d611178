"""All that is written is described with the models of the official clients, and the checker of Pod Security sees what breaks it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import manifest_specs
import pytest
from hypothesis import HealthCheck, given, settings
from manifest_specs import Spec, job_of, rendered
from pod_security import violations

from orchestrator.kube import jobs, manifest, parts
from orchestrator.recipe.cluster_profile import ClusterProfile, Toleration


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("KubeflowOrgV1RunPolicy", {"clean_pod_polcy": "Running"}),
        ("KubeflowOrgV1ElasticPolicy", {"min_replica": 2}),
        ("KubeflowOrgV1PyTorchJobSpec", {"pytorch_replica_specs": {}, "nproc_per_nodes": "8"}),
        ("V1Container", {"name": "pytorch", "imagePullPolicy": "Always"}),
        ("V1PodSpec", {"containers": [], "termination_grace_period": 30}),
        ("V1Toleration", {"tolerationSeconds": 90}),
    ],
)
def test_a_field_that_does_not_exist_is_an_error_when_it_is_written(model: str, fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        parts.part(model, **fields)


def test_a_field_that_must_be_there_is_missed_when_it_is_written() -> None:
    with pytest.raises(ValueError, match="name"):
        parts.part("V1Container", image="x")


def test_a_profile_cannot_bring_in_a_field_that_does_not_exist(profile: ClusterProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toleration, "model_dump", lambda self, **_: {"key": self.key, "operater": "Exists"})
    with pytest.raises(TypeError, match="operater"):
        job_of(profile)


PRIMITIVES = {"str": str, "int": int, "bool": bool, "object": object, "datetime": str}


def unknown(value: Any, type_: str, path: str) -> Iterator[str]:
    """Fields of a written object that its model does not have, and values of another type than the model says."""
    if inner := re.fullmatch(r"list\[(.*)\]", type_):
        for number, item in enumerate(value):
            yield from unknown(item, inner[1], f"{path}[{number}]")
    elif inner := re.fullmatch(r"dict\([^,]*, (.*)\)", type_):
        for key, item in value.items():
            yield from unknown(item, inner[1], f"{path}.{key}")
    elif type_ in PRIMITIVES:
        if not isinstance(value, PRIMITIVES[type_]):
            yield f"{path}: {value!r} is no {type_}"
    else:
        model = parts.model(type_)
        types = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
        for key, item in value.items():
            if key in types:
                yield from unknown(item, types[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: no field of {type_}"


@pytest.mark.long
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest_specs.specs())
def test_all_that_is_written_is_what_the_official_models_describe(spec: Spec) -> None:
    assert list(unknown(rendered(spec), "KubeflowOrgV1PyTorchJob", "job")) == []
    driver = jobs.driver_job(manifest_specs.open_sora(), "s3://b/p", 1, 1, ["stage1"])
    assert list(unknown(driver, "V1Job", "driver")) == []


def test_the_checker_of_pod_security_sees_each_rule_broken(profile: ClusterProfile) -> None:
    (good,) = manifest.pods(job_of(profile, nodes=1))
    assert violations(good) == []
    for name, breaks in manifest_specs.BREAKS.items():
        bad = copy.deepcopy(good)
        breaks(bad)
        assert violations(bad), name
