"""The ledger: what a pipeline has done and decided, in an object store. The only module that knows how records lie there.

Nothing is ever overwritten: a record is put if absent, and the first writer wins. So a driver or an agent may die after any call and
another may repeat it. What is read once never changes, and is kept: looking again at a long run reads only what is new.

Owns records and lineage; leases are `orchestrator.lease`, bytes of checkpoints `orchestrator.checkpoints`. Time comes in as an argument.
Refuses to guess. A record that cannot be read is an error that names it, where something rests on it: an intent, an outcome, a result.
Where many are listed (events, journals, manifests, revisions), and for who only looks (`lenient`), it is left out and stands in `remarks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from opensora import identity
from opensora.identity import Contents
from orchestrator import checkpoints
from orchestrator.checkpoints import Fault, Place
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, StoreConflict, TooLarge
from orchestrator.lease import TTL_S, LeaseHandle, acquire, decode_lease, is_free
from orchestrator.ports import Store, check_key
from orchestrator.records import (
    ADVICE,
    RESERVED,
    Committed,
    Damaged,
    DamageKind,
    Decision,
    Event,
    Intent,
    JournalPiece,
    Keys,
    Lease,
    Manifest,
    Outcome,
    ParentRef,
    Part,
    Record,
    Report,
    Revision,
    Terms,
    inputs_of_old,
    merge_reports,
    sha256,
)

AnyRecord = TypeVar("AnyRecord", bound=Record)
EventKind = Literal["launched", "attempt", "observed", "outcome", "committed", "retry", "cancel", "ended"]
READERS = 8
"""Records read at a time. On S3 a read is a round trip, and a day of training has thousands of journal pieces."""


REVISION = re.compile(r"\d{6,}\.json")
EVENT = re.compile(r"\d{6,}-\d{6,}\.json")
JOURNAL = re.compile(r"\d{3,}-\d{6,}\.json")
LOG = re.compile(r"\d{3,}-\d{6,}(-\d+)?\.txt")
REPORT = re.compile(r"report(-\d{3,})?\.json")
DECISION = re.compile(r".*\d{6,}\.json")
NUMBER = re.compile(r"[1-9][0-9]*")
"""Names that this ledger gives to its objects. What has another name beside them was put there by somebody else."""


@dataclass(frozen=True)
class Remark:
    """An object, or a folder, that is left out of what is shown: its key, what it is, and what to do."""

    key: str
    kind: DamageKind
    text: str

    def __str__(self) -> str:
        return f"{self.key} {self.text}"


@dataclass(frozen=True)
class Link:
    """One stage of a lineage, with all that is wrong with it."""

    stage: str
    inputs: str
    committed: Committed | None
    manifest: Manifest | None
    intent: Intent | None
    parent: ParentRef | None
    faults: tuple[Fault, ...]
    remarks: tuple[str, ...] = ()
    """What is no fault and worth knowing: contents that nobody recorded, a resume that was not bitwise."""
    contents: Contents | None = None
    """What the stage was made of, as recorded; none: not recorded."""

    @property
    def ok(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class LogPiece:
    """A piece of a trainer's output."""

    key: str
    store: Store

    @property
    def node(self) -> int:
        return int(self.key.rpartition("/")[2].partition("-")[0])

    @property
    def written(self) -> float | None:
        """Unix time of its end; None: a piece of an older version, which carries no time."""
        parts = self.key.rpartition("/")[2].removesuffix(".txt").split("-")
        return int(parts[2]) / 1000 if len(parts) == 3 else None

    def text(self) -> bytes:
        return self.store.read(self.key).data


def pipelines(store: Store) -> list[str]:
    """Names of all folders of a store that may be pipelines. Data sets and weights are none."""
    return [name for name in store.children("") if not name.startswith(".") and name not in RESERVED]


def read_intent(store: Store, key: str) -> Intent:
    """For an agent, which is given a key and nothing else. Raises NotFound, Refused."""
    return _decode(store, Intent, key, store.read(key).data)


