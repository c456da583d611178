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


def test_plan_says_what_fits(osctl: Osctl) -> None:
    plan = json.loads(osctl("plan", "-f", "open-sora-1.0", "-o", "json").stdout)
    assert plan["stages"][0]["memory"] is None, "nothing is computed"
    needs = plan["stages"][1]["memory"]
    assert needs["fits"] is True and needs["policy"] == "none"
    assert needs["total_bytes"] < needs["device_bytes"] == 80 * 2**30
    refused = osctl("plan", "-f", "open-sora-1.0", "--set", "stage2.activations.recompute=none", "--set", "stage2.batch_size=64")
    assert "stage2" in refused.stdout and "no" in refused.stdout.split()


@pytest.mark.long
def test_plan_of_a_size(osctl: Osctl) -> None:
    plan = json.loads(osctl("plan", "--shape", "1440x1088x1920", "--devices", "8", "-o", "json").stdout)
    assert plan["clip_tokens"] == 11_750_400
    assert plan["chosen"] == "full offload, MLP in 16"
    assert next(one for one in plan["options"] if one["policy"] == plan["chosen"])["fits"] is True
    shown = osctl("plan", "--shape", "64x512x512", "--devices", "1")
    assert "full" in shown.stdout and "not measured" in shown.stderr
    assert "is not frames x height x width" in osctl("plan", "--shape", "64x512", expect=2).stderr


def test_plan_takes_measured_steps(osctl: Osctl, tmp_path: Path) -> None:
    stage = json.loads(osctl("plan", "-f", "open-sora-1.0", "-o", "json").stdout)["stages"][1]
    flops = stage["flops"] / stage["steps"] / stage["devices"]  # of one device's step
    model = {"depth": 28, "width": 1152, "heads": 16}
    point = {"model": model, "out_channels": 8, "frames": 16, "tokens": 256, "captions": 120, "batch": 8, "dtype": "bf16"}
    point |= {"step_s": flops / 4e14, "tflops": 400.0, "mfu": 0.404}
    content = {"schema": 1, "device": "h800", "machine": "a node", "date": "2026-11-23", "command": "bench/gpu.py", "points": [point]}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    planned = json.loads(osctl("plan", "-f", "open-sora-1.0", "--calibration", str(file), "-o", "json").stdout)["stages"][1]
    assert planned["basis"] == "calibrated" and planned["mfu"] == pytest.approx(400 / 989.5, rel=0.01)
    file.write_text(json.dumps(content | {"points": []}))
    assert "points" in osctl("plan", "--calibration", str(file), expect=2).stderr


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


@pytest.mark.parametrize(
    ("folder", "name"), [("mine", "mine"), ("Mein Modell 2", "mein-modell-2"), ("7 hours", "hours"), ("日本", "demo"), (".", "demo")]
)
def test_a_new_recipe_is_called_as_its_folder(tmp_path: Path, folder: str, name: str) -> None:
    Osctl(tmp_path)("init", folder)
    assert f"\nname: {name}\n" in (tmp_path / folder / "osctl.yaml").read_text()


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


@pytest.mark.long
def test_every_command_shows_an_example(osctl: Osctl) -> None:
    listing = osctl("--help").stdout.split("Commands:")[1]
    names = [line.split()[0] for line in listing.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert len(names) == 28
    groups = {
        "data": ("register", "add", "list", "show", "remove"),
        "weights": ("add", "list"),
        "prepare": ("run", "plan", "status", "report", "why"),
    }
    commands = [(name, *rest) for name in names for rest in ([(each,) for each in groups[name]] if name in groups else [()])]
    for command in commands:
        assert "Example" in osctl(*command, "--help").stdout, command


def test_completion_knows_the_stages(osctl: Osctl) -> None:
    script = {"_OSCTL_COMPLETE": "complete_bash", "COMP_WORDS": "osctl launch sta", "COMP_CWORD": "2"}
    offered = Osctl(osctl.folder, env=script)().stdout.split()
    assert offered == ["stage1", "stage2", "stage3"]
