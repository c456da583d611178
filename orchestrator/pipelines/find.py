"""How a pipeline is found that was launched: by its name in a store, or by the recipe at hand; and what the ledger says of it now."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.errors import Refused, UsageError
from orchestrator.pipelines.host import Host
from orchestrator.pipelines.workspace import Workspace

REMARKS = 10
"""Remarks that are said to people. Arbitrary: half a screen."""

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.accounting.status import Snapshot


def launched(
    name: str | None, file: str | None, *, store: str | None = None, cluster: str | None = None, host: Host | None = None
) -> Workspace:
    """The pipeline of that name in the store, else the recipe's, as it was last launched. Raises UsageError, Refused, Unreachable."""
    if name is not None:
        return as_launched(Workspace.of_name(name, file=file, store=store, cluster=cluster, host=host))
    return as_launched(Workspace.at(file, store=store, cluster=cluster, host=host))


def launched_or_stage(
    first: str | None,
    second: str | None,
    file: str | None,
    *,
    store: str | None = None,
    cluster: str | None = None,
    host: Host | None = None,
) -> tuple[Workspace, str | None]:
    """The same of `[PIPELINE] [STAGE]`. A word alone is a stage where the pipeline at hand has, or had, one of that name."""
    if first is None or second is not None:
        return launched(first, file, store=store, cluster=cluster, host=host), second
    fault: UsageError | None = None
    try:
        here = launched(None, file, store=store, cluster=cluster, host=host)
        if first in {stage.name for stage in here.pipeline.stages} | {stage for stage, _ in here.ledger.stages()}:
            return here, first
    except UsageError as error:
        fault = error
    try:
        return launched(first, file, store=store, cluster=cluster, host=host), None
    except UsageError as error:
        if fault is not None:
            raise fault from None
        stages = ", ".join(stage.name for stage in here.pipeline.stages)
        raise UsageError(f"{first}: is no stage of {here.pipeline.name} ({stages}). And as a pipeline: {error}") from None


def as_launched(workspace: Workspace) -> Workspace:
    """The same pipeline as it was last launched, if it was: people want to see what ran, not what the file says today.

    Where that launch cannot be read, the newest that can be, else the file; `remarks` says so. Raises Refused, Unreachable.
    """
    from orchestrator.recipe import launched as launches

    found = launches.last(workspace.ledger)
    remarks = tuple(map(str, found.remarks))
    if found.pipeline is None:
        shown = ("no launch can be read; shown is what the file says",) if not found.is_last else ()
        return replace(workspace, remarks=remarks + shown) if remarks else workspace
    shown = () if found.is_last else ("the last launch cannot be read; shown is the one before it that can be",)
    pipeline = found.pipeline.model_copy(update={"store": workspace.pipeline.store})
    return replace(workspace, launched=True, remarks=()).of_pipeline(pipeline, remarks + shown)


def to_resume(workspace: Workspace, settings: Sequence[str] = ()) -> Workspace:
    """What was launched last, exactly as it was then, but for `settings`.

    Raises:
        UsageError: a setting that is wrong.
        Refused: it was never launched, or its last launch cannot be read.
        Unreachable: the store did not answer.
    """
    from orchestrator.pipelines.workspace import split
    from orchestrator.recipe import launched as launches
    from orchestrator.recipe import resolve

    name = workspace.pipeline.name
    found = launches.last(workspace.ledger)
    if not found.is_last:
        unread = next(remark for remark in found.remarks if remark.kind != "foreign")
        raise Refused(f"resume {name}: {unread}. To go on as the recipe says: osctl launch")
    if found.pipeline is None:
        raise Refused(f"resume {name}: was never launched in {workspace.store_url}. Run: osctl launch")
    last = as_launched(workspace)
    return last.of_pipeline(resolve.changed(last.pipeline, dict(map(split, settings)))) if settings else last


def snapshot(workspace: Workspace) -> Snapshot:
    """What the ledger says now; what cannot be read of it is in `remarks`. Raises Unreachable."""
    from orchestrator.accounting import status
    from orchestrator.pipelines import preparing

    current = status.take_snapshot(workspace.pipeline, workspace.history, time.time())
    return replace(current, remarks=(*workspace.remarks, *current.remarks), preparation=preparing.status_of(workspace))


def say_remarks(remarks: Sequence[str], say: Callable[[str], None]) -> None:
    for remark in remarks[:REMARKS]:
        say(f"remark: {remark}")
    if len(remarks) > REMARKS:
        say(f"remark: and {len(remarks) - REMARKS} more; see: osctl status -o json")


def check_stage(workspace: Workspace, stage: str | None, command: str) -> None:
    """Raises UsageError where the pipeline has no stage of that name. None is every stage."""
    pipeline = workspace.pipeline
    if stage is not None and stage not in {each.name for each in pipeline.stages}:
        raise UsageError(f"{command} {stage}: {pipeline.name} has no such stage; it has {', '.join(each.name for each in pipeline.stages)}")
