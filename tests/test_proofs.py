"""Laws of the sum of trials that `scripts/prove` shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import proofs
import pytest

BODY = """
import pytest

@pytest.mark.prove("made-up")
def test_made_up(proof):
    proof.count(30, f"seed {proof.seed}")
    assert not FAILS
"""


def piece(folder: Path, *, fails: bool = False) -> str:
    (folder / "test_law.py").write_text(BODY.replace("FAILS", str(fails)))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  prove(law): x\n")
    env = os.environ | {"OSCTL_PROOFS": str(folder / "proofs"), "PYTHONPATH": str(proofs.REPOSITORY / "tests")}
    command = [sys.executable, "-m", "pytest", "-p", "proofs", "-p", "no:cacheprovider", "-m", "prove", "--law", "made-up", "test_law.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.long
def test_pieces_of_the_same_code_add_up_each_with_a_seed_of_its_own(tmp_path: Path) -> None:
    piece(tmp_path)
    said = piece(tmp_path)
    (line,) = [line for line in said.splitlines() if line.startswith("made-up")]
    assert line.split()[1:3] == ["60", "0"] and line.split()[-1] == "2"
    (record,) = (tmp_path / "proofs").glob("*.jsonl")
    assert record.stem == proofs.code_digest()
    assert [json.loads(line)["notes"] for line in record.read_text().splitlines()] == [["seed 0"], ["seed 1"]]


@pytest.mark.long
def test_a_test_that_fails_is_a_failure_of_its_law(tmp_path: Path) -> None:
    (line,) = [line for line in piece(tmp_path, fails=True).splitlines() if line.startswith("made-up")]
    assert line.split()[1:3] == ["30", "1"]


def test_the_bound_is_the_textbooks() -> None:
    assert proofs.upper_bound(0, 50) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert proofs.upper_bound(0, 299) < 0.01 < proofs.upper_bound(0, 298)  # the rule of three, exactly
    assert proofs.upper_bound(3, 3) == 1.0
