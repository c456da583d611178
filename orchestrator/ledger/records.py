"""The ledger's objects as they are written to the object store, one class for each (docs/contracts.md §2).

Pure. `record` has what they share, `keys` says where they lie. Refuses to read or write anything (`orchestrator.ledger.store` does).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
)

from opensora.config import StageConfig
from opensora.dataset.usage import Reason, Usage
from opensora.identity import Contents
from orchestrator.ledger.record import Damaged, Record, sha256

ExitClass = Literal[
    "completed", "drained", "config", "parent", "data", "nan", "spike", "oom", "hang", "store", "disk", "code", "signal", "lost",
    "peer", "preempted", "oom_killed", "unstarted", "refused", "moved",
]  # fmt: skip

EXIT_CODES: dict[ExitClass, int] = {
    "completed": 0, "code": 1, "config": 64, "parent": 65, "nan": 66, "oom": 67, "hang": 68, "store": 69, "disk": 70, "peer": 71,
    "data": 72, "spike": 73, "drained": 143,
}  # fmt: skip
"""Exit codes of the agent. A signal n ends it with 128 + n. The other classes have no exit code: the driver gives them from what it
observes."""

HELD = (
    "pull", "preflight", "stage_in", "init", "data_wait", "step", "checkpoint", "evaluate", "publish", "hang", "drain", "lost",
    "unaccounted",
)  # fmt: skip
"""Categories of time in which a device is held. They cost money, and sum to devices × wall time."""
WAITING = ("queue", "schedule")
"""Categories of time in which no device is held: they cost nothing."""
NUMBERS = ("time", "loss", "lr", "step_s", "data_wait_s", "checkpoint_s")
"""Fields of a metrics line that are added up or compared. Each may be missing."""


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
    """Everything that an agent needs. The driver writes it before it starts anything."""

    run_key: str
    pipeline: str
    stage: str
    inputs_digest: str = Field(alias="inputs")
    attempt: PositiveInt
    epoch: NonNegativeInt
    """Epoch of the driver's lease. An agent whose intent has an older epoch than the lease does not start."""
    created: float
    config: StageConfig
    config_digest: str
    nodes: PositiveInt
    devices_per_node: PositiveInt
    device: str
    """The device's name in the price list, e.g. `h800`, `cpu-core`."""
    trainer: tuple[str, ...]
    """Command that obeys the run-directory contract; `{run_dir}` and `{devices}` are filled in. Empty means torchrun and opensora.train."""
    hang_timeout_s: float
    """If there is no heartbeat for this long, the trainer hangs."""
    flush_s: float
    """Seconds between journal pieces."""
    parent: ParentRef | None
    resume: ResumeRef | None
    code: str
    """Version of this package, and its revision if known."""


class Price(Record):
    """What a device cost when an attempt was made. The attempt's bill uses it for good, even if the price list changes."""

    usd_per_hour: Decimal = Field(ge=0)
    """Price of a held device, busy or idle."""
    is_gpu: bool
    """Whether its hours count as GPU-hours."""
    basis: Literal["published", "assumption"]
    source: str
    """Who gave the price."""
    date: str
    """When it was given, YYYY-MM-DD."""


class Terms(Record):
    """Contents and price of an attempt. The driver writes them beside the intent, and before it. Releases up to 0.1.0 neither write nor
    read them; they are a separate file because an agent of those releases refuses an intent with an unknown field."""

    identity: PositiveInt
    """Version of the digest that `<inputs>` is made with (`opensora.identity`)."""
    contents: Contents
    """Digests of the content that the stage is made of."""
    price: Price | None
    """None means that no price was known."""


class Placement(Record):
    """Where an attempt is made. The driver writes it before the terms and the intent, if its cluster has pools or its stage may shrink.

    It is a file of its own because an agent of 0.2.0 refuses an intent or terms with an unknown field: so attempts in pools run with that
    release's images, and it bills them at the right price, which is in the terms."""

    pool: str | None
    """The pool of the cluster profile. None means the profile has no pools."""
    region: str | None = None
    """The pool's region, for people."""
    nodes_asked: PositiveInt
    """How many nodes the stage asks for. The intent has the number that the attempt has."""
    why: str = ""
    """Why it is not in the first pool, or not on all nodes. Empty means that it is."""


class Decision(Record):
    """A person's decision about a stage whose data, batch or configuration changed: `keep` the earlier result, or train `anew`."""

    stage: str
    inputs_digest: str = Field(alias="inputs")
    """Inputs digest of the stage as it is configured now."""
    action: Literal["keep", "anew"]
    earlier: str
    """`<inputs>` of the earlier result, which is kept or no longer used."""
    reason: str
    """What changed, for people."""
    time: float


