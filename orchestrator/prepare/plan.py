"""Ahead of a preparation: hours, dollars and bytes of each step. Pure.

Owns the arithmetic. Refuses to look at a disk or a clock; every figure says whether it was measured, published, counted or is an
assumption. What was measured of the person's own runs stands beside it (`Own`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from opensora.config import StageConfig
from opensora.dataset.prepare_config import PrepareConfig
from opensora.printable import several
from orchestrator.prepare import rates
from orchestrator.prepare.rates import Rate
from orchestrator.recipe.prices import Prices, cost

CORE, GPU = "cpu-core", "h800"
LATENT_BYTES = 2
"""Of a number in a cache."""


@dataclass(frozen=True)
class Amount:
    """What there is to do."""

    clips: float
    """That are left in the end."""
    clip_s: float
    raw_s: float
    """Seconds of raw video."""
    videos: float
    pixels: float
    """A second of video: width x height x frames a second."""
    raw_bytes: float
    assumed: tuple[Rate, ...]
    """What was assumed to get there."""


@dataclass(frozen=True)
class Own:
    """Measured in earlier runs on this machine; None: not measured."""

    look: float | None = None
    """CPU-s for a second of video at `rates.PIXELS`."""
    cut_out: float | None = None
    caption_tokens: tuple[float, float] | None = None
    """Tokens in and out of a caption."""
    runs: int = 0


@dataclass(frozen=True)
class Row:
    step: str
    work: str
    """How much of what, for people."""
    rate: Rate | None
    device: str
    device_hours: float
    wall_h: float
    usd: Decimal | None
    """None: not priced."""
    bytes: float
    """That the step writes, or fetches."""
    own_hours: float | None = None
    """Device-hours at what was measured here, or at the person's own figure."""
    own_usd: Decimal | None = None
    counts: bool = True
    """False: to compare with, and in no total."""

    @property
    def on_gpu(self) -> bool:
        return self.device != CORE


def amount(
    config: PrepareConfig,
    *,
    clips: int | None,
    hours: float | None,
    size: tuple[int, int, float] = (1280, 720, 25.0),
    seen: tuple[int, int] | None = None,
) -> Amount:
    """How much there is to do.

    Args:
        clips: that are wanted in the end.
        hours: of raw video. Where one of the two is missing it follows from the other, from `rates.CLIP_S` and `rates.KEPT`.
        size: width, height, frames a second.
        seen: (videos, bytes) that lie where the sources are, for a plan without both.
    """
    width, height, fps = size
    pixels = width * height * fps
    clip_s = min(rates.CLIP_S.value, config.cut.max_s)
    assumed = [rates.CLIP_S, rates.KEPT]
    per_s = rates.RAW_BYTES.value * pixels / rates.PIXELS
    if hours is not None:
        raw_s = hours * 3600
    elif clips is not None:
        raw_s = clips * clip_s / rates.KEPT.value
    else:
        raw_s = (seen or (0, 0))[1] / per_s
        assumed.append(rates.RAW_BYTES)
    found = float(clips) if clips is not None else raw_s * rates.KEPT.value / clip_s
    videos = float(seen[0]) if seen is not None and clips is None and hours is None else raw_s / rates.VIDEO_S.value
    raw_bytes = float(seen[1]) if seen is not None and clips is None and hours is None else raw_s * per_s
    return Amount(found, clip_s, raw_s, videos, pixels, raw_bytes, tuple(assumed))


def plan(
    config: PrepareConfig, what: Amount, prices: Prices, *, workers: int, gpus: int, stages: Mapping[str, StageConfig],
    own: Own, caption_gpu_s: float | None = None, network_mbit_s: float | None = None, gpu: str = GPU,
) -> list[Row]:  # fmt: skip
    """One row a step, in their order.

    Args:
        caption_gpu_s: the person's own GPU-seconds a caption.
        network_mbit_s: of the line that fetches; None: `rates.NETWORK`.
        gpu: its name in the price list.

    Raises:
        UsageError: encoders run on it, and it is in no list: nobody knows how fast it is.
    """
    ahead = _Plan(config, what, prices, workers, gpus, own, gpu)
    rows = [ahead.download(network_mbit_s), ahead.probe(), ahead.look()]
    rows += [ahead.text_area()] if config.filter.text_area else []
    rows += [ahead.cut_out(), *ahead.captions(caption_gpu_s)]
    return [*rows, *(ahead.encode(name, stage) for name, stage in stages.items())]


def total(rows: Sequence[Row]) -> tuple[float, float, Decimal, float]:
    """(core-hours, GPU-hours, dollars of what is priced, bytes)."""
    counted = [row for row in rows if row.counts]
    core_h, gpu_h = (sum(row.device_hours for row in counted if row.on_gpu is on_gpu) for on_gpu in (False, True))
    usd = sum((row.usd for row in counted if row.usd is not None), Decimal(0))
    return core_h, gpu_h, usd, sum(row.bytes for row in counted)


