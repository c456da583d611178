"""Commands about what Kubernetes is sent: render, diff. The first needs nothing but files; neither changes anything."""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import opened
from orchestrator.pipelines.coming import Coming, coming, first_profile, last_launch, next_revision, open_attempt, profile_of_attempt

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.kube.diff import Difference
    from orchestrator.kube.operator import Operator
    from orchestrator.ledger.records import Intent
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Stage

PATIENCE_S = "3"
"""How long `render` waits for an object store. Without it, it prints what a first launch would send."""


class Form(enum.StrEnum):
    yaml = "yaml"
    json = "json"
    name = "name"


class Kind(enum.StrEnum):
    pytorchjob = "pytorchjob"
    trainjob = "trainjob"


def render(
    stage: Annotated[
        str | None, typer.Argument(help="One stage. Default: all that are not committed.", autocompletion=options.stage_names)
    ] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    driver: Annotated[bool, typer.Option("--driver", help="Also the Job of the driver.")] = False,
    operator: Annotated[
        Kind | None, typer.Option("--operator", help="Kind of the attempts' jobs. Default: the profile's; auto there: pytorchjob.")
    ] = None,
    output_: Annotated[Form, typer.Option("--output", "-o", help="yaml and json: what kubectl apply takes.")] = Form.yaml,
) -> None:
    """Print what launch would send to the cluster for the next attempt of each stage. Needs no cluster.

    It reads the ledger where that answers; without it, it prints what a first launch would send.

    Examples: osctl render -f open-sora-1.0          osctl render stage2 --cluster ./my-pool.yaml | kubectl apply --dry-run=server -f -
    """
    from orchestrator.errors import Refused, Unreachable
    from orchestrator.kube import jobs, yaml_text
    from orchestrator.kube.operator import BY_NAME, PYTORCH_JOB
    from orchestrator.pipelines.find import check_stage
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.preparing import on_known
    from orchestrator.pipelines.workspace import cluster_at

    host = Host.here().patient(PATIENCE_S)
    named = cluster_at(cluster, settings, host)
    workspace = opened(file, settings=settings, store=store, data=data, cluster=named, host=host)
    check_stage(workspace, stage, "render")
    workspace = on_known(workspace)
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
    kind = BY_NAME.get(operator or profile.operator, PYTORCH_JOB)
    if operator is None and profile.operator == "auto" and wanted:
        output.note(f"operator: auto is printed as a {kind.kind}; launch takes what the cluster has, and --operator prints the other")
    objects = [
        each
        for one in wanted
        for each in kind.objects(one.intent, first_profile(pipeline, one.intent.stage) or profile, workspace.store_url)
    ]
    for one in wanted:
        if order := pipeline.pools_of(pipeline.stage(one.intent.stage)):
            output.note(f"{one.intent.stage}: printed for pool {order[0]}, the first of {', '.join(order)}")
    if driver:
        revision = next_revision(pipeline, workspace.ledger) if known else 1
        objects.append(jobs.driver_job(pipeline, workspace.store_url, revision, 1, [stage] if stage else []))
        output.note("the driver's number is 1 here; launch takes the next that is free in the cluster")
    if not workspace.store_url.startswith("s3://"):
        output.note(f"store {workspace.store_url}: is a folder of this machine, which no pod sees; launch wants --store s3://bucket/prefix")
    if output_ is Form.name:
        output.raw("".join(f"{each['kind'].lower()}/{each['metadata']['name']}\n" for each in objects))
    elif output_ is Form.json:
        import json

        output.raw(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2) + "\n")
    elif objects:
        output.raw(yaml_text.dump(objects))