class Ledger:
    def __init__(self, store: Store, pipeline: str):
        self.store = store
        self.pipeline = pipeline
        self.keys = Keys(pipeline)
        self.remarks: dict[str, Remark] = {}
        """By key, what was met so far and could not be read. What has been mended since, and was read again, is gone from it."""
        self._known: dict[str, Record] = {}
        self._unfinished: dict[str, list[Place]] = {}
        self._lenient = False

    def lenient(self) -> Ledger:
        """The same ledger for who only looks: a record that cannot be read counts as absent, and stands in `remarks` of its own."""
        other = Ledger(self.store, self.pipeline)
        other._known, other._lenient = self._known, True
        return other

    # Stages

    def stages(self) -> list[tuple[str, str]]:
        """Every (stage, inputs) that was ever worked on."""
        found = []
        for name in self._children(f"{self.pipeline}/stages/"):
            stage, _, inputs = name.partition("@")
            if inputs and is_key(name):
                found.append((stage, inputs))
            else:
                self._remark(f"{self.pipeline}/stages/{name}", "foreign", "is not osctl's: it is no folder of a stage and its inputs")
        return found

    def inputs_of(self, stage: str) -> list[str]:
        """All inputs that a stage of this name was run with, newest first."""

        def created(inputs: str) -> float:
            first = self._seen(Intent, self.keys.intent(stage, inputs, 1))
            return first.created if first else 0.0

        return sorted((inputs for name, inputs in self.stages() if name == stage), key=created, reverse=True)

    def committed(self, stage: str, inputs: str) -> Committed | None:
        key = self.keys.committed(stage, inputs)
        self._known.pop(key, None)  # what everything after it rests on is read anew each time
        return self._find(Committed, key)

    def commit(self, committed: Committed) -> Committed:
        """Make an attempt's result the stage's. Returns the result that is there: of a repeated call, the first one.

        Raises StoreConflict where another manifest was committed.
        """
        there = self._put(self.keys.committed(committed.stage, committed.inputs), committed)
        if there.manifest_digest != committed.manifest_digest:
            raise StoreConflict(
                f"{committed.stage}@{committed.inputs}: manifest {there.manifest_digest} of attempt {there.attempt} is committed, "
                f"not {committed.manifest_digest} of attempt {committed.attempt}"
            )
        return there

    def parent_ref(self, stage: str, inputs: str) -> ParentRef:
        """What a child of this stage starts from: record, manifest, names and sizes compared (`fetch` compares the bytes).

        Raises Refused where nothing is committed, CorruptCheckpoint naming what is wrong.
        """
        link = self._link(stage, inputs, self._committed_digests().get((stage, inputs)), full=False)
        if link.committed is None and link.faults[0].kind == "committed_missing":
            raise Refused(f"stage {stage}@{inputs}: is not committed; make it with `osctl launch {stage}`")
        if link.faults or link.committed is None:
            raise CorruptCheckpoint(f"stage {stage}: {link.faults[0]}; `osctl lineage {stage} --verify` lists all that is wrong")
        return ParentRef(
            stage=stage,
            key=link.committed.manifest,
            manifest_digest=link.committed.manifest_digest,
            committed_digest=link.committed.digest(),
        )

    # Attempts

    def attempts(self, stage: str, inputs: str) -> list[int]:
        folder = f"{self.keys.stage(stage, inputs)}/attempts/"
        numbers = []
        for name in self._children(folder):
            if NUMBER.fullmatch(name):
                numbers.append(int(name))
            else:
                self._remark(folder + name, "foreign", "is not osctl's: it is no number of an attempt")
        return sorted(numbers)

    def intent(self, stage: str, inputs: str, attempt: int) -> Intent | None:
        return self._find(Intent, self.keys.intent(stage, inputs, attempt))

    def terms(self, stage: str, inputs: str, attempt: int) -> Terms | None:
        """None: an attempt of a release that wrote none."""
        return self._find(Terms, self.keys.terms(stage, inputs, attempt))

    def write_terms(self, stage: str, inputs: str, attempt: int, terms: Terms) -> Terms:
        """Before the intent. The first writer wins; what is there comes back."""
        return self._put(self.keys.terms(stage, inputs, attempt), terms)

    def decision(self, stage: str, inputs: str) -> Decision | None:
        """A person's last word on a stage that changed; None: nobody has decided."""
        keys = list(self._list(self.keys.decision(stage, inputs, 0).removesuffix("000000.json"), DECISION))
        return self._find(Decision, max(keys)) if keys else None

    def decide(self, decision: Decision) -> None:
        """Raises StoreConflict where two people decide otherwise at once."""
        number = len(list(self.store.list(self.keys.decision(decision.stage, decision.inputs, 0).removesuffix("000000.json"))))
        self.store.create(self.keys.decision(decision.stage, decision.inputs, number), decision.encode())

    def report(self, stage: str, inputs: str, attempt: int) -> Report | None:
        """How the attempt ended, from what its nodes said so far."""
        return merge_reports(self.reports(stage, inputs, attempt))

    def reports(self, stage: str, inputs: str, attempt: int) -> list[Report]:
        """What each node has said; those that have not said anything yet are left out."""
        first = self.keys.report(stage, inputs, attempt)
        return self._read_all(Report, self._list(first.removesuffix(".json"), REPORT))

    def outcome(self, stage: str, inputs: str, attempt: int) -> Outcome | None:
        return self._find(Outcome, self.keys.outcome(stage, inputs, attempt))

    def create_intent(self, intent: Intent) -> Intent:
        """The first writer wins; what is there comes back."""
        return self._put(self.keys.intent(intent.stage, intent.inputs, intent.attempt), intent)

    def write_report(self, intent: Intent, report: Report) -> Report:
        """The first writer of a node wins; what is there comes back."""
        return self._put(self.keys.report(intent.stage, intent.inputs, intent.attempt, report.node), report)

    def write_outcome(self, intent: Intent, outcome: Outcome) -> Outcome:
        """The first writer wins; what is there comes back."""
        return self._put(self.keys.outcome(intent.stage, intent.inputs, intent.attempt), outcome)

    # Journal, log, samples

    def append_journal(self, intent: Intent, piece: JournalPiece) -> None:
        """Raises StoreConflict where another piece has this node and number."""
        self.store.create(self.keys.journal(intent.stage, intent.inputs, intent.attempt, piece.node, piece.seq), piece.encode())

    def journal(self, stage: str, inputs: str, attempt: int) -> list[JournalPiece]:
        """All pieces, by node and number."""
        return self._read_all(JournalPiece, self._list(f"{self.keys.attempt(stage, inputs, attempt)}/journal/", JOURNAL))

    def newest_piece(self, intent: Intent, node: int, after: str = "") -> str:
        """Key of a node's last journal piece; `after`, a key as well, where none is newer. A node that lives adds one now and then."""
        prefix = self.keys.journal(intent.stage, intent.inputs, intent.attempt, node, 0).removesuffix("000000.json")
        return max(self.store.list(prefix, after), default=after)

    def append_log(self, intent: Intent, node: int, seq: int, text: bytes, written: float) -> None:
        """`written`: when its last byte was read. Raises StoreConflict where other text has this node, number and time."""
        self.store.create(self.keys.log(intent.stage, intent.inputs, intent.attempt, node, seq, written), text)

    def log(self, stage: str, inputs: str, attempt: int, node: int | None = None, after: str = "") -> Iterator[LogPiece]:
        """Pieces of one node, or of all, behind the key `after`; by node and number. Each is read when its text is asked for."""
        prefix = f"{self.keys.attempt(stage, inputs, attempt)}/log/"
        for key in self._list(prefix if node is None else f"{prefix}{node:03d}-", LOG, after):
            yield LogPiece(key, self.store)

    def add_sample(self, intent: Intent, name: str, path: Path) -> None:
        self.store.upload(self.keys.sample(intent.stage, intent.inputs, intent.attempt, check_key(name)), path)

    def samples(self, stage: str, inputs: str, attempt: int) -> list[str]:
        """Keys."""
        return list(self._listed(f"{self.keys.attempt(stage, inputs, attempt)}/samples/"))

    def add_flight_record(self, intent: Intent, node: int, name: str, path: Path) -> None:
        """What the communication library wrote about a collective that did not end."""
        self.store.upload(self.keys.flight_record(intent.stage, intent.inputs, intent.attempt, node, check_key(name)), path)

    # Checkpoints

    def checkpoints(self, stage: str, inputs: str) -> list[tuple[str, Manifest]]:
        """Key and content of each manifest, by step and attempt. Checkpoints without one were never finished, and do not count.

        One whose manifest cannot be read is none either: it stands in `remarks`, and an older one is used.
        """
        folder = f"{self.keys.stage(stage, inputs)}/checkpoints/"
        keys, steps = [], set()
        for key in self._listed(folder):
            steps.add(folder + key.removeprefix(folder).partition("/")[0])
            if key.endswith(f"/{checkpoints.MANIFEST}"):
                if Place.parse(key) is None:
                    self._remark(key, "foreign", "is not osctl's: it lies in no folder of a checkpoint")
                else:
                    keys.append(key)
        unfinished = steps.difference(key.removesuffix(f"/{checkpoints.MANIFEST}") for key in keys)
        self._unfinished[folder] = [place for step in unfinished if (place := Place.parse(f"{step}/{checkpoints.MANIFEST}"))]
        return sorted(self._read_pairs(Manifest, keys), key=lambda item: (item[1].step, item[1].attempt))

    def unfinished(self, stage: str, inputs: str) -> list[Place]:
        """Checkpoints that had files and no manifest when `checkpoints` last looked: they are on their way, or their agent died."""
        return self._unfinished.get(f"{self.keys.stage(stage, inputs)}/checkpoints/", [])

    def unread_manifests(self, stage: str, inputs: str) -> list[tuple[Place, Remark]]:
        """Checkpoints that `checkpoints` has left out, since their manifests cannot be read."""
        folder = f"{self.keys.stage(stage, inputs)}/checkpoints/"
        found = [(Place.parse(key), remark) for key, remark in self.remarks.items() if key.startswith(folder)]
        return [(place, remark) for place, remark in found if place is not None]

    def published_steps(self, stage: str, inputs: str) -> list[int]:
        """Steps of the checkpoints with a manifest, from their keys alone."""
        places = map(Place.parse, self._listed(f"{self.keys.stage(stage, inputs)}/checkpoints/"))
        return sorted(place.step for place in places if place is not None)

    def publish(self, intent: Intent, step_dir: Path) -> tuple[str, Manifest]:
        """See `checkpoints.publish`."""
        return checkpoints.publish(self.store, intent, step_dir)

    def publish_part(self, intent: Intent, step_dir: Path, node: int) -> Part:
        """See `checkpoints.publish_part`."""
        return checkpoints.publish_part(self.store, intent, step_dir, node)

    def merge_parts(self, intent: Intent, step: int, description: bytes) -> tuple[str, Manifest] | None:
        """See `checkpoints.merge_parts`."""
        return checkpoints.merge_parts(self.store, intent, step, description)

    def is_published(self, intent: Intent, step: int) -> bool:
        """Whether a checkpoint of this attempt has its manifest, whole."""
        prefix = self.keys.checkpoint(intent.stage, intent.inputs, step, intent.attempt)
        try:
            Manifest.decode(self.store.read(f"{prefix}/{checkpoints.MANIFEST}").data)
        except (NotFound, Damaged):
            return False
        return True

    def fetch(self, manifest_key: str, manifest_digest: str, target: Path) -> Manifest:
        """See `checkpoints.fetch`."""
        return checkpoints.fetch(self.store, manifest_key, manifest_digest, target)

    def verify(self, manifest_key: str, manifest_digest: str, *, full: bool) -> Manifest:
        """See `checkpoints.verify`."""
        return checkpoints.verify(self.store, manifest_key, manifest_digest, full=full)

    # Lineage

    def lineage(self, stage: str, inputs: str, *, full: bool) -> Iterator[Link]:
        """From a stage to its root. Damage is told in `Link.faults`, never raised. `full` reads every byte. Raises Unreachable."""
        pins = self._committed_digests()
        seen: set[tuple[str, str]] = set()
        while (stage, inputs) not in seen:
            seen.add((stage, inputs))
            link = self._link(stage, inputs, pins.get((stage, inputs)), full=full)
            yield link
            place = Place.parse(link.parent.key) if link.parent else None
            if link.parent is None or place is None:
                return
            stage, inputs = place.stage, place.inputs
            pins.setdefault((stage, inputs), link.parent.committed_digest)

    def _link(self, stage: str, inputs: str, pin: str | None, *, full: bool) -> Link:
        """`pin` is the digest of COMMITTED.json as its event or a child's intent remembers it."""
        key = self.keys.committed(stage, inputs)
        try:
            data = self.store.read(key).data
        except NotFound:
            return Link(stage, inputs, None, None, None, None, (Fault("committed_missing", key, "is not there"),))
        try:
            committed = Committed.decode(data)
        except Damaged as error:
            return Link(stage, inputs, None, None, None, None, (Fault("committed_damaged", key, f"cannot be read ({error})"),))
        faults: list[Fault] = []
        if pin not in (None, sha256(data)):
            faults.append(Fault("committed_edited", key, f"was edited: digest {sha256(data)}, committed was {pin}"))
        place = Place.parse(committed.manifest)
        if place is None or (place.pipeline, place.stage, place.inputs) != (self.pipeline, stage, inputs):
            faults.append(Fault("other_stage", key, f"names {committed.manifest}, which is no checkpoint of {stage}@{inputs}"))
        manifest, wrong = checkpoints.inspect(self.store, committed.manifest, committed.manifest_digest, full=full)
        faults += wrong
        intent, wrong = self._intent_of(committed)
        faults += wrong
        if manifest is not None and not wrong:
            terms = self._seen(Terms, self.keys.terms(stage, inputs, committed.attempt))
            oldest = min(self.attempts(stage, inputs), default=committed.attempt)
            first = self._seen(Intent, self.keys.intent(stage, inputs, oldest))
            faults += _contradictions(committed, manifest, intent, terms, first)
        recorded = self._seen(Terms, self.keys.terms(stage, inputs, committed.attempt))
        return Link(
            stage,
            inputs,
            committed,
            manifest,
            intent,
            intent.parent if intent else None,
            tuple(faults),
            tuple(self._remarks(intent, recorded) if intent else ()),
            recorded.contents if recorded else None,
        )

    def _remarks(self, intent: Intent, terms: Terms | None) -> Iterator[str]:
        unread = self.remarks.get(self.keys.terms(intent.stage, intent.inputs, intent.attempt))
        if unread is not None:
            yield f"data not known: {unread}"
        elif terms is None:
            yield "data not recorded: the release that trained it kept no digest"
        while (otherwise := self.resumed_otherwise(intent)) is not None:
            if otherwise:
                yield f"attempt {intent.attempt} {otherwise}"
            before = self._resumed_from(intent)
            if before is None:
                return
            intent = before

    def resumed_otherwise(self, intent: Intent) -> str | None:
        """How an attempt is laid out otherwise than the one whose checkpoint it went on from, which then is not bitwise; empty: it is not.

        None: it did not go on from another one.
        """
        before = self._resumed_from(intent)
        return None if before is None else _laid_out_otherwise(before, intent)

    def _resumed_from(self, intent: Intent) -> Intent | None:
        place = Place.parse(intent.resume.key) if intent.resume else None
        if place is None or place.attempt >= intent.attempt:
            return None
        return self._seen(Intent, self.keys.intent(intent.stage, intent.inputs, place.attempt))

    def _intent_of(self, committed: Committed) -> tuple[Intent | None, list[Fault]]:
        key = self.keys.intent(committed.stage, committed.inputs, committed.attempt)
        try:
            return Intent.decode(self.store.read(key).data), []
        except NotFound:
            return None, [Fault("intent_missing", key, "is not there; what this stage started from cannot be told")]
        except Damaged as error:
            return None, [Fault("intent_damaged", key, f"cannot be read ({error})")]

    def _committed_digests(self) -> dict[tuple[str, str], str]:
        """Digest of each COMMITTED.json as it was when its event was written. The first event counts."""
        digests: dict[tuple[str, str], str] = {}
        for event in self.events():
            if event.kind == "committed" and event.stage:
                inputs, _, digest = event.detail.partition(" ")
                digests.setdefault((event.stage, inputs), digest)
        return digests

    # Revisions

    def add_revision(self, pipeline: dict[str, Any], now: float) -> int:
        """Number of this resolved pipeline. Launching the same again makes no new one."""
        while True:
            keys = self._revision_keys()
            found = dict(self._read_pairs(Revision, keys))
            number, latest = (number_of(keys[-1]), found.get(keys[-1])) if keys else (0, None)
            if latest is not None and latest.pipeline == pipeline:
                return number
            revision = Revision(created=now, pipeline=pipeline)
            if self._put(self.keys.revision(number + 1), revision) == revision:
                return number + 1

    def revision(self, number: int) -> Revision | None:
        return self._find(Revision, self.keys.revision(number))

    def latest_revision(self) -> Revision | None:
        """The newest that can be read."""
        found = self.revisions()
        return found[-1][1] if found else None

    def revisions(self) -> list[tuple[int, Revision]]:
        """Those that can be read, by number."""
        return [(number_of(key), revision) for key, revision in self._read_pairs(Revision, self._revision_keys())]

    def _revision_keys(self) -> list[str]:
        return sorted(self._list(f"{self.pipeline}/revisions/", REVISION), key=number_of)

    # Events

    def events(self, after: tuple[int, int] | None = None) -> Iterator[Event]:
        """By epoch and number; only those behind `after`."""
        start = self.keys.event(*after) if after else ""
        yield from self._read_all(Event, self._list(f"{self.pipeline}/events/", EVENT, start))

    def append_event(
        self, held: LeaseHandle, kind: EventKind, *, now: float, stage: str | None = None, attempt: int | None = None, detail: str = ""
    ) -> Event:
        """Raises StoreConflict where the lease is known to be lost."""
        if held.lost:
            raise StoreConflict(f"{self.keys.lease}: epoch {held.epoch} has lost its lease, and decides nothing any more")
        event = self._append(Event(epoch=held.epoch, seq=held.next_seq, time=now, kind=kind, stage=stage, attempt=attempt, detail=detail))
        held.next_seq = event.seq + 1
        return event

    def append_committed(self, held: LeaseHandle, committed: Committed, now: float) -> Event:
        """Remember what COMMITTED.json was, so that an edit is found. Called again, the event that is there comes back."""
        for event in self.events():
            if (event.kind, event.stage) == ("committed", committed.stage) and event.detail.startswith(f"{committed.inputs} "):
                return event
        detail = f"{committed.inputs} {committed.digest()}"
        return self.append_event(held, "committed", now=now, stage=committed.stage, attempt=committed.attempt, detail=detail)

    def ask_cancel(self, now: float, detail: str = "", *, epoch: int | None = None) -> bool:
        """Ask the live driver to drain, or to kill where `detail` says so (`asks_to_kill`). False: nobody drives.

        `epoch`: that of a driver that is still to come, which then reads it first of all.
        """
        if epoch is None:
            holder = self.holder(now)
            if holder is None:
                return False
            epoch = holder.epoch
        seen = [event.seq for event in self.events() if event.epoch == epoch]
        self._append(Event(epoch=epoch, seq=max(seen, default=-1) + 1, time=now, kind="cancel", detail=detail))
        return True

    def _append(self, event: Event) -> Event:
        """At the first free number from its own: a driver and a request to cancel may meet at one."""
        while True:
            try:
                self.store.create(self.keys.event(event.epoch, event.seq), event.encode())
                return event
            except StoreConflict:
                event = event.model_copy(update={"seq": event.seq + 1})

    # Lease

    def acquire(self, now: float, ttl_s: float = TTL_S) -> LeaseHandle:
        """Become the driver. Raises Refused naming the live holder."""
        return acquire(self.store, self.keys.lease, now, ttl_s)

    def lease(self) -> Lease | None:
        """What lies there, live or not. Raises Refused where it cannot be read."""
        try:
            return decode_lease(self.keys.lease, self.store.read(self.keys.lease).data)
        except NotFound:
            return None
        except Refused as error:
            if not self._lenient:
                raise
            self._remark(self.keys.lease, "damaged", f"cannot be read, so nobody knows who drives: {error}", advice="")
            return None

    def holder(self, now: float) -> Lease | None:
        """The live holder."""
        there = self.lease()
        return there if there and is_free(there, now) is False else None

    # Reading and writing

    def _find(self, kind: type[AnyRecord], key: str) -> AnyRecord | None:
        """None: it is not there. Raises Refused where it cannot be read; of a ledger for who only looks that is None, and a remark."""
        found = self._seen(kind, key)
        if found is None and not self._lenient and key in self.remarks:
            failure = CorruptCheckpoint if kind is Manifest else Refused
            raise failure(f"ledger {self.store.url}: {self.remarks[key]}")
        return found

    def _seen(self, kind: type[AnyRecord], key: str) -> AnyRecord | None:
        """None: it is not there, or cannot be read."""
        if key not in self._known:
            try:
                self._keep(key, self._read(kind, key))
            except NotFound:
                self.remarks.pop(key, None)
                return None
        found = self._known.get(key)
        return found if isinstance(found, kind) else None

    def _keep(self, key: str, answer: Record | Remark) -> None:
        if isinstance(answer, Remark):
            self.remarks[key] = answer
        else:
            self.remarks.pop(key, None)
            self._known[key] = answer

    def _put(self, key: str, record: AnyRecord) -> AnyRecord:
        try:
            self.store.create(key, record.encode())
            return record
        except StoreConflict:
            return _decode(self.store, type(record), key, self.store.read(key).data)

    def _read_all(self, kind: type[AnyRecord], keys: Iterable[str]) -> list[AnyRecord]:
        """Those that can be read, in order; the others stand in `remarks`."""
        return [record for _, record in self._read_pairs(kind, keys)]

    def _read_pairs(self, kind: type[AnyRecord], keys: Iterable[str]) -> list[tuple[str, AnyRecord]]:
        keys = list(keys)
        unknown = [key for key in keys if key not in self._known]

        def read(key: str) -> AnyRecord | Remark:
            try:
                return self._read(kind, key)
            except NotFound:  # listed, and not there: somebody has removed it, or the store cannot read what it lists
                return Remark(key, "damaged", f"is listed by the store, and cannot be read; {ADVICE['damaged']}")

        if len(unknown) > 1:
            with ThreadPoolExecutor(READERS) as pool:
                answers = list(pool.map(read, unknown))
        else:
            answers = [read(key) for key in unknown]
        for key, answer in zip(unknown, answers, strict=True):
            self._keep(key, answer)
        found = ((key, self._known.get(key)) for key in keys)
        return [(key, record) for key, record in found if isinstance(record, kind)]

    def _read(self, kind: type[AnyRecord], key: str) -> AnyRecord | Remark:
        """The record, or what lies there in its place. Raises NotFound, Unreachable."""
        try:
            return kind.decode(self.store.read(key).data)
        except Damaged as error:
            return Remark(key, error.kind, f"{error}; {error.advice}")
        except TooLarge as error:
            return Remark(key, "too_large", f"is no record: {error}; {ADVICE['too_large']}")
        except Refused as error:
            return Remark(key, "forbidden", f"may not be read: {error}")

    def _remark(self, key: str, kind: DamageKind, fact: str, *, advice: str | None = None) -> None:
        text = ADVICE[kind] if advice is None else advice
        self.remarks[key] = Remark(key, kind, f"{fact}; {text}" if text else fact)

    def _list(self, prefix: str, names: re.Pattern[str], after: str = "") -> Iterator[str]:
        """Keys whose last part is a name of ours. Others stand in `remarks`."""
        for key in self._listed(prefix, after):
            if names.fullmatch(key[prefix.rfind("/") + 1 :]):
                yield key
            else:
                self._remark(key, "foreign", "is not osctl's: its name is none that osctl gives")

    def _listed(self, prefix: str, after: str = "") -> list[str]:
        try:
            return list(self.store.list(prefix, after))
        except Refused as error:
            return list(self._unlisted(prefix, error))

    def _children(self, prefix: str) -> Iterable[str]:
        try:
            return self.store.children(prefix)
        except Refused as error:
            return self._unlisted(prefix, error)

    def _unlisted(self, prefix: str, error: Refused) -> Iterable[str]:
        """Whoever acts has to know what is there; whoever looks is told that it cannot be shown."""
        if not self._lenient:
            raise error
        self._remark(prefix, "forbidden", f"cannot be listed: {error}", advice="")
        return ()


