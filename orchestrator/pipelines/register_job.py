"""A data set that only the pods of a cluster see: registered by a Job there, which this process waits for.

What the Job runs is `osctl data register` itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.errors import Refused

if TYPE_CHECKING:
    from orchestrator.inputs.datasets import DataSet
    from orchestrator.pipelines.workspace import Workspace


def register_in_cluster(workspace: Workspace, name: str, source: str, say: Callable[[str], None], *, by_name: bool) -> DataSet:
    """Have a Job read it, and wait for its end. Raises UsageError, Refused, Unreachable."""
    from orchestrator.inputs import datasets
    from orchestrator.kube import side_job
    from orchestrator.kube.client import Api
    from orchestrator.kube.jobs import register_job

    if not workspace.store_url.startswith("s3://"):
        raise Refused(
            f"data register {name}: store {workspace.store_url} is a folder of this machine, which no pod sees. "
            "Name a bucket: --store s3://bucket/prefix"
        )
    profile = workspace.pipeline.cluster
    assert profile is not None, "a cluster was named"
    before = len(datasets.of_name(workspace.store, name))
    subject = f"data register {name}"
    with contextlib.closing(Api.connect(profile.context, profile.namespace, workspace.host.env)) as api:
        job = side_job.find_or_create(
            api, lambda number: register_job(profile, workspace.store_url, name, source, number, by_name=by_name), again=True
        )
        job_name = job["metadata"]["name"]
        say(f"{name}: read by Job {job_name} in namespace {api.namespace}; it goes on if this command is interrupted")
        ended = side_job.wait(api, job, subject, say)
        if not ended.complete:
            words = f": {ended.words}" if ended.words else f". See: kubectl -n {api.namespace} logs job/{job_name}"
            raise Refused(f"{subject}: Job {job_name} failed{words}")
    found = datasets.of_name(workspace.store, name)
    if not found or (len(found) == before and found[-1].source != source):
        raise Refused(
            f"data register {name}: Job {job_name} is complete, and {workspace.store_url} has no {name}. Is that the Job's store?"
        )
    return found[-1]
