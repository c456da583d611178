from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import gang
import parallel_cases
import pytest
import torch
from parallel_cases import Case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from opensora.checkpoint.reader import Reader
from opensora.config import OptimizerConfig, StageConfig
from opensora.distributed import parallel
from opensora.distributed.ranks import Ranks, join
from opensora.distributed.strategy import Strategy
from opensora.optim.adamw import AdamW
from opensora.optim.muon import Division, Muon, is_matrix, orthogonalised, scale

CONFIG = OptimizerConfig(matrices="muon", lr=1e-2, weight_decay=0.1, momentum=0.9)
SIZES = {
    "blocks.0.mlp.fc1.weight": (12, 5), "blocks.0.attention.qkv.weight": (18, 6), "blocks.0.cross.key_value.weight": (10, 5),
    "blocks.0.mlp.fc1.bias": (12,), "blocks.0.modulation": (6, 5), "final_layer.linear.weight": (4, 5),
}  # fmt: skip
MATRICES = {name for name in SIZES if is_matrix(name)}


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in SIZES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def alone(of: Mapping[str, Tensor], config: OptimizerConfig = CONFIG) -> Muon:
    return Muon(of, config, Division(0, 1, lambda one: one, {name: one.shape for name, one in of.items()}))


def steps(optimizer: AdamW | Muon, numbers: range) -> None:
    for number in numbers:
        optimizer.step(list(gradients(number).values()), 1e-2)


def test_matrices_are_linear_layers_of_blocks() -> None:
    assert {"blocks.0.mlp.fc1.weight", "blocks.0.attention.qkv.weight", "blocks.0.cross.key_value.weight"} == MATRICES


def test_matrices_move_as_torchs_muon_moves_them() -> None:
    ours = weights()
    theirs = {name: ours[name].detach().clone() for name in MATRICES}
    parts = {"qkv": 3, "key_value": 2}
    apart = [nn.Parameter(part.clone()) for name in theirs for part in theirs[name].chunk(parts.get(name.split(".")[-2], 1))]
    reference = torch.optim.Muon(apart, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    optimizer = alone(ours)
    for number in range(4):
        given = gradients(number)
        optimizer.step(list(given.values()), 1e-2)
        pieces = [part for name in theirs for part in given[name].chunk(parts.get(name.split(".")[-2], 1))]
        for parameter, piece in zip(apart, pieces, strict=True):
            parameter.grad = piece
        reference.step()
    left = iter(apart)
    for name in theirs:
        whole = torch.cat([next(left) for _ in range(parts.get(name.split(".")[-2], 1))])
        torch.testing.assert_close(ours[name].detach(), whole.detach(), rtol=1e-5, atol=1e-6)


def test_all_else_moves_by_adamw_bitwise() -> None:
    ours, theirs = weights(), weights()
    steps(alone(ours), range(3))
    steps(AdamW(theirs, CONFIG), range(3))
    assert {name for name in SIZES if torch.equal(ours[name], theirs[name])} == set(SIZES) - MATRICES


@pytest.mark.parametrize("size", [(24, 24), (24, 96), (96, 24)])
def test_an_update_is_orthogonal_and_as_large_as_adamws(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    made = orthogonalised(torch.randn(size, generator=generator) + torch.eye(*size) * 20).float()
    singular = torch.linalg.svdvals(made)
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert (made * scale(*size)).square().mean().sqrt() == pytest.approx(0.2, rel=0.25)  # arXiv:2502.16982 §2.2: 0.2 to 0.4 of AdamW


def test_a_loaded_state_continues_bitwise() -> None:
    one, other = weights(), weights()
    whole = alone(one)
    steps(whole, range(4))
    first = alone(other)
    steps(first, range(2))
    saved = {key: value.clone() for key, value in first.state().items()}
    assert {key for key in saved if key.startswith("momentum/")} == {f"momentum/{name}" for name in MATRICES}
    assert not any(name in key for key in saved if not key.startswith("momentum/") for name in MATRICES)
    second = alone(other)
    second.load(saved)
    steps(second, range(2, 4))
    assert all(torch.equal(one[name], other[name]) for name in SIZES)


def test_an_update_that_is_not_finite_is_not_made() -> None:
    ours, theirs = weights(), weights()
    steps(alone(theirs), range(1))
    optimizer = alone(ours)
    before = {name: one.detach().clone() for name, one in ours.items()}
    broken = [torch.full_like(one, torch.nan) for one in gradients(0).values()]
    optimizer.step(broken, 1e-2, torch.ones(1))
    assert all(torch.equal(ours[name], one) for name, one in before.items())
    optimizer.step(list(gradients(0).values()), 1e-2, torch.zeros(1))
    assert all(torch.equal(ours[name], theirs[name]) for name in MATRICES)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What real ranks made of the same gradients, and their checkpoints after the first step."""
    out = tmp_path_factory.mktemp("together")
    for world in (2, 4):
        gang.run(world, __file__, str(out))
    return out


def stage_of(case: Case) -> StageConfig:
    return parallel_cases.stage_of(case).model_copy(update={"optimizer": CONFIG})


def stepped(case: Case, ranks: Ranks, numbers: range, reader: Reader | None = None) -> Strategy:
    """A strategy after steps with gradients that are functions of name and step, the same however many ranks there are."""
    stage, model = stage_of(case), parallel_cases.model_of(parallel_cases.stage_of(case), case)
    if reader is not None:
        model.load_state_dict(reader.part("model"))
    strategy = parallel.build(model, stage, ranks)
    if reader is not None:
        strategy.load(reader, ema=True, optimizer=True)
    for number in numbers:
        clips = parallel_cases.clips_of(case, number)
        prediction = strategy.model(clips["x"], clips["time"], clips["captions"], clips["mask"], clips["drop"])
        strategy.backward(prediction.square().mean())
        strategy.reduce(torch.zeros(1))
        for name, weight in strategy.model.named_parameters():
            assert weight.grad is not None
            made = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name) + 100 * number))
            if hasattr(weight.grad, "to_local"):  # divided: this rank's rows
                made = distribute_tensor(made, weight.grad.device_mesh, weight.grad.placements)
            weight.grad.copy_(made)
        strategy.step(1e-2, torch.ones(()), number)
    return strategy


def weights_of(strategy: Strategy) -> dict[str, Tensor]:
    return {name: parallel_cases.whole(weight.detach()).clone() for name, weight in strategy.model.named_parameters()}


WAYS = {"ddp 2": Case(), "fsdp 2": Case(strategy="fsdp"), "ddp 4": Case(), "fsdp in copies 4": Case(strategy="fsdp", shard=2)}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_ranks_has_the_bits_of_one_and_their_checkpoint_goes_on(way: str, together: Path) -> None:
    """Two gangs start: ten CPU-seconds."""
    expected = weights_of(stepped(Case(), ALONE, range(2)))
    found = load_file(together / f"{way}.safetensors")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    (path,) = (together / way).glob("checkpoints/step-*")
    reader = Reader(path)
    assert {name for name in reader.names("optimizer") if name.startswith("momentum/")} == {
        f"momentum/{n}" for n in expected if is_matrix(n)
    }
    resumed = weights_of(stepped(Case(), ALONE, range(1, 2), reader))
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join() as ranks:
        for way, case in WAYS.items():
            if int(way.split()[-1]) != ranks.world:
                continue
            parallel_cases.save(stepped(case, ranks, range(1)), case, ranks, out / way)
            found = weights_of(stepped(case, ranks, range(2)))
            if ranks.is_first:
                save_file(found, out / f"{way}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
