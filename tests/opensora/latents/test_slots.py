"""Laws of the bounded room for blocks: what a reader gets is what was put for its row, whoever else writes, dies or gives blocks up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.latents.slots import Shape, Slots

ROWS, SLOTS = 60, 6
SHAPE = Shape(ROWS, (40,), torch.float32, 2)


def made(folder: Path) -> Path:
    Slots.make(folder / "part.safetensors", SHAPE, SLOTS)
    return folder / "part.safetensors"


def content(block: int) -> bytes:
    """Each row is filled with its own number."""
    return b"".join(np.full(40, row, np.float32).tobytes() for row in SHAPE.rows_of(block))


def put(slots: Slots, *blocks: int, due: float = 0.0, urgent: bool = True) -> list[int]:
    mine, waits = slots.claim(blocks, [due] * len(blocks), urgent=urgent)
    for block, slot in mine.items():
        slots.put(block, slot, content(block))
    return waits


def there(slots: Slots) -> list[int]:
    every = np.arange(SHAPE.blocks)
    return sorted(set(every) - set(slots.missing(every)))


def test_a_row_is_read_where_its_block_was_put_and_nowhere_else(tmp_path: Path) -> None:
    slots = Slots(made(tmp_path), SHAPE, SLOTS)
    assert put(slots, 3, 29) == []
    rows = np.array([58, 6, 7, 8, 59])
    copied, found = slots.copy(rows, None)
    assert found.tolist() == [True, True, True, False, True]
    assert [float(row[0]) for row, here in zip(copied, found, strict=True) if here] == [58, 6, 7, 59]
    assert put(slots, 3) == []
    assert there(slots) == [3, 29], "what is there is not claimed again"


def test_the_block_that_is_needed_last_is_given_up(tmp_path: Path) -> None:
    slots = Slots(made(tmp_path), SHAPE, SLOTS)
    for block, due in zip(range(SLOTS), (5.0, 1.0, 9.0, 2.0, 3.0, 4.0), strict=True):
        put(slots, block, due=due)
    put(slots, 20, due=0.5)
    assert there(slots) == [0, 1, 3, 4, 5, 20]
    slots.copy(np.array([2]), np.array([8.0]))  # block 1, needed again much later
    put(slots, 21, due=0.5)
    assert there(slots) == [0, 3, 4, 5, 20, 21]


def test_nothing_that_is_needed_sooner_is_given_up_for_what_is_fetched_ahead(tmp_path: Path) -> None:
    slots = Slots(made(tmp_path), SHAPE, SLOTS)
    put(slots, *range(SLOTS), due=1.0)
    assert put(slots, 20, due=2.0, urgent=False) == [20]
    assert there(slots) == list(range(SLOTS))
    assert put(slots, 20, due=2.0, urgent=True) == []


def test_two_who_want_a_block_fetch_it_once(tmp_path: Path) -> None:
    file = made(tmp_path)
    one, other = Slots(file, SHAPE, SLOTS), Slots(file, SHAPE, SLOTS)
    mine, _ = one.claim([4], [0.0], urgent=True)
    assert other.claim([4], [0.0], urgent=True) == ({}, [4])
    one.put(4, mine[4], content(4))
    assert other.claim([4], [0.0], urgent=True) == ({}, [])
    assert there(other) == [4]


def test_a_fetch_that_failed_leaves_its_slot_to_the_next(tmp_path: Path) -> None:
    file = made(tmp_path)
    one, other = Slots(file, SHAPE, SLOTS), Slots(file, SHAPE, SLOTS)
    mine, _ = one.claim(range(SLOTS), [0.0] * SLOTS, urgent=True)
    assert other.claim([20], [0.0], urgent=True) == ({}, [20]), "all slots are being filled"
    for slot in mine.values():
        one.give_up(slot)
    assert put(other, 20, 21) == []
    assert there(one) == [20, 21]


def _claim_and_wait(file: Path, ready: str) -> None:
    slots = Slots(file, SHAPE, SLOTS)
    slots.claim(range(SLOTS), [0.0] * SLOTS, urgent=True)
    Path(ready).touch()
    time.sleep(600)


@pytest.mark.long
def test_the_slots_of_a_killed_process_are_taken_over(tmp_path: Path) -> None:
    file, ready = made(tmp_path), tmp_path / "ready"
    killed = multiprocessing.get_context("spawn").Process(target=_claim_and_wait, args=(file, str(ready)), daemon=True)
    killed.start()
    while not ready.exists():
        assert killed.is_alive()
        time.sleep(0.01)
    slots = Slots(file, SHAPE, SLOTS)
    assert put(slots, 0, 1) == [0, 1]
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert put(slots, 0, 1) == []
    assert there(slots) == [0, 1]


def _write(file: Path, seed: int, rounds: int) -> None:
    slots, draw = Slots(file, SHAPE, SLOTS), np.random.default_rng(seed)
    for _ in range(rounds):
        put(slots, *map(int, draw.choice(SHAPE.blocks, 3, replace=False)), due=float(draw.random()))


@pytest.mark.long
def test_a_reader_never_sees_a_block_that_is_being_replaced(tmp_path: Path) -> None:
    file = made(tmp_path)
    writer = multiprocessing.get_context("spawn").Process(target=_write, args=(file, 1, 300))
    writer.start()
    slots, draw, read = Slots(file, SHAPE, SLOTS), np.random.default_rng(9), 0
    while writer.is_alive():
        rows = draw.integers(0, ROWS, 12)
        copied, found = slots.copy(rows, None)
        for row, values in zip(rows[found], copied[torch.from_numpy(found)], strict=True):
            assert bool((values == float(row)).all())
            read += 1
    assert writer.exitcode == 0
    assert read > 0
