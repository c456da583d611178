"""What a launch needs of the trainer's image, and whether this release has it.

A pod may hold an image of an older release, and a driver cannot see which. So a launch asks the image itself, before a device is held: a
pod of it, without a device, runs `python -m orchestrator.agent.accepts` with the needs. An image of 0.1.0 has no such module; it fails as
well, and that means the same.

Owns what is asked and how it is answered. Refuses to talk to a cluster (`orchestrator.kube`), and reads no store.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError

from opensora.config import ADDED, ADDED_TO_DATA, ADDED_TO_IDDPM, ADDED_TO_OPTIMIZER, ADDED_TO_SAMPLING, StageConfig
from orchestrator.recipe.pipeline import Stage

NEW_IN = {"data": ADDED_TO_DATA, "sampling": ADDED_TO_SAMPLING, "objective": ADDED_TO_IDDPM, "optimizer": ADDED_TO_OPTIMIZER}
"""By part of a stage, fields that 0.1.0 did not have."""
METHODS_OF_OLD = ("ancestral", "ddim", "euler")
"""What 0.1.0 and 0.2.0 draw samples by."""
ABILITIES = ("imports",)
"""What this release's agent does and 0.1.0's does not, besides reading new fields. `imports`: it fetches weights and encoders that lie in
the store."""


class ImageNeeds(BaseModel):
    """What stages need that 0.1.0 did not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stages: tuple[dict[str, object], ...] = ()
    """Configurations, as an intent holds them, that 0.1.0 cannot read."""
    abilities: tuple[str, ...] = ()


def needs_of(stages: Iterable[Stage]) -> ImageNeeds | None:
    """None: an image of any release runs these stages."""
    found = list(stages)
    # A stage on fewer nodes has more parts of a step, which 0.1.0 does not know.
    configs = [newest_config(stage) for stage in found]
    new = tuple(config.model_dump(mode="json") for config in configs if new_fields(config))
    contents = [stage.contents for stage in found]
    imports = any(digest is not None for one in contents for digest in (one.weights, one.autoencoder, one.text))
    return ImageNeeds(stages=new, abilities=("imports",) if imports else ()) if new or imports else None


def newest_config(stage: Stage) -> StageConfig:
    """The configuration that an attempt of a stage may have, with the most fields that 0.1.0 does not know."""
    if stage.spec.resources.min_nodes is None:
        return stage.config
    return stage.config.model_copy(update={"accumulate": stage.config.accumulate + 1})


def new_fields(config: StageConfig) -> list[str]:
    """Fields that 0.1.0 did not have, where they say something else than their default."""
    content = config.model_dump(mode="json")
    found = [name for name in ADDED if name in content]
    found += [f"{part}.{name}" for part, names in NEW_IN.items() for name in names if name in content[part]]
    return [*found, *(["sampling.method"] if config.sampling.method not in METHODS_OF_OLD else [])]


def unmet(needs: str) -> str:
    """Why this release does not have what is needed (JSON of `ImageNeeds`); empty: it has."""
    try:
        asked = ImageNeeds.model_validate_json(needs)
        for stage in asked.stages:
            StageConfig.model_validate(stage)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the question'}: {first['msg']}"
    missing = [ability for ability in asked.abilities if ability not in ABILITIES]
    return f"{', '.join(missing)}: this release cannot" if missing else ""
