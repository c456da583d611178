"""Lineage: from a stage's result back to its root. Each link is compared with what was committed.

Owns the comparison of records that each look right but do not belong together, and remarks on a result that are not faults.
Refuses to repair, and to compare the bytes of checkpoints (`orchestrator.ledger.checkpoints` does).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from opensora import identity
from opensora.identity import Contents
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused
from orchestrator.ledger import checkpoints
from orchestrator.ledger.checkpoints import Fault, Place
from orchestrator.ledger.record import Damaged, sha256
from orchestrator.ledger.records import ClipsUsed, Committed, Intent, Manifest, ParentRef, Placement, Terms, inputs_of_old
from orchestrator.ledger.store import Ledger


@dataclass(frozen=True)
class Link:
    """One stage of a lineage, with all its faults."""

    stage: str
    inputs_digest: str
    committed: Committed | None
    manifest: Manifest | None
    intent: Intent | None
    parent: ParentRef | None
    faults: tuple[Fault, ...]
    remarks: tuple[str, ...] = ()
    """Facts that are not faults: contents were not recorded, a resume was not bitwise."""
    contents: Contents | None = None
    """The recorded digests of what the stage was made of. None means not recorded."""

    @property
    def ok(self) -> bool:
        return not self.faults


def links(ledger: Ledger, stage: str, inputs_digest: str, *, full: bool) -> Iterator[Link]:
    """The links from a stage to its root. Damage is listed in `Link.faults`, never raised. `full` reads every byte. Raises Unreachable."""
    pins = _committed_digests(ledger)
    seen: set[tuple[str, str]] = set()
    while (stage, inputs_digest) not in seen:
        seen.add((stage, inputs_digest))
        link = _link(ledger, stage, inputs_digest, pins.get((stage, inputs_digest)), full=full)
        yield link
        place = Place.parse(link.parent.key) if link.parent else None
        if link.parent is None or place is None:
            return
        stage, inputs_digest = place.stage, place.inputs_digest
        pins.setdefault((stage, inputs_digest), _Pin(link.parent.committed_digest, None))


@dataclass(frozen=True)
class _Pin:
    """What COMMITTED.json was when it was written, as its event or a child's intent has it."""

    digest: str
    time: float | None
    """Of the event. None means that a child's intent has the digest, which knows no time."""

    def broken_by(self, data: bytes, found: Committed) -> str:
        """What is said of a COMMITTED.json that is another one now."""
        digests = f"digest {sha256(data)}, committed was {self.digest}"
        if self.time is None or found.time <= self.time:
            return f"was edited: {digests}"
        then, now = (time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment)) for moment in (self.time, found.time))
        return (
            f"is of {now}, and events/ remembers a result of {then} ({digests}): the files of that one were taken away, and the stage was "
            "trained again. Put them back, or train under another name: osctl launch --set name=OTHER"
        )


def _link(ledger: Ledger, stage: str, inputs_digest: str, pin: _Pin | None, *, full: bool) -> Link:
    """One link. `pin`: None means that no record holds a digest of COMMITTED.json."""
    key = ledger.keys.committed(stage, inputs_digest)
    try:
        data = ledger.store.read(key).data
    except NotFound:
        return Link(stage, inputs_digest, None, None, None, None, (Fault("committed_missing", key, "is not there"),))
    try:
        committed = Committed.decode(data)
    except Damaged as error:
        return Link(stage, inputs_digest, None, None, None, None, (Fault("committed_damaged", key, f"cannot be read ({error})"),))
    faults: list[Fault] = []
    if pin is not None and pin.digest != sha256(data):
        faults.append(Fault("committed_edited", key, pin.broken_by(data, committed)))
    place = Place.parse(committed.manifest)
    if place is None or (place.pipeline, place.stage, place.inputs_digest) != (ledger.pipeline, stage, inputs_digest):
        faults.append(Fault("other_stage", key, f"names {committed.manifest}, which is no checkpoint of {stage}@{inputs_digest}"))
    manifest, wrong = checkpoints.inspect(ledger.store, committed.manifest, committed.manifest_digest, full=full)
    faults += wrong
    intent, wrong = _intent_of(ledger, committed)
    faults += wrong
    if manifest is not None and not wrong:
        terms = ledger.seen(Terms, ledger.keys.terms(stage, inputs_digest, committed.attempt))
        oldest = min(ledger.attempts(stage, inputs_digest), default=committed.attempt)
        first = ledger.seen(Intent, ledger.keys.intent(stage, inputs_digest, oldest))
        faults += _contradictions(committed, manifest, intent, terms, first)
    recorded = ledger.seen(Terms, ledger.keys.terms(stage, inputs_digest, committed.attempt))
    return Link(
        stage,
        inputs_digest,
        committed,
        manifest,
        intent,
        intent.parent if intent else None,
        tuple(faults),
        (
            *_gate(ledger, stage, inputs_digest),
            *(_remarks(ledger, intent, recorded) if intent else ()),
            *(where_it_ran(ledger, intent, committed.step) if intent else ()),
        ),
        recorded.contents if recorded else None,
    )


