"""How a person names store and cluster: by a flag or by `--set`, and what is said where both say something."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.pipelines.host import Host
from orchestrator.pipelines.workspace import Workspace, cluster_at


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host.here({}, tmp_path / "home")


@pytest.mark.parametrize(("flag", "value"), [("cluster", "kind-cpu"), ("store", "here"), ("tracking", "none"), ("backend", "local")])
def test_a_flag_and_a_setting_of_the_same_field_must_agree(host: Host, flag: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        Workspace.open("demo", settings=[f"{flag}=1"], host=host, **{flag: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"--{flag} {value}: but --set {flag}=1 says something else. Leave one of the two out"
    Workspace.open("demo", settings=[f"{flag}={value}"], host=host, **{flag: value})  # type: ignore[arg-type]


def test_a_cluster_that_is_set_is_used_as_one_that_is_named(host: Host) -> None:
    pipeline = Workspace.open("demo", settings=["cluster=kind-cpu"], host=host).pipeline
    assert pipeline == Workspace.open("demo", cluster="kind-cpu", host=host).pipeline
    assert pipeline.backend == "kubernetes" and pipeline.cluster is not None and pipeline.cluster.name == "kind-cpu"
    with pytest.raises(UsageError, match="no such file or shipped cluster profile: '1'"):
        Workspace.open("demo", settings=["cluster=1"], host=host)
    with pytest.raises(UsageError, match=r"^--set cluster=1: this pipeline runs on this machine and has no cluster profile"):
        Workspace.open("demo", settings=["cluster=1"], backend="local", host=host)


def test_a_variable_gives_way_to_both(host: Host) -> None:
    there = Host.here({"OSCTL_CLUSTER": "of-the-variable"}, host.home)
    assert cluster_at(None, None, there) == "of-the-variable"
    assert cluster_at("named", ["cluster=set"], there) == "named"
    assert cluster_at(None, ["stage1.steps=1", "cluster=set"], there) is None, "so that `--set` says it"
