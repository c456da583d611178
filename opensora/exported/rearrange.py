"""Replaces einops' `rearrange` in an export, where einops may not be installed: reshape, transpose, reshape.

Owns what the exported modules use: named axes and groups of them on both sides. It knows neither ellipses nor axes of length 1.
"""

from __future__ import annotations

import re

from torch import Tensor


def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """As einops': rearrange(x, "b (t s) d -> (b t) s d", t=4)."""
    before, after = ([group.strip("()").split() for group in re.findall(r"\([^()]*\)|\S+", side)] for side in pattern.split("->"))
    lengths: dict[str, int] = dict(sizes)
    for group, length in zip(before, tensor.shape, strict=True):
        known = 1
        for name in group:
            known *= lengths.get(name, 1)
        unknown = [name for name in group if name not in lengths]
        if len(unknown) > 1 or length % known or (not unknown and known != length):
            raise ValueError(
                f"rearrange {pattern!r} of {tuple(tensor.shape)} with {sizes}: {length} does not divide into {' x '.join(group)}"
            )
        lengths |= dict.fromkeys(unknown, length // known)
    names = [name for group in before for name in group]
    apart = tensor.reshape([lengths[name] for name in names])
    moved = apart.permute([names.index(name) for group in after for name in group])
    shape = []
    for group in after:
        length = 1
        for name in group:
            length *= lengths[name]
        shape.append(length)
    return moved.reshape(shape)
