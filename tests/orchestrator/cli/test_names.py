"""Laws of pipelines that are called by their name in a store: the store is the truth, and no recipe is needed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from live_attempts import STAND_IN
from tiny_recipe import Osctl, write

LOOKS = ["status", "watch", "logs", "events", "cost", "compare", "lineage", "cancel"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a store of two pipelines that were launched elsewhere, and whose recipes are gone."""
    folder = tmp_path_factory.mktemp("names")
    changes = {"steps": 20, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    trainer = [sys.executable, STAND_IN, "{run_dir}", "{devices}"]
    recipe = Osctl(write(folder / "recipe", stages=2, devices=1, changes=changes, trainer=trainer))
    for name in ("speedy", "spread"):
        recipe("launch", "-q", "--set", f"name={name}", "--store", str(folder / "store"), *(["stage1"] if name == "spread" else []))
    shutil.rmtree(folder / "recipe")
    return folder


@pytest.fixture
def osctl(made: Path, tmp_path: Path) -> Osctl:
    shutil.copytree(made / "store", tmp_path / "store", symlinks=True)
    return Osctl(tmp_path, env={"OSCTL_STORE": "store"})


@pytest.mark.long
@pytest.mark.parametrize("command", LOOKS)
def test_a_name_is_enough_to_look(osctl: Osctl, command: str) -> None:
    by_name = osctl(command, "speedy")
    assert by_name.stdout or by_name.stderr
    assert "demo" not in by_name.stdout + by_name.stderr
    assert osctl(command, "speedy", "--store", str(osctl.folder / "store")).stdout == by_name.stdout or command == "events"


@pytest.mark.long
@pytest.mark.parametrize("command", ["status", "compare", "plan", "diff", "export out"])
def test_so_is_the_option_for_files_where_no_file_has_that_name(osctl: Osctl, command: str) -> None:
    first = command.split()
    done = osctl(*first, "-f", "speedy", expect=1 if "export" in command else 0)  # a stand-in trains no model that could be exported
    assert "no such file" not in done.stderr


def test_a_recipe_of_that_name_comes_before_the_store(osctl: Osctl) -> None:
    write(osctl.folder / "speedy", stages=1, name="another")
    assert osctl("status", "-f", "speedy").stderr.startswith("another: pending")
    assert osctl("status", "speedy").stderr.startswith("speedy: succeeded")


def test_a_word_alone_is_a_stage_of_the_pipeline_at_hand_or_a_pipeline(osctl: Osctl) -> None:
    assert osctl("logs", "spread").stdout == osctl("logs", "spread", "stage1").stdout
    assert "stage2" in str(osctl.json("lineage", "speedy", "stage2"))
    write(osctl.folder, stages=2, name="spread")
    assert osctl("logs", "stage1").stdout == osctl("logs", "spread", "stage1").stdout
    assert "nothing is committed" in osctl("lineage", "stage2", expect=4).stderr
    assert "stage9" in osctl("logs", "spread", "stage9", expect=2).stderr
    assert "spread has no such stage; it has stage1" in osctl("lineage", "spread", "stage9", expect=2).stderr


@pytest.mark.parametrize("command", [*LOOKS, "resume", "sync"])
def test_a_name_that_is_not_there_says_what_is_near(osctl: Osctl, command: str) -> None:
    said = osctl(command, "sprad", expect=2).stderr
    assert "'spread'" in said and "osctl list" in said and str(osctl.folder / "store") in said and len(said.splitlines()) == 1


@pytest.mark.long
def test_what_was_launched_is_resumed_by_its_name_and_changed_by_set(osctl: Osctl) -> None:
    assert "succeeded" in osctl("resume", "spread", "-q").stderr
    assert "begins anew" in osctl("resume", "spread", "--set", "stage2.optimizer.lr=0.5", "-q").stderr
    assert "name" in osctl("resume", "spread", "--set", "name=other", expect=2).stderr
    assert "stage9" in osctl("resume", "spread", "--stage", "stage9", expect=2).stderr
    refused = osctl("launch", "-f", "spread", expect=2).stderr
    assert "osctl resume spread" in refused
    assert {path.name for path in osctl.folder.iterdir()} <= {"store", ".osctl"}
    assert not (osctl.folder / ".osctl" / "store").exists()


def test_the_shell_completes_the_names(osctl: Osctl) -> None:
    def offered(line: str) -> set[str]:
        words = {"_OSCTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()))}
        return set(Osctl(osctl.folder, env={**os.environ, "OSCTL_STORE": "store", **words})().stdout.split())

    assert offered("osctl status ") == {"speedy", "spread"}
    assert offered("osctl logs ") >= {"speedy", "spread", "stage1"}
