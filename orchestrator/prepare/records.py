"""What a preparation writes into its store, and under which keys (docs/contracts.md, data sets). Pure.

datasets/<name>/lease.json                       who prepares it (`orchestrator.ledger.lease`)
datasets/<name>/events/<epoch>-<seq>.json        what was decided and seen, as of a pipeline
datasets/<name>/attempts/<n>/intent.json         written before the process starts
datasets/<name>/attempts/<n>/outcome.json        how it ended and what it cost
datasets/<name>/attempts/<n>/pods.json           which pods of a cluster it has held, and since when; replaced
datasets/<name>/asked/<digest>.json              what a pod of a cluster is to prepare
datasets/<name>/shards/<job>/…                   what the pods of an Indexed Job tell each other (`orchestrator.prepare.shards`)
datasets/<name>/status.json                      how far it is; replaced
datasets/<name>/kept/…                           results of the steps, as in the run directory
datasets/<name>/prepared/<version>/…             the data set; DATASET.json is written last
datasets/<name>/removed/<sha256>.json            a source that was taken out on request
datasets/<name>/held/<manifest>.json             which sources a version held that is deleted; trainings name its manifest
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from orchestrator.inputs.datasets import ROOT
from orchestrator.ledger.record import Record
from orchestrator.ledger.records import Price
from orchestrator.recipe.prices import cost

End = Literal["completed", "drained", "config", "data", "disk", "code", "signal", "lost"]
"""How a process ended. lost: its launcher died with it, and nobody saw how."""
EXIT_CODES: dict[End, int] = {"completed": 0, "config": 64, "data": 65, "disk": 69, "drained": 143}
"""Exit codes of `python -m opensora.prepare`; every other one is `code`, a signal is `signal`."""
DATASET = "DATASET.json"
REASON = "taken out on request"
"""Why the clips of a source that somebody took out are not in a data set."""
STEPS = ("download", "probe", "frames", "filter", "clips", "score", "caption", "encode")
"""In their order."""


class Keys:
    """Keys of a data set's objects. `Keys("mine").outcome(2)`."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, f"{ROOT}/{name}"

    @property
    def status(self) -> str:
        return f"{self.folder}/status.json"

    @property
    def kept(self) -> str:
        return f"{self.folder}/kept"

    def attempt(self, number: int) -> str:
        return f"{self.folder}/attempts/{number}"

    def intent(self, number: int) -> str:
        return f"{self.attempt(number)}/intent.json"

    def outcome(self, number: int) -> str:
        return f"{self.attempt(number)}/outcome.json"

    def version(self, version: str) -> str:
        return f"{self.folder}/prepared/{version}"

    def pods(self, number: int) -> str:
        return f"{self.attempt(number)}/pods.json"

    def shards(self, job: str) -> str:
        return f"{self.folder}/shards/{job}"

    def order(self, digest: str) -> str:
        return f"{self.folder}/asked/{digest}.json"

    def removed(self, sha256: str) -> str:
        return f"{self.folder}/removed/{sha256}.json"

    def held(self, manifest: str) -> str:
        return f"{self.folder}/held/{manifest}.json"


DeviceKind = Literal["cpu", "cuda"]


class Intent(Record):
    """What an attempt was made with, before anything of it is started."""

    ADDED: ClassVar = ("gpu", "gpu_price", "where", "made_of")

    name: str
    attempt: PositiveInt
    epoch: NonNegativeInt
    """The launcher's."""
    created: float
    config: dict[str, Any]
    """PrepareConfig, every field."""
    stages: tuple[str, ...]
    """Stages that the clips are encoded for."""
    workers: PositiveInt
    """Processes, a core each."""
    device: str
    """Name of its cores in the price list."""
    price: Price | None
    """Of a core."""
    gpu: str = ""
    """Name in the price list of the GPU that its models run on, if this machine has one; empty: it was not written down."""
    gpu_price: Price | None = None
    where: str = ""
    """Name of the Job or RayJob whose pods it holds; empty: it holds the cores of one machine."""
    made_of: str = ""
    """Of an order, what decides what comes out (`orchestrator.prepare.order.made_of`); empty: there was no order."""
    code: str
    """Version of this package."""

    def usd(self, kind: DeviceKind, device_seconds: float) -> Decimal | None:
        """Dollars, at the price of then. None: not priced."""
        price = self.price if kind == "cpu" else self.gpu_price
        return cost(Decimal(repr(device_seconds)), price.usd_per_hour) if price is not None else None


