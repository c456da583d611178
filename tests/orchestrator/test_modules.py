"""Whose modules our processes import, in folders that hold others of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_recipe

from orchestrator import modules

NAMES = ("random", "queue", "torch", "yaml", "av", "typer", "mlflow", "sitecustomize", "usercustomize")


def shadowed(folder: Path) -> Path:
    """A folder as people have them: scripts that are called like modules, and another project's package of our name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('shadowed: {name}')\n")
    for name in modules.PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('shadowed: {name}')\n")
    return folder


def child(folder: Path, base: Mapping[str, str]) -> str:
    """Where a child of ours, started in a folder, finds modules, and where a child of that one does."""
    code = "import random, yaml, opensora.config, subprocess, sys; print(opensora.config.__file__); assert not sys.argv[1:] or not "
    code += "subprocess.call([sys.executable, '-c', sys.argv[1]])"
    (folder / "ours").mkdir(exist_ok=True)
    (folder / "ours" / "probe_of_modules.py").write_text(code)
    variables = modules.environment(base)
    variables["PYTHONPATH"] = os.pathsep.join([variables.get("PYTHONPATH", str(modules.ROOT)), str(folder / "ours")])
    command = modules.command("probe_of_modules", "import random, yaml, opensora.config; print(opensora.config.__file__)")
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "entries", ["", "{root}", "{root}:", ":{root}", ".", "{root}:.", "sub/../.", "{root}::{elsewhere}", "{folder}:{root}"]
)
def test_children_and_their_children_import_what_osctl_was_installed_with(tmp_path: Path, entries: str) -> None:
    folder = shadowed(tmp_path / "mine")
    path = entries.format(root=modules.ROOT, elsewhere=tmp_path, folder=folder)
    base = {**os.environ, "PYTHONPATH": path}
    assert child(folder, base).splitlines() == [str(modules.ROOT / "opensora/config.py")] * 2


def test_places_that_mean_the_same_everywhere_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opensora").mkdir()
    (tmp_path / "opensora" / "__init__.py").touch()
    (tmp_path / "site-packages/orchestrator/configs").mkdir(parents=True)  # where an installed osctl keeps its recipes
    given = {"PYTHONPATH": f":/opt/tools:lib:{tmp_path}:{modules.ROOT}:{tmp_path}/site-packages:"}
    assert modules.without_working_folder(given) == {"PYTHONPATH": f"/opt/tools:{modules.ROOT}:{tmp_path}/site-packages"}
    assert modules.without_working_folder({"PYTHONPATH": ":", "HOME": "/x"}) == {"HOME": "/x"}
    assert modules.without_working_folder({"HOME": "/x"}) == {"HOME": "/x"}


def test_what_we_were_imported_from_stays_though_it_was_named_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(modules.ROOT)
    assert modules.without_working_folder({"PYTHONPATH": ".:lib"}) == {"PYTHONPATH": str(modules.ROOT)}


def test_osctl_itself_looks_where_its_children_look(tmp_path: Path) -> None:
    folder = shadowed(tmp_path / "mine")
    (folder / "sitecustomize.py").unlink()  # Python imports them before any word of ours is read
    (folder / "usercustomize.py").unlink()
    osctl = tiny_recipe.Osctl(folder, {**os.environ, "PYTHONPATH": f"{modules.ROOT}:"}, warm=False)
    osctl("plan", "-f", "demo")
    for name in ("orchestrator", "random"):  # with an empty entry first, these are gone before ours are found
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / f"{name}.py").unlink()
    osctl = tiny_recipe.Osctl(folder, {**os.environ, "PYTHONPATH": f":{modules.ROOT}"}, warm=False)
    osctl("plan", "-f", "demo")


@pytest.mark.long
@pytest.mark.parametrize("all_commands", [False, pytest.param(True, marks=pytest.mark.prove("modules"))])
def test_a_pipeline_runs_in_a_folder_of_scripts_that_are_called_like_modules(tmp_path: Path, all_commands: bool) -> None:
    folder = shadowed(tiny_recipe.write(tmp_path / "mine", stages=1, devices=1, changes={"steps": 2, "checkpoint": {"every_steps": 2}}))
    osctl = tiny_recipe.Osctl(folder, {**os.environ, "PYTHONPATH": f"{modules.ROOT}"}, warm=False)
    osctl("launch", "-q")
    osctl("sample", "a digit 3 moving left", "--out", "x.mp4")
    osctl("sync", "--tracking", "sqlite")
    assert (folder / "x.mp4").exists()
    if all_commands:  # started by the same function as `sample`
        osctl("encode", "stage1")
        osctl("export", "model")
        assert (folder / "model/model_index.json").exists()


def test_a_trainer_that_a_person_names_finds_what_lies_beside_its_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "train.py").write_text("import beside\n")
    variables = modules.without_working_folder({**os.environ, "PYTHONPATH": ":"})
    subprocess.run([sys.executable, str(tmp_path / "train.py")], env=variables, check=True)
