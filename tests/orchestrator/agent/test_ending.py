"""The table of docs/contracts.md, "How an attempt ends", as far as an agent can see it."""

from __future__ import annotations

import signal
from typing import Any, get_args

import pytest

from opensora.errors import Kind
from orchestrator.agent.ending import Ending, ending_of
from orchestrator.driver.retries import classify
from orchestrator.ledger.records import EXIT_CODES, ExitClass, Report
from orchestrator.ports import Life

TORCHRUN_KILLED = """
E1123 07:21:27 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 16368) of binary: python
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
opensora.train FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-23_07:21:27
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 16367)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 16367
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_07:21:26
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 16368)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 16368
============================================================
"""
"""As torchrun 2.13 prints it (its head shortened)."""
TORCHRUN_FAILED = """
Traceback (most recent call last):
  File "x.py", line 2, in <module>
RuntimeError: boom
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
[0]:
  rank      : 3 (local_rank: 3)
  exitcode  : 1 (pid: 16837)
"""
SUMMARY = """
============================================================
opensora.train FAILED
------------------------------------------------------------
Failures:
{others}
------------------------------------------------------------
Root Cause (first observed failure):
{root}
============================================================
"""
NOBODY_MET = """
Traceback (most recent call last):
  File "x.py", line 2, in <module>
torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError
"""
NCCL_PEER = "[rank2]:[E1123] Process group watchdog thread terminated: NCCL error: remote process exited or there was a network error\n"
EXITED_1 = 1 << 8


def failure(index: int, rank: int, code: int) -> str:
    """A failure as torchrun 2.15 prints it; its pid is 100 + rank."""
    pid = 100 + rank
    return (
        f"[{index}]:\n  time      : 2026-11-23_07:21:27\n  host      : localhost\n  rank      : {rank} (local_rank: {rank % 2})\n"
        f"  exitcode  : {code} (pid: {pid})\n  error_file: <N/A>\n  traceback : N/A"
    )


def summary(root: str, *others: str, ended: tuple[int, ...] = ()) -> str:
    """`ended`: ranks that torchrun ended itself."""
    closing = "".join(f"W1123 07:21 multiprocessing/api.py:900] Sending process {100 + rank} closing signal SIGTERM\n" for rank in ended)
    return closing + SUMMARY.format(root=root, others="\n".join(others) or "  <NO_OTHER_FAILURES>")


def result(status: str, **more: Any) -> dict[str, Any]:
    return {"schema": 1, "status": status, "step": 7, "reason": "because", "class": None, "rank": None, "evaluation": {}} | more


@pytest.mark.parametrize(
    ("said", "class_", "code"),
    [
        (result("completed"), "completed", 0),
        (result("drained"), "drained", 143),
        (result("failed", **{"class": "config"}), "config", 64),
        (result("failed", **{"class": "parent"}), "parent", 65),
        (result("failed", **{"class": "data"}), "data", 72),
        (result("failed", **{"class": "nan"}), "nan", 66),
        (result("failed", **{"class": "spike"}), "spike", 73),
        (result("failed", **{"class": "oom"}), "oom", 67),
        (result("failed", **{"class": "disk"}), "disk", 70),
        (result("failed", **{"class": "code"}), "code", 1),
        (result("failed"), "code", 1),
        (result("failed", **{"class": "unheard of"}), "code", 1),
        (result("dancing"), "code", 1),
        ({}, "code", 1),
    ],
)
def test_what_the_trainer_said_counts_and_not_its_exit_code(said: dict[str, Any], class_: ExitClass, code: int) -> None:
    for status in (0, EXITED_1, int(signal.SIGKILL)):
        ending = ending_of(said, status, TORCHRUN_KILLED, 6)
        assert (ending.class_, ending.exit_code) == (class_, code)
        assert ending.step == said.get("step", 6)


@pytest.mark.parametrize(
    ("status", "output", "class_", "code", "rank", "reason"),
    [
        (EXITED_1, TORCHRUN_KILLED, "signal", 137, 1, "rank 1 was ended by SIGKILL after step 6"),
        (
            EXITED_1,
            TORCHRUN_FAILED,
            "code",
            1,
            3,
            "rank 3 ended with exit code 1 after step 6 and wrote no result.json: RuntimeError: boom",
        ),
        (int(signal.SIGSEGV), "", "signal", 139, None, "the trainer was ended by SIGSEGV after step 6"),
        (0, "", "code", 1, None, "the trainer ended with exit code 0 after step 6 and wrote no result.json"),
        (3 << 8, "all is well: so far", "code", 1, None, "the trainer ended with exit code 3 after step 6 and wrote no result.json"),
    ],
)
def test_a_trainer_that_said_nothing_is_judged_by_its_first_failing_rank(
    status: int, output: str, class_: ExitClass, code: int, rank: int | None, reason: str
) -> None:
    ending = ending_of(None, status, output, 6)
    assert (ending.class_, ending.exit_code, ending.rank, ending.reason) == (class_, code, rank, reason)


