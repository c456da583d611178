"""Captions from a server: faults, pace, budget, ends. The server is a real one on the loopback, with no model in it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import caption_server
import clip_rows
import pytest
from bad_servers import troubled
from caption_server import MODEL, Stub, serving

from opensora.dataset.prepare_config import CaptionServer
from opensora.dataset.rows import Captioned, Clip, ClipFile, Leaves, Quarantine
from opensora.errors import ConfigError
from opensora.prepare.captions import Spent, caption_all
from opensora.prepare.captions.budget import FIRST_IMAGE, TEMPLATE

JPEG = b"\xff\xd8\xff\xe0 a frame"
PROMPT = "What happens?"
NOTHING = Spent()


def frames_of(path: Path, shares: Sequence[float], side: int) -> list[bytes]:
    return [JPEG for _ in shares]


def clips(count: int) -> list[Clip]:
    return [clip_rows.clip(f"clip{number:03}", file=ClipFile("a.mp4", "0" * 64, 9, 8, 64, 48, 8.0)) for number in range(count)]


def settings(stub: Stub, **changes: Any) -> CaptionServer:
    given: dict[str, Any] = {
        "kind": "server", "url": stub.url, "model": MODEL, "profile": stub.profile, "prompt": PROMPT, "frames": 1, "max_tokens": 64,
        "timeout_s": 60, "concurrency": 4,
    }  # fmt: skip
    return CaptionServer.model_validate(given | changes)


@dataclass
class Done:
    """What was reported."""

    results: dict[str, Captioned | Leaves] = field(default_factory=dict)
    spents: list[Spent] = field(default_factory=list)
    spent: Spent = NOTHING

    def put(self, name: str, result: Captioned | Leaves) -> None:
        assert name not in self.results, "reported twice"
        self.results[name] = result

    @property
    def captioned(self) -> list[Captioned]:
        return [result for result in self.results.values() if isinstance(result, Captioned)]

    @property
    def reasons(self) -> list[str]:
        return [result.reason for result in self.results.values() if isinstance(result, Quarantine)]


def ask(
    stub: Stub, count: int, *, halt: Callable[[], bool] = lambda: False, before: Spent = NOTHING, done: Done | None = None, **changes: Any
) -> Done:
    done = done if done is not None else Done()
    done.spent = caption_all(
        clips(count),
        Path("/nowhere"),
        settings(stub, **changes),
        on_done=done.put,
        halt=halt,
        frames_of=frames_of,
        before=before,
        on_spent=done.spents.append,
        first_pause_s=0.01,
    )
    return done


def first(fault: str, times: int = 1) -> caption_server.Answering:
    """The first requests get into trouble."""

    def answering(number: int, body: Mapping[str, Any]) -> str:
        return fault if number < times else caption_server.caption(number, body)

    return answering


def always(fault: str) -> caption_server.Answering:
    return lambda number, body: fault


# --- Every clip once ----------------------------------------------------------------------------------------------------------------------


def test_every_clip_gets_one_caption_and_says_how_it_came_to_be() -> None:
    with serving(Stub()) as stub:
        done = ask(stub, 20, seed=5)
    assert len(done.captioned) == 20 and len({one.text for one in done.captioned}) == 20
    assert {(one.by, one.prompt, one.seed, one.tokens_in, one.tokens_out, one.language) for one in done.captioned} == {
        (MODEL, PROMPT, 5, 100, 12, "en")
    }
    assert done.spent.tokens == 20 * 112 and done.spent.requests == 20 and not done.spent.stopped


def test_no_clip_is_no_request() -> None:
    with serving(Stub()) as stub:
        assert ask(stub, 0).spent.tokens == 0
        assert not stub.requests


@pytest.mark.parametrize(
    "fault", ["429", "429-after", "500", "503-after", "reset", "cut-off", "repeats", "wrong JSON", "no choices", "refusal", "empty"]
)
def test_one_trouble_of_the_server_costs_no_clip(fault: str) -> None:
    with serving(Stub(answering=first(fault))) as stub:
        done = ask(stub, 6)
    assert len(done.captioned) == 6
    assert len(stub.requests) == 7


def test_a_request_that_hangs_is_tried_again_after_its_time() -> None:
    with serving(Stub(answering=first("hang"))) as stub:
        done = ask(stub, 3, timeout_s=0.5, tries=100)  # on a busy machine more requests than one may take so long
        assert len(done.captioned) == 3
        assert len(stub.requests) > 3


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("500", "server error", 4),
        ("reset", "connection broke off", 4),
        ("wrong JSON", "wrong JSON", 4),
        ("no choices", "wrong JSON", 4),
        ("400", "server refused the request", 1),
        ("cut-off", "answer cut off", 3),
        ("repeats", "answer repeats itself", 3),
        ("refusal", "model refuses", 3),
        ("empty", "empty answer", 3),
    ],
)
def test_a_clip_that_always_fails_is_put_aside_with_its_reason_and_the_others_are_captioned(fault: str, reason: str, requests: int) -> None:
    """One clip alone is in trouble: it is known by the number of its frames' bytes."""
    marked = JPEG + b" poison"

    def poisoned(path: Path, shares: Sequence[float], side: int) -> list[bytes]:
        return [marked if path.name == "poison.mp4" else JPEG]

    def answering(number: int, body: Mapping[str, Any]) -> str:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        return fault if len(url) > len("data:image/jpeg;base64,") + 4 * len(JPEG) / 3 + 4 else caption_server.caption(number, body)

    rows = clips(5)
    rows[2] = clip_rows.clip("poison", file=ClipFile("poison.mp4", "0" * 64, 9, 8, 64, 48, 8.0))
    done = Done()
    with serving(Stub(answering=answering)) as stub:
        caption_all(
            rows, Path("/nowhere"), settings(stub, tries=4), on_done=done.put, halt=lambda: False, frames_of=poisoned, first_pause_s=0.01
        )
    assert done.reasons == [reason] and isinstance(done.results["poison"], Quarantine)
    assert len(done.captioned) == 4
    assert len(stub.requests) == 4 + requests


