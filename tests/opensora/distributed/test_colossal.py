"""ColossalAI's plugins take the steps of one process. Two real ranks run all cases in turn and write down what they saw: importing
ColossalAI takes 15 s, so it is paid once, before the ranks are forked. TorchDDP runs as shipped, then the shim is installed for the others.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import gang
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint.writer import Saver
from opensora.config import Activations, StageConfig
from opensora.distributed import colossal, colossal_plugins
from opensora.distributed.ranks import Ranks, join
from opensora.errors import ConfigError
from opensora.model.stdit import STDiT
from opensora.optim.ema import EMA

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
"""20 CPU-seconds, of which half are imports; ranks that wait for each other and for a core take several times as long."""
STEPS = 3
LR = 1e-2
CLIP = 0.5
"""Below the norm of every step, so that all of them are clipped."""
EXACT = ("torch_ddp", "zero1_fp32", "zero2_fp32", "hybrid_fp32", "hybrid_fp32_frozen")
ROUNDED = ("zero2_bf16", "zero2_bf16_frozen", "gemini", "gemini_frozen", "gemini_in_one_chunk", "hybrid_bf16")
ONE_OF_EACH = ("torch_ddp", "zero2_fp32", "gemini", "hybrid_fp32")
"""Of each plugin: the suite has these, scripts/prove the others."""
PLUGINS = {"torch": "torch_ddp", "zero1": "low_level_zero", "zero2": "low_level_zero", "gemini": "gemini", "hybrid": "hybrid_parallel"}


def stage_of(case: str, **changes: Any) -> StageConfig:
    frozen = case.endswith("_frozen")
    stage = {
        # odd sizes: weights of 36 x 10 and biases of 10 lie across the ends of what a rank has
        "model": {"depth": 2, "width": 36, "heads": 2, "mlp_ratio": 2.0, "caption_width": 10, "caption_tokens": 5},
        "objective": {"kind": "flow"},
        "data": {"source": {"kind": "digits", "clips": 8}, "frames": 1 if frozen else 2, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch", "factor": 4},
        "text": {"kind": "words"},
        # a large eps: a key's bias has no gradient but its rounding, and Adam would make whole steps of that
        "optimizer": {"lr": LR, "eps": 1e-2, "weight_decay": 0.1},
        "ema_decay": 0.5,
        "steps": 8,
        "batch_size": 2,
        "freeze": "temporal" if frozen else "none",
        "dtype": "fp32" if case in EXACT else "bf16",
        "parallel": {"strategy": "colossalai", "plugin": PLUGINS[case.split("_")[0]]},
        "checkpoint": {"every_steps": 1},
        "sampling": {"steps": 2, "method": "euler"},
    }
    return StageConfig.model_validate(stage | changes)


def model_of(stage: StageConfig) -> STDiT:
    generator = torch.Generator().manual_seed(1)
    model = STDiT(stage.model, stage.latent_shape[1:], stage.out_channels, generator=generator)
    with torch.no_grad():
        for weight in model.parameters():  # no layer starts at zero: every weight has a gradient
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    if stage.freeze == "temporal":
        model.freeze_temporal()
    return model


def batch_of(stage: StageConfig, step: int) -> tuple[Tensor, ...]:
    """Latents, times, captions, masks, dropped captions and targets of four clips."""
    generator = torch.Generator().manual_seed(100 + step)
    x, target = (torch.randn(4, *stage.latent_shape, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    captions = torch.randn(4, 5, 10, generator=generator)
    times = torch.rand(4, generator=generator) * 1000
    return x, times, captions, mask, torch.tensor([False, True, False, False]), target


def loss_of(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    return F.mse_loss(model(*batch[:-1]), batch[-1])


class Alone:
    """The same steps in one process, by torch alone. bf16 is autocast's: what multiplies is rounded, weights and gradients are fp32."""

    def __init__(self, stage: StageConfig) -> None:
        self.stage, self.model = stage, model_of(stage)
        weights, settings = dict(self.model.named_parameters()), stage.optimizer
        self.trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LR, eps=settings.eps, weight_decay=settings.weight_decay)
        self.ema = EMA(weights, stage.ema_decay)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.stage.dtype == "bf16"):
            loss = loss_of(self.model, batch_of(self.stage, step))
        loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(loss.item())
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP)))
        self.optimizer.step()
        self.ema.update(step)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        model, state = self.model.state_dict(), self.optimizer.state
        moments = {f"{key}/{name}": state[self.trained[name]][key] for name in self.trained for key in ("exp_avg", "exp_avg_sq", "step")}
        return {"model": model, "ema": model | self.ema.shadow, "optimizer": moments}


