"""Floating-point operations and parameters of an STDiT, from its configuration alone: no torch, so the control plane can plan.

Counts what the arithmetic needs: multiplications and additions of every linear layer and of attention's two products,
as torch's FlopCounterMode does. Leaves out what is not a matrix product (norms, gates, softmax, GELU: below 1% at XL/2),
recomputation under gradient checkpointing, and the frozen encoders: a speed measured against these numbers counts useful
work only.

Legend: T latent frames · S spatial tokens of a frame · D width · L text tokens · C latent channels. Tokens of a clip: T·S.
"""

from __future__ import annotations

import math

from opensora.config import Activations, Bucket, DataConfig, ModelConfig, RoutingConfig, StageConfig

TIME_WAVES = 256
"""Sines and cosines of the time embedding."""

BACKWARD = 2
"""A backward pass costs two forward ones: gradients of the inputs and of the weights (Kaplan et al., arXiv:2001.08361 §2.1)."""


def parameters(model: ModelConfig, out_channels: int) -> int:
    """Trained numbers; the null caption is a buffer and not among them.

    XL/2 with 8 output channels has 759,620,768: the 724M of Open-Sora 1.0's report, which counts in units of 2^20.
    """
    width, patch = model.width, math.prod(model.patch)
    time = _weights(TIME_WAVES, width) + _weights(width, width) + _weights(width, 6 * width)
    caption = _weights(model.caption_width, width) + _weights(width, width)
    ends = _weights(model.latent_channels * patch, width) + _weights(width, patch * out_channels) + 2 * width
    return model.depth * block_parameters(model) + time + caption + ends


def block_parameters(model: ModelConfig) -> int:
    """Of one block."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    cross_attention = _weights(width, width) + _weights(width, 2 * width) + _weights(width, width)
    mlp = _weights(width, hidden) + _weights(hidden, width)
    return 2 * temporal_parameters(model) + cross_attention + mlp + 6 * width


def matrix_parameters(model: ModelConfig, *, temporal: bool = True) -> int:
    """Of all blocks, the weights of linear layers without their biases: what `optimizer.matrices` is about."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    attention = 4 * width * width
    return model.depth * (attention * (3 if temporal else 2) + 2 * width * hidden)


def temporal_parameters(model: ModelConfig) -> int:
    """Of one block's temporal attention, which `freeze: temporal` does not train; its spatial one has as many."""
    return _weights(model.width, 3 * model.width) + _weights(model.width, model.width)


def forward_flops(
    model: ModelConfig,
    out_channels: int,
    frames: int,
    tokens: int,
    *,
    captions: int | None = None,
    temporal: bool = True,
    routing: RoutingConfig | None = None,
) -> int:
    """One clip through the network once.

    Args:
        frames: T.
        tokens: S.
        captions: L, padding included; none: `caption_tokens`.
        temporal: whether the temporal attention is computed; frozen at zero effect it is not.
        routing: tokens that skip blocks, as a training step has them; none: all go through all.
    """
    length = model.caption_tokens if captions is None else captions

    def block(through: int) -> int:
        spatial = _self_attention(model.width, frames * through, through)
        across = _self_attention(model.width, frames * through, frames) if temporal else 0
        return spatial + across + _beside_self_attention(model, frames * through, length)

    some = routed_blocks(model, routing)
    through = tokens if routing is None else routing.tubes_through(tokens)
    return _ends(model, out_channels, frames * tokens, length) + (model.depth - some) * block(tokens) + some * block(through)


def routed_blocks(model: ModelConfig, routing: RoutingConfig | None) -> int:
    """How many blocks a part of the tokens skips."""
    return 0 if routing is None else model.depth - routing.first_blocks - routing.last_blocks


def full_attention_flops(model: ModelConfig, out_channels: int, frames: int, tokens: int) -> int:
    """The same for a DiT of equal size whose one self-attention joins all T·S tokens: what STDiT saves."""
    count, length = frames * tokens, model.caption_tokens
    block = _self_attention(model.width, count, count) + _beside_self_attention(model, count, length)
    return _ends(model, out_channels, count, length) + model.depth * block


