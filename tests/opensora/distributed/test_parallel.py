from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gang
import parallel_cases
import pytest
import torch
from parallel_cases import IN_THE_SUITE, RUNS, SHAPES, STEPS, Case, combined, save, train
from proofs import law_of
from safetensors.torch import load_file
from torch import Tensor

from opensora.checkpoint.reader import Reader
from opensora.distributed import ddp
from opensora.distributed.ranks import Ranks
from opensora.errors import ConfigError

CASES = parallel_cases.__file__
ALONE = Ranks(0, 1, torch.device("cpu"))

SAVED = [(way, world) for way, world, shape in RUNS if shape == "ragged"]


def among(runs: Iterable[tuple[str, int, str]]) -> list[Any]:
    """The suite has each way on frames and tokens that do not divide, and each shape on the two ways that between them divide everything;
    scripts/prove has all shapes on all ways."""
    return [run if run in IN_THE_SUITE else pytest.param(*run, marks=pytest.mark.prove("parallel")) for run in runs]


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases gave on 2 and on 4 real ranks."""
    out = tmp_path_factory.mktemp("together")
    which = "all" if any(law_of(item) == "parallel" for item in request.session.items) else "suite"
    for world in (2, 4):
        gang.run(world, CASES, which, str(out))
    return out


@pytest.fixture(scope="module")
def resumed(together: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One more step on 2 ranks from what every strategy saved on 2 and 4, and from what one rank saved."""
    alone = combined(SHAPES["ragged"], Case())
    strategy, _ = train(alone, ALONE)
    save(strategy, alone, ALONE, together / "alone 1")
    out = tmp_path_factory.mktemp("resumed")
    gang.run(2, CASES, "suite", str(out), str(together))
    return out


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """The same by one process, by shape."""
    torch.set_num_threads(1)
    return {shape: train(combined(case, Case()), ALONE)[1] for shape, case in SHAPES.items()}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """Largest difference of each tensor whose name begins so, over the largest number of its kind."""
    names = [name for name in theirs if name.startswith(prefix)]
    assert names and set(names) == {name for name in ours if name.startswith(prefix)}
    scale = max(float(theirs[name].abs().max()) for name in names)
    return {name: float((ours[name] - theirs[name]).abs().max()) / scale for name in names}


@pytest.mark.long
@pytest.mark.parametrize(("way", "world", "shape"), among(RUNS))
def test_every_way_to_share_the_work_gives_the_step_of_one_process(
    way: str, world: int, shape: str, together: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    ours, theirs = load_file(together / f"{way} {world} {shape}.safetensors"), alone[shape]
    for prefix in ("loss.", "norm.", "grad.", "weight.", "ema."):
        worst = differences(ours, theirs, prefix)
        assert max(worst.values()) < 1e-5, (prefix, sorted(worst, key=lambda name: -worst[name])[:3])
    assert any(theirs[name].abs().max() > 1e-3 for name in theirs if name.startswith("grad.blocks.1"))


def test_steps_move_weights(alone: dict[str, dict[str, Tensor]]) -> None:
    for shape, found in alone.items():
        losses = [float(found[f"loss.{step}"]) for step in range(STEPS)]
        assert losses == sorted(losses, reverse=True) or losses[0] != losses[-1], shape
        assert float(found["norm.0"]) > 0.01


@pytest.mark.long
@pytest.mark.parametrize("after", ["ddp", "fsdp"])
@pytest.mark.parametrize(("way", "world"), [*SAVED, ("alone", 1)])
def test_a_checkpoint_goes_on_under_any_strategy_and_number_of_ranks(way: str, world: int, after: str, resumed: Path) -> None:
    case = combined(SHAPES["ragged"], Case())
    _, theirs = train(case, ALONE, steps=range(STEPS + 1))
    ours = load_file(resumed / f"{way} {world} then {after} 2.safetensors")
    for prefix in (f"loss.{STEPS}", f"norm.{STEPS}", "weight.", "ema."):
        wanted = {name: value for name, value in theirs.items() if name.startswith(prefix)}
        found = {name: value for name, value in ours.items() if name.startswith(prefix)}
        assert max(differences(found, wanted, prefix).values()) < 2e-5, prefix


@pytest.mark.long
@pytest.mark.parametrize(("way", "world"), SAVED)
def test_the_ranks_together_write_the_whole_state_once(way: str, world: int, together: Path, alone: dict[str, dict[str, Tensor]]) -> None:
    (path,) = (together / f"{way} {world}").glob("checkpoints/step-*")
    reader = Reader(path)
    assert len(list(path.glob("model*.safetensors"))) == world
    weights = {name.removeprefix("weight."): value for name, value in alone["ragged"].items() if name.startswith("weight.")}
    for part in ("model", "ema"):
        assert {name: shape for name, shape in reader.names(part).items() if name != "null_caption"} == {
            name: tuple(value.shape) for name, value in weights.items()
        }
    assert set(reader.names("optimizer")) == {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in weights}
    scale = max(float(value.abs().max()) for value in weights.values())
    assert max(float((reader.tensor("model", name) - value).abs().max()) for name, value in weights.items()) < 1e-5 * scale


def test_large_gradients_travel_in_buckets_of_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, "BUCKET_BYTES", 1)
    _, found = train(combined(SHAPES["ragged"], Case()), ALONE)
    monkeypatch.undo()
    _, expected = train(combined(SHAPES["ragged"], Case()), ALONE)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("parts", "world", "words"),
    [({"sequence": 2}, 3, "2 ranks share a clip, which does not divide 3"), ({"strategy": "fsdp", "shard": 2}, 3, "parallel.shard 2")],
)
def test_ranks_that_cannot_be_divided_are_refused(parts: dict[str, object], world: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(Case(**parts), Ranks(0, world, torch.device("cpu")))  # type: ignore[arg-type]


def test_fsdp_of_one_process_without_a_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        train(Case(strategy="fsdp"), ALONE)
