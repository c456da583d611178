"""How much memory a stage needs on each device, from its configuration alone: no torch, so the control plane can plan with it.

Owns the prediction (`predict`) and the choice of what is computed again (`choose`). The activations are found by running the model's code
on tensors that know only their size (`opensora.planning.sized_model`).

What was measured and what was derived:
- CPU, fp32: measured. tests/opensora/planning/test_memory.py compares the prediction with the peak of a real training step over shapes,
  policies and strategies: of torch's allocations on one rank, of the process's memory on two. It is within 10%, mostly within 1%, on two
  ranks within 4%.
- CUDA, bf16 autocast: derived from what autocast casts and what the kernels save; not measured on a GPU. Compiled blocks: derived from
  what torch's partitioner keeps (results of matrix products and of attention; cheap operations on them are computed again), likewise not
  measured. Flash attention's backward pass is counted with its fp32 sum of query gradients, in blocks of 128 queries.
- Not counted: CUDA's context and libraries, NCCL's buffers, what the allocator cannot use for fragments: `choose` leaves `RESERVE` free.

Legend: B batch · T latent frames · S spatial tokens · D width · L text tokens · n ranks that share a clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from opensora.config import Activations, Bucket, StageConfig
from opensora.planning.flops import block_parameters, matrix_parameters, parameters, temporal_parameters
from opensora.planning.memory_tape import Tape
from opensora.planning.sized_model import BF16, FP32, DeviceKind, SizedModel

MOMENTS = 2
"""Of AdamW: averages of the gradient and of its square. Muon has the first alone."""
RESERVE = 0.08
"""Share of a device that `choose` does not fill. Arbitrary: about what CUDA, NCCL and fragments took in published runs of this size."""

MUON_NUMBERS = 32 << 20
"""As in `opensora.optim.muon`: numbers of the matrices whose updates travel together."""
MUON_BYTES = 22
"""Of each number of the matrix that is being moved: averages, update, the iteration's own, and the new weight (measured)."""
WHOLE_BLOCKS = 3
"""fsdp: of a block, what is whole at a time: weights in use, those on their way, gradients being divided. Fits what was measured."""
BUCKET_BYTES = 64 << 20
"""As in `opensora.distributed.ddp`: ddp copies the last bucket of gradients once more."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and of the host for each device. The parts up to `inputs` add up to `total`, the most at any time of a step."""

    weights: int
    """fp32 masters, and under fsdp the blocks that are whole at a time."""
    gradients: int
    """fp32."""
    optimizer: int
    """AdamW's two averages, Muon's one."""
    ema: int
    """The moving average of the weights, fp32."""
    activations: int
    """What the forward pass leaves for the backward pass, casts of weights included."""
    working: int
    """What comes on top while the backward pass works."""
    inputs: int
    """Latents, noise and caption vectors."""
    total: int
    """The most at any time of a step."""
    host: int
    """Of host memory: boundaries that wait there, and the buffer of background saves. On a CPU the boundaries are in `activations` too."""

    @property
    def state(self) -> int:
        """Bytes that stay between steps."""
        return self.weights + self.gradients + self.optimizer + self.ema


def predict(stage: StageConfig, *, devices: int, device: DeviceKind = "cuda") -> Memory:
    """The most memory of a training step on each of `devices` devices: of the bucket that needs most, with the longest captions.

    Raises:
        ValueError: recompute is auto, or the devices do not divide as the stage's `parallel` says.
    """
    if stage.activations.recompute == "auto":
        raise ValueError("activations.recompute auto: choose() makes a policy of it")
    parallel = stage.parallel
    for name, ranks in (("sequence", parallel.sequence), ("shard", parallel.shard or 1)):
        if devices % ranks:
            raise ValueError(f"parallel.{name} {ranks} does not divide {devices} devices")
    return max((_predict(stage, devices, size, device) for size in stage.buckets), key=lambda memory: memory.total)


