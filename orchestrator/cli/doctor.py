"""`osctl doctor`: everything a launch needs, checked before it is needed. A line a check, with what mends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import opened
from orchestrator.cli.typed import expanded
from orchestrator.errors import Refused

PATIENCE_S = "10"
"""How long an object store may take. A launch is more patient."""


def doctor(
    file: options.File = None,
    settings: options.Set = None,
    store: options.Store = None,
    tracking: options.Tracking = None,
    cluster: options.Cluster = None,
    output_: options.Output = output.Format.table,
    only: Annotated[str | None, typer.Option("--only", metavar="WORD", help="Checks whose name holds this word alone, e.g. store.")] = None,
) -> None:
    """Check everything that a launch needs.

    Store and MLflow; with kubernetes also images, rights, accounts, quota, nodes, operator and scheduler.
    Each line is ok, failed (with what mends it) or not checked (what this person may not see). Exit code 4 where something failed.

    Examples: osctl doctor          osctl doctor --cluster my-pool.yaml --store s3://bucket/runs -o json
    """
    from orchestrator.pipelines.checks import examine
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.workspace import cluster_at

    host = Host.here().patient(PATIENCE_S)
    named = cluster_at(cluster, settings, host)
    workspace = opened(file, settings=settings, store=store, tracking=tracking, cluster=named, host=host)
    checks = [
        replace(check, fact=expanded(check.fact), fix=expanded(check.fix))
        for check in examine(workspace)
        if only is None or only in check.name
    ]
    if output_ is output.Format.table:
        output.table([vars(check) for check in checks], {"name": "check", "verdict": "", "fact": "found", "fix": "what mends it"})
    else:
        output.emit([vars(check) for check in checks], output_)
    failed = [check for check in checks if check.verdict == "failed"]
    if failed:
        names = ", ".join(check.name for check in failed)
        raise Refused(
            f"doctor {workspace.pipeline.name}: {len(failed)} of {len(checks)} checks failed: {names}. Each line says what mends it"
        )
