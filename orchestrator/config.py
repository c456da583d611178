"""A pipeline: which stages, on what, from what, at which price. Read from files, frozen once resolved.

Owns the schema of `pipeline.yaml` and the resolved `Pipeline`. Refuses to do anything but read files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from opensora.config import Frozen, StageConfig

Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9.-]{0,38}[a-z0-9])?$")]
"""Lower-case letters, digits, `-` and `.`; starts with a letter; 40 characters at most, since names of cluster objects are built from it."""


class Resources(Frozen):
    nodes: PositiveInt = 1
    devices_per_node: PositiveInt = 1
    """Processes of a node, one a device."""
    device: str = "cpu-core"
    """A device of the price list."""


class Published(Frozen):
    """What the reference run took for this stage."""

    gpu_hours: NonNegativeFloat
    usd: NonNegativeFloat
    source: str


class StageSpec(Frozen):
    """A stage as a pipeline file names it."""

    name: Name
    config: str
    """Stage file, relative to the pipeline file."""
    parent: Name | None = None
    """Stage whose committed checkpoint this one starts from."""
    resources: Resources = Resources()
    max_attempts: PositiveInt = 5
    """Counted attempts (docs/contracts.md: how an attempt ends) before the stage has failed."""
    hang_timeout_s: PositiveFloat = 300
    """Without a heartbeat for so many seconds the attempt counts as hung."""
    published: Published | None = None


class PipelineFile(Frozen):
    """`pipeline.yaml`."""

    name: Name
    backend: Literal["local", "kubernetes"] = "local"
    store: str = ".osctl/store"
    """Folder, or s3://bucket/prefix."""
    tracking: str = "sqlite"
    """`sqlite`: MLflow's database under .osctl; a URI: an MLflow server; `none`."""
    experiment: str | None = None
    """MLflow experiment; none: the pipeline's name."""
    budget_usd: PositiveFloat | None = None
    """A launch whose plan costs more is refused."""
    flush_s: PositiveFloat = 5.0
    """Seconds between two pieces of an attempt's journal, and between two looks of the driver's trackers."""
    trainer: tuple[str, ...] = ()
    """Another trainer's command; it must obey the run-directory contract. `{run_dir}` and `{devices}` are filled in."""
    stages: tuple[StageSpec, ...] = Field(min_length=1)


class Stage(Frozen):
    """A stage, resolved."""

    spec: StageSpec
    config: StageConfig

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def devices(self) -> int:
        return self.spec.resources.nodes * self.spec.resources.devices_per_node


class Pipeline(Frozen):
    """A pipeline, resolved: every file read, every override applied. What is launched is exactly this."""

    name: Name
    backend: Literal["local", "kubernetes"]
    store: str
    tracking: str
    experiment: str
    budget_usd: PositiveFloat | None
    flush_s: PositiveFloat
    trainer: tuple[str, ...]
    stages: tuple[Stage, ...]
    """In an order in which every parent comes before its children."""

    def stage(self, name: str) -> Stage:
        """Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
