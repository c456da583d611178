"""kubeflow-training's own client on what osctl launched: whoever knows that client finds, waits for and reads our jobs with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.pipelines import Site, ended, installed, until
from conftest import Cluster
from kubeflow.training import TrainingClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=False) as site:
        yield site


def test_the_training_client_finds_waits_for_and_reads_a_job_that_osctl_launched(site: Site, tmp_path: Path) -> None:
    osctl = site.osctl(tmp_path / "by-training-client", stages=1, tracking="none")
    client = TrainingClient(config_file=str(site.cluster.kubeconfig), namespace=site.namespace)
    osctl("launch")

    def found() -> list[Any]:
        return [job for job in client.list_jobs() if job.metadata.labels["osctl/pipeline"] == "by-training-client"]

    (job,) = until("it is listed", found)
    name = job.metadata.name
    assert job.spec.pytorch_replica_specs["Worker"].replicas == 2
    assert job.spec.run_policy.clean_pod_policy == "Running"
    assert job.spec.elastic_policy.rdzv_backend == "c10d"
    done = client.wait_for_job_conditions(name, expected_conditions={"Succeeded"}, wait_timeout=240, polling_interval=1)
    assert client.is_job_succeeded(job=done) and not client.is_job_failed(job=done)
    names = [f"{name}-worker-{index}" for index in range(2)]
    assert sorted(client.get_job_pod_names(name)) == names
    logs, events = client.get_job_logs(name, is_master=False, verbose=True)
    assert sorted(logs) == names and all(text.strip() for text in logs.values()), logs
    assert any(name in about for about in events)
    assert ended(osctl)["state"] == "succeeded"
