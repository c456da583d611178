"""Which pipeline a command is about. Remembers how the person named it, so that commands to paste name it in the same way (`typed`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

from orchestrator.cli import output
from orchestrator.cli.typed import typed
from orchestrator.pipelines import find
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.accounting.status import Snapshot


Asked = ParamSpec("Asked")


def _remembering(find_one: Callable[Asked, Workspace]) -> Callable[Asked, Workspace]:
    """The same function, whose answer is what later hints are about."""

    @functools.wraps(find_one)
    def found(*asked: Asked.args, **options: Asked.kwargs) -> Workspace:
        return remembered(find_one(*asked, **options))

    return found


opened = _remembering(Workspace.open)
"""A recipe, or what was launched last under that name in the store."""
launched = _remembering(find.launched)
"""The pipeline of that name in the store, else the recipe's, as it was last launched."""


def launched_or_stage(
    first: str | None, second: str | None, file: str | None, *, store: str | None = None, cluster: str | None = None
) -> tuple[Workspace, str | None]:
    """The same of `[PIPELINE] [STAGE]`. Raises as `find.launched_or_stage`."""
    workspace, stage = find.launched_or_stage(first, second, file, store=store, cluster=cluster)
    return remembered(workspace), stage


def remembered(workspace: Workspace) -> Workspace:
    typed().store = workspace.store_url
    if workspace.data_note:
        output.note(workspace.data_note)
    if workspace.named:
        typed().name = workspace.pipeline.name
    if workspace.launched:
        typed().launched = tuple(stage.name for stage in workspace.pipeline.stages)
    return workspace


def snapshot(workspace: Workspace, *, quiet: bool = False) -> Snapshot:
    """What the ledger says now. What cannot be read is left out, and said on stderr unless `quiet`. Raises Unreachable."""
    current = find.snapshot(workspace)
    if not quiet:
        say(current.remarks)
    return current


def say(remarks: tuple[str, ...] | list[str]) -> None:
    find.say_remarks(remarks, output.note)
