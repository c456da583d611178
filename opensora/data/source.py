"""The protocol of a source of captioned clips, and the source that a stage's data section names.

Owns the protocol. Refuses to decode, encode or order anything: sources decode, `latents.cache` encodes, `latents.loader` orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from opensora.config import DataConfig, DigitsSource, FolderSource, ManifestSource
from opensora.data.buckets import Size
from opensora.dataset.manifest import DataManifest
from opensora.errors import ConfigError

PIXELS_AT_ONCE = 1 << 28
"""The most bytes of decoded clips that are held at once."""
CLIPS_AT_ONCE = 256


class Clips(Protocol):
    """Captioned clips, each cut to one of a stage's sizes. Clip i, its caption and its bucket never change while the source exists. Some
    clips may turn out unreadable."""

    words: Sequence[str]
    """Words that prompts and later stages may use beside those of `captions`."""
    skipped: Mapping[str, str]
    """Each clip that could not be used so far → the reason."""
    digest: str
    """Hex digest over everything that frames and captions depend on. Cheap: no clip is opened for it."""
    dated: str
    """The digest that is used if the contents were not recorded: over dates of files. For synthetic clips it equals `digest`."""
    sizes: tuple[Size, ...]
    """The size of each bucket."""

    @property
    def remarks(self) -> Sequence[str]:
        """Other sentences about the clips, for people. They are complete once all buckets have been read."""

    @property
    def captions(self) -> Sequence[str]:
        """The caption of clip i, readable or not."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of clips of each bucket, readable or not."""

    def __len__(self) -> int:
        """Number of clips, readable or not."""

    def read(self, start: int, stop: int, bucket: int = 0) -> tuple[torch.Tensor, list[int]]:
        """The readable clips among numbers start..stop−1 of a bucket, uint8 (n, T, H, W, 3), and the global indices of these n clips."""


def at_once(size: Size) -> int:
    """How many clips of this size to read at a time."""
    return max(1, min(CLIPS_AT_ONCE, PIXELS_AT_ONCE // size.values))


def read_all(clips: Clips, bucket: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """The readable clips of one bucket, in order, some at a time: what `Clips.read` returns, without empty batches."""
    count, step = clips.counts[bucket], at_once(clips.sizes[bucket])
    for start in range(0, count, step):
        batch, indices = clips.read(start, min(start + step, count), bucket)
        if indices:
            yield batch, indices


def none_usable(clips: Clips) -> ConfigError:
    """The error to raise if not one clip could be read."""
    name, reason = next(iter(clips.skipped.items()))
    return ConfigError(f"data.source: none of {len(clips)} clips can be used; {name}: {reason}. Mend the files, or ask for fewer frames")


def open_clips(data: DataConfig, seed: int, recorded: DataManifest | None = None) -> Clips:
    """The clips that a stage trains on; `seed` makes synthetic ones.

    Args:
        recorded: the manifest that the launch recorded. None means there is none, or clips are synthetic.

    Raises:
        ConfigError: the source cannot be used.
        DataError: the source is not what was recorded.
    """
    # Imported here: files need PyAV, digits need scikit-learn, and a stage needs one of the two.
    match data.source:
        case DigitsSource():
            from opensora.data.digits import DigitClips

            return DigitClips(data, seed=seed)
        case FolderSource() | ManifestSource():
            from opensora.data.folder import FileClips

            return FileClips(data, recorded)
