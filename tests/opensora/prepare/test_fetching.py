"""Laws of fetching: nobody waits for a network, nothing is fetched twice, and nothing that nobody opens is fetched on another machine."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opensora.dataset.prepare_config import Download
from opensora.dataset.rows import Fetched, Leaves, Quarantine, Source
from opensora.errors import DiskFull
from opensora.prepare.fetching import THREADS, Fetch, Fetching
from opensora.prepare.kept import Kept
from opensora.prepare.pool import Later


class Host:
    """Of addresses http://host/NAME: the content is the name."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def fetch(self, source: Source, folder: Path, _settings: Download, _halt: Callable[[], bool], _most: int) -> Fetched:
        name = source.uri.rpartition("/")[2]
        self.asked.append(name)
        if name == "refused":
            raise Quarantine("refused by the host", "403")
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(name)
        return Fetched(source, str(folder / name), hashlib.sha256(name.encode()).hexdigest(), len(name))


FetchingOf = Callable[..., Fetching]


@pytest.fixture
def fetching(tmp_path: Path) -> Iterator[FetchingOf]:
    """As each run has it."""
    (tmp_path / "temporary").mkdir()
    with contextlib.ExitStack() as at_the_end:

        def one(fetch: Fetch, needed: Callable[[Source, Fetched], bool] = lambda source, fetched: True) -> Fetching:
            kept = Kept(tmp_path / "kept", tmp_path / "temporary", "download", "0", Fetched)
            at_the_end.callback(kept.leave)
            return Fetching(fetch, tmp_path / "sources", Download(), kept, lambda: False, needed=needed)

        yield one


def sources(*names: str) -> Iterator[Source]:
    return (Source(f"http://host/{name}", name) for name in names)


def ready(found: Iterator[tuple[int, Source, Fetched | Leaves] | Later]) -> dict[str, Fetched | Leaves]:
    return {one[1].name: one[2] for one in found if not isinstance(one, Later)}


def test_each_source_comes_out_once_whatever_happened_to_it(fetching: FetchingOf) -> None:
    host = Host()
    found = ready(fetching(host.fetch).all(sources("a", "refused", "b")))
    assert {name: type(one) for name, one in found.items()} == {"a": Fetched, "refused": Quarantine, "b": Fetched}
    host.asked.clear()
    again = ready(fetching(host.fetch).all(sources("a", "refused", "b", "c")))
    assert sorted(host.asked) == ["c", "refused"]
    assert again["a"] == found["a"]


def test_who_waits_is_told_later_and_is_never_kept(fetching: FetchingOf) -> None:
    go = threading.Event()
    host = Host()

    def slow(source: Source, folder: Path, settings: Download, halt: Callable[[], bool], most: int) -> Fetched:
        if source.name == "slow":
            go.wait(30)
        return host.fetch(source, folder, settings, halt, most)

    found = fetching(slow).all(sources("slow", *map(str, range(2 * THREADS))))
    names = []
    for one in found:
        if isinstance(one, Later):
            if len(names) == 2 * THREADS:
                go.set()
            continue
        names.append(one[1].name)
    assert names[-1] == "slow"


def test_what_is_known_of_an_address_is_not_fetched_for_nobody(tmp_path: Path, fetching: FetchingOf) -> None:
    """As on another machine, that has the results and not the files."""
    host = Host()
    ready(fetching(host.fetch).all(sources("a", "b")))
    shutil.rmtree(tmp_path / "sources")
    host.asked.clear()
    found = ready(fetching(host.fetch, lambda source, _: source.name == "b").all(sources("a", "b")))
    assert host.asked == ["b"]
    assert set(found) == {"a", "b"}


def test_a_source_that_is_brought_later_has_its_content_or_says_so(fetching: FetchingOf) -> None:
    host = Host()
    one = fetching(host.fetch)
    right = hashlib.sha256(b"a").hexdigest()
    wanted = [(right, Source("http://host/a", "a")), ("f" * 64, Source("http://host/b", "b"))]
    found = dict(ended for ended in one.bring(wanted) if not isinstance(ended, Later))
    assert isinstance(found[0], Fetched)
    other = found[1]
    assert isinstance(other, Quarantine)
    assert other.reason == "source has changed"


def test_a_local_file_is_looked_at_again_when_its_date_or_size_changes(tmp_path: Path, fetching: FetchingOf) -> None:
    file = tmp_path / "a.mp4"
    asked = []

    def fetch(source: Source, _folder: Path, _settings: Download, _halt: Callable[[], bool], _most: int) -> Fetched:
        asked.append(source.name)
        data = file.read_bytes()
        return Fetched(source, source.uri, hashlib.sha256(data).hexdigest(), len(data))

    for content, calls in (("one", 1), ("one", 1), ("three", 2)):
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        found = ready(fetching(fetch).all(iter([Source(str(file), "a")])))
        assert len(asked) == calls
        assert isinstance(found["a"], Fetched)
        assert found["a"].size == len(content)
    file.unlink()
    gone = ready(fetching(fetch).all(iter([Source(str(file), "a")])))["a"]
    assert isinstance(gone, Quarantine)
    assert gone.reason == "cannot be read (No such file or directory)"


def test_a_full_disk_stops_everything(fetching: FetchingOf) -> None:
    def full(_source: Source, _folder: Path, _settings: Download, _halt: Callable[[], bool], _most: int) -> Fetched:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull, match="Make room"):
        list(fetching(full).all(sources("a")))
