"""The bill's laws: every device-second in exactly one category, totals are sums of parts, price is linear, queueing is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.accounting.cost import AttemptTime, Bill, account, merge
from orchestrator.accounting.node_fold import fold
from orchestrator.ledger.records import HELD, WAITING, JournalPiece
from orchestrator.recipe.prices import load_prices, price_of

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
        price=price_of(PRICES, device),
        bound=bound,
        ended=ended,
        nodes=fold(pieces, resumed_from),
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
        reached = max((last for time in attempts for node in time.nodes for _, last, _ in node.runs), default=0)
        attempts.append(draw(journals(number=number, resumed_from=draw(st.integers(0, reached)))))
    return attempts


@LAW
@given(stages())
def test_every_device_second_is_in_exactly_one_category(attempts: list[AttemptTime]) -> None:
    bill = account(attempts)
    for each, time in zip(bill.attempts, attempts, strict=True):
        assert set(each.seconds) == set(HELD)
        assert all(seconds >= -1e-6 for seconds in each.seconds.values())
        assert not list(each.remarks())
        if time.ended is not None and time.bound is not None:
            assert each.held_s == pytest.approx(time.devices * (time.ended - time.bound))


@LAW
@given(stages())
def test_what_is_lost_is_taken_from_steps_and_from_nothing_else(attempts: list[AttemptTime]) -> None:
    together = account(attempts)
    for each, time in zip(together.attempts, attempts, strict=True):
        alone = account([time]).attempts[0]
        assert each.seconds["step"] + each.seconds["lost"] == pytest.approx(alone.seconds["step"])
        assert {c: s for c, s in each.seconds.items() if c not in ("step", "lost")} == {
            c: s for c, s in alone.seconds.items() if c not in ("step", "lost")
        }
        assert each.usd == alone.usd
    assert together.attempts[-1].seconds["lost"] == 0, "nobody went on from before the last attempt"


@LAW
@given(stages(), stages())
def test_totals_are_the_sums_of_their_parts(first: list[AttemptTime], second: list[AttemptTime]) -> None:
    one, two = account(first), account(second)
    both = merge([one, two])
    assert both.usd == one.usd + two.usd == sum(each.usd for each in both.attempts)
    assert both.held_s == pytest.approx(one.held_s + two.held_s)
    assert both.gpu_hours == pytest.approx(one.gpu_hours + two.gpu_hours)
    assert sum(both.seconds.values()) == pytest.approx(sum(one.seconds.values()) + sum(two.seconds.values()))


@LAW
@given(stages(), st.integers(0, 1000))
def test_the_price_is_linear(attempts: list[AttemptTime], factor: int) -> None:
    price = price_of(PRICES, "h800")
    assert price is not None
    dearer = price.model_copy(update={"usd_per_hour": price.usd_per_hour * factor})
    expected = account(attempts).usd * factor
    assert account([replace(one, price=dearer) for one in attempts]).usd == pytest.approx(expected, rel=Decimal("1e-20"))


@LAW
@given(journals(), st.dictionaries(st.sampled_from(WAITING), st.floats(0, 1e5), min_size=1))
def test_queueing_costs_nothing(time: AttemptTime, queued: dict[str, float]) -> None:
    assert time.bound is not None
    before = fold([piece(time.bound - sum(queued.values()), queued, node=99, devices=time.devices)])
    bill, waited = account([time]), account([replace(time, nodes=[*before, *time.nodes])])
    assert waited.usd == bill.usd
    assert waited.held_s == bill.held_s
    assert waited.waiting_s == pytest.approx(sum(queued.values()) * time.devices)
    assert waited.seconds == bill.seconds


def test_dollars_are_device_hours_times_the_price() -> None:
    # 2 devices for half an hour: one H800-hour.
    bill = account([attempt([piece(0, {"init": 60, "step": 1740})], ended=1800)])
    assert bill.usd == Decimal("2.43")
    assert (bill.device_hours, bill.gpu_hours) == (1.0, 1.0)
    assert bill.goodput == pytest.approx(1740 / 1800)
    assert bill.difference_s() == 0 and not list(bill.remarks())


def test_a_cpu_has_device_hours_but_no_gpu_hours() -> None:
    bill = account([attempt([piece(0, {"step": 1800})], ended=1800, device="cpu-core")])
    assert (bill.device_hours, bill.gpu_hours) == (1.0, 0.0)
    assert bill.usd == PRICES.device("cpu-core").usd_per_hour


def test_no_attempts_cost_nothing() -> None:
    bill = account([])
    assert (bill.usd, bill.held_s, bill.goodput, bill.difference_s()) == (Decimal(0), 0, None, 0)
    assert bill.seconds == dict.fromkeys(HELD, 0.0)


def test_what_doubles_cannot_tell_apart_is_no_difference() -> None:
    """Unix times as doubles are 0.24 µs apart: no bill shows that as time that is missing, or as less than none."""
    bound = 1_764_000_000.0
    bill = account([attempt([piece(bound, {"step": 1.0})], bound=bound, ended=bound + 1 - 5e-7)]).attempts[0]
    assert bill.held_s < bill.booked_s
    assert str(bill.difference_s()) == "0.0"


def test_an_attempt_that_never_held_a_device_costs_nothing() -> None:
    bill = account([attempt([], bound=None, ended=50.0)])
    assert (bill.held_s, bill.usd) == (0, 0)


def test_what_follows_the_last_piece_of_a_killed_attempt_is_unaccounted() -> None:
    bill = account([attempt([piece(0, {"step": 10})], ended=13)])
    assert bill.unaccounted_s == 2 * 3
    assert bill.held_s == 2 * 13
    assert not list(bill.remarks())


def test_a_node_that_was_never_heard_of_is_unaccounted_from_the_start() -> None:
    bill = account([attempt([piece(0, {"step": 10})], devices=6, ended=10)])
    assert bill.unaccounted_s == 4 * 10
    assert bill.seconds["step"] == 2 * 10


def test_a_running_attempt_is_billed_up_to_each_nodes_last_piece() -> None:
    pieces = [piece(0, {"init": 4}), piece(4, {"step": 6}, seq=1), piece(0, {"init": 7}, node=1)]
    bill = account([attempt(pieces, devices=4)])
    assert bill.held_s == 2 * 10 + 2 * 7
    assert bill.unaccounted_s == 0
    assert not list(bill.remarks())


def test_what_lies_between_a_binding_and_a_nodes_first_word_is_pull() -> None:
    pieces = [piece(3, {"step": 17}), piece(5, {"step": 15}, node=1)]
    bill = account([attempt(pieces, devices=4, ended=20)])
    assert bill.seconds["pull"] == 2 * 3 + 2 * 5
    assert bill.held_s == 4 * 20
    assert not list(bill.remarks())


def test_without_a_bind_time_the_first_piece_counts() -> None:
    assert account([attempt([piece(100, {"init": 5})], bound=None)]).held_s == 10


@pytest.mark.parametrize(
    ("pieces", "booked", "what"),
    [
        ([piece(0, {"step": 10}), piece(12, {"step": 8}, seq=1)], 36, "a gap"),
        ([piece(0, {"step": 10}), piece(8, {"step": 12}, seq=1)], 44, "time that is booked twice"),
    ],
    ids=["gap", "overlap"],
)
def test_a_journal_that_does_not_add_up_is_billed_with_a_remark_of_both_numbers(pieces: list[JournalPiece], booked: int, what: str) -> None:
    bill = account([attempt(pieces, ended=20)])
    assert bill.attempts[0].difference_s() == 40 - booked
    (remark,) = bill.remarks()
    assert remark.startswith(f"attempt 1: 40.000 device-seconds were held, {booked}.000 are booked: its journal has {what}.")
    assert bill.usd > 0


def test_what_an_agent_says_after_its_outcome_is_paid() -> None:
    """Two lives: an attempt that was given up at 20 went on to 25."""
    bill = account([attempt([piece(0, {"step": 25})], ended=20)])
    assert bill.held_s == bill.attempts[0].booked_s == 2 * 25 and not list(bill.remarks())


@pytest.mark.parametrize(("late", "balanced"), [(0.049, True), (0.051, False)])
def test_fifty_milliseconds_a_device_are_tolerated(late: float, balanced: bool) -> None:
    bill = account([attempt([piece(0, {"init": 5}), piece(5 + late, {"step": 5 - late}, seq=1)], ended=10)])
    assert bill.attempts[0].difference_s() == pytest.approx(2 * late)
    assert (not list(bill.remarks())) == balanced


def test_of_a_long_attempt_a_thousandth_is_tolerated() -> None:
    near = account([attempt([piece(0, {"init": 50}), piece(59, {"step": 9941}, seq=1)], ended=10_000)])
    far = account([attempt([piece(0, {"init": 50}), piece(61, {"step": 9939}, seq=1)], ended=10_000)])
    assert [len(list(bill.remarks())) for bill in (near, far)] == [0, 1]


def test_an_unknown_category_is_unaccounted_and_said() -> None:
    bill = account([attempt([piece(0, {"coffee": 1})])])
    assert bill.unaccounted_s == 2
    assert list(bill.remarks()) == ["attempt 1: node 0 books 1.000 s as 'coffee', a category that this version does not know"]


def test_a_device_without_a_price_is_said() -> None:
    bill = account([attempt([piece(0, {"step": 10})], device="abacus")])
    assert (bill.usd, bill.held_s, bill.gpu_hours) == (0, 20, 0)
    (remark,) = bill.remarks()
    assert "no price is known of device 'abacus'" in remark and "OSCTL_PRICES=FILE osctl cost" in remark


def test_nodes_that_begin_at_different_times_balance_while_they_run() -> None:
    """Node 1 began 20 s before node 0; nobody has said yet when they were bound."""
    pieces = [piece(120, {"step": 10}), piece(100, {"init": 20, "step": 10}, node=1)]
    bill = account([attempt(pieces, devices=4, bound=None)])
    assert bill.held_s == bill.attempts[0].booked_s == 2 * 10 + 2 * 30 and not list(bill.remarks())


@st.composite
def gangs(draw: st.DrawFn) -> AttemptTime:
    """Nodes with clocks that differ by seconds, that start and fall silent when they like or say nothing at all, of an attempt that runs,
    was closed, or was killed and went on all the same; bound before, between or after their first words, or nobody knows when."""
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    origin = draw(st.floats(1e9, 2e9))
    moment = st.floats(-30, 600).map(lambda after: origin + after)
    pieces: list[JournalPiece] = []
    for node in range(nodes):
        now = draw(moment)
        for seq in range(draw(st.integers(0, 4))):
            spent = draw(st.dictionaries(st.sampled_from(["init", "step", "data_wait", "hang"]), st.floats(0.001, 300), max_size=3))
            pieces.append(piece(now, spent, node=node, seq=seq, devices=per_node))
            now = pieces[-1].end
    bound = draw(st.one_of(st.none(), moment))
    ended = draw(st.one_of(st.none(), st.floats(0, 2000).map(lambda after: (bound or origin) + after)))
    return attempt(pieces, devices=nodes * per_node, bound=bound, ended=ended)


@pytest.mark.long
@settings(LAW, max_examples=200)
@given(gangs())
def test_the_books_of_any_gang_balance(time: AttemptTime) -> None:
    (bill,) = account([time]).attempts
    assert not list(bill.remarks()), (bill.held_s, bill.booked_s)
    assert all(seconds >= 0 for seconds in bill.seconds.values()) and bill.usd >= 0


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
    return account(times)


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
    bill = account(times)
    assert [each.seconds["lost"] for each in bill.attempts] == [2, 1, 0]
    assert bill.seconds["step"] == 20


def test_the_order_of_attempts_and_pieces_does_not_matter() -> None:
    pieces = [piece(float(at), {"step": 1}, seq=at, devices=1, steps=(at + 1, at + 1)) for at in range(5)]
    first = attempt(pieces, devices=1, ended=5, last_published=3)
    second = attempt([piece(9, {"step": 2}, devices=1, steps=(4, 5))], number=2, devices=1, bound=9, ended=11, resumed_from=3)
    assert account([first, second]) == account([second, replace(first, nodes=fold(pieces[::-1]))])
    assert account([first, second]).attempts[0].seconds["lost"] == 2


def test_going_back_further_than_the_last_checkpoint_loses_more() -> None:
    """Where the newest checkpoint turned out damaged, an older one is resumed: what lies between was redone too."""
    first = attempt([piece(0, {"step": 10}, devices=1, steps=(1, 10))], devices=1, ended=10, last_published=8)
    second = attempt([], number=2, devices=1, bound=20, resumed_from=4)
    assert account([first, second]).attempts[0].seconds["lost"] == 6


def test_a_piece_without_a_finished_step_belongs_to_the_step_under_way() -> None:
    pieces = [
        piece(0, {"step": 5}, devices=1, steps=(1, 1)),
        piece(5, {"step": 5}, seq=1, devices=1),
        piece(10, {"step": 3}, seq=2, devices=1),
    ]
    first = attempt(pieces, devices=1, ended=13, last_published=1)
    for resumed_from, lost in ((1, 8), (0, 13)):
        second = attempt([], number=2, devices=1, bound=20, resumed_from=resumed_from)
        assert account([first, second]).attempts[0].seconds["lost"] == lost


def test_steps_that_no_checkpoint_holds_yet_are_named_but_not_lost() -> None:
    bill = account([attempt([piece(0, {"step": 10}, devices=1, steps=(1, 10))], devices=1, ended=10, last_published=8)])
    assert (bill.seconds["lost"], bill.seconds["step"], bill.unsaved_s) == (0, 10, 2)


def test_waiting_for_data_is_not_lost_with_the_step() -> None:
    first = attempt([piece(0, {"step": 8, "data_wait": 2}, devices=1, steps=(1, 4))], devices=1, ended=10, last_published=2)
    second = attempt([], number=2, devices=1, bound=20, resumed_from=2)
    seconds = account([first, second]).attempts[0].seconds
    assert (seconds["step"], seconds["lost"], seconds["data_wait"]) == (4, 4, 2)
