"""One preparation on one machine: `prepare.yaml` of a run directory becomes its folder `out/`.

Owns the order of the phases, the lock of the directory, how a run ends (`result.json`, exit code), and that a run on finished work changes
nothing. Refuses to know steps (`steps`), rows (`source_phase`, `clip_phases`) and files of the data set (`manifest`, `publish`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from opensora.dataset import columns
from opensora.dataset.prepare_config import EngineName, PrepareConfig
from opensora.dataset.prepared_rows import BESIDE_CAPTION
from opensora.dataset.rows import NO_CAPTION, Clip
from opensora.errors import ConfigError, DataError, TrainerError
from opensora.prepare import clip_phases, manifest, publish, streamed
from opensora.prepare.compact import ClipRows
from opensora.prepare.devices import Device, Held
from opensora.prepare.digests import result_digest
from opensora.prepare.encoding import encode_apart
from opensora.prepare.guard import Guards
from opensora.prepare.guarded import FULL_DISK
from opensora.prepare.pool import Pool
from opensora.prepare.reconcile import check_settled
from opensora.prepare.run_state import Drained, Folders, RunState
from opensora.prepare.shards import Shard
from opensora.prepare.source_phase import SourcePhase
from opensora.prepare.status import Status
from opensora.prepare.steps import Steps
from opensora.printable import several

COMPLETED, CODE, CONFIG, DATA, DISK, DRAINED = 0, 6, 64, 65, 69, 143
EXIT: Mapping[str, int] = {"config": CONFIG, "data": DATA, "disk": DISK}
"""By kind of an error; any other is `CODE`."""

Pooled = Callable[[PrepareConfig, Folders, Steps, int, Callable[[], bool]], Pool]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """How a run ended; `result.json`."""

    kind: Literal["completed", "drained", "failed"]
    reason: str
    code: int
    digest: str = ""
    counts: Mapping[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "class": self.kind, "reason": self.reason, "exit": self.code, "digest": self.digest, "counts": dict(self.counts or {}),
        }  # fmt: skip


def run(
    run_dir: Path, steps: Steps | None = None, *, stop: threading.Event | None = None, retry: bool = True, engine: EngineName | None = None,
    pool: Pooled | None = None, shard: Shard | None = None,
) -> Ended:  # fmt: skip
    """Do what is not done yet, and write `result.json`.

    Args:
        steps: other step functions, for tests.
        stop: when it is set, rows in work are finished and the run leaves; so does a file `drain` in the run directory.
        retry: try rows that earlier runs quarantined again.
        engine: another one than `prepare.yaml` names.
        pool: makes the pool, for tests.
        shard: look at these sources alone and cut their clips; no data set is made.
    """
    folders, counts = Folders(run_dir), dict[str, Any]()
    try:
        with _locked(folders):
            ended = _run(folders, steps or Steps(), stop or threading.Event(), retry, counts, engine, pool or _pool, shard)
            _report(folders, ended)
            return ended
    except Drained:
        ended = Ended(
            "drained", "it was asked to leave; what is done is kept. To go on, run the same command again", DRAINED, counts=counts
        )
    except TrainerError as error:
        ended = Ended("failed", str(error), EXIT.get(error.kind, CODE), counts=counts)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        fact = f"{error.filename or run_dir}: {error.strerror}. Make room, and run again: what is done stays"
        ended = Ended("failed", fact, DISK, counts=counts)
    _report(folders, ended)
    return ended


def read_config(path: Path) -> PrepareConfig:
    """Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_bytes())
        return PrepareConfig.model_validate(content)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a run directory holds the resolved configuration") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {field}: {first['msg']} (given: {first['input']!r})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def workers_of(config: PrepareConfig) -> int:
    return config.workers or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _locked(folders: Folders) -> Iterator[None]:
    """Raises ConfigError where another process works in this directory, or there is none."""
    try:
        descriptor = os.open(folders.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in FULL_DISK and error.errno != errno.EROFS:
            raise
        raise ConfigError(f"run directory {folders.path}: {error.strerror}. Give a folder that may be written to") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"run directory {folders.path}: another process prepares here. Wait for it, or end it") from None
    finally:
        os.close(descriptor)


