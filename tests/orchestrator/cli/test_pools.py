"""What people are shown of a stage that waited in one pool, went on in another, and ran on fewer nodes: by every command that looks."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from driver_rig import Clock, MemoryBackend, Rig, whole
from pools_rig import Counter, found, in_pools, profile, waiting

from orchestrator.accounting.history import History
from orchestrator.accounting.status import take_snapshot
from orchestrator.cli import display, main
from orchestrator.labels import Tag
from orchestrator.recipe import adapt, files
from orchestrator.recipe.prices import load_prices
from orchestrator.stores.folder import FolderStore
from orchestrator.tracking.client import open_tracker
from orchestrator.tracking.sync import Sync

OF = in_pools(resources={"nodes": 8, "min_nodes": 4, "shrink_after_minutes": 1})


@dataclass(frozen=True)
class Site:
    rig: Rig
    folder: Path

    def __call__(self, *words: str, store: bool = True) -> tuple[str, str]:
        """Stdout and stderr of `osctl`, asked about this store, or about files alone."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["osctl", *words, *(["--store", str(self.rig.store.root)] if store else [])])
            patch.chdir(self.folder)
            patch.setenv("KUBECONFIG", str(self.folder / "none"))
            patch.setenv("COLUMNS", "300")
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code in (0, None), err.getvalue()
        return out.getvalue(), err.getvalue()

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "-o", "json")[0])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Reserved nodes were full, so it went on with those on demand; one of these went away, so it went on with 4, and ended there."""
    folder = tmp_path_factory.mktemp("site")
    store, clock = FolderStore(folder / "store"), Clock()
    rig = Rig(store, clock, MemoryBackend(store, clock, folder / "work"), Counter({"on-demand": 7}))
    rig.backend.scripts["one", 1] = rig.backend.scripts["one", 2] = waiting()
    rig.backend.scripts["one", 3] = whole()
    assert rig.launch(OF).status == "succeeded"
    assert found(rig) == [("reserved", "moved", 8), ("on-demand", "moved", 8), ("on-demand", "completed", 4)]
    return Site(rig, folder)


def test_cost_by_attempt_names_the_pool_and_each_price_its_pool(site: Site) -> None:
    rows = site.json("cost", "demo", "--by-attempt")
    assert [(row["attempt"], row["pool"], row["held_s"] > 0) for row in rows] == [
        (1, "reserved", False), (2, "on-demand", False), (3, "on-demand", True),
    ]  # fmt: skip
    table, notes = site("cost", "demo", "--by-attempt")
    assert "pool" in table.splitlines()[0] and "on-demand" in table
    assert "cpu-core in pool on-demand: $2.50 a device-hour (the contract, 2026-11-01)" in notes
    assert "in pool reserved" not in notes, "nothing was paid there"


def test_compare_names_the_pools_that_were_paid(site: Site) -> None:
    (row,) = site.json("compare", "demo")
    assert row["pools"] == ["on-demand"], "nothing was held in the other"
    table, _ = site("compare", "demo")
    assert "pool" in table.splitlines()[0].split() and "on-demand" in table


def test_status_shows_where_each_attempt_was(site: Site) -> None:
    (stage,) = site.json("status", "demo")["stages"]
    shown = [(one["state"], one["pool"], one["nodes"], one["nodes_asked"]) for one in stage["attempts"]]
    assert shown == [("moved", "reserved", 8, 8), ("moved", "on-demand", 8, 8), ("completed", "on-demand", 4, 8)]
    table, _ = site("status", "demo")
    assert "moved in pool reserved: waited 2 min for nodes of pool reserved" in table


def test_a_running_attempt_is_shown_with_its_pool(site: Site) -> None:
    snapshot = take_snapshot(OF, History(site.rig.ledger), site.rig.clock.time)
    (stage,) = snapshot.stages
    *before, last = stage.attempts
    runs = replace(
        stage, state="running", committed=None, step=10, attempts=(*before, replace(last, state="running", reason="", ended=None))
    )
    assert display.describe(runs) == "attempt 3, running on 4 of 8 nodes in pool on-demand"


def test_lineage_says_which_steps_ran_where(site: Site) -> None:
    (row,) = site.json("lineage", "demo")
    assert "steps 1-40 on 4 of 8 nodes in pool on-demand (on-demand-region)" in row["remarks"]
    assert row["verdict"] == "present"


def test_events_tell_the_story(site: Site) -> None:
    out, _ = site("events", "demo")
    assert "moves on to pool on-demand: waited 2 min" in out
    assert "pool on-demand has 7 of 8 nodes" in out
    assert "from the start, in pool on-demand, on 4 of 8 nodes, after one: attempt 2 ended with moved" in out


def test_mlflow_shows_the_pool_and_a_moved_attempt_is_no_failure(site: Site, tmp_path: Path) -> None:
    tracker = open_tracker("sqlite", tmp_path)
    assert tracker is not None
    Sync(site.rig.ledger, tracker, load_prices).update()
    runs = {run.tags[Tag.RUN_KEY].rpartition("/")[2]: run for run in tracker.runs("demo", {Tag.PIPELINE: "demo"})}
    assert [runs[f"a{number}"].tags[Tag.POOL] for number in (1, 2, 3)] == ["reserved", "on-demand", "on-demand"]
    assert [runs[f"a{number}"].status for number in (1, 2, 3)] == ["KILLED", "KILLED", "FINISHED"]
    assert runs["a3"].tags[Tag.NODES_ASKED] == "8" and Tag.NODES_ASKED not in runs["a2"].tags
    assert runs["a3"].metrics["usd"] > 0 == runs["a1"].metrics["usd"]


def test_plan_shows_the_cost_in_the_first_pool_and_every_price(site: Site, tmp_path: Path) -> None:
    content = {
        **yaml.safe_load((files.shipped_folder() / "clusters/h800-64.yaml").read_text()),
        "pools": profile().model_dump(mode="json")["pools"],
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(content))
    words = ("plan", "-f", "open-sora-1.0", "--set", f"cluster={tmp_path / 'site.yaml'}", "--mfu", "0.4")
    out, err = site(*words, store=False)
    assert "pool" in out.splitlines()[0] and "reserved" in out
    assert "stage2: cost in pool reserved, range over all: reserved $1.00, on-demand $2.50, spot $0.70 a device-hour" in err
    row = json.loads(site(*words, "-o", "json", store=False)[0])["stages"][1]
    assert row["pool"] == "reserved" and [one["pool"] for one in row["pools"]] == ["reserved", "on-demand", "spot"]
    assert Decimal(row["usd_low"]) < Decimal(row["usd"]) < Decimal(row["usd_high"])


def test_render_is_of_the_first_pool(site: Site, tmp_path: Path) -> None:
    content = {
        **yaml.safe_load((files.shipped_folder() / "clusters/h800-64.yaml").read_text()),
        "pools": profile().model_dump(mode="json")["pools"],
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(content))
    words = ("render", "stage2", "-f", "open-sora-1.0", "--cluster", str(tmp_path / "site.yaml"))
    out, err = site(*words)
    assert "stage2: printed for pool reserved, the first of reserved, on-demand, spot" in err
    assert "pool: reserved" in out and "pool: spot" not in out


def test_a_launch_on_this_machine_says_that_pools_change_nothing() -> None:
    local = OF.model_copy(update={"backend": "local", "cluster": None})
    assert adapt.ignored(local) == ["one: min_nodes 4 counts in a cluster alone; on this machine it changes nothing"]
