"""The bill's laws: every device-second in exactly one category, totals are sums of parts, price is linear, queueing is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cost import AttemptTime, Bill, Unbalanced, account, load_prices, merge
from orchestrator.errors import UsageError
from orchestrator.prices import Prices
from orchestrator.records import HELD, WAITING, JournalPiece

LAW = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""Deterministic, and indifferent to a busy machine."""


PRICES = load_prices()


def piece(
    start: float, spent: dict[str, float], *, node: int = 0, seq: int = 0, devices: int = 2, steps: tuple[int, int] | None = None
) -> JournalPiece:
    first, last = steps if steps else (None, None)
    return JournalPiece(
        node=node, seq=seq, start=start, end=start + sum(spent.values()), devices=devices, spent=spent, first_step=first, last_step=last
    )


def attempt(
    pieces: Sequence[JournalPiece],
    *,
    number: int = 1,
    devices: int = 2,
    bound: float | None = 0.0,
    ended: float | None = None,
    resumed_from: int = 0,
    last_published: int = 0,
    device: str = "h800",
) -> AttemptTime:
    return AttemptTime(
        attempt=number,
        devices=devices,
        device=device,
        bound=bound,
        ended=ended,
        pieces=pieces,
        resumed_from=resumed_from,
        last_published=last_published,
    )


