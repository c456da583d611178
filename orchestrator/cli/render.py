"""Commands about what Kubernetes is told: render, diff. The first needs nothing but files; neither changes anything."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.look import stage_names
from orchestrator.cli.run import check_target
from orchestrator.cli.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.adapters.kube.api import Api
    from orchestrator.cluster import ClusterProfile
    from orchestrator.config import Pipeline, Stage
    from orchestrator.ledger import Ledger
    from orchestrator.manifest import Difference
    from orchestrator.records import Committed, Intent

UNKNOWN_INPUTS = "0" * 12
"""Stands for the digest of inputs that are not known yet, since a parent is not committed."""
PATIENCE_S = "3"
"""How long `render` waits for an object store. Without it, it prints what a first launch would send."""


class Form(enum.StrEnum):
    yaml = "yaml"
    json = "json"
    name = "name"


@dataclass(frozen=True)
class Coming:
    """The next attempt of a stage."""

    intent: Intent
    """As a driver would write it, but for what is verified only then: parent and checkpoint."""
    said: str
    """Which attempt, and what it starts from, for people."""


def render(
    stage: Annotated[str | None, typer.Argument(help="One stage. Default: all that are not committed.", autocompletion=stage_names)] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    driver: Annotated[bool, typer.Option("--driver", help="Also the Job of the driver.")] = False,
    output_: Annotated[Form, typer.Option("--output", "-o", help="yaml and json: what kubectl apply takes.")] = Form.yaml,
) -> None:
    """Print what launch would send to the cluster for the next attempt of each stage. Needs no cluster.

    It reads the ledger where that answers; without it, it prints what a first launch would send.

    Examples: osctl render -f open-sora-1.0          osctl render stage2 --cluster ./my-pool.yaml | kubectl apply --dry-run=server -f -
    """
    from orchestrator import manifest
    from orchestrator.errors import Refused, Unreachable

    os.environ.setdefault("OSCTL_S3_PATIENCE_S", PATIENCE_S)
    workspace = Workspace.open(file, settings=settings, store=store, data=data, cluster=_cluster(cluster))
    check_target(workspace, stage)
    profile = profile_of(workspace, "render")
    workspace = workspace.with_contents(needed=False, far=False, say=output.note)
    pipeline = workspace.pipeline
    known = True
    try:
        found = coming(pipeline, workspace.ledger)
    except (Refused, Unreachable) as error:
        output.note(f"{error}; printed as if nothing had run")
        found, known = coming(pipeline, None), False
    wanted = [one for name, one in found.items() if isinstance(one, Coming) and stage in (None, name)]
    for name, each in found.items():
        if stage in (None, name):
            output.note(each.said if isinstance(each, Coming) else each)
    objects = [manifest.pytorch_job(one.intent, profile, workspace.store_url) for one in wanted]
    if driver:
        revision = next_revision(pipeline, workspace.ledger) if known else 1
        objects.append(manifest.driver_job(pipeline, workspace.store_url, revision, 1, [stage] if stage else []))
        output.note("the driver's number is 1 here; launch takes the next that is free in the cluster")
    if not workspace.store_url.startswith("s3://"):
        output.note(f"store {workspace.store_url}: is a folder of this machine, which no pod sees; launch wants --store s3://bucket/prefix")
    if output_ is Form.name:
        output.raw("".join(f"{each['kind'].lower()}/{each['metadata']['name']}\n" for each in objects))
    elif output_ is Form.json:
        import json

        output.raw(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2) + "\n")
    elif objects:
        output.raw(manifest.dump(objects))


def diff(
    stage: Annotated[
        str | None, typer.Argument(help="One stage. Default: all that have an open attempt.", autocompletion=stage_names)
    ] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Compare what was launched with what launch would do now, and say what each difference means.

    Of each stage its last attempt: `another result` trains it anew, the rest goes on from its last checkpoint. Of an attempt that is open
    in a cluster also the job as it runs.

    Examples: osctl diff --set stage2.optimizer.lr=1e-4          osctl diff stage2 --cluster my-pool.yaml
    """
    from orchestrator import manifest

    workspace = Workspace.open(file, settings=settings, store=store, data=data, cluster=_cluster(cluster))
    check_target(workspace, stage)
    workspace = workspace.with_contents(needed=False, far=False, say=output.note)
    pipeline, ledger = workspace.pipeline, workspace.ledger
    found = coming(pipeline, ledger)
    rows: list[dict[str, Any]] = []
    api: Api | None = None
    for each in pipeline.stages:
        if stage not in (None, each.name):
            continue
        intent = open_attempt(each, ledger)
        running = intent is not None
        intent = intent or last_attempt(each, ledger)
        if intent is None:
            output.note(f"{each.name}: was never attempted, so there is nothing to compare with; osctl launch --dry-run shows the plan")
            continue
        now = _now(each, intent, found[each.name])
        contents = _of_contents(workspace, each, intent)
        differences = [one for one in manifest.stage_differences(intent, now) if not contents or one.path != "inputs"] + contents
        if running and pipeline.cluster is not None:
            api = api or _connect(pipeline.cluster)
            job = get_job(api, intent, workspace.store_url)
            if job is None:
                said = f"has no job in namespace {pipeline.cluster.namespace}; only its intent is compared"
                output.note(f"{each.name} attempt {intent.attempt}: {said}")
            else:
                differences += manifest.differences(job, manifest.pytorch_job(now, pipeline.cluster, workspace.store_url))
        rows += [
            {"name": each.name, "attempt": intent.attempt, "field": one.path, "running": one.old, "now": one.new, "meaning": one.meaning}
            for one in differences
        ]
        if not differences:
            output.note(f"{each.name} attempt {intent.attempt}: {'runs' if running else 'ran'} as it would be sent now")
    if rows or output_ is not output.Format.table:
        output.emit(rows, output_, {"name": "stage", "field": "field", "running": "then", "now": "now", "meaning": "means"})


