"""Strategy `colossalai`: the step through ColossalAI's Booster, by one of four plugins.

Owns what lies between a plugin and the rest of the trainer: which plugin, optimizer and precision a stage asks for; where a plugin
keeps the fp32 weights, moments and gradients of each parameter, so that norm, scale, moving average and checkpoints are those of
every other strategy, by parameter name; how STDiT is cut for tensor parallelism. Refuses ColossalAI's own clipping, loss scaling,
data loader and checkpoint files (pickles; and Gemini's take the fp32 weights through bf16).

    plugin           a rank holds of weights   gradients      fp32 weights and moments   precision         was run
    torch_ddp        all                       all            all                        the stage's       on a CPU, as shipped
    low_level_zero   all                       1/ranks        1/ranks                    fp32 or bf16      on a CPU, with the tests' shim
    gemini           1/ranks                   1/ranks        1/ranks                    bf16 alone        on a CPU, with the tests' shim
    hybrid_parallel  1/2 of a block's layers   as weights     as weights                 fp32 or bf16      on a CPU, with the tests' shim

None of the four was run on a GPU. Resuming is not bitwise: a plugin chooses the order in which gradients add up.
A step waits for the device once: plugins do by themselves, to look at their norms.

ColossalAI 0.5.0 takes 15 s to import and is an extra of the project: nothing of it is imported before a stage asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from opensora.checkpoint import Piece, Reader, share
from opensora.config import StageConfig
from opensora.ema import EMA
from opensora.errors import ConfigError
from opensora.model import STDiT
from opensora.ranks import Ranks

if TYPE_CHECKING:
    from opensora.parallel import Pieces

ON_CPU = {"torch_ddp"}
"""Plugins that run where there is no CUDA. The shim of the tests adds the others."""
ZERO_STAGE = 2
"""low_level_zero: 2 divides the gradients, too; 1 would add up all of them on every rank."""
TENSOR_RANKS = 2
"""hybrid_parallel: ranks that share a block's layers. Two: XL/2's layers are narrow (1152), and each of them is exchanged twice a block."""
GEMINI_CHUNK_M = 32.0
"""gemini: 2^20 parameters of a chunk, at least; what is gathered at once. A block of XL/2 has 25."""
COLUMNS = {
    "spatial_attention.qkv": 3,
    "temporal_attention.qkv": 3,
    "cross_attention.query": 1,
    "cross_attention.key_value": 2,
    "mlp.fc1": 1,
}
"""Layers of a block whose outputs are divided, and how many projections each of them holds one after the other. Every projection is
divided, so that a rank has whole heads."""
ROWS = ("spatial_attention.proj", "temporal_attention.proj", "cross_attention.proj", "mlp.fc2")
"""Layers of a block whose inputs are divided and whose outputs are added up. Their biases are whole on every rank."""


class Colossal:
    """A model and its optimizer in the hands of a Booster plugin; `opensora.parallel.Strategy` says what the methods are.

    Args:
        model: the weights that the stage starts from, in fp32, on the rank's device. It is rebuilt in place: call `self.model`.

    Raises:
        ConfigError: ColossalAI is not installed, or the plugin cannot do what the stage asks for.
    """

    def __init__(self, model: STDiT, stage: StageConfig, ranks: Ranks) -> None:
        plugin = stage.parallel.plugin
        _check(stage, ranks)
        from colossalai.booster import Booster

        self._ranks = ranks
        weights = dict(model.named_parameters())
        self._trained = [name for name, weight in weights.items() if weight.requires_grad]
        shapes = {name: weight.shape for name, weight in weights.items()}
        # plugins cast or divide what is not trained as well, and make their fp32 weights of those that they have cast
        state, buffers = model.state_dict(), {name: tensor.clone() for name, tensor in model.named_buffers()}
        untrained = {name: tensor for name, tensor in state.items() if name not in self._trained}
        self._still = untrained if plugin == "torch_ddp" else {name: tensor.clone() for name, tensor in untrained.items()}
        exact = {name: state[name].clone() for name in self._trained} if _is_bf16(stage) else {}

        self._booster = Booster(plugin=_plugin(stage))
        optimizer = _optimizer(stage, [weights[name] for name in self._trained])
        boosted, self._optimizer, *_ = self._booster.boost(model, optimizer)
        for name, tensor in buffers.items():
            model.get_buffer(name).data = tensor
        self.model: nn.Module = _ExactTimes(boosted, model) if _casts_inputs(stage) else boosted
        self._parts = _parts(stage, self._optimizer, {name: weights[name] for name in self._trained}, shapes, ranks)
        for name, tensor in exact.items():
            self._take(name, self._parts.weight(name), tensor)
        del exact

        self._own = {name: self._parts.weight(name) for name in self._trained}
        self._moments = {name: self._parts.moments(name) for name in self._trained}
        self._taken = dict.fromkeys(self._trained, 0)
        self._ema = EMA(self._own, stage.ema_decay)
        self._norm = torch.zeros((), device=ranks.device)

    def backward(self, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        """Leaves gradients that are averaged over the data-parallel ranks already: of each part of a step, since what is added to an
        average and averaged again is the average of the sum."""
        self._booster.backward(loss, self._optimizer)

    def finite(self) -> Tensor:
        """True: one rank's number that is not finite is everybody's by now. Blame is the loss's, and the end the norm's."""
        return torch.ones((), dtype=torch.bool, device=self._ranks.device)

    def reduce(self, flags: Tensor) -> Tensor:
        counted = [self._parts.gradient(name) for name in self._trained if self._parts.counts(name)]
        self._norm = self._parts.sum_(self._squares(counted)).sqrt()
        return self._ranks.sum_(flags)

    def norm(self) -> Tensor:
        return self._norm

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor, step: int) -> None:
        if bool(self._norm.isfinite()):
            torch._foreach_mul_(self._gradients(), scale)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._taken = {name: taken + 1 for name, taken in self._taken.items()}
            self._ema.update(step)
        self._optimizer.zero_grad()

    def writer(self, rank: int) -> int:
        return rank

    def pieces(self) -> Pieces:
        steps = {f"step/{name}": torch.tensor(float(taken)) for name, taken in self._taken.items()}
        moments = {f"{key}/{name}": own[index] for index, key in enumerate(MOMENTS) for name, own in self._moments.items()}
        still = share(self._still, self._ranks.rank, self._ranks.world)
        return {
            "model": {name: self._piece(name, own) for name, own in self._own.items()} | still,
            "ema": {name: self._piece(name, own) for name, own in self._ema.shadow.items()} | still,
            "optimizer": {key: self._piece(key.partition("/")[2], own) for key, own in moments.items()}
            | share(steps, self._ranks.rank, self._ranks.world),
        }

    @torch.no_grad()
    def load(self, reader: Reader, *, ema: bool, optimizer: bool) -> None:
        for name in self._trained if ema else ():
            self._take(name, self._ema.shadow[name], reader.tensor("ema", name))
        saved = reader.names("optimizer") if optimizer else {}
        for name in self._trained:
            if f"step/{name}" in saved:
                for key, own in zip(MOMENTS, self._moments[name], strict=True):
                    self._take(name, own, reader.tensor("optimizer", f"{key}/{name}"))
                self._taken[name] = int(reader.tensor("optimizer", f"step/{name}"))
                self._parts.set_steps(name, self._taken[name])

    def averaged(self) -> dict[str, Tensor]:
        return self._still | {name: self._whole(name, own) for name, own in self._ema.shadow.items()}

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """Sum of the squares of all their numbers, in fp32."""
        some = [*gradients, torch.zeros(1, device=self._ranks.device)]  # a rank may have no gradient at all
        norms = torch._foreach_norm(some, 2, torch.float32)
        return torch.stack(norms).square().sum()

    def _gradients(self) -> list[Tensor]:
        return [self._parts.gradient(name) for name in self._trained]

    def _take(self, name: str, own: Tensor, whole: Tensor) -> None:
        own.copy_(self._parts.held(name, whole).reshape(own.shape))

    def _whole(self, name: str, own: Tensor) -> Tensor:
        """What the ranks together have of a parameter or of something like it, on every rank."""
        if not self._parts.divided(name):
            return own.view(self._parts.shapes[name])
        whole = torch.zeros(self._parts.shapes[name], device=own.device)
        if self._parts.counts(name):
            held = self._parts.held(name, whole)
            held.copy_(own.reshape(held.shape))
        return self._parts.sum_(whole)

    def _piece(self, name: str, own: Tensor) -> Piece:
        piece = share({name: self._whole(name, own)}, self._ranks.rank, self._ranks.world)[name]
        return Piece(piece.tensor.clone(), piece.start, piece.rows) if self._parts.divided(name) else piece  # a clone lets go of the rest


# ------------------------------------------------------------------------------------------------------------------
# Where a plugin keeps what belongs to a parameter
# ------------------------------------------------------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Parts:
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


class _ZeroParts(_Parts):
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


class _GeminiParts(_Parts):
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


class _TensorParts(_Parts):
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


def _parts(
    stage: StageConfig, optimizer: Any, weights: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], ranks: Ranks
) -> _Parts:
    match stage.parallel.plugin:
        case "torch_ddp":
            return _Parts(optimizer, weights, shapes, ranks)
        case "low_level_zero":
            return _ZeroParts(optimizer, weights, shapes, ranks)
        case "gemini":
            return _GeminiParts(optimizer, weights, shapes, ranks)
        case "hybrid_parallel":
            return _TensorParts(optimizer, weights, shapes, ranks)


# ------------------------------------------------------------------------------------------------------------------
# What a stage asks a plugin for
# ------------------------------------------------------------------------------------------------------------------


def _check(stage: StageConfig, ranks: Ranks) -> None:
    """Raises ConfigError, before anything is imported."""
    plugin, subject = stage.parallel.plugin, f"parallel.plugin {stage.parallel.plugin}"
    if find_spec("colossalai") is None:
        raise ConfigError("parallel.strategy colossalai: the package is not installed; run `uv sync --extra colossalai`, or use fsdp")
    if ranks.device.type == "cpu" and plugin not in ON_CPU:
        raise ConfigError(f"{subject} needs CUDA, this rank's device is a CPU; use torch_ddp, or strategy fsdp")
    if plugin == "gemini" and stage.dtype != "bf16":
        raise ConfigError(f"{subject} computes in bf16 alone, dtype is {stage.dtype}; use low_level_zero, or dtype bf16")
    if plugin == "gemini" and stage.accumulate > 1:
        raise ConfigError(
            f"{subject} keeps gradients where its weights are and cannot add up those of {stage.accumulate} parts of a step (accumulate); "
            f"use accumulate 1 with {stage.accumulate} times the ranks or the batch_size, or low_level_zero, or strategy fsdp"
        )
    if plugin == "hybrid_parallel":
        if ranks.world % TENSOR_RANKS:
            raise ConfigError(f"{subject} divides layers over {TENSOR_RANKS} ranks, {ranks.world} are no multiple; start an even number")
        if stage.model.heads % TENSOR_RANKS:
            raise ConfigError(f"{subject} divides heads over {TENSOR_RANKS} ranks, model.heads is {stage.model.heads}; use low_level_zero")
    if not dist.is_initialized():
        raise ConfigError("parallel.strategy colossalai: one process without a launcher; use ddp, or start it with torchrun")


def _is_bf16(stage: StageConfig) -> bool:
    """Whether the plugin turns the weights into bf16; torch_ddp leaves that to autocast."""
    return stage.parallel.plugin != "torch_ddp" and stage.dtype == "bf16"


def _plugin(stage: StageConfig) -> Any:
    """Without clipping and loss scaling of its own: both are the trainer's."""
    from colossalai.booster import plugin

    match stage.parallel.plugin:
        case "torch_ddp":
            return plugin.TorchDDPPlugin(broadcast_buffers=False)  # they are the same everywhere, and never change
        case "low_level_zero":
            return plugin.LowLevelZeroPlugin(stage=ZERO_STAGE, precision=stage.dtype, cast_inputs=False)
        case "gemini":
            # asynchronous reduction would pin a copy of every chunk in host memory
            chunk = {"min_chunk_size_m": GEMINI_CHUNK_M, "search_range_m": GEMINI_CHUNK_M, "hidden_dim": stage.model.width}
            return plugin.GeminiPlugin(precision="bf16", enable_async_reduce=False, **chunk)
        case "hybrid_parallel":
            return plugin.HybridParallelPlugin(
                tp_size=TENSOR_RANKS, pp_size=1, precision=stage.dtype, broadcast_buffers=False, custom_policy=_policy(stage.model.heads)
            )


