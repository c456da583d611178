"""What an attempt holds before its agent has reported anything: a cluster knows since when its pods are bound, and the ledger does not yet.

Owns adding that time to a snapshot, for people who look. The bill of an attempt that is over has the same time under the same category,
`pull`: its outcome says since when it was bound. Refuses to ask a cluster, and to change what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.accounting.cost import AttemptBill, Bill
from orchestrator.accounting.status import AttemptStatus, Snapshot, StageStatus


def with_bound(snapshot: Snapshot, bounds: Mapping[str, float], now: float) -> Snapshot:
    """The snapshot with what its live attempts hold by the cluster's word.

    Args:
        bounds: by run key, since when (Unix time) a live attempt's first pod is bound.
        now: Unix time.
    """
    return replace(snapshot, stages=tuple(_stage(stage, bounds, now) for stage in snapshot.stages)) if bounds else snapshot


def _stage(stage: StageStatus, bounds: Mapping[str, float], now: float) -> StageStatus:
    attempts, bills, added_s = list(stage.attempts), {bill.attempt: bill for bill in stage.bill.attempts}, 0.0
    for place, one in enumerate(attempts):
        bound, bill = bounds.get(one.run_key), bills.get(one.number)
        if bound is None or bill is None or bill.over:
            continue
        unheard_s = max(0.0, (one.bound if one.bound is not None else now) - bound)
        bills[one.number] = bill = _longer(bill, unheard_s)
        attempts[place] = _since(one, bound, bill)
        added_s += unheard_s
    if not added_s:
        return stage
    return replace(stage, attempts=tuple(attempts), bill=Bill(tuple(bills.values())), wall_s=stage.wall_s + added_s)


def _longer(bill: AttemptBill, seconds: float) -> AttemptBill:
    held_s = seconds * bill.devices
    return replace(bill, held_s=bill.held_s + held_s, seconds={**bill.seconds, "pull": bill.seconds["pull"] + held_s})


def _since(one: AttemptStatus, bound: float, bill: AttemptBill) -> AttemptStatus:
    return replace(one, bound=min(bound, one.bound) if one.bound is not None else bound, usd=bill.usd)
