"""Before a run: FLOPs, hours and dollars of every stage, with a range, beside the published run. Pure.

Refuses to read a store or a clock. Counts only the arithmetic of training, evaluating and sampling. Start-up, encoding (once, cached),
checkpoints, waiting and retries come on top; the bill (`cost`) has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from decimal import Decimal

from opensora.config import Activations, StageConfig
from opensora.planning import memory
from opensora.planning.calibration import Calibration
from opensora.planning.flops import BACKWARD, stage_flops, train_flops_per_clip
from opensora.planning.sized_model import DeviceKind
from orchestrator.accounting.speed import Basis, check_mfu, speed_of
from orchestrator.errors import Refused, UsageError
from orchestrator.recipe.pipeline import Pipeline, Published, Stage
from orchestrator.recipe.prices import Device, Prices, cost

NO_MONEY = Decimal(0)


@dataclass(frozen=True)
class Estimate:
    """What one stage, or all of them, needs at one speed."""

    device_hours: float
    gpu_hours: float
    """0 on a CPU."""
    wall_h: float
    usd: Decimal

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.device_hours + other.device_hours, self.gpu_hours + other.gpu_hours, self.wall_h + other.wall_h, self.usd + other.usd
        )


NOTHING = Estimate(0.0, 0.0, 0.0, Decimal(0))


@dataclass(frozen=True)
class Fit:
    """What a stage needs of each device's memory, under the policy that it names or that was chosen for it."""

    activations: Activations
    memory: memory.Memory
    device_bytes: int | None
    """The device's memory. None means that the price list does not have it."""
    reason: str
    """Why this policy was chosen."""

    @property
    def fits(self) -> bool | None:
        """Whether the stage fits. None means that the device's memory is not known."""
        return None if self.device_bytes is None else self.memory.total <= self.device_bytes * (1 - memory.RESERVE)


@dataclass(frozen=True)
class Row:
    """What is still to be paid for one stage."""

    stage: str
    parent: str | None
    device: str
    devices: int
    steps: int
    flops: float
    """FLOPs of training, evaluating and sampling of the whole stage, even if it is committed."""
    basis: Basis
    """Where the speed comes from."""
    mfu: float | None
    """Useful FLOPs over the devices' peak. None means nothing is computed."""
    expected: Estimate
    low: Estimate
    """The optimistic estimate."""
    high: Estimate
    """The pessimistic estimate."""
    at_most: Estimate
    """What is expected in the pool where its attempt lives; where none lives, in the most expensive pool that it may come into."""
    published: Published | None
    source: str
    """Where the speed comes from, in words."""
    fit: Fit | None
    """None means nothing is computed."""
    offers: tuple[tuple[str, Decimal], ...] = ()
    """(pool, dollars of a device and hour), the preferred one first. What is expected is of the first; `low` and `high` are over all.
    Empty means that its cluster has no pools."""

    @property
    def ratio(self) -> float | None:
        """Planned over published GPU-hours. None means nothing is published, or nothing is left to do."""
        reference = self.published.gpu_hours if self.published else 0.0
        return self.expected.gpu_hours / reference if reference and self.expected.gpu_hours else None


@dataclass(frozen=True)
class Plan:
    """What is still to be paid for a pipeline."""

    rows: tuple[Row, ...]
    expected: Estimate
    """All stages, one after another."""
    low: Estimate
    high: Estimate
    at_most: Estimate
    """What is expected at the prices of `Row.at_most`, for the budget: an attempt may come into any of its pools."""

    @property
    def published_gpu_hours(self) -> float:
        return sum(row.published.gpu_hours for row in self.rows if row.published)

    @property
    def published_usd(self) -> Decimal:
        return sum((Decimal(str(row.published.usd)) for row in self.rows if row.published), Decimal(0))

    @property
    def ratio(self) -> float | None:
        """Planned over published GPU-hours. None means that nothing is published, or that a stage is committed, so the work differs."""
        reference = self.published_gpu_hours
        partial = any(row.basis == "committed" for row in self.rows)
        return self.expected.gpu_hours / reference if reference and not partial else None


def plan(
    pipeline: Pipeline,
    prices: Prices,
    *,
    mfu: float | Mapping[str, float] | None = None,
    measured: Mapping[str, float] | None = None,
    calibrations: Sequence[Calibration] = (),
    committed: Set[str] = frozenset(),
    pools: Mapping[str, str] | None = None,
) -> Plan:
    """Plan what is left of a pipeline.

    Args:
        mfu: useful FLOPs over peak, in (0, 1], for all stages or by stage. It is used before `measured`.
        measured: wall seconds of a training step by stage, with waiting. It is used before `calibrations`.
        calibrations: steps that were timed on some machine. The nearest point is used before the price list's assumption.
        committed: names of the stages that have a result already. They cost nothing more.
        pools: by stage, the pool in which an attempt lives.

    Raises:
        UsageError: a device is not in the price list, an MFU is not in (0, 1], or the devices do not divide.
    """
    rows = tuple(
        _over_pools(
            [
                _row(stage, offer, _of_stage(mfu, stage.name), (measured or {}).get(stage.name), calibrations, stage.name in committed)
                for offer in _offers(pipeline, stage, prices)
            ],
            (pools or {}).get(stage.name),
        )
        for stage in pipeline.stages
    )
    return Plan(
        rows,
        sum((row.expected for row in rows), NOTHING),
        sum((row.low for row in rows), NOTHING),
        sum((row.high for row in rows), NOTHING),
        sum((row.at_most for row in rows), NOTHING),
    )


