"""Laws of a preparation whose launcher is killed at any effect: run again, it comes to the same data set, and nothing is there twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from effect_fates import Crash, Fate, When
from prepare_bench import Bench
from proofs import Proof

from orchestrator.effects import watched_by
from orchestrator.errors import Unreachable
from orchestrator.inputs import datasets
from orchestrator.ledger.store import Ledger
from orchestrator.prepare import attempts
from orchestrator.prepare.records import Keys
from orchestrator.stores.folder import FolderStore

KEYS = Keys("mine")
FATES: Sequence[When] = ("before", "after", "lost")
BEYOND = 25
"""A preparation of three videos has more effects than this."""


@pytest.fixture
def fresh(tmp_path: Path, videos: Path) -> Callable[[str], Bench]:
    def make(name: str) -> Bench:
        (tmp_path / name).mkdir()
        return Bench(tmp_path / name, FolderStore(tmp_path / name / "store"), videos)

    return make


def survives(bench: Bench, at: int, when: When, digest: str) -> bool:
    """Whether a launcher that meets this fate has so many effects. Checks what the next one comes to; on another machine at every third."""
    fate = Fate(at, when)
    with watched_by(fate):
        try:
            bench.run()
        except (Crash, Unreachable):
            assert fate.reached
    bench.clock.ahead_s += 60  # the lease of this very process would otherwise be seen alive
    again = bench.run(run_dir="elsewhere" if at % 3 == 0 else "run")
    assert again.published is not None and again.published.description.digest == digest, (at, when)
    one = datasets.of_name(bench.store, "mine")
    assert len(one) == 1 and one[0].source == again.published.place and one[0].rows == 6, (at, when)
    assert len(bench.store.children("datasets/mine/prepared/")) == 1, (at, when)
    found = attempts.all_of(bench.store, KEYS)
    assert [each.number for each in found] == list(range(1, len(found) + 1)) and len(found) <= 2
    assert all(each.outcome is not None for each in found), (at, when)
    kinds = [event.kind for event in Ledger(bench.store, KEYS.folder).events()]
    assert kinds.count("committed") == 1, (at, when, kinds)
    return fate.reached


def unbroken(bench: Bench) -> str:
    published = bench.run().published
    assert published is not None
    return published.description.digest


@pytest.mark.parametrize("at", [1, 4, 6, 13, 27])
def test_whatever_befalls_a_launcher_the_next_run_comes_to_the_same_data_set(fresh: Callable[[str], Bench], at: int) -> None:
    digest = unbroken(fresh("whole"))
    assert survives(fresh("broken"), at, FATES[at % 3], digest)


@pytest.mark.prove("effects-of-a-preparation")
@pytest.mark.parametrize("when", FATES)
def test_each_effect_of_a_preparation_with_each_fate(fresh: Callable[[str], Bench], when: When, proof: Proof) -> None:
    digest, at = unbroken(fresh("whole")), 1
    while survives(fresh(f"{when}-{at}"), at, when, digest):
        at += 1
    assert at > BEYOND
    proof.count(at - 1, note=f"launcher of a preparation, {when}")