def test_what_the_server_says_of_a_refused_clip_is_its_detail() -> None:
    with serving(Stub(answering=first("400"))) as stub:
        done = ask(stub, 1)
    (result,) = done.results.values()
    assert isinstance(result, Quarantine) and result.detail == "400: trouble 400"


# --- Asked again --------------------------------------------------------------------------------------------------------------------------


def test_a_bad_answer_is_asked_again_with_another_seed_and_a_higher_temperature() -> None:
    with serving(Stub(answering=first("repeats", 2))) as stub:
        done = ask(stub, 1, seed=7, temperature=0.2)
    assert [(body["seed"], body["temperature"]) for body in stub.requests] == [(7, 0.2), (8, 0.5), (9, 0.8)]
    (captioned,) = done.captioned
    assert captioned.seed == 9
    assert captioned.tokens_in == 300, "all three requests were for this clip"


@pytest.mark.parametrize("temperature", [0.2, 1.4, 1.9])
def test_the_temperature_never_falls(temperature: float) -> None:
    with serving(Stub(answering=first("cut-off", 2))) as stub:
        ask(stub, 1, temperature=temperature)
    asked = [body["temperature"] for body in stub.requests]
    assert asked == sorted(asked) and asked[0] == temperature


def test_a_failure_of_the_server_is_tried_again_with_the_same_seed() -> None:
    """Else a caption would depend on the server's health."""
    with serving(Stub(answering=first("500", 2))) as stub:
        done = ask(stub, 1, seed=7)
    assert {(body["seed"], body["temperature"]) for body in stub.requests} == {(7, 0.2)}
    assert done.captioned[0].seed == 7


# --- Pace ---------------------------------------------------------------------------------------------------------------------------------


def test_no_more_requests_are_under_way_than_set() -> None:
    with serving(Stub(latency_s=0.02)) as stub:
        ask(stub, 30, concurrency=3)
    assert stub.most_under_way == 3


def test_a_server_with_a_lower_limit_is_not_run_into_for_each_clip() -> None:
    with serving(Stub(latency_s=0.01, limit=3)) as stub:
        done = ask(stub, 60, concurrency=10)
    assert len(done.captioned) == 60 and stub.most_under_way == 3
    assert stub.refused <= 7 + 60 / 8, "ten were sent at first, then seldom one too many"


def test_busy_answers_cost_a_clip_no_try() -> None:
    with serving(Stub(latency_s=0.01, limit=1)) as stub:
        done = ask(stub, 12, concurrency=8, tries=1)
    assert len(done.captioned) == 12 and not done.reasons


def test_a_server_that_refuses_everything_ends_the_run() -> None:
    with serving(Stub(limit=0)) as stub, pytest.raises(ConfigError, match=r"refused 5 requests in a row.*429: too many requests"):
        ask(stub, 20)
    assert stub.refused < 20


def test_a_wait_that_is_too_long_ends_the_run_and_says_how_long() -> None:
    with (
        serving(Stub(answering=always("429-long"))) as stub,
        pytest.raises(ConfigError, match=r"3600 s .* longer than caption\.timeout_s 60"),
    ):
        ask(stub, 3)


