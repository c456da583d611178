"""`device: auto`: what a recipe becomes on a machine with and without CUDA devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import write

from orchestrator import config
from orchestrator.adapters.local import cuda_devices
from orchestrator.config import Pipeline


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return config.load(write(tmp_path, devices=4, changes={"batch_size": 3}) / "osctl.yaml", env={})


def test_without_a_gpu_it_runs_on_cores(pipeline: Pipeline) -> None:
    for stage in config.on_devices(pipeline, 0).stages:
        assert (stage.spec.resources.device, stage.devices, stage.config.batch_size) == ("cpu-core", 4, 3)


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 4)])
def test_the_global_batch_is_the_same_on_any_number_of_gpus(pipeline: Pipeline, gpus: int, ranks: int) -> None:
    for stage in config.on_devices(pipeline, gpus).stages:
        assert (stage.spec.resources.device, stage.devices) == ("local-gpu", ranks)
        assert stage.devices * stage.config.batch_size == 12


def test_a_device_that_is_named_stays(tmp_path: Path) -> None:
    shipped = config.load(config.find("open-sora-1.0"), env={})
    assert config.on_devices(shipped, 8) == shipped


def test_hidden_devices_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("", 0), ("-1", 0), ("0", 1), ("0,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cuda_devices() == count
