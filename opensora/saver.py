"""Writing checkpoints while training goes on: what `opensora.checkpoint` reads.

Every rank has a Saver and writes its own rows into files of its own. In the background a thread (on CUDA a stream) copies them into host
memory that was allocated once and already has the exact bytes of the files, then writes, flushes and publishes. The copy runs beside the
next step's forward and backward passes, which only read the weights: whoever changes them calls `ready`. Not in the background, files are
written straight from the tensors, and no copy of all of them ever exists.

The ranks of a node meet in the hidden directory that becomes the checkpoint. The lowest makes it, each leaves a mark there when its
files are on the disk, and the lowest then writes the record and renames. The threads use no collectives: those belong to the step.
A rank that fails renames the directory away, which the others notice; one that died is known by the lock that its process held.

Refuses to hide a failure: what a background save ended with is raised by the next `check`, `save` or `wait`. Ranks must have met once
(any collective) between making their Savers and the first save: making one removes what a killed run left.
Non-guarantees: other nodes. Each publishes its own share, and the agent brings them together.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opensora.checkpoint import (
    DTYPES,
    RECORD,
    TENSORS,
    Piece,
    Record,
    directory,
    file_name,
    finished,
    is_disk_full,
    step_of,
)
from opensora.config import CheckpointConfig, StageConfig, write_stage
from opensora.encoders import copy_encoders
from opensora.errors import DiskFull, NotFinite, OutOfMemory

POLL_S = 0.01
"""Between two looks at what the other ranks of the node have done."""
BEAT_S = 1.0
SLOWEST = 2
"""Checkpoints that this node may have and another one not: that one begins none before it has finished the one before, and no rank
takes a step without it."""
WRITE_BYTES = 8 << 20
"""Bytes handed to the kernel at once."""


class PeerFailed(Exception):
    """Another rank of this node could not save, or is gone. The cause is there, not here."""


# ------------------------------------------------------------------------------------------------------------------
# One file
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A safetensors file of these pieces: its first bytes, and where the data of each tensor lies."""

    head: bytes
    offsets: dict[str, int]
    """From the file's first byte, in order of the file."""
    size: int


