"""Logs by stage, rank, node, attempt and time; events as a timeline. Out of a ledger written by hand, in a folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from written_ledger import Writer, pipeline

from orchestrator.cli import main
from orchestrator.cli.logs import Lines, ranks_of, seconds_of
from orchestrator.errors import UsageError
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.stores.folder import FolderStore

Run = Callable[..., str]
ALL = ["[rank0] old", "[rank1] old", "[rank2] between", "[rank0] new", "[rank1] new", "from torchrun", "[rank3] no last newline"]


def two_nodes() -> Pipeline:
    demo = pipeline()
    first = demo.stages[0]
    resources = first.spec.resources.model_copy(update={"nodes": 2, "devices_per_node": 2})
    spec = first.spec.model_copy(update={"resources": resources})
    return demo.model_copy(update={"stages": (first.model_copy(update={"spec": spec}), *demo.stages[1:])})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(FolderStore(tmp_path / "store"), "demo")


@pytest.fixture
def intent(ledger: Ledger) -> Intent:
    """Two nodes of two ranks: some lines an hour ago, some now; a line is cut in two by the end of a piece."""
    writer = Writer(ledger, two_nodes(), now=time.time() - 7200)
    writer.launch()
    made = writer.begin("stage1").model_copy(update={"nodes": 2, "devices_per_node": 2})
    # The writer knows one node; what logs ask for is how many there are.
    path = Path(ledger.store.url) / ledger.keys.intent(made.stage, made.inputs_digest, made.attempt)
    path.write_bytes(made.encode())
    now = time.time()
    ledger.append_log(made, 0, 0, b"[rank0] old\n[rank1] old\n", now - 3600)
    ledger.append_log(made, 1, 0, b"[rank2] between\n", now - 1800)
    ledger.append_log(made, 0, 1, b"[rank0] new\n[rank1] ne", now - 2)
    ledger.append_log(made, 0, 2, b"w\nfrom torchrun\n", now - 1)
    ledger.append_log(made, 1, 1, b"[rank3] no last newline", now)
    writer.close(made, "lost")
    return made


@pytest.fixture
def run(tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def osctl(*words: str, expect: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["osctl", *words, "--store", ledger.store.url])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert code == expect, said.err
        return said.out if expect == 0 else said.err

    return osctl


def test_nodes_are_printed_in_the_order_of_time(run: Run, intent: Intent) -> None:
    assert run("logs").splitlines() == ALL


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (("--rank", "1"), ["[rank1] old", "[rank1] new"]),
        (("--rank", "0,2-3"), ["[rank0] old", "[rank2] between", "[rank0] new", "[rank3] no last newline"]),
        (("--node", "1"), ["[rank2] between", "[rank3] no last newline"]),
        (("--node", "0", "--rank", "2"), []),
        (("--since", "10m"), ["[rank0] new", "[rank1] new", "from torchrun", "[rank3] no last newline"]),
        (("--since", "45m", "--rank", "2"), ["[rank2] between"]),
        (("-f",), ALL),
    ],
)
def test_logs_are_chosen_by_rank_node_and_time(run: Run, intent: Intent, options: tuple[str, ...], lines: list[str]) -> None:
    assert run("logs", "stage1", *options).splitlines() == lines


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rank", "8-1"), "range"),
        (("--rank", "all"), "rank"),
        (("--node", "2"), "nodes 0 to 1"),
        (("--since", "yesterday"), "10m"),
        (("--attempt", "7"), "1 to 1"),
    ],
)
def test_a_mistake_says_what_there_is(run: Run, intent: Intent, options: tuple[str, ...], said: str) -> None:
    assert said in run("logs", *options, expect=2)


def test_where_nothing_ran_there_are_no_logs(run: Run) -> None:
    assert run("logs", expect=2).startswith("error: logs: no attempt in the ledger; stages that ran: none.")


def test_lines_of_nodes_are_never_mixed() -> None:
    said: list[bytes] = []
    lines = Lines(None, said.append)
    for node, text in ((0, b"first ha"), (1, b"second\nthi"), (0, b"lf\n"), (1, b"rd\n")):
        lines.feed(node, text)
    lines.end()
    assert said == [b"second\n", b"first half\n", b"third\n"]


def test_durations_and_ranks_are_read_or_refused() -> None:
    assert (seconds_of("1h30m"), seconds_of("2d"), seconds_of("0.5s")) == (5400.0, 172_800.0, 0.5)
    assert ranks_of("0, 8-10") == {0, 8, 9, 10}
    for wrong in ("", "10", "m", "-5m"):
        with pytest.raises(UsageError):
            seconds_of(wrong)


def test_events_are_the_ledgers_in_its_order(run: Run, ledger: Ledger) -> None:
    Writer(ledger, pipeline()).three_stages()
    rows = json.loads(run("events", "-o", "json"))
    assert [(row["kind"], row["detail"]) for row in rows] == [(event.kind, event.detail) for event in ledger.events()]
    assert rows[0]["kind"] == "launched" and rows[-1]["detail"].startswith("succeeded")
    assert [json.loads(line) for line in run("events", "--follow", "-o", "json").splitlines()] == rows
    assert "succeeded" in run("events")