def _of_contents(workspace: Workspace, stage: Stage, intent: Intent) -> list[Difference]:
    """Of clips, weights and encoders, by content, where both are recorded."""
    from orchestrator import manifest
    from orchestrator.inputs import changes_since

    terms = workspace.ledger.terms(intent.stage, intent.inputs, intent.attempt)
    kinds = type(stage.contents).model_fields
    changed = [one for one in changes_since(intent, terms, stage) if one.path in kinds]
    found = [manifest.Difference(one.path, one.old, one.new, manifest.ANEW) for one in changed]
    for one in changed:
        if one.path == "data":
            rows = workspace.rows_between(one.old, one.new)
            found += [manifest.Difference(f"data row {row.path}".rstrip(), row.old, row.new or row.kind, manifest.ANEW) for row in rows]
    return found


def coming(pipeline: Pipeline, ledger: Ledger | None) -> Mapping[str, Coming | str]:
    """By stage: its next attempt, or why there is none. `ledger` None: nothing has run. Raises Refused, Unreachable."""
    from orchestrator.inputs import find, name_of

    found: dict[str, Coming | str] = {}
    results: dict[str, Committed] = {}
    for stage in pipeline.stages:
        parent = stage.spec.parent
        if parent is not None and parent not in results:
            said = f"{stage.name}: attempt 1, once {parent} is committed; {UNKNOWN_INPUTS} stands for its inputs, and its name will differ"
            found[stage.name] = Coming(_intent(pipeline, stage, UNKNOWN_INPUTS, 1), said)
            continue
        result = results[parent] if parent else None
        inputs = find(ledger, stage, result) if ledger else name_of(stage, result)
        committed = ledger.committed(stage.name, inputs) if ledger else None
        if committed is not None:
            results[stage.name] = committed
            found[stage.name] = f"{stage.name}: is committed, launch sends nothing for it"
            continue
        attempts = ledger.attempts(stage.name, inputs) if ledger else []
        checkpoints = ledger.checkpoints(stage.name, inputs) if ledger else []
        number = max(attempts, default=0) + 1
        said = f"{stage.name}: attempt {number}"
        if parent is not None:
            said += f", from {parent}@{results[parent].inputs} at step {results[parent].step}"
        if checkpoints:
            said += f", resumes at step {checkpoints[-1][1].step}"
        if ledger and attempts and ledger.outcome(stage.name, inputs, attempts[-1]) is None:
            said += f"; attempt {attempts[-1]} is still open, and launch goes on with it"
        found[stage.name] = Coming(_intent(pipeline, stage, inputs, number), said)
    return found


