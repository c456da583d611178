"""The same pipeline in other circumstances: on a person's own clips, on the devices of this machine or of a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from opensora.config import FolderSource, ManifestSource
from orchestrator.recipe.pipeline import Pipeline, Stage
from orchestrator.recipe.prices import Prices
from orchestrator.recipe.yaml_file import usage_error

MAX_PROMPTS = 8
"""Captions of a folder that become prompts: as many rows as a contact sheet shows on one screen. Arbitrary."""
LOCAL_CPU, LOCAL_GPU = "cpu-core", "local-gpu"
"""Names in the price list of what `device: auto` is on a machine."""


def check_rates(pipeline: Pipeline) -> None:
    """Of the stages with the clips that they will have. Raises UsageError, where frames of drawn digits are asked for by time."""
    for stage in pipeline.stages:
        data = stage.config.data
        if data.fps is not None and data.source.kind == "digits":
            raise usage_error(f"{stage.name}.data.fps {data.fps:g}: digits are drawn frame by frame, they have no rate. Leave it out")


def with_data(pipeline: Pipeline, source: FolderSource | ManifestSource, captions: Iterable[str]) -> Pipeline:
    """The same pipeline on a person's own clips: every stage trains on them, nothing is judged by the demo's judge of digits, and the
    prompts are captions of theirs, different ones in their order."""
    different = tuple(itertools.islice(dict.fromkeys(captions), MAX_PROMPTS))
    changed: list[Stage] = []
    for stage in pipeline.stages:
        data = stage.config.data.model_copy(update={"source": source})
        prompts = different if stage.config.prompts else ()
        config = stage.config.model_copy(update={"data": data, "evaluate": None, "prompts": prompts})
        changed.append(stage.model_copy(update={"config": config}))
    return pipeline.model_copy(update={"stages": tuple(changed), "prepare": None})


def on_prepared(pipeline: Pipeline, place: str) -> Pipeline:
    """The same pipeline on the data set that was made of its raw videos. It was written for them: what it evaluates and draws stays."""
    source = FolderSource(kind="folder", path=place)
    stages = []
    for stage in pipeline.stages:
        data = stage.config.data.model_copy(update={"source": source})
        stages.append(stage.model_copy(update={"config": stage.config.model_copy(update={"data": data})}))
    return pipeline.model_copy(update={"stages": tuple(stages)})


def ignored(pipeline: Pipeline) -> list[str]:
    """Sentences about what a recipe says of a cluster, and what this machine, which is one node, has none of. Empty with a cluster."""
    if pipeline.cluster is not None:
        return []
    said = []
    for stage in pipeline.stages:
        named = [f"pools {', '.join(stage.spec.pools)}"] if stage.spec.pools else []
        named += [f"min_nodes {stage.spec.resources.min_nodes}"] if stage.spec.resources.min_nodes is not None else []
        if named:
            counts, it_changes = ("count", "they change") if len(named) > 1 or len(stage.spec.pools) else ("counts", "it changes")
            said.append(f"{stage.name}: {' and '.join(named)} {counts} in a cluster alone; on this machine {it_changes} nothing")
    return said


def on_devices(pipeline: Pipeline, gpus: int) -> Pipeline:
    """The same pipeline with `device: auto` decided for a machine with so many CUDA devices, or for its cluster.

    A stage gets as many GPUs as it has processes, or as there are; its batch a device grows in turn, so that the global batch and with it
    the recipe stay the same. Where they do not divide, fewer GPUs are used.
    """
    stages: list[Stage] = []
    for stage in pipeline.stages:
        asked = stage.spec.resources
        if asked.device == "auto" and pipeline.cluster is not None:
            spec = stage.spec.model_copy(update={"resources": asked.model_copy(update={"device": pipeline.cluster.device})})
            stage = stage.model_copy(update={"spec": spec})
        elif asked.device == "auto":
            stage = _on_machine(stage, gpus)
        stages.append(stage)
    return pipeline.model_copy(update={"stages": tuple(stages)})


def gpu_of(pipeline: Pipeline | None, prices: Prices) -> str:
    """Name in the price list of this machine's GPU: as the stages name it that train on this machine; else `local-gpu`."""
    for stage in pipeline.stages if pipeline is not None and pipeline.backend == "local" else ():
        named = stage.spec.resources.device
        known = prices.devices.get(named)
        if known.is_gpu if known is not None else named != "auto":
            return named
    return LOCAL_GPU


def _on_machine(stage: Stage, gpus: int) -> Stage:
    asked, config = stage.spec.resources, stage.config
    shared = config.parallel.ranks_per_clip
    sizes = [config.batch_size, *(bucket.batch_size for bucket in config.data.buckets)]
    totals = [size * (asked.devices_per_node // shared) for size in sizes]
    counts = range(shared, min(gpus, asked.devices_per_node) + 1, shared)
    ranks = max((n for n in counts if all(total % (n // shared) == 0 for total in totals)), default=None)
    update = {"device": LOCAL_CPU} if ranks is None else {"device": LOCAL_GPU, "devices_per_node": ranks}
    if ranks is not None:
        own, *others = (total // (ranks // shared) for total in totals)
        buckets = tuple(bucket.model_copy(update={"batch_size": size}) for bucket, size in zip(config.data.buckets, others, strict=True))
        config = config.model_copy(update={"batch_size": own, "data": config.data.model_copy(update={"buckets": buckets})})
    spec = stage.spec.model_copy(update={"resources": asked.model_copy(update=update)})
    return stage.model_copy(update={"spec": spec, "config": config})
