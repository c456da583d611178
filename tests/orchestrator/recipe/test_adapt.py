"""What a recipe becomes on a machine with and without CUDA devices, and on a person's own clips."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import write

from opensora.config import FolderSource
from orchestrator.recipe import adapt, files, resolve
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.prices import load_prices


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return resolve.load(write(tmp_path, devices=4, changes={"batch_size": 3}) / "osctl.yaml", env={})


def test_without_a_gpu_it_runs_on_cores(pipeline: Pipeline) -> None:
    for stage in adapt.on_devices(pipeline, 0).stages:
        assert (stage.spec.resources.device, stage.devices, stage.config.batch_size) == ("cpu-core", 4, 3)


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 4)])
def test_the_global_batch_is_the_same_on_any_number_of_gpus(pipeline: Pipeline, gpus: int, ranks: int) -> None:
    for stage in adapt.on_devices(pipeline, gpus).stages:
        assert (stage.spec.resources.device, stage.devices) == ("local-gpu", ranks)
        assert stage.devices * stage.config.batch_size == 12


def test_a_device_that_is_named_stays(tmp_path: Path) -> None:
    shipped = resolve.load(files.find("open-sora-1.0"), env={})
    assert adapt.on_devices(shipped, 8) == shipped


def test_the_gpu_of_this_machine_is_priced_as_its_stages_are_and_as_a_local_one_where_they_name_none(pipeline: Pipeline) -> None:
    def on(device: str) -> Pipeline:
        stages = tuple(
            stage.model_copy(update={"spec": stage.spec.model_copy(update={"resources": resources.model_copy(update={"device": device})})})
            for stage in pipeline.stages
            for resources in (stage.spec.resources,)
        )
        return pipeline.model_copy(update={"stages": stages})

    prices = load_prices()
    assert adapt.gpu_of(None, prices) == adapt.gpu_of(on("auto"), prices) == adapt.gpu_of(on("cpu-core"), prices) == "local-gpu"
    assert adapt.gpu_of(adapt.on_devices(on("auto"), 2), prices) == "local-gpu"
    assert adapt.gpu_of(on("h100"), prices) == "h100"
    assert adapt.gpu_of(on("my-gpu"), prices) == "my-gpu", "it is in no list: not priced, as of a training"
    assert adapt.gpu_of(on("h100").model_copy(update={"backend": "kubernetes"}), prices) == "local-gpu", "that is the cluster's"


def test_with_data_every_stage_trains_on_the_folder_and_nobody_judges_digits(recipe: Path) -> None:
    mine = FolderSource(kind="folder", path="/mine")
    pipeline = adapt.with_data(resolve.load(recipe), mine, ["a bike", "a car, red", "a bike"])
    for stage in pipeline.stages:
        assert stage.config.data.source == mine
        assert stage.config.evaluate is None
        assert stage.config.prompts == ("a bike", "a car, red")
        assert stage.config.data.frames == 8
