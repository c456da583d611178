"""What a source of captioned clips is, and which one a stage's data section names.

Owns the protocol. Refuses to decode, encode or order anything: sources decode, `latents` encodes, `loader` orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from opensora.config import DataConfig, DigitsSource, FolderSource, ManifestSource
from opensora.errors import TrainerError


class Clips(Protocol):
    """Captioned clips of one size. Clip i and its caption never change while the source lives."""

    captions: Sequence[str]
    """Caption of clip i."""
    words: Sequence[str]
    """Captions that prompts may use beside `captions`: later stages and prompts know their words too."""
    skipped: Mapping[str, str]
    """Name of each clip that was left out → reason."""
    digest: str
    """Hex digest over everything that the frames and captions depend on."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Clips start..stop−1, uint8 (n, T, H, W, 3)."""


def open_clips(data: DataConfig, seed: int) -> Clips:
    """The clips that a stage trains on; `seed` makes synthetic ones.

    Raises:
        TrainerError: kind "config", for a source that cannot be used.
    """
    # Imported here: a folder needs PyAV, digits need scikit-learn, and a stage needs one of the two.
    match data.source:
        case DigitsSource():
            from opensora.data.digits import DigitClips

            return DigitClips(data, seed=seed)
        case FolderSource():
            from opensora.data.folder import FolderClips

            return FolderClips(data)
        case ManifestSource(path=path):
            raise TrainerError(
                f"data.source {path}: a manifest can be planned but not trained on in this release. Use a folder of clips (kind: folder)",
                kind="config",
            )
