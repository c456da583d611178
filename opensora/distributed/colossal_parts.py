"""Where a plugin of ColossalAI keeps what belongs to a parameter: its fp32 weight, its moments, its gradient.

Owns one class for each plugin, which finds them by the parameter's name. Refuses to change them: `opensora.distributed.colossal` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from opensora.config import StageConfig
from opensora.distributed.colossal_plugins import COLUMNS, ROWS, TENSOR_RANKS
from opensora.distributed.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class PluginParts:
    """torch_ddp: every rank has all of every parameter. The plugins below keep a part of it; what is flat here is flat there.

    Names are the model's. Tensors share memory with the plugin's and stay where they are for as long as it lives.
    """

    def __init__(self, optimizer: Any, weights: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], ranks: Ranks) -> None:
        """`weights` that are trained, rebuilt by the plugin, in the order in which the optimizer got them; `shapes` of the whole ones."""
        self.shapes = shapes
        self._optimizer, self._weights, self._ranks = optimizer, weights, ranks
        self._state = optimizer.optim.state

    def weight(self, name: str) -> Tensor:
        """This rank's part of the fp32 weight."""
        return self._weights[name].detach()

    def gradient(self, name: str) -> Tensor:
        """Of that part, averaged; between backward pass and step."""
        gradient = self._weights[name].grad
        assert gradient is not None, name
        return gradient

    def moments(self, name: str) -> tuple[Tensor, ...]:
        """Of that part, one for each of MOMENTS; made here, since optimizers make them in their first step alone."""
        key, weight = self._key(name), self.weight(name)
        made = [torch.zeros_like(self._padded(name)) for _ in MOMENTS]
        if key is not None:
            self._state[key] = {"step": self._steps(0, key), **dict(zip(MOMENTS, made, strict=True))}
        return tuple(moment if moment.shape == weight.shape else moment[: len(weight)] for moment in made)

    def set_steps(self, name: str, steps: int) -> None:
        """How often its moments were updated."""
        key = self._key(name)
        if key is not None:
            self._state[key]["step"] = self._steps(steps, key)

    def divided(self, name: str) -> bool:
        """Whether ranks have different parts of it; the same on all of them."""
        return False

    def counts(self, name: str) -> bool:
        """Whether this rank is the one among those that have this part that speaks for it."""
        return True

    def held(self, name: str, whole: Tensor) -> Tensor:
        """The view of a whole weight that is this rank's part."""
        return whole

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up, in place, over the ranks that together have each parameter once."""
        return tensor

    def _padded(self, name: str) -> Tensor:
        """This rank's part of the fp32 weight, with what fills it up for the optimizer."""
        return self.weight(name)

    def _key(self, name: str) -> Tensor | None:
        """What the optimizer's state of it goes by; none: this rank has none of it."""
        return self._weights[name]

    def _steps(self, steps: int, key: Tensor) -> Any:
        return torch.tensor(float(steps), device=key.device)


class _ZeroParts(PluginParts):
    """low_level_zero: of each parameter, flat and filled up to a multiple of the ranks, one interval; its gradient alike."""

    def weight(self, name: str) -> Tensor:
        start, end = self._interval(name)
        return self._key(name)[: end - start]

    def gradient(self, name: str) -> Tensor:
        start, end = self._interval(name)
        gradient: Tensor = self._optimizer.get_working_grad_by_param_id(id(self._weights[name]))
        return gradient[: end - start]

    def divided(self, name: str) -> bool:
        return True

    def held(self, name: str, whole: Tensor) -> Tensor:
        start, end = self._interval(name)
        return whole.view(-1)[start:end]

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum_(tensor)

    def _padded(self, name: str) -> Tensor:
        return self._key(name)

    def _key(self, name: str) -> Tensor:
        master: Tensor = self._optimizer.get_working_to_master_map()[id(self._weights[name])]
        return master

    def _interval(self, name: str) -> tuple[int, int]:
        each, count = self._key(name).numel(), self._weights[name].numel()
        return min(self._ranks.rank * each, count), min((self._ranks.rank + 1) * each, count)


