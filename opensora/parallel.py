"""How the ranks of a job divide a training step: one small interface, and the strategies behind it.

    ddp         every rank holds all weights; gradients are added up while the backward pass still runs
    fsdp        weights, gradients, optimizer and moving average are divided over the ranks (torch's FSDP2), fp32 masters; with
                `shard`, copies of a divided model (HSDP)
    colossalai  ColossalAI's Booster (`opensora.colossal`)

and, under ddp and fsdp, `sequence` ranks that share each clip (`opensora.sequence`).

Owns the gradients: from a loss to an update, and what of the state each rank writes into a checkpoint. Refuses to know what a loss is.
Everything from `backward` to `step` stays on the device: nothing here waits for it.

torch's DistributedDataParallel was not taken: it re-orders its buckets after the first step, so on three or more ranks a resumed run would
add the same gradients in another order than the unbroken one. The buckets here are the same in every step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.checkpoint import Piece, Reader, share
from opensora.config import StageConfig
from opensora.ema import EMA
from opensora.errors import ConfigError
from opensora.model import STDiT
from opensora.optimizer import AdamW
from opensora.ranks import PeerLost, Ranks
from opensora.sequence import Sequence

BUCKET_BYTES = 64 << 20
"""Gradients that travel together. On NVLink and 400 Gb/s links an all-reduce of this size runs at full bandwidth."""

Pieces = dict[str, dict[str, Piece]]
"""By part of a checkpoint (model, ema, optimizer) and tensor."""


class Strategy(Protocol):
    """What a training step needs of its ranks. Every method is called by all of them."""

    @property
    def model(self) -> nn.Module:
        """What a step calls."""

    def backward(self, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        """Gradients of this rank's loss, added to those of the parts of this step before it.

        Args:
            first: of the step's parts: the gradients of the step before are gone.
            last: of the step's parts: gradients may travel between the ranks. `finite` and `reduce` come after it.
        """

    def finite(self) -> Tensor:
        """0-dim bool on the device: whether the gradients that this rank can see are finite."""

    def reduce(self, flags: Tensor) -> Tensor:
        """Average the gradients over the ranks. `flags`, fp32 (n,), comes back summed over all of them. Raises PeerLost."""

    def norm(self) -> Tensor:
        """0-dim fp32 on the device: of the whole averaged gradient. After `reduce`."""

    def step(self, lr: float, scale: Tensor, step: int) -> None:
        """Update weights with `scale` times the gradients, then their moving average. Where the norm is not finite, do not move weights."""

    def writer(self, rank: int) -> int:
        """A rank's number among those who write a checkpoint: in the order of the rows that they write."""

    def pieces(self) -> Pieces:
        """What this rank writes of a checkpoint; the ranks together write each row of each tensor once."""

    def load(self, reader: Reader, *, ema: bool, optimizer: bool) -> None:
        """Take moving average and moments from a checkpoint, made by any strategy on any number of ranks."""

    def averaged(self) -> dict[str, Tensor]:
        """The moving average as a whole state dict, on every rank."""


def build(model: STDiT, stage: StageConfig, ranks: Ranks) -> Strategy:
    """The stage's strategy around a model that has its weights already and lies on the rank's device.

    Raises:
        ConfigError: the ranks cannot be divided as asked.
    """
    parallel = stage.parallel
    if parallel.sequence > 1:
        model.sequence = share_clips(ranks, parallel.sequence)
    if parallel.strategy == "colossalai":
        from opensora.colossal import Colossal  # colossalai takes 15 s to import

        return Colossal(model, stage, ranks)
    if parallel.strategy == "fsdp":
        return Sharded(model, stage, ranks)
    return Replicated(model, stage, ranks)


def data_ranks(ranks: Ranks, sharing: int) -> tuple[int, int]:
    """This rank's number among those with clips of their own, and how many such there are: so many neighbours share theirs.

    Raises:
        ConfigError: the ranks do not divide.
    """
    if ranks.world % sharing:
        raise ConfigError(f"parallel: {sharing} ranks share a clip, which does not divide {ranks.world} ranks; use other numbers")
    return ranks.rank // sharing, ranks.world // sharing


