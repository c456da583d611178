"""Tiny models of transformers' real classes, in folders: a LLaVA, which can be taught two colours, and a CLIP with a head."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from opensora.prepare.clip_scores import HEAD

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
WORDS = ["a", "red", "blue", "square", "on", "grey", "ground", "what", "is", "there", "USER:", "ASSISTANT:"]
PROMPT = "what is there"
WIDTH = 8
"""Of CLIP's vectors."""


def make(folder: Path, kind: str, *, template: str | None = None) -> Any:
    """A random model and its processor, in a folder; the model."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=32
    )
    text = transformers.LlamaConfig(
        vocab_size=len(special) + len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=512,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    torch.manual_seed(0)
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1, image_seq_length=4
        )
        model: Any = transformers.LlavaForConditionalGeneration(config)
        pictures: Any = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        kinds: Any = transformers.LlavaProcessor
    else:
        config = transformers.LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1, image_grid_pinpoints=[[32, 32], [64, 32]]
        )
        model = transformers.LlavaNextForConditionalGeneration(config)
        pictures = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=[[32, 32], [64, 32]]
        )
        kinds = transformers.LlavaNextProcessor
    processor = kinds(
        pictures, fast, patch_size=16, vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def frame(colour: str, width: int = 64, height: int = 32) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), COLOURS[colour]).save(content, "JPEG")
    return content.getvalue()


def teach(model: Any, processor: Any, prompt: str, frames: int) -> None:
    """Until it says "a red square" of red frames and "a blue square" of blue ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pictures = [Image.open(io.BytesIO(frame(colour))) for colour in COLOURS for _ in range(frames)]
    answers = [f"{prompt} a {colour} square on grey ground </s>" for colour in COLOURS]
    inputs = processor(images=pictures, text=answers, return_tensors="pt", padding=True)
    labels = inputs["input_ids"].clone()
    labels[:, :-7] = -100
    for _ in range(200):
        loss = model(**inputs, labels=labels).loss
        if loss.item() < 0.05:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"not learned: {loss.item()}")


def taught_llava(folder: Path, kind: str = "llava") -> Path:
    """That answers PROMPT over two frames."""
    model, processor = make(folder, kind)
    teach(model, processor, f"USER: <image>\n<image>\n{PROMPT} ASSISTANT:", 2)
    model.save_pretrained(folder)
    return folder


def clip(root: Path) -> Path:
    """A CLIP of some thousand weights, as transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        token: number for number, token in enumerate([*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    (root / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "merges.txt").write_text("#version: 0.2\n")
    ends: dict[str, Any] = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": len(vocabulary) - 1}
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
    }
    text = small | ends | {"vocab_size": len(vocabulary), "max_position_embeddings": 20}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(root)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"))).save_pretrained(root)
    save_file(layers(), root / HEAD)
    return root


def layers() -> dict[str, torch.Tensor]:
    """As LAION's: numbered, with gaps, and more than nine."""
    torch.manual_seed(1)
    shapes = {"layers.0": (6, WIDTH), "layers.2": (4, 6), "layers.10": (1, 4)}
    return {
        f"{name}.{part}": torch.randn(shape if part == "weight" else shape[:1])
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }
