"""A real AutoencoderKL and a real T5 of a few thousand weights, saved as their libraries save them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

WIDTH = 16
"""Of T5's vectors."""


def make_autoencoder(folder: Path, *, seed: int = 0, channels: int = 4, **changes: object) -> AutoencoderKL:
    """Two pixels per latent."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = AutoencoderKL(block_out_channels=(8, 16), latent_channels=channels, norm_num_groups=4, layers_per_block=1, **blocks, **changes)
    made.eval().save_pretrained(folder)
    return made


def make_text(folder: Path, tokenizer: Path | None = None, *, seed: int = 0, rows: int = 384) -> T5EncoderModel:
    """Its tokens are bytes."""
    torch.manual_seed(seed)
    made = T5EncoderModel(T5Config(vocab_size=rows, d_model=WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=4)).eval()
    made.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(tokenizer or folder)
    return made
