"""Words to their numbers (`opensora.embedded_encoders.WordEncoder`): lower case, any script, without punctuation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "words.json"
SHOWN = 40


class OpenSoraWords:
    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> OpenSoraWords:
        return cls(json.loads((Path(folder) / FILE).read_text(encoding="utf-8")))

    def save_pretrained(self, folder: str, **_: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(json.dumps(self.words, ensure_ascii=False), encoding="utf-8")

    def __call__(self, captions: Sequence[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        """input_ids and attention_mask, (B, L) with L words of the longest caption; of longer ones than `max_length` the end is cut.

        Raises:
            ValueError: a caption has no words, or one that is not known.
        """
        rows = [self._row(caption)[:max_length] for caption in captions]
        shape = len(rows), max(map(len, rows))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def _row(self, caption: str) -> list[int]:
        words = re.findall(r"\w+", caption.casefold())
        if not words:
            raise ValueError(f"caption {caption!r} has no words. Write at least one")
        for word in words:
            if word not in self._numbers:
                more = f" and {len(self.words) - SHOWN} more" if len(self.words) > SHOWN else ""
                raise ValueError(f"caption {caption!r}: unknown word {word!r}. Known words: {', '.join(self.words[:SHOWN])}{more}")
        return [self._numbers[word] for word in words]
