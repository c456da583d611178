"""The memory plan of a drawing: how many clips fit the device at once, before anything is loaded or drawn.

Owns what a device has free, and the choice. `opensora.planning.sampling` owns what clips need.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from opensora.config import SamplingConfig
from opensora.encoders.protocol import needs_of
from opensora.errors import ConfigError
from opensora.evaluation.sampler import Sampler
from opensora.planning.sampling import SamplingMemory, predict

RESERVE = 0.08
"""Share of the free memory that a plan does not fill, as `opensora.planning.memory` leaves it for libraries and fragments."""


@dataclass(frozen=True)
class Plan:
    """What is drawn at once, and what that needs."""

    at_once: int
    """Clips."""
    needed: SamplingMemory
    free: int
    """Bytes."""
    place: str
    """Of the memory: `cuda:0`, or `this machine`."""

    def sentence(self) -> str:
        one = self.needed
        parts = f"network {_gb(one.network)}, encoders {_gb(one.encoders)}, drawing {_gb(one.drawing)}, decoding {_gb(one.decoding)}"
        clips = f"{self.at_once} clip{'s' if self.at_once > 1 else ''} at once"
        return f"{clips}: about {_gb(one.total)} of {_gb(self.free)} free on {self.place} ({parts})"


def plan(sampler: Sampler, most: int, frames: int, size: tuple[int, int] | None, sampling: SamplingConfig) -> Plan:
    """As many clips at once as fit, at most `most`. Ranks that share clips call this together, and get the smallest of their numbers.

    Raises:
        ConfigError: not one fits.
    """
    stage, shared, free = sampler.stage, sampler.sequence, free_bytes(sampler.device)
    pixels = size or (stage.data.height, stage.data.width)
    encoders = needs_of(sampler.autoencoder, sampler.text)

    def of(clips: int) -> SamplingMemory:
        return predict(
            stage,
            clips=clips,
            frames=frames,
            size=pixels,
            guided=sampling.guidance != 1,
            encoders=encoders,
            ranks=1 if shared is None else shared.ranks,
            loaded=sampler.has_network(frames),
        )

    fits = next((clips for clips in range(most, 0, -1) if of(clips).total <= free * (1 - RESERVE)), 0)
    if shared is not None:
        smallest = torch.tensor(fits, device=sampler.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=shared.group)
        fits = int(smallest)
    place = "this machine" if sampler.device.type == "cpu" else str(sampler.device)
    if not fits:
        one = of(1)
        fact = f"a clip of {frames} frames of {pixels[0]}x{pixels[1]} pixels needs about {_gb(one.total)} of memory"
        raise ConfigError(f"{fact}, {_gb(free)} are free on {place}; ask for fewer frames or a smaller size, or share it: --devices")
    return Plan(fits, of(fits), free, place)


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
