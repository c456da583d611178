"""Where random numbers of a stage come from: a generator for each purpose, rank and step, and no state that could be lost."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, rank: int, step: int, device: torch.device) -> torch.Generator:
    """The source of a rank's random numbers in one step. A hash, so that (seed 1, rank 0) and (seed 0, rank 1) do not meet."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{rank}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