def test_every_class_has_its_own_exit_code_and_only_drained_has_143() -> None:
    codes = [Ending(class_, "").exit_code for class_ in EXIT_CODES]
    assert len(set(codes)) == len(codes)
    assert [class_ for class_ in EXIT_CODES if Ending(class_, "").exit_code == 143] == ["drained"]
    assert Ending("lost", "").exit_code == Ending("signal", "").exit_code == 137


def test_every_kind_of_end_that_the_trainer_reports_is_heard_as_what_it_is() -> None:
    kinds = get_args(Kind)
    endings = [ending_of(result("failed", **{"class": kind}), EXITED_1, "", 6) for kind in kinds]
    assert [ending.class_ for ending in endings] == list(kinds)
    assert len({ending.exit_code for ending in endings}) == len(kinds)


def test_readings_that_are_no_numbers_are_left_out() -> None:
    ending = ending_of(result("completed", evaluation={"a": 0.5, "b": float("nan"), "c": "x", "d": None}), 0, "", 6)
    assert ending.evaluation == {"a": 0.5}


@pytest.mark.parametrize(
    ("output", "class_", "rank"),
    [
        pytest.param(summary(failure(0, 2, 75)), "peer", None, id="a peer of another node was gone"),
        pytest.param(summary(failure(0, 2, 75), failure(1, 3, 75)), "peer", None, id="both ranks noticed"),
        pytest.param(summary(failure(0, 2, 75), failure(1, 3, -9), ended=(3,)), "peer", None, id="torchrun killed the rank that stood"),
        pytest.param(summary(failure(0, 2, 75), failure(1, 3, -9)), "signal", 3, id="seen together with the cause"),
        pytest.param(summary(failure(0, 3, -9), failure(1, 2, 75), ended=(2,)), "signal", 3, id="the cause was seen first"),
        pytest.param(summary(failure(0, 2, 75), failure(1, 3, 1)), "code", 3, id="a local cause is never called a peer's"),
        pytest.param(summary(failure(0, 3, -11), failure(1, 2, -15), ended=(2,)), "signal", 3, id="without a peer"),
        pytest.param(NOBODY_MET, "peer", None, id="the nodes did not meet"),
        pytest.param(NCCL_PEER + summary(failure(0, 2, -6)), "peer", None, id="NCCL says that a peer is gone"),
        pytest.param(summary(failure(0, 2, -6)), "signal", 2, id="an abort of its own"),
    ],
)
def test_a_cause_on_this_node_is_told_from_one_on_another(output: str, class_: ExitClass, rank: int | None) -> None:
    ending = ending_of(None, EXITED_1, output, 6)
    assert (ending.class_, ending.rank) == (class_, rank)
    assert ending.exit_code == 71 or class_ != "peer"


def test_the_last_words_of_a_rank_are_found_behind_its_prefix() -> None:
    output = "[rank1] Traceback (most recent call last):\n[rank1] RuntimeError: boom\n" + summary(failure(0, 1, 1))
    assert ending_of(None, EXITED_1, output, 6).reason.endswith(": RuntimeError: boom")


def test_warnings_beside_a_good_end_reach_the_outcome_and_older_releases_read_the_report() -> None:
    said = {"status": "completed", "step": 4, "reason": "", "warnings": ["no samples were drawn: OSError", 7, "x" * 10_000]}
    ending = ending_of(said, 0, "", 4)
    assert (ending.class_, ending.saved, ending.warnings[0], len(ending.warnings[1])) == ("completed", True, said["warnings"][0], 600)  # type: ignore[index]
    content = {"class": "completed", "reason": "", "step": 4, "started": 0.0, "ended": 1.0}
    warned, silent = Report.model_validate({**content, "warnings": ending.warnings[:1]}), Report.model_validate(content)
    assert classify(warned, Life("ended")).reason == "no samples were drawn: OSError"
    assert Report.decode(warned.encode()) == warned
    assert b"warnings" not in silent.encode(), "an older release refuses a field that it does not know"
    assert ending_of({"status": "completed", "warnings": "not a list"}, 0, "", 1).warnings == ()
