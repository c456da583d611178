"""Laws of latents that lie in a store: the batches of the local cache bit for bit, never more room than was given, an end with a reason."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.config import StageConfig
from opensora.dataset.manifest import DataManifest, Row
from opensora.errors import ConfigError, DataError
from opensora.latents import beside, shard, streamed
from opensora.latents.cache import prepare
from opensora.latents.loader import Ahead, Batch, Loader, Position
from opensora.latents.prepared import INDEX, Prepared
from opensora.latents.remote import PATIENCE, Remote, Span
from opensora.latents.streamed import STREAM, StreamedShard
from opensora.prepare.encode import encode

CLIPS = 48
WORDS = ("red", "green", "blue", "dark", "bright", "small", "wide")


def stage(path: str | Path, **changes: Any) -> StageConfig:
    plain: dict[str, Any] = {
        "model": {"depth": 1, "width": 16, "heads": 2, "latent_channels": 8, "caption_width": 12, "caption_tokens": 6},
        "objective": {"kind": "flow"},
        "data": {"source": {"kind": "folder", "path": str(path)}, "frames": 1, "height": 16, "width": 16, "horizontal_flip": True},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": 1,
        "batch_size": 3,
        "checkpoint": {"every_steps": 1},
        "sampling": {"method": "euler"},
    }
    return StageConfig.model_validate(plain | changes)


def make(folder: Path) -> DataManifest:
    """A data set of pictures with captions of 1 to 5 words, and its manifest."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    lines = ["path,text"]
    for number in range(CLIPS):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{' '.join(draw.choice(WORDS, 1 + number % 5))}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return recorded(folder)


def recorded(folder: Path) -> DataManifest:
    import hashlib

    rows = [line.split(",") for line in (folder / "captions.csv").read_text().splitlines()[1:]]
    contents = [(folder / path).read_bytes() for path, _ in rows]
    found = zip(rows, contents, strict=True)
    return DataManifest(tuple(Row(path, text, len(data), hashlib.sha256(data).hexdigest()) for (path, text), data in found))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two rows of latents a block, so that few clips have many; and no client of an earlier test's server."""
    monkeypatch.setattr(shard, "BLOCK", 1024)
    monkeypatch.setattr(beside, "BATCHES", 1)
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, str, DataManifest]:
    """A data set with its latents on the disk, and the address of its copy in a store (fsspec's memory)."""
    folder = tmp_path / "set"
    manifest = make(folder)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "one.yaml").write_text(json.dumps(stage("nowhere").model_dump(mode="json")))
    encode(folder, {"one": tmp_path / "stages" / "one.yaml"})
    address = f"memory://{tmp_path.name}/set"
    upload(folder, address)
    return folder, address, manifest


def upload(folder: Path, address: str) -> None:
    files, root = fsspec.core.url_to_fs(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def opened(config: StageConfig, cache: Path, manifest: DataManifest) -> Prepared:
    return Prepared.open(prepare(config, cache, recorded=manifest), config)


def walk(loader: Loader | Ahead, steps: int, seen: Position | None = None) -> tuple[list[Batch], Position]:
    seen, taken = loader.start if seen is None else seen, []
    for _ in range(steps):
        taken.append(loader.batch(seen))
        seen = loader.after(seen)
    return taken, seen


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.vectors, other.vectors)
        assert torch.equal(one.index, other.index)
        assert (one.mask is None) == (other.mask is None)
        assert one.mask is None or other.mask is None or torch.equal(one.mask, other.mask)


def held(cache: Path) -> int:
    """Bytes of rows that a folder of caches holds, or could grow to."""
    return sum(path.stat().st_size for path in cache.rglob("*.slots"))


# --- On a disk ----------------------------------------------------------------------------------------------------------------------------


def test_latents_beside_the_clips_are_mapped_where_they_lie_and_nothing_is_encoded(
    published: tuple[Path, str, DataManifest], tmp_path: Path
) -> None:
    folder, _, manifest = published
    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    directory = prepare(stage(moved), tmp_path / "cache", recorded=manifest)
    assert directory.parent == moved / "latents"
    assert not (tmp_path / "cache").exists()


def test_latents_of_other_clips_or_sizes_never_serve(published: tuple[Path, str, DataManifest], tmp_path: Path) -> None:
    folder, _, _ = published
    (folder / "captions.csv").write_text((folder / "captions.csv").read_text().replace("0.png,", "0.png,wide ", 1))
    for config, found in ((stage(folder), recorded(folder)), (stage(folder, seed=7), recorded(folder))):
        assert prepare(config, tmp_path / "cache", recorded=found).parent == tmp_path / "cache"
    data = stage(folder).data.model_copy(update={"height": 32})
    assert prepare(stage(folder, data=data), tmp_path / "cache", recorded=recorded(folder)).parent == tmp_path / "cache"


