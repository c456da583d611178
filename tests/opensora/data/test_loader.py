"""Laws of the order of clips: nothing lost, nothing doubled, ranks apart, and a position is all that a resume needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora.data.latents import Prepared
from opensora.data.loader import Loader, stream
from opensora.encoders import PatchAutoencoder, WordEncoder


def prepared(clips: int) -> Prepared:
    """Latents that carry their own index; three captions."""
    latents = torch.arange(clips, dtype=torch.float32)[:, None, None, None, None].expand(clips, 2, 1, 2, 2).contiguous()
    text = WordEncoder(("one", "two", "three"), 4)
    vectors, mask = text.encode(("one", "one two", "one two three"), 3)
    autoencoder = PatchAutoencoder(torch.zeros(48), torch.eye(2, 48), torch.ones(2), 4)
    rows = torch.arange(clips) % 3
    return Prepared(Path(), "", autoencoder, text, latents, ("one", "one two", "one two three"), rows, vectors, mask, {})


sizes = st.tuples(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 5))


@given(sizes, st.integers(1, 4))
def test_no_clip_is_lost_or_doubled_within_an_epoch(size: tuple[int, int, int, int], epochs: int) -> None:
    clips, batch, world, seed = size
    loaders = [Loader(prepared(clips), seed=seed, batch_size=batch, rank=rank, world=world) for rank in range(world)]
    seen: list[int] = []
    while len(seen) < epochs * clips:
        position = len(seen)
        for loader in loaders:
            seen += loader.batch(position).index.tolist()
        assert len(seen) == position + loaders[0].clips_per_step
    for epoch in range(epochs):
        assert sorted(seen[epoch * clips : (epoch + 1) * clips]) == list(range(clips))


@given(sizes, st.integers(0, 500))
def test_a_batch_is_a_function_of_the_position_alone(size: tuple[int, int, int, int], position: int) -> None:
    clips, batch, world, seed = size
    data = prepared(clips)
    walked = Loader(data, seed=seed, batch_size=batch, rank=world - 1, world=world)
    for earlier in range(0, position, 50):
        walked.batch(earlier)
    fresh = Loader(data, seed=seed, batch_size=batch, rank=world - 1, world=world)
    assert torch.equal(walked.batch(position).index, fresh.batch(position).index)


@given(st.integers(20, 60), st.integers(0, 5), st.integers(0, 200))
def test_another_number_of_ranks_continues_the_same_stream(clips: int, seed: int, position: int) -> None:
    data = prepared(clips)
    four = [
        index for rank in range(4) for index in Loader(data, seed=seed, batch_size=3, rank=rank, world=4).batch(position).index.tolist()
    ]
    two = [index for rank in range(2) for index in Loader(data, seed=seed, batch_size=6, rank=rank, world=2).batch(position).index.tolist()]
    assert four == two


def test_ranks_of_a_step_have_different_clips() -> None:
    batches = [Loader(prepared(64), seed=0, batch_size=8, rank=rank, world=4).batch(0).index.tolist() for rank in range(4)]
    assert len({index for batch in batches for index in batch}) == 32


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(stream(seed, 50, epoch * 50, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert tuple(np.arange(50)) not in orders


def test_a_clip_comes_with_its_own_caption() -> None:
    batch = Loader(prepared(30), seed=0, batch_size=30).batch(0)
    assert torch.equal(batch.latents[:, 0, 0, 0, 0].long(), batch.index)
    assert torch.equal(batch.mask.sum(1), batch.index % 3 + 1)
    assert batch.vectors.shape == (30, 3, 4)
    assert not batch.vectors[~batch.mask].any()
