"""A recipe of two small stages for tests that read recipes: its texts, and how a test changes one and reads the refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.recipe.resolve import load

STAGE = """\
model: {depth: 2, width: 32, heads: 4, caption_width: 16, caption_tokens: 8, latent_channels: 4}
objective: {kind: flow}
data:
  source: {kind: digits, clips: 100}
  frames: 8
  height: 16
  width: 16
autoencoder: {kind: patch}
text: {kind: words}
sampling: {method: euler, steps: 10}
steps: 10
batch_size: 4
checkpoint: {every_steps: 5}
prompts: [a digit 3 moving left]
evaluate: {kind: digits, frames: 8}
"""

PIPELINE = """\
name: small
stages:
  - name: stage1
    config: stage1.yaml
  - name: stage2
    config: stage2.yaml
    parent: stage1
"""


def replaced(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    Path(path).write_text(text.replace(old, new))


def refusal(path: Path, **given: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        load(path, overrides=given.get("overrides", {}), env=given.get("env", {}))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message