def not_priced(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of devices that are needed and have no price."""
    return tuple(dict.fromkeys(row.device for row in rows if row.counts and row.usd is None))


@dataclass(frozen=True)
class _Plan:
    config: PrepareConfig
    what: Amount
    prices: Prices
    workers: int
    gpus: int
    own: Own
    gpu: str

    def download(self, network: float | None) -> Row:
        far = any("://" in given.path or given.index is not None for given in self.config.sources)
        line = Rate(network, "Mbit/s", "yours", "--network", "") if network is not None else rates.NETWORK
        wall = 8 * self.what.raw_bytes / (line.value * 1e6) / 3600 if far else 0.0
        return Row(
            "download",
            several(round(self.what.videos), "video"),
            line if far else None,
            CORE,
            0.0,
            wall,
            Decimal(0),
            self.what.raw_bytes if far else 0.0,
        )

    def probe(self) -> Row:
        return self._cores("probe", several(round(self.what.videos), "video"), rates.PROBE, self.what.videos)

    def look(self) -> Row:
        return self._cores("frames", hours_of(self.what.raw_s), rates.LOOK, self._scaled(self.what.raw_s), own=self.own.look)

    def text_area(self) -> Row:
        return self._cores("score", f"{3 * self.what.clips:,.0f} frames", rates.TEXT_AREA, 3 * self.what.clips)

    def cut_out(self) -> Row:
        seconds = self.what.clips * self.what.clip_s
        size = self._scaled(seconds) * rates.CLIP_BYTES.value
        return self._cores("clips", hours_of(seconds), rates.CUT_OUT, self._scaled(seconds), size, self.own.cut_out)

    def captions(self, gpu_s: float | None) -> list[Row]:
        settings, clips = self.config.caption, self.what.clips
        work = several(round(clips), "caption")
        if settings.kind in ("beside", "digits", "text"):
            there = Row("caption", work, None, CORE, 0.0, 0.0, Decimal(0), 0.0)
            other = replace(self._gpus("(by LLaVA)", work, rates.CAPTION, clips * rates.CAPTION.value), counts=False)
            return [there, self._with_own(other, gpu_s)]
        row = self._gpus("caption", work, rates.CAPTION, clips * rates.CAPTION.value)
        if settings.kind == "server" and gpu_s is None and self.own.caption_tokens is not None:
            tokens_in, tokens_out = self.own.caption_tokens
            dollars = clips * (tokens_in * settings.usd_per_million_in + tokens_out * settings.usd_per_million_out) / 1e6
            return [replace(row, own_usd=Decimal(str(round(dollars, 6))))]
        return [self._with_own(row, gpu_s)]

    def _with_own(self, row: Row, gpu_s: float | None) -> Row:
        if gpu_s is None:
            return row
        own = self._gpus("", "", row.rate, self.what.clips * gpu_s)
        return replace(row, own_hours=own.device_hours, own_usd=own.usd)

    def encode(self, name: str, stage: StageConfig) -> Row:
        """Of encoders that are imported; the embedded ones take seconds."""
        clips, flops = self.what.clips, 0.0
        numbers = stage.data.frames * stage.data.height * stage.data.width
        size = 0.0
        if stage.autoencoder.kind == "kl":
            flops += numbers * rates.KL_FLOPS.value
            size += numbers / stage.autoencoder.factor**2 * stage.model.latent_channels * LATENT_BYTES
        if stage.text.kind == "t5":
            flops += stage.model.caption_tokens * rates.T5_FLOPS.value
            size += stage.model.caption_tokens * stage.model.caption_width * LATENT_BYTES
        seconds, rate = 0.0, None
        if flops:
            device = self.prices.device(self.gpu)
            seconds = clips * flops / (device.peak_tflops * 1e12 * device.mfu.expected)
            source = f"{rates.KL_FLOPS.source}; {rates.T5_FLOPS.source}; speed: {device.mfu_source}"
            rate = Rate(flops, "FLOPs a clip", "counted", source, "2026-11-30")
        work = f"{several(round(clips), 'clip')} of {stage.data.frames}x{stage.data.height}x{stage.data.width} for {name}"
        return replace(self._gpus("encode", work, rate, seconds), bytes=clips * size)

    def _scaled(self, seconds: float) -> float:
        return seconds * self.what.pixels / rates.PIXELS

    def _cores(self, step: str, work: str, rate: Rate, count: float, size: float = 0.0, own: float | None = None) -> Row:
        hours = count * rate.value / 3600
        own_hours = count * own / 3600 if own is not None else None
        own_usd = self._usd(CORE, own_hours) if own_hours is not None else None
        return Row(step, work, rate, CORE, hours, hours / self.workers, self._usd(CORE, hours), size, own_hours, own_usd)

    def _gpus(self, step: str, work: str, rate: Rate | None, seconds: float) -> Row:
        hours = seconds / 3600
        return Row(step, work, rate, self.gpu, hours, hours / self.gpus, self._usd(self.gpu, hours), 0.0)

    def _usd(self, device: str, hours: float) -> Decimal | None:
        found = self.prices.devices.get(device)
        if found is None:
            return None if hours else Decimal(0)
        return cost(Decimal(repr(hours * 3600)), found.usd_per_hour)


def hours_of(seconds: float) -> str:
    """How much video, for people: hours, or seconds of less than six minutes."""
    return f"{seconds / 3600:,.1f} h of video" if seconds >= 360 else f"{seconds:,.0f} s of video"
