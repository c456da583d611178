"""The ledger's objects, as written to the object store: schema 1, one class an object, one function a key (docs/contracts.md §2).

Pure: turns bytes into values and back, computes digests and keys. Refuses to read or write anything (`orchestrator.ledger` does).
An object of an unknown schema, or with a field too many, is an error: a ledger is never half understood.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from opensora.config import StageConfig
from opensora.identity import Contents

ExitClass = Literal[
    "completed", "drained", "config", "parent", "data", "nan", "spike", "oom", "hang", "store", "disk", "code", "signal", "lost",
    "peer", "preempted", "oom_killed", "unstarted", "refused",
]  # fmt: skip

EXIT_CODES: dict[ExitClass, int] = {
    "completed": 0, "code": 1, "config": 64, "parent": 65, "nan": 66, "oom": 67, "hang": 68, "store": 69, "disk": 70, "peer": 71,
    "data": 72, "spike": 73, "drained": 143,
}  # fmt: skip
"""Exit codes of the agent. A signal n ends it with 128 + n. The others have none: the driver says them of what it saw from outside."""

HELD = (
    "pull", "preflight", "stage_in", "init", "data_wait", "step", "checkpoint", "evaluate", "publish", "hang", "drain", "lost",
    "unaccounted",
)  # fmt: skip
"""Categories of time in which a device is bound to us; they cost, and sum to devices × wall time."""
WAITING = ("queue", "schedule")
"""Categories of time in which no device is held: weight 0."""
NUMBERS = ("time", "loss", "lr", "step_s", "data_wait_s", "checkpoint_s")
"""Fields of a line of metrics that are added up or compared; each may be missing."""


DamageKind = Literal["empty", "half_written", "newer", "older", "foreign", "damaged", "forbidden", "too_large"]
"""Why an object of a store cannot be used as the record that its key promises."""

ADVICE: dict[DamageKind, str] = {
    "empty": "put back the copy that was written, or remove it",
    "half_written": "put back the copy that was written, or remove it",
    "newer": "upgrade osctl",
    "older": "put back the copy that was written, or use the release that wrote it",
    "foreign": "it is left alone; move it to another place",
    "damaged": "put back the copy that was written",
    "forbidden": "give this user the right to read it",
    "too_large": "put back the copy that was written, or move it to another place",
}
"""What a person can do about it."""

RESERVED = ("datasets", "weights")
"""Folders at the root of a store that hold data sets and weights. No pipeline may have such a name."""


class Damaged(Exception):
    """Bytes that are no object of this ledger. `str()` is a fact whose subject is the object; it says which field is wrong, and how."""

    def __init__(self, fact: str, kind: DamageKind):
        super().__init__(fact)
        self.kind: DamageKind = kind

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    ADDED: ClassVar[tuple[str, ...]] = ()
    """Fields that 0.1.0 did not have. They are left out while they have their default: then what an older release wrote is encoded to
    the bytes that it wrote, and what this one writes can be read by an older one."""
    schema_: Literal[1] = Field(default=1, alias="schema")

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        for name in self.ADDED:
            info = type(self).model_fields[name]
            if getattr(self, name) == info.get_default(call_default_factory=True):
                content.pop(info.alias or name, None)
                content.pop(name, None)
        return content

    def encode(self) -> bytes:
        """Canonical JSON: equal values give equal bytes, so that a repeated write is the same write."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":")).encode() + b"\n"

    def digest(self) -> str:
        return sha256(self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Damaged."""
        try:
            record = cls.model_validate_json(data)
        except ValidationError as error:
            raise _damage(cls, data, error) from error
        if fault := record.fault():
            raise fault
        return record

    def fault(self) -> Damaged | None:
        """What is wrong with a record that was read, beyond the types of its fields."""
        return None


class ParentRef(Record):
    """The verified result that a stage starts from."""

    stage: str
    key: str
    """Key of the parent's MANIFEST.json."""
    manifest_digest: str
    committed_digest: str


class ResumeRef(Record):
    """The checkpoint of the same stage that an attempt goes on from."""

    key: str
    manifest_digest: str
    step: NonNegativeInt


class Intent(Record):
    """Everything an agent needs, written before anything is started."""

    run_key: str
    pipeline: str
    stage: str
    inputs: str
    attempt: PositiveInt
    epoch: NonNegativeInt
    """The driver's lease epoch: an agent whose intent is older than the lease does not start."""
    created: float
    config: StageConfig
    config_digest: str
    nodes: PositiveInt
    devices_per_node: PositiveInt
    device: str
    """Name in the price list, e.g. `h800`, `cpu-core`."""
    trainer: tuple[str, ...]
    """Command that obeys the run-directory contract; `{run_dir}` and `{devices}` are filled in. Empty: torchrun with opensora.train."""
    hang_timeout_s: float
    """No heartbeat for so long is a hang."""
    flush_s: float
    """Seconds between journal pieces."""
    parent: ParentRef | None
    resume: ResumeRef | None
    code: str
    """Version (and revision, where known) of this package."""


class Price(Record):
    """What a device cost when an attempt was made. A bill of it never changes afterwards, whatever becomes of a price list."""

    usd_per_hour: Decimal = Field(ge=0)
    """Held, busy or idle."""
    is_gpu: bool
    """Whether its hours count as GPU-hours."""
    basis: Literal["published", "assumption"]
    source: str
    """Who says so."""
    date: str
    """When they said so, YYYY-MM-DD."""


class Terms(Record):
    """What an attempt was made under, beside its intent and written before it. Releases up to 0.1.0 write none and read none: a file of
    its own, since an agent of theirs refuses an intent with a field that it does not know."""

    identity: PositiveInt
    """Version of the digest that `<inputs>` is (`opensora.identity`)."""
    contents: Contents
    """What the stage is made of, by content."""
    price: Price | None
    """None: nobody knew one."""


class Decision(Record):
    """A person's word on a stage whose data, batch or configuration changed: `keep` the result that is there, or train `anew`."""

    stage: str
    inputs: str
    """Of the stage as it is configured now."""
    action: Literal["keep", "anew"]
    earlier: str
    """`<inputs>` of the result that is kept, or left."""
    reason: str
    """What changed, for people."""
    time: float


class JournalPiece(Record):
    """What an interval of one node's time was spent on. Pieces of a node are contiguous and `spent` sums to `end - start`."""

    node: NonNegativeInt
    seq: NonNegativeInt
    start: float
    end: float
    devices: PositiveInt
    spent: dict[str, NonNegativeFloat]
    """Seconds by category of HELD."""
    first_step: NonNegativeInt | None = None
    last_step: NonNegativeInt | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    """Lines of metrics.jsonl that ended in this interval (node 0 alone)."""

    def fault(self) -> Damaged | None:
        unknown = sorted(set(self.spent).difference(HELD, WAITING))
        if unknown:
            return Damaged(f"was written by a newer osctl, or changed: this one does not know the category spent.{unknown[0]}", "newer")
        for place, line in enumerate(self.metrics):
            for name in ("step", *NUMBERS):
                value = line.get(name)
                wanted = int if name == "step" else int | float | None
                if name in line and (not isinstance(value, wanted) or isinstance(value, bool)):
                    return Damaged(f"was changed after it was written: metrics.{place}.{name} is no number", "damaged")
        return None


class Totals(Record):
    """A node's journal up to piece `seq`, added up by the agent that wrote the pieces. It saves readers the pieces, and replaces none."""

    node: NonNegativeInt
    seq: NonNegativeInt
    """Newest piece that is in it."""
    pieces: PositiveInt
    """How many are in it: fewer than `seq + 1` where the store refused one."""
    start: float | None
    """Of the first piece in which a device was held; none: there is no such piece yet."""
    end: float | None
    devices: PositiveInt
    spent: dict[str, NonNegativeFloat]
    """Seconds by category, of all these pieces."""
    last_step: NonNegativeInt | None
    """Newest step that has ended; none: none has."""
    runs: tuple[tuple[NonNegativeInt, NonNegativeInt, NonNegativeFloat, NonNegativeInt], ...]
    """(first step, last step, seconds of `step`, number of the first piece), ascending: one for each interval between two checkpoints."""
    recent: tuple[tuple[NonNegativeInt, float | None, float], ...]
    """(step, loss, wall seconds) of the newest steps (node 0 alone)."""


class Report(Record):
    """The agent's last word on how the trainer ended."""

    ADDED: ClassVar[tuple[str, ...]] = ("warnings",)
    class_: ExitClass = Field(alias="class")
    reason: str
    step: NonNegativeInt | None
    rank: NonNegativeInt | None = None
    evaluation: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    """What went wrong and changed nothing about the end: a sample that could not be drawn, a stage that could not be judged."""
    started: float
    ended: float
    node: NonNegativeInt = 0


def merge_reports(reports: Sequence[Report]) -> Report | None:
    """How a job of several nodes ended, from what each of them said. None: nobody said anything.

    Node 0 alone can say that the job completed or was saved, since it publishes. Otherwise the cause is the earliest end that was not
    the consequence of another: a rank that dies takes the others with it, and those say `peer`.
    """
    first = next((report for report in reports if report.node == 0), None)
    if first is not None and first.class_ in ("completed", "drained"):
        return first
    by_time = sorted(reports, key=lambda report: (report.ended, report.node))
    causes = [report for report in by_time if report.class_ not in ("peer", "drained", "completed")]
    return next(iter(causes or by_time), None)


class FileRef(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    size: NonNegativeInt
    sha256: str


class Part(Record):
    """What one node of several has published of a checkpoint. Node 0 merges all of them into the manifest."""

    node: NonNegativeInt
    step: NonNegativeInt
    complete: bool
    files: dict[str, FileRef]
    """Without CHECKPOINT.json, which node 0 writes for all."""


class AgentClaim(Record):
    """Who lives an attempt on one node. Written by its agent, which then looks once more whether it may: of an agent and a driver that
    takes over at the same moment, one always sees the other."""

    node: NonNegativeInt
    host: str
    pid: PositiveInt
    started: float
    boot: str
    bound: float
    """Unix time since which the devices are held."""
    silent_s: float
    """Once nothing of it has reached the store for so long it is gone: it ends itself before."""


class Sign(Record):
    """That an agent lives which has nothing else to say."""

    node: NonNegativeInt
    seq: NonNegativeInt
    time: float


class Asked(Record):
    """What a driver wants of an attempt that lives where it cannot send a signal."""

    how: Literal["save", "now"]
    """save: save and leave; now: leave without saving."""
    epoch: NonNegativeInt
    by: str
    """user@host:pid of the driver."""


class Trouble(Record):
    """That checkpoints of an attempt do not reach the store, or that they do again."""

    node: NonNegativeInt
    seq: NonNegativeInt
    time: float
    reason: str
    """What the store says. Empty: it takes them again."""
    published: NonNegativeInt
    """Step of the newest checkpoint that is safe in the store; what comes after it is at risk."""


class DamagedCheckpoint(Record):
    """A checkpoint that an attempt was to go on from, and that is not what was published. No attempt uses it again."""

    key: str
    """Key of its MANIFEST.json."""
    step: NonNegativeInt
    reason: str
    by: Literal["agent", "trainer"]
    """Who found it: the agent by its bytes, or the trainer when it read it."""


class Manifest(Record):
    """What a published checkpoint consists of. Written last, by the agent alone."""

    run_key: str
    pipeline: str
    stage: str
    inputs: str
    attempt: PositiveInt
    step: NonNegativeInt
    complete: bool
    """Whether this is the stage's last step."""
    config_digest: str
    code: str
    parent_manifest: str | None
    """Digest of the parent stage's manifest."""
    files: dict[str, FileRef]
    weights_digest: str
    """sha256 over the sha256s of the files of model and ema, in this order and each by name."""


class Outcome(Record):
    """The driver's last word on an attempt."""

    class_: ExitClass = Field(alias="class")
    exit_code: int | None
    reason: str
    step: NonNegativeInt | None
    """Step of the last published checkpoint at the attempt's end."""
    bound: float | None
    """When devices were first held; none: never."""
    ended: float
    devices: PositiveInt
    unaccounted_s: NonNegativeFloat
    """Seconds a device between the last journal piece and death."""
    by_person: bool = False
    """Somebody ended it who is not its driver: nothing is started again without being asked."""
    evaluation: dict[str, float] = {}
    epoch: NonNegativeInt


class Committed(Record):
    """A stage's result."""

    run_key: str
    stage: str
    inputs: str
    attempt: PositiveInt
    step: NonNegativeInt
    manifest: str
    """Key of MANIFEST.json."""
    manifest_digest: str
    weights_digest: str
    parent_committed: str | None
    """Digest of the parent's COMMITTED.json."""
    evaluation: dict[str, float]
    time: float
    epoch: NonNegativeInt


UNUSED, NO_NEWER = "is not used: ", "as nothing newer can be used"
"""Words of events, by which `status` and a launch find them again."""


class Event(Record):
    """One decision or observation of a driver."""

    epoch: NonNegativeInt
    seq: NonNegativeInt
    time: float
    kind: Literal["launched", "attempt", "observed", "outcome", "committed", "retry", "cancel", "ended"]
    """`cancel` asks the driver to drain, or to kill where `detail` begins with `now`; `ended` closes a launch with succeeded, failed,
    cancelled or suspended in `detail`."""
    stage: str | None = None
    attempt: int | None = None
    detail: str = ""

    @property
    def asks_to_kill(self) -> bool:
        """Of a `cancel`: without saving."""
        return self.detail.partition(",")[0] == "now"

    @property
    def says_unused(self) -> bool:
        """Whether a published checkpoint is not used, or what is used in its place: people hear it at once."""
        return UNUSED in self.detail or NO_NEWER in self.detail


class Lease(Record):
    """Who drives a pipeline."""

    holder: str
    """user@host:pid, for people."""
    host: str
    pid: PositiveInt
    started: float
    """Start time of the process: a pid used again is another process."""
    boot: str
    """Boot id of the host: after a reboot every local holder is dead."""
    epoch: NonNegativeInt
    expires: float


class Revision(Record):
    """A resolved pipeline as it was launched."""

    created: float
    pipeline: dict[str, Any]


def _damage(kind: type[Record], data: bytes, error: ValidationError) -> Damaged:
    """What bytes are that are no record of this kind. Looks at the bytes only now: nearly every record is whole."""
    if not data.strip(b"\0 \t\r\n"):
        return Damaged("is empty" if not data else f"is {len(data)} bytes of nothing: it was never written to its end", "empty")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        if not data.lstrip().startswith(b"{"):
            return Damaged("is not osctl's: it is no JSON object", "foreign")
        if not data.rstrip().endswith(b"}"):
            return Damaged(f"is half written: it ends after {len(data)} bytes, in the middle of a value", "half_written")
        return Damaged("was changed after it was written: it is no JSON", "damaged")
    names = {info.alias or name for name, info in kind.model_fields.items()}
    if not isinstance(content, dict) or not content.keys() & names:
        return Damaged(f"is not osctl's: it is JSON of something else than a {kind.__name__.lower()}", "foreign")
    schema = content.get("schema", 1)
    if isinstance(schema, int) and not isinstance(schema, bool) and schema != 1:
        kinds: tuple[str, DamageKind] = ("a newer osctl", "newer") if schema > 1 else ("an osctl before 0.1.0", "older")
        return Damaged(f"was written by {kinds[0]}: its schema is {schema}, and this one reads schema 1", kinds[1])
    return misfit(error)


def misfit(error: ValidationError) -> Damaged:
    """What is told of fields that do not fit: fields and names that this release does not know were written by a newer one."""
    faults = error.errors(include_url=False, include_input=False)
    place = ".".join(map(str, faults[0]["loc"])) or "content"
    if all(fault["type"] == "extra_forbidden" for fault in faults):
        return Damaged(f"was written by a newer osctl, or changed: it has the field {place}, which this one does not know", "newer")
    if all(fault["type"] in ("extra_forbidden", "literal_error", "union_tag_invalid") for fault in faults):
        return Damaged(f"was written by a newer osctl, or changed: this one does not know its {place} ({faults[0]['msg']})", "newer")
    return Damaged(f"was changed after it was written: {place}: {faults[0]['msg']}", "damaged")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def inputs_of_old(config_digest: str, devices: int, parent_committed: str | None) -> str:
    """`<inputs>` as releases up to 0.1.0 named them: over every field of the configuration and the number of devices."""
    content = {"config": config_digest, "devices": devices, "parent": parent_committed}
    return sha256(json.dumps(content, sort_keys=True).encode())[:12]


def weights_digest(files: dict[str, FileRef]) -> str:
    """Equal runs have equal ones, whatever happened on the way; each of both is one file, or one for each rank that wrote.

    A part that is not there counts as empty. Other numbers of ranks give other digests of equal weights.
    """
    found = []
    for part in ("model", "ema"):
        names = sorted(name for name in files if re.fullmatch(rf"{part}(-\d{{5}}-of-\d{{5}})?\.safetensors", name))
        found += [files[name].sha256 for name in names] or ["-"]
    return sha256("".join(found).encode())


class Keys:
    """Keys of a pipeline's objects. `Keys("demo").committed("stage1", "0a1b2c3d4e5f")`."""

    CHECKPOINT_FORMAT: ClassVar[str] = "step-{step:08d}-a{attempt}"

    def __init__(self, pipeline: str):
        self.pipeline = pipeline

    def revision(self, number: int) -> str:
        return f"{self.pipeline}/revisions/{number:06d}.json"

    @property
    def lease(self) -> str:
        return f"{self.pipeline}/lease.json"

    def event(self, epoch: int, seq: int) -> str:
        return f"{self.pipeline}/events/{epoch:06d}-{seq:06d}.json"

    def stage(self, stage: str, inputs: str) -> str:
        return f"{self.pipeline}/stages/{stage}@{inputs}"

    def committed(self, stage: str, inputs: str) -> str:
        return f"{self.stage(stage, inputs)}/COMMITTED.json"

    def attempt(self, stage: str, inputs: str, attempt: int) -> str:
        return f"{self.stage(stage, inputs)}/attempts/{attempt}"

    def intent(self, stage: str, inputs: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/intent.json"

    def terms(self, stage: str, inputs: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/terms.json"

    def decision(self, stage: str, inputs: str, number: int) -> str:
        return f"{self.pipeline}/decisions/{stage}@{inputs}/{number:06d}.json"

    def journal(self, stage: str, inputs: str, attempt: int, node: int, seq: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/journal/{node:03d}-{seq:06d}.json"

    def totals(self, stage: str, inputs: str, attempt: int, node: int, seq: int) -> str:
        """A folder for each 1,024 pieces, so that the newest are found without a listing of all."""
        return f"{self.attempt(stage, inputs, attempt)}/totals/{seq // 1024:06d}/{node:03d}-{seq:06d}.json"

    def log(self, stage: str, inputs: str, attempt: int, node: int, seq: int, written: float) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/log/{node:03d}-{seq:06d}-{round(1000 * written)}.txt"

    def sample(self, stage: str, inputs: str, attempt: int, name: str) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/samples/{name}"

    def report(self, stage: str, inputs: str, attempt: int, node: int = 0) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/report{f'-{node:03d}' if node else ''}.json"

    def part(self, stage: str, inputs: str, attempt: int, step: int, node: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/parts/step-{step:08d}-{node:03d}.json"

    def flight_record(self, stage: str, inputs: str, attempt: int, node: int, name: str) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/flight-recorder/{node:03d}-{name}"

    def agent(self, stage: str, inputs: str, attempt: int, node: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/agents/{node:03d}.json"

    def sign(self, stage: str, inputs: str, attempt: int, node: int, seq: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/signs/{node:03d}-{seq:06d}.json"

    def asked(self, stage: str, inputs: str, attempt: int, how: Literal["save", "now"]) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/asked/{how}.json"

    def trouble(self, stage: str, inputs: str, attempt: int, node: int, seq: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/trouble/{node:03d}-{seq:06d}.json"

    def damaged(self, stage: str, inputs: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/damaged.json"

    def outcome(self, stage: str, inputs: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs, attempt)}/outcome.json"

    def checkpoint(self, stage: str, inputs: str, step: int, attempt: int) -> str:
        return f"{self.stage(stage, inputs)}/checkpoints/{self.CHECKPOINT_FORMAT.format(step=step, attempt=attempt)}"


def run_key(pipeline: str, stage: str, inputs: str, attempt: int) -> str:
    return f"{pipeline}/{stage}@{inputs}/a{attempt}"
