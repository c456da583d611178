"""A pipeline: which stages, on what, from what, at which price. The schema of `pipeline.yaml`, and a pipeline that is resolved.

Frozen. `orchestrator.recipe.resolve` makes the one of the other.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from opensora.config import Frozen, StageConfig, Unit, without_added
from opensora.dataset.prepare_config import PrepareConfig
from opensora.identity import Contents
from orchestrator.ledger.keys import RESERVED
from orchestrator.recipe.cluster_profile import ClusterProfile, DnsLabel
from orchestrator.recipe.gates import check

EXPERIMENT_CHARACTERS = 250
"""Of the name of an experiment; MLflow's databases have room for 256."""


def _of_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


NAME = re.compile(r"^[a-z]([a-z0-9.-]{0,38}[a-z0-9])?$")


Name = Annotated[str, Field(pattern=NAME.pattern)]
"""Lower-case letters, digits, `-` and `.`; from a letter; 40 characters at most, since names of cluster objects are built from it."""


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give it a value, or leave the key out")
    return text


Filled = Annotated[str, AfterValidator(_not_empty)]
"""Text that says something."""


class Resources(Frozen):
    """Where a stage runs."""

    nodes: Annotated[PositiveInt, Unit("machines")] = 1
    """Machines; each runs one agent."""
    devices_per_node: Annotated[PositiveInt, Unit("devices")] = 1
    """Processes of a node, one a device."""
    device: str = "auto"
    """A device of the price list; `auto`: this machine's CUDA devices, where it has any, else its cores."""
    min_nodes: Annotated[PositiveInt | None, Unit("machines")] = None
    """In a cluster that has had fewer nodes than `nodes` for too long, the stage goes on with fewer, at least so many, at the same global
    batch. None: it waits until there are `nodes`."""
    shrink_after_minutes: Annotated[PositiveFloat, Unit("minutes")] = 15
    """How long the cluster must have had too few nodes before the stage goes on with fewer."""

    @model_validator(mode="after")
    def _fewer_is_less(self) -> Self:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is above nodes {self.nodes}; lower min_nodes")
        if self.min_nodes is None and self.shrink_after_minutes != type(self).model_fields["shrink_after_minutes"].default:
            raise ValueError(
                f"shrink_after_minutes {self.shrink_after_minutes:g} without min_nodes; write with how few nodes the stage may go on"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without them a revision is what an older release wrote, and reads."""
        return without_added(self, write(self), ("min_nodes", "shrink_after_minutes"))


class Published(Frozen):
    """What the reference run took for this stage."""

    gpu_hours: Annotated[NonNegativeFloat, Unit("GPU-hours")]
    """Hours of all its GPUs together."""
    usd: Annotated[NonNegativeFloat, Unit("US dollars")]
    """What they cost."""
    source: str
    """Where this was published."""


class StageSpec(Frozen):
    """A stage as a pipeline file names it."""

    name: Name
    """How commands, the ledger and MLflow call it."""
    config: str
    """Stage file, relative to the pipeline file."""
    parent: Name | None = None
    """Stage whose committed checkpoint this one starts from."""
    resources: Resources = Resources()
    """Machines and devices."""
    pools: tuple[DnsLabel, ...] = ()
    """In a cluster: pools of the cluster profile in order of preference, e.g. [reserved, on-demand, spot]; empty: the profile's order."""
    max_attempts: Annotated[PositiveInt, Unit("attempts")] = 5
    """Counted attempts (docs/contracts.md: how an attempt ends) before the stage has failed."""
    hang_timeout_s: Annotated[PositiveFloat, Unit("seconds")] = 300
    """Without a heartbeat for so many seconds the attempt counts as hung."""
    gate: Annotated[str, AfterValidator(check)] | None = None
    """What must hold before the next stage starts from this one: a rule over its evaluation (direction_accuracy >= 0.5, held_out_loss <=
    parent), or `approval` by a person (osctl approve). It never holds up this stage's own commit. None: nothing."""
    published: Published | None = None
    """The reference that plans and bills are compared with."""

    @field_validator("pools")
    @classmethod
    def _each_once(cls, pools: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((name for name in pools if pools.count(name) > 1), None):
            raise ValueError(f"{twice!r} is there {pools.count(twice)} times; an attempt waits in each pool once, so name it once")
        return pools

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without pools and gate a revision is what an older release wrote, and reads."""
        return without_added(self, write(self), ("pools", "gate"))


def _not_reserved(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"is the store's own folder of {name}; give the pipeline another name")
    return name


PipelineName = Annotated[Name, AfterValidator(_not_reserved)]
"""A pipeline is a folder at the root of its store, beside those of data sets and weights."""


class PipelineFile(Frozen):
    """`pipeline.yaml`."""

    name: PipelineName
    """Top folder of its ledger in the store; two pipelines in one store need two names."""
    backend: Literal["local", "kubernetes"] = "local"
    """local: processes of this machine; kubernetes: a job of a cluster an attempt."""
    store: Filled = ".osctl/store"
    """Folder, or s3://bucket/prefix."""
    tracking: Filled = "sqlite"
    """`sqlite`: MLflow's database under .osctl; a URI: an MLflow server; `none`."""
    experiment: Annotated[Filled, Field(max_length=EXPERIMENT_CHARACTERS), AfterValidator(_of_printable)] | None = None
    """MLflow experiment; none: the pipeline's name."""
    cluster: Filled | None = None
    """With kubernetes: a shipped cluster profile's name, or a file relative to this one. Default: h800-64."""
    budget_usd: Annotated[PositiveFloat | None, Unit("US dollars")] = None
    """A launch whose plan costs more is refused."""
    flush_s: Annotated[PositiveFloat, Unit("seconds")] = 5.0
    """Seconds between two pieces of an attempt's journal, and between two looks of the driver's trackers."""
    trainer: tuple[str, ...] = ()
    """Another trainer's command; it must obey the run-directory contract. `{run_dir}` and `{devices}` are filled in."""
    prepare: dict[str, Any] | Filled | None = None
    """Raw videos of which the clips are made first: what a prepare.yaml says (osctl explain prepare), or such a file. All stages then train
    on the data set that comes out, whatever their `data.source` says."""
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    """In any order; `parent` says what follows what."""


class Stage(Frozen):
    """A stage, resolved."""

    spec: StageSpec
    config: StageConfig
    contents: Contents = Contents()
    """Digests of the clips, weights and encoders that the configuration names, as far as they are known."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Unknown contents are left out: a revision then is what an older release wrote, and reads."""
        content: dict[str, Any] = write(self)
        if self.contents == Contents():
            content.pop("contents", None)
        return content

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def devices(self) -> int:
        return self.spec.resources.nodes * self.spec.resources.devices_per_node


class Pipeline(Frozen):
    """A pipeline, resolved: every file read, every override applied. What is launched is exactly this."""

    name: PipelineName
    backend: Literal["local", "kubernetes"]
    store: str
    tracking: str
    experiment: str
    cluster: ClusterProfile | None = None
    """Whole, so that whoever reads a launched pipeline needs no file of the person who launched it. None with the backend `local`."""
    budget_usd: PositiveFloat | None
    flush_s: PositiveFloat
    trainer: tuple[str, ...]
    stages: tuple[Stage, ...]
    """In an order in which every parent comes before its children."""
    prepare: PrepareConfig | None = None
    """What the stages' clips are made of, where the recipe names raw videos."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where there is none: a revision then is what an older release wrote, and reads."""
        content: dict[str, Any] = write(self)
        if self.prepare is None:
            content.pop("prepare", None)
        return content

    def pools_of(self, stage: Stage) -> tuple[str, ...]:
        """Names of the pools in which a stage's attempts are made, the preferred one first. Empty: no cluster, or one without pools."""
        return self.cluster.order(stage.spec.pools) if self.cluster is not None else ()

    def device_of(self, stage: Stage, pool: str | None) -> str:
        """Name in the price list of the devices that an attempt of a stage has in a pool. Raises KeyError: no such pool."""
        own = self.cluster.pool(pool).device if self.cluster is not None and pool is not None else None
        return own or stage.spec.resources.device

    def stage(self, name: str) -> Stage:
        """Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
