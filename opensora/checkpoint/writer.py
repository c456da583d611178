"""Write checkpoints while training goes on; `opensora.checkpoint.reader` reads them.

Every rank has a Saver and writes its own rows into its own files (`opensora.checkpoint.safetensors_file`). In the background a thread (on
CUDA a stream) copies the rows into host memory that was allocated once, then writes the files, flushes them and publishes the checkpoint.
The copy runs beside the next step's forward and backward passes, which only read the weights; before the step changes them it calls
`ready`. If a stage does not save in the background, files are written straight from the tensors, and no second copy of them all exists.

The ranks of a node work together through the hidden directory that becomes the checkpoint. The lowest rank makes it. Each rank leaves a
mark there when its files are on the disk. The lowest rank then writes the record and renames the directory. The threads use no
collectives, because those belong to the step. A rank that fails renames the directory away, and the others notice that. The others notice
a rank that died by the lock that its process held.

Refuses to hide a failure: the next `check`, `save` or `wait` raises the error of a background save. The ranks must have run a collective
between making their Savers and the first save, because making one removes what a killed run left.
Non-guarantees: it does not wait for other nodes. Each node publishes its own files, and the agent merges them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora.checkpoint.reader import RECORD, TENSORS, Record, TensorShard, directory, file_name, finished, is_disk_full, step_of
from opensora.checkpoint.safetensors_file import Direct, Image, flush, lay_out, write
from opensora.config import CheckpointConfig, StageConfig, write_stage
from opensora.encoders.protocol import copy_encoders
from opensora.errors import DiskFull, NotFinite, OutOfMemory

POLL_S = 0.01
"""Seconds between two checks of what the other ranks of the node have done."""
BEAT_S = 1.0
"""Seconds between two heartbeats while this rank waits."""
SLOWEST = 2
"""How many checkpoints this node may be ahead of another node: a node finishes a checkpoint before it begins the next one, and no rank
takes a step without the others."""


class PeerFailed(Exception):
    """Another rank of this node could not save, or has ended. That rank reports why."""


@dataclass(frozen=True)
class _Job:
    """A checkpoint that is being written, and what this rank writes of it."""

    step: int
    node: int
    encoders: Path
    files: Mapping[str, Image | Direct]
    record: Callable[[dict[str, int]], Record]
    """Makes CHECKPOINT.json from the size of every file."""


class Saver:
    """Checkpoints of one rank. `folder`: the run directory's `checkpoints`, which the ranks of a node share."""

    def __init__(self, folder: Path, stage: StageConfig, *, writer: int, writers: int, here: tuple[int, ...], device: torch.device) -> None:
        """
        Args:
            writer: this rank's number among the `writers` of the job, in the order of the rows that they write.
            here: the writers of this node; the lowest one completes a checkpoint.
        """
        self._folder, self._stage, self._device = folder, stage, device
        self._writer, self._writers, self._here = writer, writers, here
        self._leads = writer == min(here)
        self._images: dict[str, Image] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()  # on a CPU: the tensors of the last save may change
        self._copied.set()
        self._event: torch.cuda.Event | None = None  # on CUDA a stream waits for this instead
        self._failure: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if len(here) > 1:
            weakref.finalize(self, os.close, _lock(self._sign_of_life(writer)))
        if self._leads:
            self._clean()

    # Called by the step

    def save(
        self,
        shards: Mapping[str, Mapping[str, TensorShard]],
        encoders: Path,
        *,
        step: int,
        world_size: int,
        seen: tuple[int, ...],
        clips: str,
        carried: tuple[str, ...],
        reset: tuple[str, ...],
        node: int = 0,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin a checkpoint in the background, or write it now if the stage does not save in the background. First wait for a save that is
        still running.

        Args:
            shards: this rank's rows, by part (TENSORS) and tensor; they may change after `ready` has returned.
            clips: digest of the clips that are trained on.
            encoders: directory that holds autoencoder.safetensors and text.safetensors; it must not change until the save is done.
            node: this node's number; node 0 writes the encoders and stage.yaml too.
            beat: called about every second while this waits or writes.

        Raises:
            DiskFull, NotFinite, PeerFailed: this save failed, or the background save before it. What was written is removed.
            OutOfMemory: there is no host memory for the copy.
        """
        self.wait(beat)
        stage = self._stage

        def record(files: dict[str, int]) -> Record:
            return Record(
                schema=1,
                step=step,
                steps=stage.steps,
                complete=step == stage.steps,
                seed=stage.seed,
                world_size=world_size,
                clips_seen=sum(seen),
                seen=seen,
                clips=clips,
                files=files,
                model=stage.model,
                objective=stage.objective,
                data=stage.data,
                autoencoder=stage.autoencoder,
                text=stage.text,
                carried=carried,
                reset=reset,
            )

        if not stage.checkpoint.background:
            self._publish(_Job(step, node, encoders, {part: Direct(lay_out(shards[part]), shards[part], beat) for part in TENSORS}, record))
            return
        self.reserve(shards)
        self._copied.clear()
        if self._stream is not None:
            self._copy_on(self._stream, shards)
        job = _Job(step, node, encoders, self._images, record)
        self._thread = threading.Thread(target=self._run, args=(job, shards), name=f"save-{step}", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Return when the tensors of the last save are copied. Call this before you change them.

        On CUDA it returns at once, and the current stream waits instead (not run on a GPU).
        """
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        else:
            self._copied.wait()

    def reserve(self, shards: Mapping[str, Mapping[str, TensorShard]]) -> None:
        """Allocate the host memory for copies of these shards now, so that the first save need not. Does nothing if the stage does not save
        in the background.

        Raises:
            OutOfMemory: there is not enough memory.
        """
        for part in TENSORS if self._stage.checkpoint.background else ():
            layout = lay_out(shards[part])
            if part not in self._images or self._images[part].layout != layout:
                try:
                    self._images[part] = Image(layout, shards[part], self._device)
                except (RuntimeError, MemoryError) as error:
                    raise OutOfMemory(
                        f"checkpoint: no host memory for a copy of {part} ({layout.size} bytes); checkpoint.background false needs no copy"
                    ) from error

    def check(self) -> None:
        """Raise the error of a background save that failed, once.

        Raises:
            DiskFull, NotFinite, PeerFailed: see `save`.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Return when nothing is being written any more. Calls `beat` each second while it waits. Raises as `check` does."""
        if self._thread is not None:
            self._thread.join(BEAT_S)
            while self._thread.is_alive():
                beat()
                self._thread.join(BEAT_S)
            self._thread = None
        self.check()

    def _copy_on(self, stream: torch.cuda.Stream, shards: Mapping[str, Mapping[str, TensorShard]]) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for part, image in self._images.items():
                image.copy(shards[part])
                for shard in shards[part].values():  # so that its memory is not reused before the copy is done
                    if shard.tensor.is_cuda:
                        shard.tensor.record_stream(stream)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    # Called by the thread that writes

    def _run(self, job: _Job, shards: Mapping[str, Mapping[str, TensorShard]]) -> None:
        try:
            try:
                if self._event is not None:
                    torch.cuda.set_device(self._device)  # a new thread uses the first device
                    self._event.synchronize()
                else:
                    for part, image in self._images.items():
                        image.copy(shards[part])
            finally:
                self._copied.set()
            self._publish(job)
        except BaseException as error:  # noqa: BLE001 - the thread cannot raise in the step; `check` does so in the next step
            said = f"step {job.step}: the thread that writes checkpoints ended with {type(error).__name__}: {error}"
            self._failure = error if isinstance(error, Exception) else RuntimeError(said)

    def _publish(self, job: _Job) -> None:
        target = directory(self._folder, job.step)
        partial, failed = _partial(target), _failed(target)
        try:
            if self._leads:
                self._clean()
                partial.mkdir()
            else:
                self._until(partial.is_dir, failed, (min(self._here),))
            _refuse_not_finite(job)
            for part, file in job.files.items():
                write(partial / file_name(part, self._writer, self._writers), file.chunks())
            if self._leads:
                self._complete(job, partial, target)
            else:
                _mark(partial, self._writer).touch(exist_ok=False)
                self._until(lambda: not partial.is_dir(), failed, (min(self._here),))
                if not target.is_dir():
                    raise PeerFailed(f"step {job.step}: another rank of this node could not save")
        except BaseException as error:
            vanished = isinstance(error, FileNotFoundError) and failed.is_dir()
            self._abandon(partial, failed)
            if vanished:
                raise PeerFailed(f"step {job.step}: another rank of this node could not save") from error
            if isinstance(error, Exception) and is_disk_full(error):
                raise DiskFull(f"checkpoint {target}: {error}; earlier checkpoints are intact") from error
            raise

    def _complete(self, job: _Job, partial: Path, target: Path) -> None:
        """Write the files that a node writes once, and give the directory its name. The node's lowest rank calls this."""
        if job.node == 0:
            copy_encoders(job.encoders, partial)
            write_stage(self._stage, partial / "stage.yaml")
        for writer in self._here:
            if writer != self._writer:
                self._until(_mark(partial, writer).exists, _failed(target), (writer,))
                _mark(partial, writer).unlink()
        record = job.record({path.name: path.stat().st_size for path in sorted(partial.iterdir())})
        (partial / RECORD).write_text(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1) + "\n")
        for path in (*partial.iterdir(), partial):
            flush(path)
        partial.rename(target)
        flush(self._folder)
        _prune(self._folder, self._stage.checkpoint, alone=len(self._here) == self._writers)

    def _abandon(self, partial: Path, failed: Path) -> None:
        """Rename the directory away, so that the other ranks fail too. The first rank that fails does it."""
        try:
            partial.rename(failed)
        except OSError:  # another rank did, or it was never made
            return
        for path in failed.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if len(self._here) == 1:
            failed.rmdir()  # with several ranks it stays, empty, for those that have not looked for the directory yet

    def _until(self, done: Callable[[], bool], failed: Path, on: tuple[int, ...]) -> None:
        """Wait for other ranks of this node. Raises PeerFailed if one has failed or its process has ended."""
        while not done():
            gone = [writer for writer in on if _is_free(self._sign_of_life(writer))]
            if (failed.is_dir() or gone) and not done():
                raise PeerFailed(f"the process of writer {gone[0]} has ended" if gone else f"another rank could not save ({failed.name})")
            time.sleep(POLL_S)

    def _clean(self) -> None:
        """Remove what a killed or failed run left. Only partial checkpoints have such names, and no save is going on now."""
        for path in self._folder.glob(".step-*"):
            shutil.rmtree(path)

    def _sign_of_life(self, writer: int) -> Path:
        return self._folder / f".writer-{writer:05d}"


