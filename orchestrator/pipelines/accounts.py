"""What was done and what it cost, as rows: stages side by side, the bill, the loss over dollars, and a checkpoint's lineage.

Every figure is a number with its unit in its name; how a row looks to people is the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from opensora.printable import several
from orchestrator.pipelines.find import check_stage, snapshot
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.accounting.cost import AttemptBill, Bill
    from orchestrator.accounting.history import AttemptHistory
    from orchestrator.accounting.status import PreparationStatus, Snapshot
    from orchestrator.ledger.lineage import Link
    from orchestrator.ledger.records import JournalPiece
    from orchestrator.ledger.store import Ledger
    from orchestrator.prepare.origin import Origin

NOT_RECORDED = "not recorded"
"""Said of contents that a release up to 0.1.0 did not write down."""


def comparison(current: Snapshot) -> list[dict[str, Any]]:
    """Stages side by side: a row for each, then one for each stage that the recipe no longer names."""
    from orchestrator.accounting.cost import Bill, merge

    lines: list[dict[str, Any]] = []
    for stage in current.stages:
        bill, published = stage.bill, stage.published_gpu_hours
        lines.append(
            {
                "name": stage.name,
                "state": stage.state,
                "steps": stage.step,
                "loss": stage.loss,
                "attempts": len(stage.attempts),
                "pools": list(dict.fromkeys(one.pool for one in bill.attempts if one.pool is not None and one.held_s)),
                "wall_s": stage.wall_s,
                "device_hours": bill.device_hours,
                "gpu_hours": bill.gpu_hours,
                "usd": bill.usd,
                "evaluation_usd": merge([Bill((), bill.evaluations)]).usd,
                "earlier_usd": stage.earlier_bill.usd,
                "goodput": bill.goodput,
                "device_seconds": bill.seconds,
                "published_gpu_hours": published,
                "ratio_vs_published": bill.gpu_hours / published if published and bill.gpu_hours else None,
                "clips": stage.data.clips if stage.data else None,
                "clips_left_out": stage.data.clips - stage.data.used if stage.data else None,
                "captions_cut": stage.data.captions_cut if stage.data else None,
                "weights_digest": stage.committed.weights_digest if stage.committed else None,
                "evaluation": stage.evaluation,
            }
        )
    for name in dict.fromkeys(one.stage for one in current.former):
        spent = merge(one.bill for one in current.former if one.stage == name)
        former = {"name": name, "state": "former", "steps": 0, "attempts": 0, "wall_s": 0.0, "device_hours": 0.0, "gpu_hours": 0.0}
        lines.append({**dict.fromkeys(lines[0]), **former, "usd": Decimal(0), "earlier_usd": spent.usd, "evaluation": {}})
    return lines


def cost(current: Snapshot, *, by_attempt: bool = False) -> list[dict[str, Any]]:
    """A row a stage, one for its evaluations beside the training, and one for all that was spent on it under earlier inputs; or a row for
    each of their attempts. Before them a row of the clips, where they were made of raw videos first; its device-seconds are those of the
    preparation's steps."""
    from orchestrator.accounting.cost import AttemptBill, Bill, merge

    parts: list[tuple[str, str | None, bool, Bill]] = []
    names = dict.fromkeys([*(stage.name for stage in current.stages), *(one.stage for one in current.former)])
    for name in names:
        parts += [(name, stage.inputs_digest, False, stage.bill) for stage in current.stages if stage.name == name]
        earlier = [one for one in current.earlier if one.stage == name]
        if by_attempt:
            parts += [(name, one.inputs_digest, True, one.bill) for one in earlier]
        elif earlier:
            parts.append((name, None, True, merge(one.bill for one in earlier)))
    rows = _of_clips(current.preparation, by_attempt=by_attempt)
    for name, inputs_digest, old, bill in parts:
        about = {"name": name, "inputs": inputs_digest, "earlier": old}
        for one in bill.attempts if by_attempt else (bill.of_attempts,):
            rows.append({**about, **({"attempt": one.attempt, "pool": one.pool} if isinstance(one, AttemptBill) else {}), **_bill(one)})
        if bill.evaluations and not by_attempt:
            beside = Bill((), bill.evaluations)
            rows.append({**about, "evaluations": [one.question for one in bill.evaluations], **_bill(beside)})
    return rows


def _of_clips(made: PreparationStatus | None, *, by_attempt: bool) -> list[dict[str, Any]]:
    if made is None or not made.attempts:
        return []
    return [
        {
            "name": made.name,
            "inputs": None,
            "earlier": False,
            **({"attempt": None, "pool": None} if by_attempt else {}),
            "device_seconds": dict(made.device_seconds),
            "waiting_s": 0.0,
            "held_s": sum(made.device_seconds.values()),
            "difference_s": 0.0,
            "device_hours": made.core_hours + made.gpu_hours,
            "gpu_hours": made.gpu_hours,
            "usd": made.usd,
            "goodput": None,
        }
    ]


