"""What a launch says of stages that changed since they were worked on, and a person's decision on them.

Owns the words and the record of a decision. Which changes begin a stage anew, and which need a decision, `orchestrator.inputs` says.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.cli import output
from orchestrator.errors import Refused, UsageError

if TYPE_CHECKING:
    from opensora.identity import Difference
    from orchestrator.cli.workspace import Workspace
    from orchestrator.inputs import Standing
    from orchestrator.snapshot import Snapshot


def standings(workspace: Workspace, targets: Collection[str]) -> Iterator[Standing]:
    """Of the stages that are asked for and could start now: where they stand in the ledger. Raises Unreachable, Refused."""
    from orchestrator.inputs import results, stand

    pipeline, ledger = workspace.pipeline, workspace.ledger.lenient()
    found = results(pipeline, ledger)
    for stage in pipeline.stages:
        if stage.name in found and (not targets or stage.name in targets):
            parent = found[stage.spec.parent][1] if stage.spec.parent else None
            yield stand(ledger, stage, parent)


def settle(workspace: Workspace, targets: Collection[str], *, keep: Collection[str], anew: Collection[str], again: str) -> None:
    """Say what begins anew and what goes on otherwise, and write a person's decisions down. Nothing is held yet.

    Raises:
        UsageError: a decision about a stage that is not there.
        Refused: a stage needs a decision; or there is nothing to keep, or nothing changed.
    """
    from orchestrator.inputs import to_decide

    names = [stage.name for stage in workspace.pipeline.stages]
    for option, stages in (("--keep", keep), ("--anew", anew)):
        for name in stages:
            if name not in names:
                raise UsageError(f"launch {option} {name}: {workspace.pipeline.name} has no such stage; it has {', '.join(names)}")
    for standing in standings(workspace, targets):
        name = standing.stage.name
        if name in keep:
            _decide(workspace, standing, "keep")
        elif name in anew:
            _decide(workspace, standing, "anew")
        elif why := to_decide(standing, again, partial(rows_of, workspace)):
            raise Refused(why)
        say(workspace, standing)


def foretell(workspace: Workspace, targets: Collection[str], again: str) -> None:
    """Of a launch that is only shown: what it would say, or refuse."""
    from orchestrator.inputs import to_decide

    for standing in standings(workspace, targets):
        if why := to_decide(standing, again, partial(rows_of, workspace)):
            output.note(f"launch would refuse: {why}")
        else:
            say(workspace, standing)


def rows_of(workspace: Workspace, data: Difference) -> str:
    """Of data that changed: which rows, within a message."""
    rows = workspace.rows_between(data.old, data.new)
    if not rows:
        return ""
    from opensora.data.manifest import told

    return f" ({len(rows):,} rows differ: {told(rows)})"


def begun_anew(workspace: Workspace, current: Snapshot) -> dict[str, str]:
    """By stage that is not finished: why it was begun anew although there was earlier work."""
    unfinished = {stage.name for stage in current.stages if stage.state != "committed"}
    if not unfinished:
        return {}
    return {one.stage.name: one.anew for one in standings(workspace, unfinished) if one.anew}


def say(workspace: Workspace, standing: Standing) -> None:
    from orchestrator.inputs import goes_on_otherwise

    if standing.anew and not standing.begun:
        output.note(standing.anew)
    if otherwise := goes_on_otherwise(workspace.ledger.lenient(), standing):
        output.note(otherwise)


def _decide(workspace: Workspace, standing: Standing, action: str) -> None:
    from orchestrator.inputs import said
    from orchestrator.records import Decision

    name, earlier = standing.stage.name, standing.earlier
    if standing.begun or earlier is None:
        if action == "anew" and standing.begun:
            raise Refused(
                f"launch --anew {name}: nothing changed, so the same numbers would come out. Change its seed to train it once more"
            )
        raise Refused(f"launch --{action} {name}: there is no earlier result of it. Run: osctl launch {name}")
    if action == "keep" and not earlier.committed:
        raise Refused(f"launch --keep {name}: its work under earlier inputs stopped at step {earlier.step} and is no result. Train it anew")
    decision = Decision.model_validate(
        {
            "stage": name,
            "inputs": standing.inputs,
            "action": action,
            "earlier": earlier.inputs,
            "reason": said(earlier.changes),
            "time": time.time(),
        }
    )
    workspace.ledger.decide(decision)
    if action == "keep":
        output.note(f"{name}: its result is kept as it is, although {decision.reason}")
