"""The price list: what a device costs an hour, how fast it is at most, and who says so.

Owns the schema of `prices.yaml` and its reading. Refuses a price without a source and a date. Money is Decimal, always.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from opensora.config import Frozen
from orchestrator.cluster import ClusterProfile
from orchestrator.config import shipped_folder
from orchestrator.document import closest, read, validate
from orchestrator.errors import UsageError

Utilisation = Annotated[float, Field(gt=0, le=1)]


class MfuRange(Frozen):
    """Share of a device's peak that training is assumed to reach."""

    low: Utilisation
    """The pessimistic end."""
    expected: Utilisation
    """What a plan is made with."""
    high: Utilisation
    """The optimistic end."""

    @model_validator(mode="after")
    def _ascends(self) -> MfuRange:
        if not self.low <= self.expected <= self.high:
            raise ValueError(f"low {self.low}, expected {self.expected}, high {self.high} do not ascend")
        return self


class Device(Frozen):
    """One kind of device."""

    usd_per_hour: Annotated[Decimal, Field(ge=0)]
    """Held, busy or idle. In quotes."""
    basis: Literal["published", "assumption"]
    """published: a run or a price list says so; assumption: nobody does."""
    source: str
    """Who says so."""
    date: date
    """When they said so, YYYY-MM-DD."""
    is_gpu: bool
    """Whether its hours count as GPU-hours."""
    peak_tflops: PositiveFloat
    """Dense matrix products in the type that training uses: bf16 on a GPU, fp32 on a CPU."""
    peak_source: str
    """Who says so."""
    mfu: MfuRange
    """What a plan assumes where neither --mfu nor a measured step is known."""
    mfu_source: str
    """Who says so."""


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


def cost(device_seconds: Decimal, usd_per_hour: Decimal) -> Decimal:
    """Dollars, unrounded: rounding belongs to whoever shows them."""
    return device_seconds * usd_per_hour / 3600
