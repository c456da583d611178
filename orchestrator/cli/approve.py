"""`osctl approve`: a person's word on the gate between a committed stage and the next one."""

from __future__ import annotations

import getpass
import socket
import time
from typing import Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, snapshot
from orchestrator.errors import Refused, UsageError


def approve(
    stage: Annotated[str, typer.Argument(help="Committed stage whose gate is meant.", autocompletion=options.stage_names)],
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="Why; it stands in the ledger and in osctl lineage.")] = "",
    refuse: Annotated[bool, typer.Option("--refuse", help="Say no: the next stage does not start, and everything is kept.")] = False,
    file: options.File = None,
    store: options.Store = None,
) -> None:
    """Let the next stage start from a committed one whose gate holds it, or refuse that.

    It is written down with name, time and note. A later word replaces an earlier one.

    Example: osctl approve stage1 --note "digits look right"
    """
    from orchestrator.errors import StoreConflict
    from orchestrator.ledger.records import GateDecision
    from orchestrator.pipelines.find import check_stage

    workspace = launched(None, file, store=store)
    check_stage(workspace, stage, "approve")
    gate = workspace.pipeline.stage(stage).spec.gate
    if gate is None:
        raise UsageError(f"approve {stage}: it has no gate. Give it one in the pipeline file: gate: approval")
    committed = next(one.committed for one in snapshot(workspace).stages if one.name == stage)
    if committed is None:
        raise Refused(f"approve {stage}: nothing is committed to approve. Make it with: osctl launch {stage}")
    content = {"stage": stage, "inputs_digest": committed.inputs_digest, "gate": gate, "action": "refuse" if refuse else "approve"}
    about = {"by": f"{getpass.getuser()}@{socket.gethostname()}", "note": note, "time": time.time()}
    try:
        workspace.ledger.decide_gate(GateDecision.model_validate(content | about))
    except StoreConflict as error:
        raise Refused(f"approve {stage}: somebody else decides at the same moment. See: osctl lineage {stage}") from error
    output.note(f"{stage}: {'refused' if refuse else 'approved'} ({gate})")
    output.note("next: osctl lineage" if refuse else "next: osctl launch")