def _gate(ledger: Ledger, stage: str, inputs_digest: str) -> Iterator[str]:
    """Who let the next stage start from this one, and when."""
    for one in ledger.gate_decisions(stage, inputs_digest):
        done = {"approve": "approved by", "refuse": "refused by", "passed": "passed, read by"}[one.action]
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(one.time))
        yield f"gate {one.gate}: {done} {one.by} on {when}" + (f": {one.note}" if one.note else "")


def _remarks(ledger: Ledger, intent: Intent, terms: Terms | None) -> Iterator[str]:
    unread = ledger.remarks.get(ledger.keys.terms(intent.stage, intent.inputs_digest, intent.attempt))
    if unread is not None:
        yield f"data not known: {unread}"
    elif terms is None:
        yield "data not recorded: the release that trained it kept no digest"
    used = ledger.seen(ClipsUsed, ledger.keys.clips(intent.stage, intent.inputs_digest, intent.attempt))
    yield from used.sentences() if used is not None else ()
    while (otherwise := resumed_otherwise(ledger, intent)) is not None:
        if otherwise:
            yield f"attempt {intent.attempt} {otherwise}"
        before = _resumed_from(ledger, intent)
        if before is None:
            return
        intent = before


def where_it_ran(ledger: Ledger, intent: Intent, last: int) -> Iterator[str]:
    """In which pool, and on how many nodes, the steps of a result were done: `steps 400-900 on 4 of 8 nodes`, the first steps first.

    Nothing is said of steps on all nodes of a cluster without pools.

    Args:
        intent: of the attempt that came to step `last`.
    """
    parts: list[tuple[int, int, str]] = []
    newest: Intent | None = intent
    while newest is not None:
        first = newest.resume.step + 1 if newest.resume else 1
        placement = ledger.seen(Placement, ledger.keys.placement(newest.stage, newest.inputs_digest, newest.attempt))
        words = "" if placement is None else _placed(placement, newest.nodes)
        if parts and parts[-1][2] == words:
            parts[-1] = first, parts[-1][1], words
        elif first <= last:
            parts.append((first, last, words))
        last, newest = first - 1, _resumed_from(ledger, newest)
    yield from (f"steps {first}-{end} {words}" for first, end, words in reversed(parts) if words)


def _placed(placement: Placement, nodes: int) -> str:
    fewer = f"on {nodes} of {placement.nodes_asked} nodes" if nodes != placement.nodes_asked else ""
    region = f" ({placement.region})" if placement.region else ""
    return " ".join(filter(None, (fewer, f"in pool {placement.pool}{region}" if placement.pool else "")))


def resumed_otherwise(ledger: Ledger, intent: Intent) -> str | None:
    """How an attempt's layout differs from that of the attempt whose checkpoint it resumed: the resume is then not bitwise.

    Empty means the same layout. None means that the attempt did not resume another one's checkpoint.
    """
    before = _resumed_from(ledger, intent)
    return None if before is None else _laid_out_otherwise(before, intent)


def _resumed_from(ledger: Ledger, intent: Intent) -> Intent | None:
    place = Place.parse(intent.resume.key) if intent.resume else None
    if place is None or place.attempt >= intent.attempt:
        return None
    return ledger.seen(Intent, ledger.keys.intent(intent.stage, intent.inputs_digest, place.attempt))


def _intent_of(ledger: Ledger, committed: Committed) -> tuple[Intent | None, list[Fault]]:
    key = ledger.keys.intent(committed.stage, committed.inputs_digest, committed.attempt)
    try:
        return Intent.decode(ledger.store.read(key).data), []
    except NotFound:
        return None, [Fault("intent_missing", key, "is not there; what this stage started from cannot be told")]
    except Damaged as error:
        return None, [Fault("intent_damaged", key, f"cannot be read ({error})")]


