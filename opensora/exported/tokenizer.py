"""From words to their numbers (`opensora.encoders.embedded.WordEncoder`). Captions are split as the vocabulary's were
(`opensora.dataset.words`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.dataset.words import split_words

FILE = "words.json"
SHOWN = 40


class OpenSoraWords:
    def __init__(self, words: Sequence[str], split: int = 1) -> None:
        """`split` is the version of the rule that splits text into words."""
        self.words, self.split = list(words), split
        self._numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> OpenSoraWords:
        told = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        return cls(told) if isinstance(told, list) else cls(told["words"], told["split"])

    def save_pretrained(self, folder: str, **_: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        told = {"split": self.split, "words": self.words}
        (Path(folder) / FILE).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

    def __call__(self, captions: Sequence[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        """input_ids and attention_mask, (B, L) with L the longest caption's number of words. Captions are cut after `max_length` words.

        Raises:
            ValueError: a caption has no words, or an unknown word.
        """
        rows = [self._row(caption)[:max_length] for caption in captions]
        shape = len(rows), max(map(len, rows))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def _row(self, caption: str) -> list[int]:
        words = split_words(caption, self.split)
        if not words:
            raise ValueError(f"caption {caption!r} has no words. Write at least one")
        for word in words:
            if word not in self._numbers:
                more = f" and {len(self.words) - SHOWN} more" if len(self.words) > SHOWN else ""
                raise ValueError(f"caption {caption!r}: unknown word {word!r}. Known words: {', '.join(self.words[:SHOWN])}{more}")
        return [self._numbers[word] for word in words]
