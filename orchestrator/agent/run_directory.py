"""The agent's side of the run directory (docs/contracts.md section 1): what the trainer leaves, read as it appears.

Owns the reading of `metrics.jsonl`, heartbeats, `result.json`, checkpoints, samples, flight records and the log, and the writing of
`stage.yaml`, `drain` and, where the trainer could not, `result.json`. Every reader takes half-written and damaged content in its stride:
a trainer may die in the middle of anything. What is read is masked: credentials of the environment, which the trainer has too, leave
this machine in no word of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config import StageConfig, write_stage
from orchestrator.ledger.records import ClipsUsed, LeftOut
from orchestrator.local.attempt_lock import TROUBLE

SETTLED_S = 2.0
"""A sample that has not changed for so long is whole; the trainer does not say so."""
TAIL_BYTES = 65_536
FLIGHT_RECORDER = "flight-recorder"
LEFT_OUT_BYTES = 128 << 20
"""A longer list of clips that are left out stays on the node."""
MOST_WORDS, LONGEST_WORD = 10, 300
"""Of what a trainer says of its data: reasons, names or remarks, and characters of each."""


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    step: int
    phase: str
    time: float
    """When it was written, Unix seconds of the trainer's clock. The file's own time is of the file system's, which may be another one."""


class RunDirectory:
    def __init__(self, path: Path, mask: Callable[[bytes], bytes] = lambda data: data) -> None:
        """`mask`: hides secrets in what the trainer says."""
        self.path, self._mask = path, mask
        self.parent = path / "parent"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.log = path / "trainer.log"
        self._outgoing = path / "outgoing"
        self._metrics_read = 0
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        """Size and date of files that are handed over once they settle, and time.monotonic() since which they are so."""
        self._log_read = 0

    def write_stage(self, config: StageConfig) -> None:
        write_stage(config, self.path / "stage.yaml")

    def ask_drain(self) -> None:
        (self.path / "drain").touch()

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    # what the trainer says

    def new_lines(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl since the last call, whole ones only; numbers that are not finite are null."""
        data = _read_from(self.path / "metrics.jsonl", self._metrics_read)
        whole = data[: data.rfind(b"\n") + 1]
        self._metrics_read += len(whole)
        return [line for line in map(_metrics_line, self._mask(whole).splitlines()) if line is not None]

    def heartbeats(self) -> list[Heartbeat]:
        """The latest of each rank, by rank."""
        beats = []
        for path in self.path.glob("heartbeat-*.json"):
            try:
                content = json.loads(path.read_text())
                said = content.get("time")
                written = float(said) if isinstance(said, int | float) else path.stat().st_mtime  # a trainer that does not say when
                beats.append(Heartbeat(int(content["rank"]), int(content["step"]), str(content.get("phase", "")), written))
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
        return sorted(beats, key=lambda beat: beat.rank)

    def result(self) -> dict[str, Any] | None:
        """None while the file is absent, blank (its space is taken at start) or half-written."""
        try:
            content = json.loads(self._mask((self.path / "result.json").read_bytes().strip(b" \n\0")) or b"null")
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def usage(self, stage: str) -> tuple[ClipsUsed, bytes | None] | None:
        """What the trainer of this stage uses of its data, and the list of what it leaves out; None: it has not said so (yet)."""
        try:
            content = json.loads(self._mask((self.path / "clips.json").read_bytes()))
            return _clips_used(content, stage), self._left_out() if content.get("listing") else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or of a trainer that says something else
            return None

    def _left_out(self) -> bytes | None:
        path = self.path / "left-out.csv"
        return self._mask(path.read_bytes()) if path.stat().st_size <= LEFT_OUT_BYTES else None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Say it in the trainer's place. In place, since its space is kept even when the disk is full."""
        descriptor = os.open(self.path / "result.json", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps({"schema": 1, **result}).encode() + b"\n")
        finally:
            os.close(descriptor)

    def tell_trouble(self, reason: str) -> None:
        """To the launcher, where the store may not take a word: why no checkpoint is published; empty: they are again."""
        draft = self.path / f".{TROUBLE}"
        with contextlib.suppress(OSError):  # a full disk takes no word either
            draft.write_text(json.dumps({"schema": 1, "reason": reason}))
            draft.replace(self.path / TROUBLE)

    # what is to be published

    def complete_checkpoints(self) -> dict[int, Path]:
        """By step, ascending."""
        found = {}
        for path in sorted(self.checkpoints.glob("step-*")):
            if path.name[5:].isdigit() and (path / "CHECKPOINT.json").is_file():
                found[int(path.name[5:])] = path
        return found

    def pin(self, step: int) -> bool:
        """Copy a complete checkpoint by hard links, so that it stays whole when the trainer deletes it; False if it just did."""
        try:
            shutil.copytree(self.checkpoint(step), self.pinned(step), copy_function=_link)
            files = json.loads((self.pinned(step) / "CHECKPOINT.json").read_text())["files"]
            whole = all((self.pinned(step) / name).is_file() for name in files)  # or the trainer was just deleting it
        except (OSError, ValueError, KeyError, TypeError):  # shutil.Error is an OSError
            whole = False
        if not whole:
            self.unpin(step)
        return whole

    def pinned(self, step: int) -> Path:
        return self._outgoing / f"step-{step:08d}"

    def unpin(self, step: int) -> None:
        shutil.rmtree(self.pinned(step), ignore_errors=True)

    def settled_samples(self, quiet_s: float = SETTLED_S) -> list[Path]:
        """Files in samples/ that were seen not to change for so long, by name; 0: all."""
        return [path for path in self._settled(self.samples, quiet_s) if path.suffix in (".mp4", ".png", ".json")]

    def settled_flight_records(self, quiet_s: float = SETTLED_S) -> list[Path]:
        """What the communication library wrote of collectives that did not end, likewise."""
        return self._settled(self.path / FLIGHT_RECORDER, quiet_s)

    def _settled(self, folder: Path, quiet_s: float) -> list[Path]:
        """By looking again, not by dates, which are of the file system's clock. Files with a dot before them are not the trainer's."""
        found, now = [], time.monotonic()
        for path in sorted(folder.glob("*")):
            try:
                state = path.stat().st_size, path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            before, since = self._seen.get(path, (state, now))
            self._seen[path] = (state, since) if before == state else (state, now)
            if now - self._seen[path][1] >= quiet_s and not path.name.startswith("."):
                found.append(path)
        return found

    def new_output(self, limit: int, *, final: bool = False) -> bytes:
        """At most `limit` bytes of the trainer's output since the last call: whole lines, since a secret that is cut in two is not seen.

        A line that is longer than the limit comes in pieces, and with `final` the last one without its end.
        """
        data = _read_from(self.log, self._log_read, limit)
        if len(data) == limit or not final:
            data = data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1] or (data if len(data) == limit else b"")
        self._log_read += len(data)
        return self._mask(data)

    def rest_of_output(self) -> tuple[int, bytes]:
        """How much output `new_output` has not handed out and will not any more, and the end of it."""
        size = self.log.stat().st_size if self.log.exists() else 0
        unread, self._log_read = size - self._log_read, size
        return unread, self._mask(self._tail()[-unread:]) if unread else b""

    def output_tail(self) -> bytes:
        """The end of the trainer's output."""
        return self._mask(self._tail())

    def _tail(self) -> bytes:
        """From the beginning of a line, where there is one."""
        size = self.log.stat().st_size if self.log.exists() else 0
        data = _read_from(self.log, max(0, size - TAIL_BYTES))
        return data[data.find(b"\n") + 1 :] if size > TAIL_BYTES and b"\n" in data[:-1] else data