@st.composite
def journals(draw: st.DrawFn, number: int = 1, resumed_from: int = 0) -> AttemptTime:
    """An attempt of some nodes whose journals are contiguous from `bound`, and which may end after, or run still."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    bound = draw(st.floats(1e9, 2e9))
    pieces: list[JournalPiece] = []
    ends = []
    for node in range(nodes):
        now, step = bound, resumed_from
        for seq in range(draw(st.integers(0, 4))):
            spent = draw(
                st.dictionaries(st.sampled_from([c for c in HELD if c not in ("lost", "unaccounted")]), st.floats(0, 1e4), max_size=4)
            )
            finished = draw(st.integers(0, 5))
            steps = (step + 1, step + finished) if finished else None
            step += finished
            pieces.append(piece(now, spent, node=node, seq=seq, devices=per_node, steps=steps))
            now = pieces[-1].end
        ends.append(now)
    ended = draw(st.one_of(st.none(), st.floats(0, 1e4).map(lambda after: max(ends) + after)))
    return attempt(pieces, number=number, devices=nodes * per_node, bound=bound, ended=ended, resumed_from=resumed_from)


@st.composite
def stages(draw: st.DrawFn) -> list[AttemptTime]:
    """Attempts of a stage, each going on from some step that an earlier one reached."""
    attempts: list[AttemptTime] = []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        reached = max((p.last_step or 0 for time in attempts for p in time.pieces), default=0)
        attempts.append(draw(journals(number=number, resumed_from=draw(st.integers(0, reached)))))
    return attempts


@LAW
@given(stages())
def test_every_device_second_is_in_exactly_one_category(attempts: list[AttemptTime]) -> None:
    bill = account(attempts, PRICES)
    for each, time in zip(bill.attempts, attempts, strict=True):
        assert set(each.seconds) == set(HELD)
        assert all(seconds >= -1e-6 for seconds in each.seconds.values())
        each.check()
        if time.ended is not None and time.bound is not None:
            assert each.held_s == pytest.approx(time.devices * (time.ended - time.bound))


@LAW
@given(stages())
def test_what_is_lost_is_taken_from_steps_and_from_nothing_else(attempts: list[AttemptTime]) -> None:
    together = account(attempts, PRICES)
    for each, time in zip(together.attempts, attempts, strict=True):
        alone = account([time], PRICES).attempts[0]
        assert each.seconds["step"] + each.seconds["lost"] == pytest.approx(alone.seconds["step"])
        assert {c: s for c, s in each.seconds.items() if c not in ("step", "lost")} == {
            c: s for c, s in alone.seconds.items() if c not in ("step", "lost")
        }
        assert each.usd == alone.usd
    assert together.attempts[-1].seconds["lost"] == 0, "nobody went on from before the last attempt"


@LAW
@given(stages(), stages())
def test_totals_are_the_sums_of_their_parts(first: list[AttemptTime], second: list[AttemptTime]) -> None:
    one, two = account(first, PRICES), account(second, PRICES)
    both = merge([one, two])
    assert both.usd == one.usd + two.usd == sum(each.usd for each in both.attempts)
    assert both.held_s == pytest.approx(one.held_s + two.held_s)
    assert both.gpu_hours == pytest.approx(one.gpu_hours + two.gpu_hours)
    assert sum(both.seconds.values()) == pytest.approx(sum(one.seconds.values()) + sum(two.seconds.values()))


@LAW
@given(stages(), st.integers(0, 1000))
def test_the_price_is_linear(attempts: list[AttemptTime], factor: int) -> None:
    h800 = PRICES.device("h800")
    dearer = Prices(devices={"h800": h800.model_copy(update={"usd_per_hour": h800.usd_per_hour * factor})})
    expected = account(attempts, PRICES).usd * factor
    assert account(attempts, dearer).usd == pytest.approx(expected, rel=Decimal("1e-20"))


@LAW
@given(journals(), st.dictionaries(st.sampled_from(WAITING), st.floats(0, 1e5), min_size=1))
def test_queueing_costs_nothing(time: AttemptTime, queued: dict[str, float]) -> None:
    assert time.bound is not None
    before = piece(time.bound - sum(queued.values()), queued, devices=time.devices)
    bill, waited = account([time], PRICES), account([replace(time, pieces=[before, *time.pieces])], PRICES)
    assert waited.usd == bill.usd
    assert waited.held_s == bill.held_s
    assert waited.waiting_s == pytest.approx(sum(queued.values()) * time.devices)
    assert waited.seconds == bill.seconds


def test_dollars_are_device_hours_times_the_price() -> None:
    # 2 devices for half an hour: one H800-hour.
    bill = account([attempt([piece(0, {"init": 60, "step": 1740})], ended=1800)], PRICES)
    assert bill.usd == Decimal("2.43")
    assert (bill.device_hours, bill.gpu_hours) == (1.0, 1.0)
    assert bill.goodput == pytest.approx(1740 / 1800)
    assert bill.check() == 0


def test_a_cpu_has_device_hours_but_no_gpu_hours() -> None:
    bill = account([attempt([piece(0, {"step": 1800})], ended=1800, device="cpu-core")], PRICES)
    assert (bill.device_hours, bill.gpu_hours) == (1.0, 0.0)
    assert bill.usd == PRICES.device("cpu-core").usd_per_hour


def test_no_attempts_cost_nothing() -> None:
    bill = account([], PRICES)
    assert (bill.usd, bill.held_s, bill.goodput, bill.check()) == (Decimal(0), 0, None, 0)
    assert bill.seconds == dict.fromkeys(HELD, 0.0)


def test_an_attempt_that_never_held_a_device_costs_nothing() -> None:
    bill = account([attempt([], bound=None, ended=50.0)], PRICES)
    assert (bill.held_s, bill.usd) == (0, 0)


def test_what_follows_the_last_piece_of_a_killed_attempt_is_unaccounted() -> None:
    bill = account([attempt([piece(0, {"step": 10})], ended=13)], PRICES)
    assert bill.unaccounted_s == 2 * 3
    assert bill.held_s == 2 * 13
    bill.check()


def test_a_node_that_was_never_heard_of_is_unaccounted_from_the_start() -> None:
    bill = account([attempt([piece(0, {"step": 10})], devices=6, ended=10)], PRICES)
    assert bill.unaccounted_s == 4 * 10
    assert bill.seconds["step"] == 2 * 10


def test_a_running_attempt_is_billed_up_to_each_nodes_last_piece() -> None:
    pieces = [piece(0, {"init": 4}), piece(4, {"step": 6}, seq=1), piece(0, {"init": 7}, node=1)]
    bill = account([attempt(pieces, devices=4)], PRICES)
    assert bill.held_s == 2 * 10 + 2 * 7
    assert bill.unaccounted_s == 0
    bill.check()


def test_what_lies_between_a_binding_and_a_nodes_first_word_is_pull() -> None:
    pieces = [piece(3, {"step": 17}), piece(5, {"step": 15}, node=1)]
    bill = account([attempt(pieces, devices=4, ended=20)], PRICES)
    assert bill.seconds["pull"] == 2 * 3 + 2 * 5
    assert bill.held_s == 4 * 20
    bill.check()


def test_without_a_bind_time_the_first_piece_counts() -> None:
    assert account([attempt([piece(100, {"init": 5})], bound=None)], PRICES).held_s == 10


@pytest.mark.parametrize(
    ("pieces", "booked"),
    [
        ([piece(0, {"step": 10}), piece(12, {"step": 8}, seq=1)], 36),
        ([piece(0, {"step": 10}), piece(8, {"step": 12}, seq=1)], 44),
        ([piece(0, {"step": 25})], 50),
    ],
    ids=["gap", "overlap", "longer than life"],
)
def test_a_journal_that_does_not_add_up_is_an_error_with_both_numbers(pieces: list[JournalPiece], booked: int) -> None:
    bill = account([attempt(pieces, ended=20)], PRICES)
    assert bill.attempts[0].difference_s() == 40 - booked
    with pytest.raises(Unbalanced, match=rf"^attempt 1: 40\.000 device-seconds were held, {booked}\.000 are booked\."):
        bill.check()


@pytest.mark.parametrize(("late", "balanced"), [(0.049, True), (0.051, False)])
def test_fifty_milliseconds_a_device_are_tolerated(late: float, balanced: bool) -> None:
    bill = account([attempt([piece(0, {"init": 5}), piece(5 + late, {"step": 5 - late}, seq=1)], ended=10)], PRICES)
    assert bill.attempts[0].difference_s() == pytest.approx(2 * late)
    if balanced:
        bill.check()
    else:
        with pytest.raises(Unbalanced):
            bill.check()


def test_of_a_long_attempt_a_thousandth_is_tolerated() -> None:
    account([attempt([piece(0, {"init": 50}), piece(59, {"step": 9941}, seq=1)], ended=10_000)], PRICES).check()
    with pytest.raises(Unbalanced):
        account([attempt([piece(0, {"init": 50}), piece(61, {"step": 9939}, seq=1)], ended=10_000)], PRICES).check()


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(Unbalanced, match="attempt 1: node 0 books 'coffee'"):
        account([attempt([piece(0, {"coffee": 1})])], PRICES)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="device 'abacus': is not in the price list"):
        account([attempt([], device="abacus")], PRICES)


def killed_twice() -> Bill:
    """Steps of one second on one device. 1: steps 1-15, published 10. 2: from 10 to 12, published nothing. 3: from 10 to 20, the end."""
    times = [
        attempt([piece(0, {"step": 15}, devices=1, steps=(1, 15))], number=1, devices=1, ended=15, last_published=10),
        attempt(
            [piece(20, {"step": 2}, devices=1, steps=(11, 12))], number=2, devices=1, bound=20, ended=22, resumed_from=10, last_published=10
        ),
        attempt(
            [piece(30, {"step": 10}, devices=1, steps=(11, 20))],
            number=3,
            devices=1,
            bound=30,
            ended=40,
            resumed_from=10,
            last_published=20,
        ),
    ]
    return account(times, PRICES)


def test_a_step_that_was_done_three_times_is_lost_twice_and_productive_once() -> None:
    bill = killed_twice()
    assert [each.seconds["lost"] for each in bill.attempts] == [5, 2, 0]
    assert bill.seconds["step"] == 20, "as many productive steps as the stage has"
    assert bill.held_s == 27
    assert bill.goodput == pytest.approx(20 / 27)


def test_progress_of_later_attempts_does_not_bring_lost_steps_back() -> None:
    """1: steps 1-10, published 8. 2: from 8 to 13, published 12. 3: from 12 to 20, the end."""
    times = [
        attempt([piece(0, {"step": 10}, devices=1, steps=(1, 10))], devices=1, ended=10, last_published=8),
        attempt([piece(20, {"step": 5}, devices=1, steps=(9, 13))], number=2, devices=1, bound=20, ended=25, resumed_from=8),
        attempt([piece(30, {"step": 8}, devices=1, steps=(13, 20))], number=3, devices=1, bound=30, ended=38, resumed_from=12),
    ]
    bill = account(times, PRICES)
    assert [each.seconds["lost"] for each in bill.attempts] == [2, 1, 0]
    assert bill.seconds["step"] == 20


def test_the_order_of_attempts_and_pieces_does_not_matter() -> None:
    pieces = [piece(float(at), {"step": 1}, seq=at, devices=1, steps=(at + 1, at + 1)) for at in range(5)]
    first = attempt(pieces, devices=1, ended=5, last_published=3)
    second = attempt([piece(9, {"step": 2}, devices=1, steps=(4, 5))], number=2, devices=1, bound=9, ended=11, resumed_from=3)
    assert account([first, second], PRICES) == account([second, replace(first, pieces=pieces[::-1])], PRICES)
    assert account([first, second], PRICES).attempts[0].seconds["lost"] == 2


def test_going_back_further_than_the_last_checkpoint_loses_more() -> None:
    """Where the newest checkpoint turned out damaged, an older one is resumed: what lies between was redone too."""
    first = attempt([piece(0, {"step": 10}, devices=1, steps=(1, 10))], devices=1, ended=10, last_published=8)
    second = attempt([], number=2, devices=1, bound=20, resumed_from=4)
    assert account([first, second], PRICES).attempts[0].seconds["lost"] == 6


def test_a_piece_without_a_finished_step_belongs_to_the_step_under_way() -> None:
    pieces = [
        piece(0, {"step": 5}, devices=1, steps=(1, 1)),
        piece(5, {"step": 5}, seq=1, devices=1),
        piece(10, {"step": 3}, seq=2, devices=1),
    ]
    first = attempt(pieces, devices=1, ended=13, last_published=1)
    for resumed_from, lost in ((1, 8), (0, 13)):
        second = attempt([], number=2, devices=1, bound=20, resumed_from=resumed_from)
        assert account([first, second], PRICES).attempts[0].seconds["lost"] == lost


def test_steps_that_no_checkpoint_holds_yet_are_named_but_not_lost() -> None:
    bill = account([attempt([piece(0, {"step": 10}, devices=1, steps=(1, 10))], devices=1, ended=10, last_published=8)], PRICES)
    assert (bill.seconds["lost"], bill.seconds["step"], bill.unsaved_s) == (0, 10, 2)


def test_waiting_for_data_is_not_lost_with_the_step() -> None:
    first = attempt([piece(0, {"step": 8, "data_wait": 2}, devices=1, steps=(1, 4))], devices=1, ended=10, last_published=2)
    second = attempt([], number=2, devices=1, bound=20, resumed_from=2)
    seconds = account([first, second], PRICES).attempts[0].seconds
    assert (seconds["step"], seconds["lost"], seconds["data_wait"]) == (4, 4, 2)
