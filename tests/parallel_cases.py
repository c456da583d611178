"""What test_parallel.py runs on each rank: `python parallel_cases.py suite|all OUT [SOURCE]`. Every case takes three steps on clips that
are the same in every world; rank 0 writes losses, the first gradient, and weights and averages after them. Alone (world 1) it is the
reference."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.checkpoint.reader import Reader
from opensora.checkpoint.writer import Saver
from opensora.config import Activations, StageConfig
from opensora.distributed import parallel
from opensora.distributed.ranks import Ranks, join
from opensora.distributed.strategy import Strategy
from opensora.model.routing import Route
from opensora.model.stdit import STDiT

CLIPS = 4
STEPS = 3


@dataclass(frozen=True)
class Case:
    frames: int = 4
    rows: int = 4
    columns: int = 6
    strategy: str = "ddp"
    sequence: int = 1
    shard: int | None = None
    recompute: str = "none"
    freeze: bool = False
    temporal_position: str = "attention"
    patch_frames: int = 1
    given: bool = False
    """Whether some frames are given, other ones of each clip."""
    routed: bool = False
    parts: int = 1
    """Of a step: each takes its share of the rank's clips, or all of them where they do not divide."""


SHAPES = {
    "divisible": Case(),
    "ragged": Case(frames=5, rows=2, columns=6),  # 5 frames, 3 tokens a frame: neither divides by 2 or 4
    "image": Case(frames=1),
    "residual": Case(frames=3, temporal_position="residual"),
    "pairs of frames": Case(frames=6, patch_frames=2),
    "frozen": Case(frames=1, freeze=True),
    "given": Case(frames=5, rows=2, columns=6, given=True),
    "routed": Case(frames=3, columns=10, routed=True),  # 5 of 10 tokens a frame go through: neither divides by 2 or 4
}
WAYS: dict[str, dict[int, list[Case]]] = {
    "ddp": {2: [Case()], 4: [Case()]},
    "ddp recomputed": {2: [Case(recompute="full")]},
    "fsdp": {2: [Case(strategy="fsdp")], 4: [Case(strategy="fsdp")]},
    "fsdp recomputed": {2: [Case(strategy="fsdp", recompute="full")]},
    "fsdp in copies": {4: [Case(strategy="fsdp", shard=2)]},
    "sequence": {2: [Case(sequence=2)], 4: [Case(sequence=4)]},
    "sequence in pairs": {4: [Case(sequence=2)]},
    "sequence recomputed": {2: [Case(sequence=2, recompute="full")]},
    "sequence and fsdp": {4: [Case(strategy="fsdp", sequence=2)]},
    "ddp in parts": {2: [Case(parts=2)]},
    "fsdp in parts": {2: [Case(strategy="fsdp", parts=2)]},
    "fsdp in copies and parts": {4: [Case(strategy="fsdp", shard=2, parts=3)]},
    "sequence in parts": {2: [Case(sequence=2, parts=4)]},
}
"""By way to share the work and number of ranks."""
RUNS = [
    (way, world, shape)
    for way, worlds in WAYS.items()
    for world in worlds
    for shape in SHAPES
    if shape == "divisible" or not ("recomputed" in way or "parts" in way)
]
ALL_SHAPES = (("ddp", 2), ("sequence and fsdp", 4))
IN_THE_SUITE = {
    (way, world, shape)
    for way, world, shape in RUNS
    if shape == "ragged" or (way, world) in ALL_SHAPES or "recomputed" in way or "parts" in way
}


def combined(shape: Case, way: Case) -> Case:
    return Case(
        shape.frames, shape.rows, shape.columns, way.strategy, way.sequence, way.shard, way.recompute, shape.freeze,
        shape.temporal_position, shape.patch_frames, shape.given, shape.routed, way.parts,
    )  # fmt: skip


def stage_of(case: Case) -> StageConfig:
    return StageConfig.model_validate(
        {
            "model": {
                "depth": 3, "width": 32, "heads": 2, "caption_width": 16, "caption_tokens": 6, "patch": [case.patch_frames, 2, 2],
                "temporal_position": case.temporal_position,
            },
            "objective": {"kind": "flow"},
            "data": {"source": {"kind": "digits", "clips": 4}, "frames": case.frames, "height": 8, "width": 8},
            "autoencoder": {"kind": "patch"},
            "text": {"kind": "words"},
            # no eps: gradients near zero make Adam's first steps jump by their sign
            "optimizer": {"lr": 1e-3, "eps": 1e-3},
            "steps": STEPS,
            "batch_size": 1,
            "freeze": "temporal" if case.freeze else "none",
            "routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1} if case.routed else None,
            "checkpoint": {"every_steps": 1, "background": False},
            "sampling": {"method": "euler"},
            "parallel": {"strategy": case.strategy, "sequence": case.sequence, "shard": case.shard},
        }
    )  # fmt: skip


