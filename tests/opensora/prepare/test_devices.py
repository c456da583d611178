"""Laws of what a preparation's steps hold: every second is of one step, and a GPU is held while a model is on it."""

from __future__ import annotations

import pytest

from opensora.prepare import devices
from opensora.prepare.devices import CPU, Device, Held

GPU = Device("cuda", "NVIDIA H200")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def held(clock: Clock) -> Held:
    return Held(2, clock)


def test_cores_are_held_from_the_beginning_of_a_step_to_its_end_and_by_no_step_between(held: Held, clock: Clock) -> None:
    held.begin("filter")
    clock.now += 3
    held.begin("filter")
    clock.now += 1
    held.end()
    clock.now += 50
    held.begin("clips")
    clock.now += 5
    held.begin("score")
    clock.now += 1
    cores = {"device": "cpu", "devices": 2}
    assert held.content() == {step: cores | {"held_s": {"cpu": s}} for step, s in (("filter", 8.0), ("clips", 10.0), ("score", 2.0))}


def test_one_pass_over_the_sources_stands_under_one_step(held: Held, clock: Clock) -> None:
    for step in ("download", "probe", "frames", "download"):
        held.begin(step)
        clock.now += 1
    held.end()
    assert held.content() == {"frames": {"device": "cpu", "devices": 2, "held_s": {"cpu": 8.0}}}


def test_a_gpu_of_models_that_clips_stream_to_stands_under_their_step(held: Held, clock: Clock) -> None:
    held.begin("clips")
    held.take(GPU, "caption")
    clock.now += 3
    held.end()
    found = held.content()
    assert found["caption"] == {"device": "NVIDIA H200", "devices": 1, "held_s": {"cuda": 3.0}}
    assert found["clips"] == {"device": "cpu", "devices": 2, "held_s": {"cpu": 6.0}}


def test_a_gpu_is_held_from_a_models_load_until_it_is_let_go_however_many_put_one_there(held: Held, clock: Clock) -> None:
    held.begin("caption")
    clock.now += 2
    held.take(GPU)
    clock.now += 3
    held.take(GPU)
    held.begin("caption")
    assert held.content()["caption"] == {"device": "NVIDIA H200", "devices": 1, "held_s": {"cpu": 10.0, "cuda": 3.0}}, "while it runs"
    clock.now += 1
    held.begin("caption")
    assert held.release() and not held.release()
    clock.now += 4
    held.take(GPU)
    clock.now += 2
    held.end()
    clock.now += 9
    assert held.content()["caption"]["held_s"] == {"cpu": 24.0, "cuda": 6.0}


def test_a_model_on_the_cpu_holds_no_gpu(held: Held, clock: Clock) -> None:
    held.begin("caption")
    held.take(CPU)
    clock.now += 1
    assert not held.release()
    assert held.content() == {"caption": {"device": "cpu", "devices": 2, "held_s": {"cpu": 2.0}}}


def test_this_process_says_what_torch_says() -> None:
    import torch

    assert (devices.here().kind == "cuda") == torch.cuda.is_available()
    assert devices.in_use() == torch.cuda.is_initialized()