# ------------------------------------------------------------------------------------------------------------------
# What a rank does
# ------------------------------------------------------------------------------------------------------------------


def take_steps(
    strategy: colossal.Colossal, stage: StageConfig, ranks: Ranks, numbers: range, parts: int = 1
) -> tuple[list[float], list[float]]:
    """Losses over all ranks and norms, as the trainer takes its steps."""
    losses, norms, shared = [], [], stage.parallel.ranks_per_clip
    here, count = ranks.rank // shared, ranks.world // shared
    for step in numbers:
        own = tuple(part.chunk(count)[here] for part in batch_of(stage, step))
        total = torch.zeros(())
        for part in range(parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=stage.dtype == "bf16"):
                loss = loss_of(strategy.model, tuple(shard.chunk(parts)[part] for shard in own)) / parts
            strategy.backward(loss, first=part == 0, last=part == parts - 1)
            total += loss.detach()
        assert bool(strategy.finite())
        flags = strategy.reduce(torch.stack([total, torch.ones(())]))
        losses.append(float(flags[0] / flags[1]))
        norms.append(float(strategy.norm()))
        strategy.step(LR, (CLIP / (strategy.norm() + 1e-6)).clamp(max=1.0), step)
    return losses, norms


def all_of(strategy: colossal.Colossal, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """What the ranks would write, put together; every row is there once."""
    parts: list[Any] = [None] * ranks.world
    dist.all_gather_object(parts, strategy.shards())
    return {part: {name: joined([one[part][name] for one in parts if name in one[part]]) for name in parts[0][part]} for part in parts[0]}


def joined(shards: list[checkpoint.TensorShard]) -> Tensor:
    tensors = [shard.tensor for shard in shards]
    if shards[0].rows is None:
        (whole,) = tensors
        return whole
    lengths = [len(tensor) for tensor in tensors]
    assert [shard.start for shard in shards] == [min(sum(lengths[:number]), shards[0].rows) for number in range(len(shards))]
    assert sum(lengths) == shards[0].rows
    return torch.cat(tensors)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference, in units of the largest number of its tensor."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, torch.float32), name
    return worst([(found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6) for name, value in expected.items()])


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None) -> float:
    """The distance of all tensors together, in units of how far they are from the origin."""
    gap = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    way = sum(float((value if origin is None else value - origin[name]).square().sum()) for name, value in expected.items())
    return float((gap / way) ** 0.5)


def relative(found: list[float], expected: list[float]) -> float:
    return worst([abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)])


def worst(numbers: Sequence[float | Tensor]) -> float:
    """The largest, or nan if that is among them, which Python's max passes over."""
    return float(torch.tensor([float(number) for number in numbers]).max())


