"""Laws of a preparation's bill: every device-second once, at the price of then, and what is not priced is never free."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from typing import Any

import pytest
from prepare_bench import Bench

from orchestrator.ledger.records import Price
from orchestrator.prepare import attempts
from orchestrator.prepare.attempts import Attempt
from orchestrator.prepare.bill import BETWEEN, bill
from orchestrator.prepare.records import Held, Intent, Keys, Outcome, held_of
from orchestrator.prepare.watching import look

KEYS = Keys("mine")
OLD_INTENT = (
    b'{"attempt":1,"code":"0.3","config":{},"created":100.0,"device":"cpu-core","epoch":1,"name":"mine","price":{"basis":"assumption",'
    b'"date":"2026-11-30","is_gpu":false,"schema":1,"source":"a test","usd_per_hour":"3.6"},"schema":1,"stages":[],"workers":2}\n'
)
OLD_OUTCOME = (
    b'{"bound":100.0,"caption_usd":0.25,"class":"completed","dataset":null,"device_seconds":20.0,"ended":110.0,"epoch":1,"exit_code":0,'
    b'"reason":"","schema":1,"tokens_in":0,"tokens_out":0}\n'
)


def price(usd_per_hour: str, *, gpu: bool = False) -> Price:
    return Price(usd_per_hour=Decimal(usd_per_hour), is_gpu=gpu, basis="assumption", source="a test", date="2026-11-30")


def intent(number: int = 1, gpu_price: Price | None = None) -> Intent:
    return Intent(
        name="mine", attempt=number, epoch=1, created=100.0, config={}, stages=(), workers=2, device="cpu-core", price=price("3.6"),
        gpu="local-gpu", gpu_price=gpu_price, code="",
    )  # fmt: skip


def held(step: str, kind: Any, seconds: float) -> Held:
    return Held(step=step, kind=kind, name="cpu" if kind == "cpu" else "NVIDIA H200", seconds=seconds)


def outcome(*steps: Held, device_seconds: float = 20.0) -> Outcome:
    return Outcome(
        class_="completed", exit_code=0, reason="", bound=100.0, ended=110.0, device_seconds=device_seconds, held=steps, epoch=1
    )  # fmt: skip


def status(time: float = 105.0, **steps: Any) -> dict[str, Any]:
    return {"time": time, "steps": steps}


CAPTION = {"device": "NVIDIA H200", "devices": 1, "held_s": {"cpu": 10.0, "cuda": 4.0}}


def test_each_second_is_billed_once_and_what_no_step_held_stands_apart() -> None:
    steps = held("caption", "cpu", 10.0), held("caption", "cuda", 4.0), held("frames", "cpu", 6.0)
    found = bill([Attempt(1, intent(gpu_price=price("36", gpu=True)), outcome(*steps))])
    lines = [(line.step, line.device, line.name, line.seconds, line.usd) for line in found.sorted()]
    assert lines == [
        ("frames", "cpu-core", "cpu", 6.0, Decimal("0.006")),
        ("caption", "cpu-core", "cpu", 10.0, Decimal("0.010")),
        ("caption", "local-gpu", "NVIDIA H200", 4.0, Decimal("0.04")),
        (BETWEEN, "cpu-core", "cpu", 4.0, Decimal("0.004")),
    ]
    assert (found.core_hours, found.gpu_hours) == (pytest.approx(20 / 3600), pytest.approx(4 / 3600))
    assert found.usd == Decimal("0.06") and found.not_priced == ()


def test_attempts_are_summed_each_at_the_price_of_then() -> None:
    two = [
        Attempt(number, intent(number, price(usd, gpu=True)), outcome(held("caption", "cuda", 3.0)))
        for number, usd in ((1, "36"), (2, "72"))
    ]
    (line,) = [line for line in bill(two).lines if line.is_gpu]
    assert (line.seconds, line.usd) == (6.0, Decimal("0.09"))


def test_what_is_not_priced_is_named_and_in_no_sum() -> None:
    found = bill([Attempt(1, intent(), outcome(held("caption", "cuda", 4.0)))])
    (line,) = [line for line in found.lines if line.is_gpu]
    assert line.usd is None and found.not_priced == ("local-gpu",) and found.usd == Decimal("0.02")
    priced = Attempt(2, intent(2, price("36", gpu=True)), outcome(held("caption", "cuda", 4.0)))
    (both,) = [line for line in bill([Attempt(1, intent(), outcome(held("caption", "cuda", 4.0))), priced]).lines if line.is_gpu]
    assert both.usd is None, "half of a price is none"


def test_the_attempt_that_runs_is_billed_by_what_it_says_now_and_not_by_what_an_earlier_one_said() -> None:
    running = Attempt(1, intent(gpu_price=price("36", gpu=True)), None)
    found = bill([running], status(caption=CAPTION))
    assert (found.usd, found.gpu_hours) == (Decimal("0.05"), pytest.approx(4 / 3600))
    assert bill([running], status(99.0, caption=CAPTION)).lines == ()


def test_records_of_before_are_read_and_billed_as_before_and_written_as_they_were() -> None:
    old = Attempt(1, Intent.decode(OLD_INTENT), Outcome.decode(OLD_OUTCOME))
    assert old.intent is not None and old.outcome is not None
    assert (old.intent.encode(), old.outcome.encode()) == (OLD_INTENT, OLD_OUTCOME)
    found = bill([old])
    assert (found.usd, found.gpu_hours, found.not_priced) == (Decimal("0.27"), 0, ())
    assert [line.step for line in found.lines] == [BETWEEN]


@pytest.mark.parametrize(
    "damage", [{"held_s": 3}, {"held_s": {"cuda": -1}}, {"held_s": {"tpu": 1}}, {"held_s": {"cuda": "x"}}, {"held_s": {"cuda": None}}, 7]
)
def test_what_a_process_says_wrongly_counts_as_not_said(damage: Any) -> None:
    assert held_of(status(caption=damage, frames={"device": "cpu", "held_s": {"cpu": 1.0}})) == (held("frames", "cpu", 1.0),)


def test_the_books_keep_the_gpu_and_the_price_that_was_written_down_before(bench: Bench) -> None:
    preparation = bench.preparation("--gpu", "NVIDIA H200")
    preparation.asked = dataclasses.replace(preparation.asked, price=price("3.6"), gpu="local-gpu", gpu_price=price("36", gpu=True))
    prepared = preparation.run()
    (one,) = attempts.all_of(bench.store, KEYS)
    assert one.intent is not None and one.outcome is not None
    assert (one.intent.gpu, one.intent.gpu_price) == ("local-gpu", price("36", gpu=True))
    assert one.outcome.held == (Held(step="download", kind="cpu", name="cpu", seconds=0.01), held("download", "cuda", 4.0))
    assert float(prepared.usd) == pytest.approx(0.001 * one.outcome.device_seconds + 0.04 + 0.25) and prepared.not_priced == ()
    assert look(bench.store, "mine", bench.directory().path).bill.usd == prepared.usd


def test_a_gpu_without_a_price_is_told_by_the_run(bench: Bench) -> None:
    preparation = bench.preparation("--gpu", "NVIDIA H200")
    preparation.asked = dataclasses.replace(preparation.asked, price=price("3.6"), gpu="local-gpu")
    assert preparation.run().not_priced == ("local-gpu",)


def test_what_an_attempt_held_whose_launcher_died_is_in_the_books(bench: Bench) -> None:
    class Died(Exception):
        pass

    def dies(status: Any) -> None:
        if status.get("steps"):
            raise Died

    preparation = bench.preparation("--gpu", "NVIDIA H200", "--slow", "0.2")
    preparation.asked = dataclasses.replace(preparation.asked, price=price("3.6"), gpu="local-gpu", gpu_price=price("36", gpu=True))
    preparation.on_progress = dies
    with pytest.raises(Died):
        preparation.run()
    bench.run()
    lost, _ = attempts.all_of(bench.store, KEYS)
    assert lost.outcome is not None and lost.outcome.class_ == "lost" and lost.outcome.gpu_seconds == 4.0
    assert lost.outcome.device_seconds >= 0.01, "it lived at least until it said so"
