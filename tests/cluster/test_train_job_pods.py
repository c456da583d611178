"""A stage that trains as a TrainJob in two real pods, is evicted, cancelled and resumed, and ends with the weights of an undisturbed one.

Every trouble by itself, on both kinds of jobs: test_pod_kills.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster.pipelines import ended, installed, step_of, until
from cluster.test_pod_kills import LONG, attempts, launched, unbroken
from conftest import Cluster

pytestmark = [pytest.mark.cluster("pods"), pytest.mark.timeout(600)]
__all__ = ["unbroken"]


def test_evicted_cancelled_and_resumed_no_bit_is_different(
    cluster: Cluster,
    unbroken: dict[str, str],
    tmp_path: Path,
) -> None:
    with installed(cluster, tmp_path, mlflow=False, operator="trainjob") as site:
        osctl = launched(site, tmp_path / "disturbed")
        site.evict(site.pods("disturbed")[1])
        first = until("its end", lambda: (found := attempts(osctl.json("status")))[1:] and found[0], 200)
        assert first["state"] == "preempted" and first["step"] < LONG["steps"]
        assert [pod["metadata"]["labels"]["osctl/attempt"] for pod in site.pods("disturbed")] == ["2", "2"]
        until("the second goes further", lambda: step_of(osctl) > first["step"] + 40, 200)
        osctl("cancel")
        status = ended(osctl)
        assert (status["state"], attempts(status)[1]["state"]) == ("cancelled", "drained")
        assert not site.pods("disturbed"), "no device is held by what was cancelled"
        osctl("resume", "--wait", timeout=300)
        assert osctl.digests() == unbroken
        assert "step " in osctl("logs", "stage1", "--rank", "0").stdout
        assert site.json("get", "pytorchjobs")["items"] == []
        lost = [stage["device_seconds"]["lost"] for stage in osctl.json("cost") if stage["name"] == "stage1"]
    assert lost == [pytest.approx(0, abs=0.05)], "no step was done twice; the books round to 50 ms a device"
