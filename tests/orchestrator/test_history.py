"""Laws of the one fold of journals into time: however it is read, the sums are those of its pieces; and no look reads what it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_ledger import START, Writer, pipeline

from orchestrator.adapters import open_store
from orchestrator.cost import account
from orchestrator.history import LATE_S, MOST_RUNS, SILENT_S, TOTALS_EVERY, WINDOW, History, NodeFold, fold
from orchestrator.ledger import Ledger
from orchestrator.prices import Prices, load_prices
from orchestrator.records import Intent, JournalPiece, Price, Totals

LAW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def story(tmp_path: Path) -> Writer:
    return Writer(Ledger(open_store(str(tmp_path / "store")), "demo"), pipeline())


def again(story: Writer) -> Ledger:
    """The same ledger to a process that has just started."""
    return Ledger(story.ledger.store, "demo")


def requests(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a journal from here on: keys that are read, and `list PREFIX`."""
    asked: list[str] = []
    store, read, list_ = ledger.store, ledger.store.read, ledger.store.list

    def note_read(key: str) -> Any:
        asked.extend([key] if "/journal/" in key else [])
        return read(key)

    def note_list(prefix: str, after: str = "") -> Any:
        asked.extend([f"list {prefix}"] if "/journal/" in prefix else [])
        return list_(prefix, after)

    monkeypatch.setattr(store, "read", note_read)
    monkeypatch.setattr(store, "list", note_list)
    return asked


@st.composite
def nodes(draw: st.DrawFn) -> list[JournalPiece]:
    """One node's pieces: steps between checkpoints of every 7, some pieces without a step, some without anything."""
    pieces, now, step = [], draw(st.floats(1e9, 2e9)), draw(st.integers(0, 20))
    for seq in range(draw(st.integers(1, 30))):
        left = 7 - step % 7
        count = draw(st.integers(0, min(3, left)))
        spent = draw(st.dictionaries(st.sampled_from(["step", "data_wait", "checkpoint", "queue"]), st.floats(0, 100), max_size=3))
        lines = tuple({"step": step + each, "loss": 1 / (step + each), "step_s": 0.5} for each in range(1, count + 1))
        pieces.append(
            JournalPiece(
                node=0, seq=seq, start=now, end=now + sum(spent.values()), devices=2, spent=spent, metrics=lines,
                first_step=step + 1 if count else None, last_step=step + count if count else None,
            )
        )  # fmt: skip
        now, step = pieces[-1].end, step + count
    return pieces


@LAW
@given(nodes(), st.data())
def test_sums_that_were_written_down_go_on_to_the_same_bit(pieces: list[JournalPiece], data: st.DataObject) -> None:
    whole, first = NodeFold(0, 3, 7), NodeFold(0, 3, 7)
    cut = data.draw(st.integers(1, len(pieces)))
    for piece in pieces:
        whole.add(piece)
    for piece in pieces[:cut]:
        first.add(piece)
    second = NodeFold(0, 3, 7)
    second.begin_at(Totals.decode(first.totals().encode()))
    for piece in pieces:  # those that are in it change nothing
        second.add(piece)
    assert second.totals() == whole.totals() and second.time() == whole.time()


@LAW
@given(nodes(), st.integers(0, 8))
def test_steps_of_a_checkpoint_interval_are_never_told_apart_and_need_not_be(pieces: list[JournalPiece], interval: int) -> None:
    """At each step from which an attempt can be resumed, the coarse sums lose exactly what the pieces lose."""
    fine, coarse = fold(pieces, 0, 1), fold(pieces, 0, 7)
    for node_fine, node_coarse in zip(fine, coarse, strict=True):
        lost = [
            sum(s * min(b - a + 1, max(0, b - 7 * interval)) / (b - a + 1) for a, b, s in node.runs) for node in (node_fine, node_coarse)
        ]
        assert lost[0] == pytest.approx(lost[1])
        assert len(node_coarse.runs) <= len(node_fine.runs)


def test_what_is_remembered_of_a_node_is_bounded() -> None:
    sums = NodeFold(0)
    for seq in range(3 * MOST_RUNS):
        line = {"step": seq + 1, "loss": 1.0, "step_s": 1.0}
        sums.add(
            JournalPiece(
                node=0, seq=seq, start=seq, end=seq + 1, devices=1, spent={"step": 1.0}, first_step=seq + 1, last_step=seq + 1,
                metrics=(line,),
            )
        )  # fmt: skip
    assert len(sums.runs) <= MOST_RUNS and len(sums.recent) == WINDOW
    assert sum(seconds for *_, seconds, _ in sums.runs) == sums.spent["step"] == 3 * MOST_RUNS
    assert len(sums.totals().encode()) < 64 * 1024