# --- Budget -------------------------------------------------------------------------------------------------------------------------------

FIRST = FIRST_IMAGE + len(PROMPT) + TEMPLATE + 64
"""Set aside for the first request."""


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("budget", [FIRST, FIRST + 700, FIRST + 2000])
def test_a_budget_of_tokens_is_never_passed_and_what_was_captioned_stays(budget: int, concurrency: int) -> None:
    with serving(Stub(latency_s=0.005)) as stub:
        done = ask(stub, 100, budget_tokens=budget, concurrency=concurrency)
    assert 0 < stub.tokens <= budget, "as the server counts"
    assert stub.tokens == done.spent.tokens
    assert stub.tokens > budget - 2 * (125 + 64), "and it is used up to what one or two requests may take"
    assert len(done.captioned) == len(stub.requests) < 100
    assert f"budget_tokens {budget:,}" in done.spent.stopped and "raise the budget" in done.spent.stopped


def test_a_budget_of_dollars_is_never_passed() -> None:
    price = {"usd_per_million_in": 3.0, "usd_per_million_out": 15.0}
    with serving(Stub()) as stub:
        done = ask(stub, 100, budget_usd=0.02, **price)
    dollars = len(stub.requests) * (100 * 3 + 12 * 15) / 1e6
    assert done.spent.dollars == pytest.approx(dollars)
    assert 0.018 < dollars <= 0.02
    assert "budget_usd 0.02" in done.spent.stopped


def test_a_budget_below_one_request_sends_none() -> None:
    with serving(Stub()) as stub:
        done = ask(stub, 3, budget_tokens=FIRST - 1)
    assert not stub.requests and not done.results
    assert "4,365 tokens in and 64 out" in done.spent.stopped


@pytest.mark.parametrize("fault", ["500", "wrong JSON", "reset"])
def test_what_a_broken_request_may_have_used_counts(fault: str) -> None:
    with serving(Stub(answering=first(fault, 30))) as stub:
        done = ask(stub, 100, budget_tokens=3 * FIRST, concurrency=1, tries=9)
    assert stub.tokens <= 3 * FIRST
    assert done.spent.presumed == 3 * FIRST and len(stub.requests) == 3


def test_a_server_that_does_not_count_is_taken_to_have_used_all() -> None:
    with serving(Stub(counts=False)) as stub:
        done = ask(stub, 100, budget_tokens=4 * FIRST)
    assert len(done.captioned) == 4 == len(stub.requests)
    assert done.spent.presumed == 4 * FIRST


def test_absurd_counts_are_told_once_and_are_taken_as_none(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Stub(prompt_tokens=lambda body: 10**30)) as stub:
        done = ask(stub, 3)
    assert [(one.tokens_in, one.tokens_out) for one in done.captioned] == [(0, 0)] * 3 and done.spent.presumed > 0
    assert caplog.text.count("counts prompt_tokens 100000000000000000000000: 0 to 1,000,000,000 can be. It counts as not told") == 1


def test_earlier_runs_count_against_the_budget() -> None:
    with serving(Stub()) as stub:
        done = ask(stub, 100, budget_tokens=2 * FIRST, before=Spent(tokens_in=FIRST + 1))
    assert not stub.requests and "used)" in done.spent.stopped
    assert done.spent.tokens == FIRST + 1


def test_what_is_spent_is_told_after_each_request() -> None:
    with serving(Stub()) as stub:
        done = ask(stub, 5, concurrency=1)
    assert [spent.tokens for spent in done.spents] == [112, 224, 336, 448, 560]


# --- Ends ---------------------------------------------------------------------------------------------------------------------------------


def test_after_a_halt_no_request_is_sent_and_those_under_way_count() -> None:
    halted = threading.Event()

    def answering(number: int, body: Mapping[str, Any]) -> str:
        if number == 9:
            halted.set()
        return caption_server.caption(number, body)

    with serving(Stub(answering=answering, latency_s=0.02)) as stub:
        done = ask(stub, 200, halt=halted.is_set, concurrency=4)
    assert done.spent.stopped == "halted"
    assert len(done.captioned) == len(stub.requests) < 100, "each that was sent was waited for"
    again = Done()
    with serving(Stub()) as stub:
        left = [clip for clip in clips(200) if clip.id not in done.results]
        caption_all(left, Path(), settings(stub), on_done=again.put, halt=lambda: False, frames_of=frames_of)
    assert len(again.captioned) + len(done.captioned) == 200


