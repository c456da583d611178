"""How an attempt ended: what the trainer said and how its process ended -> class, reason, rank, exit code. Pure.

Owns the table of docs/contracts.md section 2, "How an attempt ends", as far as an agent can see it. The exit code of torchrun is
never trusted: it is 1 for every failure (measured, torch 2.13), so a rank's own end is read from the summary that torchrun prints.
There the first failure is not always the cause: a rank that lost a peer may be seen before the peer, and torchrun ends the rest itself.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from orchestrator.ledger.records import EXIT_CODES, ExitClass

CODE_OF_KILLED = 128 + signal.SIGKILL
"""Exit code of an attempt that was ended from outside without having saved: not 143, which promises a checkpoint."""

PEER_LOST = 75
"""Exit code of a rank that ended because another one was gone (docs/contracts.md section 1)."""

_FAILURE = re.compile(r"^\[(\d+)\]:\n(?:  .*\n)*?  rank *: (\d+).*\n  exitcode *: (-?\d+)(?: \(pid: (\d+)\))?", re.MULTILINE)
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
_NO_MEETING = re.compile(r"^torch\.distributed\.elastic\.rendezvous\.\S*\.Rendezvous(?:Timeout|Connection|Closed)Error", re.MULTILINE)
"""The nodes did not come together, or the one that kept their store is gone."""
_NCCL_PEER_GONE = "remote process exited or there was a network error"
"""NCCL's ncclRemoteError, as its watchdog prints it before it aborts the rank."""
LONGEST_REASON = 2000
MOST_WARNINGS, LONGEST_WARNING = 5, 600


@dataclass(frozen=True)
class Ending:
    class_: ExitClass
    reason: str
    step: int | None = None
    rank: int | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """What went wrong and changed nothing about the end."""
    signal: int | None = None
    """Signal that ended the trainer, where one did."""

    @property
    def exit_code(self) -> int:
        if self.class_ in EXIT_CODES:
            return EXIT_CODES[self.class_]
        return CODE_OF_KILLED if self.signal is None else 128 + self.signal

    @property
    def saved(self) -> bool:
        """Whether this ending promises a published checkpoint of its last step."""
        return self.class_ in ("completed", "drained")


def ending_of(result: Mapping[str, Any] | None, status: int, output: str, step: int | None) -> Ending:
    """The ending of a trainer that ended by itself.

    Args:
        result: content of result.json; none where the trainer wrote nothing.
        status: wait status of the trainer's process.
        output: the end of what it printed.
        step: last step that it finished.
    """
    if result is not None:
        return _as_said(result, step)
    after = f"after step {step}" if step is not None else "before its first step"
    failures = _failures(output)
    rank, code = _cause(failures, output) or (None, os.waitstatus_to_exitcode(status))
    if code == PEER_LOST or (code == -signal.SIGABRT and _NCCL_PEER_GONE in output):
        return Ending("peer", f"a rank of another node was gone {after}" + (f"; rank {rank} noticed" if rank is not None else ""), step)
    if not failures and _NO_MEETING.search(output):
        return Ending("peer", f"the nodes did not meet, or lost each other, {after}", step)
    who = "the trainer" if rank is None else f"rank {rank}"
    if code < 0:
        return Ending("signal", f"{who} was ended by {_name(-code)} {after}", step, rank, signal=-code)
    said = _last_words(output)
    return Ending("code", f"{who} ended with exit code {code} {after} and wrote no result.json" + (f": {said}" if said else ""), step, rank)


@dataclass(frozen=True)
class _Failure:
    rank: int
    code: int
    pid: str | None


def _failures(output: str) -> list[_Failure]:
    """Of torchrun's summary, in the order in which it saw them."""
    found = {int(match[1]): _Failure(int(match[2]), int(match[3]), match[4]) for match in _FAILURE.finditer(output)}
    return [failure for _, failure in sorted(found.items())]


def _cause(failures: list[_Failure], output: str) -> tuple[int, int] | None:
    """Rank and exit code of the first failure that does not follow from another; where all do, of the first."""
    ended_by_torchrun = set(_ENDED_BY_TORCHRUN.findall(output))
    causes = [failure for failure in failures if failure.code != PEER_LOST and failure.pid not in ended_by_torchrun]
    followers = [failure for failure in failures if failure.code == PEER_LOST]
    first = next(iter(causes or followers or failures), None)
    return None if first is None else (first.rank, first.code)


def _as_said(result: Mapping[str, Any], step: int | None) -> Ending:
    status, said = result.get("status"), result.get("class")
    class_: ExitClass = "code"
    if status in ("completed", "drained"):
        class_ = cast(ExitClass, status)
    elif status == "failed" and said in get_args(ExitClass):
        class_ = cast(ExitClass, said)
    reason = str(result.get("reason") or "")
    if class_ == "code" and not reason:
        reason = f"result.json says status {status}, class {said}, and no reason"
    evaluation = {
        name: float(value) for name, value in _items(result.get("evaluation")) if isinstance(value, int | float) and math.isfinite(value)
    }
    at, rank = _count(result.get("step"), step), _count(result.get("rank"), None)
    return Ending(class_, reason[:LONGEST_REASON], at, rank, evaluation, _texts(result.get("warnings")))


def _texts(value: object) -> tuple[str, ...]:
    texts = [text[:LONGEST_WARNING] for text in value if isinstance(text, str)] if isinstance(value, list) else []
    return tuple(texts[:MOST_WARNINGS])


def _items(value: object) -> list[tuple[str, object]]:
    return [(str(name), item) for name, item in value.items()] if isinstance(value, dict) else []


def _count(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and value >= 0 else otherwise


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_words(output: str) -> str:
    """The last line that looks like an error, for the reason."""
    said = (re.sub(r"^\[rank\d+\] ", "", line) for line in output.splitlines())
    lines = [line.strip() for line in said if re.match(r"\s*\w*(Error|Exception|error)\b.*:", line)]
    own = [line for line in lines if not line.startswith("torch.distributed.elastic")]
    return own[-1][:300] if own else ""
