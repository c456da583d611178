"""What our objects are called."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from manifest_specs import Spec, specs

from orchestrator.kube import names


def test_two_stores_never_meet_in_a_namespace() -> None:
    key = "demo/stage1@0123456789ab/a1"
    assert names.job_name("s3://a", key) != names.job_name("s3://b", key)
    assert names.job_name("s3://a", key) == names.job_name("s3://a", key)
    assert names.job_name("s3://a", key).startswith("demo-stage1-a1-")


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(specs())
def test_the_name_of_every_job_of_ours_is_known_for_one(spec: Spec) -> None:
    name = names.job_name(spec.store_url, spec.intent.run_key)
    nothing = [None, None, None]
    pods = {f"{name}-worker-12": ["12", None, None], f"{name}-w-0-12-x7k2p": [None, "-w-0", "12"]}
    for about, parts in {name: nothing, **pods, f"{name}-w-0": [None, "-w-0", None]}.items():
        found = names.ATTEMPT_NAME.fullmatch(about)
        assert found is not None and list(found.groups()) == [name, *parts], about
