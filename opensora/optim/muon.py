"""Muon for the matrices of the blocks, AdamW for all else.

A matrix moves by its averaged gradient with all singular values set to about one (Jordan et al. 2024, "Muon: an optimizer for hidden
layers in neural networks"; Newton-Schulz iteration in bf16). The update is scaled to the size of AdamW's, so that both share a learning
rate and a weight decay (Liu et al., arXiv:2502.16982 §2.2). Queries, keys and values lie in one weight and are matrices of their own.

Owns the momentum, and how ranks divide the iterations: each takes some matrices, and they exchange the results once a step, as a sum in
which every number comes from one rank. The weights are therefore those of one rank, bit for bit, if the gradients are. What a matrix needs
from other ranks is sent in bf16, in which the iteration begins anyway.

The iteration is torch's own, the rest of torch.optim.Muon is written again: it wants whole matrices on every rank, and building one imports
torch's compiler (see `opensora.optim.adamw`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from opensora.config import OptimizerConfig
from opensora.optim.adamw import AdamW

PARTS = {"qkv": 3, "key_value": 2}
"""Layers whose weight holds several matrices, one below the other."""
MOST = 32 << 20
"""Numbers of the matrices that travel together."""


def is_matrix(name: str) -> bool:
    """Whether Muon moves this weight: those of the blocks' linear layers. Embedders and the last layer are AdamW's (Jordan et al.)."""
    return name.startswith("blocks.") and name.endswith(".weight")


@dataclass(frozen=True)
class Division:
    """How the ranks divide the work, and which part of each weight this rank holds."""

    rank: int
    world: int
    sum_: Callable[[Tensor], Tensor]
    """Adds a tensor up over all ranks, in place."""
    shapes: Mapping[str, torch.Size]
    """Of the whole weights."""
    rows: Callable[[str], slice] | None = None
    """Rows of a whole weight that this rank holds. None: it holds all."""
    speaks: bool = True
    """Whether this rank is the one of those with the same rows that sends them."""


class Muon:
    """Updates `weights` in place, as `AdamW` does, with the same methods."""

    def __init__(self, weights: Mapping[str, Tensor], config: OptimizerConfig, division: Division) -> None:
        self.config, self._division = config, division
        self._names = tuple(weights)
        self._matrices = {name: weight.detach() for name, weight in weights.items() if is_matrix(name)}
        self._adamw = AdamW({name: weight for name, weight in weights.items() if name not in self._matrices}, config)
        self._momentum = {name: torch.zeros_like(weight) for name, weight in self._matrices.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float, found_inf: Tensor | None = None) -> None:
        """Make one update with this learning rate and a gradient for each weight. Changes nothing if `found_inf` (one fp32) is not 0."""
        by_name = dict(zip(self._names, gradients, strict=True))
        self._adamw.step([by_name[name] for name in self._names if name not in self._matrices], lr, found_inf)
        sound = None if found_inf is None else found_inf == 0
        for names in self._groups():
            updates = {}
            for name in names:
                gradient, momentum = by_name[name], self._momentum[name]
                new = momentum.lerp(gradient, 1 - self.config.momentum)
                momentum.copy_(new if sound is None else torch.where(sound, new, momentum))
                updates[name] = gradient.lerp(momentum, self.config.momentum)  # Nesterov's
            for name, update in self._orthogonal(updates):
                weight = self._matrices[name]
                moved = weight * (1 - lr * self.config.weight_decay) - lr * update
                weight.copy_(moved if sound is None else torch.where(sound, moved, weight))

    def state(self) -> dict[str, Tensor]:
        """AdamW's, and `momentum/<parameter>` of the matrices. Shares their memory."""
        return self._adamw.state() | {f"momentum/{name}": value for name, value in self._momentum.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the state of the same parameters, or of some of them; the others start at zero."""
        self._adamw.load(state)
        for name, value in self._momentum.items():
            if f"momentum/{name}" in state:
                value.copy_(state[f"momentum/{name}"])

    def _groups(self) -> Iterator[list[str]]:
        """Matrices that travel together, the same on every rank. One rank alone takes them one by one, which needs least memory."""
        some: list[str] = []
        count = 0
        for name in self._matrices:
            some.append(name)
            count += self._division.shapes[name].numel()
            if count >= MOST or self._division.world == 1:
                yield some
                some, count = [], 0
        if some:
            yield some

    def _orthogonal(self, updates: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """This rank's rows of the orthogonalised and scaled whole of each."""
        division = self._division
        shapes = [division.shapes[name] for name in updates]
        whole = dict(zip(updates, self._whole(updates, shapes), strict=True))
        flat = _room(shapes, updates)
        made = dict(zip(updates, _split(flat, shapes), strict=True))
        jobs = [(name, part) for name in updates for part in range(PARTS.get(name.split(".")[-2], 1))]
        for number, (name, part) in enumerate(jobs):
            if number % division.world == division.rank:
                count = PARTS.get(name.split(".")[-2], 1)
                made[name].chunk(count)[part].copy_(orthogonalised(whole[name].chunk(count)[part]))
        division.sum_(flat)
        for name, one in made.items():
            own = one if division.rows is None else one[division.rows(name)]
            rows, columns = one.shape
            yield name, own.to(updates[name].dtype) * scale(rows // PARTS.get(name.split(".")[-2], 1), columns)

    def _whole(self, updates: Mapping[str, Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """The whole of each, on every rank."""
        division = self._division
        if division.rows is None:
            return list(updates.values())
        flat = _room(shapes, updates)
        parts = _split(flat, shapes)
        if division.speaks:
            for (name, update), part in zip(updates.items(), parts, strict=True):
                part[division.rows(name)] = update.to(torch.bfloat16)
        division.sum_(flat)
        return parts


def orthogonalised(matrix: Tensor) -> Tensor:
    """(m, n) with singular values of about one and the same singular vectors, in bf16."""
    return _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)


def scale(rows: int, columns: int) -> float:
    """What an orthogonal update is multiplied with, to be as large as AdamW's usually is: arXiv:2502.16982 §2.2."""
    return 0.2 * math.sqrt(max(rows, columns))


def _room(shapes: Sequence[torch.Size], like: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(like.values())).device
    return torch.zeros(sum(shape.numel() for shape in shapes), dtype=torch.bfloat16, device=device)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(torch.split(flat, [shape.numel() for shape in shapes]), shapes, strict=True)]


def build(weights: Mapping[str, Tensor], config: OptimizerConfig, division: Division) -> AdamW | Muon:
    """The optimizer that a stage asks for."""
    return Muon(weights, config, division) if config.matrices == "muon" else AdamW(weights, config)
