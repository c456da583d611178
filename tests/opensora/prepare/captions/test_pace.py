"""How many requests are under way: the server's limit is found, kept, and tried again now and then."""

from __future__ import annotations

import pytest

from opensora.prepare.captions.pace import MOST_ROUNDS, ROUNDS, Pace


def rounds(pace: Pace, server: int, number: int) -> int:
    """Requests that a server of this limit refused: in each round as many are sent as may, and all are answered."""
    refused = 0
    for _ in range(number):
        sent = 0
        while pace.wait(0.0) == 0:
            pace.sent()
            sent += 1
        for _ in range(max(sent - server, 0)):
            pace.done()
            pace.refused(0.0, None)
            refused += 1
        for _ in range(min(sent, server)):
            pace.done()
            pace.answered()
    return refused


@pytest.mark.parametrize("server", [1, 3, 8, 16, 100])
def test_the_limit_of_a_server_is_found_in_one_round(server: int) -> None:
    pace = Pace(16)
    rounds(pace, server, 1)
    assert pace.limit == min(server, 16)


@pytest.mark.parametrize("server", [1, 3, 8])
def test_a_fixed_limit_is_run_into_less_and_less(server: int) -> None:
    pace = Pace(16)
    rounds(pace, server, 1)
    assert rounds(pace, server, 1000) <= 1000 / MOST_ROUNDS + 8
    assert pace.limit in (server, server + 1)


def test_a_server_that_has_room_again_gets_more() -> None:
    pace = Pace(8)
    rounds(pace, 2, 1)
    rounds(pace, 8, 6 * (ROUNDS + 1))
    assert pace.limit == 8


def test_never_more_than_the_most() -> None:
    pace = Pace(3)
    rounds(pace, 100, 100)
    assert pace.limit == 3


def test_retry_after_holds_new_requests_and_they_go_afterwards() -> None:
    pace = Pace(4)
    pace.sent()
    pace.done()
    pace.refused(10.0, 3.0)
    assert pace.wait(10.0) == 3.0 and pace.wait(12.0) == 1.0 and pace.wait(13.0) == 0.0


def test_a_shorter_wait_does_not_end_a_longer_one() -> None:
    pace = Pace(4)
    pace.refused(10.0, 9.0)
    pace.refused(10.0, 1.0)
    assert pace.wait(12.0) == 7.0


def test_refusals_in_a_row_count_where_one_at_a_time_was_sent() -> None:
    pace = Pace(4)
    for _ in range(2):
        pace.sent()
    pace.done()
    pace.refused(0.0, None)
    assert pace.refused_in_a_row == 0, "another one was under way"
    pace.done()
    pace.refused(0.0, None)
    assert pace.refused_in_a_row == 1
    pace.answered()
    assert pace.refused_in_a_row == 0