def _refuse_not_finite(job: _Job) -> None:
    for name, weight in job.files["model"].tensors.items():
        if weight.is_floating_point() and weight.numel():
            extremes = torch.stack(torch.aminmax(weight))  # both are NaN if any value is; needs no second tensor of the weight's size
            if not all(map(math.isfinite, extremes.tolist())):
                raise NotFinite(f"step {job.step}: weight {name} is not finite; nothing was saved")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _failed(target: Path) -> Path:
    return target.with_name(f".{target.name}.failed")


def _mark(partial: Path, writer: int) -> Path:
    """A file that exists once the files of this writer are on the disk."""
    return partial / f".writer-{writer:05d}"


def _lock(path: Path) -> int:
    """Lock a file and return its descriptor. The lock is held until the descriptor is closed, at the latest when this process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_free(path: Path) -> bool:
    """Whether the process that held this lock has ended."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _prune(folder: Path, keep: CheckpointConfig, *, alone: bool) -> None:
    """Remove the checkpoints that are not kept. Each is renamed first, so that a half-removed one never looks like a checkpoint.

    If there are other nodes, at least SLOWEST + 1 are kept: a slower node may still be writing the last two, and may fail.
    """
    for old in finished(folder)[: -max(keep.keep_last, 1 if alone else SLOWEST + 1)]:
        if keep.keep_every is None or step_of(old) % keep.keep_every:
            removed = old.with_name(f".{old.name}.removed")
            old.rename(removed)
            shutil.rmtree(removed)
