"""Strategy `fsdp`: weights, gradients, optimizer and moving average are divided over the ranks (torch's FSDP2), fp32 masters; with `shard`,
copies of a divided model (HSDP).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.checkpoint.reader import Reader, TensorShard, divide
from opensora.config import StageConfig
from opensora.distributed.ranks import Ranks
from opensora.distributed.strategy import Shards, not_finite
from opensora.errors import ConfigError
from opensora.model.stdit import STDiT
from opensora.optim import muon
from opensora.optim.ema import EMA


class Sharded:
    """fsdp: each rank keeps its rows of every weight, in fp32, and of all that belongs to it; a block's weights are whole while it works.

    On CUDA with dtype bf16 the whole weights are bf16 and the masters stay fp32; gradients are added up in fp32.
    """

    def __init__(self, model: STDiT, stage: StageConfig, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # a second to import, that ddp does not pay
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        shards = stage.parallel.shard or ranks.world
        if ranks.world % shards:
            raise ConfigError(f"parallel.shard {shards} does not divide {ranks.world} ranks; use a divisor, or another number of devices")
        if not dist.is_initialized():
            raise ConfigError("parallel.strategy fsdp: one process without a launcher; use ddp, or start it with torchrun")
        self._ranks, self._copies = ranks, ranks.world // shards
        self._copy, self._shard = divmod(ranks.rank, shards)
        if self._copies > 1:
            mesh = init_device_mesh(ranks.device.type, (self._copies, shards), mesh_dim_names=("copies", "shards"))
        else:
            mesh = init_device_mesh(ranks.device.type, (shards,), mesh_dim_names=("shards",))
        half = ranks.device.type == "cuda" and stage.dtype == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # bf16 would make time 900 of time 901
        )
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(cast(nn.Module, model), mesh=mesh, mp_policy=policy)
        self.model = model
        self._weights = dict(model.named_parameters())
        own = {name: _own(weight) for name, weight in self._weights.items()}
        self._trained = [name for name, weight in self._weights.items() if weight.requires_grad]
        shapes = {name: self._weights[name].shape for name in self._trained}
        division = muon.Division(ranks.rank, ranks.world, ranks.sum_, shapes, self._rows, speaks=self._copy == 0)
        self.optimizer = muon.build({name: own[name] for name in self._trained}, stage.optimizer, division)
        self.ema = EMA(own, stage.ema_decay)
        self._norm = torch.zeros((), device=ranks.device)

    def backward(self, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        """The gradients of each part are divided over the ranks at once: to add them up first would need room for all of them. Between
        copies of a divided model they travel once a step."""
        for name in self._trained if first else ():
            self._weights[name].grad = None
        if self._copies > 1:
            cast(Any, self.model).set_requires_all_reduce(last)
        loss.backward()  # type: ignore[no-untyped-call]

    def finite(self) -> Tensor:
        return torch.ones(
            (), dtype=torch.bool, device=self._ranks.device
        )  # its gradients are everybody's: blame is the loss's, the end the norm's

    def reduce(self, flags: Tensor) -> Tensor:
        squares = torch.stack(torch._foreach_norm(self._gradients())).square().sum() / self._copies
        together = self._ranks.sum_(torch.cat([flags, squares[None]]))
        self._norm = together[-1].sqrt()
        return together[:-1]

    def norm(self) -> Tensor:
        return self._norm

    def step(self, lr: float, scale: Tensor, step: int) -> None:
        gradients = self._gradients()
        torch._foreach_mul_(gradients, scale)
        self.optimizer.step(gradients, lr, not_finite(self._norm))
        self.ema.update(step)

    def writer(self, rank: int) -> int:
        copy, shard = divmod(rank, self._ranks.world // self._copies)
        return shard * self._copies + copy  # shards in their order, and within each its copies, which divide its rows

    def shards(self) -> Shards:
        me = self.writer(self._ranks.rank)
        own = {name: _own(weight) for name, weight in self._weights.items()}
        moments = self.optimizer.state()
        counts = {key: value for key, value in moments.items() if not value.ndim}  # steps taken: equal on every rank
        buffers = divide(self._buffers(), me, self._ranks.world)
        optimizer = {key: self._shard_of(key.partition("/")[2], value) for key, value in moments.items() if value.ndim}
        return {
            "model": {name: self._shard_of(name, weight) for name, weight in own.items()} | buffers,
            "ema": {name: self._shard_of(name, weight) for name, weight in self.ema.shadow.items()} | buffers,
            "optimizer": optimizer | divide(counts, me, self._ranks.world),
        }

    def load(self, reader: Reader, *, ema: bool, optimizer: bool) -> None:
        if ema:
            self.ema.load({name: reader.tensor("ema", name, self._rows(name)) for name in self.ema.shadow})
        if optimizer:
            saved = reader.names("optimizer")
            names = [name for name in self.optimizer.state() if name in saved]
            rows = {name: self._rows(name.partition("/")[2]) if saved[name] else None for name in names}
            self.optimizer.load({name: reader.tensor("optimizer", name, rows[name]) for name in names})

    def averaged(self) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        whole = dict(self._buffers())
        for name, weight in self._weights.items():
            like = cast(DTensor, weight)
            part = DTensor.from_local(
                self.ema.shadow[name], like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
            )
            whole[name] = part.full_tensor()
        return {name: whole[name] for name in self.model.state_dict()}

    def _gradients(self) -> list[Tensor]:
        return [_own(cast(Tensor, self._weights[name].grad)) for name in self._trained]

    def _buffers(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self._weights}

    def _rows(self, name: str) -> slice:
        """Rows of the whole weight that this rank holds."""
        rows = len(self._weights[name])
        share = math.ceil(rows / (self._ranks.world // self._copies))
        start = min(self._shard * share, rows)
        return slice(start, min(start + share, rows))

    def _shard_of(self, name: str, own: Tensor) -> TensorShard:
        """Of this rank's rows those that it writes: copies of a shard divide them."""
        rows = len(self._weights[name])
        if self._copies == 1:
            return TensorShard(own, self._rows(name).start, rows)
        part = divide({name: own}, self._copy, self._copies)[name]
        return TensorShard(part.tensor, self._rows(name).start + part.start, rows)


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows of a divided tensor, sharing its memory."""
    local: Tensor = cast(Any, tensor.detach()).to_local()
    return local