class JournalPiece(Record):
    """How one node spent an interval of time. The pieces of a node are contiguous, and `spent` sums to `end - start`."""

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
    """Lines of metrics.jsonl whose steps ended in this interval (only from node 0)."""

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
    """A node's journal up to piece `seq`, added up by the agent that wrote the pieces. Readers need not read these pieces then; the pieces
    stay."""

    node: NonNegativeInt
    seq: NonNegativeInt
    """The newest piece that is included."""
    pieces: PositiveInt
    """How many pieces are included: fewer than `seq + 1` if the store refused one."""
    start: float | None
    """Start of the first piece in which a device was held. None means there is no such piece yet."""
    end: float | None
    devices: PositiveInt
    spent: dict[str, NonNegativeFloat]
    """Seconds by category, over all these pieces."""
    last_step: NonNegativeInt | None
    """The newest step that has ended. None means no step has."""
    runs: tuple[tuple[NonNegativeInt, NonNegativeInt, NonNegativeFloat, NonNegativeInt], ...]
    """(first step, last step, seconds of `step`, number of the first piece), ascending: one for each interval between two checkpoints."""
    recent: tuple[tuple[NonNegativeInt, float | None, float], ...]
    """(step, loss, wall seconds) of the newest steps (only from node 0)."""


class LeftOut(BaseModel):
    """Clips that are left out for one reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    reason: str
    clips: PositiveInt
    first: tuple[str, ...]
    """Names of the first ones."""


class ClipsUsed(Record):
    """How much of its data an attempt's trainer uses, as the trainer says. Node 0's agent writes it before the first step. Releases up to
    0.1.0 do not."""

    clips: NonNegativeInt
    """Number of clips that the data names."""
    used: NonNegativeInt
    left_out: tuple[LeftOut, ...] = ()
    captions_cut: NonNegativeInt | None = None
    """Number of clips whose captions are longer than the model sees. None means not counted."""
    caption_tokens: NonNegativeInt = 0
    """How many tokens of a caption the model sees."""
    caption_unit: str = "words"
    remarks: tuple[str, ...] = ()
    listing: str | None = None
    """Key of the list of all clips that are left out, with path and reason. None means that there are none, or too many for the store."""

    def usage(self) -> Usage:
        reasons = tuple(Reason(each.reason, each.clips, each.first) for each in self.left_out)
        return Usage(self.clips, self.used, reasons, self.captions_cut, self.caption_tokens, self.caption_unit, self.remarks)

    def sentences(self) -> tuple[str, ...]:
        """The same for people. Empty means that everything is used as it is."""
        return tuple(self.usage().sentences())


class Report(Record):
    """The agent's final report on how the trainer ended."""

    ADDED: ClassVar[tuple[str, ...]] = ("warnings",)
    class_: ExitClass = Field(alias="class")
    reason: str
    step: NonNegativeInt | None
    rank: NonNegativeInt | None = None
    evaluation: dict[str, float] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """What went wrong without changing the end: a sample that could not be drawn, a stage that could not be evaluated."""
    started: float
    ended: float
    node: NonNegativeInt = 0


def merge_reports(reports: Sequence[Report]) -> Report | None:
    """How a job of several nodes ended, from the report of each. None means there are no reports.

    Only node 0 can say that the job completed or was saved, since it publishes. Otherwise the cause is the earliest end that was not
    the consequence of another: a rank that dies ends the others too, and those report `peer`.
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
    """The files of a checkpoint that one node of several has published. Node 0 merges all parts into the manifest."""

    node: NonNegativeInt
    step: NonNegativeInt
    complete: bool
    files: dict[str, FileRef]
    """The node's files, without CHECKPOINT.json, which node 0 writes for all nodes."""


class AgentProcess(Record):
    """The process that runs an attempt on one node. Its agent writes this record and then checks the lease once more: if a driver takes
    over at the same moment, at least one of the two sees the other's record."""

    node: NonNegativeInt
    host: str
    pid: PositiveInt
    started: float
    boot: str
    bound: float
    """Unix time since which the devices are held."""
    silent_s: float
    """If nothing from it has reached the store for this long, it counts as gone: it ends itself before that."""


class Sign(Record):
    """A sign of life from an agent that has nothing else to write."""

    node: NonNegativeInt
    seq: NonNegativeInt
    time: float


class Asked(Record):
    """A driver's request to an attempt that runs where the driver cannot send a signal."""

    how: Literal["save", "now"]
    """`save` means save and leave, `now` means leave without saving."""
    epoch: NonNegativeInt
    by: str
    """user@host:pid of the driver."""


class Trouble(Record):
    """Checkpoints of an attempt do not reach the store, or reach it again."""

    node: NonNegativeInt
    seq: NonNegativeInt
    time: float
    reason: str
    """The store's error. Empty means that the store takes checkpoints again."""
    published: NonNegativeInt
    """Step of the newest checkpoint that is safe in the store. Steps after it are at risk."""


