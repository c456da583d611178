"""What a launch says of stages that changed since they were worked on, and a person's decisions on them.

Owns the words and the record of a decision. `orchestrator.inputs.standing` says which changes begin a stage anew, and which need a
decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from opensora.printable import several
from orchestrator.errors import Refused, UsageError

if TYPE_CHECKING:
    from opensora.identity import Difference
    from orchestrator.accounting.status import Snapshot
    from orchestrator.inputs.standing import Standing
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.recipe.pipeline import Stage


def standings(workspace: Workspace, targets: Collection[str]) -> Iterator[Standing]:
    """Where the stages stand in the ledger that are asked for and could start now. Raises Unreachable, Refused."""
    from orchestrator.inputs.standing import results, stand

    pipeline, ledger = workspace.pipeline, workspace.ledger.lenient()
    found = results(pipeline, ledger)
    for stage in pipeline.stages:
        if stage.name in found and (not targets or stage.name in targets):
            parent = found[stage.spec.parent][1] if stage.spec.parent else None
            yield stand(ledger, stage, parent)


@dataclass(frozen=True)
class Decisions:
    """What a person decided on stages that changed."""

    keep: tuple[str, ...] = ()
    """Stages whose result is kept as it is."""
    anew: tuple[str, ...] = ()
    """Stages that are trained anew."""


def settle(workspace: Workspace, targets: Collection[str], decisions: Decisions, say: Callable[[str], None]) -> None:
    """Say what begins anew and what goes on otherwise, and write the decisions into the ledger. No lease is held yet.

    Raises:
        UsageError: a decision about a stage that is not there.
        Refused: a stage needs a decision; or there is nothing to keep, or nothing changed.
    """
    from orchestrator.inputs.standing import to_decide

    names = [stage.name for stage in workspace.pipeline.stages]
    keep, anew = decisions.keep, decisions.anew
    for option, stages in (("--keep", keep), ("--anew", anew)):
        for name in stages:
            if name not in names:
                raise UsageError(f"launch {option} {name}: {workspace.pipeline.name} has no such stage; it has {', '.join(names)}")
    if both := sorted({*keep} & {*anew}):
        raise UsageError(f"launch --keep {both[0]} --anew {both[0]}: one of the two, keep its result or train it anew")
    begun = bool(workspace.ledger.lenient().stages())  # a first launch has nothing to settle, and asks the store once for that
    for name in names if begun or keep or anew else ():
        # Each is looked at once what was decided of its parents counts: whether it has to be decided on hangs on what it starts from.
        for standing in standings(workspace, {name}) if not targets or name in targets else ():
            if name in keep:
                _decide(workspace, standing, "keep", say)
                continue
            if name in anew:
                _decide(workspace, standing, "anew", say)
            elif why := to_decide(standing, partial(rows_of, workspace), _alike(workspace, standing.stage, targets)):
                raise Refused(why)
            _say(workspace, standing, say)
    if why := workspace.too_few(targets):
        raise Refused(why)


def foretell(workspace: Workspace, targets: Collection[str], say: Callable[[str], None]) -> None:
    """Say what a launch would say or refuse. Nothing is written."""
    from orchestrator.inputs.standing import to_decide

    few = workspace.too_few(targets)
    if few:
        say(f"launch would refuse: {few}")
    for standing in standings(workspace, targets):
        if why := to_decide(standing, partial(rows_of, workspace), _alike(workspace, standing.stage, targets)):
            say(f"launch would refuse: {why}")
        elif not few:
            _say(workspace, standing, say)


def _alike(workspace: Workspace, stage: Stage, targets: Collection[str]) -> list[str]:
    """Later stages with the same data that have a result: they will need the same decision."""
    later = workspace.pipeline.stages[workspace.pipeline.stages.index(stage) + 1 :]
    ledger = workspace.ledger.lenient()
    return [
        one.name
        for one in later
        if one.config.data.source == stage.config.data.source
        and (not targets or one.name in targets)
        and any(ledger.committed(one.name, inputs_digest) is not None for inputs_digest in ledger.inputs_of(one.name))
    ]


def rows_of(workspace: Workspace, data: Difference) -> str:
    """Which rows of the data changed, as a part of a message."""
    rows = workspace.rows_between(data.old, data.new)
    if not rows:
        return ""
    from opensora.dataset.manifest import told

    return f" ({several(len(rows), 'row differs', 'rows differ')}: {told(rows)})"


def begun_anew(workspace: Workspace, current: Snapshot) -> dict[str, str]:
    """By stage that is not finished: why it was begun anew although there was earlier work."""
    unfinished = {stage.name for stage in current.stages if stage.state != "committed"}
    if not unfinished:
        return {}
    return {one.stage.name: one.anew for one in standings(workspace, unfinished) if one.anew}


def _say(workspace: Workspace, standing: Standing, say: Callable[[str], None]) -> None:
    from orchestrator.inputs.standing import goes_on_otherwise

    if standing.anew and not standing.begun:
        say(standing.anew)
    if otherwise := goes_on_otherwise(workspace.ledger.lenient(), standing):
        say(otherwise)


def _decide(workspace: Workspace, standing: Standing, action: str, say: Callable[[str], None]) -> None:
    from orchestrator.inputs.standing import said
    from orchestrator.ledger.records import Decision

    name, earlier = standing.stage.name, standing.earlier
    if standing.begun or earlier is None:
        done = standing.begun and workspace.ledger.committed(name, standing.inputs_digest) is not None
        if action == "keep" and done:
            say(f"{name}: its result is kept as it is")
            return
        if action == "anew" and standing.decided and not done:
            return  # it was begun anew already, and goes on
        if action == "anew" and standing.begun:
            way = "Change its seed to train it once more" if done else f"To go on where it stopped: osctl launch {name}"
            raise Refused(f"launch --anew {name}: nothing changed, so the same numbers would come out. {way}")
        raise Refused(f"launch --{action} {name}: there is no earlier result of it. Run: osctl launch {name}")
    if action == "keep" and not earlier.committed:
        raise Refused(f"launch --keep {name}: its work under earlier inputs stopped at step {earlier.step} and is no result. Train it anew")
    decision = Decision.model_validate(
        {
            "stage": name,
            "inputs": standing.inputs_digest,
            "action": action,
            "earlier": earlier.inputs_digest,
            "reason": said(earlier.changes),
            "time": time.time(),
        }
    )
    workspace.ledger.decide(decision)
    if action == "keep":
        say(f"{name}: its result is kept as it is, although {decision.reason}")
