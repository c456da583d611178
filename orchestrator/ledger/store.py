"""The ledger: what a pipeline has done and decided, in an object store. The only module that knows how records lie there.

Nothing is ever overwritten: a record is put if absent, and the first writer wins. So a driver or an agent may die after any call and
another may repeat it. What is read once never changes, and is kept, but for the journal: it has no bound, and whoever reads it
(`orchestrator.accounting.history`) keeps its sums.

Owns what is written when, one method for each record; leases are `orchestrator.ledger.lease`, bytes of checkpoints
`orchestrator.ledger.checkpoints`, lineage `orchestrator.ledger.lineage`. Time comes in as an argument. Refuses to guess. A record that
cannot be read is an error that names it, where something rests on it: an intent, an outcome, a result. Where many are listed (events,
journals, manifests, revisions), and for who only looks (`lenient`), it is left out and stands in `remarks`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import NotFound, Refused, StoreConflict
from orchestrator.ledger import checkpoints
from orchestrator.ledger.checkpoints import Over, Place, counts
from orchestrator.ledger.keys import RESERVED, Keys
from orchestrator.ledger.lease import TTL_S, LeaseHandle, acquire, clocks_differ, decode_lease, is_free, process_of
from orchestrator.ledger.objects import AnyRecord, Objects, Remark, decode, is_key
from orchestrator.ledger.record import Damaged
from orchestrator.ledger.records import (
    AgentProcess,
    Asked,
    ClipsUsed,
    Committed,
    DamagedCheckpoint,
    Decision,
    Evaluation,
    Event,
    GateDecision,
    Intent,
    JournalPiece,
    Lease,
    Manifest,
    Outcome,
    Part,
    Placement,
    Report,
    Revision,
    Sign,
    Terms,
    Totals,
    Trouble,
    merge_reports,
)
from orchestrator.ports import Store, check_key

EventKind = Literal["launched", "attempt", "observed", "outcome", "committed", "retry", "cancel", "ended"]
CHECKPOINT = re.compile(r"step-\d{8,}-a\d+")

REVISION = re.compile(r"\d{6,}\.json")
EVENT = re.compile(r"\d{6,}-\d{6,}\.json")
JOURNAL = re.compile(r"\d{3,}-\d{6,}\.json")
LOG = re.compile(r"\d{3,}-\d{6,}(-\d+)?\.txt")
REPORT = re.compile(r"report(-\d{3,})?\.json")
EVALUATION = re.compile(r"[0-9a-f]{12}\.json")
DECISION = re.compile(r".*\d{6,}\.json")
NUMBER = re.compile(r"[1-9][0-9]*")
"""Names that this ledger gives to its objects. What has another name beside them was put there by somebody else."""


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
    return decode(store, Intent, key, store.read(key).data)


class Ledger:
    def __init__(self, store: Store, pipeline: str, objects: Objects | None = None):
        """`objects`: of this store, where they are shared with another ledger."""
        self.store = store
        self.pipeline = pipeline
        self.keys = Keys(pipeline)
        self._objects = Objects(store) if objects is None else objects
        self.remarks = self._objects.remarks
        """By key, what was met so far and could not be read. What has been mended since, and was read again, is gone from it."""
        self._unfinished: dict[str, list[Place]] = {}

    def lenient(self) -> Ledger:
        """The same ledger for who only looks: a record that cannot be read counts as absent, and stands in `remarks` of its own."""
        return Ledger(self.store, self.pipeline, Objects(self.store, lenient=True, known=self._objects.known))

    def seen(self, kind: type[AnyRecord], key: str) -> AnyRecord | None:
        """The record under a key of this ledger; None: it is not there, or cannot be read and stands in `remarks`. Raises Unreachable."""
        return self._objects.seen(kind, key)

    # Stages

    def stages(self) -> list[tuple[str, str]]:
        """Every (stage, inputs) that was ever worked on."""
        found = []
        for name in self._objects.children(f"{self.pipeline}/stages/"):
            stage, _, inputs_digest = name.partition("@")
            if inputs_digest and is_key(name):
                found.append((stage, inputs_digest))
            else:
                self._objects.remark(
                    f"{self.pipeline}/stages/{name}", "foreign", "is not osctl's: it is no folder of a stage and its inputs"
                )
        return found

    def inputs_of(self, stage: str) -> list[str]:
        """All inputs that a stage of this name was run with, newest first."""

        def created(inputs_digest: str) -> float:
            first = self._objects.seen(Intent, self.keys.intent(stage, inputs_digest, 1))
            return first.created if first else 0.0

        return sorted((inputs_digest for name, inputs_digest in self.stages() if name == stage), key=created, reverse=True)

    def committed(self, stage: str, inputs_digest: str) -> Committed | None:
        key = self.keys.committed(stage, inputs_digest)
        self._objects.known.pop(key, None)  # what everything after it rests on is read anew each time
        return self._objects.find(Committed, key)

    def commit(self, committed: Committed) -> Committed:
        """Make an attempt's result the stage's. Returns the result that is there: of a repeated call, the first one.

        Raises StoreConflict where another manifest was committed.
        """
        there = self._objects.put(self.keys.committed(committed.stage, committed.inputs_digest), committed)
        if there.manifest_digest != committed.manifest_digest:
            raise StoreConflict(
                f"{committed.stage}@{committed.inputs_digest}: manifest {there.manifest_digest} of attempt {there.attempt} is committed, "
                f"not {committed.manifest_digest} of attempt {committed.attempt}"
            )
        return there

    # Attempts

    def attempts(self, stage: str, inputs_digest: str) -> list[int]:
        folder = f"{self.keys.stage(stage, inputs_digest)}/attempts/"
        numbers = []
        for name in self._objects.children(folder):
            if NUMBER.fullmatch(name):
                numbers.append(int(name))
            else:
                self._objects.remark(folder + name, "foreign", "is not osctl's: it is no number of an attempt")
        return sorted(numbers)

    def intent(self, stage: str, inputs_digest: str, attempt: int) -> Intent | None:
        return self._objects.find(Intent, self.keys.intent(stage, inputs_digest, attempt))

    def terms(self, stage: str, inputs_digest: str, attempt: int) -> Terms | None:
        """None: an attempt of a release that wrote none."""
        return self._objects.find(Terms, self.keys.terms(stage, inputs_digest, attempt))

    def write_terms(self, stage: str, inputs_digest: str, attempt: int, terms: Terms) -> Terms:
        """Before the intent. The first writer wins; what is there comes back."""
        return self._objects.put(self.keys.terms(stage, inputs_digest, attempt), terms)

    def placement(self, stage: str, inputs_digest: str, attempt: int) -> Placement | None:
        """None: neither pools nor fewer nodes were in question."""
        return self._objects.find(Placement, self.keys.placement(stage, inputs_digest, attempt))

    def write_placement(self, stage: str, inputs_digest: str, attempt: int, placement: Placement) -> Placement:
        """Before terms and intent. The first writer wins; what is there comes back."""
        return self._objects.put(self.keys.placement(stage, inputs_digest, attempt), placement)

    def decision(self, stage: str, inputs_digest: str) -> Decision | None:
        """A person's last word on a stage that changed; None: nobody has decided."""
        keys = self._decisions(stage, inputs_digest)
        return self._objects.find(Decision, max(keys)) if keys else None

    def decide(self, decision: Decision) -> None:
        """Raises StoreConflict where two people decide otherwise at once."""
        number = len(self._decisions(decision.stage, decision.inputs_digest))
        self.store.create(self.keys.decision(decision.stage, decision.inputs_digest, number), decision.encode())

    def _decisions(self, stage: str, inputs_digest: str) -> list[str]:
        """Their keys."""
        folder = self.keys.decision(stage, inputs_digest, 0).removesuffix("000000.json")
        return list(self._objects.list_named(folder, DECISION))

    def report(self, stage: str, inputs_digest: str, attempt: int) -> Report | None:
        """How the attempt ended, from what its nodes said so far."""
        return merge_reports(self.reports(stage, inputs_digest, attempt))

    def reports(self, stage: str, inputs_digest: str, attempt: int) -> list[Report]:
        """What each node has said; those that have not said anything yet are left out."""
        first = self.keys.report(stage, inputs_digest, attempt)
        return self._objects.read_all(Report, self._objects.list_named(first.removesuffix(".json"), REPORT))

    def outcome(self, stage: str, inputs_digest: str, attempt: int) -> Outcome | None:
        return self._objects.find(Outcome, self.keys.outcome(stage, inputs_digest, attempt))

    def create_intent(self, intent: Intent) -> Intent:
        """The first writer wins; what is there comes back."""
        return self._objects.put(self.keys.intent(intent.stage, intent.inputs_digest, intent.attempt), intent)

    def write_report(self, intent: Intent, report: Report) -> Report:
        """The first writer of a node wins; what is there comes back."""
        return self._objects.put(self.keys.report(intent.stage, intent.inputs_digest, intent.attempt, report.node), report)

    def write_outcome(self, intent: Intent, outcome: Outcome) -> Outcome:
        """The first writer wins; what is there comes back."""
        return self._objects.put(self.keys.outcome(intent.stage, intent.inputs_digest, intent.attempt), outcome)

    # What agents and drivers of different places say to each other

    def enter_agent(self, intent: Intent, agent: AgentProcess) -> AgentProcess:
        """The first writer of a node wins; what is there comes back."""
        return self._objects.put(self.keys.agent(intent.stage, intent.inputs_digest, intent.attempt, agent.node), agent)

    def agent(self, intent: Intent, node: int = 0) -> AgentProcess | None:
        """None: no agent has begun on this node, or one of a release that does not say so."""
        return self._objects.find(AgentProcess, self.keys.agent(intent.stage, intent.inputs_digest, intent.attempt, node))

    def append_sign(self, intent: Intent, sign: Sign) -> None:
        self.store.create(self.keys.sign(intent.stage, intent.inputs_digest, intent.attempt, sign.node, sign.seq), sign.encode())

    def newest_sign(self, intent: Intent, after: Sequence[str] = ("", "", "")) -> tuple[str, ...]:
        """The last key of each kind that an agent adds to while it lives; those of `after` where none is newer."""
        attempt = self.keys.attempt(intent.stage, intent.inputs_digest, intent.attempt)
        kinds = zip((("journal", JOURNAL), ("log", LOG), ("signs", JOURNAL)), after, strict=True)
        return tuple(self._objects.newest(f"{attempt}/{kind}/", names, last) for (kind, names), last in kinds)

    def silent_s(self, intent: Intent) -> float | None:
        """For how long nothing has come of an attempt that was started, by the store's own clock; none: nothing ever came."""
        keys = [key for key in self.newest_sign(intent) if key]
        return min((self.store.age(key) for key in keys), default=None)

    def ask_attempt(self, intent: Intent, asked: Asked) -> Asked:
        """For an attempt that no signal of ours reaches: its agent looks for it."""
        return self._objects.put(self.keys.asked(intent.stage, intent.inputs_digest, intent.attempt, asked.how), asked)

    def asked(self, intent: Intent) -> Literal["save", "now"] | None:
        """The most urgent that any driver asked for."""
        prefix = self.keys.asked(intent.stage, intent.inputs_digest, intent.attempt, "now").removesuffix("now.json")
        names = {key.removeprefix(prefix) for key in self.store.list(prefix)}
        return "now" if "now.json" in names else "save" if "save.json" in names else None

    def append_trouble(self, intent: Intent, trouble: Trouble) -> None:
        self.store.create(
            self.keys.trouble(intent.stage, intent.inputs_digest, intent.attempt, trouble.node, trouble.seq), trouble.encode()
        )

    def trouble(self, stage: str, inputs_digest: str, attempt: int) -> Trouble | None:
        """Of the first node whose checkpoints do not reach the store. None: all do, as far as anybody has said."""
        folder = f"{self.keys.attempt(stage, inputs_digest, attempt)}/trouble/"
        found = self._objects.read_all(Trouble, self._objects.list_named(folder, JOURNAL))
        newest = {trouble.node: trouble for trouble in found}
        return next((trouble for _, trouble in sorted(newest.items()) if trouble.reason), None)

    def write_damaged(self, intent: Intent, damaged: DamagedCheckpoint) -> DamagedCheckpoint:
        return self._objects.put(self.keys.damaged(intent.stage, intent.inputs_digest, intent.attempt), damaged)

    def damaged(self, stage: str, inputs_digest: str, attempt: int) -> DamagedCheckpoint | None:
        """What this attempt was to go on from, where that is not what was published."""
        return self._objects.find(DamagedCheckpoint, self.keys.damaged(stage, inputs_digest, attempt))

    def has_attempt(self, stage: str, inputs_digest: str, attempt: int) -> bool:
        """Whether anybody has intended it. Asks the store each time."""
        try:
            self.store.size(self.keys.intent(stage, inputs_digest, attempt))
        except NotFound:
            return False
        return True

    # Journal, log, samples

    def append_journal(self, intent: Intent, piece: JournalPiece) -> None:
        """Raises StoreConflict where another piece has this node and number."""
        self.store.create(self.keys.journal(intent.stage, intent.inputs_digest, intent.attempt, piece.node, piece.seq), piece.encode())

    def journal(self, stage: str, inputs_digest: str, attempt: int) -> list[JournalPiece]:
        """All pieces, by node and number, read anew. Of a long attempt that is a lot: see `orchestrator.accounting.history`."""
        return self._objects.read_anew(JournalPiece, self.journal_keys(stage, inputs_digest, attempt))

    def journal_keys(self, stage: str, inputs_digest: str, attempt: int, node: int | None = None, after: int = -1) -> list[str]:
        """Keys of pieces, by node and number: of all nodes, or of one those behind number `after`."""
        if node is None:
            return list(self._objects.list_named(f"{self.keys.attempt(stage, inputs_digest, attempt)}/journal/", JOURNAL))
        first = self.keys.journal(stage, inputs_digest, attempt, node, 0)
        last = self.keys.journal(stage, inputs_digest, attempt, node, after) if after >= 0 else ""
        return list(self._objects.list_named(first.removesuffix("000000.json"), JOURNAL, last))

    def piece(self, key: str) -> JournalPiece | Remark | None:
        """What lies there; none: nothing, or nothing yet."""
        try:
            return self._objects.read(JournalPiece, key)
        except NotFound:
            return None

    def has_journal(self, intent: Intent) -> bool:
        """Whether any node has written a piece."""
        for node in range(intent.nodes):
            with contextlib.suppress(NotFound):
                self.store.size(self.keys.journal(intent.stage, intent.inputs_digest, intent.attempt, node, 0))
                return True
        return False

    def append_totals(self, intent: Intent, totals: Totals) -> None:
        """After the piece of its number. Raises StoreConflict where others have this node and number."""
        self.store.create(self.keys.totals(intent.stage, intent.inputs_digest, intent.attempt, totals.node, totals.seq), totals.encode())

    def newest_totals(self, stage: str, inputs_digest: str, attempt: int, nodes: int) -> list[Totals]:
        """The newest of each node that has any."""
        prefix = f"{self.keys.attempt(stage, inputs_digest, attempt)}/totals/"
        newest: dict[str, str] = {}
        for folder in sorted(self._objects.children(prefix), reverse=True):
            newest = {key.rpartition("/")[2][:3]: key for key in self._objects.list_named(f"{prefix}{folder}/", JOURNAL)} | newest
            if len(newest) >= nodes:
                break
        return self._objects.read_anew(Totals, newest.values())

    def newest_piece(self, intent: Intent, node: int, after: str = "") -> str:
        """Key of a node's last journal piece; `after`, a key as well, where none is newer. A node that lives adds one now and then."""
        prefix = self.keys.journal(intent.stage, intent.inputs_digest, intent.attempt, node, 0).removesuffix("000000.json")
        return self._objects.newest(prefix, JOURNAL, after)

    def append_log(self, intent: Intent, node: int, seq: int, text: bytes, written: float) -> None:
        """`written`: when its last byte was read. Raises StoreConflict where other text has this node, number and time."""
        self.store.create(self.keys.log(intent.stage, intent.inputs_digest, intent.attempt, node, seq, written), text)

    def log(self, stage: str, inputs_digest: str, attempt: int, node: int | None = None, after: str = "") -> Iterator[LogPiece]:
        """Pieces of one node, or of all, behind the key `after`; by node and number. Each is read when its text is asked for."""
        prefix = f"{self.keys.attempt(stage, inputs_digest, attempt)}/log/"
        for key in self._objects.list_named(prefix if node is None else f"{prefix}{node:03d}-", LOG, after):
            yield LogPiece(key, self.store)

    def add_sample(self, intent: Intent, name: str, path: Path) -> None:
        self.store.upload(self.keys.sample(intent.stage, intent.inputs_digest, intent.attempt, check_key(name)), path)

    def samples(self, stage: str, inputs_digest: str, attempt: int) -> list[str]:
        """Keys."""
        return list(self._objects.list_all(f"{self.keys.attempt(stage, inputs_digest, attempt)}/samples/"))

    # Gates

    def gate_decisions(self, stage: str, inputs_digest: str) -> list[GateDecision]:
        """What was decided on a committed stage's gate, the newest last."""
        folder = self.keys.gate(stage, inputs_digest, 0).removesuffix("000000.json")
        return self._objects.read_all(GateDecision, self._objects.list_named(folder, DECISION))

    def decide_gate(self, decision: GateDecision) -> None:
        """Raises StoreConflict where somebody else decides at the same moment."""
        number = len(self.gate_decisions(decision.stage, decision.inputs_digest))
        self.store.create(self.keys.gate(decision.stage, decision.inputs_digest, number), decision.encode())

    # Evaluations

    def evaluation(self, stage: str, inputs_digest: str, question: str) -> Evaluation | None:
        """The answer to the question of this digest. None: nobody has given it."""
        return self._objects.find(Evaluation, self.keys.evaluation(stage, inputs_digest, question))

    def evaluations(self, stage: str, inputs_digest: str) -> list[Evaluation]:
        """All that can be read, by the time of their end."""
        folder = f"{self.keys.stage(stage, inputs_digest)}/evaluations/"
        found = self._objects.read_all(Evaluation, self._objects.list_named(folder, EVALUATION))
        return sorted(found, key=lambda one: one.ended)

    def write_evaluation(self, evaluation: Evaluation, samples: Path) -> Evaluation:
        """With its samples, which lie in the folder `samples` and come first. The first writer wins; what is there comes back."""
        about = evaluation.stage, evaluation.inputs_digest, evaluation.question
        for name in evaluation.samples:
            with contextlib.suppress(StoreConflict):  # of an evaluation that was killed, or that another process makes now
                self.store.upload(self.keys.evaluation_sample(*about, check_key(name)), samples / name)
        return self._objects.put(self.keys.evaluation(*about), evaluation)

    def evaluation_samples(self, evaluation: Evaluation) -> list[str]:
        """Keys."""
        about = evaluation.stage, evaluation.inputs_digest, evaluation.question
        return [self.keys.evaluation_sample(*about, name) for name in evaluation.samples]

    def write_clips(self, intent: Intent, clips: ClipsUsed, left_out: bytes | None) -> ClipsUsed:
        """With the list of what is left out, if there is one. The first writer wins; what is there comes back."""
        if left_out is not None:
            self.store.create(self.keys.left_out(intent.stage, intent.inputs_digest, intent.attempt), left_out)
        return self._objects.put(self.keys.clips(intent.stage, intent.inputs_digest, intent.attempt), clips)

    def clips(self, stage: str, inputs_digest: str, attempt: int) -> ClipsUsed | None:
        """What of its data it uses. None: it has not said so yet, or its trainer or its release never does."""
        return self._objects.find(ClipsUsed, self.keys.clips(stage, inputs_digest, attempt))

    def add_flight_record(self, intent: Intent, node: int, name: str, path: Path) -> None:
        """What the communication library wrote about a collective that did not end."""
        self.store.upload(self.keys.flight_record(intent.stage, intent.inputs_digest, intent.attempt, node, check_key(name)), path)

    # Checkpoints

    def checkpoints(self, stage: str, inputs_digest: str) -> list[tuple[str, Manifest]]:
        """Key and content of each manifest, by step and attempt. Checkpoints without one were never finished, and do not count.

        One whose manifest cannot be read is none either: it stands in `remarks`, and an older one is used.
        """
        folder = f"{self.keys.stage(stage, inputs_digest)}/checkpoints/"
        keys, steps = [], set()
        for key in self._objects.list_all(folder):
            steps.add(folder + key.removeprefix(folder).partition("/")[0])
            if key.endswith(f"/{checkpoints.MANIFEST}"):
                if Place.parse(key) is None:
                    self._objects.remark(key, "foreign", "is not osctl's: it lies in no folder of a checkpoint")
                else:
                    keys.append(key)
        unfinished = steps.difference(key.removesuffix(f"/{checkpoints.MANIFEST}") for key in keys)
        self._unfinished[folder] = [place for step in unfinished if (place := Place.parse(f"{step}/{checkpoints.MANIFEST}"))]
        return sorted(self._objects.read_pairs(Manifest, keys), key=lambda item: (item[1].step, item[1].attempt))

    def unfinished(self, stage: str, inputs_digest: str) -> list[Place]:
        """Checkpoints that had files and no manifest when `checkpoints` last looked: they are on their way, or their agent died."""
        return self._unfinished.get(f"{self.keys.stage(stage, inputs_digest)}/checkpoints/", [])

    def unread_manifests(self, stage: str, inputs_digest: str) -> list[tuple[Place, Remark]]:
        """Checkpoints that `checkpoints` has left out, since their manifests cannot be read."""
        folder = f"{self.keys.stage(stage, inputs_digest)}/checkpoints/"
        found = [(Place.parse(key), remark) for key, remark in self.remarks.items() if key.startswith(folder)]
        return [(place, remark) for place, remark in found if place is not None]

    def published_steps(self, stage: str, inputs_digest: str) -> list[int]:
        """Steps of the checkpoints with a manifest, from their keys alone."""
        places = map(Place.parse, self._objects.list_all(f"{self.keys.stage(stage, inputs_digest)}/checkpoints/"))
        return sorted(place.step for place in places if place is not None)

    def published(self, stage: str, inputs_digest: str) -> dict[int, int]:
        """By attempt, the step of its newest checkpoint. One request, and a manifest of each attempt: damaged ones do not count."""
        found: dict[int, int] = {}
        names = [
            name for name in self._objects.children(f"{self.keys.stage(stage, inputs_digest)}/checkpoints/") if CHECKPOINT.fullmatch(name)
        ]
        for name in sorted(names, reverse=True):
            step, _, attempt = name.removeprefix("step-").partition("-a")
            if int(attempt) not in found:
                with contextlib.suppress(Refused):
                    manifest = self._objects.find(
                        Manifest, f"{self.keys.checkpoint(stage, inputs_digest, int(step), int(attempt))}/{checkpoints.MANIFEST}"
                    )
                    if manifest is not None:
                        found[int(attempt)] = manifest.step
        return found

    def publish(self, intent: Intent, step_dir: Path, over: Over = counts) -> tuple[str, Manifest]:
        """See `checkpoints.publish`."""
        return checkpoints.publish(self.store, intent, step_dir, over)

    def discard(self, intent: Intent, step: int) -> None:
        """See `checkpoints.discard`."""
        checkpoints.discard(self.store, intent, step)

    def publish_part(self, intent: Intent, step_dir: Path, node: int) -> Part:
        """See `checkpoints.publish_part`."""
        return checkpoints.publish_part(self.store, intent, step_dir, node)

    def merge_parts(self, intent: Intent, step: int, description: bytes, over: Over = counts) -> tuple[str, Manifest] | None:
        """See `checkpoints.merge_parts`."""
        return checkpoints.merge_parts(self.store, intent, step, description, over)

    def is_published(self, intent: Intent, step: int) -> bool:
        """Whether a checkpoint of this attempt has its manifest, whole."""
        prefix = self.keys.checkpoint(intent.stage, intent.inputs_digest, step, intent.attempt)
        try:
            Manifest.decode(self.store.read(f"{prefix}/{checkpoints.MANIFEST}").data)
        except (NotFound, Damaged):
            return False
        return True

    def fetch(self, manifest_key: str, manifest_digest: str, target: Path, *, patience_s: float | None = None) -> Manifest:
        """See `checkpoints.fetch`."""
        return checkpoints.fetch(self.store, manifest_key, manifest_digest, target, patience_s=patience_s)

    def verify(self, manifest_key: str, manifest_digest: str, *, full: bool) -> Manifest:
        """See `checkpoints.verify`."""
        return checkpoints.verify(self.store, manifest_key, manifest_digest, full=full)

    # Revisions

    def add_revision(self, pipeline: dict[str, Any], now: float) -> int:
        """Number of this resolved pipeline. Launching the same again makes no new one."""
        while True:
            keys = self._revision_keys()
            found = dict(self._objects.read_pairs(Revision, keys))
            number, latest = (number_of(keys[-1]), found.get(keys[-1])) if keys else (0, None)
            if latest is not None and latest.pipeline == pipeline:
                return number
            revision = Revision(created=now, pipeline=pipeline)
            if self._objects.put(self.keys.revision(number + 1), revision) == revision:
                return number + 1

    def revision(self, number: int) -> Revision | None:
        return self._objects.find(Revision, self.keys.revision(number))

    def latest_revision(self) -> Revision | None:
        """The newest that can be read."""
        found = self.revisions()
        return found[-1][1] if found else None

    def revisions(self) -> list[tuple[int, Revision]]:
        """Those that can be read, by number."""
        return [(number_of(key), revision) for key, revision in self._objects.read_pairs(Revision, self._revision_keys())]

    def _revision_keys(self) -> list[str]:
        return sorted(self._objects.list_named(f"{self.pipeline}/revisions/", REVISION), key=number_of)

    # Events

    def events(self, after: tuple[int, int] | None = None) -> Iterator[Event]:
        """By epoch and number; only those behind `after`."""
        start = self.keys.event(*after) if after else ""
        yield from self._objects.read_all(Event, self._objects.list_named(f"{self.pipeline}/events/", EVENT, start))

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
            if (event.kind, event.stage) == ("committed", committed.stage) and event.detail.startswith(f"{committed.inputs_digest} "):
                return event
        detail = f"{committed.inputs_digest} {committed.digest()}"
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
            if not self._objects.lenient:
                raise
            self._objects.remark(self.keys.lease, "damaged", f"cannot be read, so nobody knows who drives: {error}", advice="")
            return None

    def holder(self, now: float) -> Lease | None:
        """The live holder. Where another host's clock says otherwise than this one's, the store's tells when it was renewed last."""
        there = self.lease()
        if there is None or (free := is_free(there, now)) is True:
            return None
        if free is None or (clocks_differ(there, now) and not process_of(there).is_here):
            return there if self.store.age(self.keys.lease) < TTL_S else None
        return there


def number_of(key: str) -> int:
    """Of a revision's key."""
    return int(key.rpartition("/")[2].removesuffix(".json"))