def _run(
    folders: Folders, steps: Steps, stop: threading.Event, retry: bool, counts: dict[str, Any], engine: EngineName | None, pool: Pooled,
    shard: Shard | None,
) -> Ended:  # fmt: skip
    config = read_config(folders.config)
    if shard is not None:
        config = shard.configured(config)
    if engine is not None:
        config = config.model_copy(update={"engine": engine})
    columns.check(config.filter)
    stages = folders.stages()
    try:
        folders.begin()
        publish.recover(folders.out, folders.partial)
    except PermissionError as error:
        raise ConfigError(
            f"run directory {folders.path}: {error.strerror} ({error.filename}). Give a folder that may be written to"
        ) from None

    drain = folders.drain

    def halt() -> bool:
        return stop.is_set() or os.path.exists(drain)  # noqa: PTH110 - once a row

    workers = workers_of(config)
    with pool(config, folders, steps, workers, halt) as guards:
        state = RunState(folders, config, steps, guards, Held(workers), halt, retry, shard)
        guards.on_tell = lambda content: state.held.take(content, state.models_step) if isinstance(content, Device) else None
        try:
            with state, Status(folders.path / "status.json", folders.temporary, state.tallies, workers) as status:
                state.status = status
                status.cpu_of, status.held_of = state.cpu_s, state.held.content
                status.digests = vars(state.digests)
                return _phases(state, stages) if shard is None else _of_shard(state, shard)
        finally:
            counts |= state.counts()


def _pool(config: PrepareConfig, folders: Folders, steps: Steps, workers: int, halt: Callable[[], bool]) -> Pool:
    """Of the engine that is asked for."""
    if config.engine == "ray":
        from opensora.prepare.ray import opened  # where it is asked for alone: its package is an extra

        return opened.pool(config, folders.path, steps, workers, halt)
    return Guards(workers, config.limits, halt=halt, preload=steps.preload)


def _phases(state: RunState, stages: Mapping[str, Path]) -> Ended:
    alone = clip_phases.Alone()
    if state.status is not None:
        state.status.alone = alone.rules
    rows = SourcePhase(state).run()
    clips = clip_phases.filtered(state, rows.clips, alone)
    rows.clips.clear()  # what is left has its own list of the same bytes
    streamed.through_models(state, rows, clips)
    clips = clip_phases.with_files(state, rows, clips)
    clips = clip_phases.scored(state, clips, alone)
    clips = clip_phases.captioned(state, clips, alone)
    state.guards.close()
    check_settled(state.tallies)
    if not len(clips):
        raise DataError(f"{state.config.name}: no clip is left. {_where_they_went(state)}")
    columns = _Columns(scored=bool(state.config.filter.scores))
    digest = manifest.digest_of(columns.seen(_final(state, clips)))
    wanted = publish.Wanted(digest, result_digest(state.config, stages, state.digests))
    if publish.is_there(state.folders.out, wanted):
        reason = f"nothing to do: {several(len(clips), 'clip is', 'clips are')} there, digest {wanted.digest[:16]}"
        log.info("%s", reason)
        return Ended("completed", reason, COMPLETED, wanted.digest, state.counts())
    _publish(state, clips, columns.all(), stages, wanted, alone)
    reason = f"{several(len(clips), 'clip')}, digest {wanted.digest[:16]}"
    log.info("%s", reason)
    return Ended("completed", reason, COMPLETED, wanted.digest, state.counts())


