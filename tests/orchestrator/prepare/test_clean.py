"""What the last run did not use is removed on request, here and in the store, and nothing else is."""

from __future__ import annotations

import json

import pytest
from prepare_bench import Bench

from orchestrator.errors import Refused
from orchestrator.prepare.clean import discard, unused
from orchestrator.prepare.records import Keys

USED = {"download": "d" * 16, "probe": "a" * 16, "frames": "f" * 16, "clips": "c" * 16, "caption": "e" * 16, "scores": "5" * 16}


def last_run_used(bench: Bench, digests: dict[str, str]) -> None:
    path = bench.directory().path / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digests": digests}))


def left(bench: Bench) -> tuple[set[str], set[str]]:
    here = {path.relative_to(bench.directory().kept).as_posix() for path in bench.directory().kept.rglob("*") if path.is_file()}
    return here, {key.removeprefix(f"{Keys('mine').kept}/") for key in bench.store.list(f"{Keys('mine').kept}/")}


def test_results_of_other_settings_go_and_those_of_the_last_run_and_all_versions_stay(bench: Bench) -> None:
    bench.run("--packs")
    here, there = left(bench)
    last_run_used(bench, {**USED, "caption": "0" * 16})
    (bench.directory().kept / "matches" / ("5" * 16)).mkdir(parents=True)
    versions = {key: bench.store.read(key).data for key in bench.store.list("datasets/mine/prepared/")}
    found = unused(bench.store, "mine", bench.directory().path)
    assert list(found.objects) == [f"caption/{'e' * 16}"] and found.bytes_here > 0
    assert left(bench) == (here, there), "to look changes nothing"
    discard(bench.store, found)
    assert left(bench) == ({one for one in here if "caption/" not in one}, {one for one in there if "caption/" not in one})
    assert {key: bench.store.read(key).data for key in bench.store.list("datasets/mine/prepared/")} == versions
    assert (bench.directory().kept / "matches" / ("5" * 16)).is_dir(), "of the scores' settings"
    discard(bench.store, unused(bench.store, "mine", bench.directory().path))


def test_where_no_run_is_known_nothing_is_guessed(bench: Bench) -> None:
    bench.run()
    with pytest.raises(Refused, match=r"says which results its last run used. Run it once: osctl prepare run .*prepare\.yaml"):
        unused(bench.store, "mine", bench.directory().path)
