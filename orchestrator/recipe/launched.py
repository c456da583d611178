"""What was launched: the resolved pipeline of a revision, as this release can read it.

A revision holds a whole pipeline, so each release of osctl adds to what may stand in it. Owns what is said of one that another release
wrote. Refuses to guess: a field that this release does not know is named, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from orchestrator.errors import Refused
from orchestrator.ledger.objects import Remark
from orchestrator.ledger.record import Damaged, misfit
from orchestrator.ledger.records import Revision
from orchestrator.ledger.store import REVISION, Ledger, number_of
from orchestrator.recipe.pipeline import Pipeline


@dataclass(frozen=True)
class Launched:
    """What is known of a pipeline's last launch."""

    pipeline: Pipeline | None
    """Of the newest revision that can be read; none: there is no such revision."""
    is_last: bool
    """Whether that is the last launch."""
    remarks: tuple[Remark, ...]
    """Revisions that cannot be read, newest first; foreign objects among them."""


def last(ledger: Ledger) -> Launched:
    """Raises Unreachable, and Refused where nobody may see what there is: an empty answer would look like a pipeline that never ran."""
    looked = ledger.lenient()
    readable = dict(looked.revisions())
    for key, remark in looked.remarks.items():
        if remark.kind == "forbidden" and key.endswith("/revisions/"):
            raise Refused(str(remark))
    faults = {remark.key: remark for remark in looked.remarks.values()}
    numbers = {number_of(key) for key in faults if REVISION.fullmatch(key.rpartition("/")[2])} | set(readable)
    for number in sorted(readable, reverse=True):
        found = _read(ledger, number, readable[number])
        if isinstance(found, Pipeline):
            return Launched(found, number == max(numbers), _newest_first(faults))
        faults[found.key] = found
    return Launched(None, not numbers, _newest_first(faults))


def resolve(ledger: Ledger, number: int, revision: Revision) -> Pipeline:
    """Raises Refused where another release, or another pipeline, wrote it."""
    found = _read(ledger, number, revision)
    if isinstance(found, Remark):
        raise Refused(f"pipeline {ledger.pipeline}: {found}")
    return found


def read(revision: Revision) -> Pipeline | None:
    """None: another release wrote it."""
    try:
        return Pipeline.model_validate(revision.pipeline)
    except ValidationError:
        return None


def check_ours(ledger: Ledger) -> None:
    """Before anything is written. Raises Refused where a newer release has launched this pipeline."""
    newer = next((remark for remark in last(ledger).remarks if remark.kind == "newer"), None)
    if newer is not None:
        raise Refused(f"pipeline {ledger.pipeline}: {newer}. This release writes nothing to it; or launch under another name")


def _newest_first(faults: dict[str, Remark]) -> tuple[Remark, ...]:
    return tuple(faults[key] for key in sorted(faults, reverse=True))


def _read(ledger: Ledger, number: int, revision: Revision) -> Pipeline | Remark:
    try:
        pipeline = Pipeline.model_validate(revision.pipeline)
        damage = None if pipeline.name == ledger.pipeline else Damaged(f"is a revision of the pipeline {pipeline.name}", "damaged")
    except ValidationError as error:
        damage = misfit(error)
    return pipeline if damage is None else Remark(ledger.keys.revision(number), damage.kind, f"{damage}; {damage.advice}")
