"""Commands that need no run: what they print, in which format, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_recipe import Osctl, write


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe"))


def test_plan_puts_the_published_run_beside_its_own(osctl: Osctl) -> None:
    plan = json.loads(osctl("plan", "-f", "open-sora-1.0", "--mfu", "0.45", "-o", "json").stdout)
    hours = {row["name"]: row["published_gpu_hours"] for row in plan["stages"]}
    assert hours == {"stage1": 0, "stage2": 2808, "stage3a": 1080, "stage3b": 840}
    assert plan["total"]["gpu_hours"] == pytest.approx(685, abs=2), "1,098 EF of stages 2 and 3 at 45% of 989.5 TFLOP/s"
    shown = osctl("plan", "-f", "open-sora-1.0").stdout
    assert "2,808" in shown and "$11,500.00" in shown and "64 x h800" in shown


@pytest.mark.parametrize("format", ["json", "yaml"])
def test_results_are_read_by_machines(osctl: Osctl, format: str) -> None:
    read = {"json": json.loads, "yaml": yaml.safe_load}[format]
    assert [row["name"] for row in read(osctl("plan", "-o", format).stdout)["stages"]] == ["stage1", "stage2", "stage3"]
    assert read(osctl("explain", "stage.optimizer", "-o", format).stdout)[0]["name"] == "stage.optimizer.lr"


def test_init_writes_a_recipe_that_plans_and_overwrites_nothing(tmp_path: Path) -> None:
    osctl = Osctl(tmp_path)
    osctl("init", "mine", "--from", "open-sora-1.0")
    assert (tmp_path / "mine/osctl.yaml").exists() and (tmp_path / "mine/stage3b.yaml").exists()
    ours, theirs = (osctl("plan", "-f", name, "-o", "json").stdout for name in ("mine", "open-sora-1.0"))
    assert ours == theirs
    assert "is there already" in osctl("init", "mine", expect=2).stderr


def test_dry_run_changes_nothing(osctl: Osctl) -> None:
    shown = osctl("launch", "--dry-run").stdout
    assert "stage3" in shown and "cost" in shown
    assert not (osctl.folder / ".osctl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "--set", "stage2.stepz=3"), ("stepz", "steps")),
        (("plan", "--set", "stage2.steps=-1"), ("steps", "-1", "at least 0")),
        (("plan", "--set", "stage2.steps=many"), ("steps", "many")),
        (("plan", "--set", "nonsense"), ("nonsense", "KEY=VALUE")),
        (("plan", "-f", "nowhere"), ("nowhere", "demo")),
        (("launch", "stage9"), ("stage9", "stage1, stage2, stage3")),
        (("explain", "stage.optimiser"), ("optimiser", "optimizer")),
        (("list", "--store", "ftp://x"), ("ftp://x",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_line_and_exit_2(osctl: Osctl, arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    refused = osctl(*arguments, expect=2)
    assert refused.stdout == "" and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert all(word in refused.stderr for word in said), refused.stderr
    assert not (osctl.folder / ".osctl").exists()


def test_a_mistake_in_a_file_names_file_and_line(osctl: Osctl) -> None:
    path = osctl.folder / "stage2.yaml"
    path.write_text(path.read_text().replace("batch_size: 4", "batch_size: none"))
    refused = osctl("plan", expect=2).stderr
    assert "stage2.yaml:" in refused and "batch_size" in refused and "none" in refused


def test_a_budget_is_kept(osctl: Osctl) -> None:
    refused = osctl("launch", "--set", "budget_usd=0.0000001", expect=4).stderr
    assert "budget" in refused and not list(osctl.folder.rglob("intent.json"))


def test_without_a_cluster_nothing_is_done(osctl: Osctl) -> None:
    lost = Osctl(osctl.folder, env={"KUBECONFIG": str(osctl.folder / "nowhere"), "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})
    refused = lost("launch", "-f", "open-sora-1.0", expect=2).stderr
    assert "KUBECONFIG" in refused and len(refused.splitlines()) == 1
    assert not (osctl.folder / ".osctl").exists()


def test_a_folder_is_no_store_for_pods(osctl: Osctl) -> None:
    refused = osctl("launch", "--cluster", "kind-cpu", "--set", "stage1.resources.device=auto", expect=2).stderr
    assert "no pod sees" in refused and "s3://" in refused and not (osctl.folder / ".osctl").exists()


@pytest.mark.parametrize("command", ["resume", "sample", "lineage"])
def test_before_a_launch_there_is_nothing_to_go_on_with(osctl: Osctl, command: str) -> None:
    refused = osctl(command, *(["a digit 3 moving left"] if command == "sample" else []), expect=4).stderr
    assert "osctl launch" in refused


def test_cancel_says_that_nobody_drives(osctl: Osctl) -> None:
    assert "nobody" in osctl("cancel").stderr


def test_schemas_are_for_editors(osctl: Osctl) -> None:
    schema = json.loads(osctl("explain", "--schema", "stage").stdout)
    assert schema["additionalProperties"] is False and "optimizer" in schema["properties"]


def test_every_command_shows_an_example(osctl: Osctl) -> None:
    listing = osctl("--help").stdout.split("Commands:")[1]
    names = [line.split()[0] for line in listing.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert len(names) == 22
    for name in names:
        assert "Example" in osctl(name, "--help").stdout, name


def test_completion_knows_the_stages(osctl: Osctl) -> None:
    script = {"_OSCTL_COMPLETE": "complete_bash", "COMP_WORDS": "osctl launch sta", "COMP_CWORD": "2"}
    offered = Osctl(osctl.folder, env=script)().stdout.split()
    assert offered == ["stage1", "stage2", "stage3"]
