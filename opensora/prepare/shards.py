"""A part of a preparation's sources, for a process that is one of several: each looks at its own and cuts them; one merges.

Owns which source is in which shard: by its address alone, so that all agree whatever else is listed. Refuses to know where the results go.
"""

from __future__ import annotations

from dataclasses import dataclass

from opensora.dataset.prepare_config import PrepareConfig
from opensora.dataset.rows import Source
from opensora.prepare.digests import key_of


@dataclass(frozen=True)
class Shard:
    number: int
    """From 0."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of `NUMBER/OF`. Raises ValueError."""
        number, _, of = text.partition("/")
        shard = cls(int(number), int(of))
        if not 0 <= shard.number < shard.of:
            raise ValueError(f"{text}: the first shard of 4 is 0/4, the last is 3/4")
        return shard

    def has(self, source: Source) -> bool:
        return int(key_of(source.uri), 16) % self.of == self.number

    def configured(self, config: PrepareConfig) -> PrepareConfig:
        """For a shard alone: near duplicates, and how many rows could not be worked on, are told over the whole set by who merges."""
        judged = config.filter.model_copy(update={"duplicates": None})
        return config.model_copy(update={"filter": judged, "max_quarantined": 1.0})