def _bill(bill: Bill | AttemptBill) -> dict[str, Any]:
    return {
        "device_seconds": dict(bill.seconds),
        "waiting_s": bill.waiting_s,
        "held_s": bill.held_s,
        "difference_s": bill.difference_s(),
        "device_hours": bill.device_hours,
        "gpu_hours": bill.gpu_hours,
        "usd": bill.usd,
        "goodput": bill.goodput,
    }


def added_up_anew(workspace: Workspace, current: Snapshot) -> Snapshot:
    """The same from every piece of every journal. Raises CorruptCheckpoint where that is another bill; Unreachable."""
    from orchestrator.accounting import status
    from orchestrator.accounting.history import History
    from orchestrator.errors import CorruptCheckpoint
    from orchestrator.ledger.store import Ledger

    history = History(Ledger(workspace.store, workspace.pipeline.name), workspace.named_prices, verify=True)
    anew = replace(status.take_snapshot(workspace.pipeline, history, time.time()), preparation=current.preparation)
    found = {(about, one.attempt): one for about, bill in anew.bills() for one in bill.attempts}
    for about, bill in current.bills():
        for one in bill.attempts:
            whole = found[about, one.attempt]
            if one.over and dict(one.seconds) != dict(whole.seconds):
                raise CorruptCheckpoint(
                    f"cost --verify: {about} attempt {one.attempt}: by the sums beside its journal {one.held_s:.3f} device-seconds were "
                    f"held and {one.booked_s:.3f} booked, by its pieces {whole.held_s:.3f} and {whole.booked_s:.3f}. The pieces count: "
                    "delete the folder `totals` beside that journal, then: osctl cost"
                )
    return anew


def losses(workspace: Workspace) -> list[dict[str, Any]]:
    """A row for each training step that was ever done for the current inputs, in the order of stages and attempts.

    `usd` is what this pipeline's attempts in these rows had cost when the step ended; steps of one journal piece are spread evenly over
    its time. Raises Unreachable.
    """
    rows: list[dict[str, Any]] = []
    before = Decimal(0)
    for stage in snapshot(workspace).stages:
        if stage.inputs_digest is None:
            continue
        found = {one.intent.attempt: one for one in workspace.history.attempts(stage.name, stage.inputs_digest, time.time())}
        for bill in stage.bill.attempts:
            pieces = workspace.ledger.lenient().journal(stage.name, stage.inputs_digest, bill.attempt)
            for step, loss, moment in _steps(pieces):
                usd = float(before) + _held_s(found[bill.attempt], moment) / 3600 * float(bill.usd_per_hour)
                rows.append({"name": stage.name, "attempt": bill.attempt, "step": step, "loss": loss, "usd": usd})
            before += bill.usd
    return rows


def _steps(pieces: list[JournalPiece]) -> Iterator[tuple[int, float, float]]:
    """(step, loss, Unix time of its end). The first node alone writes metrics."""
    for piece in pieces:
        lines = [line for line in piece.metrics if isinstance(line.get("step"), int) and isinstance(line.get("loss"), int | float)]
        for place, line in enumerate(lines, 1):
            yield line["step"], float(line["loss"]), piece.start + (piece.end - piece.start) * place / len(lines)


def _held_s(attempt: AttemptHistory, moment: float) -> float:
    """Device-seconds that an attempt had held at a moment."""
    time = attempt.time
    starts = [(node.devices, min(start for start in (time.bound, node.start) if start is not None)) for node in time.nodes if node.start]
    return sum(devices * max(0.0, moment - start) for devices, start in starts)


@dataclass(frozen=True)
class Lineage:
    rows: list[dict[str, Any]]
    """A row for each checkpoint, the newest first; then one for each data set that was made of raw videos, with its `sources`."""
    fault: str
    """What is wrong with it; empty: nothing was found."""


