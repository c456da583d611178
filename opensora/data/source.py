"""What a source of captioned clips is, and which one a stage's data section names.

Owns the protocol. Refuses to decode, encode or order anything: sources decode, `latents` encodes, `loader` orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from opensora.config import DataConfig, DigitsSource, FolderSource, ManifestSource
from opensora.errors import ConfigError


class Clips(Protocol):
    """Captioned clips of one size. Clip i and its caption never change while the source lives; some may turn out unreadable."""

    words: Sequence[str]
    """What prompts may say beside `captions`: later stages and prompts know these words too."""
    skipped: Mapping[str, str]
    """Each clip that could not be read so far → the reason."""
    digest: str
    """Hex digest over everything that frames and captions depend on. Cheap: nothing is decoded for it."""

    @property
    def captions(self) -> Sequence[str]:
        """Caption of clip i, readable or not."""

    def __len__(self) -> int:
        """Clips, readable or not."""

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, list[int]]:
        """Of clips start..stop−1 those that can be read, uint8 (n, T, H, W, 3), and their n indices."""


def none_usable(clips: Clips) -> ConfigError:
    """What to raise where not one clip could be read."""
    name, reason = next(iter(clips.skipped.items()))
    return ConfigError(f"data.source: none of {len(clips)} clips can be used; {name}: {reason}. Mend the files, or ask for fewer frames")


def open_clips(data: DataConfig, seed: int) -> Clips:
    """The clips that a stage trains on; `seed` makes synthetic ones.

    Raises:
        ConfigError: for a source that cannot be used.
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
            raise ConfigError(
                f"data.source {path}: a manifest can be planned but not trained on in this release. Use a folder of clips (kind: folder)"
            )
