"""Captions from LLaVA in this process, through transformers.

Owns loading from a folder, the prompt, batches, and asking again. Refuses to fetch anything (`local_files_only`), to run code of the
folder, and to read weights that are pickles. Imported only where a preparation names it: torch and transformers take seconds.

The first answer is the model's likeliest (greedy), so that a clip's caption does not depend on its neighbours in the batch. A bad one (cut
off, repeating, empty, a refusal) is asked again alone, sampled with a seed and at a higher temperature each time.
"""

from __future__ import annotations

import gc
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from opensora.dataset.prepare_config import CaptionLlava
from opensora.dataset.rows import Captioned, Clip, Leaves, Quarantine
from opensora.errors import ConfigError, OutOfMemory
from opensora.prepare import devices
from opensora.prepare.captions import answers
from opensora.prepare.captions.language import language_of
from opensora.prepare.captions.shown import FramesOf, file_of, shares
from opensora.printable import several

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
"""By `model_type` of the folder's config.json."""
SIDE = 672
"""Pixels of the longer side of the frames that the processor gets; it scales them to what the model takes (336, LLaVA-NeXT up to 672)."""
TEMPERATURES = (0.5, 0.9)
"""Of the second and the third time that a clip is asked."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    finish: str
    """`stop`, or `length`: it was cut off."""
    tokens_in: int
    tokens_out: int
    seconds: float
    """Its share of the batch's."""


class Llava:
    def __init__(self, settings: CaptionLlava) -> None:
        """
        Raises:
            ConfigError: the folder holds no LLaVA.
        """
        import transformers

        auto: Any = transformers.AutoProcessor  # untyped

        folder, self._settings = Path(settings.path), settings
        self.name = folder.name
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = DTYPES[settings.dtype] if self._device.type == "cuda" else torch.float32
        kind = getattr(transformers, CLASSES[_model_type(folder)])
        bars: Any = transformers.utils.logging  # a bar in a log is a line that is written over itself
        had_bars = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            self._processor = auto.from_pretrained(folder, local_files_only=True)
            model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        except Exception as error:  # transformers, tokenizers and safetensors raise many kinds for what is missing or damaged
            why = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"caption.path {folder}: no LLaVA with its processor can be loaded ({why}). Name a folder with both"
            ) from error
        finally:
            if had_bars:
                bars.enable_progress_bar()
        self._model = model.to(self._device).eval()
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # an answer begins where its prompt ends
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._prompt = self._asked()

    def ask(self, clips: Sequence[Sequence[bytes]], *, seed: int | None = None, temperature: float = 0.0) -> list[Said]:
        """One answer for each clip's JPEGs; sampled where there is a seed.

        Raises:
            OutOfMemory: the GPU's.
        """
        began = time.perf_counter()
        pictures = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpegs in clips for jpeg in jpegs]
        inputs = self._processor(images=pictures, text=[self._prompt] * len(clips), padding=True, return_tensors="pt")
        inputs = inputs.to(self._device, self._model.dtype)
        tokenizer = self._processor.tokenizer
        how: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": temperature, "top_p": 0.95}
        try:
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(seed or 0)
                out = self._model.generate(**inputs, max_new_tokens=self._settings.max_tokens, pad_token_id=tokenizer.pad_token_id, **how)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"LLaVA: {several(len(clips), 'clip')} of {self._settings.frames} frames do not fit into the GPU's memory. "
                f"Set caption.batch below {len(clips)}"
            ) from error
        seconds, first = (time.perf_counter() - began) / len(clips), inputs["input_ids"].shape[1]
        used = inputs["attention_mask"].sum(1).tolist()
        return [self._said(row[first:].tolist(), count, seconds) for row, count in zip(out, used, strict=True)]

    def _said(self, tokens: list[int], tokens_in: int, seconds: float) -> Said:
        ends = self._model.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        length = next((index for index, token in enumerate(tokens) if token in stops), None)
        text = self._processor.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return Said(text, "length" if length is None else "stop", tokens_in, len(tokens) if length is None else length + 1, seconds)

    def _asked(self) -> str:
        """The prompt with a place for each frame: by the folder's chat template, or as LLaVA 1.5 was taught."""
        frames, prompt = self._settings.frames, self._settings.prompt
        template = getattr(self._processor, "chat_template", None) or getattr(self._processor.tokenizer, "chat_template", None)
        if not template:
            places = f"{self._processor.image_token}\n" * frames
            return f"USER: {places}{prompt} ASSISTANT:"
        content = [{"type": "image"}] * frames + [{"type": "text", "text": prompt}]
        return str(
            self._processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
            )
        )


