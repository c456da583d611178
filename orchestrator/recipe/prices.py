"""The price list: what a device costs an hour, how fast it is at most, and who says so.

Owns the schema of `prices.yaml` and its reading, and the reading of calibrations (`opensora.planning.calibration`): what a device's hour
is worth. Refuses a price without a source and a date. Money is Decimal, always.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, ValidationError, model_validator

from opensora.config import Frozen, Unit
from opensora.planning.calibration import Calibration
from opensora.planning.calibration import read as read_calibration
from orchestrator.errors import UsageError
from orchestrator.ledger.records import Price
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.cluster_profile import Price as ClusterPrice
from orchestrator.recipe.files import shipped_folder
from orchestrator.recipe.yaml_file import closest, read, usage_error, validate

Utilisation = Annotated[float, Field(gt=0, le=1)]


class MfuRange(Frozen):
    """Share of a device's peak that training is assumed to reach."""

    low: Annotated[Utilisation, Unit("fraction of the peak")]
    """The pessimistic end."""
    expected: Annotated[Utilisation, Unit("fraction of the peak")]
    """What a plan is made with."""
    high: Annotated[Utilisation, Unit("fraction of the peak")]
    """The optimistic end."""

    @model_validator(mode="after")
    def _ascends(self) -> MfuRange:
        if not self.low <= self.expected <= self.high:
            raise ValueError(f"low {self.low}, expected {self.expected}, high {self.high} do not ascend")
        return self


class Hardware(Frozen):
    """What a device can hold and pass on."""

    memory_gib: Annotated[PositiveFloat, Unit("GiB")]
    """Memory of one device."""
    link_gb_s: Annotated[PositiveFloat, Unit("GB/s")]
    """What it sends to the other devices of its node in a second, and receives meanwhile."""
    host_gb_s: Annotated[PositiveFloat, Unit("GB/s")]
    """What it sends to host memory in a second."""
    source: str
    """Who says so."""


class Device(Frozen):
    """One kind of device."""

    usd_per_hour: Annotated[Decimal, Field(ge=0), Unit("US dollars an hour")]
    """Held, busy or idle. In quotes."""
    basis: Literal["published", "assumption"]
    """published: a run or a price list says so; assumption: nobody does."""
    source: str
    """Who says so."""
    date: date
    """When they said so, YYYY-MM-DD."""
    is_gpu: bool
    """Whether its hours count as GPU-hours."""
    peak_tflops: Annotated[PositiveFloat, Unit("TFLOP/s")]
    """Dense matrix products in the type that training uses: bf16 on a GPU, fp32 on a CPU."""
    peak_source: str
    """Who says so."""
    mfu: MfuRange
    """What a plan assumes where neither --mfu nor a measured step is known."""
    mfu_source: str
    """Who says so."""
    hardware: Hardware | None = None
    """None: unknown, and a plan does not say what fits."""


class Prices(Frozen):
    """`prices.yaml`."""

    devices: dict[str, Device]
    """By the name that `resources.device` gives."""

    def device(self, name: str) -> Device:
        """Raises UsageError."""
        if name not in self.devices:
            raise UsageError(f"device {name!r}: is not in the price list. {closest(name, list(self.devices))}")
        return self.devices[name]

    def at(self, cluster: ClusterProfile | None) -> Prices:
        """The same list with the cluster's own price of its device. Raises UsageError where the device is in no list."""
        if cluster is None or cluster.price is None:
            return self
        own = {"usd_per_hour": cluster.price.usd_per_hour, "source": cluster.price.source, "date": cluster.price.date, "basis": "published"}
        return Prices(devices={**self.devices, cluster.device: self.device(cluster.device).model_copy(update=own)})


def load_prices(path: Path | None = None) -> Prices:
    """A price list; none named: the shipped one. Raises UsageError."""
    document = read(path if path is not None else shipped_folder() / "prices.yaml")
    return validate(Prices, document, "prices")


def named_prices(env: Mapping[str, str] = os.environ) -> Prices:
    """The list that OSCTL_PRICES names, else the shipped one. Raises UsageError."""
    named = env.get("OSCTL_PRICES")
    return load_prices(Path(named) if named else None)


def with_named_price(cluster: ClusterProfile, env: Mapping[str, str]) -> ClusterProfile:
    """The profile, at the prices that the list of OSCTL_PRICES has of its devices: so they reach a driver in the cluster, with the
    revision. A pool's own price stays: the list knows devices, and no pools.

    Raises UsageError.
    """
    if not env.get("OSCTL_PRICES"):
        return cluster
    devices = named_prices(env).devices

    def named(device: str | None) -> ClusterPrice | None:
        found = devices.get(device) if device is not None else None
        return ClusterPrice(usd_per_hour=found.usd_per_hour, source=found.source, date=found.date) if found is not None else None

    pools = tuple(pool if pool.price else pool.model_copy(update={"price": named(pool.device)}) for pool in cluster.pools)
    return cluster.model_copy(update={"price": named(cluster.device) or cluster.price, "pools": pools})


def price_of(prices: Prices, device: str) -> Price | None:
    """What is written down of a device's price when an attempt is made. None: it is in no list."""
    found = prices.devices.get(device)
    if found is None:
        return None
    return Price(usd_per_hour=found.usd_per_hour, is_gpu=found.is_gpu, basis=found.basis, source=found.source, date=found.date.isoformat())


def load_calibrations(path: Path | None = None) -> tuple[Calibration, ...]:
    """What steps took: the file that is named, and of the shipped ones those of other devices. Raises UsageError."""
    own = _calibration(path) if path is not None else None
    shipped = [_calibration(file) for file in sorted((shipped_folder() / "calibration").glob("*.json"))]
    return tuple([own] if own else []) + tuple(one for one in shipped if own is None or one.device != own.device)


def _calibration(path: Path) -> Calibration:
    try:
        return read_calibration(path)
    except OSError as error:
        raise UsageError(f"calibration {path}: {error.strerror}. Name a file that bench/step.py or bench/gpu.py wrote") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise usage_error(f"calibration {path}: {place}: {first['msg']}. Name a file that bench/step.py or bench/gpu.py wrote") from error


def cost(device_seconds: Decimal, usd_per_hour: Decimal) -> Decimal:
    """Dollars, unrounded: rounding belongs to whoever shows them."""
    return device_seconds * usd_per_hour / 3600
