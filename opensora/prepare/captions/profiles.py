"""What a captioning server is sent for one clip, by profile, and which server it is. Pure.

Owns the shapes of requests (OpenAI's chat completions, and what vLLM, SGLang, LMDeploy and llama.cpp add to them) and of their answers.
Refuses to send anything.

- `images`: frames as JPEGs, which all four understand. SGLang alone is told that several pictures belong together (`modalities`).
- `video_url`: the clip's own file, for vLLM, SGLang and LMDeploy. Where vLLM and LMDeploy take it they are told how many frames to look at.
- `input_video`: the clip's own file, for llama.cpp from 0.3 on, which does not know `video_url`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opensora.dataset.prepare_config import CaptionServer
from opensora.errors import ConfigError

Software = Literal["vllm", "sglang", "lmdeploy", "llamacpp", ""]
"""What runs at the address, as its list of models says (`owned_by`); empty: something else, or it does not tell."""
_VIDEO: Mapping[str, frozenset[str]] = {
    "video_url": frozenset({"vllm", "sglang", "lmdeploy"}),
    "input_video": frozenset({"llamacpp"}),
}
MOST_TOKENS = 10**9
"""That one answer can have counted: a thousand times what any model of today reads. More is no count, and no column has room for all."""
TOP_P = 1.0
"""Said in each request: vLLM and SGLang take a model's own default otherwise, and captions would depend on the server."""


@dataclass(frozen=True)
class Shown:
    """What a server is shown of a clip: JPEGs, or one video file."""

    jpegs: tuple[str, ...] = ()
    """base64."""
    mp4: str = ""
    """base64."""
    pixels: int = 0
    """Of all frames together: prompt tokens grow with them."""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    text: str
    finish: str
    """`stop`, `length` (cut off), `content_filter` …"""
    tokens_in: int | None
    """As the server counts; None: it does not."""
    tokens_out: int | None
    odd: str = field(default="", compare=False)
    """What the server counts that nobody can have used; such a number counts as none."""


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def request(settings: CaptionServer, software: Software, shown: Shown, *, seed: int, temperature: float) -> dict[str, Any]:
    """The body of a request."""
    body: dict[str, Any] = {
        "model": settings.model,
        "max_tokens": settings.max_tokens,
        "temperature": temperature,
        "top_p": TOP_P,
        "seed": seed,
        "messages": [{"role": "user", "content": [*_parts(settings, software, shown), {"type": "text", "text": settings.prompt}]}],
    }
    if settings.profile == "video_url" and software in ("vllm", "lmdeploy"):
        body["media_io_kwargs"] = {"video": {"num_frames": settings.frames}}
    return body


def _parts(settings: CaptionServer, software: Software, shown: Shown) -> list[dict[str, Any]]:
    if settings.profile == "video_url":
        return [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{shown.mp4}"}}]
    if settings.profile == "input_video":
        return [{"type": "input_video", "input_video": {"data": shown.mp4}}]
    together = {"modalities": "multi-images"} if software == "sglang" and len(shown.jpegs) > 1 else {}
    return [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}, **together} for jpeg in shown.jpegs]


def parsed(body: bytes) -> Any:
    """
    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None


def answer(body: bytes) -> Answer:
    """
    Raises:
        ValueError: not the shape of an answer; the message says what is missing.
    """
    content = parsed(body)
    try:
        choice = content["choices"][0]
        message, usage = choice["message"], content.get("usage") or {}
        text, finish = message.get("content") or "", choice.get("finish_reason") or ""
        refusal = message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"no choices[0].message: {_start(content)}") from None
    if not isinstance(text, str) or not isinstance(finish, str):
        raise ValueError(f"message.content is no text: {_start(text)}")
    if isinstance(refusal, str) and refusal and not text:
        text, finish = refusal, "content_filter"
    names = ("prompt_tokens", "completion_tokens")
    given = {name: usage.get(name) for name in names} if isinstance(usage, dict) else {}
    counts = {name: found for name, found in given.items() if isinstance(found, int) and not isinstance(found, bool)}
    odd = [f"{name} {str(found)[:24]}" for name, found in counts.items() if not 0 <= found <= MOST_TOKENS]
    if odd:
        counts.clear()
    return Answer(text, finish, counts.get("prompt_tokens"), counts.get("completion_tokens"), ", ".join(odd))


def _start(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"


def software_of(listing: bytes, model: str) -> tuple[Software, tuple[str, ...]]:
    """What the answer to `GET models` tells: the software, and the names of the models there."""
    try:
        cards = [card for card in parsed(listing)["data"] if isinstance(card, dict)]
    except (ValueError, KeyError, TypeError):
        return "", ()
    named = [card for card in cards if card.get("id") == model] or cards
    owner = str(named[0].get("owned_by", "")).lower() if named else ""
    known: dict[str, Software] = {"vllm": "vllm", "sglang": "sglang", "lmdeploy": "lmdeploy", "llamacpp": "llamacpp"}
    return known.get(owner, ""), tuple(str(card.get("id", "")) for card in cards)


def check(settings: CaptionServer, software: Software) -> None:
    """
    Raises:
        ConfigError: this software does not know this profile.
    """
    takes = _VIDEO.get(settings.profile)
    if takes is not None and software and software not in takes:
        other = "input_video" if software == "llamacpp" else "video_url"
        raise ConfigError(
            f"caption.profile {settings.profile}: the server is {software}, which takes {other} or images. "
            "Set caption.profile to one of them"
        )