def test_a_look_asks_for_the_next_piece_of_each_node_and_for_no_other(story: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 20)
    ledger = again(story)
    history = History(ledger)
    history.attempts("stage1", intent.inputs, story.now)
    asked = requests(ledger, monkeypatch)
    key = lambda seq: ledger.keys.journal("stage1", intent.inputs, 1, 0, seq)  # noqa: E731
    history.attempts("stage1", intent.inputs, story.now)
    assert asked == [key(3)]
    asked.clear()
    story.train(intent, 30)
    asked.clear()  # the writer's own
    (one,) = history.attempts("stage1", intent.inputs, story.now)
    assert asked == [key(3), key(4)] and one.step == 30
    assert not any("/journal/" in known for known in ledger._known)


def test_who_has_just_started_reads_from_the_newest_sums(story: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    intent, pieces = long_story(story, 2 * TOTALS_EVERY + 5)
    ledger = again(story)
    asked = requests(ledger, monkeypatch)
    (quick,) = History(ledger).attempts("stage1", intent.inputs, story.now)
    assert len(asked) == 6 and not any(each.startswith("list") for each in asked)
    (whole,) = History(again(story), verify=True).attempts("stage1", intent.inputs, story.now)
    assert quick.time == whole.time and quick.recent == whole.recent
    assert account([quick.time]) == account([whole.time]) == account([replace(whole.time, nodes=fold(pieces, 0, 10))])


def long_story(story: Writer, count: int) -> tuple[Intent, list[JournalPiece]]:
    """Pieces as an agent writes them, with its sums."""
    story.launch()
    intent, sums, pieces = story.begin("stage1"), NodeFold(0, 0, 10), []
    for seq in range(count):
        piece = JournalPiece(
            node=0, seq=seq, start=story.now, end=story.now + 0.7, devices=8, spent={"step": 0.6, "data_wait": 0.1}, first_step=seq + 1,
            last_step=seq + 1, metrics=({"step": seq + 1, "time": story.now, "loss": 1.0, "step_s": 0.6, "data_wait_s": 0.1},),
        )  # fmt: skip
        story.now = piece.end
        story.ledger.append_journal(intent, piece)
        sums.add(piece)
        pieces.append(piece)
        if seq % TOTALS_EVERY == TOTALS_EVERY - 1:
            story.ledger.append_totals(intent, sums.totals())
    return intent, pieces


def test_who_looks_each_second_asks_only_when_a_piece_can_be_there(story: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece every 5 s, and a look each second for a minute: twelve pieces, and some two questions in vain for each."""
    story.launch()
    intent = story.begin("stage1")
    ledger = again(story)
    history = History(ledger, calm=True)
    asked = requests(ledger, monkeypatch)
    start, count = story.now, 0
    for second in range(60):
        if second % 5 == 3:
            piece = JournalPiece(node=0, seq=count, start=start + 5 * count, end=start + 5 * count + 5, devices=8, spent={"step": 5.0})
            story.ledger.append_journal(intent, piece)
            count += 1
        (one,) = history.attempts("stage1", intent.inputs, start + second)
        assert one.time.nodes == () or one.first.seq == count - 1
    assert count == 12 and len(asked) <= 3 * count + 4, len(asked)


def test_what_lies_behind_a_refused_piece_is_found_when_the_node_seems_silent(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    history = History(again(story))
    history.attempts("stage1", intent.inputs, story.now)
    story.train(intent, 30)
    Path(story.ledger.store.url, story.ledger.keys.journal("stage1", intent.inputs, 1, 0, 2)).unlink()
    (blind,) = history.attempts("stage1", intent.inputs, story.now)
    (found,) = history.attempts("stage1", intent.inputs, story.now + SILENT_S + 1)
    assert (blind.step, found.step) == (10, 30)
    (remark,) = account([found.time]).remarks()
    assert "its journal has a gap" in remark


def test_late_words_of_an_attempt_that_was_given_up_are_paid(story: Writer) -> None:
    """Two lives of one attempt: its outcome says lost, and its agent trains on."""
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    history = History(again(story))
    story.close(intent, "lost")
    (before,) = history.attempts("stage1", intent.inputs, story.now)
    story.train(intent, 20)
    for late in (history, History(again(story))):
        (after,) = late.attempts("stage1", intent.inputs, story.now)
        bill = account([after.time])
        assert bill.held_s - account([before.time]).held_s == pytest.approx(8 * 10 * story.pace(intent.config))
        assert not list(bill.remarks())
    assert history.attempts("stage1", intent.inputs, story.now + LATE_S + 1)[0] is history.attempts("stage1", intent.inputs, START + 1e6)[0]


def test_a_damaged_piece_is_said_and_hides_nothing(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    key = story.ledger.keys.journal("stage1", intent.inputs, 1, 0, 2)
    Path(story.ledger.store.url, key).write_bytes(b"{")
    (one,) = History(again(story)).attempts("stage1", intent.inputs, story.now)
    assert one.step == 30
    remarks = list(account([one.time]).remarks())
    assert len(remarks) == 2 and f"{key} is half written" in remarks[1]


def priced(usd: str) -> Callable[[], Prices]:
    devices = load_prices().devices
    return lambda: Prices(devices=devices | {"h800": devices["h800"].model_copy(update={"usd_per_hour": Decimal(usd)})})


def test_a_bill_never_changes_when_a_price_list_does(story: Writer) -> None:
    story.launch()
    story.price = Price(usd_per_hour=Decimal("1.10"), is_gpu=True, basis="published", source="a contract", date="2026-01-01")
    intent = story.begin("stage1")
    inputs = intent.inputs
    story.train(intent, 10)
    bills = [
        account([one.time for one in History(again(story), priced(usd)).attempts("stage1", inputs, story.now)]) for usd in ("2.43", "99")
    ]
    assert bills[0] == bills[1] and bills[0].attempts[0].usd_per_hour == Decimal("1.10")


def test_an_attempt_of_an_older_release_is_billed_at_the_cluster_of_its_revision(story: Writer) -> None:
    """The first revision names a price of its cluster, the second another one; neither wrote terms."""
    prices = []
    for usd in ("1.00", "3.00"):
        story.now += 100
        story.ledger.add_revision(story.pipeline.model_dump(mode="json") | {"cluster": profile(usd)}, story.now)
        intent = story.begin("stage1")
        story.train(intent, 10)
        story.close(intent, "lost")
    for one in History(again(story), priced("99")).attempts("stage1", intent.inputs, story.now):
        assert one.time.price is not None
        prices.append(one.time.price.usd_per_hour)
    assert prices == [Decimal("1.00"), Decimal("3.00")]


def test_what_follows_the_last_step_takes_nothing_from_the_steps_before_it() -> None:
    """A drained attempt: its last checkpoint is of its last step, and what it did afterwards is no step that has to be done again."""

    def piece(seq: int, first: int | None, last: int | None, **spent: float) -> JournalPiece:
        return JournalPiece(node=0, seq=seq, start=float(seq), end=float(seq + 1), devices=2, spent=spent, first_step=first, last_step=last)

    pieces = [piece(0, 1, 30, step=3.0), piece(1, 31, 38, step=0.8), piece(2, None, None, drain=1.0), piece(3, None, None, publish=1.0)]
    node = NodeFold(0, every_steps=100)
    for each in pieces:
        node.add(each)
    assert node.time().runs == ((1, 38, 3.8),)
    node.add(piece(4, None, None, step=0.5))
    assert node.time().runs == ((1, 38, 3.8), (39, 39, 0.5))
    later = NodeFold(0, every_steps=100)
    later.begin_at(node.totals())
    for each in (node, later):
        each.add(piece(5, 39, 40, step=0.1))
        assert each.time().runs == ((1, 40, pytest.approx(4.4)),)


def profile(usd: str) -> dict[str, Any]:
    from orchestrator.cluster import ClusterProfile

    image = "registry.example/osctl@sha256:" + "0" * 64
    content = {
        "name": "ours", "image": image, "driver_image": image, "device": "h800", "cpu": "8", "memory": "128Gi",
        "price": {"usd_per_hour": usd, "source": "ours", "date": "2026-01-01"},
    }  # fmt: skip
    return ClusterProfile.model_validate(content).model_dump(mode="json")
