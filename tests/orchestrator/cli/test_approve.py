"""Laws of a gate as people meet it: a launch ends at it with the command that opens it, and that command works as printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import Osctl, warm_trainer, write


@pytest.fixture
def gated(tmp_path: Path) -> Osctl:
    small = {"steps": 2, "prompts": [], "checkpoint": {"every_steps": 2}}
    return Osctl(write(tmp_path / "recipe", devices=1, stages=2, changes=small, trainer=warm_trainer(), spec={"gate": "approval"}))


def test_a_launch_stops_at_the_gate_and_goes_on_once_a_person_agrees(gated: Osctl) -> None:
    assert "nothing is committed to approve. Make it with: osctl launch stage1" in gated("approve", "stage1", expect=4).stderr
    stopped = gated("launch", expect=4).stderr
    assert "the gate of stage1 waits for a person's approval: osctl approve stage1 --note TEXT, then osctl launch" in stopped
    one, two = gated.json("status")["stages"]
    assert (one["state"], two["state"]) == ("committed", "blocked") and "osctl approve stage1" in two["why"]
    assert "waits for a person's approval" in gated("status").stdout
    gated("approve", "stage1", "--refuse", "--note", "too early")
    assert "refused by" in (refused := gated("launch", expect=4).stderr) and "too early" in refused
    assert "next: osctl resume" in gated("approve", "stage1", "--note", "digits look right").stderr
    gated("resume")
    rows = gated.json("lineage")
    assert [row["name"] for row in rows] == ["stage2", "stage1"]
    said = [remark for remark in rows[1]["remarks"] if remark.startswith("gate approval: ")]
    assert "refused by" in said[0] and said[1].endswith("digits look right")


def test_what_has_no_gate_cannot_be_approved(tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "recipe", stages=1))
    assert "it has no gate. Give it one in the pipeline file: gate: approval" in osctl("approve", "stage1", expect=2).stderr
    assert "no such stage" in osctl("approve", "stage9", expect=2).stderr
    wrong = Osctl(write(tmp_path / "wrong", stages=1, spec={"gate": "direction_accuracy"}))("plan", expect=2).stderr
    assert "gate" in wrong and "Write approval, direction_accuracy >= 0.5" in wrong
