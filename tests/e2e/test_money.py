"""One bill: `osctl cost`, `status`, `compare`, MLflow and the budget agree to the cent, each built as `main` builds it.

Real commands and processes, and a real MLflow server that is asked over REST; no price list is handed to anybody.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import tiny_recipe
import yaml
from one_bill import agree, cents
from tiny_recipe import Osctl
from written_ledger import Writer, pipeline

from orchestrator.ledger.store import Ledger
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.files import shipped_folder
from orchestrator.recipe.prices import load_prices, price_of
from orchestrator.stores import open_store
from orchestrator.tracking import ui as mlflow_ui

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

STAND_IN = str(Path(__file__).parents[1] / "stand_in_trainer.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("mlflow")
    with (home / "server.log").open("ab") as log:
        started = mlflow_ui.start(f"sqlite:///{home}/mlflow.db", home / "artifacts", 0, log)
        try:
            started.wait_until_up(300)
            yield started.url
        finally:
            started.stop()


def price_list(path: Path, usd: str) -> Path:
    content = yaml.safe_load((shipped_folder() / "prices.yaml").read_text())
    for device in content["devices"].values():
        device |= {"usd_per_hour": usd, "source": f"a list of ${usd}"}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_price_list_that_changes_between_two_attempts_changes_no_old_bill(tmp_path: Path, server: str) -> None:
    """A device-second costs $1 for the first attempt, $2 for the second, and nothing by the list that is there when the bill is read."""
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}", "--step-ms", "20"]
    folder = tiny_recipe.write(
        tmp_path / "recipe",
        stages=1,
        changes={"steps": 300, "checkpoint": {"every_steps": 30}},
        trainer=trainer,
        tracking=server,
        name="two",
    )
    prices = tmp_path / "prices.yaml"
    osctl = Osctl(folder, {"OSCTL_PRICES": str(price_list(prices, "3600"))})
    launch = osctl.start("launch", "--quiet")
    end = time.monotonic() + 120
    while not osctl.json("status")["stages"][0]["step"]:
        assert launch.poll() is None and time.monotonic() < end, (folder / "launch.log").read_text()
    osctl("cancel")
    assert launch.wait(120) == 130, (folder / "launch.log").read_text()
    price_list(prices, "7200")
    spent = agree(osctl, server, "two")
    refused = osctl("launch", "--quiet", "--set", "budget_usd=1", expect=4)
    said = re.search(r"\$([\d,.]+) are spent", refused.stderr)
    assert said is not None and cents(said[1].replace(",", "")) == cents(spent), refused.stderr
    osctl("launch", "--quiet")
    price_list(prices, "0")
    total = agree(osctl, server, "two")
    first, second = osctl.json("cost", "--by-attempt")
    assert cents(first["usd"]) == cents(spent) == cents(first["held_s"]) and cents(second["usd"]) == cents(2 * second["held_s"])
    assert total > spent > 0
    table = osctl("cost", "--verify").stderr
    assert "$3600 a device-hour (a list of $3600" in table and "$7200 a device-hour" in table and "added up anew" in table


def test_a_profile_with_its_own_price_is_the_price_everywhere(tmp_path: Path, server: str) -> None:
    """64 H800 for an hour at the $1.10 of their cluster are $70.40; the list says $2.43, which would be $155.52. Half of the attempts are
    of a release that wrote no price down."""
    store = tmp_path / "store"
    story = Writer(Ledger(open_store(str(store)), "own"), pipeline("own", steps=30, devices=64))
    image = "registry.example/osctl@sha256:" + "0" * 64
    profile = ClusterProfile.model_validate(
        {
            "name": "ours", "image": image, "driver_image": image, "device": "h800", "cpu": "8", "memory": "128Gi",
            "price": {"usd_per_hour": "1.10", "source": "our contract", "date": "2026-01-01"},
        }
    )  # fmt: skip
    story.pipeline = story.pipeline.model_copy(update={"backend": "kubernetes", "cluster": profile, "store": str(store)})
    story.step_s = 1797.5 / 15  # with 2.5 s of preparation, half an hour for 15 steps
    story.launch()
    first = story.begin("stage1")
    story.train(first, 15)
    story.publish(first, 15)
    story.close(first, "lost")
    story.price = price_of(load_prices().at(profile), "h800")
    second = story.begin("stage1", resume=15)
    story.train(second, 30)
    manifest = story.publish(second, 30)
    story.close(second, "completed")
    story.commit(second, manifest)
    story.end()
    (tmp_path / "recipe").mkdir()
    osctl = Osctl(tiny_recipe.write(tmp_path / "recipe", name="own"), {"KUBECONFIG": str(tmp_path / "none")})
    osctl("sync", "--tracking", server, "--store", str(store))
    total = agree(osctl, server, "own", "--store", str(store))
    assert cents(total) == Decimal("70.40")
    assert cents(total / Decimal("1.10") * Decimal("2.43")) == Decimal("155.52")


def test_books_that_do_not_balance_are_printed_with_a_remark(tmp_path: Path) -> None:
    store = tmp_path / "store"
    story = Writer(Ledger(open_store(str(store)), "gap"), pipeline("gap"))
    story.launch()
    intent = story.begin("stage1")
    story.train(intent, 30)
    story.close(intent, "lost")
    Path(story.ledger.store.url, story.ledger.keys.journal("stage1", intent.inputs_digest, 1, 0, 2)).unlink()
    osctl = Osctl(tiny_recipe.write(tmp_path / "recipe", name="gap"))
    done = osctl("cost", "--store", str(store), "-o", "json")
    (row, *_) = json.loads(done.stdout)
    assert row["difference_s"] == pytest.approx(8 * 10 * story.pace(intent.config))
    remark = f"remark: stage1 attempt 1: {row['held_s']:.3f} device-seconds were held, {row['held_s'] - row['difference_s']:.3f} are booked"
    assert remark in done.stderr
    assert Decimal(row["usd"]) > 0 and remark in osctl("cost", "--store", str(store), "--verify").stderr
