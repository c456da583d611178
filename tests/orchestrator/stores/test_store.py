"""Laws that hold for every kind of store, and what is special to each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from effect_fates import Crash, Fate, When
from hard_prompts import HARD

from opensora.evaluation.file_names import file_names
from orchestrator.effects import watched_by
from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.ledger.keys import Keys
from orchestrator.litter import is_litter
from orchestrator.ports import Store
from orchestrator.stores import open_store
from orchestrator.stores import s3 as s3_module
from orchestrator.stores.folder import KEPT, FolderStore
from orchestrator.stores.s3 import PART_BYTES, S3Store


class Place:
    """Where a test's store lies, so that other processes can open it too."""

    def __init__(self, url: str, env: Mapping[str, str]):
        self.url = url
        self.env = env

    def open(self) -> Store:
        return S3Store(self.url, env=self.env, patience_s=10) if self.url.startswith("s3:") else open_store(self.url)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "store"), {})
    server = request.getfixturevalue("s3")
    return Place(server.url(f"contract/{tmp_path.name}"), server.env)


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


# Laws of every store


def test_what_is_created_is_read(store: Store) -> None:
    etag = store.create("a/b.json", b"one")
    assert (store.read("a/b.json").data, store.read("a/b.json").etag, store.size("a/b.json")) == (b"one", etag, 3)


