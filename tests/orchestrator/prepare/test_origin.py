"""A lineage tells a version that was deleted on request from one that was lost."""

from __future__ import annotations

from prepare_bench import Bench

from orchestrator.inputs import datasets
from orchestrator.ledger.store import Ledger
from orchestrator.prepare.origin import origin
from orchestrator.prepare.records import DATASET, Keys
from orchestrator.prepare.remove import find, take_out


def test_a_version_that_was_lost_is_a_fault_and_one_deleted_on_request_is_none(bench: Bench) -> None:
    first = bench.run("--parquet")
    assert first.published is not None
    place, digest = first.published.place, datasets.of_name(bench.store, "mine")[-1].manifest
    found = origin(bench.store, place, digest, full=True)
    assert found is not None and len(found.sources) == 3 and not found.faults
    key = f"{place.removeprefix(f'{bench.store.url}/')}/{DATASET}"
    content = bench.store.read(key).data
    bench.store.discard(key)
    lost = origin(bench.store, place, digest)
    assert lost is not None and lost.faults == ((key, "is missing"),)
    bench.store.create(key, content)
    now = bench.clock.now()
    handle = Ledger(bench.store, Keys("mine").folder).acquire(now)
    take_out(bench.store, find(bench.store, "b.mp4", None), bench.directory().path, handle, now=now, holder="me@here")
    handle.release()
    deleted = origin(bench.store, place, digest)
    assert deleted is not None and not deleted.is_there and not deleted.faults
