"""Laws of status.json."""

from __future__ import annotations

import json
from pathlib import Path

from opensora.dataset.rows import Drop, Quarantine
from opensora.prepare.reconcile import Tally
from opensora.prepare.status import Status


def status(tmp_path: Path, tallies: dict[str, Tally]) -> Status:
    (tmp_path / "temporary").mkdir(exist_ok=True)
    return Status(tmp_path / "status.json", tmp_path / "temporary", tallies, 2)


def test_rates_are_of_the_last_minute_and_the_rest_is_estimated_from_them(tmp_path: Path) -> None:
    tally = Tally(into=1000)
    one = status(tmp_path, {"frames": tally})
    for second in range(200):
        tally.kept = second if second < 100 else 100 + 4 * (second - 100)
        content = one.content(float(second))
    assert content["steps"]["frames"]["rate"] == 4.0
    assert content["steps"]["frames"]["eta_s"] == round((1000 - tally.kept) / 4.0, 1)
    assert content["eta_s"] == content["steps"]["frames"]["eta_s"]


def test_nothing_is_said_of_what_is_not_known(tmp_path: Path) -> None:
    content = status(tmp_path, {"frames": Tally(into=10)}).content(0.0)
    assert content["eta_s"] is None
    assert content["steps"]["frames"]["rate"] == 0.0


def test_counts_by_reason_cpu_tokens_and_dollars_are_there(tmp_path: Path) -> None:
    tally = Tally(into=4, kept=1)
    tally.leave(Drop("static above 0.9", "0.95"))
    tally.leave(Drop("static above 0.9", "0.99"))
    tally.leave(Quarantine("crash (SIGSEGV)", ""))
    with status(tmp_path, {"frames": tally}) as one:
        one.cpu_of = lambda: {"frames": 1.25}
        one.tokens_in, one.tokens_out, one.usd = 100, 20, 0.5
    content = json.loads((tmp_path / "status.json").read_text())
    assert content["steps"]["frames"] | {"rate": 0} == {
        "in": 4, "kept": 1, "dropped": {"static above 0.9": 2}, "quarantined": {"crash (SIGSEGV)": 1}, "rate": 0,
        "eta_s": None, "cpu_s": 1.25,
    }  # fmt: skip
    assert (content["tokens_in"], content["tokens_out"], content["usd"], content["running"]) == (100, 20, 0.5, False)
    assert not list((tmp_path / "temporary").iterdir())