def _committed_digests(ledger: Ledger) -> dict[tuple[str, str], _Pin]:
    """The digest of each COMMITTED.json, from the event that was written with it. The first event counts."""
    digests: dict[tuple[str, str], _Pin] = {}
    for event in ledger.events():
        if event.kind == "committed" and event.stage:
            inputs_digest, _, digest = event.detail.partition(" ")
            digests.setdefault((event.stage, inputs_digest), _Pin(digest, event.time))
    return digests


def parent_ref(ledger: Ledger, stage: str, inputs_digest: str) -> ParentRef:
    """The reference from which a child of this stage starts. Records, names and sizes are compared here; `fetch` compares the bytes.

    Raises Refused if nothing is committed, CorruptCheckpoint, which names the fault.
    """
    link = _link(ledger, stage, inputs_digest, _committed_digests(ledger).get((stage, inputs_digest)), full=False)
    if link.committed is None and link.faults[0].kind == "committed_missing":
        raise Refused(f"stage {stage}@{inputs_digest}: is not committed; make it with `osctl launch {stage}`")
    if link.faults or link.committed is None:
        raise CorruptCheckpoint(f"stage {stage}: {link.faults[0]}; `osctl lineage {stage} --verify` lists all that is wrong")
    return ParentRef(
        stage=stage,
        key=link.committed.manifest,
        manifest_digest=link.committed.manifest_digest,
        committed_digest=link.committed.digest(),
    )


def _laid_out_otherwise(before: Intent, after: Intent) -> str:
    if before.nodes != after.nodes:
        return f"resumed on {after.nodes} of {before.nodes} nodes, not bitwise"
    if _devices(before) != _devices(after):
        return f"resumed on {_devices(after)} of {_devices(before)} devices, not bitwise"
    if (before.config.parallel, before.config.accumulate) != (after.config.parallel, after.config.accumulate):
        return "resumed with another strategy, not bitwise"
    return ""


def _contradictions(
    committed: Committed, manifest: Manifest, intent: Intent | None, terms: Terms | None, first: Intent | None
) -> Iterator[Fault]:
    """Faults of records that each look right but do not belong together. `first` is the oldest intent under the same inputs."""
    key = committed.manifest
    if manifest.run_key != committed.run_key or manifest.step != committed.step:
        found = f"is step {manifest.step} of {manifest.run_key}; committed was step {committed.step} of {committed.run_key}"
        yield Fault("older_checkpoint" if manifest.step < committed.step else "committed_edited", key, found)
    if not manifest.complete:
        yield Fault("incomplete", key, f"is step {manifest.step}, which is not the stage's last")
    if manifest.weights_digest != committed.weights_digest:
        yield Fault("committed_edited", key, f"weights {manifest.weights_digest}, committed were {committed.weights_digest}")
    if intent is None:
        return
    parent = (intent.parent.manifest_digest, intent.parent.committed_digest) if intent.parent else (None, None)
    if (manifest.parent_manifest, committed.parent_committed) != parent:
        of = ("manifest", manifest.parent_manifest, parent[0])
        what, came, said = of if of[1] != of[2] else ("the parent that was committed as", committed.parent_committed, parent[1])
        yield Fault("parent_mismatch", key, f"comes from {what} {came}; its intent says {said}")
    if manifest.config_digest != intent.config.digest():
        fact = f"was made with a configuration of digest {manifest.config_digest}; its intent's has {intent.config.digest()}"
        yield Fault("inputs_mismatch", key, fact)
    inputs_digest = _named(intent, terms, first, committed.parent_committed)
    if inputs_digest != committed.inputs_digest:
        yield Fault(
            "inputs_mismatch", key, f"its intent's config, devices and parent give {inputs_digest}; it lies under {committed.inputs_digest}"
        )


def _named(intent: Intent, terms: Terms | None, first: Intent | None, parent: str | None) -> str:
    """The `<inputs>` that an attempt belongs to, by the rule of the release that named it.

    The rule of 0.1.0 counts every field. If a later release made attempts under such a name, they are compared with the first one there,
    which gave the name: they belong there if they have the same identity.
    """
    if terms is not None and terms.identity > 1:
        return identity.name(intent.config, _devices(intent), parent, terms.contents)
    if first is None or identity.identity(first.config, _devices(first)) != identity.identity(intent.config, _devices(intent)):
        first = intent
    return inputs_of_old(first.config.digest(), _devices(first), parent)


def _devices(intent: Intent) -> int:
    return intent.nodes * intent.devices_per_node
