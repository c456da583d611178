"""Which trainings of a store have used a data set, told from the ledgers of its pipelines, for whoever takes a source out of it.

Only reads. Owns what counts as used: an attempt's terms name the manifest of its data, and the attempt was committed, has a checkpoint, or
has no outcome yet; and a stage that began from the weights of such a one, whatever its own data. Refuses to stop a training.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from orchestrator.ledger.checkpoints import Place
from orchestrator.ledger.store import Ledger, pipelines
from orchestrator.ports import Store


@dataclass(frozen=True)
class Training:
    pipeline: str
    stage: str
    inputs_digest: str
    state: Literal["committed", "under way", "not finished"]
    """under way: an attempt has no outcome yet. not finished: it has checkpoints, and nothing is committed."""
    step: int
    """Of its newest checkpoint; 0: it has none."""
    parent: str = ""
    """`stage@inputs` from whose weights it began, which had the data; empty: it had the data itself."""

    @property
    def name(self) -> str:
        """`pipeline/stage@inputs`."""
        return f"{self.pipeline}/{self.stage}@{self.inputs_digest}"


def trainings_on(store: Store, manifests: Collection[str]) -> list[Training]:
    """Of all pipelines, those whose data was one of these manifests, and their children and children's children. A record that cannot be
    read counts as absent. Raises Unreachable."""
    return [one for name in pipelines(store) for one in _of_pipeline(Ledger(store, name).lenient(), manifests)]


def _of_pipeline(ledger: Ledger, manifests: Collection[str]) -> list[Training]:
    stages = ledger.stages()
    found = {key: one for key in stages if (one := _training(ledger, *key, _attempts_on(ledger, *key, manifests))) is not None}
    children = {key: _parent(ledger, *key) for key in stages if key not in found} if found else {}
    while new := {key: parent for key, parent in children.items() if parent in found and key not in found}:
        for key, parent in new.items():
            one = _training(ledger, *key, ledger.attempts(*key), parent="@".join(parent))
            if one is None:
                del children[key]
            else:
                found[key] = one
    return [found[key] for key in stages if key in found]


def _attempts_on(ledger: Ledger, stage: str, inputs_digest: str, manifests: Collection[str]) -> list[int]:
    numbers = ledger.attempts(stage, inputs_digest)
    terms = ((number, ledger.terms(stage, inputs_digest, number)) for number in numbers)
    return [number for number, one in terms if one is not None and one.contents.data in manifests]


def _parent(ledger: Ledger, stage: str, inputs_digest: str) -> tuple[str, str]:
    """Of a stage; two empty ones: it has none. `inputs_digest` counts the parent, so that all attempts have one."""
    for number in ledger.attempts(stage, inputs_digest):
        intent = ledger.intent(stage, inputs_digest, number)
        place = Place.parse(intent.parent.key) if intent is not None and intent.parent is not None else None
        if place is not None and place.pipeline == ledger.pipeline:
            return place.stage, place.inputs_digest
    return "", ""


def _training(ledger: Ledger, stage: str, inputs_digest: str, attempts: Collection[int], parent: str = "") -> Training | None:
    if not attempts:
        return None
    committed = ledger.committed(stage, inputs_digest)
    if committed is not None:
        return Training(ledger.pipeline, stage, inputs_digest, "committed", committed.step, parent)
    published = ledger.published(stage, inputs_digest)
    step = max((published.get(number, 0) for number in attempts), default=0)
    if any(ledger.outcome(stage, inputs_digest, number) is None for number in attempts):
        return Training(ledger.pipeline, stage, inputs_digest, "under way", step, parent)
    return Training(ledger.pipeline, stage, inputs_digest, "not finished", step, parent) if step else None