# --- In a store ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [None, "0.00001"])
@pytest.mark.parametrize("ahead", [False, True])
def test_batches_from_a_store_are_those_of_the_disk_bit_for_bit(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str | None, ahead: bool
) -> None:
    folder, address, manifest = published
    if room:
        monkeypatch.setenv(beside.ROOM, room)
    local, remote = opened(stage(folder), tmp_path / "a", manifest), opened(stage(address), tmp_path / "b", manifest)
    assert (local.digest, local.clips, local.usage) == (remote.digest, remote.clips, remote.usage)
    assert remote.stream is not None
    loader: Loader | Ahead = Loader(remote, seed=3)
    loader = Ahead(loader) if ahead else loader
    assert_equal(walk(loader, 3 * CLIPS // 3)[0], walk(Loader(local, seed=3), 3 * CLIPS // 3)[0])
    assert [path.name for path in (tmp_path / "b").iterdir()] == [remote.directory.name], "nothing was encoded"
    remote.stream.close()


def test_a_resume_continues_exactly_on_the_same_machine_and_on_another_one(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, manifest = published
    monkeypatch.setenv(beside.ROOM, "0.00001")
    whole, _ = walk(Loader(opened(stage(folder), tmp_path / "a", manifest), seed=3), 40)
    first, seen = walk(Loader(opened(stage(address), tmp_path / "b", manifest), seed=3), 25)
    assert_equal(first, whole[:25])
    for cache in ("b", "c"):
        rest, _ = walk(Ahead(Loader(opened(stage(address), tmp_path / cache, manifest), seed=3)), 15, seen)
        assert_equal(rest, whole[25:])


@pytest.mark.parametrize("room_kb", [7, 10, 30])
def test_the_local_part_never_holds_more_bytes_than_its_bound(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_kb: int
) -> None:
    _, address, manifest = published
    monkeypatch.setenv(beside.ROOM, f"{room_kb / 1e6:.9f}")
    prepared = opened(stage(address), tmp_path / "b", manifest)
    loader, seen = Ahead(Loader(prepared, seed=3)), (0,)
    for _ in range(CLIPS):
        loader.batch(seen)
        seen = loader.after(seen)
        assert 0 < held(tmp_path / "b") <= room_kb * 1000
    other = stage(address, batch_size=2)
    with monkeypatch.context() as more:
        more.setenv(beside.ROOM, f"{2 * room_kb / 1e6:.9f}")
        walk(Loader(opened(other, tmp_path / "b", manifest), seed=3), 5)
        assert held(tmp_path / "b") <= 2 * room_kb * 1000, "together with the one that is in use"
    assert prepared.stream is not None


def test_room_that_is_too_small_for_a_batch_is_refused_with_both_numbers(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address, manifest = published
    monkeypatch.setenv(beside.ROOM, "0.000001")
    with pytest.raises(ConfigError, match=rf"{beside.ROOM}: 1e-06 GB are there .* need \S+ GB. Raise it: export {beside.ROOM}=") as error:
        opened(stage(address), tmp_path / "b", manifest)
    monkeypatch.setenv(beside.ROOM, str(error.value).rpartition("=")[2])
    walk(Loader(opened(stage(address), tmp_path / "b", manifest), seed=3), 5)
    with monkeypatch.context() as pod:
        pod.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        pod.setenv(beside.ROOM, "0.000001")
        with pytest.raises(ConfigError, match=r"Raise latents_gb in the cluster profile: osctl launch --set cluster.latents_gb=\S+$"):
            opened(stage(address), tmp_path / "c", manifest)
    monkeypatch.setenv(beside.ROOM, "a lot")
    with pytest.raises(ConfigError, match=r"expected GB .* found 'a lot'"):
        opened(stage(address), tmp_path / "b", manifest)


def test_with_a_known_order_half_the_room_finds_nearly_half_the_rows_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the least recently used block given up it would be 15%."""
    monkeypatch.setattr(shard, "BLOCK", 1)
    folder, address = tmp_path / "set", f"memory://{tmp_path.name}/set"
    manifest = make(folder)
    data = stage(address).data.model_copy(update={"horizontal_flip": False})
    config = stage(address, batch_size=1, data=data)
    (tmp_path / "one.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    encode(folder, {"one": tmp_path / "one.yaml"})
    upload(folder, address)
    opened(config, tmp_path / "a", manifest)
    monkeypatch.setenv(beside.ROOM, f"{held(tmp_path / 'a') / 2 / 1e9:.12f}")
    half = opened(config, tmp_path / "b", manifest)
    asked, fill = 0, StreamedShard.fill

    def counted(self: StreamedShard, blocks: Sequence[int], *arguments: Any) -> list[int]:
        nonlocal asked
        asked += len(blocks) if self.name.startswith("bucket") else 0
        return fill(self, blocks, *arguments)

    monkeypatch.setattr(StreamedShard, "fill", counted)
    loader = Loader(half, seed=3)
    _, seen = walk(loader, CLIPS)
    assert asked == CLIPS
    walk(loader, 4 * CLIPS, seen)
    assert asked - CLIPS < 0.62 * 4 * CLIPS


def test_a_first_epoch_takes_few_large_requests_where_all_has_room(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the shard's blocks by itself would be 48; none is fetched twice, and those that the first batch waits for come alone."""
    _, address, manifest = published
    monkeypatch.setattr(streamed, "RUN_BYTES", 8 << 10)
    prepared = opened(stage(address), tmp_path / "b", manifest)
    spans: list[Span] = []
    ranges = Remote.ranges

    def seen(self: Remote, name: str, asked: Sequence[Span], size: int) -> list[bytes]:
        spans.extend(asked if name.startswith("bucket") else ())
        return ranges(self, name, asked, size)

    monkeypatch.setattr(Remote, "ranges", seen)
    loader = Ahead(Loader(prepared, seed=3))
    walk(loader, CLIPS // 3)
    loader.close()
    large = prepared.parts[0].shard
    assert isinstance(large, StreamedShard)
    assert sum(last - first for first, last in spans) == large.of.rows * large.of.row_bytes
    assert len(spans) < large.of.blocks / 2
    assert max(last - first for first, last in spans) == 8 << 10


def test_a_network_that_gets_behind_fetches_only_what_is_needed_soon(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address, manifest = published
    monkeypatch.setattr(streamed, "QUEUED_BYTES", 0)
    prepared = opened(stage(address), tmp_path / "b", manifest)
    large = prepared.parts[0].shard
    assert isinstance(large, StreamedShard) and large.slots is not None
    inner = Loader(prepared, seed=3)
    loader = Ahead(inner, depth=2)
    walk(loader, 1)
    loader.close()
    here = large.of.blocks - len(large.slots.missing(np.arange(large.of.blocks)))
    assert 0 < here <= 3 * (1 + 2 + inner.reach) < large.of.blocks, "of the batch, of those that were read ahead and asked for ahead"


def test_two_ranks_share_what_was_fetched(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, manifest = published
    monkeypatch.setenv(beside.ROOM, "0.00001")
    directory = prepare(stage(address), tmp_path / "b", recorded=manifest)
    local = Prepared.open(prepare(stage(folder), tmp_path / "a", recorded=manifest), stage(folder))
    wrong: list[BaseException] = []

    def train(rank: int) -> None:
        try:
            ours = Ahead(Loader(Prepared.open(directory, stage(address)), seed=3, rank=rank, world=2))
            theirs = Loader(local, seed=3, rank=rank, world=2)
            assert_equal(walk(ours, 60)[0], walk(theirs, 60)[0])
        except BaseException as error:  # noqa: BLE001 - said by the test's own thread
            wrong.append(error)

    ranks = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not wrong


# --- What is not whole --------------------------------------------------------------------------------------------------------------------


def damaged(address: str, name: str, change: str) -> None:
    files, root = fsspec.core.url_to_fs(address)
    (place,) = files.glob(f"{root}/latents/*/{name}")
    content = bytearray(files.cat_file(place))
    if change == "gone":
        files.rm_file(place)
        return
    if change == "cut":
        del content[-40000:]
    else:
        content[len(content) // 2 if change == "changed" else 20000] ^= 1
    files.pipe_file(place, bytes(content))


@pytest.mark.parametrize("change", ["cut", "changed", "gone"])
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_shard_that_somebody_changed_ends_as_a_data_error_that_names_it(
    published: tuple[Path, str, DataManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    _, address, manifest = published
    monkeypatch.setenv(PATIENCE, "0")
    prepared = opened(stage(address), tmp_path / "b", manifest) if when == "while" else None
    damaged(address, "bucket-0.safetensors", change)
    said = {"cut": r"\d+ bytes, the latent cache has \d+", "changed": "sha256 .* somebody changed the file", "gone": "is gone"}[change]
    with pytest.raises(DataError, match=rf"bucket-0\.safetensors: .*{said}") as error:
        walk(Loader(prepared or opened(stage(address), tmp_path / "b", manifest), seed=3), CLIPS)
    assert "Publish the data set again" in str(error.value)


@pytest.mark.parametrize("name", ["captions.json", "autoencoder.safetensors", "text.safetensors", "bucket-0.digests"])
@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_small_file_that_somebody_changed_is_refused(
    published: tuple[Path, str, DataManifest], tmp_path: Path, name: str, change: str
) -> None:
    _, address, manifest = published
    damaged(address, name, change)
    with pytest.raises(DataError, match=f"{name}.*Publish the data set again"):
        opened(stage(address), tmp_path / "b", manifest)
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", ".hidden", "a/b"])
def test_no_name_of_an_index_leaves_the_folder(published: tuple[Path, str, DataManifest], tmp_path: Path, name: str) -> None:
    _, address, manifest = published
    files, root = fsspec.core.url_to_fs(address)
    (place,) = files.glob(f"{root}/latents/*/{INDEX}")
    told = json.loads(files.cat_file(place))
    told["files"][name] = 3
    told["sha256"][name] = "0" * 64
    files.pipe_file(place, json.dumps(told).encode())
    with pytest.raises(DataError, match="not an index of a latent cache"):
        opened(stage(address), tmp_path / "b", manifest)


def test_latents_without_digests_are_read_on_a_disk_and_not_from_a_store(
    published: tuple[Path, str, DataManifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a release before this one."""
    folder, address, manifest = published
    (index,) = folder.glob(f"latents/*/{INDEX}")
    told = json.loads(index.read_bytes())
    for name in [name for name in told["files"] if name.endswith(".digests")]:
        (index.parent / name).unlink()
        del told["files"][name]
    index.write_text(json.dumps({key: value for key, value in told.items() if key not in ("blocks", "sha256")}))
    upload(folder, address)
    assert opened(stage(folder), tmp_path / "a", manifest).directory == index.parent
    assert opened(stage(address), tmp_path / "b", manifest).stream is None
    assert "wrote no digests" in caplog.text


def test_a_folder_of_a_streamed_cache_that_somebody_damaged_is_said(published: tuple[Path, str, DataManifest], tmp_path: Path) -> None:
    _, address, manifest = published
    prepared = opened(stage(address), tmp_path / "b", manifest)
    os.truncate(prepared.directory / "bucket-0.slots", 512)
    with pytest.raises(DataError, match=r"bucket-0\.slots: 512 bytes, the latent cache has \d+ there"):
        Loader(prepared, seed=3).batch((0,))
    (prepared.directory / STREAM).write_text("{")
    with pytest.raises(DataError, match=STREAM):
        Prepared.open(prepared.directory, stage(address))


# --- A real store that fails --------------------------------------------------------------------------------------------------------------


class Moody(ThreadingHTTPServer):
    """Stands before an object store and answers 503, or cuts its answers off, as often as it is told."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        self.upstream = endpoint.removeprefix("http://")
        self.failing, self.mood, self.refused = 0, "503", 0
        super().__init__(("127.0.0.1", 0), _Between)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Between(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Moody)
        failing, cut = server.failing != 0 and "latents/" in self.path and "bucket-0" in self.path, server.mood == "cut"
        if failing:
            server.failing, server.refused = server.failing - 1, server.refused + 1
            if not cut:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        upstream = http.client.HTTPConnection(server.upstream)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if failing and cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def moody(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    server = Moody(s3.endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_s3(published: tuple[Path, str, DataManifest], s3: Any, tmp_path: Path) -> tuple[Path, str, DataManifest]:
    folder, _, manifest = published
    shutil.copytree(folder, s3.root / s3.bucket / tmp_path.name)
    return folder, s3.url(tmp_path.name), manifest


@pytest.mark.s3
@pytest.mark.long
@pytest.mark.parametrize("mood", ["503", "cut"])
def test_a_store_that_fails_for_a_while_is_asked_again_and_nothing_is_lost(
    in_s3: tuple[Path, str, DataManifest], moody: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mood: str
) -> None:
    folder, address, manifest = in_s3
    monkeypatch.setenv(beside.ROOM, "0.00001")
    monkeypatch.setenv(PATIENCE, "60")
    remote = opened(stage(address), tmp_path / "b", manifest)
    theirs, _ = walk(Loader(opened(stage(folder), tmp_path / "a", manifest), seed=3), 2 * CLIPS // 3)
    moody.mood, moody.failing = mood, 4
    assert_equal(walk(Ahead(Loader(remote, seed=3)), 2 * CLIPS // 3)[0], theirs)
    assert moody.refused == 4


@pytest.mark.s3
@pytest.mark.long
def test_a_store_that_stays_away_ends_the_stage_with_its_address_and_the_next_step(
    in_s3: tuple[Path, str, DataManifest], moody: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address, manifest = in_s3
    monkeypatch.setenv(PATIENCE, "1")
    remote = opened(stage(address), tmp_path / "b", manifest)
    moody.failing = 10**9
    with pytest.raises(DataError, match=rf"^{address}/latents/\S+/bucket-0\.safetensors: cannot be read .* tries in .* Mend the access"):
        walk(Ahead(Loader(remote, seed=3)), 2 * CLIPS // 3)
    assert not any(thread.name.startswith("latents") and thread.is_alive() for thread in threading.enumerate() if thread.daemon)