def check_budget(plan: Plan, budget_usd: float | None, spent: Decimal = NO_MONEY) -> None:
    """Raise Refused if the dollars spent and the dollars expected are together above the budget. Equal is allowed.

    What is expected is at the price of the pool in which an attempt lives, else of the most expensive one that it may come into.

    Args:
        budget_usd: the budget. None means there is none.
        spent: dollars that were spent. A plan that costs nothing more is never refused, whatever was spent.
    """
    if budget_usd is not None and plan.at_most.usd and spent + plan.at_most.usd > Decimal(str(budget_usd)):
        where = " in the most expensive pools that it may come into" if plan.at_most != plan.expected else ""
        costs = f"the plan costs ${plan.at_most.usd:,.2f}{where}"
        raise Refused(
            f"budget_usd: {f'${spent:,.2f} are spent (osctl cost), and what is left of ' if spent else ''}{costs}, "
            f"the budget is ${Decimal(str(budget_usd)):,.2f}. Raise budget_usd, or launch fewer stages"
        )


def extra_flops(config: StageConfig) -> float:
    """FLOPs of the clips that are sampled and evaluated: each sampling step is one forward pass, or two with guidance.

    Clips of another length than the stage's count by their frames. A stage of images is evaluated on clips and on as many images.
    """
    frames = config.data.frames
    per_clip = train_flops_per_clip(config) / (1 + BACKWARD)
    evaluated = config.evaluate.clips * (config.evaluate.frames / frames + (frames == 1)) if config.evaluate else 0
    clips = len(config.prompts) + evaluated
    passes = config.sampling.steps * (1 if config.sampling.guidance == 1 else 2)
    return clips * passes * per_clip


def _of_stage(mfu: float | Mapping[str, float] | None, stage: str) -> float | None:
    value = mfu.get(stage) if isinstance(mfu, Mapping) else mfu
    check_mfu(value)
    return value


def fit(config: StageConfig, devices: int, device: Device) -> Fit:
    """How much of a device's memory the stage needs. For `auto` this chooses the policy that the trainer will choose.

    Raises:
        UsageError: the devices do not divide as the stage's `parallel` says.
    """
    kind: DeviceKind = "cuda" if device.is_gpu else "cpu"
    size = round(device.hardware.memory_gib * 2**30) if device.hardware else None
    policy, reason = config.activations, "as the stage says"
    try:
        if policy.recompute == "auto":
            policy, reason = Activations(), "nothing is computed again where the memory is not known"
            if size is not None:
                choice = memory.choose(config, size, devices, device=kind)
                return Fit(choice.activations, choice.memory, size, choice.reason)
        return Fit(policy, memory.predict(memory.with_policy(config, policy), devices=devices, device=kind), size, reason)
    except memory.DoesNotFit as error:
        return Fit(error.activations, error.memory, size, str(error))
    except ValueError as error:
        raise UsageError(f"{error}. Use another number of devices") from error


@dataclass(frozen=True)
class _Offer:
    """Devices on which a stage may run."""

    pool: str | None
    name: str
    """Of the device, in the price list."""
    device: Device
    """At its price in the pool."""


def _offers(pipeline: Pipeline, stage: Stage, prices: Prices) -> list[_Offer]:
    """A stage's pools, the preferred one first; without pools what its cluster or machine has. Raises UsageError: a device in no list."""
    found = []
    for pool in pipeline.pools_of(stage) or (None,):
        name = pipeline.device_of(stage, pool)
        known = prices if pool is None or pipeline.cluster is None else prices.at(pipeline.cluster.in_pool(pool))
        found.append(_Offer(pool, name, known.device(name)))
    return found


def _over_pools(rows: Sequence[Row], lives_in: str | None) -> Row:
    """The row of the first pool, with what the stage costs at least and at most in any of them. `lives_in`: the pool of its attempt."""
    of_attempt = [row for row in rows if row.offers and row.offers[0][0] == lives_in]
    return replace(
        rows[0],
        at_most=max((row.expected for row in of_attempt or rows), key=lambda one: one.usd),
        low=min((row.low for row in rows), key=lambda one: one.usd),
        high=max((row.high for row in rows), key=lambda one: one.usd),
        offers=tuple(offer for row in rows for offer in row.offers),
    )


def _row(stage: Stage, offer: _Offer, mfu: float | None, step_s: float | None, calibrations: Sequence[Calibration], committed: bool) -> Row:
    name, device = offer.name, offer.device
    training = stage_flops(stage.config, stage.devices)
    flops = training + extra_flops(stage.config)
    peak = device.peak_tflops * 1e12 * stage.devices
    needs = fit(stage.config, stage.devices, device) if training else None
    measured = training / (stage.config.steps * step_s * peak) if step_s and training else None
    speed = speed_of(stage.config, name, device, mfu, measured, calibrations, needs.activations if needs else Activations())
    basis: Basis = "committed" if committed else "import" if not flops else speed.basis
    idle = basis in ("committed", "import")

    def at(reached: float) -> Estimate:
        return NOTHING if idle else _estimate(flops / (peak * reached), stage.devices, device)

    return Row(
        stage=stage.name,
        parent=stage.spec.parent,
        device=name,
        devices=stage.devices,
        steps=stage.config.steps,
        flops=flops,
        basis=basis,
        mfu=None if idle else speed.expected,
        expected=at(speed.expected),
        low=at(speed.high),
        high=at(speed.low),
        at_most=at(speed.expected),
        published=stage.spec.published,
        source=basis if idle else speed.source,
        fit=None if idle else needs,
        offers=((offer.pool, device.usd_per_hour),) if offer.pool is not None else (),
    )


def _estimate(wall_s: float, devices: int, device: Device) -> Estimate:
    hours = wall_s * devices / 3600
    usd = cost(Decimal(repr(wall_s)) * devices, device.usd_per_hour)
    return Estimate(hours, hours if device.is_gpu else 0.0, wall_s / 3600, usd)