@lru_cache(maxsize=256)
def _predict(stage: StageConfig, devices: int, size: Bucket, device: DeviceKind) -> Memory:
    whole = parameters(stage.model, stage.out_channels)
    trained = whole - (stage.model.depth * temporal_parameters(stage.model) if stage.freeze == "temporal" else 0)
    parallel = stage.parallel
    divided = parallel.strategy == "fsdp" or (parallel.strategy == "colossalai" and parallel.plugin != "torch_ddp")
    shards = (parallel.shard or devices) if divided else 1
    if parallel.plugin == "hybrid_parallel":
        shards = parallel.ranks_per_clip
    compute = BF16 if device == "cuda" and stage.dtype == "bf16" else FP32
    weights, gradients = FP32 * whole / shards, FP32 * trained / shards
    once = matrix_parameters(stage.model, temporal=stage.freeze != "temporal") if stage.optimizer.matrices == "muon" else 0
    moments = MOMENTS * trained - once
    optimizer, ema = FP32 * moments / shards, FP32 * whole / shards
    null = FP32 * stage.model.caption_tokens * stage.model.caption_width
    block = block_parameters(stage.model)
    if divided:
        ends = whole - stage.model.depth * block
        weights += compute * (whole if parallel.plugin == "low_level_zero" else ends + WHOLE_BLOCKS * block)
    weights += null

    tape = Tape(host_apart=device == "cuda")
    network = SizedModel(tape, stage, size, compute, device, divided=divided)
    inputs, activations, peak = network.step()
    host = tape.host.peak if stage.activations.offload and device == "cuda" else network.waiting
    if stage.checkpoint.background:
        host += round((FP32 * (2 * whole + moments) + 2 * null) / devices)
    state = weights + gradients + optimizer + ema
    at_reduce = min(FP32 * trained, BUCKET_BYTES) if devices > 1 and not divided else 0
    total = state + max(peak, at_reduce, _at_muons_step(stage, once, shards, alone=devices == 1))
    return Memory(
        round(weights),
        round(gradients),
        round(optimizer),
        round(ema),
        activations,
        round(total - state) - activations - inputs,
        inputs,
        round(total),
        round(host),
    )


def _at_muons_step(stage: StageConfig, matrices: int, shards: int, *, alone: bool) -> float:
    """Bytes of an optimizer step with `matrices` numbers in matrices: updates in fp32, and what travels in bf16."""
    if not matrices:
        return 0
    width = stage.model.width
    largest = width * max(3 * width, int(width * stage.model.mlp_ratio))
    together = 0 if alone else min(matrices, MUON_NUMBERS + largest)
    return MUON_BYTES * largest + together * (FP32 / shards + (BF16 if shards == 1 else 2 * BF16))


# ------------------------------------------------------------------------------------------------------------------
# The choice
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A policy, what it needs, and why it was taken."""

    activations: Activations
    memory: Memory
    reason: str


class DoesNotFit(ValueError):
    """No policy makes the stage fit; the message has both numbers. The policy that needs least, and what it needs."""

    def __init__(self, message: str, activations: Activations, memory: Memory) -> None:
        super().__init__(message)
        self.activations, self.memory = activations, memory


def policies(stage: StageConfig, device: DeviceKind = "cuda") -> list[Activations]:
    """From fast to slow, as far as that is the same for all shapes: `full` computes every block once more, and the MLP in chunks twice; the
    way to the host may be hidden behind it or not. Compiled blocks keep what `selective` keeps anyway."""
    groups = [every for every in (2, 4, 7) if every < stage.model.depth]
    selective = [] if device == "cuda" and stage.compile else [Activations(recompute="selective")]
    found = [Activations(), *selective, Activations(recompute="full")]
    found += [Activations(recompute="full", every=every) for every in groups]
    found += [Activations(recompute="full", offload=True)]
    found += [Activations(recompute="full", every=every, mlp_chunks=16) for every in (1, *groups)]
    return [*found, Activations(recompute="full", offload=True, mlp_chunks=16)]


def options(stage: StageConfig, devices: int, *, device: DeviceKind = "cuda") -> list[tuple[Activations, Memory]]:
    """What each policy needs, from fast to slow."""
    return [(policy, predict(with_policy(stage, policy), devices=devices, device=device)) for policy in policies(stage, device)]


def choose(stage: StageConfig, device_bytes: int, devices: int, *, device: DeviceKind = "cuda") -> Choice:
    """The fastest policy that fits the device, `RESERVE` left free.

    Raises:
        DoesNotFit: none does.
    """
    limit = device_bytes * (1 - RESERVE)
    tried: list[tuple[Activations, Memory]] = []
    for policy in policies(stage, device):
        memory = predict(with_policy(stage, policy), devices=devices, device=device)
        if memory.total <= limit:
            before = f"; {describe(tried[-1][0])} would need {_gb(tried[-1][1].total)}" if tried else ""
            return Choice(policy, memory, f"{describe(policy)} needs {_gb(memory.total)} of {_gb(limit)}{before}")
        tried.append((policy, memory))
    policy, memory = min(tried, key=lambda one: one[1].total)
    raise DoesNotFit(
        f"activations: nothing fits, {describe(policy)} needs {_gb(memory.total)} and the device has {_gb(limit)} "
        f"({_gb(device_bytes)} less {RESERVE:.0%}). Lower batch_size with accumulate raised as much, or use more devices",
        policy,
        memory,
    )


def with_policy(stage: StageConfig, policy: Activations) -> StageConfig:
    return stage.model_copy(update={"activations": policy})


def describe(policy: Activations) -> str:
    """In a few words, e.g. `full every 4, MLP in 16`."""
    text: str = policy.recompute
    if policy.every > 1:
        text += f" every {policy.every}"
    if policy.offload:
        text += " offload"
    return text + (f", MLP in {policy.mlp_chunks}" if policy.mlp_chunks > 1 else "")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