def next_revision(pipeline: Pipeline, ledger: Ledger) -> int:
    """The number that a launch of this pipeline gets. Raises Refused, Unreachable."""
    number, latest = max(ledger.revisions(), key=lambda item: item[0], default=(0, None))
    return number if latest is not None and latest.pipeline == pipeline.model_dump(mode="json") else number + 1


def open_attempt(stage: Stage, ledger: Ledger) -> Intent | None:
    """The newest attempt of a stage, whatever its inputs, that has no outcome yet."""
    for inputs in ledger.inputs_of(stage.name):
        for number in reversed(ledger.attempts(stage.name, inputs)):
            if ledger.outcome(stage.name, inputs, number) is None and (intent := ledger.intent(stage.name, inputs, number)) is not None:
                return intent
    return None


def last_attempt(stage: Stage, ledger: Ledger) -> Intent | None:
    """The newest attempt of a stage, whatever its inputs."""
    intents = [
        intent
        for inputs in ledger.inputs_of(stage.name)
        for number in ledger.attempts(stage.name, inputs)[-1:]
        if (intent := ledger.intent(stage.name, inputs, number)) is not None
    ]
    return max(intents, key=lambda intent: intent.created, default=None)


def get_job(api: Api, intent: Intent, store_url: str) -> dict[str, Any] | None:
    """An attempt's job as the cluster has it; none: it has none. Raises Refused where one of its name is not ours, Unreachable."""
    from orchestrator import manifest
    from orchestrator.errors import NotFound, Refused

    name = manifest.job_name(store_url, intent.run_key)
    try:
        job = api.get("pytorchjobs", name)
    except NotFound:
        return None
    if not manifest.is_ours(job, store_url, intent.run_key):
        raise Refused(
            f"{api.namespace}/{name}: was not made by osctl for {intent.run_key} in {store_url}; look at it with kubectl describe"
        )
    return job


def profile_of(workspace: Workspace, command: str) -> ClusterProfile:
    """Raises UsageError where the pipeline runs on this machine."""
    from orchestrator.errors import UsageError

    if workspace.pipeline.cluster is None:
        raise UsageError(
            f"{command} {workspace.pipeline.name}: its backend is local, and no manifest is written for that. Name a --cluster"
        )
    return workspace.pipeline.cluster


def _cluster(named: str | None) -> str | None:
    return named or os.environ.get("OSCTL_CLUSTER") or None


def _connect(profile: ClusterProfile) -> Api:
    from orchestrator.adapters.kube.api import Api

    return Api.connect(profile.context, profile.namespace)


def _now(stage: Stage, running: Intent, coming: Coming | str) -> Intent:
    """The running attempt as it would be intended now. Where its stage is committed meanwhile, its inputs are what they were."""
    if isinstance(coming, Coming):
        return coming.intent
    resources = stage.spec.resources
    now = {"config": stage.config, "nodes": resources.nodes, "devices_per_node": resources.devices_per_node, "device": resources.device}
    return running.model_copy(update=now)


def _intent(pipeline: Pipeline, stage: Stage, inputs: str, number: int) -> Intent:
    from orchestrator.records import Intent, run_key

    resources = stage.spec.resources
    return Intent(
        run_key=run_key(pipeline.name, stage.name, inputs, number),
        pipeline=pipeline.name,
        stage=stage.name,
        inputs=inputs,
        attempt=number,
        epoch=0,
        created=time.time(),
        config=stage.config,
        config_digest=stage.config.digest(),
        nodes=resources.nodes,
        devices_per_node=resources.devices_per_node,
        device=resources.device,
        trainer=pipeline.trainer,
        hang_timeout_s=stage.spec.hang_timeout_s,
        flush_s=pipeline.flush_s,
        parent=None,
        resume=None,
        code="",
    )
