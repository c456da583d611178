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
from tiny_models import PROMPT, frame, make, taught_llava, teach

from opensora.dataset.prepare_config import CaptionLlava
from opensora.dataset.rows import Captioned, Clip, ClipFile, Leaves, Quarantine
from opensora.errors import ConfigError
from opensora.prepare import devices
from opensora.prepare.captions import Spent, caption_all

pytestmark = pytest.mark.long  # transformers alone takes 4 s to import

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
Make = Callable[..., Path]


def frames_of(path: Path, shares: Sequence[float], side: int) -> list[bytes]:
    """Of a file that is called by its colour."""
    if path.stem == "broken":
        raise Quarantine("clip cannot be decoded")
    return [frame(path.stem.split("-")[0]) for _ in shares]


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
    return taught_llava(tmp_path_factory.mktemp(request.param) / "tiny-llava", request.param)


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
