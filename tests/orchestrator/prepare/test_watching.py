"""A preparation seen by somebody else: what is known of it, and following it to its end."""

from __future__ import annotations

import threading
import time

import pytest
from prepare_bench import Bench

from orchestrator.errors import Refused
from orchestrator.prepare.watching import State, follow, is_held, look, names_in


def test_nothing_is_known_of_what_nobody_prepared(bench: Bench) -> None:
    with pytest.raises(Refused, match="osctl prepare run"):
        look(bench.store, "mine", bench.directory().path)
    assert names_in(bench.store) == []


def test_somebody_elsewhere_sees_how_it_stands(bench: Bench) -> None:
    bench.run()
    state = look(bench.store, "mine", bench.folder / "another machine")
    assert (state.word, state.holder) == ("prepared", None) and state.status["step"] == "download" and len(state.attempts) == 1
    assert names_in(bench.store) == ["mine"]


def test_one_that_failed_or_was_stopped_says_so(bench: Bench) -> None:
    with pytest.raises(Exception, match="as the test asked"):
        bench.run("--fail", "data")
    assert look(bench.store, "mine", bench.directory().path).word == "failed"
    preparation = bench.preparation("--slow", "0.05")
    preparation.drain()
    preparation.run()
    assert look(bench.store, "mine", bench.directory().path).word == "stopped"


@pytest.mark.long
def test_a_second_person_follows_the_first_to_its_end(bench: Bench) -> None:
    running = threading.Thread(target=bench.run, args=("--slow", "0.3"))
    running.start()
    try:
        deadline = time.monotonic() + 60
        while not bench.made() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(Refused) as caught:
            bench.run(run_dir="other")
        assert is_held(caught.value)
        seen: list[State] = []
        end = follow(bench.store, "mine", bench.directory().path, seen.append)
    finally:
        running.join()
    assert seen[0].word == "running" and seen[0].holder is not None and end.word == "prepared"