def lay_out(pieces: Mapping[str, Piece]) -> _Layout:
    """Equal pieces give equal bytes. Wide types first, then by name, as safetensors itself does: everything is aligned.

    Source: github.com/huggingface/safetensors, "Format": 8 bytes of header length, JSON padded with spaces, data.
    """
    names = sorted(pieces, key=lambda name: (-pieces[name].tensor.element_size(), name))
    content: dict[str, object] = {}
    sliced = {name: [pieces[name].start, pieces[name].rows] for name in sorted(names) if pieces[name].rows is not None}
    if sliced:
        content["__metadata__"] = {"about": json.dumps({"rows": sliced}, sort_keys=True, separators=(",", ":"))}
    offsets, end = {}, 0
    for name in names:
        tensor = pieces[name].tensor
        offsets[name], begin = end, end
        end += tensor.numel() * tensor.element_size()
        content[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    head = len(header).to_bytes(8, "little") + header
    return _Layout(head, {name: len(head) + offset for name, offset in offsets.items()}, len(head) + end)


class _Image:
    """A file of a checkpoint in host memory, byte for byte. Pinned where the tensors come from a GPU (not run on a GPU)."""

    def __init__(self, layout: _Layout, pieces: Mapping[str, Piece], device: torch.device) -> None:
        self.layout = layout
        self._bytes = torch.empty(layout.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bytes.zero_()  # touches every page now: the first save would otherwise wait for page faults
        self._bytes[: len(layout.head)] = torch.frombuffer(bytearray(layout.head), dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        for name, offset in layout.offsets.items():
            tensor = pieces[name].tensor
            data = self._bytes[offset : offset + tensor.numel() * tensor.element_size()]
            self.tensors[name] = data.view(tensor.dtype).view(tensor.shape)

    def copy(self, pieces: Mapping[str, Piece]) -> None:
        for name, target in self.tensors.items():
            target.copy_(pieces[name].tensor.detach(), non_blocking=True)

    def chunks(self) -> Iterator[memoryview]:
        yield self._bytes.numpy().data


@dataclass(frozen=True)
class _Direct:
    """A file of a checkpoint that is written from the tensors themselves, one after the other."""

    layout: _Layout
    pieces: Mapping[str, Piece]
    beat: Callable[[], None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self.pieces[name].tensor.detach() for name in self.layout.offsets}

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.layout.head)
        for tensor in self.tensors.values():
            self.beat()
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, chunks: Iterable[memoryview]) -> None:
    """A new file with these bytes, on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            written = 0
            while written < len(chunk):
                written += os.write(descriptor, chunk[written : written + WRITE_BYTES])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------------
# One checkpoint
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A checkpoint that is being written: its record but for the files, and what this rank writes."""

    step: int
    node: int
    encoders: Path
    files: Mapping[str, _Image | _Direct]
    record: Callable[[dict[str, int]], Record]


class Saver:
    """Checkpoints of one rank. `folder`: the run directory's `checkpoints`, which the ranks of a node share."""

    def __init__(self, folder: Path, stage: StageConfig, *, shard: int, shards: int, here: tuple[int, ...], device: torch.device) -> None:
        """This rank is writer `shard` of `shards`; `here`: the writers of this node, whose lowest completes a checkpoint."""
        self._folder, self._stage, self._device = folder, stage, device
        self._shard, self._shards, self._here = shard, shards, here
        self._leads = shard == min(here)
        self._images: dict[str, _Image] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()  # on a CPU: the tensors of the last save may change
        self._copied.set()
        self._event: torch.cuda.Event | None = None  # on CUDA: the same, for a stream
        self._failure: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if len(here) > 1:
            weakref.finalize(self, os.close, _lock(self._sign_of_life(shard)))
        if self._leads:
            self._clean()

    # What the step calls

    def save(
        self,
        pieces: Mapping[str, Mapping[str, Piece]],
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
        """Begin a checkpoint of this rank's `pieces` of TENSORS, which may change after `ready`. Not in the background: make it.

        Waits first for a save that is still going on.

        Args:
            clips: digest of those that are trained on.
            encoders: directory that holds autoencoder.safetensors and text.safetensors; it must stay as it is until the save is done.
            node: 0 writes the encoders and stage.yaml too.
            beat: is called now and then while this waits or writes.

        Raises:
            DiskFull, NotFinite, PeerFailed: this save failed, or the one before in the background; what was written is removed.
            OutOfMemory: there is no room for the copy.
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
            self._publish(
                _Job(step, node, encoders, {part: _Direct(lay_out(pieces[part]), pieces[part], beat) for part in TENSORS}, record)
            )
            return
        self.reserve(pieces)
        self._copied.clear()
        if self._stream is not None:
            self._copy_on(self._stream, pieces)
        job = _Job(step, node, encoders, self._images, record)
        self._thread = threading.Thread(target=self._run, args=(job, pieces), name=f"save-{step}", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Whoever changes the tensors of the last save calls this before: it returns when they are copied.

        On CUDA it returns at once, and the current stream waits in its place (not run on a GPU).
        """
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        else:
            self._copied.wait()

    def reserve(self, pieces: Mapping[str, Mapping[str, Piece]]) -> None:
        """Allocate the memory for copies of such pieces, so that the first save does not have to. In the background alone.

        Raises:
            OutOfMemory: there is not enough.
        """
        for part in TENSORS if self._stage.checkpoint.background else ():
            layout = lay_out(pieces[part])
            if part not in self._images or self._images[part].layout != layout:
                try:
                    self._images[part] = _Image(layout, pieces[part], self._device)
                except (RuntimeError, MemoryError) as error:
                    raise OutOfMemory(
                        f"checkpoint: no host memory for a copy of {part} ({layout.size} bytes); checkpoint.background false makes none"
                    ) from error

    def check(self) -> None:
        """Raise what a background save failed with, once.

        Raises:
            DiskFull, NotFinite, PeerFailed: see `save`.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Return when nothing is being written and every checkpoint is there; `beat` is called each second of it. Raises as `check`."""
        if self._thread is not None:
            self._thread.join(BEAT_S)
            while self._thread.is_alive():
                beat()
                self._thread.join(BEAT_S)
            self._thread = None
        self.check()

    def _copy_on(self, stream: torch.cuda.Stream, pieces: Mapping[str, Mapping[str, Piece]]) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for part, image in self._images.items():
                image.copy(pieces[part])
                for piece in pieces[part].values():  # its memory is not given to others before the copy is done
                    if piece.tensor.is_cuda:
                        piece.tensor.record_stream(stream)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    # What writes

    def _run(self, job: _Job, pieces: Mapping[str, Mapping[str, Piece]]) -> None:
        try:
            try:
                if self._event is not None:
                    torch.cuda.set_device(self._device)  # a thread begins on the first one
                    self._event.synchronize()
                else:
                    for part, image in self._images.items():
                        image.copy(pieces[part])
            finally:
                self._copied.set()
            self._publish(job)
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise to: the next step does
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
                _write(partial / file_name(part, self._shard, self._shards), file.chunks())
            if self._leads:
                self._complete(job, partial, target)
            else:
                _mark(partial, self._shard).touch(exist_ok=False)
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
        """The lowest rank of a node: everything that is there once, and the name that makes a checkpoint of it."""
        if job.node == 0:
            copy_encoders(job.encoders, partial)
            write_stage(self._stage, partial / "stage.yaml")
        for shard in self._here:
            if shard != self._shard:
                self._until(_mark(partial, shard).exists, _failed(target), (shard,))
                _mark(partial, shard).unlink()
        record = job.record({path.name: path.stat().st_size for path in sorted(partial.iterdir())})
        (partial / RECORD).write_text(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(target)
        _flush(self._folder)
        _prune(self._folder, self._stage.checkpoint, alone=len(self._here) == self._shards)

    def _abandon(self, partial: Path, failed: Path) -> None:
        """Take the directory away from the other ranks, which then fail too; the first one to come does."""
        try:
            partial.rename(failed)
        except OSError:  # another rank did, or it was never made
            return
        for path in failed.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if len(self._here) == 1:
            failed.rmdir()  # otherwise it stays, empty, for those that have not come to the directory yet

    def _until(self, done: Callable[[], bool], failed: Path, on: tuple[int, ...]) -> None:
        """Wait for other ranks of this node. Raises PeerFailed where one has failed or is gone."""
        while not done():
            gone = [shard for shard in on if _is_free(self._sign_of_life(shard))]
            if (failed.is_dir() or gone) and not done():
                raise PeerFailed(f"the process of writer {gone[0]} is gone" if gone else f"another rank could not save ({failed.name})")
            time.sleep(POLL_S)

    def _clean(self) -> None:
        """Remove what a killed or failed run left. Nothing else has such a name, and no save is going on."""
        for path in self._folder.glob(".step-*"):
            shutil.rmtree(path)

    def _sign_of_life(self, shard: int) -> Path:
        return self._folder / f".writer-{shard:05d}"


def _refuse_not_finite(job: _Job) -> None:
    for name, weight in job.files["model"].tensors.items():
        if weight.is_floating_point() and weight.numel():
            extremes = torch.stack(torch.aminmax(weight))  # a number that is not one wins, and nothing as large as the weight is made
            if not all(map(math.isfinite, extremes.tolist())):
                raise NotFinite(f"step {job.step}: weight {name} is not finite; nothing was saved")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _failed(target: Path) -> Path:
    return target.with_name(f".{target.name}.failed")


def _mark(partial: Path, shard: int) -> Path:
    """Is there when the files of this writer are on the disk."""
    return partial / f".writer-{shard:05d}"


def _lock(path: Path) -> int:
    """Descriptor of a file that is held until it is closed, at the latest when this process ends, however it does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_free(path: Path) -> bool:
    """Whether the process that held it has ended."""
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
    """Forget what is not kept. By a rename first, so that no half of one is ever taken for a checkpoint.

    Not alone, this node keeps SLOWEST + 1 at least: a slower node may still be writing the last two, and fail.
    """
    for old in finished(folder)[: -max(keep.keep_last, 1 if alone else SLOWEST + 1)]:
        if keep.keep_every is None or step_of(old) % keep.keep_every:
            removed = old.with_name(f".{old.name}.removed")
            old.rename(removed)
            shutil.rmtree(removed)
