"""Laws of reading a ledger's attempts again and again: the sums are those of the pieces, and nothing that is known is read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from written_ledger import START, Writer, pipeline

from orchestrator.accounting.cost import account
from orchestrator.accounting.history import LATE_S, SILENT_S, History
from orchestrator.accounting.node_fold import TOTALS_EVERY, NodeFold, fold
from orchestrator.ledger.records import Intent, JournalPiece, Price
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.prices import Prices, load_prices
from orchestrator.stores import open_store


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


def test_a_look_asks_for_the_next_piece_of_each_node_and_for_no_other(story: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 20)
    ledger = again(story)
    history = History(ledger)
    history.attempts("stage1", intent.inputs_digest, story.now)
    asked = requests(ledger, monkeypatch)
    key = lambda seq: ledger.keys.journal("stage1", intent.inputs_digest, 1, 0, seq)  # noqa: E731
    history.attempts("stage1", intent.inputs_digest, story.now)
    assert asked == [key(3)]
    asked.clear()
    story.train(intent, 30)
    asked.clear()  # the writer's own
    (one,) = history.attempts("stage1", intent.inputs_digest, story.now)
    assert asked == [key(3), key(4)] and one.step == 30
    assert not any("/journal/" in known for known in ledger._objects.known)


def test_who_has_just_started_reads_from_the_newest_sums(story: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    intent, pieces = long_story(story, 2 * TOTALS_EVERY + 5)
    ledger = again(story)
    asked = requests(ledger, monkeypatch)
    (quick,) = History(ledger).attempts("stage1", intent.inputs_digest, story.now)
    assert len(asked) == 6 and not any(each.startswith("list") for each in asked)
    (whole,) = History(again(story), verify=True).attempts("stage1", intent.inputs_digest, story.now)
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
        (one,) = history.attempts("stage1", intent.inputs_digest, start + second)
        assert one.time.nodes == () or one.first.seq == count - 1
    assert count == 12 and len(asked) <= 3 * count + 4, len(asked)


def test_what_lies_behind_a_refused_piece_is_found_when_the_node_seems_silent(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 10)
    history = History(again(story))
    history.attempts("stage1", intent.inputs_digest, story.now)
    story.train(intent, 30)
    Path(story.ledger.store.url, story.ledger.keys.journal("stage1", intent.inputs_digest, 1, 0, 2)).unlink()
    (blind,) = history.attempts("stage1", intent.inputs_digest, story.now)
    (found,) = history.attempts("stage1", intent.inputs_digest, story.now + SILENT_S + 1)
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
    (before,) = history.attempts("stage1", intent.inputs_digest, story.now)
    story.train(intent, 20)
    for late in (history, History(again(story))):
        (after,) = late.attempts("stage1", intent.inputs_digest, story.now)
        bill = account([after.time])
        assert bill.held_s - account([before.time]).held_s == pytest.approx(8 * 10 * story.pace(intent.config))
        assert not list(bill.remarks())
    assert (
        history.attempts("stage1", intent.inputs_digest, story.now + LATE_S + 1)[0]
        is history.attempts("stage1", intent.inputs_digest, START + 1e6)[0]
    )


def test_a_damaged_piece_is_said_and_hides_nothing(story: Writer) -> None:
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    key = story.ledger.keys.journal("stage1", intent.inputs_digest, 1, 0, 2)
    Path(story.ledger.store.url, key).write_bytes(b"{")
    (one,) = History(again(story)).attempts("stage1", intent.inputs_digest, story.now)
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
    inputs_digest = intent.inputs_digest
    story.train(intent, 10)
    bills = [
        account([one.time for one in History(again(story), priced(usd)).attempts("stage1", inputs_digest, story.now)])
        for usd in ("2.43", "99")
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
    for one in History(again(story), priced("99")).attempts("stage1", intent.inputs_digest, story.now):
        assert one.time.price is not None
        prices.append(one.time.price.usd_per_hour)
    assert prices == [Decimal("1.00"), Decimal("3.00")]


def profile(usd: str) -> dict[str, Any]:
    from orchestrator.recipe.cluster_profile import ClusterProfile

    image = "registry.example/osctl@sha256:" + "0" * 64
    content = {
        "name": "ours", "image": image, "driver_image": image, "device": "h800", "cpu": "8", "memory": "128Gi",
        "price": {"usd_per_hour": usd, "source": "ours", "date": "2026-01-01"},
    }  # fmt: skip
    return ClusterProfile.model_validate(content).model_dump(mode="json")
