"""Shapes of requests, one fixture for each profile, and a strict server that takes its own alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from caption_server import TAKES, Stub, Wrong, check, serving

from opensora.dataset.prepare_config import CaptionServer
from opensora.errors import ConfigError
from opensora.prepare.captions import profiles
from opensora.prepare.captions.connection import Connection, Refused
from opensora.prepare.captions.profiles import Answer, Shown, Software, encoded

REQUESTS = Path(__file__).parent / "requests"
SHAPES: dict[str, tuple[Any, ...]] = {
    "images": ("images", ("vllm", "lmdeploy", "llamacpp", "")),
    "images-sglang": ("images", ("sglang",)),
    "video_url": ("video_url", ("vllm", "lmdeploy")),
    "video_url-sglang": ("video_url", ("sglang", "")),
    "input_video": ("input_video", ("llamacpp", "")),
}
"""Fixture → profile, and the software that is sent exactly this."""
SENT = [(name, software) for name, (_, all_software) in SHAPES.items() for software in all_software]
SERVERS = [(software, profile) for software, video in TAKES.items() for profile in ("images", video)]


def settings(profile: str, url: str = "http://127.0.0.1:1/v1") -> CaptionServer:
    return CaptionServer.model_validate({
        "kind": "server", "url": url, "model": "stub-vl", "profile": profile, "frames": 2, "max_tokens": 64,
        "prompt": "Describe this video in one sentence.",
    })  # fmt: skip


def fixture(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REQUESTS / f"{name}.json").read_text())
    return content


def body(profile: str, software: Software) -> dict[str, Any]:
    jpegs = tuple(encoded(b"\xff\xd8\xff\xe0 frame %d" % number) for number in range(2))
    shown = Shown(jpegs=jpegs) if profile == "images" else Shown(mp4=encoded(b"\0\0\0\x18ftypisom clip"))
    return profiles.request(settings(profile), software, shown, seed=7, temperature=0.2)


@pytest.mark.parametrize(("name", "software"), SENT)
def test_a_request_is_its_fixture_to_the_letter(name: str, software: Software) -> None:
    assert body(SHAPES[name][0], software) == fixture(name)


def test_every_fixture_is_some_profile_s() -> None:
    assert {path.stem for path in REQUESTS.glob("*.json")} == SHAPES.keys()


@pytest.mark.parametrize(("software", "profile"), SERVERS)
def test_a_server_takes_its_own_profile_and_answers_400_to_the_others(software: Software, profile: str) -> None:
    async def answers() -> dict[str, bool]:
        taken = {}
        async with Connection(settings(profile, stub.url), key="") as connection:
            for name in SHAPES:
                try:
                    await connection.ask(json.dumps(fixture(name)).encode())
                    taken[name] = True
                except Refused as error:
                    assert error.detail.startswith("400: ")
                    taken[name] = False
        return taken

    with serving(Stub(software=software, profile=profile)) as stub:
        taken = asyncio.run(answers())
    for name, (of, all_software) in SHAPES.items():
        if of != profile:
            assert not taken[name], f"{software} took {name} as {profile}"
        elif software in all_software:
            assert taken[name], f"{software} refused {name}"


@pytest.mark.parametrize("software", ["vllm", "lmdeploy", "llamacpp"])
def test_only_sglang_takes_modalities(software: str) -> None:
    with pytest.raises(Wrong, match="modalities"):
        check(fixture("images-sglang"), software, "images")


def test_one_picture_alone_is_not_called_several() -> None:
    one = profiles.request(settings("images"), "sglang", Shown(jpegs=("eA==",)), seed=0, temperature=0)
    assert "modalities" not in one["messages"][0]["content"][0]


@pytest.mark.parametrize(("software", "profile"), [("llamacpp", "video_url"), ("vllm", "input_video"), ("sglang", "input_video")])
def test_a_profile_that_the_server_does_not_know_is_told_before_a_clip_is_sent(software: Software, profile: str) -> None:
    other = "input_video" if software == "llamacpp" else "video_url"
    with pytest.raises(ConfigError, match=f"the server is {software}, which takes {other} or images"):
        profiles.check(settings(profile), software)


@pytest.mark.parametrize(("software", "profile"), [*SERVERS, ("", "video_url"), ("", "input_video")])
def test_a_profile_that_it_knows_or_that_nobody_knows_about_passes(software: Software, profile: str) -> None:
    profiles.check(settings(profile), software)


@pytest.mark.parametrize(
    ("listing", "software", "names"),
    [
        ({"data": [{"id": "a", "owned_by": "vllm"}]}, "vllm", ("a",)),
        ({"data": [{"id": "x", "owned_by": "vllm"}, {"id": "m", "owned_by": "sglang"}]}, "sglang", ("x", "m")),
        ({"data": [{"id": "m", "owned_by": "llamacpp"}], "models": []}, "llamacpp", ("m",)),
        ({"data": [{"id": "m", "owned_by": "a-company"}]}, "", ("m",)),
        ({"data": []}, "", ()),
        ({"error": "no"}, "", ()),
        ([], "", ()),
        (None, "", ()),
        ({"data": ["a", None, {"id": 3}]}, "", ("3",)),
    ],
)
def test_the_list_of_models_tells_the_software(listing: object, software: str, names: tuple[str, ...]) -> None:
    assert profiles.software_of(json.dumps(listing).encode(), "m") == (software, names)


def test_an_answer_is_read_with_what_it_counts() -> None:
    said = {
        "choices": [{"message": {"content": "a cat"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }
    assert profiles.answer(json.dumps(said).encode()) == Answer("a cat", "stop", 5, 2)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"choices": [{"message": {"content": None}, "finish_reason": None}]}, Answer("", "", None, None)),
        (
            {"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]},
            Answer("No.", "content_filter", None, None),
        ),
        ({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": None}, Answer("a", "stop", None, None)),
        (
            {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": -1}},
            Answer("a", "stop", None, None),
        ),
    ],
)
def test_what_servers_leave_out_is_no_error(said: object, expected: Answer) -> None:
    assert profiles.answer(json.dumps(said).encode()) == expected


@pytest.mark.parametrize("count", [-1, 10**9 + 1, 10**30])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_a_count_that_cannot_be_makes_an_answer_one_without_counts_and_is_told(name: str, count: int) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 10**9}
    said = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": usage}
    assert profiles.answer(json.dumps(said).encode()) == Answer("a", "stop", 5, 10**9)
    usage[name] = count
    found = profiles.answer(json.dumps(said).encode())
    assert found == Answer("a", "stop", None, None) and found.odd == f"{name} {str(count)[:24]}"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"<html>", b'{"choices": [', b"[]", b"null", b"3", b'{"choices": {}}', b'{"choices": [3]}', b'{"choices": [{"message": "a"}]}',
        b'{"choices": [{"message": {"content": ["a"]}}]}', b'{"error": {"message": "overloaded"}}', b"\xff\xfe",
        b"[" * 500_000, b"1" * 5_000,
    ],
)  # fmt: skip
def test_whatever_else_comes_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"no JSON|no choices|no text"):
        profiles.answer(content)