def _policy(heads: int) -> Any:
    """How ColossalAI's Shardformer divides a block of STDiT."""
    from colossalai.shardformer.layer import FusedLinear1D_Col, Linear1D_Col, Linear1D_Row
    from colossalai.shardformer.policies.base_policy import ModulePolicyDescription, Policy, SubModuleReplacementDescription

    class STDiTPolicy(Policy):  # type: ignore[misc]
        def config_sanity_check(self) -> None: ...

        def preprocess(self) -> nn.Module:
            return self.model  # type: ignore[no-any-return]

        def postprocess(self) -> nn.Module:
            return self.model  # type: ignore[no-any-return]

        def module_policy(self) -> dict[str, Any]:
            block = self.model.blocks[0]
            layers = [SubModuleReplacementDescription(name, Linear1D_Row) for name in ROWS]
            for name, count in COLUMNS.items():
                if count == 1:
                    layers.append(SubModuleReplacementDescription(name, Linear1D_Col))
                else:
                    sizes = [block.get_submodule(name).out_features // count] * count
                    layers.append(SubModuleReplacementDescription(name, FusedLinear1D_Col, {"split_sizes": sizes}))
            own = {f"{name}_attention.heads": heads // TENSOR_RANKS for name in ("spatial", "temporal", "cross")}
            return {"STDiTBlock": ModulePolicyDescription(attribute_replacement=own, sub_module_replacement=layers)}

    return STDiTPolicy()


def _optimizer(stage: StageConfig, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with torch's fused kernel; Gemini takes none but ColossalAI's own, which on CUDA is compiled when it is first used."""
    config = stage.optimizer
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if stage.parallel.plugin != "gemini":
        return torch.optim.AdamW(weights, **settings, fused=True)
    from colossalai.nn.optimizer import HybridAdam

    optimizer: torch.optim.Optimizer = HybridAdam(weights, **settings)
    return optimizer


class _ExactTimes(nn.Module):
    """Takes diffusion times past a plugin that casts every input to bf16, where 901 is 900: as integers with their bits."""

    def __init__(self, boosted: nn.Module, model: STDiT) -> None:
        super().__init__()
        self.boosted = boosted
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].view(torch.float32), *inputs[2:]))

    def forward(self, x: Tensor, time: Tensor, captions: Tensor, mask: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        out: Tensor = self.boosted(x, time.float().view(torch.int32), captions, mask, drop)
        return out


def _casts_inputs(stage: StageConfig) -> bool:
    return _is_bf16(stage) and stage.parallel.plugin != "low_level_zero"
