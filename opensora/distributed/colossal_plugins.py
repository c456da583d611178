"""What a stage asks of ColossalAI: which plugin, which optimizer, which precision, and how a block of STDiT is divided over ranks.

Owns the limits of each plugin and the refusal of a stage that is beyond them. Imports colossalai only inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opensora.config import StageConfig
from opensora.distributed.ranks import Ranks
from opensora.errors import ConfigError

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


def check(stage: StageConfig, ranks: Ranks) -> None:
    """Raises ConfigError, before anything is imported."""
    plugin, subject = stage.parallel.plugin, f"parallel.plugin {stage.parallel.plugin}"
    if find_spec("colossalai") is None:
        raise ConfigError("parallel.strategy colossalai: the package is not installed; run `scripts/setup --with colossalai`, or use fsdp")
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


def is_bf16(stage: StageConfig) -> bool:
    """Whether the plugin turns the weights into bf16; torch_ddp leaves that to autocast."""
    return stage.parallel.plugin != "torch_ddp" and stage.dtype == "bf16"


def build_plugin(stage: StageConfig) -> Any:
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


def build_optimizer(stage: StageConfig, weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with torch's fused kernel; Gemini takes none but ColossalAI's own, which on CUDA is compiled when it is first used."""
    config = stage.optimizer
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if stage.parallel.plugin != "gemini":
        return torch.optim.AdamW(weights, **settings, fused=True)
    from colossalai.nn.optimizer import HybridAdam

    optimizer: torch.optim.Optimizer = HybridAdam(weights, **settings)
    return optimizer


def casts_inputs(stage: StageConfig) -> bool:
    return is_bf16(stage) and stage.parallel.plugin != "low_level_zero"
