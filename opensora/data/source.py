"""What a source of captioned clips is, and which one a stage's data section names.

Owns the protocol. Refuses to decode, encode or order anything: sources decode, `latents` encodes, `loader` orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from opensora.config import DataConfig, DigitsSource, FolderSource, ManifestSource
from opensora.data.buckets import Size
from opensora.data.manifest import DataManifest
from opensora.errors import ConfigError

PIXELS_AT_ONCE = 1 << 28
"""Bytes of decoded clips that are held at once."""
CLIPS_AT_ONCE = 256


class Clips(Protocol):
    """Captioned clips, each cut to one of a stage's sizes. Clip i, its caption and its bucket never change while the source lives; some may
    turn out unreadable."""

    words: Sequence[str]
    """What prompts may say beside `captions`: later stages and prompts know these words too."""
    skipped: Mapping[str, str]
    """Each clip that could not be used so far → the reason."""
    digest: str
    """Hex digest over everything that frames and captions depend on. Cheap: nothing is opened for it."""
    dated: str
    """The digest where nobody recorded the contents: by dates of files. Of synthetic clips the same as `digest`."""
    sizes: tuple[Size, ...]
    """Of each bucket."""

    @property
    def captions(self) -> Sequence[str]:
        """Caption of clip i, readable or not."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Clips of each bucket, readable or not."""

    def __len__(self) -> int:
        """Clips, readable or not."""

    def read(self, start: int, stop: int, bucket: int = 0) -> tuple[torch.Tensor, list[int]]:
        """Of a bucket's clips number start..stop−1 those that can be read, uint8 (n, T, H, W, 3), and which clips of all these n are."""


def at_once(size: Size) -> int:
    """Clips of this size to read at a time."""
    return max(1, min(CLIPS_AT_ONCE, PIXELS_AT_ONCE // size.values))


def read_all(clips: Clips, bucket: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """The readable clips of one bucket, in order, some at a time; as `Clips.read`, and never none."""
    count, step = clips.counts[bucket], at_once(clips.sizes[bucket])
    for start in range(0, count, step):
        batch, indices = clips.read(start, min(start + step, count), bucket)
        if indices:
            yield batch, indices


def none_usable(clips: Clips) -> ConfigError:
    """What to raise where not one clip could be read."""
    name, reason = next(iter(clips.skipped.items()))
    return ConfigError(f"data.source: none of {len(clips)} clips can be used; {name}: {reason}. Mend the files, or ask for fewer frames")


def open_clips(data: DataConfig, seed: int, recorded: DataManifest | None = None) -> Clips:
    """The clips that a stage trains on; `seed` makes synthetic ones.

    Args:
        recorded: what the launch found; none: nobody wrote it down, or clips are synthetic.

    Raises:
        ConfigError: for a source that cannot be used.
        DataError: for one that is not what was recorded.
    """
    # Imported here: files need PyAV, digits need scikit-learn, and a stage needs one of the two.
    match data.source:
        case DigitsSource():
            from opensora.data.digits import DigitClips

            return DigitClips(data, seed=seed)
        case FolderSource() | ManifestSource():
            from opensora.data.folder import FileClips

            return FileClips(data, recorded)