def test_a_server_that_is_down_is_told_once_with_its_address_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        stub = Stub(url=f"http://user:secret@127.0.0.1:{port}/v1?token=secret")
        with caplog.at_level(logging.INFO), pytest.raises(ConfigError) as error:
            ask(stub, 20, timeout_s=0.2)
    assert f"captioning server http://127.0.0.1:{port}/v1 could not be reached for 0.2 s" in str(error.value)
    assert f"`curl http://127.0.0.1:{port}/v1/models`" in str(error.value)
    assert len(caplog.records) == 1 and "secret" not in caplog.text + str(error.value)


def test_a_server_that_takes_connections_and_says_nothing_is_told() -> None:
    with troubled("hangs") as url, pytest.raises(ConfigError, match=r"could not be reached for 0\.2 s \(none in 0\.2 s\)"):
        ask(Stub(url=f"{url}/v1"), 3, timeout_s=0.2)


def test_a_slow_answer_is_waited_for() -> None:
    with serving(Stub(answering=always("slow"), latency_s=0.4)) as stub:
        done = ask(stub, 4)
    assert len(done.captioned) == 4 == len(stub.requests)


@pytest.mark.long
def test_a_server_that_dies_ends_the_run_and_no_clip_is_put_aside_for_it() -> None:
    done = Done()
    held = serving(Stub(answering=always("slow")))
    stub = held.__enter__()
    closed = threading.Event()

    def close(number: int, body: Mapping[str, Any]) -> str:
        if number == 5:
            threading.Thread(target=lambda: (held.__exit__(None, None, None), closed.set())).start()
        return "slow"

    stub.answering = close
    with pytest.raises(ConfigError, match="could not be reached"):
        ask(stub, 5000, timeout_s=1.5, concurrency=2, done=done, tries=100)
    closed.wait()
    assert done.captioned and not done.reasons


def test_a_wrong_key_is_told_once_and_no_clip_is_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSCTL_CAPTION_KEY", raising=False)
    with serving(Stub(key="right-key")) as stub:
        done = Done()
        with pytest.raises(ConfigError, match=r"answers 401.*There is no key in OSCTL_CAPTION_KEY"):
            ask(stub, 5, done=done)
        monkeypatch.setenv("OSCTL_CAPTION_KEY", "wrong-key")
        with pytest.raises(ConfigError, match="The key of OSCTL_CAPTION_KEY") as error:
            ask(stub, 5, done=done)
        assert "wrong-key" not in str(error.value), "the server's words quote it"
    assert not done.results


def test_a_key_that_stops_to_work_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCTL_CAPTION_KEY", "right-key")
    with serving(Stub(key="right-key", answering=lambda number, body: "401" if number > 2 else "a man walks home")) as stub:
        done = Done()
        with pytest.raises(ConfigError, match="answers 401"):
            ask(stub, 50, done=done, concurrency=1)
    assert len(done.captioned) == 3 and not done.reasons


def test_the_key_is_sent_and_stands_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OSCTL_CAPTION_KEY", "the-key\n")
    with caplog.at_level(logging.DEBUG), serving(Stub(key="the-key", answering=first("400"))) as stub:
        done = ask(stub, 3)
    assert stub.headers[0]["Authorization"] == "Bearer the-key"
    assert "the-key" not in repr(done) + caplog.text


def test_a_model_that_is_not_there_ends_the_run_with_what_to_look_at() -> None:
    with serving(Stub()) as stub, pytest.raises(ConfigError, match=r"404: The model `other` does not exist.*curl http://127"):
        ask(stub, 5, model="other")


def test_what_on_done_raises_ends_the_run_at_once() -> None:
    def full(name: str, result: object) -> None:
        raise OSError(28, "No space left on device")

    with serving(Stub()) as stub, pytest.raises(OSError, match="No space left"):
        caption_all(clips(50), Path(), settings(stub), on_done=full, halt=lambda: False, frames_of=frames_of)
    assert len(stub.requests) < 20


def test_a_clip_without_its_file_is_put_aside_and_asks_nothing() -> None:
    def missing(path: Path, shares: Sequence[float], side: int) -> list[bytes]:
        raise FileNotFoundError(2, "No such file or directory")

    done = Done()
    with serving(Stub()) as stub:
        rows = [clip_rows.clip("without"), *clips(1)]
        caption_all(rows, Path(), settings(stub), on_done=done.put, halt=lambda: False, frames_of=missing)
        assert not stub.requests
    assert sorted(done.reasons) == ["clip file cannot be read", "clip has no file"]