def model_of(stage: StageConfig, case: Case) -> STDiT:
    model = STDiT(stage.model, (case.frames, case.rows, case.columns), 4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not (case.freeze and "temporal_attention.proj" in name):
                weight.normal_(std=0.1, generator=generator)
        model.null_caption.normal_(generator=generator)
    if case.freeze:
        for block in model.blocks:
            torch.nn.init.zeros_(block.temporal_attention.proj.weight)
            torch.nn.init.zeros_(block.temporal_attention.proj.bias)
        model.freeze_temporal()
    model.keep(Activations(recompute=case.recompute))  # type: ignore[arg-type]
    return model


def clips_of(case: Case, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    draw = {
        "x": torch.randn(CLIPS, 4, case.frames, case.rows, case.columns, generator=generator),
        "target": torch.randn(CLIPS, 4, case.frames, case.rows, case.columns, generator=generator),
        "time": torch.rand(CLIPS, generator=generator) * 1000,
        "captions": torch.randn(CLIPS, 6, 16, generator=generator),
    }
    lengths = torch.tensor([6, 3, 1, 5])
    if case.given:
        draw["given"] = torch.arange(case.frames) < torch.tensor([1, 3, 0, 2])[:, None]
    tubes = case.rows * case.columns // 4
    draw["through"] = torch.rand(CLIPS, tubes, generator=generator).argsort(1)[:, : tubes // 2].sort(1).values
    return draw | {"mask": torch.arange(6) < lengths[:, None], "drop": torch.tensor([False, True, False, False])}


def train(case: Case, ranks: Ranks, reader: Reader | None = None, steps: range = range(STEPS)) -> tuple[Strategy, dict[str, Tensor]]:
    """The strategy after its steps, and what they gave."""
    stage = stage_of(case)
    model = model_of(stage, case)
    if reader is not None:
        model.load_state_dict(reader.part("model"))
    strategy = parallel.build(model, stage, ranks)
    if reader is not None:
        strategy.load(reader, ema=True, optimizer=True)
    rank, world = parallel.data_ranks(ranks, case.sequence)
    found: dict[str, Tensor] = {}
    for step in steps:
        own = {name: value[rank * CLIPS // world : (rank + 1) * CLIPS // world] for name, value in clips_of(case, step).items()}
        flags = torch.zeros(1 + ranks.world)
        for part in range(case.parts):
            some = _share(own, part, case.parts)
            route = Route(some["through"], 1, 2) if case.routed else None
            prediction = strategy.model(some["x"], some["time"], some["captions"], some["mask"], some["drop"], some.get("given"), route)
            loss = (prediction - some["target"]).square().mean() / case.parts
            strategy.backward(loss, first=part == 0, last=part == case.parts - 1)
            flags[0] += loss.detach()
        flags[1 + ranks.rank] = strategy.finite()
        flags = strategy.reduce(flags)
        assert flags[1:].tolist() == [1.0] * ranks.world
        found[f"loss.{step}"], found[f"norm.{step}"] = flags[0] / ranks.world, strategy.norm().clone()
        if step == steps[0]:
            for name, weight in strategy.model.named_parameters():
                if weight.grad is not None:
                    found[f"grad.{name}"] = whole(weight.grad).clone()
        strategy.step(1e-2, (1.0 / strategy.norm()).clamp(max=1), step)
    for name, weight in strategy.model.named_parameters():
        found[f"weight.{name}"] = whole(weight.detach()).clone()
    for name, value in strategy.averaged().items():
        found[f"ema.{name}"] = value.clone()
    return strategy, found


def _share(own: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    count = len(own["x"])
    return {name: value.chunk(parts)[part] for name, value in own.items()} if count % parts == 0 else own


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def save(strategy: Strategy, case: Case, ranks: Ranks, folder: Path) -> None:
    """A checkpoint of the strategy, every rank its part; the encoders are empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("autoencoder.safetensors", "text.safetensors"):
        (folder / name).touch()
    writer, here = strategy.writer(ranks.rank), tuple(strategy.writer(rank) for rank in ranks.here)
    saver = Saver(folder / "checkpoints", stage_of(case), writer=writer, writers=ranks.world, here=here, device=ranks.device)
    ranks.barrier()
    saver.save(strategy.shards(), folder, step=STEPS, world_size=ranks.world, seen=(12,), clips="", carried=(), reset=())
    ranks.barrier()


def main(which: str, out: Path, source: Path | None) -> None:
    """The cases of this world size; with `source`, one more step from each checkpoint found there, and no other."""
    torch.set_num_threads(1)
    with join() as ranks:
        for way, world, shape in RUNS if source is None else ():
            if world != ranks.world or (which == "suite" and (way, world, shape) not in IN_THE_SUITE):
                continue
            (case_of_way,) = WAYS[way][world]
            case = combined(SHAPES[shape], case_of_way)
            strategy, found = train(case, ranks)
            if ranks.is_first:
                save_file({name: value.contiguous() for name, value in found.items()}, out / f"{way} {world} {shape}.safetensors")
            if shape == "ragged":
                save(strategy, case, ranks, out / f"{way} {world}")
        for path in sorted(source.glob("*/checkpoints/step-*")) if source else []:
            for strategy_name in ("ddp", "fsdp"):
                case = combined(SHAPES["ragged"], Case(strategy=strategy_name))
                _, found = train(case, ranks, Reader(path), range(STEPS, STEPS + 1))
                if ranks.is_first:
                    name = f"{path.parent.parent.name} then {strategy_name} {ranks.world}"
                    save_file({name: value.contiguous() for name, value in found.items()}, out / f"{name}.safetensors")
        if ranks.is_first:
            (out / f"done-{ranks.world}.json").write_text(json.dumps(ranks.world))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
