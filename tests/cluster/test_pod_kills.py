"""One trouble at a time for a stage in real pods, of each kind of job: the long version, for `scripts/prove pod-kills`.

The suite sends one pipeline through a few of them in turn (test_pipelines.py), and one TrainJob through two (test_train_job_pods.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.pipelines import Site, ended, installed, kill, processes_of, shim_of, step_of, until
from conftest import Cluster
from tiny_recipe import Osctl, write

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(600), pytest.mark.prove("pod-kills")]

LONG: dict[str, Any] = {"steps": 500, "checkpoint": {"every_steps": 40}, "optimizer": {"lr": 1e-4}}
"""One stage that trains for some ten seconds."""


@pytest.fixture(scope="module", params=["pytorchjob", "trainjob"])
def site(request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with installed(cluster, tmp_path_factory.mktemp("site"), mlflow=False, operator=request.param) as site:
        yield site


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weight digests of the long stage on this machine: four processes, never disturbed."""
    osctl = Osctl(write(tmp_path_factory.mktemp("unbroken"), devices=4, stages=1, changes=LONG))
    osctl("launch", "-q")
    return osctl.digests()


def launched(site: Site, folder: Path) -> Osctl:
    """The long stage, training in two pods and with a checkpoint in the store."""
    osctl = site.osctl(folder, stages=1, changes=LONG)
    osctl("launch")
    until("it trains", lambda: step_of(osctl) >= 45, 120, 0.5)
    return osctl


def attempts(status: Any) -> list[Any]:
    return list(status["stages"][0]["attempts"])


def test_an_evicted_worker_costs_no_step_and_no_bit(site: Site, unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = launched(site, tmp_path / "evicted")
    site.evict(site.pods("evicted")[1])
    status = ended(osctl)
    first, second = attempts(status)
    assert (status["state"], first["state"], second["state"]) == ("succeeded", "preempted", "completed"), status
    assert first["step"] < LONG["steps"]
    started = next(event for event in osctl.json("events") if event["kind"] == "retry")
    assert f"from step {first['step']}," in started["detail"], "both pods saved, at the same step, and nothing is done again"
    assert osctl.digests() == unbroken
    assert [stage["device_seconds"]["lost"] for stage in osctl.json("cost") if stage["name"] == "stage1"] == [0]


@pytest.mark.parametrize("victim", ["rank", "shim", "agent"])
def test_what_is_killed_in_a_pod_is_begun_again_from_the_last_checkpoint(
    site: Site, unbroken: dict[str, str], tmp_path: Path, victim: str
) -> None:
    osctl = launched(site, tmp_path / f"killed-{victim}")
    pod = site.pods(f"killed-{victim}")[1]
    match victim:
        case "rank":
            kill(processes_of(pod, "opensora.train")[-1])
        case "agent":
            kill(processes_of(pod, "orchestrator.agent")[0])
        case "shim":
            kill(shim_of(pod))
    status = ended(osctl)
    assert status["state"] == "succeeded", status
    first, *_, last = attempts(status)
    assert first["state"] in {"rank": ("signal",), "agent": ("lost", "peer"), "shim": ("lost", "peer")}[victim]
    assert last["state"] == "completed"
    assert osctl.digests() == unbroken
    steps = [int(event["detail"].split("from step ")[1].split(",")[0]) for event in osctl.json("events") if event["kind"] == "retry"]
    assert steps and all(step >= 40 for step in steps), "no committed step is lost"


def test_a_driver_that_is_evicted_leaves_the_training_alone(site: Site, unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = launched(site, tmp_path / "driverless")
    (driver,) = site.pods("driverless", "driver")
    site.evict(driver)
    status = ended(osctl)
    assert status["state"] == "succeeded" and [one["state"] for one in attempts(status)] == ["completed"], (
        "one attempt, from beginning to end"
    )
    assert osctl.digests() == unbroken


def test_cancel_saves_and_resume_goes_on(site: Site, unbroken: dict[str, str], tmp_path: Path) -> None:
    osctl = launched(site, tmp_path / "cancelled")
    osctl("cancel")
    status = ended(osctl)
    assert status["state"] == "cancelled" and attempts(status)[0]["state"] == "drained", status
    assert not site.pods("cancelled"), "no device is held by what was cancelled"
    osctl("resume", "--wait", timeout=300)
    assert osctl.digests() == unbroken