def _of_shard(state: RunState, shard: Shard) -> Ended:
    """What can be done without the other shards, and needs no model."""
    rows = SourcePhase(state).run()
    clips = clip_phases.filtered(state, rows.clips, clip_phases.Alone())
    rows.clips.clear()
    clips = clip_phases.with_files(state, rows, clips)
    state.guards.close()
    check_settled(state.tallies)
    reason = f"shard {shard.number} of {shard.of}: {several(len(clips), 'clip')}"
    log.info("%s", reason)
    return Ended("completed", reason, COMPLETED, counts=state.counts())


def _publish(
    state: RunState, clips: ClipRows, columns: Sequence[tuple[str, type]], stages: Mapping[str, Path], wanted: publish.Wanted,
    alone: clip_phases.Alone,
) -> None:  # fmt: skip
    folders, config = state.folders, state.config
    publish.begin(folders.partial, wanted)
    for place in range(len(clips)):
        name = clips.id(place)
        publish.link(state.files.name(name, ".mp4"), f"{folders.partial}/clips/{name}.mp4")
    about = {"schema": "1", "name": config.name, "digest": wanted.digest}
    settings = state.digests.frames
    written = manifest.write_rows(_final(state, clips), folders.partial, columns, config.cut.detector, settings, about)
    if stages:
        _encode(state, clips, stages, wanted)
    content = publish.description(config.name, wanted, written, config.model_dump(mode="json"), state.counts(), alone.rules)
    clip_files = (clips.file(place) for place in sorted(range(len(clips)), key=clips.id))
    publish.finish(folders.partial, folders.out, content, publish.sources_of(clips.sources()), clip_files)


def _encode(state: RunState, clips: ClipRows, stages: Mapping[str, Path], wanted: publish.Wanted) -> None:
    tally = state.begin("encode")
    tally.into = len(clips)
    publish.take_latents(state.folders.out, state.folders.partial, wanted)

    def progress(done: int, total: int) -> None:
        tally.kept = min(len(clips) - 1, len(clips) * done // max(total, 1))

    if not encode_apart(state.steps.encode, state.folders.partial, stages, progress, state.halt, state.held.take):
        raise Drained
    state.held.end()
    tally.kept = len(clips)


def _final(state: RunState, clips: ClipRows) -> Iterator[Clip]:
    """Rows with their captions, one at a time."""
    return (clip_phases.with_caption(state, clip) for clip in clips)


class _Columns:
    """Names of all measures that have a column of their own behind the others, and whether they are text: of rows that pass."""

    def __init__(self, *, scored: bool) -> None:
        self._found: dict[str, type] = dict.fromkeys(("words", "clip") if scored else ("words",), float)

    def seen(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        found = self._found
        for clip in clips:
            for measures in (clip.shot.measures, clip.measures):
                for name, value in measures.items():
                    if name not in found or isinstance(value, str):
                        found[name] = str if isinstance(value, str) else float
            yield clip

    def all(self) -> list[tuple[str, type]]:
        return sorted((name, kind) for name, kind in self._found.items() if name not in BESIDE_CAPTION)


def _where_they_went(state: RunState) -> str:
    lost = [
        f"{count:,} {reason}" for tally in state.tallies.values() for reason, count in (tally.dropped + tally.quarantined).most_common(3)
    ]
    told = f"What came in: {several(state.tally('download').into, 'source')}; what left: {', '.join(lost) or 'nothing'}"
    if state.tally("caption").dropped[NO_CAPTION]:
        return f"{told}. Write texts beside the videos (a.txt beside a.mp4), or set caption.kind to server or llava"
    return f"{told}. See what each rule takes: osctl prepare report {state.config.name}"


def _report(folders: Folders, ended: Ended) -> None:
    if ended.kind != "completed":
        log.info("%s%s", "error: " if ended.kind == "failed" else "", ended.reason)
    with contextlib.suppress(OSError):
        partial = folders.path / ".result.json.partial"
        partial.write_text(json.dumps(ended.content(), ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
        partial.replace(folders.path / "result.json")
