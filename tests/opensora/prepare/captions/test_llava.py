"""LLaVA through transformers: the plumbing. The models are tiny, of LLaVA's real classes, initialised at random and saved as a folder;
some are then taught two colours, so that a caption depends on the frames that it is shown. Nothing here says how good a real model's
captions are.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clip_rows
import pytest
import torch
from PIL import Image

from opensora.dataset.prepare_config import CaptionLlava
from opensora.dataset.rows import Captioned, Clip, ClipFile, Leaves, Quarantine
from opensora.errors import ConfigError
from opensora.prepare import devices
from opensora.prepare.captions import Spent, caption_all

pytestmark = pytest.mark.long  # transformers alone takes 4 s to import

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
WORDS = ["a", "red", "blue", "square", "on", "grey", "ground", "what", "is", "there", "USER:", "ASSISTANT:"]
PROMPT = "what is there"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
Make = Callable[..., Path]


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


def frames_of(path: Path, shares: Sequence[float], side: int) -> list[bytes]:
    """Of a file that is called by its colour."""
    if path.stem == "broken":
        raise Quarantine("clip cannot be decoded")
    return [frame(path.stem.split("-")[0]) for _ in shares]


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


def rows(*names: str) -> list[Clip]:
    return [clip_rows.clip(name, file=ClipFile(f"{name}.mp4", "0" * 64, 9, 8, 64, 32, 8.0)) for name in names]


def run(folder: Path, clips: list[Clip], *, halt: Callable[[], bool] = lambda: False, **changes: Any) -> tuple[dict[str, Any], Spent]:
    given = {"kind": "llava", "path": str(folder), "prompt": PROMPT, "frames": 2, "batch": 2, "max_tokens": 12} | changes
    results: dict[str, Captioned | Leaves] = {}

    def put(name: str, result: Captioned | Leaves) -> None:
        assert name not in results
        results[name] = result

    spent = caption_all(clips, Path("/nowhere"), CaptionLlava.model_validate(given), on_done=put, halt=halt, frames_of=frames_of)
    return results, spent


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny-llava"
    make(folder, "llava")
    return folder


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def taught(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "tiny-llava"
    model, processor = make(folder, request.param)
    teach(model, processor, f"USER: <image>\n<image>\n{PROMPT} ASSISTANT:", 2)
    model.save_pretrained(folder)
    return folder


def test_a_caption_says_what_the_frames_show_and_how_it_came_to_be(taught: Path) -> None:
    results, spent = run(taught, rows("red-1", "blue-1", "blue-2", "red-2", "red-3"))
    assert {name: one.text for name, one in results.items()} == {
        name: f"a {name.split('-')[0]} square on grey ground" for name in ("red-1", "blue-1", "blue-2", "red-2", "red-3")
    }
    one = results["red-1"]
    assert (one.by, one.prompt, one.seed, one.tokens_out, one.language) == ("tiny-llava", PROMPT, None, 7, "en")
    assert spent.tokens_in == sum(one.tokens_in for one in results.values()) > 0 and spent.tokens_out == 35 and not spent.stopped


def test_a_broken_clip_costs_its_batch_nothing(taught: Path) -> None:
    results, _ = run(taught, [*rows("red-1", "broken", "blue-1"), clip_rows.clip("without")], batch=4)
    assert {name: getattr(one, "text", getattr(one, "reason", "")) for name, one in results.items()} == {
        "red-1": "a red square on grey ground",
        "broken": "clip cannot be decoded",
        "blue-1": "a blue square on grey ground",
        "without": "clip has no file",
    }


def test_a_random_model_answers_as_transformers_itself_makes_it_answer(random_folder: Path) -> None:
    """One clip alone, without our padding and batches."""
    import transformers

    from opensora.prepare.captions.llava import Llava

    settings = CaptionLlava(kind="llava", path=str(random_folder), prompt=PROMPT, frames=2, max_tokens=9)
    said = Llava(settings).ask([[frame("red")] * 2, [frame("blue")] * 2])
    processor: Any = transformers.AutoProcessor.from_pretrained(random_folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(random_folder)
    for colour, ours in zip(("red", "blue"), said, strict=True):
        pictures = [Image.open(io.BytesIO(frame(colour)))] * 2
        inputs = processor(images=pictures, text=f"USER: <image>\n<image>\n{PROMPT} ASSISTANT:", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert ours.text == processor.tokenizer.decode(out, skip_special_tokens=True)
        assert ours.tokens_in == inputs["input_ids"].shape[1]


def test_a_bad_answer_is_asked_again_with_other_seeds_and_then_put_aside(taught: Path) -> None:
    results, spent = run(taught, rows("red-1", "blue-1"), seed=4, max_tokens=3)
    assert {one.reason for one in results.values()} == {"answer cut off"}
    assert all("3 answers, the last with seed 6" in one.detail for one in results.values())
    assert spent.tokens_out == 2 * 3 * 3


def test_a_chat_template_of_the_folder_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "with-template"
    model, processor = make(folder, "llava", template=TEMPLATE)
    teach(model, processor, f"<image> <image> {PROMPT} ASSISTANT:", 2)
    model.save_pretrained(folder)
    results, _ = run(folder, rows("blue-1"))
    assert results["blue-1"].text == "a blue square on grey ground"
    assert results["blue-1"].tokens_in == 2 * 4 + 4, "two frames of 4 tokens, three words and ASSISTANT:, and no USER:"


def test_what_it_is_put_on_is_told_before_it_is(taught: Path) -> None:
    happened: list[object] = []
    settings = CaptionLlava(kind="llava", path=str(taught), prompt=PROMPT, frames=2, batch=2, max_tokens=12)
    caption_all(
        rows("red-1"), Path(), settings, on_done=lambda name, result: happened.append(name), halt=lambda: False, frames_of=frames_of,
        on_device=happened.append,
    )  # fmt: skip
    assert happened == [devices.here(), "red-1"]


def test_after_a_halt_no_batch_is_begun(taught: Path) -> None:
    halted = threading.Event()
    seen: list[str] = []

    def halt() -> bool:
        return len(seen) >= 2

    def put(name: str, result: object) -> None:
        seen.append(name)

    settings = CaptionLlava(kind="llava", path=str(taught), prompt=PROMPT, frames=2, batch=2, max_tokens=12)
    spent = caption_all(rows("red-1", "blue-1", "red-2", "blue-2"), Path(), settings, on_done=put, halt=halt, frames_of=frames_of)
    assert seen == ["red-1", "blue-1"] and spent.stopped == "halted" and not halted.is_set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no model's config.json there"),
        ("{", "no model's config.json there"),
        ('{"model_type": "llama"}', "a 'llama' model; this reads llava and llava_next"),
        ('{"model_type": "llava"}', "no LLaVA with its processor can be loaded"),
    ],
)
def test_a_folder_without_llava_is_refused_with_what_to_do(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, rows("red-1"))


def test_a_file_that_breaks_off_is_told(random_folder: Path, tmp_path: Path) -> None:
    for file in random_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ConfigError, match="no LLaVA with its processor can be loaded"):
        run(tmp_path, rows("red-1"))


def test_weights_that_are_pickles_are_not_read(random_folder: Path, tmp_path: Path) -> None:
    for file in random_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no LLaVA with its processor can be loaded"):
        run(tmp_path, rows("red-1"))