def report_of(case: str, ranks: Ranks, folder: Path) -> dict[str, float]:
    colossal_plugins.ZERO_STAGE = 1 if case.startswith("zero1") else 2
    colossal_plugins.GEMINI_CHUNK_M = 32.0 if case == "gemini_in_one_chunk" else 0.01
    stage = stage_of(case)
    alone, start = Alone(stage), model_of(stage).state_dict()
    strategy = colossal.Colossal(model_of(stage), stage, ranks)
    own = sum(part.numel() for part in strategy._own.values())
    report = {"share": own / sum(weight.numel() for weight in alone.trained.values())}
    report |= {"as given": distance(all_of(strategy, ranks)["model"], start)}

    losses, norms = take_steps(strategy, stage, ranks, range(STEPS))
    for step in range(STEPS):
        alone.step(step)
    found, expected = all_of(strategy, ranks), alone.tensors()
    assert min(norms) > CLIP
    report |= {"loss": relative(losses, alone.losses), "norm": relative(norms, alone.norms)}
    report |= {part: distance(found[part], expected[part]) for part in ("model", "ema")}
    counts = {name for name in expected["optimizer"] if name.startswith("step/")}
    assert all(found["optimizer"].pop(name) == expected["optimizer"].pop(name) == STEPS for name in counts)
    report |= {"movement": apart(found["model"], expected["model"], start), "moments": apart(found["optimizer"], expected["optimizer"])}
    report["averaged"] = distance(strategy.averaged(), found["ema"])

    if stage.parallel.plugin != "gemini":
        accumulating = colossal.Colossal(model_of(stage), stage, ranks)
        losses_, norms_ = take_steps(accumulating, stage, ranks, range(STEPS), parts=2)
        state = all_of(accumulating, ranks)["model"]
        moved = [relative(losses_, alone.losses), relative(norms_, alone.norms), apart(state, expected["model"], start)]
        report["in parts"] = worst(moved)

    saver = Saver(folder / case, stage, writer=strategy.writer(ranks.rank), writers=ranks.world, here=ranks.here, device=ranks.device)
    saver.save(strategy.shards(), folder, step=STEPS, world_size=ranks.world, seen=(4 * STEPS,), clips="", carried=(), reset=())
    saver.wait()
    dist.barrier()
    reader = checkpoint.Reader(checkpoint.directory(folder / case, STEPS))
    model = model_of(stage)
    model.load_state_dict(reader.part("model"))
    resumed = colossal.Colossal(model, stage, ranks)
    resumed.load(reader, ema=True, optimizer=True)
    for one in (strategy, resumed):
        take_steps(one, stage, ranks, range(STEPS, STEPS + 2))
    left, right = all_of(resumed, ranks), all_of(strategy, ranks)
    report["resumed"] = worst(
        [apart(left["model"], right["model"], found["model"]), *(distance(left[part], right[part]) for part in right)]
    )

    model = model_of(stage)
    model.keep(Activations(recompute="full", mlp_chunks=2))
    again, norm = take_steps(colossal.Colossal(model, stage, ranks), stage, ranks, range(1))
    report["recomputed"] = relative(again + norm, losses[:1] + norms[:1])

    if stage.dtype == "fp32":
        loss = loss_of(strategy.model, batch_of(stage, 0)) * torch.inf
        strategy.backward(loss)
        strategy.reduce(torch.zeros(1))
        report["finite"] = float(strategy.norm().isfinite())
        strategy.step(LR, torch.ones(()), STEPS + 2)
        report["moved by inf"] = distance(all_of(strategy, ranks)["model"], right["model"])
    return report


def main(folder: Path, cases: list[str]) -> None:
    """Each rank, forked from a process that has imported ColossalAI."""
    from colossalai import booster, nn, shardformer  # noqa: F401

    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if not ranks[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            code = 1
            try:
                rank_of_two(folder, cases)
                code = 0
            except BaseException:  # noqa: BLE001 # said by whoever was forked, as Python would
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert codes == [0, 0], codes


def rank_of_two(folder: Path, cases: list[str]) -> None:
    reports = {}
    with join() as ranks:
        for case in cases:
            if case != "torch_ddp" and "gemini" not in colossal_plugins.ON_CPU:
                import colossal_shim

                colossal_shim.install()
            reports[case] = report_of(case, ranks, folder)
            if ranks.is_first:
                (folder / "reports.json").write_text(json.dumps(reports))


# ------------------------------------------------------------------------------------------------------------------
# What they saw
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, str], NoReturn]
) -> dict[str, dict[str, float]]:
    """By case, what two ranks measured: the cases that a test of this run asks for."""
    if find_spec("colossalai") is None:
        require("colossalai", "scripts/setup --with colossalai")
    folder = tmp_path_factory.mktemp("colossal")
    for name in ("autoencoder", "text"):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")
    asked = {case for item in request.session.items if (case := getattr(item, "callspec", None) and item.callspec.params.get("case"))}
    cases = [case for case in (*EXACT, *ROUNDED) if case in asked or case in ONE_OF_EACH]
    gang.run(1, __file__, str(folder), ",".join(cases), timeout=560)
    read: dict[str, dict[str, float]] = json.loads((folder / "reports.json").read_text())
    return read


def among(cases: Iterable[str]) -> list[Any]:
    return [case if case in ONE_OF_EACH else pytest.param(case, marks=pytest.mark.prove("colossalai")) for case in cases]


