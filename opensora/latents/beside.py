"""The encoded clips that lie beside the clips themselves, in `latents/` of a data set: `osctl prepare` makes them once for everybody.

Owns where they are looked for, and how one in a store is set up on this machine: small files whole, room for the rest (`streamed`). Refuses
to make a cache (`cache`). On a disk a cache is mapped where it lies; whether it fits is told by contents, never by the place.

The room is OSCTL_LATENTS_GB (GB of 10^9 bytes) for all streamed caches of one folder together. Unset it is 16 GB, halved until that is at
most half of what the disk has free. The small files (indices, captions, encoders: some 100 bytes a clip) come on top.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.config import DataConfig, FolderSource, ManifestSource, StageConfig
from opensora.dataset.places import is_local
from opensora.errors import ConfigError, DataError
from opensora.latents.prepared import INDEX, VECTORS, latents_file, serves
from opensora.latents.remote import Remote
from opensora.latents.shard import HEADER, digests_file, parsed, writing
from opensora.latents.slots import Shape, Slots
from opensora.latents.streamed import DIGEST_BYTES, STREAM, edges_file, shape_of

LATENTS = "latents"
"""Folder of a data set that holds caches."""
ROOM = "OSCTL_LATENTS_GB"
ROOM_GB = 16.0
POD = "KUBERNETES_SERVICE_HOST"
"""Kubelet sets it in every container. There nobody exports ROOM: it comes from the cluster profile."""
SUFFIX = ".streamed"
BATCHES = 2
"""A shard has room for the rows of so many batches at least."""

log = logging.getLogger(__name__)


def find_beside(stage: StageConfig, inputs: str, taken: str, cache: Path, env: Mapping[str, str] = os.environ) -> Path | None:
    """Directory of the cache of these inputs (as `prepared.serves`) that lies beside the stage's clips. None: there is none.

    Args:
        cache: where a part of it is kept, if it lies in a store.

    Raises:
        DataError: the store stays away, or what lies there is not what its index says.
        ConfigError: the room is too small for two batches, or is no number.
        DiskFull: this machine has no room.
    """
    place = _place(stage.data)
    if place is None:
        return None
    if "://" not in place:
        for index in sorted(Path(place).glob(f"[!.]*/{INDEX}")):
            try:
                told = json.loads(index.read_bytes())
            except (OSError, ValueError):
                continue
            if serves(told, inputs, taken):
                return index.parent
        return None
    remote = Remote(place, env)
    for name in remote.folders():
        if name.startswith("."):
            continue
        try:
            content = remote.read(f"{name}/{INDEX}")
            told = json.loads(content)
        except (FileNotFoundError, ValueError):
            continue  # not whole: its index is written last
        if not serves(told, inputs, taken):
            continue
        if "blocks" in told:
            setup = _Setup(Remote(f"{place}/{name}", env), content, told, stage, cache, in_pod=POD in env)
            return setup.directory(_room(cache, env))
        log.warning(
            "%s/%s: made by a release that wrote no digests, so it is not read from a store; the clips are encoded here", place, name
        )
    return None


def _place(data: DataConfig) -> str | None:
    """Where caches would lie: a path, or an address."""
    import fsspec

    match data.source:
        case FolderSource(path=path):
            folder = path
        case ManifestSource(path=path):
            folder = path.rpartition("/")[0] or "."
        case _:
            return None
    files, local = fsspec.core.url_to_fs(folder)
    return f"{local if is_local(files) else folder.rstrip('/')}/{LATENTS}"


class _Setup:
    """One cache in a store, and its folder on this machine."""

    def __init__(self, remote: Remote, content: bytes, told: Mapping[str, Any], stage: StageConfig, cache: Path, *, in_pod: bool) -> None:
        """`content`: of its index; `told`: the same, read. Raises DataError for an index that nobody of ours wrote."""
        self._remote, self._content, self._stage, self._cache, self._in_pod = remote, content, stage, cache, in_pod
        try:
            self._files = {str(name): int(size) for name, size in told["files"].items()}
            self._sha256 = {str(name): str(digest) for name, digest in told["sha256"].items()}
            self._rows = {str(name): int(rows) for name, rows in told["blocks"].items()}
            for name in self._files:
                if Path(name).name != name or name.startswith("."):
                    raise ValueError(f"a file called {name[:80]!r}")
            self._tensors = {VECTORS: "vectors"} | {latents_file(bucket): "latents" for bucket in range(len(stage.buckets))}
            if set(self._rows) != set(self._tensors) or not set(self._files) <= {*self._sha256, *self._rows}:
                raise ValueError("files without digests")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{remote.address}/{INDEX}: not an index of a latent cache ({error}). Publish the data set again") from error

    def directory(self, room: int) -> Path:
        """Its folder on this machine, made if it is not there."""
        with writing(self._cache):
            self._cache.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(self._content).hexdigest()[:16]
        digests = {name: self._whole(digests_file(name)) for name in self._tensors}
        shapes, edges = {}, {}
        for name, tensor in self._tensors.items():
            shapes[name], edges[name] = self._edges(name, tensor, digests[name])
        slots, made = self._named(key, shapes, room - _others(self._cache, key, room - self._bytes(shapes)))
        if not made.exists():  # one of the same clips with other room may be in use
            slots, made = self._named(key, shapes, room - _others(self._cache, None, room - self._bytes(shapes)))
        stream = json.dumps({"address": self._remote.address, "slots": slots})
        if made.exists():
            self._move(made, stream)
            return made
        partial = self._cache / f".{socket.gethostname()}.{os.getpid()}-{threading.get_native_id()}.partial"
        try:
            with writing(self._cache):
                partial.mkdir()
                for name in self._files:
                    if name not in self._tensors:
                        (partial / name).write_bytes(digests[name] if name in digests else self._whole(name))
                for name, content in edges.items():
                    (partial / edges_file(name)).write_bytes(content)
                (partial / INDEX).write_bytes(self._content)
                (partial / STREAM).write_text(stream)
            for name, count in slots.items():
                if count:
                    Slots.make(partial / name, shapes[name], count)
            with writing(self._cache):
                try:
                    partial.rename(made)
                except OSError:
                    if not made.exists():
                        raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return made

    def _named(self, key: str, shapes: Mapping[str, Shape], room: int) -> tuple[dict[str, int], Path]:
        """Slots of each shard, and the folder of one that has so many."""
        slots = self._divided(shapes, room)
        return slots, self._cache / f"{key}-{hashlib.sha256(json.dumps(slots).encode()).hexdigest()[:6]}.{_boot()}{SUFFIX}"

    def _move(self, made: Path, stream: str) -> None:
        """The same data set may lie at another address now. In place: others hold this file open while they use the folder."""
        with writing(made):
            if (made / STREAM).read_text() != stream:
                (made / STREAM).write_text(stream)
            os.utime(made / STREAM)

    def _whole(self, name: str) -> bytes:
        """A small file. Raises DataError, where it is not the one that the index tells of."""
        try:
            content = self._remote.read(name)
        except FileNotFoundError as error:
            raise DataError(f"{error}: is gone. Publish the data set again") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != self._sha256[name]:
            raise DataError(
                f"{self._remote.address}/{name}: {len(content)} bytes with the sha256 {digest[:12]}, the latent cache has "
                f"{self._files[name]} with {self._sha256[name][:12]} there; somebody changed it. Publish the data set again"
            )
        return content

    def _edges(self, name: str, tensor: str, digests: bytes) -> tuple[Shape, bytes]:
        """Shape of a shard's large tensor, and what lies before and after it. Raises DataError."""
        size, start = self._files[name], 8 + HEADER
        (head,) = self._remote.ranges(name, [(0, start)], size)
        try:
            header, whole = parsed(head, tensor)
            shape = shape_of(header, tensor, digests, self._rows[name])
            if whole != size:
                raise ValueError(f"its header describes {whole} bytes, the index {size}")
        except ValueError as error:
            raise DataError(
                f"{self._remote.address}/{name}: no whole file of a latent cache ({error}). Publish the data set again"
            ) from error
        end = start + shape.rows * shape.row_bytes
        tail = self._remote.ranges(name, [(end, size)], size)[0] if end < size else b""
        for part, digest in ((head, digests[:DIGEST_BYTES]), (tail, digests[-DIGEST_BYTES:])):
            if hashlib.sha256(part).digest() != digest:
                raise DataError(
                    f"{self._remote.address}/{name}: {len(part)} bytes of its header have another sha256 than in {digests_file(name)}; "
                    "somebody changed it. Publish the data set again"
                )
        return shape, head + tail

    @staticmethod
    def _bytes(shapes: Mapping[str, Shape]) -> int:
        return sum(shape.blocks * shape.block_bytes for shape in shapes.values())

    def _divided(self, shapes: Mapping[str, Shape], room: int) -> dict[str, int]:
        """Slots of each shard: all of its blocks where they fit, else its share of the room by size. Raises ConfigError."""
        whole = self._bytes(shapes)
        share = {name: min(shape.blocks, room * shape.blocks // max(whole, 1)) for name, shape in shapes.items()}
        sizes = [bucket.batch_size for bucket in self._stage.buckets]
        least = {name: min(shape.blocks, BATCHES * (max(sizes) if name == VECTORS else sizes[bucket]))
                 for bucket, (name, shape) in enumerate(_buckets_first(shapes))}  # fmt: skip
        if any(share[name] < least[name] for name in shapes):
            needed = sum(least[name] * shape.block_bytes for name, shape in shapes.items())
            floor = {name: max(share[name], least[name]) for name in shapes}
            over = sum(floor[name] * shape.block_bytes for name, shape in shapes.items()) - room
            for name in sorted(shapes, key=lambda name: floor[name] - least[name], reverse=True):
                give = min(floor[name] - least[name], -(-max(over, 0) // max(shapes[name].block_bytes, 1)))
                floor[name], over = floor[name] - give, over - give * shapes[name].block_bytes
            if over > 0:
                enough = f"{needed * 1.05 / 1e9:.3g}"
                way = f"latents_gb in the cluster profile: osctl launch --set cluster.latents_gb={enough}" if self._in_pod else ""
                raise ConfigError(
                    f"{ROOM}: {room / 1e9:.6g} GB are there for encoded clips from a store, {BATCHES} batches need {needed / 1e9:.6g} GB. "
                    f"Raise {way or f'it: export {ROOM}={enough}'}"
                )
            return floor
        return share


def _buckets_first(shapes: Mapping[str, Shape]) -> Sequence[tuple[str, Shape]]:
    return sorted(shapes.items(), key=lambda item: (item[0] == VECTORS, int("".join(filter(str.isdigit, item[0])) or 0)))


def _room(cache: Path, env: Mapping[str, str]) -> int:
    """Bytes. Raises ConfigError."""
    text = env.get(ROOM)
    if not text:
        room = ROOM_GB * 1e9
        found = shutil.disk_usage(next(each for each in (cache, *cache.absolute().parents) if each.exists()))
        while room > (found.free + sum(map(_used, cache.glob(f"*{SUFFIX}")))) / 2 and room > 1e6:
            room /= 2
        return int(room)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 < gigabytes < 1e9:
        raise ConfigError(f"{ROOM}: expected GB for encoded clips from a store, as 16, found {text[:40]!r}. Correct it, or unset it")
    return int(gigabytes * 1e9)


def _others(cache: Path, key: str | None, left: int) -> int:
    """Bytes of the streamed caches but those of this key, after those that nobody uses were removed until not more than `left` remain."""
    used = {folder: _used(folder) for folder in cache.glob(f"*{SUFFIX}") if key is None or not folder.name.startswith(key)}
    for folder in sorted(used, key=_touched):
        if sum(used.values()) <= max(left, 0):
            break
        if _removed(folder):
            del used[folder]
    return sum(used.values())


def _touched(folder: Path) -> float:
    try:
        return (folder / STREAM).stat().st_mtime
    except OSError:
        return 0.0


def _used(folder: Path) -> int:
    """Bytes that its slots may grow to: another training fills them meanwhile."""
    return sum(path.stat().st_size for path in folder.glob("*.slots"))


def _removed(folder: Path) -> bool:
    """Whether nobody used it, and it is gone."""
    try:
        with (folder / STREAM).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return False
    return True


def _boot() -> str:
    """8 hex digits of this start of this machine."""
    try:
        return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:8]
    except OSError:
        return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
