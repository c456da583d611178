"""Near duplicates are what comparing each hash with each kept one before it finds, in whatever lists the search keeps them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.dataset.duplicates import SHORT, duplicates


def one_by_one(hashes: list[int | None], bits: int) -> set[int]:
    """Places of duplicates, by the definition."""
    kept: list[int] = []
    found = set()
    for place, value in enumerate(hashes):
        if value is None:
            continue
        if any((value ^ one).bit_count() <= bits for one in kept):
            found.add(place)
        else:
            kept.append(value)
    return found


def crowd(seed: int, many: int, families: int) -> list[int | None]:
    """Hashes that lie near to each other in families, with some that nobody could make."""
    dice = random.Random(seed)
    middles = [dice.getrandbits(64) for _ in range(families)]
    hashes: list[int | None] = []
    for _ in range(many):
        value = dice.choice(middles)
        for bit in dice.sample(range(64), dice.randrange(12)):
            value ^= 1 << bit
        hashes.append(None if dice.random() < 0.02 else value)
    return hashes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(0, 64), st.integers(1, 40))
def test_the_search_finds_what_comparing_all_finds(seed: int, bits: int, families: int) -> None:
    hashes = crowd(seed, 150, families)
    found = duplicates(hashes, bits)
    assert set(found) == one_by_one(hashes, bits)
    for place, first in found.items():
        here, there = hashes[place], hashes[first]
        assert here is not None and there is not None
        assert first < place and first not in found and (here ^ there).bit_count() <= bits


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_long_lists_are_searched_as_short_ones_are(bits: int) -> None:
    dice = random.Random(bits)
    crowded: list[int | None] = [dice.getrandbits(13) << 51 for _ in range(SHORT * 40)]  # all bands but the last are alike
    assert set(duplicates(crowded, bits)) == one_by_one(crowded, bits)
    assert len(crowded) - len(duplicates(crowded, bits)) > (SHORT if bits == 2 else 1)


def test_the_first_in_order_stays_and_a_chain_is_cut_where_it_leaves_the_first() -> None:
    chain: list[int | None] = [0b0, 0b1, 0b11, 0b111]
    assert duplicates(chain, 1) == {1: 0, 3: 2}
    assert duplicates([7, 7, 7], 0) == {1: 0, 2: 0}


def test_bits_that_no_hash_has_are_refused() -> None:
    with pytest.raises(ValueError, match="65 bits: hashes have 64"):
        duplicates([1], 65)
