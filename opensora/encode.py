"""A stage's clips encoded ahead of its training: `python -m opensora.encode STAGE_YAML CACHE_DIR`.

Owns the command; `opensora.latents.cache` owns the cache. Progress goes to stderr, the result to stdout: one line of JSON with directory,
bytes, clips, skipped, remarks (what of the data is not used, in sentences), built (false: it was there already) and seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from opensora import last_resort
from opensora.dataset.usage import LEFT_OUT
from opensora.errors import TrainerError
from opensora.latents.cache import prepare
from opensora.latents.prepared import Prepared
from opensora.printable import log_to, printable
from opensora.training.run_directory import recorded_data, stage_of

SPOKEN_S = 5.0
"""Seconds between two lines of progress; on a terminal one line is written again and again, each so many."""
SPOKEN_TERMINAL_S = 0.5


class Progress:
    """Lines like `stage2: 1,024 of 8,000 clips, 210 clips/s, 0:33 left`. One that is called never has found the cache there."""

    def __init__(self, subject: str) -> None:
        self.subject, self.clips, self.began, self._spoken = subject, 0, time.monotonic(), 0.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, clips: int, total: int) -> None:
        """So many more of `total` clips are encoded; none: a sign of life, of which there is nothing to say."""
        if not clips:
            return
        self.clips += clips
        now = time.monotonic()
        pause = SPOKEN_TERMINAL_S if self._terminal else SPOKEN_S
        if now - self._spoken < pause and self.clips < total:
            return
        self._spoken = now
        pace = self.clips / max(now - self.began, 1e-3)
        line = f"{self.subject}: {self.clips:,} of {total:,} clips, {pace:,.1f} clips/s, {clock((total - self.clips) / pace)} left"
        sys.stderr.write(f"\r{line:<100}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the terminal's line."""
        if self._terminal and self.clips:
            sys.stderr.write("\n")


def clock(seconds: float) -> str:
    """`0:33`, `2:07:15`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def encode(stage_yaml: Path, cache: Path, parent: Path | None, progress: Progress, data: Path | None = None) -> dict[str, object]:
    """The result as `main` prints it. Raises TrainerError, as `opensora.latents.cache.prepare`."""
    began = time.monotonic()
    stage = stage_of(Path("/dev/stdin") if str(stage_yaml) == "-" else stage_yaml)
    try:
        directory = prepare(stage, cache, parent, progress=progress, recorded=recorded_data(data) if data is not None else None)
    finally:
        progress.end()
    prepared = Prepared.open(directory, stage)
    prepared.refuse_if_too_few(stage)
    return {
        "directory": str(directory.absolute()),
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "clips": len(prepared),
        "skipped": prepared.usage.left_out,
        "remarks": prepared.usage.sentences(),
        "built": progress.clips > 0,
        "seconds": round(time.monotonic() - began, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0 done · 1 it failed · 2 the stage is wrong."""
    parser = argparse.ArgumentParser(prog="python -m opensora.encode", description="Encode a stage's clips ahead of its training.")
    parser.add_argument("stage", type=Path, metavar="STAGE_YAML", help="a resolved stage, as a run directory holds it; -: stdin")
    parser.add_argument("cache", type=Path, metavar="CACHE_DIR", help="where the encoded clips go; made if it is not there")
    parser.add_argument(
        "--parent", type=Path, metavar="CHECKPOINT", help="whose encoders are used; without one they are made from the clips"
    )
    parser.add_argument(
        "--data", type=Path, metavar="MANIFEST", help="the data set as a launch finds it, as a run directory's data.jsonl.gz"
    )
    parser.add_argument("--name", help="what progress calls it [STAGE_YAML's name]")
    args = parser.parse_args(argv)
    log_to(sys.stderr, logging.WARNING, "%(message)s")
    try:
        result = encode(args.stage, args.cache, args.parent, Progress(args.name or args.stage.name), args.data)
    except TrainerError as error:
        advice = ". Mend these clips, or raise data.max_left_out to train on the others" if LEFT_OUT in str(error) else ""
        sys.stderr.write(f"error: {printable(str(error))}{advice}\n")
        return 2 if error.kind == "config" else 1
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or args.cache}: {error.strerror or error}; make room, or name another folder\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(last_resort.run("encode", main))
