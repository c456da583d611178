"""Near duplicates by perceptual hash: which of many 64-bit hashes differ in so few bits from an earlier one. Pure.

Owns the search, for the engine and for whoever tells what it did. Refuses to say what a duplicate is worth: `opensora.prepare.filters`
does.

Hashes are taken in their order. One is a duplicate if it differs in at most `bits` bits from one that was kept before it; so each duplicate
has a kept hash near it, and the answer depends on the order of hashes alone, not on how many processes made them.

The search is exact. A hash is divided into bands; of two hashes that differ in d bits, one of m bands differs in at most d // m bits
(Norouzi, Punjani, Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012). Kept hashes are found by their bands, and
each one found is compared whole.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from math import comb

import numpy as np

BITS = 64
SHORT = 48
"""Of a list this long or shorter, Python compares faster one by one than numpy is called (both about 3 us, measured)."""


def duplicates(hashes: Sequence[int | None], bits: int) -> dict[int, int]:
    """By place of each duplicate, the place of a kept hash that it is near to.

    Args:
        hashes: 64-bit numbers in order; None is near to nothing.
        bits: most bits in which two may differ.

    Raises ValueError where `bits` is not within 0 … 64.
    """
    if not 0 <= bits <= BITS:
        raise ValueError(f"{bits} bits: hashes have {BITS}")
    found: dict[int, int] = {}
    first: dict[int, int] = {}  # equal hashes are most of all duplicates, and are found at once
    index = Near(bits, len(hashes))
    for place, value in enumerate(hashes):
        if value is None:
            continue
        if (same := first.get(value)) is not None:
            found[place] = found.get(same, same)
            continue
        first[value] = place
        near = index.near(value) if bits else None
        if near is None:
            index.add(value)
        else:
            found[place] = first[near]
    return found


class Near:
    """Kept hashes, by the value of each of their bands."""

    def __init__(self, bits: int, expected: int) -> None:
        """
        Args:
            bits: most bits in which two may differ, 0 … 64.
            expected: about how many hashes are added; the search is exact whatever it is.
        """
        self._bits = bits
        bands = _bands(bits, expected)
        self._edges = [band * BITS // bands for band in range(bands + 1)]
        self._masks = [
            [
                sum(1 << bit for bit in flipped)
                for many in range(bits // bands + 1)
                for flipped in itertools.combinations(range(width), many)
            ]
            for width in (high - low for low, high in itertools.pairwise(self._edges))
        ]
        """By band, what is flipped of its value to reach all that may hold a near hash."""
        self._lists: list[dict[int, array[int]]] = [{} for _ in range(bands)]

    def add(self, value: int) -> None:
        for lists, key in zip(self._lists, self._keys(value), strict=True):
            lists.setdefault(key, array("Q")).append(value)

    def near(self, value: int) -> int | None:
        """A kept hash within so many bits; None: there is none."""
        for lists, key, masks in zip(self._lists, self._keys(value), self._masks, strict=True):
            for mask in masks:
                if (kept := lists.get(key ^ mask)) is not None and (found := self._within(value, kept)) is not None:
                    return found
        return None

    def _keys(self, value: int) -> list[int]:
        return [(value >> low) & ((1 << (high - low)) - 1) for low, high in itertools.pairwise(self._edges)]

    def _within(self, value: int, kept: array[int]) -> int | None:
        if len(kept) <= SHORT:
            return next((one for one in kept if (one ^ value).bit_count() <= self._bits), None)
        found = np.bitwise_count(np.frombuffer(kept, dtype=np.uint64) ^ np.uint64(value)) <= self._bits
        place = int(found.argmax())
        return kept[place] if found[place] else None


def _bands(bits: int, expected: int) -> int:
    """How many bands are searched with the least work, where hashes are evenly spread."""

    def work(bands: int) -> float:
        width = BITS // bands
        probes = sum(comb(width, many) for many in range(bits // bands + 1))
        return bands * probes * (1 + expected / 2.0**width / 20)  # a look into a list costs as much as some 20 comparisons

    return min(range(1, min(bits + 1, 16) + 1), key=work)