class DamagedCheckpoint(Record):
    """A checkpoint that an attempt was to resume from, and that is not what was published. No attempt uses it again."""

    key: str
    """Key of its MANIFEST.json."""
    step: NonNegativeInt
    reason: str
    by: Literal["agent", "trainer"]
    """Who found the damage: the agent when it compared bytes, or the trainer when it read the checkpoint."""


class Manifest(Record):
    """What a published checkpoint consists of. Only the agent writes it, after all files."""

    run_key: str
    pipeline: str
    stage: str
    inputs_digest: str = Field(alias="inputs")
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
    """sha256 over the sha256s of the files of model and ema, in this order, and of each part sorted by name."""


class Outcome(Record):
    """The driver's final record of how an attempt ended."""

    ADDED: ClassVar[tuple[str, ...]] = ("next_pool",)
    class_: ExitClass = Field(alias="class")
    exit_code: int | None
    reason: str
    step: NonNegativeInt | None
    """Step of the last published checkpoint at the attempt's end."""
    bound: float | None
    """When devices were first held. None means never."""
    ended: float
    devices: PositiveInt
    unaccounted_s: NonNegativeFloat
    """Seconds of each device between the last journal piece and the end."""
    by_person: bool = False
    """Whether a person ended it, and not its driver: then the driver starts no other attempt by itself."""
    evaluation: dict[str, float] = Field(default_factory=dict)
    next_pool: str | None = None
    """With class `moved`: the pool in which the next attempt is made, since this one waited too long in its own. None means the same."""
    epoch: NonNegativeInt


class Committed(Record):
    """A stage's result."""

    run_key: str
    stage: str
    inputs_digest: str = Field(alias="inputs")
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


class Evaluation(Record):
    """How good a stage's result is, by one evaluation. It is no part of the result: a stage may be evaluated at any time, in many ways."""

    stage: str
    inputs_digest: str = Field(alias="inputs")
    question: str
    """Digest of what was asked (`orchestrator.ledger.evaluations`)."""
    asked: dict[str, Any]
    """`evaluate`, `sampling` and `prompts` of the stage's configuration, as they were asked for."""
    step: NonNegativeInt
    manifest_digest: str
    weights_digest: str
    readings: dict[str, float]
    held_out: str | None = None
    """Digest of the held-out clips: losses on other clips are not comparable. None means that no loss was read."""
    warnings: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    """Names of its samples (`Keys.evaluation_sample`)."""
    device: str
    """Name in the price list."""
    device_s: NonNegativeFloat
    """Device-seconds that are billed: of a CPU those in which it computed, since it is shared; of a GPU those in which it was held."""
    price: Price | None
    """None means that no price was known."""
    started: float
    ended: float
    code: str


class GateDecision(Record):
    """Why the next stage may, or may not, start from a committed one that has a gate."""

    stage: str
    inputs_digest: str = Field(alias="inputs")
    gate: str
    """As the recipe had it."""
    action: Literal["approve", "refuse", "passed"]
    """A person approves or refuses; a rule was passed."""
    by: str
    """user@host; of a rule, the driver that read it."""
    note: str
    time: float


UNUSED, NO_NEWER = "is not used: ", "as nothing newer can be used"
"""Phrases in the details of events, by which `status` and a launch recognise them."""


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
        """Whether a `cancel` asks to end without saving."""
        return self.detail.partition(",")[0] == "now"

    @property
    def says_unused(self) -> bool:
        """Whether the event says that a published checkpoint is not used, or what is used in its place. A launch prints it at once."""
        return UNUSED in self.detail or NO_NEWER in self.detail


class Lease(Record):
    """Who drives a pipeline."""

    holder: str
    """user@host:pid, for people."""
    host: str
    pid: PositiveInt
    started: float
    """Start time of the process: if it differs, the pid belongs to another process now."""
    boot: str
    """Boot id of the host: if it differs, the host was rebooted and the holder is dead."""
    epoch: NonNegativeInt
    expires: float


class Revision(Record):
    """A resolved pipeline as it was launched."""

    created: float
    pipeline: dict[str, Any]


def inputs_of_old(config_digest: str, devices: int, parent_committed: str | None) -> str:
    """`<inputs>` by the rule of releases up to 0.1.0: a digest over every field of the configuration and the number of devices."""
    content = {"config": config_digest, "devices": devices, "parent": parent_committed}
    return sha256(json.dumps(content, sort_keys=True).encode())[:12]


def weights_digest(files: dict[str, FileRef]) -> str:
    """Digest over the files of model and ema; each is one file, or one for each rank that wrote. Equal runs have equal digests, whatever
    interrupted them.

    A part that is not there counts as empty. With another number of ranks equal weights have another digest.
    """
    found = []
    for part in ("model", "ema"):
        names = sorted(name for name in files if re.fullmatch(rf"{part}(-\d{{5}}-of-\d{{5}})?\.safetensors", name))
        found += [files[name].sha256 for name in names] or ["-"]
    return sha256("".join(found).encode())
