"""A policy changes what is kept, never what is computed."""

from __future__ import annotations

import sys
from pathlib import Path

import gang
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from opensora.config import Activations, ModelConfig, StageConfig
from opensora.distributed import parallel
from opensora.distributed.ranks import Ranks
from opensora.model.activations import Host, in_chunks, run_blocks
from opensora.model.stdit import STDiT, STDiTBlock

TINY = ModelConfig(depth=4, width=64, heads=4, caption_width=32, caption_tokens=12)
POLICIES = {
    "selective": Activations(recompute="selective"),
    "full": Activations(recompute="full"),
    "every 2": Activations(recompute="full", every=2),
    "every 3": Activations(recompute="full", every=3),
    "offload": Activations(recompute="full", offload=True),
    "offload, every 2": Activations(recompute="full", every=2, offload=True),
}


def model() -> STDiT:
    """Every path open: the output layers that start at zero would hide a wrong gradient."""
    generator = torch.Generator().manual_seed(0)
    network = STDiT(TINY, (4, 8, 8), 8, generator=generator)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return network


def train(network: STDiT, activations: Activations, frames: int = 4, tokens: int = 16) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step with the blocks under a policy, captions ragged."""
    generator = torch.Generator().manual_seed(1)
    batch = 2
    x = torch.randn(batch, frames, tokens, TINY.width, generator=generator, requires_grad=True)
    text = torch.randn(batch, 7, TINY.width, generator=generator, requires_grad=True)
    time6 = torch.randn(batch, 6, TINY.width, generator=generator, requires_grad=True)
    keep = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None]
    position = torch.randn(frames, 1, TINY.width, generator=generator)

    def call(index: int, block: STDiTBlock, x: Tensor) -> Tensor:
        out: Tensor = block(x, text, keep, time6, position if index == 0 else None)
        return out

    network.zero_grad()
    loss = run_blocks(network.blocks, x, call, activations).square().mean()
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients | {"x": x.grad, "text": text.grad, "time6": time6.grad}


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradients_are_those_of_keeping_everything_bit_for_bit(policy: str) -> None:
    network = model()
    expected, gradients = train(network, Activations())
    loss, ours = train(network, POLICIES[policy])
    assert torch.equal(loss, expected)
    assert set(ours) == set(gradients)
    assert len(ours) == 19 * TINY.depth + 3
    for name, gradient in gradients.items():
        assert torch.equal(ours[name], gradient), name


def peak(network: STDiT, activations: Activations) -> int:
    """Bytes above what there was before the step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(network, activations, frames=8, tokens=128)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level, most = 0, 0
    for event in events:
        level += event.nbytes()
        most = max(most, level)
    return most


def test_less_is_kept_the_more_is_recomputed() -> None:
    network = model()
    none, selective, full = (peak(network, Activations(recompute=recompute)) for recompute in ("none", "selective", "full"))
    assert none > 1.3 * selective
    assert selective > 1.5 * full


@pytest.mark.parametrize(("every", "boundaries"), [(1, 4), (2, 2), (3, 2)])
def test_only_the_boundaries_wait_on_the_host(monkeypatch: pytest.MonkeyPatch, every: int, boundaries: int) -> None:
    kept, fetched = [], []
    keep, fetch = Host.keep, Host.fetch

    def record_keep(self: Host, tensor: Tensor) -> Tensor | int:
        if tensor.numel():
            kept.append(tuple(tensor.shape))
        return keep(self, tensor)

    def record_fetch(self: Host, index: Tensor | int) -> Tensor:
        if isinstance(index, int):
            fetched.append(index)
        return fetch(self, index)

    monkeypatch.setattr(Host, "keep", record_keep)
    monkeypatch.setattr(Host, "fetch", record_fetch)
    train(model(), Activations(recompute="full", every=every, offload=True))
    assert kept == [(2, 4, 16, TINY.width)] * boundaries
    assert fetched == list(reversed(range(boundaries)))


DIVIDED = [Activations(), *POLICIES.values()]


def _rank(folder: str) -> None:
    """What each of two ranks does: `python test_activations.py FOLDER`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    content = {
        "model": TINY.model_dump(),
        "objective": {"kind": "flow"},
        "sampling": {"method": "euler"},
        "data": {"source": {"kind": "digits", "clips": 10}, "frames": 4, "height": 64, "width": 64},
        "autoencoder": {"kind": "kl", "path": "vae"},
        "text": {"kind": "words"},
        "steps": 10,
        "batch_size": 2,
        "checkpoint": {"every_steps": 5},
        "parallel": {"strategy": "fsdp", "sequence": 2},
    }
    after = {}
    for number, policy in enumerate(DIVIDED):
        network = model()
        network.keep(policy)
        strategy = parallel.build(network, StageConfig.model_validate(content), Ranks(rank, 2, torch.device("cpu")))
        generator = torch.Generator().manual_seed(3)
        x, captions = torch.randn(2, 4, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
        out = strategy.model(x, torch.tensor([1.0, 900.0]), captions)
        strategy.backward(out.square().mean())
        strategy.reduce(torch.zeros(1))
        after[f"{number}"] = torch.cat([strategy.norm()[None], *(weight.grad.to_local().flatten() for weight in network.parameters())])
    save_file(after, f"{folder}/{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_ranks_that_divide_weights_and_clips_get_the_bits_of_keeping_everything(tmp_path: Path) -> None:
    """fsdp gathers a block's weights, and the ranks of a clip exchange it, once more where a block is computed again."""
    gang.run(2, __file__, str(tmp_path))
    for rank in range(2):
        first, *others = (load_file(tmp_path / f"{rank}.safetensors")[f"{number}"] for number in range(len(DIVIDED)))
        assert first[0] > 0
        for policy, one in zip(POLICIES, others, strict=True):
            assert torch.equal(one, first), policy


def test_auto_is_no_policy() -> None:
    with pytest.raises(ValueError, match="auto"):
        run_blocks([nn.Identity()], torch.zeros(1), lambda _, block, x: block(x), Activations(recompute="auto"))


def test_nothing_is_kept_where_there_is_no_backward_pass() -> None:
    calls: list[int] = []

    def call(index: int, block: nn.Module, x: Tensor) -> Tensor:
        calls.append(index)
        return x + 1

    with torch.no_grad():
        out = run_blocks([nn.Identity()] * 3, torch.zeros(2), call, Activations(recompute="full", every=2, offload=True))
    assert calls == [0, 1, 2]
    assert torch.equal(out, torch.full((2,), 3.0))


@pytest.mark.parametrize("shape", [(2, 4, 16, 64), (1, 1, 7, 64), (3, 10, 64)])
@pytest.mark.parametrize("chunks", [2, 3, 64])
def test_an_mlp_in_chunks_is_the_mlp(shape: tuple[int, ...], chunks: int) -> None:
    mlp = model().blocks[0].mlp
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    expected, ours = mlp(x), in_chunks(mlp, x, chunks)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    inputs = [x, *mlp.parameters()]
    for one, other in zip(torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    _rank(sys.argv[1])
