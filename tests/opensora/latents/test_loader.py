"""Laws of the order of clips: nothing lost, nothing doubled, ranks apart and in step, and a position is all that a resume needs."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora.config import Bucket
from opensora.dataset.usage import Usage
from opensora.errors import DataError
from opensora.latents.loader import Ahead, Batch, Loader, Position, Stream
from opensora.latents.prepared import Part, Prepared
from opensora.latents.shard import Shard

LENGTHS = (1, 2, 3)
"""Tokens of the three captions; caption i's are all i + 1."""
CPU = torch.device("cpu")
LAW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Held(Shard):
    """A shard in memory."""

    def __init__(self, large: Tensor, small: Mapping[str, Tensor]) -> None:
        self.large, self.small, self.checks, self.whole = large, small, 0, True

    def check(self) -> None:
        self.checks += 1
        if not self.whole:
            raise DataError("cut")


def prepared(*buckets: tuple[int, int], mirrored: bool = False) -> Prepared:
    """Of (clips, batch_size) each. Latents carry their own index (mirrored ones: −1 − index), frames the number of the bucket + 1."""
    parts, sizes = [], []
    for number, (clips, batch) in enumerate(buckets):
        values = torch.arange(clips, dtype=torch.float32)
        values = torch.cat((values, -1 - values)) if mirrored else values
        latents = values[:, None, None, None, None].expand(-1, 2, number + 1, 2, 2).contiguous()
        rows = torch.stack((torch.arange(clips), torch.arange(clips) + clips * mirrored), 1)
        parts.append(Part(Held(latents, {"rows": rows}), torch.arange(clips) % len(LENGTHS)))
        sizes.append(Bucket(frames=number + 1, height=16, width=16, batch_size=batch))
    vectors = torch.cat([*(torch.full((length, 4), index + 1.0) for index, length in enumerate(LENGTHS)), torch.zeros(1, 4)])
    text = Held(vectors, {"offsets": torch.tensor([0, *itertools.accumulate(LENGTHS)])})
    used = sum(clips for clips, _ in buckets)
    return Prepared(Path(), "", tuple(sizes), tuple(parts), text, mirrored, {}, Usage(used, used), "")


def loaders(data: Prepared, seed: int, world: int) -> list[Loader]:
    return [Loader(data, seed=seed, rank=rank, world=world) for rank in range(world)]


def walk(ranks: Sequence[Loader], steps: int, seen: Position) -> tuple[list[list[Batch]], Position]:
    """The batches of all ranks, step by step, and where that ends."""
    taken = []
    for _ in range(steps):
        taken.append([loader.batch(seen) for loader in ranks])
        ends = {loader.after(seen) for loader in ranks}
        assert len(ends) == 1
        (seen,) = ends
    return taken, seen


bucket = st.tuples(st.integers(1, 60), st.integers(1, 7))
several = st.lists(bucket, min_size=1, max_size=4)
with_empty = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 7)), min_size=1, max_size=4).filter(lambda all_: any(n for n, _ in all_))
worlds, seeds = st.integers(1, 5), st.integers(0, 5)


@LAW
@given(with_empty, worlds, seeds)
def test_no_clip_is_lost_or_doubled_within_an_epoch_of_a_bucket(sizes: list[tuple[int, int]], world: int, seed: int) -> None:
    data = prepared(*sizes)
    steps, _ = walk(loaders(data, seed, world), 40, Loader(data, seed=seed).start)
    taken: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
    for batches in steps:
        for batch in batches:
            taken[batch.bucket] += batch.index.tolist()
    for number, (clips, _) in enumerate(sizes):
        whole = len(taken[number]) // clips if clips else 0
        for epoch in range(whole):
            assert sorted(taken[number][epoch * clips : (epoch + 1) * clips]) == list(range(clips))
        rest = taken[number][whole * clips :]
        assert len(set(rest)) == len(rest)


@LAW
@given(with_empty, worlds, seeds)
def test_all_ranks_take_every_step_from_one_bucket_in_one_shape(sizes: list[tuple[int, int]], world: int, seed: int) -> None:
    data = prepared(*sizes)
    ranks, seen = loaders(data, seed, world), Loader(data, seed=seed).start
    for _ in range(20):
        batches = [loader.batch(seen) for loader in ranks]
        assert len({(batch.bucket, batch.latents.shape) for batch in batches}) == 1
        number = batches[0].bucket
        assert batches[0].latents.shape == (sizes[number][1], 2, number + 1, 2, 2)
        counted = {loader.clips(seen) for loader in ranks}
        assert counted == {sizes[number][1] * world}
        after = ranks[0].after(seen)
        assert sum(after) - sum(seen) == sizes[number][1] * world
        seen = after


@LAW
@given(several, worlds, st.integers(1, 200))
def test_the_buckets_progress_never_differs_by_more_than_one_steps_worth(sizes: list[tuple[int, int]], world: int, steps: int) -> None:
    loader = Loader(prepared(*sizes), seed=0, world=world)
    worth, seen = max(Fraction(batch * world, clips) for clips, batch in sizes), loader.start
    for _ in range(steps):
        seen = loader.after(seen)
        progress = [Fraction(taken, clips) for taken, (clips, _) in zip(seen, sizes, strict=True)]
        assert max(progress) - min(progress) <= worth