def lineage(workspace: Workspace, stage: str | None, *, verify: bool = False) -> Lineage:
    """The checkpoints from a stage's result back to its root, and to the videos that its clips were cut from. `stage` None: the last that
    is committed.

    With `verify` every file of every checkpoint, and of such data sets, is read and hashed.

    Raises:
        UsageError: there is no such stage.
        Refused: nothing is committed.
        Unreachable: the store did not answer.
    """
    from orchestrator.errors import Refused
    from orchestrator.inputs import datasets
    from orchestrator.ledger import lineage as lineages
    from orchestrator.prepare.origin import origin

    committed = [status for status in snapshot(workspace).stages if status.committed or status.broken]
    chosen = [status for status in committed if stage in (None, status.name)]
    if not chosen:
        check_stage(workspace, stage, "lineage")
        raise Refused(
            f"lineage {stage or workspace.pipeline.name}: nothing is committed. Make it with: osctl launch{f' {stage}' if stage else ''}"
        )
    last = chosen[-1]
    assert last.inputs_digest is not None
    named = datasets.names_of(workspace.store)
    links = list(lineages.links(workspace.ledger, last.name, last.inputs_digest, full=verify))
    rows: list[dict[str, Any]] = [
        {
            "name": link.stage,
            "inputs": link.inputs_digest,
            "attempt": link.committed.attempt if link.committed else None,
            "step": link.committed.step if link.committed else None,
            "weights": link.committed.weights_digest[:12] if link.committed else None,
            "manifest": link.committed.manifest_digest[:12] if link.committed else None,
            **_trained_on(workspace.ledger, link, named),
            "imports": _imports(workspace.ledger, link),
            "verdict": "; ".join(f"{fault.key.rsplit('/', 1)[-1]}: {fault.text}" for fault in link.faults)
            or ("verified" if verify else "present"),
            "contents": link.contents.model_dump() if link.contents else None,
            "remarks": list(link.remarks),
            "sources": [],
        }
        for link in links
    ]
    faults = [(fault.key, fault.text) for link in links for fault in link.faults]
    for place, digest in _prepared_places(workspace.ledger, links).items():
        if (found := origin(workspace.store, place, digest, full=verify)) is not None:
            rows.append(_of_origin(found, digest, verified=verify))
            faults += found.faults
    if not faults:
        return Lineage(rows, "")
    count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
    fact = f"lineage {last.name}: {count}, first: {faults[0][0]}: {faults[0][1]}"
    return Lineage(rows, f"{fact}. Do not train on it; make the stage again")


def _prepared_places(ledger: Ledger, links: Sequence[Link]) -> dict[str, str]:
    """By place of a data set that a stage was trained on: the digest of its manifest."""
    from orchestrator.inputs.contents import PREPARED

    found = {}
    for link in links:
        place = getattr(link.intent.config.data.source, "path", "") if link.intent is not None else ""
        digest = _trained_on(ledger, link, {})["data_digest"]
        if PREPARED in place and digest is not None:
            found[place] = digest
    return found


def _of_origin(found: Origin, digest: str, *, verified: bool) -> dict[str, Any]:
    good = "verified" if verified else "present"
    faults = "; ".join(f"{key.rpartition('/')[2]}: {text}" for key, text in found.faults)
    return {
        "name": found.name,
        "inputs": None,
        "attempt": found.attempt,
        "step": None,
        "weights": None,
        "manifest": digest[:12],
        "data": several(len(found.sources), "video") if found.is_there else None,
        "data_digest": digest,
        "imports": [],
        "verdict": faults or (good if found.is_there else "deleted"),
        "contents": None,
        "remarks": []
        if found.is_there or faults
        else [f"{found.place}: is deleted, since a video was taken out of it (osctl data remove)"],
        "sources": [dict(one) for one in found.sources],
        "made_by": found.made_by or None,
    }


def _trained_on(ledger: Ledger, link: Link, named: Mapping[str, str]) -> dict[str, str | None]:
    """The data that a stage was trained on, as its attempt recorded it. `named`: data sets' names by digest."""
    if link.committed is None or link.intent is None:
        return {"data": None, "data_digest": None}
    if link.intent.config.data.source.kind == "digits":
        return {"data": "digits, made by the trainer", "data_digest": None}
    terms = ledger.terms(link.stage, link.inputs_digest, link.committed.attempt)
    digest = terms.contents.data if terms is not None else None
    if digest is None:
        return {"data": NOT_RECORDED, "data_digest": None}
    return {"data": f"{digest[:12]} {named.get(digest, '')}".rstrip(), "data_digest": digest}


def _imports(ledger: Ledger, link: Link) -> list[dict[str, str | None]]:
    """Where a stage's lineage ends: at weights and encoders that were made elsewhere."""
    from orchestrator.inputs import imports
    from orchestrator.inputs.contents import imports_of

    if link.committed is None or link.intent is None:
        return []
    terms = ledger.terms(link.stage, link.inputs_digest, link.committed.attempt)
    rows: list[dict[str, str | None]] = []
    for role, name in imports_of(link.intent.config):
        digest = getattr(terms.contents, role) if terms is not None else None
        known = next(iter(imports.sources_of(ledger.store, digest)), None) if digest is not None else None
        source, licence = (known.source, known.licence) if known else (name, None)
        rows.append({"role": role, "digest": digest, "source": source, "licence": licence or NOT_RECORDED})
    return rows