class Held(Record):
    """What a step of an attempt held."""

    step: str
    kind: DeviceKind
    name: str
    """As the machine names the device; `cpu`."""
    seconds: NonNegativeFloat
    """Device-seconds: of cores, busy or idle, and of a GPU while a model was on it."""


class Outcome(Record):
    """How an attempt ended."""

    ADDED: ClassVar = ("held",)
    class_: End = Field(alias="class")
    exit_code: int | None
    reason: str
    bound: float
    """Unix time since which its cores were held."""
    ended: float
    device_seconds: NonNegativeFloat
    """Cores x seconds for which they were held."""
    held: tuple[Held, ...] = ()
    """By step and device, as the process told it last; the core-seconds among them are part of `device_seconds`."""
    tokens_in: NonNegativeInt = 0
    tokens_out: NonNegativeInt = 0
    """Of captions."""
    caption_usd: NonNegativeFloat = 0.0
    """What the captions' server asked for them."""
    dataset: str | None = None
    """Digest of the data set, where it was completed."""
    epoch: NonNegativeInt

    @property
    def gpu_seconds(self) -> float:
        return sum(one.seconds for one in self.held if one.kind == "cuda")


class PodHeld(Record):
    """A pod of an attempt, as long as it held its node's cores and GPUs."""

    name: str
    group: str
    """What it is for: job, head, cpu, gpu."""
    cores: NonNegativeFloat
    """Cores that it requests."""
    gpus: NonNegativeInt = 0
    bound: float
    """Unix time at which it was given to its node."""
    seen: float
    """Unix time at which it was seen last, or at which it went."""

    @property
    def core_seconds(self) -> float:
        return self.cores * max(0.0, self.seen - self.bound)

    @property
    def gpu_seconds(self) -> float:
        return self.gpus * max(0.0, self.seen - self.bound)


class Pods(Record):
    """The pods of one attempt. Written as they are seen, so that it outlives whoever watches them."""

    pods: tuple[PodHeld, ...]


class ShardDone(Record):
    """A shard of the sources is done: all that was kept of it lies in the store."""

    shard: NonNegativeInt
    of: PositiveInt
    pod: str
    ended: float


class Order(Record):
    """What a pod of a cluster is to prepare: all that a launcher there cannot find out itself. It holds no secret, no time and no
    person, so that the same order has the same digest."""

    name: str
    config: dict[str, Any]
    """PrepareConfig, every field."""
    stages: dict[str, dict[str, Any]]
    """By name, the resolved StageConfig that clips are encoded for. Paths in them are a pod's."""
    parents: dict[str, str | None]
    imports: dict[str, str]
    """Digests of encoders in the store, by the name by which stages call them."""
    price: Price | None
    """Of a core."""
    gpu: str
    """Name in the price list of the GPU that models run on."""
    gpu_price: Price | None
    replace: bool
    """Whether the name may stand for other sources so far."""
    retry: bool


class Removed(Record):
    """A source that somebody asked to take out. No later preparation under this name uses it."""

    sha256: str
    uri: str
    source: str
    """Its name among the sources."""
    time: float
    holder: str
    """user@host, who did it."""


def held_of(status: Mapping[str, Any], *, since: float | None = None) -> tuple[Held, ...]:
    """What a process says in status.json that its steps hold. What cannot be read counts as not said.

    Args:
        since: Unix time; an older status is of an earlier attempt, and says nothing.
    """
    steps, when = status.get("steps"), status.get("time")
    if not isinstance(steps, dict) or (since is not None and not (isinstance(when, int | float) and when >= since)):
        return ()
    found: list[Held] = []
    for step, one in steps.items():
        seconds = one.get("held_s") if isinstance(one, dict) else None
        for kind, value in seconds.items() if isinstance(seconds, dict) else ():
            name = one.get("device") if kind == "cuda" else "cpu"
            try:
                found.append(Held.model_validate({"step": step, "kind": kind, "name": name, "seconds": value}))
            except ValidationError:
                continue
    return tuple(found)
