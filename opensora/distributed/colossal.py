"""Strategy `colossalai`: the step through ColossalAI's Booster, by one of four plugins.

Owns the step: it hands loss and gradients to a plugin, and takes norm, scale, moving average and checkpoints from what the plugin holds, as
every other strategy does. `opensora.distributed.colossal_plugins` says what a stage asks of a plugin, and
`opensora.distributed.colossal_parts` where a plugin keeps what belongs to a parameter. Refuses ColossalAI's own clipping, loss scaling,
data loader and checkpoint files (pickles; and Gemini's put the fp32 weights through bf16).

    plugin           a rank holds of weights   gradients      fp32 weights and moments   precision         was run
    torch_ddp        all                       all            all                        the stage's       on a CPU, as shipped
    low_level_zero   all                       1/ranks        1/ranks                    fp32 or bf16      on a CPU, with the tests' shim
    gemini           1/ranks                   1/ranks        1/ranks                    bf16 alone        on a CPU, with the tests' shim
    hybrid_parallel  1/2 of a block's layers   as weights     as weights                 fp32 or bf16      on a CPU, with the tests' shim

None of the four was run on a GPU. A resume is not bitwise: a plugin chooses the order in which gradients add up. A step waits for the
device once, because plugins read their norms.

ColossalAI 0.5.0 takes 15 s to import and is an extra of the project: nothing of it is imported before a stage asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.checkpoint.reader import Reader, TensorShard, divide
from opensora.config import StageConfig
from opensora.distributed.colossal_parts import MOMENTS, parts_of
from opensora.distributed.colossal_plugins import build_optimizer, build_plugin, casts_inputs, check, is_bf16
from opensora.distributed.ranks import Ranks
from opensora.distributed.strategy import Shards
from opensora.model.stdit import STDiT
from opensora.optim.ema import EMA


class Colossal:
    """A model and its optimizer, held by a Booster plugin. `opensora.distributed.strategy.Strategy` says what the methods do.

    Args:
        model: the weights that the stage starts from, in fp32, on the rank's device. It is rebuilt in place: call `self.model`.

    Raises:
        ConfigError: ColossalAI is not installed, or the plugin cannot do what the stage asks for.
    """

    def __init__(self, model: STDiT, stage: StageConfig, ranks: Ranks) -> None:
        plugin = stage.parallel.plugin
        check(stage, ranks)
        from colossalai.booster import Booster

        self._ranks = ranks
        weights = dict(model.named_parameters())
        self._trained = [name for name, weight in weights.items() if weight.requires_grad]
        shapes = {name: weight.shape for name, weight in weights.items()}
        # plugins cast or divide what is not trained as well, and make their fp32 weights of those that they have cast
        state, buffers = model.state_dict(), {name: tensor.clone() for name, tensor in model.named_buffers()}
        untrained = {name: tensor for name, tensor in state.items() if name not in self._trained}
        self._still = untrained if plugin == "torch_ddp" else {name: tensor.clone() for name, tensor in untrained.items()}
        exact = {name: state[name].clone() for name in self._trained} if is_bf16(stage) else {}

        self._booster = Booster(plugin=build_plugin(stage))
        optimizer = build_optimizer(stage, [weights[name] for name in self._trained])
        boosted, self._optimizer, *_ = self._booster.boost(model, optimizer)
        for name, tensor in buffers.items():
            model.get_buffer(name).data = tensor
        self.model: nn.Module = _ExactTimes(boosted, model) if casts_inputs(stage) else boosted
        self._parts = parts_of(stage, self._optimizer, {name: weights[name] for name in self._trained}, shapes, ranks)
        for name, tensor in exact.items():
            self._load_part(name, self._parts.weight(name), tensor)
        del exact

        self._own = {name: self._parts.weight(name) for name in self._trained}
        self._moments = {name: self._parts.moments(name) for name in self._trained}
        self._steps_taken = dict.fromkeys(self._trained, 0)
        self._ema = EMA(self._own, stage.ema_decay)
        self._norm = torch.zeros((), device=ranks.device)

    def backward(self, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        """Leave gradients that are averaged over the data-parallel ranks already. This holds for each part of a step: what is added to an
        average and averaged again is the average of the sum."""
        self._booster.backward(loss, self._optimizer)

    def finite(self) -> Tensor:
        """True: a number that is not finite on one rank is on every rank by now. The loss says which rank is to blame, the norm ends it."""
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
            self._steps_taken = {name: taken + 1 for name, taken in self._steps_taken.items()}
            self._ema.update(step)
        self._optimizer.zero_grad()

    def writer(self, rank: int) -> int:
        return rank

    def shards(self) -> Shards:
        steps = {f"step/{name}": torch.tensor(float(taken)) for name, taken in self._steps_taken.items()}
        moments = {f"{key}/{name}": own[index] for index, key in enumerate(MOMENTS) for name, own in self._moments.items()}
        still = divide(self._still, self._ranks.rank, self._ranks.world)
        return {
            "model": {name: self._shard_of(name, own) for name, own in self._own.items()} | still,
            "ema": {name: self._shard_of(name, own) for name, own in self._ema.shadow.items()} | still,
            "optimizer": {key: self._shard_of(key.partition("/")[2], own) for key, own in moments.items()}
            | divide(steps, self._ranks.rank, self._ranks.world),
        }

    @torch.no_grad()
    def load(self, reader: Reader, *, ema: bool, optimizer: bool) -> None:
        for name in self._trained if ema else ():
            self._load_part(name, self._ema.shadow[name], reader.tensor("ema", name))
        saved = reader.names("optimizer") if optimizer else {}
        for name in self._trained:
            if f"step/{name}" in saved:
                for key, own in zip(MOMENTS, self._moments[name], strict=True):
                    self._load_part(name, own, reader.tensor("optimizer", f"{key}/{name}"))
                self._steps_taken[name] = int(reader.tensor("optimizer", f"step/{name}"))
                self._parts.set_steps(name, self._steps_taken[name])

    def averaged(self) -> dict[str, Tensor]:
        return self._still | {name: self._whole(name, own) for name, own in self._ema.shadow.items()}

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """Sum of the squares of all their numbers, in fp32."""
        some = [*gradients, torch.zeros(1, device=self._ranks.device)]  # a rank may have no gradient at all
        norms = torch._foreach_norm(some, 2, torch.float32)
        return torch.stack(norms).square().sum()

    def _gradients(self) -> list[Tensor]:
        return [self._parts.gradient(name) for name in self._trained]

    def _load_part(self, name: str, own: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of a whole tensor."""
        own.copy_(self._parts.held(name, whole).reshape(own.shape))

    def _whole(self, name: str, own: Tensor) -> Tensor:
        """The whole of a parameter, or of its moment or average, on every rank; `own` is what this rank holds of it."""
        if not self._parts.divided(name):
            return own.view(self._parts.shapes[name])
        whole = torch.zeros(self._parts.shapes[name], device=own.device)
        if self._parts.counts(name):
            held = self._parts.held(name, whole)
            held.copy_(own.reshape(held.shape))
        return self._parts.sum_(whole)

    def _shard_of(self, name: str, own: Tensor) -> TensorShard:
        shard = divide({name: self._whole(name, own)}, self._ranks.rank, self._ranks.world)[name]
        if not self._parts.divided(name):
            return shard
        return TensorShard(shard.tensor.clone(), shard.start, shard.rows)  # a view would keep the whole tensor alive


class _ExactTimes(nn.Module):
    """Takes diffusion times past a plugin that casts every input to bf16, where 901 is 900: as integers with their bits."""

    def __init__(self, boosted: nn.Module, model: STDiT) -> None:
        super().__init__()
        self.boosted = boosted
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].view(torch.float32), *inputs[2:]))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        captions: Tensor,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.boosted(x, time.float().view(torch.int32), captions, mask, drop, given)
        return out
