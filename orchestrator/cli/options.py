"""Options that several commands share, written once: one name, one help text, one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.output import Format


def stage_names() -> list[str]:
    """For the shell's completion: the stages of the pipeline here. Reads one file, asks no store."""
    from orchestrator.errors import OsctlError
    from orchestrator.pipelines.workspace import Workspace

    try:
        return [stage.name for stage in Workspace.open(None).pipeline.stages]
    except OsctlError:  # completion has nobody to tell
        return []


def pipeline_names(ctx: typer.Context) -> list[str]:
    """For the shell's completion: the pipelines of the store that is meant so far."""
    from orchestrator.errors import OsctlError
    from orchestrator.ledger.store import pipelines
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.workspace import reached, store_at
    from orchestrator.stores import open_store

    host = Host.here().patient("1")
    try:
        url = store_at(ctx.params.get("store"), host, ctx.params.get("file"))
        return pipelines(open_store(url, reached(url, host, ctx.params.get("cluster"), ctx.params.get("file")).env))
    except (OsctlError, OSError):  # completion has nobody to tell
        return []


def checkpoint_names(ctx: typer.Context) -> list[str]:
    """For the shell's completion: steps of the stage's checkpoints in the store, or of the last stage that has one, newest first."""
    from orchestrator.errors import OsctlError
    from orchestrator.pipelines import find

    stage = ctx.params.get("stage")
    try:
        workspace = find.launched(None, ctx.params.get("file"), store=ctx.params.get("store"))
        for status in reversed(find.snapshot(workspace).stages):
            if status.inputs_digest is not None and stage in (None, status.name):
                steps = workspace.ledger.published_steps(status.name, status.inputs_digest)
                if steps:
                    return [str(step) for step in sorted({*steps}, reverse=True)]
    except (OsctlError, OSError):  # completion has nobody to tell
        pass
    return []


def cluster_names() -> list[str]:
    """For the shell's completion: the cluster profiles that are shipped."""
    from orchestrator.recipe.cluster_profile import shipped_clusters
    from orchestrator.recipe.files import shipped_folder

    return list(shipped_clusters(shipped_folder()))


def stages_and_pipelines(ctx: typer.Context) -> list[str]:
    return [*stage_names(), *pipeline_names(ctx)]


File = Annotated[
    str | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH|NAME",
        envvar="OSCTL_FILE",
        help="Pipeline: a file, a folder, or a shipped name (demo, open-sora-1.0); but for launch also the name of one that was launched, "
        "in the store. Default: ./osctl.yaml, else demo.",
    ),
]
LongFile = Annotated[
    str | None,
    typer.Option("--file", metavar="PATH|NAME", envvar="OSCTL_FILE", help="Pipeline, as in osctl launch -f; here -f follows."),
]
Named = Annotated[
    str | None,
    typer.Argument(
        metavar="[PIPELINE]",
        help="Name of a pipeline in the store, as osctl list shows it: no recipe is needed. Default: the recipe's.",
        autocompletion=pipeline_names,
    ),
]
NamedOrStage = Annotated[
    str | None,
    typer.Argument(
        metavar="[PIPELINE]",
        help="Name of a pipeline in the store, for which no recipe is needed; a stage of the recipe at hand may stand here alone.",
        autocompletion=stages_and_pipelines,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one field, e.g. --set stage2.steps=500 --set stage2.optimizer.lr=1e-3. Repeatable."
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="Object store: a folder, or s3://bucket/prefix. Default: the pipeline's, else .osctl/store."
    ),
]


Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="Cluster profile: a shipped name (h800-64, kind-cpu) or a file. Implies --backend kubernetes; "
        "OSCTL_CLUSTER names one without implying it.",
        autocompletion=cluster_names,
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option("--tracking", metavar="URI", help="MLflow: sqlite, http://host:port, or none."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FOLDER|NAME",
        help="Train on these clips instead of the pipeline's own: a folder of videos with a captions.csv (path,text), or in another layout "
        "that people have (docs/contracts.md), or such a table; a path or an address. Or a data set of the store, by its name "
        "(osctl data list).",
    ),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", help="With kubernetes: follow the driver to its end, and end with its exit code. Ctrl-C ends this command only."
    ),
]
Foreground = Annotated[
    bool, typer.Option("--foreground", help="With kubernetes: drive from this process, as locally; Ctrl-C saves and stops.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="STAGE", help="Keep this stage's result although its data changed.", autocompletion=stage_names),
]
Anew = Annotated[
    list[str] | None,
    typer.Option("--anew", metavar="STAGE", help="Train this stage anew although earlier work is there.", autocompletion=stage_names),
]
Output = Annotated[Format, typer.Option("--output", "-o", help="How the result is printed on stdout.")]
Mfu = Annotated[
    float | None,
    typer.Option(
        "--mfu",
        min=0.001,
        max=1.0,
        help="Model FLOPs utilisation to plan with, as a fraction, e.g. 0.45. Default: measured, else the price list's.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        envvar="OSCTL_CALIBRATION",
        help="Steps measured on your device, as bench/step.py and bench/gpu.py write them. Default: the shipped ones.",
    ),
]
Prices = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        metavar="FILE",
        envvar="OSCTL_PRICES",
        help="Price list, in place of the shipped one (osctl explain prices). Each attempt keeps the price at which it was made.",
    ),
]