def _model_type(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"caption.path {folder}: no model's config.json there ({error}). Name the folder of a LLaVA model") from error
    if kind not in CLASSES:
        raise ConfigError(f"caption.path {folder}: a {kind!r} model; this reads {' and '.join(CLASSES)}. Serve it (caption.kind: server)")
    return str(kind)


OnDone = Callable[[str, Captioned | Leaves], None]
Batches = Iterator[tuple[tuple[Clip, ...], list[list[bytes] | Leaves]]]
"""Clips, and the frames of each, or why it has none."""


def caption(
    clips: Sequence[Clip],
    folder: Path,
    settings: CaptionLlava,
    *,
    on_done: OnDone,
    on_tokens: Callable[[int, int], None],
    halt: Callable[[], bool],
    frames_of: FramesOf,
    on_device: Callable[[devices.Device], None] = lambda device: None,
) -> bool:
    """Whether all clips were done. The next batch's frames are decoded while the model works.

    Args:
        on_tokens: told of the tokens in and out of each clip.
        on_device: told what the model is put on, just before it is. On return its memory there is free again.

    Raises:
        ConfigError, OutOfMemory
    """
    on_device(devices.here())
    model = Llava(settings)
    try:
        return _all(model, _ahead(clips, folder, settings, frames_of), settings, on_done, on_tokens, halt)
    finally:
        del model
        if torch.cuda.is_available():
            gc.collect()  # modules refer to each other
            torch.cuda.empty_cache()  # torch would keep it for this process, and the encoders run in another one


def _all(
    model: Llava, batches: Batches, settings: CaptionLlava, on_done: OnDone, on_tokens: Callable[[int, int], None], halt: Callable[[], bool]
) -> bool:
    for batch, frames in batches:
        if halt():
            return False
        seen: list[tuple[Clip, list[bytes]]] = []
        for clip, found in zip(batch, frames, strict=True):
            if isinstance(found, Leaves):
                on_done(clip.id, found)
            else:
                seen.append((clip, found))
        for (clip, _), (result, said) in zip(seen, answered(model, [jpegs for _, jpegs in seen], settings), strict=True):
            on_tokens(said.tokens_in, said.tokens_out)
            on_done(clip.id, result)
    return True


def answered(model: Llava, clips: Sequence[list[bytes]], settings: CaptionLlava) -> Iterator[tuple[Captioned | Quarantine, Said]]:
    """Of each clip's JPEGs the caption, or why there is none, and what it took in all. Raises OutOfMemory."""
    for jpegs, said in zip(clips, model.ask(clips) if clips else [], strict=True):
        yield _settled(model, jpegs, said, settings)


def _settled(model: Llava, jpegs: list[bytes], said: Said, settings: CaptionLlava) -> tuple[Captioned | Quarantine, Said]:
    """The caption, or why there is none, and what it took in all."""
    seed, tries = None, iter(enumerate(TEMPERATURES, settings.seed + 1))
    while (judged := answers.judged(said.text, said.finish))[1]:
        following = next(tries, None)
        if following is None:
            return Quarantine(judged[1], f"{len(TEMPERATURES) + 1} answers, the last with seed {seed}: {answers.start(judged[0])}"), said
        seed, temperature = following
        again = model.ask([jpegs], seed=seed, temperature=temperature)[0]
        said = replace(
            again,
            tokens_in=said.tokens_in + again.tokens_in,
            tokens_out=said.tokens_out + again.tokens_out,
            seconds=said.seconds + again.seconds,
        )
    text = judged[0]
    return Captioned(text, model.name, settings.prompt, seed, said.tokens_in, said.tokens_out, said.seconds, language_of(text)), said


def _ahead(clips: Sequence[Clip], folder: Path, settings: CaptionLlava, frames_of: FramesOf) -> Batches:
    """Batches with their frames; one batch is decoded ahead."""

    def decoded(clip: Clip) -> list[bytes] | Leaves:
        try:
            return frames_of(folder / file_of(clip).path, shares(settings.frames), SIDE)
        except Leaves as leaves:
            return leaves
        except OSError as error:
            return Quarantine("clip file cannot be read", str(error.strerror or error))

    def whole(batch: tuple[Clip, ...]) -> list[list[bytes] | Leaves]:
        return [decoded(clip) for clip in batch]

    with ThreadPoolExecutor(1) as thread:
        before = None
        for start in range(0, len(clips), settings.batch):
            batch = tuple(clips[start : start + settings.batch])
            following = batch, thread.submit(whole, batch)
            if before is not None:
                yield before[0], before[1].result()
            before = following
        if before is not None:
            yield before[0], before[1].result()