def train_flops_per_clip(stage: StageConfig, size: Bucket | None = None) -> float:
    """Forward and backward of one clip of this size (none: `data`'s), without recomputation, as the stage trains: with its routing."""
    return float(_training_forward(stage, size or stage.data) * (1 + BACKWARD))


def _training_forward(stage: StageConfig, size: Bucket | DataConfig) -> int:
    frames, tokens = stage.tokens_of(size)
    temporal = stage.freeze != "temporal"
    return forward_flops(stage.model, stage.out_channels, frames, tokens, temporal=temporal, routing=stage.routing)


def step_shares(stage: StageConfig) -> tuple[float, ...]:
    """The share of all steps that each bucket has, if all buckets have equally many clips: nobody knows before the clips are read."""
    batches = [1 / bucket.batch_size for bucket in stage.buckets]
    return tuple(one / sum(batches) for one in batches)


def data_ranks(stage: StageConfig, devices: int) -> float:
    """Groups of devices with clips of their own. Not whole where `ranks_per_clip` does not divide: the trainer refuses that."""
    return devices / stage.parallel.ranks_per_clip


def step_flops(stage: StageConfig, devices: int) -> float:
    """FLOPs of one step with all its parts, on all devices together, on average over the buckets."""
    shares = step_shares(stage)
    flops = (bucket.batch_size * train_flops_per_clip(stage, bucket) for bucket in stage.buckets)
    return sum(share * one for share, one in zip(shares, flops, strict=True)) * data_ranks(stage, devices) * stage.accumulate


def stage_flops(stage: StageConfig, devices: int) -> float:
    """Every step of a stage: the global batch is a rank's batch times `accumulate`, times devices over `parallel.sequence`."""
    return step_flops(stage, devices) * stage.steps


def executed(stage: StageConfig, size: Bucket | DataConfig, activations: Activations) -> float:
    """FLOPs of a training step over the useful ones: what recomputation adds. `selective` and a compiler add next to nothing."""
    frames, tokens = stage.tokens_of(size)
    forward, some = _training_forward(stage, size), routed_blocks(stage.model, stage.routing)
    through = tokens if stage.routing is None else stage.routing.tubes_through(tokens)
    mlp = 2 * _linear(frames, stage.model.width, int(stage.model.width * stage.model.mlp_ratio))
    mlp *= (stage.model.depth - some) * tokens + some * through
    again = forward * (activations.recompute == "full") + mlp * (activations.mlp_chunks > 1)
    return 1 + again / (forward * (1 + BACKWARD))


def _weights(rows: int, columns: int) -> int:
    """Of a linear layer, its bias included."""
    return rows * columns + columns


def _linear(rows: int, width_in: int, width_out: int) -> int:
    """A multiplication and an addition per weight and row."""
    return 2 * rows * width_in * width_out


def _self_attention(width: int, tokens: int, keys: int) -> int:
    """qkv, output layer (8 D² a token), and queries by keys and weights by values (4 D a token and key)."""
    return _linear(tokens, width, 4 * width) + 2 * _linear(tokens, width, keys)


def _beside_self_attention(model: ModelConfig, tokens: int, captions: int) -> int:
    """Of one block: cross-attention and MLP."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    cross_attention = _linear(tokens, width, 2 * width) + _linear(captions, width, 2 * width) + 2 * _linear(tokens, width, captions)
    return cross_attention + 2 * _linear(tokens, width, hidden)


def _ends(model: ModelConfig, out_channels: int, tokens: int, captions: int) -> int:
    """Of all that is not a block: embedders and last layer."""
    width, patch = model.width, math.prod(model.patch)
    time = _linear(1, TIME_WAVES, width) + _linear(1, width, width) + _linear(1, width, 6 * width)
    caption = _linear(captions, model.caption_width, width) + _linear(captions, width, width)
    return time + caption + _linear(tokens, model.latent_channels * patch, width) + _linear(tokens, width, patch * out_channels)
