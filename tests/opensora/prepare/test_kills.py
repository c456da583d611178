"""Law: whoever is killed, and whenever, the next run comes to the data set of a run that nobody killed, and `out` is never half there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from proofs import Proof

SCRIPT = Path(__file__).parents[2] / "killed_preparers.py"


def trials(folder: Path, seed: int, count: int, kind: str, patience_s: int) -> int:
    """Deaths in so many trials, of which all held."""
    command = [sys.executable, str(SCRIPT), str(folder), str(seed), str(count), kind]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(json.loads(done.stdout)["kills"])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["calls", "moments"])
def test_a_killed_run_that_is_begun_again_comes_to_the_same_data_set(tmp_path: Path, kind: str) -> None:
    assert trials(tmp_path, 0, 2, kind, 280) >= 1


@pytest.mark.prove("prepare-kills")
@pytest.mark.parametrize("kind", ["calls", "moments"])
def test_many_killed_runs_that_are_begun_again_come_to_the_same_data_set(tmp_path: Path, kind: str, proof: Proof) -> None:
    kills = trials(tmp_path, 1 + proof.seed, 30, kind, 2400)
    proof.count(30, f"{kind}: {kills} deaths")


def on_ray(folder: Path, *words: object, patience_s: int) -> Counter[str]:
    """Deaths by who died, and before what."""
    command = [sys.executable, str(SCRIPT.with_name("killed_on_ray.py")), str(folder), *map(str, words)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Counter(json.loads(done.stdout)["deaths"])


@pytest.mark.long
def test_a_run_on_ray_outlives_a_guard_and_a_worker_and_is_finished_inline_after_its_own_death(tmp_path: Path) -> None:
    assert on_ray(tmp_path, 0, 1, "guard", "worker", "engine", patience_s=280).total() == 3


@pytest.mark.prove("ray-kills")
def test_each_of_many_deaths_on_ray_leaves_a_run_that_comes_to_the_data_set_of_inline(tmp_path: Path, proof: Proof) -> None:
    """The engine, the process that drives Ray, a raylet, a worker and a guard, six times each."""
    deaths = on_ray(tmp_path, 1 + proof.seed, 30, patience_s=6000)
    assert deaths.total() == 30
    proof.count(30, ", ".join(f"{died}: {times}" for died, times in sorted(deaths.items())))