def diff(
    stage: Annotated[
        str | None, typer.Argument(help="One stage. Default: all that have an open attempt.", autocompletion=options.stage_names)
    ] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Compare what was launched with what launch would do now, and say what each difference means.

    Each stage as it was launched last: `another result` trains it anew, the rest goes on from its last checkpoint. Of an attempt that is
    open in a cluster also the job as it runs.

    Examples: osctl diff --set stage2.optimizer.lr=1e-4          osctl diff stage2 --cluster my-pool.yaml
    """
    from orchestrator.kube.diff import job_differences, stage_differences
    from orchestrator.kube.operator import BY_NAME
    from orchestrator.pipelines.find import check_stage
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.preparing import on_known
    from orchestrator.pipelines.workspace import cluster_at

    host = Host.here()
    named = cluster_at(cluster, settings, host)
    workspace = opened(file, settings=settings, store=store, data=data, cluster=named, host=host)
    check_stage(workspace, stage, "diff")
    workspace = on_known(workspace)
    workspace = workspace.with_contents(needed=False, far=False, say=output.note)
    pipeline, ledger = workspace.pipeline, workspace.ledger
    found = coming(pipeline, ledger)
    last = last_launch(ledger)
    rows: list[dict[str, Any]] = []
    api: Api | None = None
    for each in pipeline.stages:
        if stage not in (None, each.name):
            continue
        intent = open_attempt(each, ledger)
        running = intent is not None
        intent = intent or (last.get(each.name) if ledger.inputs_of(each.name) else None)
        if intent is None:
            output.note(f"{each.name}: was never attempted, so there is nothing to compare with; osctl launch --dry-run shows the plan")
            continue
        now = _now(each, intent, found[each.name])
        contents = _of_contents(workspace, each, intent)
        differences = [one for one in stage_differences(intent, now) if not contents or one.path != "inputs"] + contents
        if running and pipeline.cluster is not None:
            api = api or _connect(pipeline.cluster)
            found_job = get_job(api, intent, workspace.store_url)
            if found_job is None:
                said = f"has no job in namespace {pipeline.cluster.namespace}; only its intent is compared"
                output.note(f"{each.name} attempt {intent.attempt}: {said}")
            else:
                kind, there = found_job
                profile = profile_of_attempt(ledger, pipeline, intent) or pipeline.cluster
                wanted = BY_NAME.get(profile.operator, kind)
                differences += job_differences(there, wanted.objects(now, profile, workspace.store_url))
        rows += [
            {"name": each.name, "attempt": intent.attempt, "field": one.path, "running": one.old, "now": one.new, "meaning": one.meaning}
            for one in differences
        ]
        if not differences:
            said = f"{each.name} attempt {intent.attempt}: runs" if running else f"{each.name}: was launched"
            output.note(f"{said} as it would be sent now")
    if rows or output_ is not output.Format.table:
        output.emit(rows, output_, {"name": "stage", "field": "field", "running": "then", "now": "now", "meaning": "means"})


def _of_contents(workspace: Workspace, stage: Stage, intent: Intent) -> list[Difference]:
    """Of clips, weights and encoders, by content, where both are recorded."""
    from orchestrator.inputs.standing import changes_since
    from orchestrator.kube.diff import ANEW, Difference

    terms = workspace.ledger.terms(intent.stage, intent.inputs_digest, intent.attempt)
    kinds = type(stage.contents).model_fields
    changed = [one for one in changes_since(intent, terms, stage) if one.path in kinds]
    found = [Difference(one.path, one.old, one.new, ANEW) for one in changed]
    for one in changed:
        if one.path == "data":
            rows = workspace.rows_between(one.old, one.new)
            found += [Difference(f"data row {row.path}".rstrip(), row.old, row.new or row.kind, ANEW) for row in rows]
    return found


def get_job(api: Api, intent: Intent, store_url: str) -> tuple[Operator, list[dict[str, Any]]] | None:
    """An attempt's objects as the cluster has them, and of which kind they are, in the order of `Operator.objects`; none: it has no job.

    Raises Refused where a job of its name is not ours, Unreachable.
    """
    from orchestrator.errors import NotFound, Refused
    from orchestrator.kube import discovery, names

    name = names.job_name(store_url, intent.run_key)
    for operator in discovery.served(api):
        try:
            job = api.get(operator.plural, name)
        except NotFound:
            continue
        if not names.is_ours(job, store_url, intent.run_key):
            raise Refused(
                f"{api.namespace}/{name}: was not made by osctl for {intent.run_key} in {store_url}; look at it with kubectl describe"
            )
        beside = []
        for plural in operator.beside:
            with contextlib.suppress(NotFound):
                beside.append(api.get(plural, name))
        return operator, [*beside, job]
    return None


def profile_of(workspace: Workspace, command: str) -> ClusterProfile:
    """Raises UsageError where the pipeline runs on this machine."""
    from orchestrator.errors import UsageError

    if workspace.pipeline.cluster is None:
        raise UsageError(
            f"{command} {workspace.pipeline.name}: its backend is local, and no manifest is written for that. Name a --cluster"
        )
    return workspace.pipeline.cluster


def _connect(profile: ClusterProfile) -> Api:
    from orchestrator.kube.client import Api

    return Api.connect(profile.context, profile.namespace)


def _now(stage: Stage, running: Intent, coming: Coming | str) -> Intent:
    """The running attempt as it would be intended now. Where its stage is committed meanwhile, its inputs are what they were."""
    if isinstance(coming, Coming):
        return coming.intent
    resources = stage.spec.resources
    now = {"config": stage.config, "nodes": resources.nodes, "devices_per_node": resources.devices_per_node, "device": resources.device}
    return running.model_copy(update=now)
