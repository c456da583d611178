"""A captioning server that answers as vLLM, SGLang, LMDeploy or llama.cpp do, takes one profile's requests alone, and gets into trouble on
request. No model: its caption says which request it answers.

It is strict: a key that this software does not know, a part of another profile, a picture that is no JPEG, a video that is no MP4, or no
text at the end is answered with 400.

    python tests/caption_server.py --limit 16 --latency 0.5     # prints its address; GET /figures tells how busy it was
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL = "stub-vl"
KEYS = {"model", "max_tokens", "temperature", "top_p", "seed", "messages"}
EXTRA = {"vllm": {"media_io_kwargs", "mm_processor_kwargs"}, "lmdeploy": {"media_io_kwargs", "mm_processor_kwargs"}}
TAKES = {"vllm": "video_url", "sglang": "video_url", "lmdeploy": "video_url", "llamacpp": "input_video"}
"""Which video each software takes; all take images."""
FAULTS = (
    "429",
    "429-after",
    "429-long",
    "500",
    "503-after",
    "hang",
    "reset",
    "cut-off",
    "repeats",
    "wrong JSON",
    "no choices",
    "slow",
    "refusal",
    "empty",
    "400",
    "401",
)


class Wrong(Exception):
    """Of a request: 400."""


def check(body: Any, software: str, profile: str) -> None:
    """
    Raises:
        Wrong: not the shape of this profile as this software takes it.
    """
    if not isinstance(body, dict) or not KEYS - {"seed"} <= body.keys():
        raise Wrong(f"missing: {sorted(KEYS - set(body))}")
    if unknown := body.keys() - KEYS - EXTRA.get(software, set()):
        raise Wrong(f"extra fields not permitted: {sorted(unknown)}")
    if len(body["messages"]) != 1 or body["messages"][0].keys() != {"role", "content"} or body["messages"][0]["role"] != "user":
        raise Wrong("one message of the user")
    *media, text = body["messages"][0]["content"]
    if text.keys() != {"type", "text"} or text["type"] != "text" or not isinstance(text["text"], str):
        raise Wrong(f"last part is no text: {text.get('type')}")
    if not media:
        raise Wrong("no picture and no video")
    for part in media:
        _check_part(part, software, profile)


def _check_part(part: Mapping[str, Any], software: str, profile: str) -> None:
    kind = part.get("type")
    if profile == "images":
        allowed = {"type", "image_url", "modalities"} if software == "sglang" else {"type", "image_url"}
        if kind != "image_url" or not {"type", "image_url"} <= part.keys() <= allowed:
            raise Wrong(f"unknown part {kind} with {sorted(part)}")
        if part.get("modalities", "image") not in ("image", "multi-images", "video"):
            raise Wrong("modalities")
        if not _data(part["image_url"], "url", "data:image/jpeg;base64,").startswith(b"\xff\xd8"):
            raise Wrong("no JPEG")
        return
    if TAKES[software] != profile or kind != profile or part.keys() != {"type", profile}:
        raise Wrong(f"unknown part {kind} with {sorted(part)}")
    name, prefix = ("url", "data:video/mp4;base64,") if profile == "video_url" else ("data", "")
    if _data(part[profile], name, prefix)[4:8] != b"ftyp":
        raise Wrong("no MP4")


def _data(holder: Mapping[str, str], name: str, prefix: str) -> bytes:
    if holder.keys() != {name} or not holder[name].startswith(prefix):
        raise Wrong(f"{name} is not {prefix}…")
    try:
        return base64.b64decode(holder[name].removeprefix(prefix), validate=True)
    except binascii.Error as error:
        raise Wrong(str(error)) from None


Answering = Callable[[int, Mapping[str, Any]], str]
"""Request number (from 0, of those that are no 429 of the limit) and body → a fault of FAULTS, or a caption."""


def caption(number: int, body: Mapping[str, Any]) -> str:
    return f"a person walks past house number {number} while it rains"


@dataclass
class Stub:
    """A server and what it saw."""

    software: str = "vllm"
    profile: str = "images"
    limit: int = 64
    latency_s: float = 0.0
    key: str = ""
    """Where there is one, requests without it are answered with 401."""
    answering: Answering = caption
    prompt_tokens: Callable[[Mapping[str, Any]], int] = lambda body: 100
    completion_tokens: int = 12
    counts: bool = True
    """Whether answers have `usage`."""
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    refused: int = 0
    """429 of the limit."""
    tokens: int = 0
    """In and out, of all answers that were worked out: faults as well."""
    under_way: int = 0
    most_under_way: int = 0
    busy_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    released: threading.Event = field(default_factory=threading.Event)
    """Ends what hangs."""

    async def models(self, request: web.Request) -> web.Response:
        if not self._allowed(request):
            return _error(401, f"invalid key {request.headers.get('Authorization', '')}")
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": self.software}]})

    async def figures(self, request: web.Request) -> web.Response:
        span = self.last_s - self.first_s
        return web.json_response(
            {"requests": len(self.requests), "refused": self.refused, "busy_s": self.busy_s, "span_s": span, "most": self.most_under_way}
        )

    async def moved(self, request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/v1/chat/completions")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not self._allowed(request):
            return _error(401, f"invalid key {request.headers.get('Authorization', '')}")
        if self.under_way >= self.limit:
            self.refused += 1
            return _error(429, "too many requests")
        now = time.perf_counter()
        self.first_s = self.first_s or now
        number = len(self.requests)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._answer(request, number, body)
        finally:
            self.under_way -= 1
            self.last_s = time.perf_counter()
            self.busy_s += self.last_s - now

    async def _answer(self, request: web.Request, number: int, body: dict[str, Any]) -> web.StreamResponse:
        try:
            check(body, self.software, self.profile)
        except Wrong as error:
            return _error(400, str(error))
        if body["model"] != MODEL:
            return _error(404, f"The model `{body['model']}` does not exist.")
        await asyncio.sleep(self.latency_s)
        said = self.answering(number, body)
        prompt, written = self.prompt_tokens(body), self.completion_tokens
        if said not in ("429", "429-after", "429-long", "503-after", "400", "401"):
            self.tokens += prompt + written
        return await self._said(request, said, {"prompt_tokens": prompt, "completion_tokens": written})

    async def _said(self, request: web.Request, said: str, usage: dict[str, int]) -> web.StreamResponse:
        if said in ("429", "400", "401", "500"):
            return _error(int(said), f"trouble {said}")
        if said in ("429-after", "503-after", "429-long"):
            return _error(int(said[:3]), "busy", {"Retry-After": "3600" if said == "429-long" else "0.05"})
        if said == "hang":
            while not self.released.is_set():
                await asyncio.sleep(0.02)
        if said in ("hang", "reset"):
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if said == "wrong JSON":
            return web.Response(text='{"choices": [', content_type="application/json")
        if said == "no choices":
            return web.json_response({"object": "chat.completion", "choices": []})
        texts = {
            "cut-off": "a person walks past a house and then",
            "repeats": "the man walks and " * 30,
            "refusal": "I'm sorry, but I can't help with that.",
            "empty": "  ",
            "slow": "a person walks slowly past a house",
        }
        content = {
            "id": "1",
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": texts.get(said, said)},
                    "finish_reason": "length" if said == "cut-off" else "stop",
                }
            ],
        }
        return web.json_response(content | ({"usage": usage} if self.counts else {}))

    def _allowed(self, request: web.Request) -> bool:
        return not self.key or request.headers.get("Authorization") == f"Bearer {self.key}"

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/figures", self.figures)
        app.router.add_post("/moved/v1/chat/completions", self.moved)
        app.router.add_post("/v1/chat/completions", self.complete)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """In a thread of its own, on a free port of the loopback."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        runner = await stub.start()
        stop = asyncio.Event()
        stub_stop.append(lambda: loop.call_soon_threadsafe(stop.set))
        ready.set()
        await stop.wait()
        await runner.cleanup()

    stub_stop: list[Callable[[], object]] = []
    thread = threading.Thread(target=lambda: (loop.run_until_complete(serve()), loop.close()))
    thread.start()
    ready.wait()
    try:
        yield stub
    finally:
        stub.released.set()
        stub_stop[0]()
        thread.join()


def _error(status: int, words: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": words, "type": "stub", "code": status}}, status=status, headers=headers)


async def _serve_for_ever(stub: Stub) -> None:
    await stub.start()
    print(stub.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.5)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_for_ever(Stub(limit=given.limit, latency_s=given.latency)))
    sys.exit(0)