def share_clips(ranks: Ranks, count: int) -> Sequence:
    """The group of neighbouring ranks that share this rank's clips. Raises ConfigError."""
    data_ranks(ranks, count)
    groups = [dist.new_group(list(range(first, first + count))) for first in range(0, ranks.world, count)]  # every rank makes all of them
    return Sequence(cast(dist.ProcessGroup, groups[ranks.rank // count]), ranks.rank % count, count)


class Replicated:
    """ddp: every rank has all weights. Gradients lie in one flat buffer, filled from the last layer to the first.

    The buffer is cut into buckets; each is added up over the ranks as soon as the backward pass has filled it. What is left at the end
    travels with the flags: a small model needs one all-reduce a step.
    """

    def __init__(self, model: STDiT, stage: StageConfig, ranks: Ranks) -> None:
        self.model, self._ranks = model, ranks
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.optimizer = AdamW(trained, stage.optimizer)
        self.ema = EMA(dict(model.named_parameters()), stage.ema_decay)
        backwards = list(reversed(trained.values()))
        self._gradients = torch.zeros(sum(weight.numel() for weight in backwards), device=ranks.device)
        for weight, part in zip(backwards, torch.split(self._gradients, [weight.numel() for weight in backwards]), strict=True):
            weight.grad = part.view_as(weight)
        self._in_order = [cast(Tensor, weight.grad) for weight in trained.values()]
        self._buckets = _cut(backwards, self._gradients)
        self._waiting: list[set[int]] = []
        self._sent: list[Any] = []
        self._sound: list[Tensor] = []
        self._norm = torch.zeros((), device=ranks.device)
        self._travels = True
        if ranks.world > 1 and len(self._buckets) > 1:
            for number, (weights, _) in enumerate(self._buckets[:-1]):
                for weight in weights:
                    weight.register_post_accumulate_grad_hook(partial(self._filled, number))  # type: ignore[no-untyped-call]

    def backward(self, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        if first:
            self._gradients.zero_()
        self._waiting = [{id(weight) for weight in weights} for weights, _ in self._buckets]
        self._sent, self._sound, self._travels = [], [], last
        loss.backward()  # type: ignore[no-untyped-call]
        if not last:
            return
        for number in range(len(self._sent), len(self._buckets)):  # those whose weights took no part in this loss, and the last
            self._look(number)

    def finite(self) -> Tensor:
        return torch.stack(self._sound).sum().isfinite()

    def reduce(self, flags: Tensor) -> Tensor:
        if self._ranks.world == 1:
            self._norm = self._gradients.norm()
            return flags
        for number in range(len(self._sent), len(self._buckets) - 1):
            self._send(number)
        last = self._buckets[-1][1]
        together = self._ranks.sum_(
            torch.cat([last, flags])
        )  # flags are a few numbers: a copy of one bucket is cheaper than a second exchange
        last.copy_(together[: len(last)])
        for handle in self._sent:
            _wait(handle)
        self._gradients /= self._ranks.world
        self._norm = self._gradients.norm()
        return together[len(last) :]

    def norm(self) -> Tensor:
        return self._norm

    def step(self, lr: float, scale: Tensor, step: int) -> None:
        self._gradients *= scale
        self.optimizer.step(self._in_order, lr, _not_finite(self._norm))
        self.ema.update(step)

    def writer(self, rank: int) -> int:
        return rank

    def pieces(self) -> Pieces:
        parts = {"model": self.model.state_dict(), "ema": self.averaged(), "optimizer": self.optimizer.state()}
        return {part: share(tensors, self._ranks.rank, self._ranks.world) for part, tensors in parts.items()}

    def load(self, reader: Reader, *, ema: bool, optimizer: bool) -> None:
        if ema:
            self.ema.load({name: reader.tensor("ema", name) for name in self.ema.shadow})
        if optimizer:
            saved = reader.names("optimizer")
            self.optimizer.load({name: reader.tensor("optimizer", name) for name in self.optimizer.state() if name in saved})

    def averaged(self) -> dict[str, Tensor]:
        return self.model.state_dict() | self.ema.shadow

    def _filled(self, number: int, weight: Tensor) -> None:
        """Called by the backward pass when a weight's gradient is there. Buckets leave in their order, on every rank the same; of a step in
        several parts, in the last one."""
        if not self._travels:
            return
        self._waiting[number].discard(id(weight))
        while len(self._sent) < len(self._buckets) - 1 and not self._waiting[len(self._sent)]:
            self._look(len(self._sent))
            self._send(len(self._sent))

    def _look(self, number: int) -> None:
        self._sound.append(self._buckets[number][1].sum())  # finite only if all of them are; before it becomes everybody's

    def _send(self, number: int) -> None:
        try:
            self._sent.append(dist.all_reduce(self._buckets[number][1], async_op=True))
        except RuntimeError as error:
            raise PeerLost(str(error)) from error


def _cut(backwards: list[nn.Parameter], gradients: Tensor) -> list[tuple[list[nn.Parameter], Tensor]]:
    """The flat gradients cut at weights, each piece at least BUCKET_BYTES, the last one what is left."""
    buckets: list[tuple[list[nn.Parameter], Tensor]] = []
    weights: list[nn.Parameter] = []
    start = end = 0
    for weight in backwards:
        weights.append(weight)
        end += weight.numel()
        if (end - start) * gradients.element_size() >= BUCKET_BYTES:
            buckets.append((weights, gradients[start:end]))
            weights, start = [], end
    return [*buckets, (weights, gradients[start:end])]


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
        self.optimizer = AdamW({name: own[name] for name in self._trained}, stage.optimizer)
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
        self.optimizer.step(gradients, lr, _not_finite(self._norm))
        self.ema.update(step)

    def writer(self, rank: int) -> int:
        copy, shard = divmod(rank, self._ranks.world // self._copies)
        return shard * self._copies + copy  # shards in their order, and within each its copies, which divide its rows

    def pieces(self) -> Pieces:
        me = self.writer(self._ranks.rank)
        own = {name: _own(weight) for name, weight in self._weights.items()}
        moments = self.optimizer.state()
        counts = {key: value for key, value in moments.items() if not value.ndim}  # steps taken: equal on every rank
        buffers = share(self._buffers(), me, self._ranks.world)
        optimizer = {key: self._piece(key.partition("/")[2], value) for key, value in moments.items() if value.ndim}
        return {
            "model": {name: self._piece(name, weight) for name, weight in own.items()} | buffers,
            "ema": {name: self._piece(name, weight) for name, weight in self.ema.shadow.items()} | buffers,
            "optimizer": optimizer | share(counts, me, self._ranks.world),
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

    def _piece(self, name: str, own: Tensor) -> Piece:
        """Of this rank's rows those that it writes: copies of a shard divide them."""
        rows = len(self._weights[name])
        if self._copies == 1:
            return Piece(own, self._rows(name).start, rows)
        part = share({name: own}, self._copy, self._copies)[name]
        return Piece(part.tensor, self._rows(name).start + part.start, rows)


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows of a divided tensor, sharing its memory."""
    local: Tensor = cast(Any, tensor.detach()).to_local()
    return local


def _not_finite(norm: Tensor) -> Tensor:
    return (~norm.isfinite()).float().reshape(1)


def _wait(handle: Any) -> None:
    try:
        handle.wait()
    except RuntimeError as error:
        raise PeerLost(str(error)) from error