class _GeminiParts(PluginParts):
    """gemini: parameters lie one after the other in chunks, and a rank has one interval of each chunk: of a parameter all, some or none.

    Between backward pass and step the chunk of bf16 weights holds their gradients; beside it is one of fp32 weights.
    """

    def __init__(self, optimizer: Any, weights: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], ranks: Ranks) -> None:
        super().__init__(optimizer, weights, shapes, ranks)
        self._numbers = {name: number for number, name in enumerate(weights)}

    def weight(self, name: str) -> Tensor:
        return self._in(name, masters=True)

    def gradient(self, name: str) -> Tensor:
        return self._in(name, masters=False)

    def divided(self, name: str) -> bool:
        return not self._chunk(name).keep_gathered

    def counts(self, name: str) -> bool:
        return self.divided(name) or self._ranks.is_first

    def held(self, name: str, whole: Tensor) -> Tensor:
        key = self._key(name)
        _, start, count = (0, 0, 0) if key is None else self._optimizer.get_offsets(self._numbers[name])
        return whole.view(-1)[start : start + count]

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum_(tensor)

    def _chunk(self, name: str) -> Any:
        return self._optimizer.chunk_manager.get_chunk(self._weights[name])

    def _in(self, name: str, *, masters: bool) -> Tensor:
        chunk, key = self._chunk(name), self._key(name)
        payload: Tensor = (chunk.paired_chunk if masters else chunk).payload
        start, end = (0, 0) if key is None else self._optimizer.param_to_range[key]
        return payload[start:end]

    def _key(self, name: str) -> Tensor | None:
        key: Tensor | None = self._optimizer.id_to_fake_params.get(self._numbers[name])
        return key

    def _steps(self, steps: int, key: Tensor) -> int:
        return steps


class _TensorParts(PluginParts):
    """hybrid_parallel: of the layers in COLUMNS and ROWS a rank has a part, of the others all. In bf16 the fp32 weights lie apart."""

    def __init__(self, optimizer: Any, weights: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], ranks: Ranks) -> None:
        super().__init__(optimizer, weights, shapes, ranks)
        self._masters: Mapping[int, Tensor] = optimizer.get_working_to_master_map() or {}
        self._rank = ranks.rank % TENSOR_RANKS

    def weight(self, name: str) -> Tensor:
        return self._key(name).detach()

    def divided(self, name: str) -> bool:
        layer, kind = _layer(name)
        return layer in COLUMNS or (layer in ROWS and kind == "weight")

    def counts(self, name: str) -> bool:
        return self.divided(name) or self._rank == 0

    def held(self, name: str, whole: Tensor) -> Tensor:
        if not self.divided(name):
            return whole
        layer, _ = _layer(name)
        if layer in ROWS:
            parts: Tensor = rearrange(whole, "out (ranks inner) -> ranks out inner", ranks=TENSOR_RANKS)
            return parts[self._rank]
        parts = rearrange(whole, "(count ranks out) ... -> ranks count out ...", count=COLUMNS[layer], ranks=TENSOR_RANKS)
        return parts[self._rank]

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._optimizer.tp_pg)
        return tensor

    def _key(self, name: str) -> Tensor:
        return self._masters.get(id(self._weights[name]), self._weights[name])


def _layer(name: str) -> tuple[str, str]:
    """blocks.3.mlp.fc1.weight -> mlp.fc1, weight."""
    layer, _, kind = name.rpartition(".")
    return layer.split(".", 2)[2] if layer.count(".") > 1 else "", kind


def parts_of(
    stage: StageConfig, optimizer: Any, weights: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], ranks: Ranks
) -> PluginParts:
    match stage.parallel.plugin:
        case "torch_ddp":
            return PluginParts(optimizer, weights, shapes, ranks)
        case "low_level_zero":
            return _ZeroParts(optimizer, weights, shapes, ranks)
        case "gemini":
            return _GeminiParts(optimizer, weights, shapes, ranks)
        case "hybrid_parallel":
            return _TensorParts(optimizer, weights, shapes, ranks)
