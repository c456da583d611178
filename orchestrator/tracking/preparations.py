"""The run of a preparation in MLflow: what clips were made of, how many are left at each step, what they cost. Pure.

Owns its key, and which stages used it. Refuses to read the store (`facts`).
"""

from __future__ import annotations

import os
from pathlib import Path

from opensora.config import StageConfig
from orchestrator.inputs.contents import PREPARED
from orchestrator.inputs.datasets import ROOT
from orchestrator.labels import Tag
from orchestrator.ports import RunStatus
from orchestrator.prepare.watching import State, steps_of
from orchestrator.tracking.mlflow_text import cut, flatten, metric_name

NOWHERE = Path(os.devnull)
"""In place of a run directory: what is in the store is what everybody sees."""
STATUSES: dict[str, RunStatus] = {"running": "RUNNING", "prepared": "FINISHED", "failed": "FAILED"}
DATA = "folder"
"""Name of a data set of clips, as stages that train on it log it: MLflow then shows both runs beside it."""


def key_of(pipeline: str, name: str) -> str:
    return f"{pipeline}/prepare/{name}"


def made_by(config: StageConfig, state: State) -> bool:
    """Whether a stage trains on a version of this data set."""
    place = getattr(config.data.source, "path", "")
    return f"/{ROOT}/{state.name}{PREPARED}" in place


def status(state: State) -> tuple[RunStatus, float | None]:
    """(status, Unix time of the end). Between two attempts of one that was stopped it is KILLED."""
    word = STATUSES.get(state.word, "KILLED")
    return word, None if word == "RUNNING" else newest(state)


def newest(state: State) -> float:
    """Unix time of the newest record."""
    times = [state.data_set.time] if state.data_set is not None else []
    if isinstance(told := state.status.get("time"), int | float):
        times.append(float(told))
    for one in state.attempts:
        times += [one.intent.created] if one.intent is not None else []
        times += [one.outcome.ended] if one.outcome is not None else []
    return max(times, default=0.0)


def tags(state: State) -> dict[str, str]:
    known, last = state.data_set, state.attempts[-1]
    found = {Tag.DATA_SET: state.name, Tag.ATTEMPTS: str(len(state.attempts))}
    if known is not None and known.prepared is not None:
        found |= {Tag.DATA_DIGEST: known.prepared, Tag.PLACE: known.source}
    if last.intent is not None:
        found |= {Tag.CODE: last.intent.code}
    if last.outcome is not None:
        found |= {Tag.CLASS: last.outcome.class_, Tag.REASON: cut(last.outcome.reason)}
    return found


def params(state: State) -> dict[str, str]:
    intent = state.attempts[-1].intent
    return flatten(intent.config) if intent is not None else {}


def readings(state: State) -> dict[str, float]:
    """Dollars, hours, and the rows that came into each step, were kept, dropped and put aside."""
    bill, known = state.bill, state.data_set
    found = {"usd": float(bill.usd), "gpu_hours": bill.gpu_hours, "device_hours": bill.core_hours + bill.gpu_hours}
    found["core_hours"] = bill.core_hours
    if known is not None:
        found |= {"data/clips": float(known.rows), "data/hours": known.seconds / 3600, "data/gigabytes": known.size / 1e9}
    for row in steps_of(state.status):
        found |= {f"rows/{metric_name(row['name'])}/{count}": float(row[count]) for count in ("in", "kept", "dropped", "quarantined")}
    return found


def dataset(state: State) -> tuple[str, str, str] | None:
    """(name, digest, source), as a stage on these clips has it. None: there is none yet."""
    known = state.data_set
    return (DATA, known.manifest[:32], known.source) if known is not None else None
