"""Prompts that cannot be drawn are refused before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hard_prompts import HARD
from tiny_encoders import WIDTH, make_text
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from opensora import config
from opensora.encoders.pretrained import T5Encoder
from opensora.errors import ConfigError
from opensora.evaluation.prompts import check


def encoder(folder: Path) -> T5Encoder:
    return T5Encoder(config.T5Encoder(kind="t5", path=str(folder), dtype="fp32"), WIDTH, 12, torch.device("cpu"))


@pytest.fixture(scope="module")
def every_script(tmp_path_factory: pytest.TempPathFactory) -> T5Encoder:
    folder = tmp_path_factory.mktemp("bytes")
    make_text(folder)
    return encoder(folder)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> T5Encoder:
    """A real T5 whose tokenizer has two words, and one token for whatever else."""
    folder = tmp_path_factory.mktemp("words")
    make_text(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "cat": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    for path in folder.glob("*token*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return encoder(folder)


@pytest.mark.parametrize("prompt", HARD)
def test_hard_prompts_pass_unless_they_say_nothing_or_are_no_text(prompt: str, every_script: T5Encoder) -> None:
    refused = not prompt.strip() or "\0" in prompt or "\ud800" in prompt
    if not refused:
        check([prompt], every_script)
        return
    with pytest.raises(ConfigError) as error:
        check(["a cat", prompt], every_script)
    assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_a_prompt_of_which_the_text_encoder_knows_nothing_is_refused(english: T5Encoder) -> None:
    check(["a cat", "a 猫"], english)
    with pytest.raises(ConfigError, match='prompt "一只猫": the text encoder knows nothing of it'):
        check(["一只猫"], english)
    with pytest.raises(ConfigError, match='negative "xyz"'):
        check(["a cat"], english, "xyz")