@LAW
@given(several, worlds, seeds, st.integers(0, 60))
def test_a_resume_at_any_position_continues_bitwise(sizes: list[tuple[int, int]], world: int, seed: int, steps: int) -> None:
    data = prepared(*sizes, mirrored=True)
    walked, fresh = (Loader(data, seed=seed, rank=world - 1, world=world) for _ in range(2))
    seen = walked.start
    for _ in range(steps):
        walked.batch(seen)
        seen = walked.after(seen)
    ours, theirs = walked.batch(seen), fresh.batch(seen)
    assert ours.bucket == theirs.bucket
    for one, other in ((ours.latents, theirs.latents), (ours.vectors, theirs.vectors), (ours.index, theirs.index)):
        assert torch.equal(one, other)


@LAW
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=1, max_size=3), seeds, st.integers(0, 20), st.integers(1, 4))
def test_another_number_of_ranks_continues_the_same_stream(sizes: list[tuple[int, int]], seed: int, before: int, fewer: int) -> None:
    """With the clips of a step kept (batches `fewer` times as large on as many times fewer ranks) even the steps are the same."""
    wide, narrow = prepared(*sizes), prepared(*((clips, batch * fewer) for clips, batch in sizes))
    many, few = loaders(wide, seed, 2 * fewer), loaders(narrow, seed, 2)
    _, seen = walk(many, before, many[0].start)
    ours, theirs = walk(many, 5, seen)[0], walk(few, 5, seen)[0]
    for one, other in zip(ours, theirs, strict=True):
        assert {batch.bucket for batch in one} == {batch.bucket for batch in other}
        assert torch.cat([batch.index for batch in one]).equal(torch.cat([batch.index for batch in other]))