MEASURES = ("loss", "norm", "model", "ema", "movement", "moments")


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("case", among(EXACT))
def test_two_ranks_take_the_steps_of_one_process(reports: dict[str, dict[str, float]], case: str, measure: str) -> None:
    assert reports[case][measure] < 1e-5


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("case", among(ROUNDED))
def test_two_ranks_take_the_steps_of_one_process_up_to_bf16(reports: dict[str, dict[str, float]], case: str, measure: str) -> None:
    assert reports[case][measure] < 1e-2


@pytest.mark.parametrize("case", among(case for case in (*EXACT, *ROUNDED) if not case.startswith("gemini")))
def test_a_step_in_two_parts_is_the_step(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["in parts"] < (1e-5 if case in EXACT else 1e-2)


@pytest.mark.parametrize("case", among([*EXACT, *ROUNDED]))
def test_fp32_weights_are_those_given_not_what_bf16_left_of_them(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["as given"] == 0


@pytest.mark.parametrize("case", among([*EXACT, *ROUNDED]))
def test_a_checkpoint_continues(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["resumed"] < 1e-5


@pytest.mark.parametrize("case", among([*EXACT, *ROUNDED]))
def test_every_rank_gets_the_average_that_is_saved(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["averaged"] == 0


@pytest.mark.parametrize("case", among([*EXACT, *ROUNDED]))
def test_recomputing_changes_nothing_but_rounding(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["recomputed"] < (1e-5 if case in EXACT else 1e-2)


@pytest.mark.parametrize("case", among(EXACT))
def test_an_infinite_loss_is_seen_and_moves_no_weight(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["finite"] == 0
    assert reports[case]["moved by inf"] == 0


@pytest.mark.prove("colossalai")
@pytest.mark.parametrize("case", ["gemini_in_one_chunk"])
def test_one_chunk_is_not_divided(reports: dict[str, dict[str, float]], case: str) -> None:
    assert reports[case]["share"] == 1


def test_fp32_weights_are_divided(reports: dict[str, dict[str, float]]) -> None:
    assert reports["torch_ddp"]["share"] == 1
    assert 0.45 < reports["zero2_fp32"]["share"] < 0.55
    assert 0.35 < reports["gemini"]["share"] < 0.65  # its last chunk is not full
    assert 0.5 < reports["hybrid_fp32"]["share"] < 0.75  # embedders and the final layer are whole


# ------------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------------


def refusal(case: str, device: str = "cuda", world: int = 2, **changes: Any) -> str:
    stage = stage_of(case, **changes)
    with pytest.raises(ConfigError) as refused:
        colossal.Colossal(model_of(stage), stage, Ranks(0, world, torch.device(device)))
    assert "colossalai" not in sys.modules, "a refusal must not take 15 s"
    return str(refused.value)


@pytest.mark.parametrize("case", ["zero2_fp32", "gemini", "hybrid_fp32"])
def test_plugins_beside_torch_ddp_are_refused_on_a_cpu(case: str) -> None:
    assert "needs CUDA, this rank's device is a CPU" in refusal(case, device="cpu")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colossal_plugins, "find_spec", lambda name: None)
    assert "scripts/setup --with colossalai" in refusal("torch_ddp")


def test_what_a_plugin_cannot_do_is_refused() -> None:
    assert "bf16 alone, dtype is fp32" in refusal("gemini", dtype="fp32")
    assert "2 ranks, 3 are no multiple" in refusal("hybrid_fp32", world=3)
    one_head = {"depth": 2, "width": 36, "heads": 1, "caption_width": 10, "caption_tokens": 5}
    assert "model.heads is 1" in refusal("hybrid_fp32", model=one_head)
    assert "without a launcher" in refusal("torch_ddp", device="cpu", world=1)


def test_a_plugin_that_cannot_add_up_parts_of_a_step_is_refused() -> None:
    said = refusal("gemini", accumulate=4)
    assert "4 parts of a step (accumulate)" in said and "accumulate 1 with 4 times the ranks" in said


def test_ranks_that_share_layers_see_the_same_clips() -> None:
    assert [stage_of(case).parallel.ranks_per_clip for case in ("hybrid_fp32", "zero2_fp32", "torch_ddp")] == [2, 1, 1]
    assert stage_of("torch_ddp", parallel={"strategy": "ddp"}).parallel.ranks_per_clip == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