def test_samples_of_every_prompt_are_delivered_and_found(store: Store, tmp_path: Path) -> None:
    names = file_names(HARD, ".mp4")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
        store.upload(f"demo/samples/{name}", tmp_path / name)
    assert list(store.list("demo/samples/")) == sorted((f"demo/samples/{name}" for name in names), key=str.encode)
    for name in names:
        store.download(f"demo/samples/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == name.encode()
        (tmp_path / "back").unlink()


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.create("empty", b"")
    assert store.read("empty").data == b"" and list(store.list("")) == ["empty"]


def test_what_is_discarded_is_gone_and_nothing_else(store: Store) -> None:
    store.create("a/b", b"one")
    store.create("a/c", b"two")
    for _ in range(2):
        store.discard("a/b")
    assert list(store.list("")) == ["a/c"]
    store.discard("a/c")
    assert list(store.list("")) == [] and list(store.children("")) == []
    store.create("a/b", b"other")
    assert store.read("a/b").data == b"other"


def test_the_age_of_an_object_is_told_by_the_stores_clock_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host's may be hours off."""
    etag = store.create("a/lease.json", b"one")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        assert 0 <= store.age("a/lease.json") < 30
    if isinstance(store, FolderStore):
        os.utime(store.root / "a/lease.json", (time.time() - 500, time.time() - 500))
        assert 499 < store.age("a/lease.json") < 530
    store.replace("a/lease.json", b"two", etag)
    assert store.age("a/lease.json") < 30, "of what was written last"
    with pytest.raises(NotFound):
        store.age("a/other")


def test_create_of_the_same_bytes_twice_succeeds_twice(store: Store) -> None:
    assert store.create("a", b"one") == store.create("a", b"one")


def test_create_never_overwrites(store: Store) -> None:
    store.create("a", b"one")
    with pytest.raises(StoreConflict):
        store.create("a", b"two")
    assert store.read("a").data == b"one"


def test_replace_needs_the_etag_that_was_read(store: Store) -> None:
    first = store.create("a", b"one")
    second = store.replace("a", b"two", first)
    with pytest.raises(StoreConflict):
        store.replace("a", b"three", first)
    assert (store.read("a").data, store.read("a").etag) == (b"two", second)


def test_replace_of_nothing_is_not_found(store: Store) -> None:
    etag = store.create("a", b"one")
    with pytest.raises(NotFound):
        store.replace("b", b"two", etag)


def test_create_meets_what_a_replace_has_left(store: Store) -> None:
    store.replace("a", b"two", store.create("a", b"one"))
    with pytest.raises(StoreConflict):
        store.create("a", b"one")
    assert store.create("a", b"two") == store.read("a").etag


def test_an_object_can_be_replaced_again_and_again(store: Store) -> None:
    etag = store.create("p/lease.json", b"0")
    for number in range(1, 2 * KEPT + 5):
        etag = store.replace("p/lease.json", b"%d" % number, etag)
    assert store.read("p/lease.json").data == b"%d" % (2 * KEPT + 4)
    assert list(store.list("")) == ["p/lease.json"]


def test_missing_objects_are_not_found(store: Store, tmp_path: Path) -> None:
    store.create("a/b", b"one")
    for key in ("a", "b", "a/c", "a/b/c"):
        with pytest.raises(NotFound):
            store.read(key)
        with pytest.raises(NotFound):
            store.size(key)
        with pytest.raises(NotFound):
            store.download(key, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_list_is_in_lexical_order_of_whole_keys(store: Store) -> None:
    keys = ["a/10/x", "a/2/x", "a/2/y", "a-b/x", "a.b", "a0/x", "b"]
    for key in keys:
        store.create(key, b"x")
    assert list(store.list("")) == sorted(keys)
    assert list(store.list("a")) == sorted(keys[:-1])
    assert list(store.list("a/")) == ["a/10/x", "a/2/x", "a/2/y"]
    assert list(store.list("a/2")) == ["a/2/x", "a/2/y"]
    assert list(store.list("a/", after="a/2/x")) == ["a/2/y"]
    assert list(store.list("a/", after="a/2")) == ["a/2/x", "a/2/y"]
    assert list(store.list("nothing/")) == []


def test_children_are_the_folders_right_below(store: Store) -> None:
    for key in ("p/stages/s1@0a/x", "p/stages/s1@0a/y/z", "p/stages/s2@0b/x", "p/lease.json", "q-r/x"):
        store.create(key, b"x")
    assert list(store.children("")) == ["p", "q-r"]
    assert list(store.children("p/")) == ["stages"]
    assert list(store.children("p/stages/")) == ["s1@0a", "s2@0b"]
    assert list(store.children("nothing/")) == []


LITTER = (
    ".DS_Store", "._c", "Thumbs.db", "desktop.ini", "_SUCCESS", ".c.crc", "c.crc", "c.tmp", "c~", ".c.swp", "c.partial", "c.rclonelink",
    ".nfs00000000deadbeef00000001", ".fuse_hidden0001", "b_$folder$", "lost+found/x", "@eaDir/c/thumb.jpg", ".Trash-0/files/x",
    "__MACOSX/._c", ".git/config",
)  # fmt: skip
"""What file systems, desktops, Hadoop, rclone, s3fs and editors leave behind."""


def plant(store: Store, key: str, data: bytes = b"") -> None:
    """As another tool does: straight into the folder or bucket. A key that ends in `/` is a marker of a folder."""
    if isinstance(store, S3Store):
        store._requests.client.put_object(Bucket=store.bucket, Key=store.prefix + key, Body=data)
        return
    assert isinstance(store, FolderStore)
    path = store.root / key
    (path if key.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if not key.endswith("/"):
        path.write_bytes(data)


def test_what_other_tools_leave_in_a_store_is_passed_over_in_every_listing(store: Store) -> None:
    for key in ("p/a/b/c", "p/a/d"):
        store.create(key, b"ours")
    for folder in ("", "p/", "p/a/", "p/a/b/"):
        for name in LITTER:
            plant(store, folder + name, b"theirs")
    for marker in ("p/", "p/a/", "p/a/b/"):
        plant(store, marker)
    assert list(store.list("")) == list(store.list("p/a/")) == ["p/a/b/c", "p/a/d"]
    assert list(store.list("p/a/", after="p/a/b/c")) == ["p/a/d"]
    assert (list(store.children("")), list(store.children("p/")), list(store.children("p/a/"))) == (["p"], ["a"], ["b"])
    assert store.read("p/a/d").data == b"ours"
    store.discard("p/a/b/c")
    assert list(store.list("p/a/")) == ["p/a/d"]


@pytest.mark.s3
def test_a_marker_of_the_stores_own_prefix_is_no_object(s3: Any, tmp_path: Path) -> None:
    store = S3Store(s3.url(f"marked/{tmp_path.name}"), env=s3.env)
    plant(store, "")
    assert list(store.list("")) == [] and list(store.children("")) == []
    store.probe()


def test_nothing_that_osctl_writes_has_the_name_of_litter() -> None:
    keys = Keys("p")
    ours = [keys.intent("s", "0a", 1), keys.committed("s", "0a"), keys.lease, keys.revision(1), keys.event(1, 0)]
    ours += [keys.log("s", "0a", 1, 0, 0, 1.0), keys.journal("s", "0a", 1, 0, 0), keys.sample("s", "0a", 1, "00-a-box.mp4")]
    ours += [f"{keys.checkpoint('s', '0a', 1, 1)}/{name}" for name in ("model-00001-of-00002.safetensors", "CHECKPOINT.json")]
    ours += ["datasets/x.tmp/registered/000001.json", "weights/part/registered/000001.json"]
    assert not any(map(is_litter, ours))


@pytest.mark.parametrize("key", ["", "/a", "a//b", "a/", "../a", "a/../../b", ".", "a/./b", "a\0b", "a\nb", "a\\b", "x" * 300])
def test_hostile_keys_are_refused(store: Store, key: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for call in (store.read, store.size, lambda key: store.create(key, b"x"), lambda key: store.upload(key, file)):
        with pytest.raises(Refused):
            call(key)
    assert list(store.list("")) == []


def test_a_large_file_goes_up_and_comes_down_whole(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * PART_BYTES + 12345))
    store.upload("c/large", file)
    store.upload("c/large", file)  # again, the same: succeeds
    store.download("c/large", tmp_path / "new" / "got")
    assert (tmp_path / "new" / "got").read_bytes() == file.read_bytes()
    assert store.size("c/large") == 2 * PART_BYTES + 12345


@pytest.mark.parametrize("when", ["before", "after", "lost"])
def test_whatever_befalls_a_writer_at_any_effect_the_next_one_finishes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: When
) -> None:
    """Each effect in turn: parts of a file, its completion, a record, a removal."""
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 << 20)
    file = tmp_path / "large"
    file.write_bytes(os.urandom((5 << 20) + 10))

    def write(store: Store, folder: str) -> None:
        store.upload(f"{folder}/large", file)
        store.create(f"{folder}/record.json", b"one")
        store.create(f"{folder}/passing", b"two")
        store.discard(f"{folder}/passing")

    at, reached = 0, True
    while reached:
        at += 1
        fate = Fate(at, when)
        with watched_by(fate), contextlib.suppress(Crash, Unreachable):
            write(place.open(), f"{at}")
        store = place.open()
        write(store, f"{at}")
        assert list(store.list(f"{at}/")) == [f"{at}/large", f"{at}/record.json"]
        assert store.digest(f"{at}/large") == (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        assert store.read(f"{at}/record.json").data == b"one"
        reached = fate.reached
    assert at > (6 if isinstance(store, S3Store) else 3)


@pytest.mark.parametrize("size", [10, PART_BYTES + 10])
def test_upload_never_overwrites(store: Store, tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a" * size)
    store.upload("f", file)
    file.write_bytes(b"b" * size)
    with pytest.raises(StoreConflict):
        store.upload("f", file)
    assert store.read("f").data == b"a" * size


def test_download_replaces_a_file_only_when_it_is_whole(store: Store, tmp_path: Path) -> None:
    store.create("a", b"new")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotFound):
        store.download("b", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    store.download("a", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("size", [0, 10, PART_BYTES + 10])
def test_a_digest_is_of_what_lies_there_and_needs_no_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    store.upload("f", file)
    assert store.arrived == size
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    assert store.digest("f") == (size, hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(NotFound):
        store.digest("g")


def test_an_honest_store_passes_its_probe_and_shows_no_trace(store: Store) -> None:
    store.probe()
    store.probe()
    assert list(store.list("")) == [] and list(store.children("")) == []


# Races between real processes

RACER = """
import json, os, sys, time
from orchestrator.stores import open_store
from orchestrator.errors import StoreConflict
me, stores = sys.argv[1].encode(), {}
def create(store, key, etag): store.create(key, me)
def replace(store, key, etag): store.replace(key, me, etag)
def count(store, key, etag):
    while True:
        there = store.read(key)
        try: return store.replace(key, b"%d" % (int(there.data) + 1), there.etag)
        except StoreConflict: pass
print("ready", flush=True)
for line in sys.stdin:
    at, url, env, action, key, etag = json.loads(line)
    os.environ.update(env)
    store = stores.setdefault(url, open_store(url))
    while time.time() < at: pass
    try: globals()[action](store, key, etag); print("won", flush=True)
    except StoreConflict: print("lost", flush=True)
"""


class Racers:
    """Four processes that do the same thing at the same moment."""

    def __init__(self) -> None:
        self.processes = [
            subprocess.Popen([sys.executable, "-c", RACER, f"racer {number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for number in range(4)
        ]
        assert self._answers() == ["ready"] * 4

    def run(self, place: Place, action: str, key: str, etag: str = "") -> list[str]:
        """What each of them said: `won` or `lost`."""
        line = json.dumps([time.time() + 0.01, place.url, place.env, action, key, etag]) + "\n"
        for process in self.processes:
            assert process.stdin
            process.stdin.write(line)
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[str]:
        return [process.stdout.readline().strip() for process in self.processes if process.stdout]

    def close(self) -> None:
        for process in self.processes:
            process.communicate()


@pytest.fixture(scope="module")
def racers() -> Iterator[Racers]:
    started = Racers()
    yield started
    started.close()


@pytest.mark.long
def test_of_racing_creators_exactly_one_wins(place: Place, racers: Racers) -> None:
    store = place.open()
    for number in range(30):
        answers = racers.run(place, "create", f"race/{number}")
        assert sorted(answers) == ["lost", "lost", "lost", "won"]
        assert store.read(f"race/{number}").data == f"racer {answers.index('won')}".encode()


@pytest.mark.long
def test_of_racing_replacers_exactly_one_wins(place: Place, racers: Racers) -> None:
    store = place.open()
    etag = store.create("race", b"nobody")
    for _ in range(30):
        answers = racers.run(place, "replace", "race", etag)
        assert sorted(answers) == ["lost", "lost", "lost", "won"]
        assert store.read("race").data == f"racer {answers.index('won')}".encode()
        etag = store.replace("race", b"nobody", store.read("race").etag)


def test_no_increment_of_a_shared_counter_is_lost(place: Place, racers: Racers) -> None:
    store = place.open()
    store.create("counter", b"0")
    for _ in range(15):
        assert racers.run(place, "count", "counter") == ["won"] * 4
    assert store.read("counter").data == b"60"


# Folders


def test_a_writer_that_slept_through_many_generations_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ABA: the generation after the one it has read was linked and cleared away, so its link succeeds; it must notice."""
    awake, sleeper = FolderStore(tmp_path), FolderStore(tmp_path)
    etag = awake.create("lease", b"0")
    for number in range(1, 4):
        etag = awake.replace("lease", b"%d" % number, etag)
    link = sleeper._link

    def link_late(temporary: Path, path: Path) -> bool:
        current = etag
        for number in range(4, 4 + 2 * KEPT):
            current = awake.replace("lease", b"%d" % number, current)
        return link(temporary, path)

    monkeypatch.setattr(sleeper, "_link", link_late)
    with pytest.raises(StoreConflict):
        sleeper.replace("lease", b"stale", etag)
    assert awake.read("lease").data == b"%d" % (3 + 2 * KEPT)


def test_old_generations_are_cleared_away(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    etag = store.create("lease", b"0")
    for number in range(100):
        etag = store.replace("lease", b"%d" % number, etag)
    assert len(list(tmp_path.glob("lease*"))) <= KEPT + 2


def test_a_writer_killed_before_its_link_leaves_nothing_to_see(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from orchestrator.stores.folder import FolderStore; store = FolderStore(sys.argv[1])\n"
        "store._link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nstore.create('a/b', b'x')"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    store = FolderStore(tmp_path)
    assert list(store.list("")) == [] and store.children("") == []
    store.create("a/b", b"y")
    assert store.read("a/b").data == b"y"


def test_symbolic_links_do_not_lead_out_of_the_store(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s")
    store = FolderStore(tmp_path / "store")
    store.create("a", b"x")
    (tmp_path / "store" / "folder").symlink_to(outside)
    (tmp_path / "store" / "file").symlink_to(outside / "secret")
    for key in ("folder/secret", "file"):
        with pytest.raises(Refused):
            store.read(key)
        with pytest.raises(Refused):
            store.create(key, b"mine")
    with pytest.raises(Refused):
        store.create("folder/new", b"mine")
    (tmp_path / "store" / "deep").mkdir()
    (tmp_path / "store" / "deep" / "folder").symlink_to(outside)
    for key in ("deep/folder/new", "deep/folder/more/new"):
        with pytest.raises(Refused):
            store.create(key, b"mine")
    assert list(store.list("")) == ["a"]
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    (tmp_path / "store" / "inside").symlink_to(tmp_path / "store" / "deep")
    store.create("inside/b", b"y")
    assert store.read("deep/b").data == b"y"


def test_names_that_the_folder_store_uses_itself_are_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for key in ("lease@3", ".tmp/x"):
        with pytest.raises(Refused):
            store.create(key, b"x")
    store.create("stage1@123456789012/x", b"x")  # a folder may look so: an inputs digest can be all decimal
    assert list(store.list("")) == ["stage1@123456789012/x"]


def test_a_folder_that_is_a_store_keeps_what_is_not_the_stores(tmp_path: Path) -> None:
    """Somebody's own `.tmp` lies in it: only what killed writers of ours have left goes."""
    ours = [f"12-{'0' * 32}", f"probe-{'a' * 32}"]
    (tmp_path / ".tmp" / "folder").mkdir(parents=True)
    for name in (*ours, "notes.txt", "12-backup", f"12-{'0' * 32}.txt"):
        (tmp_path / ".tmp" / name).write_bytes(b"x")
    (tmp_path / ".tmp" / f"34-{'0' * 32}").symlink_to(tmp_path / ".tmp" / "notes.txt")
    for path in (tmp_path / ".tmp").iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    FolderStore(tmp_path).probe()
    assert {path.name for path in (tmp_path / ".tmp").iterdir()} == {
        "folder", "notes.txt", "12-backup", f"12-{'0' * 32}.txt", f"34-{'0' * 32}",
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(Unreachable, match="store /proc/osctl: cannot write a: No such file"):  # where even root cannot make a folder
        FolderStore(Path("/proc/osctl")).create("a", b"x")


def test_a_full_disk_is_unreachable_and_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from orchestrator.stores.folder import FolderStore; store = FolderStore(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: store.create('a', b'x' * 2000)\nexcept Exception as error: print(type(error).__name__)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True).stdout == "Unreachable\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# URLs


def test_urls_name_their_kind_of_store(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).url == open_store(tmp_path.as_uri()).url == str(tmp_path.resolve())
    assert open_store("s3://bucket/some/prefix/").url == "s3://bucket/some/prefix"


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "s3://UPPER/x", "s3://b", "file://host/x", "file://"])
def test_unknown_urls_are_an_error_of_use(url: str) -> None:
    with pytest.raises(UsageError):
        open_store(url)


def test_a_folder_store_needs_no_boto3(tmp_path: Path) -> None:
    code = "import sys; from orchestrator.stores import open_store; open_store(sys.argv[1]).probe(); print('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True).stdout == "False\n"


# S3 with faults on the way


class Faulty:
    def __init__(self, server: Any, start_proxy: Callable[[str], Any], prefix: str):
        self.server, self.prefix = server, prefix
        self.proxy = start_proxy(server.endpoint)
        env = {**server.env, "OSCTL_S3_ENDPOINT": self.proxy.endpoint}
        self.waits: list[float] = []
        self.store = S3Store(server.url(prefix), env=env, patience_s=20, pause=self.waits.append)
        self.plain = S3Store(server.url(prefix), env=server.env)

    def harm(self, method: str, *harms: Any) -> None:
        self.proxy.harm.extend((method, harm) for harm in harms)

    def hasty(self, patience_s: float) -> S3Store:
        """Behind the same proxy, with so little patience, and with pauses that pass."""
        return S3Store(
            self.server.url(self.prefix), env={**self.server.env, "OSCTL_S3_ENDPOINT": self.proxy.endpoint}, patience_s=patience_s
        )


@pytest.fixture
def faulty(s3: Any, start_proxy: Callable[[str], Any], tmp_path: Path) -> Faulty:
    return Faulty(s3, start_proxy, f"faulty/{tmp_path.name}")


@pytest.mark.s3
def test_a_create_whose_answer_was_lost_succeeds(faulty: Faulty) -> None:
    faulty.harm("PUT", "lose")
    faulty.store.create("a", b"mine")
    assert faulty.plain.read("a").data == b"mine"
    assert [method for method, _ in faulty.proxy.seen] == ["PUT", "PUT", "GET"]


@pytest.mark.s3
def test_a_replace_whose_answer_was_lost_succeeds(faulty: Faulty) -> None:
    etag = faulty.plain.create("a", b"one")
    faulty.harm("PUT", "lose")
    etag = faulty.store.replace("a", b"two", etag)
    assert (faulty.plain.read("a").data, faulty.plain.read("a").etag) == (b"two", etag)


@pytest.mark.s3
def test_a_lost_answer_to_someone_elses_object_is_a_conflict(faulty: Faulty) -> None:
    etag = faulty.plain.create("a", b"theirs")
    faulty.harm("PUT", "lose", "lose")
    with pytest.raises(StoreConflict):
        faulty.store.create("a", b"mine")
    faulty.plain.replace("a", b"theirs again", etag)
    with pytest.raises(StoreConflict):
        faulty.store.replace("a", b"mine", etag)


@pytest.mark.s3
def test_a_multipart_upload_whose_last_answer_was_lost_succeeds(faulty: Faulty, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(PART_BYTES + 10))
    faulty.harm("POST", "pass", "lose")
    faulty.store.upload("a", file)
    assert faulty.plain.read("a").data == file.read_bytes()
    assert [path for method, path in faulty.proxy.seen if method == "POST" and "uploads" in path] != []


@pytest.mark.s3
@pytest.mark.parametrize("same", [True, False])
def test_a_multipart_upload_never_overwrites_what_came_before_its_end(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    store, other = (S3Store(s3.url(f"parts/{tmp_path.name}"), env=s3.env) for _ in range(2))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(os.urandom(PART_BYTES + 10))
    theirs.write_bytes(ours.read_bytes() if same else b"theirs")
    send = store._send_parts

    def send_and_lose(*arguments: Any) -> Any:
        parts = send(*arguments)
        other.upload("a", theirs)
        return parts

    monkeypatch.setattr(store, "_send_parts", send_and_lose)
    if same:
        store.upload("a", ours)
    else:
        with pytest.raises(StoreConflict):
            store.upload("a", ours)
    assert other.read("a").data == theirs.read_bytes()
    assert not store._requests.client.list_multipart_uploads(Bucket=s3.bucket, Prefix=store.prefix).get("Uploads")


@pytest.mark.s3
@pytest.mark.parametrize("status", [409, 500, 503])
def test_a_burst_of_server_errors_is_waited_out(faulty: Faulty, status: int) -> None:
    faulty.harm("PUT", *[status] * 4)
    faulty.store.create("a", b"x")
    assert len(faulty.waits) == 4 and faulty.waits[0] < faulty.waits[3]
    faulty.harm("GET", *[status] * 4)
    assert faulty.store.read("a").data == b"x"


@pytest.mark.s3
def test_a_multipart_upload_that_meets_a_conflict_begins_again(faulty: Faulty, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(PART_BYTES + 10))
    faulty.harm("POST", "pass", 409)
    faulty.store.upload("a", file)
    assert faulty.plain.read("a").data == file.read_bytes()
    assert sum(method == "POST" and path.endswith("?uploads") for method, path in faulty.proxy.seen) == 2


def is_completion(method: str, path: str) -> bool:
    return method == "POST" and "uploadId=" in path


@pytest.mark.s3
def test_patience_begins_at_a_failure_and_not_at_the_start_of_an_upload(faulty: Faulty, tmp_path: Path) -> None:
    """Each part takes longer than the patience, and the completion is refused once: no part is sent again."""
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * PART_BYTES + 10))
    refusals = [503]

    def slow(method: str, path: str, _: Mapping[str, str]) -> Any:
        if method == "PUT":
            time.sleep(0.5)
        return refusals.pop() if is_completion(method, path) and refusals else "pass"

    faulty.proxy.decide = slow
    faulty.hasty(0.3).upload("a", file)
    assert faulty.plain.digest("a") == (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    assert (faulty.proxy.parts(), faulty.proxy.uploads()) == (3, 1)


@pytest.mark.s3
def test_parts_that_arrived_stay_for_the_next_call(faulty: Faulty, tmp_path: Path) -> None:
    """The second part, then the completion, are refused for longer than the patience; the next call goes on with the same upload."""
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * PART_BYTES + 10))
    store, wrong = faulty.hasty(0.2), "partNumber=2"
    faulty.proxy.decide = lambda method, path, _: 503 if wrong and wrong in path and method in ("PUT", "POST") else "pass"
    arrived = []
    for wrong in ("partNumber=2", "uploadId="):
        with pytest.raises(Unreachable, match="503 SlowDown"):
            store.upload("a", file)
        arrived.append(store.arrived)
        if wrong == "partNumber=2":
            refused = sum("partNumber=2" in path for _, path in faulty.proxy.seen) - 1
            faulty.proxy.decide = lambda method, path, _: 503 if is_completion(method, path) else "pass"
    faulty.proxy.decide = lambda method, path, _: "pass"
    store.upload("a", file)
    assert faulty.plain.read("a").data == file.read_bytes()
    assert (faulty.proxy.parts() - refused - 1, faulty.proxy.uploads()) == (3, 1)
    assert arrived == [PART_BYTES + 10, 2 * PART_BYTES + 10] and store.arrived == 2 * PART_BYTES + 10


@pytest.mark.s3
def test_an_upload_that_the_store_has_lost_begins_again(faulty: Faulty, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(PART_BYTES + 10))
    faulty.proxy.decide = lambda method, path, _: 503 if is_completion(method, path) else "pass"
    store = faulty.hasty(0.1)
    with pytest.raises(Unreachable):
        store.upload("a", file)
    (left,) = uploads_of(faulty.plain)
    faulty.plain._requests.client.abort_multipart_upload(Bucket=faulty.plain.bucket, Key=left["Key"], UploadId=left["UploadId"])
    faulty.proxy.decide = lambda method, path, _: "pass"
    store.upload("a", file)
    assert faulty.plain.read("a").data == file.read_bytes() and faulty.proxy.uploads() == 2
    assert store.arrived == PART_BYTES + 10, "what is sent again is no progress"
    assert uploads_of(faulty.plain) == []


def uploads_of(store: S3Store) -> list[dict[str, Any]]:
    """Multipart uploads that are not finished."""
    return list(store._requests.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads", ()))


@pytest.mark.s3
@pytest.mark.parametrize("action", ["download", "digest", "read"])
def test_a_transfer_that_is_cut_goes_on_where_it_stopped(faulty: Faulty, action: str, tmp_path: Path) -> None:
    """Cut again and again, for longer than the patience in all: each answer but the first begins where the one before ended."""
    data = os.urandom(3 << 20)
    faulty.plain.create("a", data)

    def cut(method: str, _path: str, headers: Mapping[str, str]) -> Any:
        time.sleep(0.1)
        first = int(headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        return "cut" if len(data) - first > (1 << 20) else "pass"

    faulty.proxy.decide = cut
    store = faulty.hasty(0.25)
    if action == "download":
        store.download("a", tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == data and len(list(tmp_path.iterdir())) == 1
    else:
        assert store.digest("a") == (len(data), hashlib.sha256(data).hexdigest()) if action == "digest" else store.read("a").data == data
    asked = [headers.get("range") for method, _, headers in faulty.proxy.came if method == "GET"]
    assert asked[0] is None and None not in asked[1:] and asked == sorted(asked, key=lambda one: int((one or "=0-")[6:-1] or 0))
    assert all("if-match" in headers for _, _, headers in faulty.proxy.came[1:])


@pytest.mark.s3
def test_an_object_that_changed_while_its_download_was_cut_is_fetched_whole(faulty: Faulty, tmp_path: Path) -> None:
    old, new = os.urandom(1 << 20), os.urandom(1 << 20)
    etag = faulty.plain.create("a", old)

    def cut_and_change(method: str, _path: str, headers: Mapping[str, str]) -> Any:
        if faulty.proxy.came[1:]:
            return "pass"
        faulty.proxy.decide = lambda *_: "pass"
        return "cut"

    faulty.proxy.decide = cut_and_change
    taken = faulty.store._requests._pause
    faulty.store._requests._pause = lambda seconds: (faulty.plain.replace("a", new, etag), taken(seconds))[1]
    faulty.store.download("a", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == new


@pytest.mark.s3
def test_a_download_may_be_given_more_patience_than_the_store(faulty: Faulty, tmp_path: Path) -> None:
    faulty.plain.create("a", b"x" * 1000)
    down_until = time.monotonic() + 0.6
    faulty.proxy.decide = lambda *_: 503 if time.monotonic() < down_until else "pass"
    store = faulty.hasty(0.1)
    with pytest.raises(Unreachable):
        store.download("a", tmp_path / "got")
    store.download("a", tmp_path / "got", patience_s=10)
    assert (tmp_path / "got").read_bytes() == b"x" * 1000


@pytest.mark.s3
@pytest.mark.parametrize("harm", ["cut", "shorten", "flip", "lose"])
def test_a_body_damaged_on_its_way_is_fetched_again(faulty: Faulty, harm: str, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    faulty.plain.create("a", data)
    faulty.harm("GET", harm)
    assert faulty.store.read("a").data == data
    faulty.harm("GET", harm)
    faulty.store.download("a", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == data
    assert len(faulty.proxy.seen) == 4


@pytest.mark.s3
def test_more_keys_than_one_page_are_all_listed(s3: Any, tmp_path: Path) -> None:
    store = S3Store(s3.url(f"pages/{tmp_path.name}"), env=s3.env)
    folder = s3.root / s3.bucket / store.prefix / "many"
    folder.mkdir(parents=True)
    for number in range(1100):
        (folder / f"{number:04d}").touch()
    assert list(store.list("many/")) == [f"many/{number:04d}" for number in range(1100)]
    assert list(store.list("many/", after="many/0999")) == [f"many/{number:04d}" for number in range(1000, 1100)]


@pytest.mark.s3
def test_what_the_store_really_holds_is_handed_over_even_if_it_is_damaged(s3: Any, faulty: Faulty) -> None:
    """The ledger says what is wrong with it, so it has to get it."""
    faulty.plain.create("a", b"good")
    path = s3.root / s3.bucket / faulty.plain.prefix / "a"
    path.write_bytes(b"evil")
    assert faulty.plain.read("a").data == b"evil"


@pytest.mark.s3
def test_a_user_without_rights_is_refused_at_once_and_nothing_secret_is_said(s3: Any) -> None:
    waits: list[float] = []
    store = S3Store(s3.url("x"), env=s3.stranger, pause=waits.append)
    with pytest.raises(Refused) as refusal:
        store.create("a", b"x")
    text = str(refusal.value)
    assert s3.bucket in text and s3.endpoint in text and "s3:PutObject" in text and "AccessDenied" in text
    assert waits == []
    assert not any(secret in text for secret in (s3.stranger["AWS_ACCESS_KEY_ID"], s3.stranger["AWS_SECRET_ACCESS_KEY"]))


@pytest.mark.s3
def test_a_wrong_secret_and_a_missing_bucket_are_refused(s3: Any) -> None:
    with pytest.raises(Refused, match="the secret key is not the one of this access key"):
        S3Store(s3.url("x"), env={**s3.env, "AWS_SECRET_ACCESS_KEY": "wrong"}).probe()
    with pytest.raises(Refused, match="there is no bucket nowhere"):
        S3Store("s3://nowhere/x", env=s3.env).probe()


def test_a_closed_port_is_unreachable_within_the_patience() -> None:
    env = {"OSCTL_S3_ENDPOINT": "http://user:hidden@127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    with pytest.raises(Unreachable) as failure:
        S3Store("s3://bucket/x", env=env, patience_s=0.5, pause=pause).read("a")
    assert sum(waits) <= 0.5
    assert "s3://bucket/x at http://127.0.0.1:1: cannot read a" in str(failure.value)
    assert "hidden" not in str(failure.value)


@pytest.mark.s3
def test_a_store_that_overwrites_in_spite_of_conditions_is_refused(s3: Any, start_proxy: Callable[[str], Any]) -> None:
    """A stand-in for servers that ignore the headers: it takes them out of the request."""
    proxy = start_proxy(s3.endpoint)
    store = S3Store(s3.url("probe"), env={**s3.env, "OSCTL_S3_ENDPOINT": proxy.endpoint})

    def forget(params: dict[str, Any], **_: Any) -> None:
        params.pop("IfNoneMatch", None)
        params.pop("IfMatch", None)

    store._requests.client.meta.events.register("provide-client-params.s3.PutObject", forget)
    with pytest.raises(Refused, match="If-None-Match"):
        store.probe()


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("prefix", ["left", ""])
def test_uploads_left_behind_by_killed_processes_are_aborted_once_they_are_old_and_nobody_elses(
    start_s3: Callable[..., Any], start_proxy: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    server = start_s3()
    proxy = start_proxy(server.endpoint)
    store = S3Store(server.url(prefix), env={**server.env, "OSCTL_S3_ENDPOINT": proxy.endpoint})
    inside = f"{prefix}/" if prefix else ""
    checkpoint = "demo/stages/stage1@0123456789ab/checkpoints/step-00000010-a1"
    ours = [f"{inside}{checkpoint}/model-0000{number}-of-00007.safetensors" for number in range(7)]
    ours.append(f"{inside}demo/stages/stage1@0123456789ab/attempts/1/samples/clip.mp4")
    ours += [f"{inside}weights/{'a1' * 32}/files/model.safetensors", f"{inside}datasets/{'b2' * 32}/manifest.jsonl.gz"]
    foreign = [
        f"{inside}large", f"{inside}backups/stages/notes.tar", f"{inside}demo/stages/stage1@0123456789ab/COMMITTED.json.bak",
        f"{inside}weights/llama.safetensors", f"{inside}datasets/photos/2024.zip", f"elsewhere/{checkpoint}/model.safetensors",
        f"lefty/{checkpoint}/model.safetensors",
    ]  # fmt: skip
    for key in [*ours, *foreign]:
        store._requests.client.create_multipart_upload(Bucket=server.bucket, Key=key)

    def left() -> list[str]:
        return sorted(upload["Key"] for upload in store._requests.client.list_multipart_uploads(Bucket=server.bucket)["Uploads"])

    monkeypatch.setattr("orchestrator.stores.s3.PAGE", 3)
    store.probe()
    assert left() == sorted([*ours, *foreign])
    monkeypatch.setattr("orchestrator.stores.s3.STALE", timedelta(seconds=-1))
    store.probe()
    assert left() == sorted(foreign)
    assert [path for _, path in proxy.seen if "upload-id-marker=" in path and "key-marker=" in path]


@pytest.mark.s3
def test_a_server_with_its_own_certificate_authority_is_trusted_by_name(start_s3: Callable[..., Any], tmp_path: Path) -> None:
    cert, key = _certificate(tmp_path)
    server = start_s3(cert=cert, key=key)
    url = server.url("tls")
    S3Store(url, env={**server.env, "OSCTL_S3_CA": str(cert)}).probe()
    S3Store(url, env={**server.env, "AWS_CA_BUNDLE": str(cert)}).probe()
    with pytest.raises(Unreachable, match="OSCTL_S3_CA"):
        S3Store(url, env=server.env).probe()


def _certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", *options, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key