@LAW
@given(st.lists(bucket, min_size=1, max_size=3), seeds, st.integers(1, 5), worlds, worlds, worlds)
def test_no_clip_is_lost_when_the_number_of_ranks_changes(
    sizes: list[tuple[int, int]], seed: int, each: int, first: int, second: int, third: int
) -> None:
    data = prepared(*sizes)
    seen, taken = Loader(data, seed=seed).start, Counter[tuple[int, int]]()
    for world in (first, second, third):
        steps, seen = walk(loaders(data, seed, world), each, seen)
        taken.update((batch.bucket, index) for batches in steps for batch in batches for index in batch.index.tolist())
    for number, (clips, _) in enumerate(sizes):
        counts = [taken[number, index] for index in range(clips)]
        assert sum(counts) == seen[number]
        assert {seen[number] // clips, -(-seen[number] // clips)} >= set(counts)


@LAW
@given(bucket, worlds, seeds, st.integers(0, 500))
def test_one_bucket_is_the_plain_stream(size: tuple[int, int], world: int, seed: int, position: int) -> None:
    clips, batch = size
    ranks = loaders(prepared(size), seed, world)
    index = [number for loader in ranks for number in loader.batch((position,)).index.tolist()]
    epochs = range(position // clips, (position + batch * world) // clips + 1)
    plain = np.concatenate([np.random.default_rng([seed, epoch]).permutation(clips) for epoch in epochs])
    assert index == plain[position % clips :][: batch * world].tolist()
    assert ranks[0].after((position,)) == (position + batch * world,)


def test_a_bucket_smaller_than_a_step_repeats_clips_at_the_seams_alone() -> None:
    ranks = loaders(prepared((3, 4)), 0, 2)
    steps, seen = walk(ranks, 3, ranks[0].start)
    index = [number for batches in steps for batch in batches for number in batch.index.tolist()]
    assert seen == (24,)
    assert all(sorted(index[start : start + 3]) == [0, 1, 2] for start in range(0, 24, 3))


def test_a_position_of_another_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="3 buckets, the stage has 2"):
        Loader(prepared((4, 1), (4, 1)), seed=0).batch((0, 0, 0))


def test_ranks_of_a_step_have_different_clips() -> None:
    batches = [loader.batch((0,)).index.tolist() for loader in loaders(prepared((64, 8)), 0, 4)]
    assert len({index for batch in batches for index in batch}) == 32


def test_epochs_seeds_and_buckets_have_orders_of_their_own() -> None:
    orders = [tuple(Stream(seed, 50, bucket).clips_at(epoch * 50, 50)) for seed in range(3) for epoch in range(3) for bucket in range(3)]
    assert len(set(orders)) == 27
    assert tuple(np.arange(50)) not in orders


# ------------------------------------------------------------------------------------------------------------------
# What a batch holds
# ------------------------------------------------------------------------------------------------------------------


def test_a_clip_comes_with_its_own_caption_at_its_true_length() -> None:
    batch = Loader(prepared((30, 30)), seed=0).batch((0,))
    assert torch.equal(batch.latents[:, 0, 0, 0, 0].long(), batch.index)
    assert batch.mask is not None
    assert torch.equal(batch.mask.sum(1), batch.index % 3 + 1)
    assert batch.vectors.shape == (30, 3, 4)
    for vectors, mask, index in zip(batch.vectors, batch.mask, batch.index.tolist(), strict=True):
        assert (vectors[mask] == index % 3 + 1).all()
        assert not vectors[~mask].any()


def test_captions_are_padded_to_the_longest_of_their_batch_and_have_no_mask_where_all_are_equally_long() -> None:
    loader = Loader(prepared((60, 1)), seed=0)
    for position in range(60):
        batch = loader.batch((position,))
        assert batch.mask is None
        assert batch.vectors.shape == (1, int(batch.index) % 3 + 1, 4)
    pair = Loader(prepared((60, 2)), seed=0)
    for position in range(0, 60, 2):
        batch = pair.batch((position,))
        lengths = batch.index % 3 + 1
        assert batch.vectors.shape[1] == lengths.max()
        assert (batch.mask is None) == (lengths[0] == lengths[1])


def test_half_types_of_the_cache_become_fp32() -> None:
    data = prepared((8, 8))
    data.parts[0].shard.large = data.parts[0].shard.large.half()
    data.text_shard.large = data.text_shard.large.bfloat16()
    batch = Loader(data, seed=0).batch((0,))
    assert batch.latents.dtype == batch.vectors.dtype == torch.float32
    assert torch.equal(batch.latents[:, 0, 0, 0, 0].long(), batch.index)


def test_a_batch_that_is_there_already_is_not_copied() -> None:
    batch = Loader(prepared((8, 8)), seed=0).batch((0,))
    assert batch.to(CPU) is batch


# ------------------------------------------------------------------------------------------------------------------
# Mirrored clips
# ------------------------------------------------------------------------------------------------------------------


def test_a_clip_is_mirrored_by_a_draw_of_its_own_in_each_epoch() -> None:
    clips = 400
    stream = Stream(0, clips)
    by_clip = np.empty((6, clips), np.int64)
    for epoch in range(6):
        by_clip[epoch, stream.clips_at(epoch * clips, clips)] = stream.mirrors(epoch * clips, clips)
    shares = by_clip.mean(1)
    assert ((shares > 0.4) & (shares < 0.6)).all()
    alike = [(one == other).mean() for one, other in itertools.combinations(by_clip, 2)]
    assert min(alike) > 0.35 and max(alike) < 0.65  # independent draws agree on half


def test_mirroring_differs_between_ranks_epochs_and_seeds_and_repeats_on_a_resume() -> None:
    data = prepared((64, 32), mirrored=True)

    def drawn(seed: int, rank: int, position: int) -> tuple[bool, ...]:
        return tuple((Loader(data, seed=seed, rank=rank, world=2).batch((position,)).latents[:, 0, 0, 0, 0] < 0).tolist())

    keys = list(itertools.product((0, 1), (0, 1), (0, 64, 128)))
    draws = [drawn(*key) for key in keys]
    assert len(set(draws)) == len(draws)
    assert [drawn(*key) for key in keys] == draws


def test_a_mirrored_clip_is_its_own_mirror_image() -> None:
    batch = Loader(prepared((64, 64), mirrored=True), seed=0).batch((0,))
    values = batch.latents[:, 0, 0, 0, 0].long()
    assert torch.equal(torch.where(values < 0, -1 - values, values), batch.index)
    assert 0 < (values < 0).sum() < 64


def test_nothing_is_mirrored_where_the_stage_does_not_ask() -> None:
    batch = Loader(prepared((64, 64)), seed=0).batch((0,))
    assert (batch.latents >= 0).all()


# ------------------------------------------------------------------------------------------------------------------
# Reading ahead
# ------------------------------------------------------------------------------------------------------------------


def test_reading_ahead_gives_the_same_batches_wherever_one_jumps() -> None:
    data = prepared((30, 4), (11, 2), mirrored=True)
    plain = Loader(data, seed=1)
    seen = plain.start
    with Ahead(Loader(data, seed=1), depth=3) as ahead:
        for step in range(25):
            if step == 10:
                seen = (8, 2)  # back to a checkpoint
            ours, theirs = ahead.batch(seen), plain.batch(seen)
            assert (ours.bucket, ours.index.tolist()) == (theirs.bucket, theirs.index.tolist())
            assert torch.equal(ours.latents, theirs.latents)
            seen = plain.after(seen)


def test_an_error_ahead_is_raised_where_its_batch_is_asked_for() -> None:
    data = prepared((30, 4))
    shard = data.text_shard
    assert isinstance(shard, Held)
    with Ahead(Loader(data, seed=1), CPU, depth=2) as ahead:
        ahead.batch((0,))
        while shard.checks < 3:  # the two after it are read
            time.sleep(0.001)
        shard.whole = False
        batches = []
        with pytest.raises(DataError, match="cut"):
            for seen in ((4,), (8,), (12,)):
                batches.append(ahead.batch(seen))
        assert [len(batch.index) for batch in batches] == [4, 4]


def test_reading_ahead_ends_with_its_block() -> None:
    before = threading.active_count()
    with Ahead(Loader(prepared((30, 4)), seed=1)) as ahead:
        ahead.batch((0,))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
