"""A fault of any kind, in the thread that writes checkpoints, in the one that reads ahead or where heartbeats are written, ends the stage
with a report: never in silence, and never as `completed`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint import writer as saver
from opensora.config import StageConfig
from opensora.latents.loader import Loader
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]

ERRNOS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EBADF, errno.ESTALE, errno.EMFILE, errno.EINTR,
    errno.ENXIO, errno.ENOTDIR, errno.EFBIG, errno.EAGAIN,
)  # fmt: skip
FAULTS: list[BaseException] = [
    *(OSError(number, "of this test") for number in ERRNOS),
    TimeoutError("of this test"), ConnectionResetError("of this test"), MemoryError("of this test"), RuntimeError("of this test"),
    ValueError("of this test"), KeyError("of this test"), TypeError("of this test"), AttributeError("of this test"),
    AssertionError("of this test"), RecursionError("of this test"), UnicodeError("of this test"), ZeroDivisionError("of this test"),
    StopIteration("of this test"), NotImplementedError("of this test"), torch.OutOfMemoryError("of this test"),
    SafetensorError("of this test"), SystemExit("of this test"), KeyboardInterrupt("of this test"), GeneratorExit("of this test"),
]  # fmt: skip
NAMES = [f"{type(fault).__name__}{getattr(fault, 'errno', None) or ''}" for fault in FAULTS]


def in_process(run: RunDirectory) -> dict[str, Any]:
    assert train.run_reported(run, DrainRequest()) in (0, 1)
    content: dict[str, Any] = json.loads((run.path / "result.json").read_text())
    return content


def test_there_are_thirty_kinds_of_them() -> None:
    assert len(set(NAMES)) == len(FAULTS) >= 30


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
@pytest.mark.parametrize("place", ["copy", "write"])
def test_a_fault_in_the_thread_that_saves_ends_the_stage(
    place: str, fault: BaseException, tiny_stage: Stages, make_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last checkpoint, after which no step would notice."""
    where = saver.Image if place == "copy" else saver
    real, calls = getattr(where, place), []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 3:  # three files of the first checkpoint
            raise fault
        real(*arguments)

    monkeypatch.setattr(where, place, fail)
    run = make_run(tiny_stage(steps=2))
    ended = in_process(run)
    assert (ended["status"], ended["step"]) == ("failed", 2)
    assert "of this test" in ended["reason"] or type(fault).__name__ in ended["reason"]
    assert ended["class"] == ("disk" if getattr(fault, "errno", None) in checkpoint.FULL else ended["class"])
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"], "nothing half is left"


@pytest.mark.parametrize("fault", [one for one in FAULTS if isinstance(one, Exception)], ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("what", ["heartbeat", "record", "batch"])
def test_a_fault_in_a_heartbeat_in_the_books_or_in_reading_ahead_ends_the_stage(
    what: str, fault: BaseException, tiny_stage: Stages, make_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: Any = Loader if what == "batch" else RunDirectory
    real, calls = getattr(where, what), []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise fault
        return real(*arguments)

    monkeypatch.setattr(where, what, fail)
    ended = in_process(make_run(tiny_stage(steps=8)))
    assert ended["status"] == "failed" and (str(fault) in ended["reason"] or isinstance(fault, KeyError))
