"""STDiT: the spatial-temporal diffusion transformer of Open-Sora 1.0, in any depth, width, number of frames and size.

Owns the network and its initial weights. Refuses to know what its output means (`opensora.diffusion.iddpm`, `opensora.diffusion.flow`),
how captions are guided (`opensora.diffusion.guidance`) and where weights come from (`opensora.checkpoint.foreign`). `forward` draws no
random numbers: which captions are dropped is an argument, so a resumed run gives the same bits as an uninterrupted one.

References: Open-Sora 1.0 (hpcaitech, report v1, March 2024) · DiT (Peebles & Xie, arXiv:2212.09748) ·
PixArt-α (Chen et al., arXiv:2310.00426: adaLN-single, cross-attention).

Legend: B batch · T latent frames · S spatial tokens of a frame · D width · N heads · L text tokens · C latent channels.
Frames, rows and columns count latents in `input_size`, and tokens (latents divided by patch) everywhere else.

Under autocast the residual stream has the type of the matrix products. Vectors that are added to it or multiplied with it are cast to
that type; otherwise type promotion would make the stream fp32, and everything between the products would move twice the memory.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from opensora.config import Activations, ModelConfig
from opensora.model.activations import in_chunks, run_blocks
from opensora.model.linear import Linear
from opensora.model.routing import Route
from opensora.model.sequence_parallel import Cut, Sequence

# ------------------------------------------------------------------------------------------------------------------
# Position tables: pure functions in fp64
# ------------------------------------------------------------------------------------------------------------------


def sincos(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions at `width`/2 geometric frequencies from 1 down to almost 1/10000: (n,) -> (n, width)."""
    frequencies = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def spatial_table(rows: int, columns: int, width: int, scale: float) -> Tensor:
    """(S, D) fp64; the column index runs fastest. The first half of the channels encodes the column, the second half the row."""
    across = sincos(torch.arange(columns, dtype=torch.float64) / scale, width // 2)
    down = sincos(torch.arange(rows, dtype=torch.float64) / scale, width // 2)
    return torch.cat([across.repeat(rows, 1), down.repeat_interleave(columns, dim=0)], dim=1)


def temporal_table(frames: int, width: int, scale: float) -> Tensor:
    """(T, D) fp64."""
    return sincos(torch.arange(frames, dtype=torch.float64) / scale, width)


# ------------------------------------------------------------------------------------------------------------------
# Embedders
# ------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = Linear(width_in, hidden)
        self.fc2 = Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class PatchEmbedder(nn.Module):
    """Each patch of latents becomes a token, by a linear map of its values: upstream's strided convolution, flattened."""

    def __init__(self, channels: int, patch: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = Linear(channels * math.prod(patch), width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) latents -> (B, T, S, D) tokens."""
        pt, ph, pw = self.patch
        patches = rearrange(x, "B C (T pt) (H ph) (W pw) -> B T (H W) (C pt ph pw)", pt=pt, ph=ph, pw=pw)
        out: Tensor = self.proj(patches)
        return out


WAVES = 128
"""Number of cosines, and of sines, that encode a diffusion time."""


class TimeEmbedder(nn.Module):
    """Diffusion times -> vectors: 128 cosines and 128 sines, then Linear-SiLU-Linear."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(2 * WAVES, width)
        self.fc2 = Linear(width, width)
        # fp32 on purpose: fp64 angles move the outputs by 1.1e-5 of their maximum away from upstream's
        exponents = -math.log(10_000) * torch.arange(WAVES, dtype=torch.float32) / WAVES
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """(B,) in the range of 0 to 1000 -> (B, D)."""
        angles = time.float()[:, None] * self.frequencies.float()  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # cosine first, unlike the position tables
        out: Tensor = self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))
        return out


# ------------------------------------------------------------------------------------------------------------------
# Block
# ------------------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Multi-head attention among the n tokens of each of M sequences. Softmax is computed in fp32 by every kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(M, n, D) -> (M, n, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # 3 x (M, N, n, d)
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Every token of a clip attends to the kept tokens of that clip's own caption."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, captions: Tensor, keep: Tensor | None) -> Tensor:
        """x (B, n, D), captions (B, L, D), keep (B, 1, 1, L) bool -> (B, n, D). `keep` None means all tokens are kept."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, n, d)
        k, v = self.key_value(captions).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)  # 2 x (B, N, L, d)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def per_token(table: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Vectors (B, n, D), or (B, T, n, D) of each frame -> n x (B, 1 or T, 1, D), to be added to tokens (B, T, S, D) or multiplied."""
    by_frame = table.to(dtype)[:, None] if table.ndim == 3 else table.to(dtype)
    return list(by_frame[:, :, :, None].unbind(2))


class STDiTBlock(nn.Module):
    """Spatial attention, temporal attention, cross-attention and an MLP, each added to the residual stream.

    Only the inputs of spatial attention and MLP are normalised and modulated by the diffusion time (adaLN-single: one vector for all
    blocks, plus this block's learned table). Temporal attention reads the raw stream and uses the spatial attention's gate; its output
    layer starts at zero, so that a video model starts as the image model it was made from.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.spatial_attention = SelfAttention(width, heads)
        self.temporal_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), width)
        self.mlp_chunks = 1
        self.modulation = nn.Parameter(torch.empty(6, width))
        self.skip_temporal = False

    def forward(
        self, x: Tensor, captions: Tensor, keep: Tensor | None, time6: Tensor, position: Tensor | None, cut: Cut | None = None
    ) -> Tensor:
        """x (B, T, S, D), captions (B, L, D), position (T, 1, D) only for temporal attention.

        `time6` is (B, 6, D), or (B, T, 6, D) where frames have times of their own. `cut` says how the clip is divided over several ranks;
        x is then this rank's frames, and T of `time6` are all. None means one rank has the whole clip.
        """
        batch, frames = x.shape[:2]
        modulation = per_token(self.modulation + time6, x.dtype)  # 6 x (B, 1 or T, 1, D)
        gate_temporal = modulation[2]  # of all frames
        if cut is not None and time6.ndim == 4:
            modulation = [cut.own_frames(part) for part in modulation]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation

        spatial = self.spatial_attention(modulate(self.norm1(x), shift_msa, scale_msa).flatten(0, 1))  # (B·T, S, D)
        x = x + gate_msa * spatial.unflatten(0, (batch, frames))

        if not self.skip_temporal:
            x = x if cut is None else cut.to_tokens(x)
            stream = x if position is None else x + position
            temporal = self.temporal_attention(rearrange(stream, "B T S D -> (B S) T D"))
            x = x + gate_temporal * rearrange(temporal, "(B S) T D -> B T S D", B=batch)
            x = x if cut is None else cut.to_frames(x)

        x = x + self.cross_attention(x.flatten(1, 2), captions, keep).unflatten(1, (frames, -1))
        out: Tensor = x + gate_mlp * in_chunks(self.mlp, modulate(self.norm2(x), shift_mlp, scale_mlp), self.mlp_chunks)
        return out


class FinalLayer(nn.Module):
    """Tokens -> patches of the prediction, modulated by the time embedding itself."""

    def __init__(self, width: int, patch_numbers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(width, patch_numbers)
        self.modulation = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, T, S, D), time (B, D) or (B, T, D) -> (B, T, S, pt·ph·pw·C_out)."""
        shift, scale = per_token(self.modulation + time.unsqueeze(-2), x.dtype)  # 2 x (B, 1 or T, 1, D)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out


# ------------------------------------------------------------------------------------------------------------------
# STDiT
# ------------------------------------------------------------------------------------------------------------------


class STDiT(nn.Module):
    """The whole network, for latents of any size: position tables are computed from the size and never saved.

    Args:
        config: depth, width and the like; the defaults are XL/2, 760 million parameters (724 x 2^20, hence the report's 724M).
        input_size: latent frames, rows and columns (T, H, W) of the size that `config.space_scale` is meant for. The positions of clips
            with another area are spread over the same range.
        out_channels: channels of the prediction, of which the first `latent_channels` are guided.
        generator: draws the initial weights. None means torch's global generator.
        initial: whether to draw the initial weights. Give False if a whole state dict is loaded next: until then they are uninitialised.

    Raises:
        ValueError: the latents do not divide into patches, or the width is not a multiple of 4.
    """

    null_caption: Tensor

    def __init__(
        self,
        config: ModelConfig,
        input_size: tuple[int, int, int],
        out_channels: int,
        *,
        generator: torch.Generator | None = None,
        initial: bool = True,
    ) -> None:
        super().__init__()
        if config.width % 4:
            raise ValueError(f"width {config.width} is not a multiple of 4: rows and columns each need sines and cosines")
        self.config, self.input_size, self.out_channels = config, input_size, out_channels
        self.grid_of(input_size)
        self.activations = Activations()
        self.sequence: Sequence | None = None
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        width = config.width

        self.patch_embedder = PatchEmbedder(config.latent_channels, config.patch, width)
        self.time_embedder = TimeEmbedder(width)
        self.time_block = Linear(width, 6 * width)
        self.caption_embedder = MLP(config.caption_width, width, width)
        # raw caption vectors, not trained: upstream inherits them from PixArt-α as a buffer
        self.register_buffer("null_caption", torch.empty(config.caption_tokens, config.caption_width))
        blocks = [STDiTBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth)]
        self.blocks = cast("list[STDiTBlock]", nn.ModuleList(blocks))  # a ModuleList forgets what it holds
        self.final_layer = FinalLayer(width, math.prod(config.patch) * out_channels)

        self.temporal_frozen = False
        self.register_load_state_dict_post_hook(_refresh_skip)  # type: ignore[no-untyped-call]
        if initial:
            self.initialise(generator)

    def grid_of(self, latent_size: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns of latents (T, H, W).

        Raises:
            ValueError: the latents do not divide into patches.
        """
        for name, size, patch in zip(("frames", "rows", "columns"), latent_size, self.config.patch, strict=True):
            if size <= 0 or size % patch:
                raise ValueError(f"latent {name} {size} do not divide into patches of {patch}")
        frames, rows, columns = (size // patch for size, patch in zip(latent_size, self.config.patch, strict=True))
        return frames, rows, columns

    def position_tables(self, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Spatial (S, D) and temporal (T, 1, D) position tables of a clip with this token grid; made once for each size."""
        key = (grid, device, dtype)
        if key not in self._tables:
            (frames, rows, columns), config = grid, self.config
            _, own_rows, own_columns = self.grid_of(self.input_size)
            space_scale = config.space_scale * math.sqrt(rows * columns / (own_rows * own_columns))
            spatial = spatial_table(rows, columns, config.width, space_scale).to(device, dtype)
            temporal = temporal_table(frames, config.width, config.time_scale)[:, None].to(device, dtype)
            self._tables[key] = spatial, temporal
        return self._tables[key]

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        captions: Tensor,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        given: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """The prediction for noisy latents, in fp32.

        Args:
            x: (B, C, T, H, W) noisy latents.
            time: (B,) diffusion times, 0 (clean) to 1000 (noise), integer or not.
            captions: (B, L, caption_width) token vectors.
            mask: (B, L), non-zero where a token is kept. None means that all are kept.
            drop: (B,) bool, clips that see the null caption in place of theirs. Their mask stays, as upstream. None means no clip does.
            given: (B, T) bool, latent frames that are clean: they are modulated as at time 0. The frames of a token are given together.
            route: tubes of tokens that skip the middle blocks, in training. None means none does.

        Returns:
            (B, C_out, T, H, W).

        Raises:
            ValueError: the shapes do not fit this model.
        """
        self._check(x, captions, mask)
        frames, rows, columns = grid = self.grid_of(tuple(x.shape[2:]))
        cut, patch_frames = None, self.config.patch[0]
        if self.sequence is not None:
            cut = self.sequence.cut(frames, rows * columns)
            whole = rearrange(x, "B C (T pt) H W -> B C T pt H W", pt=patch_frames)
            x = self.sequence.own_frames(whole, 2, frames).flatten(2, 3)

        dtype = self.patch_embedder.proj.weight.dtype
        tokens = self.patch_embedder(x.to(dtype))  # (B, T, S, D)
        spatial, temporal = self.position_tables(grid, tokens.device, tokens.dtype)
        tokens = tokens + spatial
        if self.config.temporal_position == "residual":
            tokens = tokens + (temporal if self.sequence is None else self.sequence.own_frames(temporal, 0, frames))

        embedded = self.time_embedder(time)  # (B, D)
        time6 = self.time_block(F.silu(embedded)).unflatten(-1, (6, -1))  # (B, 6, D)
        if given is not None:
            of_clean = self.time_embedder(torch.zeros_like(time[:1]))  # (1, D)
            clean6 = self.time_block(F.silu(of_clean)).unflatten(-1, (6, -1))  # (1, 6, D)
            held = given[:, ::patch_frames, None]  # (B, T, 1)
            embedded = torch.where(held, of_clean[:, None], embedded[:, None])  # (B, T, D)
            time6 = torch.where(held[..., None], clean6[:, None], time6[:, None])  # (B, T, 6, D)

        if drop is not None:
            captions = torch.where(drop[:, None, None], self.null_caption[: captions.shape[1]], captions)
        text = self.caption_embedder(captions.to(dtype))  # (B, L, D)
        keep = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, L)

        position = temporal if self.config.temporal_position == "attention" else None

        def run(x: Tensor, first: int, stop: int, cut: Cut | None) -> Tensor:
            def through(index: int, block: nn.Module, x: Tensor) -> Tensor:
                told = position if first + index == 0 else None  # block 0 alone is told the position
                out: Tensor = block(x, text, keep, time6, told, cut)
                return out

            return run_blocks(list(self.blocks)[first:stop], x, through, self.activations)

        if route is None:
            tokens = run(tokens, 0, len(self.blocks), cut)
        else:
            tokens = run(tokens, 0, route.first, cut)
            cut_of_some = None if self.sequence is None else self.sequence.cut(frames, route.through.shape[1])
            tokens = route.put(tokens, run(route.take(tokens), route.first, route.stop, cut_of_some))  # (B, T, S', D) in between
            tokens = run(tokens, route.stop, len(self.blocks), cut)
        if cut is not None and given is not None:
            embedded = cut.own_frames(embedded)
        patches = self.final_layer(tokens, embedded)  # (B, T, S, pt·ph·pw·C_out)
        return self.unpatchify(patches if cut is None else cut.collect(patches), rows, columns).float()

    def unpatchify(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """(B, T, S, pt·ph·pw·C_out), channel fastest -> (B, C_out, T, H, W)."""
        pt, ph, pw = self.config.patch
        return rearrange(
            patches, "B T (H W) (pt ph pw C) -> B C (T pt) (H ph) (W pw)", H=rows, W=columns, pt=pt, ph=ph, pw=pw, C=self.out_channels
        )

    def keep(self, activations: Activations) -> None:
        """Set what each forward pass keeps for the backward pass; `auto` must have been resolved before."""
        self.activations = activations
        for block in self.blocks:
            block.mlp_chunks = activations.mlp_chunks

    def freeze_temporal(self) -> None:
        """Stop training temporal attention. A block whose temporal output layer is zero does not compute it at all."""
        self.temporal_frozen = True
        for block in self.blocks:
            block.temporal_attention.requires_grad_(False)
            proj = block.temporal_attention.proj
            block.skip_temporal = not (proj.weight.any() or proj.bias.any())

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Set the initial weights of Open-Sora 1.0. Every parameter is drawn from `generator` or is constant."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)
        embedder = self.patch_embedder.proj
        bound = embedder.in_features**-0.5  # torch's default for a convolution, which upstream keeps
        nn.init.uniform_(embedder.bias, -bound, bound, generator=generator)

        time, caption = self.time_embedder, self.caption_embedder
        for small in (time.fc1, time.fc2, self.time_block, caption.fc1, caption.fc2):
            nn.init.normal_(small.weight, std=0.02, generator=generator)
        nn.init.normal_(self.null_caption, std=self.config.caption_width**-0.5, generator=generator)
        for table in [block.modulation for block in self.blocks] + [self.final_layer.modulation]:
            nn.init.normal_(table, std=self.config.width**-0.5, generator=generator)

        # at the start captions have no effect, frames do not see each other, and the prediction is zero
        for block in self.blocks:
            nn.init.zeros_(block.cross_attention.proj.weight)
            nn.init.zeros_(block.temporal_attention.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def _check(self, x: Tensor, captions: Tensor, mask: Tensor | None) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents of (B, C, T, H, W) {tuple(x.shape)} do not fit a model of {self.config.latent_channels} channels")
        most, width = self.null_caption.shape
        if captions.ndim != 3 or captions.shape[2] != width or captions.shape[1] > most:
            raise ValueError(
                f"captions of (B, L, width) {tuple(captions.shape)} do not fit a model of at most {most} tokens of width {width}"
            )
        if mask is not None and mask.shape != captions.shape[:2]:
            raise ValueError(f"a mask of {tuple(mask.shape)} does not fit captions of {tuple(captions.shape[:2])}")
        if x.shape[0] != captions.shape[0]:
            raise ValueError(f"{x.shape[0]} clips do not fit {captions.shape[0]} captions")


def _refresh_skip(model: nn.Module, _: object) -> None:
    """Decide again which blocks skip temporal attention: the new weights may have an effect that the frozen ones had not."""
    if isinstance(model, STDiT) and model.temporal_frozen:
        model.freeze_temporal()
