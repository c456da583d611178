"""The prediction is what a training step really takes; what needs a GPU is held against arithmetic."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora.config import Activations, StageConfig
from opensora.diffusion import guidance, objective
from opensora.distributed import parallel
from opensora.distributed.ranks import Ranks
from opensora.model import routing
from opensora.model.stdit import STDiT
from opensora.planning import memory
from opensora.planning.flops import parameters

CPU = torch.device("cpu")
libc = ctypes.CDLL(None)
M_MMAP_THRESHOLD = -3  # malloc.h


def stage(
    frames: int = 8,
    side: int = 16,
    *,
    width: int = 64,
    depth: int = 2,
    batch: int = 2,
    captions: int = 12,
    caption_width: int = 32,
    kind: str = "flow",
    policy: dict[str, Any] | None = None,
    divided: dict[str, Any] | None = None,
    **changes: Any,
) -> StageConfig:
    """A clip of `frames` x `side` x `side` tokens."""
    content: dict[str, Any] = {
        "model": {"depth": depth, "width": width, "heads": 4, "caption_width": caption_width, "caption_tokens": captions},
        "objective": {"kind": kind},
        "sampling": {"method": "euler" if kind == "flow" else "ancestral"},
        "data": {"source": {"kind": "digits", "clips": 10}, "frames": frames, "height": 8 * side, "width": 8 * side},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 10,
        "batch_size": batch,
        "checkpoint": {"every_steps": 5},
        "activations": policy or {},
        "parallel": divided or {},
    }
    return StageConfig.model_validate(content | changes)


def train(config: StageConfig, ranks: Ranks) -> None:
    """From an empty process through some whole training steps."""
    model = STDiT(config.model, config.latent_shape[1:], config.out_channels)
    if config.freeze == "temporal":
        model.freeze_temporal()
    model.keep(config.activations)
    strategy = parallel.build(model, config, ranks)
    goal = objective.build(config.objective)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((config.batch_size, 1), config.model.caption_tokens)
    # fsdp's gradients of one step are there in the next; otherwise one step shows all
    for step in range(2 if config.parallel.strategy == "fsdp" else 1):
        clean, noise = (torch.randn(config.batch_size, *config.latent_shape, generator=generator) for _ in range(2))
        vectors = torch.randn(config.batch_size, config.model.caption_tokens, config.model.caption_width, generator=generator)
        mask = torch.arange(config.model.caption_tokens)[None] < lengths
        drop = torch.arange(config.batch_size) == 0
        tubes, how = config.tokens[1], config.routing
        route = None if how is None else routing.draw(how, config.model.depth, config.batch_size, tubes, generator)
        network = guidance.conditional(partial(strategy.model, route=route), vectors, mask, drop)
        loss = goal.loss(network, clean, goal.draw_time(config.batch_size, generator), noise).mean()
        strategy.backward(loss)
        strategy.reduce(torch.zeros(3))
        strategy.step(1e-4, torch.ones(()), step)
        del loss, network


def measured(config: StageConfig, ranks: Ranks) -> int:
    """Most bytes of tensors alive at once."""
    gc.collect()  # what the last one left must not be freed while this one counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, ranks)
    level = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most


def resident(config: StageConfig, ranks: Ranks) -> int:
    """Most bytes that the process grew by, as the kernel counts them: what threads of gloo free is seen here, and by no profiler."""
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory_of_process("VmHWM")
    train(config, ranks)
    return _memory_of_process("VmHWM") - before


def _memory_of_process(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


ONE_DEVICE = {
    "as it is": stage(),
    "few tokens": stage(4, 8),
    "many frames": stage(32, 8),
    "one frame": stage(1, 16, batch=8),
    "temporal frozen": stage(1, 16, batch=8, freeze="temporal"),
    "deep": stage(depth=4),
    "wide": stage(width=128, batch=1),
    "weights alone": stage(2, 2, width=256, batch=1),
    "long captions": stage(captions=120, caption_width=512),
    "iddpm": stage(kind="iddpm"),
    "selective": stage(depth=4, policy={"recompute": "selective"}),
    "full": stage(depth=4, policy={"recompute": "full"}),
    "full, many frames": stage(32, 8, depth=3, policy={"recompute": "full"}),
    "every 2": stage(depth=4, policy={"recompute": "full", "every": 2}),
    "every 3 of 4": stage(depth=4, policy={"recompute": "full", "every": 3}),
    "offload": stage(depth=4, policy={"recompute": "full", "offload": True}),
    "chunks": stage(policy={"mlp_chunks": 4}),
    "chunks of one clip": stage(batch=1, width=128, policy={"mlp_chunks": 4}),
    "muon": stage(2, 2, width=256, batch=1, optimizer={"matrices": "muon"}),
    "routing": stage(depth=6, routing={"rate": 0.75, "first_blocks": 1, "last_blocks": 1}),
    "routing, every 3": stage(
        depth=6, policy={"recompute": "full", "every": 3}, routing={"rate": 0.5, "first_blocks": 1, "last_blocks": 1}
    ),
    "full, chunks": stage(depth=4, policy={"recompute": "full", "mlp_chunks": 4}),
    "residual position": stage(
        model={"depth": 2, "width": 64, "heads": 4, "caption_width": 32, "caption_tokens": 12, "temporal_position": "residual"}
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ONE_DEVICE)
def test_the_peak_on_one_device_is_predicted_within_a_tenth(name: str) -> None:
    config = ONE_DEVICE[name]
    real = measured(config, Ranks(0, 1, CPU))
    assert memory.predict(config, devices=1, device="cpu").total == pytest.approx(real, rel=0.1)


TWO_DEVICES = {
    "ddp": stage(16, 16),
    "ddp, weights alone": stage(2, 2, width=512, batch=1),
    "fsdp": stage(depth=4, divided={"strategy": "fsdp"}),
    "fsdp, weights alone": stage(4, 4, width=512, depth=2, divided={"strategy": "fsdp"}),
    "fsdp, full": stage(depth=4, policy={"recompute": "full"}, divided={"strategy": "fsdp"}),
    "fsdp, every 2": stage(depth=4, policy={"recompute": "full", "every": 2}, divided={"strategy": "fsdp"}),
    "sequence": stage(16, 16, depth=4, divided={"sequence": 2}),
    "sequence, not divisible": stage(15, 15, depth=4, divided={"sequence": 2}),
    "sequence, selective": stage(16, 16, policy={"recompute": "selective"}, divided={"sequence": 2}),
    "sequence, routing": stage(15, 15, depth=4, divided={"sequence": 2}, routing={"rate": 0.5, "first_blocks": 1, "last_blocks": 1}),
    "sequence, fsdp": stage(16, 16, depth=3, divided={"sequence": 2, "strategy": "fsdp"}),
    "sequence, fsdp, full": stage(16, 16, depth=4, policy={"recompute": "full"}, divided={"sequence": 2, "strategy": "fsdp"}),
}


IN_THE_SUITE = ("ddp", "fsdp, every 2", "sequence, selective")
"""Each way to divide; each way to recompute is measured on one device. scripts/prove has the others."""


def _rank(folder: Path, names: Sequence[str]) -> None:
    """What each of two ranks does: `python test_memory.py FOLDER NAME...`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 14)  # from here on, tensors that are freed go back to the kernel at once
    grown = [[resident(config, Ranks(rank, 2, CPU)) for _ in range(2)] for config in map(TWO_DEVICES.__getitem__, names)]
    (folder / f"{rank}.json").write_text(json.dumps(grown))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """The peaks of both ranks, all from one pair of processes, of what the tests of this run ask for."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in TWO_DEVICES if name in asked]
    gang.run(2, __file__, str(folder), *names, timeout=250)
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return {name: (*first, *second) for name, first, second in zip(names, one, other, strict=True)}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name if name in IN_THE_SUITE else pytest.param(name, marks=pytest.mark.prove("memory")) for name in TWO_DEVICES]
)
def test_the_peak_of_two_ranks_is_predicted_within_a_tenth(name: str, of_two_ranks: dict[str, tuple[int, ...]]) -> None:
    """Both ranks need as much. The least of the readings: code that is loaded at the first time is counted there, too."""
    predicted = memory.predict(TWO_DEVICES[name], devices=2, device="cpu").total
    assert predicted == pytest.approx(min(of_two_ranks[name]), rel=0.1)


def test_what_was_measured_was_worth_measuring() -> None:
    """The cases differ by far more than the tolerance."""
    totals = [memory.predict(config, devices=1, device="cpu").total for config in ONE_DEVICE.values()]
    assert max(totals) > 10 * min(totals)
    assert (
        memory.predict(ONE_DEVICE["full"], devices=1, device="cpu").total
        < 0.4 * memory.predict(ONE_DEVICE["deep"], devices=1, device="cpu").total
    )


# ------------------------------------------------------------------------------------------------------------------
# XL/2 on CUDA: arithmetic
# ------------------------------------------------------------------------------------------------------------------


def xl(frames: int, height: int, width: int, batch: int = 1, **changes: Any) -> StageConfig:
    content: dict[str, Any] = {
        "objective": {"kind": "iddpm"},
        "data": {"source": {"kind": "digits", "clips": 10}, "frames": frames, "height": height, "width": width},
        "autoencoder": {"kind": "kl", "path": "vae"},
        "text": {"kind": "t5", "path": "t5"},
        "steps": 10,
        "batch_size": batch,
        "checkpoint": {"every_steps": 5},
    }
    return StageConfig.model_validate(content | changes)


GPU = 80 * 2**30
MINUTE = xl(1440, 1088, 1920, parallel={"strategy": "fsdp", "sequence": 8})


def test_state_is_twenty_bytes_a_weight_and_divides_under_fsdp() -> None:
    count = parameters(xl(16, 256, 256).model, 8)
    whole = memory.predict(xl(16, 256, 256), devices=8)
    assert whole.state == pytest.approx(20 * count, rel=1e-3)
    divided = memory.predict(xl(16, 256, 256, parallel={"strategy": "fsdp"}), devices=8)
    assert divided.gradients == whole.gradients // 8
    assert divided.optimizer == whole.optimizer // 8
    assert divided.ema == whole.ema // 8
    copies = memory.predict(xl(16, 256, 256, parallel={"strategy": "fsdp", "shard": 4}), devices=8)
    assert copies.optimizer == whole.optimizer // 4


def test_parts_add_up() -> None:
    for config in (xl(16, 256, 256, 8), MINUTE):
        for _, needs in memory.options(config, 8):
            assert needs.total == needs.state + needs.activations + needs.working + needs.inputs


def test_one_minute_of_1080p_fits_eight_gpus_with_boundaries_on_the_host_and_the_mlp_in_chunks() -> None:
    """Arithmetic: 11,750,400 tokens x 1152 channels x 2 bytes x 28 boundaries over 8 devices."""
    boundaries = 1440 * 68 * 120 * 1152 * 2 * 28 / 8
    assert boundaries == pytest.approx(94.8e9, rel=1e-3)
    needs = {memory.describe(policy): one for policy, one in memory.options(MINUTE, 8)}
    assert needs["full"].activations - needs["full offload"].activations == pytest.approx(boundaries, rel=1e-6)
    assert needs["full offload"].host - needs["full"].host == pytest.approx(boundaries, rel=1e-6)
    assert needs["full"].total > GPU
    choice = memory.choose(MINUTE, GPU, 8)
    assert choice.activations == Activations(recompute="full", offload=True, mlp_chunks=16)
    assert choice.memory.total < 75e9
    assert "74." in choice.reason


def test_the_choice_is_the_first_policy_that_fits() -> None:
    config = xl(16, 512, 512, 2)
    options = memory.options(config, 8)
    for policy, needs in options[:2]:
        room = math.ceil(needs.total / (1 - memory.RESERVE))
        assert memory.choose(config, room, 8).activations == policy
    first = options[0][1].total
    assert memory.choose(config, int(first / (1 - memory.RESERVE)) - 10**6, 8).activations == options[1][0]


def test_what_fits_nowhere_is_refused_with_both_numbers() -> None:
    with pytest.raises(memory.DoesNotFit, match=r"needs \d+\.\d GB and the device has 9\.2 GB \(10\.0 GB less 8%\)"):
        memory.choose(xl(16, 512, 512, 2), 10**10, 8)


def test_the_largest_bucket_decides() -> None:
    buckets = [{"frames": 1, "height": 512, "width": 512, "batch_size": 2}, {"frames": 16, "height": 256, "width": 448, "batch_size": 4}]
    data = {"source": {"kind": "digits", "clips": 10}, "frames": 16, "height": 256, "width": 256, "buckets": buckets}
    config = xl(16, 256, 256, data=data)
    image, clip = (memory.predict(xl(16, 256, 256, data=data | {"buckets": [bucket]}), devices=1).total for bucket in buckets)
    assert image < clip
    assert memory.predict(config, devices=1).total == clip


def test_more_of_anything_needs_more() -> None:
    base = memory.predict(xl(16, 256, 256, 2), devices=1).total
    for config in (xl(32, 256, 256, 2), xl(16, 256, 512, 2), xl(16, 256, 256, 3), xl(16, 256, 256, 2, compile=False)):
        assert memory.predict(config, devices=1).total > base
    assert memory.predict(xl(16, 256, 256, 2, model={"caption_tokens": 10}), devices=1).total < base


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.sequence 8 does not divide 4 devices"):
        memory.predict(MINUTE, devices=4)
    with pytest.raises(ValueError, match="auto"):
        memory.predict(xl(16, 256, 256, activations={"recompute": "auto"}), devices=1)


def test_planning_needs_no_torch() -> None:
    code = "import sys, opensora.planning.memory, opensora.planning.calibration; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------------
# XL/2 on a CPU, where no machine of a test can run a step: held against torch's own fake tensors, on the real trainer's
# code. ADR 21 says why the control plane does not use these itself.
# ------------------------------------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Bytes of all storages that operations make, from their making until nobody refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if (key := storage._cdata) in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


FULL_SIZE = {
    "16 frames of 256x256, two clips": xl(16, 256, 256, 2),
    "64 frames of 720p, full, MLP in chunks": xl(64, 720, 1280, activations={"recompute": "full", "mlp_chunks": 16}),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [next(iter(FULL_SIZE)), *(pytest.param(name, marks=pytest.mark.prove("memory")) for name in list(FULL_SIZE)[1:])]
)
def test_the_peak_of_xl_is_what_torchs_own_fake_tensors_take(name: str) -> None:
    """Measured: within 0.05%."""
    config = FULL_SIZE[name]
    with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        train(config, Ranks(0, 1, CPU))
    assert memory.predict(config, devices=1, device="cpu").total == pytest.approx(storages.peak, rel=0.01)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2:])
