"""Bytes that sequence parallelism exchanges in a training step, beside Ulysses' all-to-alls, on real gloo ranks.

Ours: two all-to-alls of the residual stream a block (`opensora.model.sequence_parallel`). The peer: DeepSpeed-Ulysses (Jacobs et al.,
arXiv:2309.14509) on the same model with the same frames on each rank: around both attentions q, k and v go from tokens to heads and the
output back, eight all-to-alls a block. What is counted is what the step hands to `all_to_all_single`, forward and backward, by a wrapper
around it; the gather of the prediction at the end is the same for both and told apart. Loss and gradients of both are compared with one
process's. Floor 50% of the peer's bytes, goal 25%; results equal within 1e-5.

    OMP_NUM_THREADS=1 .venv/bin/python bench/exchange.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from einops import rearrange
from harness import Measured, Row
from torch import Tensor

from opensora.config import ModelConfig
from opensora.model.sequence_parallel import Cut, Sequence, exchange
from opensora.model.stdit import SelfAttention, STDiT, STDiTBlock, modulate

FRAMES, SIDE = 8, 4  # tokens: along time, along rows and columns


def ulysses(attention: SelfAttention, x: Tensor, cut: Cut, *, temporal: bool) -> Tensor:
    """One attention of this rank's frames (B, T/n, S, D), computed for all frames with 1/n of the heads."""
    n, group, heads = cut.sequence.ranks, cut.sequence.group, attention.heads
    whole = []
    for part in attention.qkv(x).chunk(3, dim=-1):  # (B, T/n, S, D)
        parts = rearrange(part, "B T S (n N d) -> n B T S N d", n=n, N=heads // n)
        whole.append(rearrange(exchange(parts, group), "n B T S N d -> B (n T) S N d"))
    order = "B T S N d -> (B S) N T d" if temporal else "B T S N d -> (B T) N S d"
    back = "(B S) N T d -> B T S N d" if temporal else "(B T) N S d -> B T S N d"
    attended = F.scaled_dot_product_attention(*(rearrange(each, order) for each in whole))
    parts = rearrange(rearrange(attended, back, B=len(x)), "B (n T) S N d -> n B T S N d", n=n)
    out: Tensor = attention.proj(rearrange(exchange(parts, group), "n B T S N d -> B T S (n N d)"))
    return out


class UlyssesBlock(STDiTBlock):
    """An STDiT block whose attentions both exchange q, k, v and the output. Needs ranks that divide heads and frames."""

    def forward(
        self, x: Tensor, captions: Tensor, keep: Tensor | None, time6: Tensor, position: Tensor | None, cut: Cut | None = None
    ) -> Tensor:
        assert cut is not None
        modulation = (self.modulation + time6).to(x.dtype)[:, :, None, None].unbind(1)  # 6 x (B, 1, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa * ulysses(self.spatial_attention, modulate(self.norm1(x), shift_msa, scale_msa), cut, temporal=False)
        stream = x if position is None else x + cut.sequence.own_frames(position, 0, cut.frames)
        x = x + gate_msa * ulysses(self.temporal_attention, stream, cut, temporal=True)
        x = x + self.cross_attention(x.flatten(1, 2), captions, keep).unflatten(1, x.shape[1:3])
        out: Tensor = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return out


def built(config: ModelConfig) -> STDiT:
    """The same weights in every process, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    model = STDiT(config, (FRAMES, 2 * SIDE, 2 * SIDE), 8, generator=generator)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.02, generator=generator)
    return model


def step(model: STDiT, config: ModelConfig) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one batch, ragged captions and all."""
    generator = torch.Generator().manual_seed(1)
    shape = (FRAMES, 2 * SIDE, 2 * SIDE)
    noisy, target = torch.randn(2, 4, *shape, generator=generator), torch.randn(2, 8, *shape, generator=generator)
    captions = torch.randn(2, config.caption_tokens, config.caption_width, generator=generator)
    mask = torch.arange(config.caption_tokens) < torch.tensor([[config.caption_tokens], [config.caption_tokens // 2]])
    loss = (model(noisy, torch.tensor([100.0, 900.0]), captions, mask) - target).square().mean()
    loss.backward()
    return loss.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]


class Counter:
    """Stands in for a collective and adds up the bytes that it is handed."""

    def __init__(self, name: str, given: int) -> None:
        self.bytes, self.calls, self._given, self._call = 0, 0, given, getattr(dist, name)
        setattr(dist, name, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        tensor = arguments[self._given]
        self.bytes, self.calls = self.bytes + tensor.numel() * tensor.element_size(), self.calls + 1
        return self._call(*arguments, **named)


def rank(number: int, ranks: int, folder: str, config: ModelConfig) -> None:
    """One of the processes; the first one writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=ranks)
    exchanges, gathers = Counter("all_to_all_single", 1), Counter("all_gather_into_tensor", 1)
    alone_loss, alone = step(built(config), config)
    found: dict[str, dict[str, float]] = {}
    for name in ("ours", "ulysses"):
        model = built(config)
        model.sequence = Sequence(dist.group.WORLD, number, ranks)
        if name == "ulysses":
            for block in model.blocks:
                block.__class__ = UlyssesBlock
        exchanges.bytes = exchanges.calls = gathers.bytes = 0
        loss, gradients = step(model, config)
        told: dict[str, float] = {"bytes": exchanges.bytes, "calls": exchanges.calls, "gathered_bytes": gathers.bytes}
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= ranks
        apart = [float((one - other).abs().max() / other.abs().max().clamp_min(1e-12)) for one, other in zip(gradients, alone, strict=True)]
        found[name] = told | {"loss_apart": abs(float(loss / alone_loss) - 1), "gradients_apart": max(apart)}
    if number == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(quick: bool) -> Measured:
    config = ModelConfig(
        depth=1 if quick else 4, width=32 if quick else 128, heads=4, caption_width=32, caption_tokens=6, caption_dropout=0
    )
    rows: list[Row] = []
    raw: dict[str, Any] = {"model": config.model_dump(mode="json"), "T": FRAMES, "S": SIDE**2, "libraries": harness.libraries("torch")}
    for ranks in (2,) if quick else (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank, (ranks, folder, config), nprocs=ranks)
            raw[f"{ranks} ranks"] = found = json.loads((Path(folder) / "found.json").read_text())
        apart = max(each[key] for each in found.values() for key in ("loss_apart", "gradients_apart"))
        rows.append(
            Row(
                f"sequence parallelism, {ranks} ranks: bytes, of Ulysses'",
                found["ours"]["bytes"] / found["ulysses"]["bytes"],
                "x",
                0.5,
                0.25,
                "less",
            )
        )
        rows.append(Row(f"sequence parallelism, {ranks} ranks: largest difference to one process", apart, "", 1e-5, 1e-5, "less"))
    return rows, raw


def main() -> None:
    harness.run("exchange", measure)


if __name__ == "__main__":
    main()