def _clips_used(content: dict[str, Any], stage: str) -> ClipsUsed:
    """As a ledger keeps it: whatever a trainer writes, it is short. A trainer does not know what its stage is called, and says STAGE
    where a setting is meant. Raises as a record does."""
    remarks = [str(remark)[:LONGEST_WORD] for remark in content.get("remarks", ())[: MOST_WORDS + 1]]
    reasons = [
        LeftOut(
            reason=str(each["reason"])[:LONGEST_WORD],
            clips=each["clips"],
            first=tuple(str(name)[:LONGEST_WORD] for name in each["first"][:MOST_WORDS]),
        )
        for each in content["reasons"][:MOST_WORDS]
    ]
    return ClipsUsed(
        clips=content["clips"],
        used=content["used"],
        left_out=tuple(reasons),
        captions_cut=content.get("captions_cut"),
        caption_tokens=content.get("caption_tokens", 0),
        caption_unit=str(content.get("caption_unit", "words"))[:LONGEST_WORD],
        remarks=tuple(remark.replace("STAGE.data.", f"{stage}.data.") for remark in remarks),
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except (PermissionError, NotImplementedError):  # a file system without hard links
        shutil.copy2(source, target)


def _read_from(path: Path, offset: int, limit: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(limit)
    except FileNotFoundError:
        return b""


def _metrics_line(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    step = line.get("step")
    usable = isinstance(line.get("phase"), str) or (isinstance(step, int) and not isinstance(step, bool) and step >= 0)
    return line if usable else None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
