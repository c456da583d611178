"""Law: whoever is killed, and whenever, the next run comes to the data set of a run that nobody killed, and `out` is never half there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.mark.prove("ray-kills")
def test_many_killed_runs_on_ray_come_to_the_data_set_that_inline_goes_on_to(tmp_path: Path, proof: Proof) -> None:
    """After each death the run goes on inline: engines share what is kept."""
    kills = trials(tmp_path, 1 + proof.seed, 30, "ray", 6000)
    proof.count(30, f"{kills} deaths")
