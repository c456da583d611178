"""Strategy `ddp`: every rank holds all weights; gradients are added up while the backward pass still runs.

torch's DistributedDataParallel was not taken: it re-orders its buckets after the first step, so on three or more ranks a resumed run would
add the same gradients in another order than the unbroken one. The buckets here are the same in every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.checkpoint.reader import Reader, divide
from opensora.config import StageConfig
from opensora.distributed.ranks import PeerLost, Ranks
from opensora.distributed.strategy import Shards, not_finite
from opensora.model.stdit import STDiT
from opensora.optim import muon
from opensora.optim.ema import EMA

BUCKET_BYTES = 64 << 20
"""Gradients that travel together. On NVLink and 400 Gb/s links an all-reduce of this size runs at full bandwidth."""


class Replicated:
    """ddp: every rank has all weights. Gradients lie in one flat buffer, filled from the last layer to the first.

    The buffer is cut into buckets; each is added up over the ranks as soon as the backward pass has filled it. What is left at the end
    travels with the flags: a small model needs one all-reduce a step.
    """

    def __init__(self, model: STDiT, stage: StageConfig, ranks: Ranks) -> None:
        self.model, self._ranks = model, ranks
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        shapes = {name: weight.shape for name, weight in trained.items()}
        self.optimizer = muon.build(trained, stage.optimizer, muon.Division(ranks.rank, ranks.world, ranks.sum_, shapes))
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
            self._check_finite(number)

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
        self.optimizer.step(self._in_order, lr, not_finite(self._norm))
        self.ema.update(step)

    def writer(self, rank: int) -> int:
        return rank

    def shards(self) -> Shards:
        parts = {"model": self.model.state_dict(), "ema": self.averaged(), "optimizer": self.optimizer.state()}
        return {part: divide(tensors, self._ranks.rank, self._ranks.world) for part, tensors in parts.items()}

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
            self._check_finite(len(self._sent))
            self._send(len(self._sent))

    def _check_finite(self, number: int) -> None:
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


def _wait(handle: Any) -> None:
    try:
        handle.wait()
    except RuntimeError as error:
        raise PeerLost(str(error)) from error