def is_key(name: str) -> bool:
    """Whether a name can be a part of a key in every kind of store."""
    try:
        check_key(name)
    except Refused:
        return False
    return True


def number_of(key: str) -> int:
    """Of a revision's key."""
    return int(key.rpartition("/")[2].removesuffix(".json"))


def _decode(store: Store, kind: type[AnyRecord], key: str, data: bytes) -> AnyRecord:
    try:
        return kind.decode(data)
    except Damaged as error:
        failure = CorruptCheckpoint if kind is Manifest else Refused
        raise failure(f"ledger {store.url}: {key} {error}; {error.advice}") from error


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
    """Where records that each look right do not belong together. `first`: the oldest intent under the same inputs."""
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
        yield Fault("parent_mismatch", key, f"comes from manifest {manifest.parent_manifest}; its intent says {parent[0]}")
    if manifest.config_digest != intent.config.digest():
        fact = f"was made with a configuration of digest {manifest.config_digest}; its intent's has {intent.config.digest()}"
        yield Fault("inputs_mismatch", key, fact)
    inputs = _named(intent, terms, first, committed.parent_committed)
    if inputs != committed.inputs:
        yield Fault("inputs_mismatch", key, f"its intent's config, devices and parent give {inputs}; it lies under {committed.inputs}")


def _named(intent: Intent, terms: Terms | None, first: Intent | None, parent: str | None) -> str:
    """The `<inputs>` that an attempt belongs under, by the rule under which it was named.

    The rule of 0.1.0 counts every field. Attempts that a later release made under such a name are held against the first one there, which
    gave the name: they belong there if they are of the same identity.
    """
    if terms is not None and terms.identity > 1:
        return identity.name(intent.config, _devices(intent), parent, terms.contents)
    if first is None or identity.identity(first.config, _devices(first)) != identity.identity(intent.config, _devices(intent)):
        first = intent
    return inputs_of_old(first.config.digest(), _devices(first), parent)


def _devices(intent: Intent) -> int:
    return intent.nodes * intent.devices_per_node
