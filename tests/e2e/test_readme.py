"""The main path as a user walks it, and every command that the README's table names, word by word, on what the first of them made: real
agent, plain torchrun with two gloo processes a stage, real store, real MLflow in sqlite.

`.ci/run` executes the two set-up commands, tests/cluster/test_interfaces.py those of the section on Kubernetes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import time
from decimal import Decimal
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import yaml
from doc_commands import commands_of
from tiny_recipe import OSCTL, STAGES, Osctl, warm_trainer, write

README = (Path(__file__).parents[2] / "README.md").read_text()
TABLE = README.split("## Commands")[1].split("\n## ")[0]
ON_KUBERNETES = README.split("## On Kubernetes")[1].split("\n## ")[0]
EVALUATE = {"evaluate": {"kind": "digits", "clips": 8, "frames": 4}}


def named(text: str) -> list[str]:
    return re.findall(r"`(osctl [^`]+)`", "\n".join(line for line in text.splitlines() if line.startswith("|")))


LAUNCH, SYNC, MLFLOW, UI = "osctl launch", "osctl sync", "osctl mlflow", "osctl ui"
SAMPLE, EXPORT = 'osctl sample "a digit 3 moving left" --out three.mp4', "osctl export --format diffusers DIR"
OWN = (LAUNCH, SYNC, MLFLOW, SAMPLE, EXPORT, UI)
"""Commands that have a test of their own, below or in test_ui.py."""
ELSEWHERE = {command for command in named(TABLE) if "s3://…" in command or "--cluster" in command}
ELSEWHERE |= set(commands_of("docs/own-clips.md", "tests/e2e/test_pages.py"))
"""Typed by test_data.py, which sends clips into a bucket, by test_pages.py, and by cluster/test_prepare_in_cluster.py."""
ELSEWHERE |= {command for command in named(TABLE) if command.startswith("osctl approve")}
"""Typed by cli/test_approve.py, whose recipe has a gate."""
SHOWN = commands_of("README.md", "tests/e2e/test_readme.py")
"""Above the table, with what they print."""
COMMANDS = [command for command in (*named(TABLE), *SHOWN) if command not in ELSEWHERE and command not in OWN]


def words(command: str, osctl: Osctl) -> list[str]:
    """A command of the README, with the home of this test."""
    assert command in (*named(TABLE), *SHOWN)
    return [word.replace("~", str(osctl.folder.parent / "home")) for word in shlex.split(command)[1:]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Osctl:
    """By `osctl launch`, as a person types it. Beside it lies a home with clips, videos and weights."""
    folder = tmp_path_factory.mktemp("readme")
    clips = folder / "home/clips"
    clips.mkdir(parents=True)
    (clips / "captions.csv").write_text("path,text\none.mp4,a grey square\n")
    with av.open(str(clips / "one.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * level, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    film(folder / "home/videos")
    (folder / "home/weights").mkdir()
    (folder / "home/weights/model.safetensors").write_bytes(b"of somebody")
    osctl = Osctl(write(folder / "recipe", tracking="sqlite", changes=EVALUATE), env={"HOME": str(folder / "home")}, warm=False)
    osctl(*words(LAUNCH, osctl))
    return osctl


def copied(osctl: Osctl, folder: Path) -> Osctl:
    """The launched pipeline, to be changed. What it trains from now on begins at once."""
    shutil.copytree(osctl.folder, folder, symlinks=True)
    recipe = folder / "osctl.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"trainer": warm_trainer()}))
    return Osctl(folder, osctl.env)


@pytest.fixture
def copy(launched: Osctl, tmp_path: Path) -> Osctl:
    return copied(launched, tmp_path / "copy")


@pytest.fixture(scope="module")
def desk(launched: Osctl) -> Osctl:
    """Where a person types one command after the other."""
    return copied(launched, launched.folder.parent / "desk")


def film(folder: Path) -> None:
    """A moving picture of one second, with a caption beside it."""
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    with av.open(str(folder / "one.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
        for number in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(picture, 2 * number, axis=1), format="rgb24")))
        out.mux(stream.encode())
    (folder / "one.txt").write_text("a carpet that moves")


def checkpoint(osctl: Osctl, stage: str) -> Path:
    """The committed checkpoint's folder in the store."""
    store = osctl.folder / ".osctl/store"
    (committed,) = store.glob(f"tiny/stages/{stage}@*/COMMITTED.json")
    return (store / json.loads(committed.read_text())["manifest"]).parent


def test_every_stage_is_committed_from_the_one_before(launched: Osctl) -> None:
    lines = launched.json("lineage")
    assert [line["name"] for line in lines] == ["stage3", "stage2", "stage1"]
    assert all(line["verdict"] == "present" for line in lines)
    assert launched("lineage", "--verify", "-o", "name").stdout.split() == ["stage3", "stage2", "stage1"]


def test_stages_stand_side_by_side_with_hours_and_cost(launched: Osctl) -> None:
    lines = launched.json("compare")
    assert [line["name"] for line in lines] == list(STAGES)
    for line in lines:
        assert line["loss"] > 0 and line["device_hours"] > 0 and float(line["usd"]) > 0
        assert line["gpu_hours"] == 0, "a CPU's hours are no GPU-hours"
        assert line["device_seconds"]["evaluate"] == 0 and Decimal(line["evaluation_usd"]) > 0, "off the gang, on a line of its own"
        assert line["evaluation"]["held_out_clips"] > 0
        assert line["evaluation"]["digit_chance"] == 0.1 and line["evaluation"]["direction_chance"] == 0.25
    assert "image_digit_accuracy" in lines[0]["evaluation"], "stage 1 is judged on images, and asked for video too"


def test_the_bill_sums_to_held_time(launched: Osctl) -> None:
    for line in launched.json("cost", "--by-attempt"):
        assert sum(line["device_seconds"].values()) == pytest.approx(line["held_s"], rel=1e-3, abs=0.1)
        assert line["device_seconds"]["step"] > 0 and line["device_seconds"]["init"] > 0


def test_launching_again_does_nothing_twice(launched: Osctl) -> None:
    before = sorted(path.relative_to(launched.folder) for path in (launched.folder / ".osctl/store").rglob("attempts/*/intent.json"))
    digests = launched.digests()
    launched(*words(LAUNCH, launched))
    assert (
        sorted(path.relative_to(launched.folder) for path in (launched.folder / ".osctl/store").rglob("attempts/*/intent.json")) == before
    )
    assert launched.digests() == digests and len(before) == 3


def test_status_and_list_say_what_is_there(launched: Osctl) -> None:
    status = launched.json("status")
    assert status["state"] == "succeeded" and [stage["state"] for stage in status["stages"]] == ["committed"] * 3
    assert [(row["name"], row["stages"]) for row in launched.json("list")] == [("tiny", "3/3")]


def test_logs_come_out_of_the_store(launched: Osctl) -> None:
    shown = launched("logs", "stage2").stdout
    assert "carried" in shown and "position tables (1x4x4 -> 4x4x4)" in shown and "8/8" in shown
    assert "no such stage" not in launched("logs", "nope", expect=2).stderr


def test_a_committed_stage_draws_a_video(launched: Osctl, tmp_path: Path) -> None:
    launched(*words(SAMPLE, launched))
    with av.open(str(launched.folder / "three.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 6
    beside = json.loads((launched.folder / "three.mp4.json").read_text())
    assert beside["prompt"] == "a digit 3 moving left" and beside["model"].startswith("tiny/stage3@") and len(beside["weights"]) == 64
    refused = launched("sample", "a zebra", "--out", str(tmp_path / "zebra.mp4"), expect=2)
    assert "zebra" in refused.stderr and not (tmp_path / "zebra.mp4").exists()


def test_an_earlier_checkpoint_draws_by_its_step(launched: Osctl, tmp_path: Path) -> None:
    out = tmp_path / "early.gif"
    for named in ("4", "step-00000004-a1"):
        launched("sample", "a digit 3 moving left", "--stage=stage2", "--checkpoint", named, "--out", str(out))
        beside = json.loads(out.with_name("early.gif.json").read_text())
        assert beside["model"].startswith("tiny/stage2@") and beside["step"] == 4
    launched("sample", "a digit 3 moving left", "--checkpoint=8", "--out", str(tmp_path / "last.gif"))
    assert json.loads((tmp_path / "last.gif.json").read_text())["model"].startswith("tiny/stage3@")
    refused = launched("sample", "a digit", "--stage=stage2", "--checkpoint=5", expect=4).stderr
    assert "stage2: the store has no checkpoint of step 5; it has those of the steps 4, 8" in refused


def test_a_file_of_prompts_becomes_a_folder_of_videos(launched: Osctl, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a digit 3 moving left\na digit 4 moving up\n")
    launched("sample", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "drawn"), "--sampler", "heun", "--steps", "2")
    assert [path.name for path in sorted((tmp_path / "drawn").glob("*.mp4"))] == [
        "0-a-digit-3-moving-left.mp4",
        "1-a-digit-4-moving-up.mp4",
    ]


def test_a_committed_stage_is_exported_once(launched: Osctl, tmp_path: Path) -> None:
    done = launched(*words(EXPORT, launched))
    target = launched.folder / "DIR"
    assert done.stdout == "DIR\n" and "/stage3@" in done.stderr and "(ema)" in done.stderr
    index = json.loads((target / "model_index.json").read_text())
    assert all((target / part).is_dir() for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler") if part in index)
    assert sum(isinstance(value, list) for value in index.values()) == 6
    assert "frames: 6" in (target / "stage.yaml").read_text()
    assert "nothing is written over" in launched("export", str(target), expect=2).stderr
    launched("export", str(tmp_path / "first"), "--stage", "stage1", "--weights", "model", "--dtype", "bf16")
    assert "frames: 1\n" in (tmp_path / "first" / "stage.yaml").read_text()


def test_the_launch_leaves_pictures(launched: Osctl) -> None:
    folder = launched.folder / ".osctl/samples/tiny/stage3"
    assert (folder / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in folder.glob("*.mp4")] == ["00-a-digit-3-moving-left.mp4"]


def test_sync_after_a_launch_doubles_nothing(launched: Osctl) -> None:
    def rows() -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(launched.folder / ".osctl/mlflow.db")) as database:
            count = "SELECT COUNT(*) FROM "
            return {table: database.execute(count + table).fetchone()[0] for table in ("runs", "metrics", "params", "model_versions")}

    before = rows()
    launched(*words(SYNC, launched))
    assert rows() == before
    assert before["runs"] == 1 + 3 + 3 and before["model_versions"] == 3


def test_stage_alone_finds_its_parent_in_the_ledger(copy: Osctl) -> None:
    copy("launch", "stage2", "--set", "stage2.steps=4")
    stages = {stage["name"]: stage for stage in copy.json("status")["stages"]}
    assert stages["stage2"]["state"] == "committed" and stages["stage2"]["steps"] == 4
    assert stages["stage3"]["state"] != "committed", "its parent is another one now"


def test_stage_alone_without_a_parent_is_refused(tmp_path: Path) -> None:
    osctl = Osctl(write(tmp_path / "fresh"))
    refused = osctl("launch", "stage2", expect=4)
    assert "osctl launch stage1" in refused.stderr
    assert not list(tmp_path.rglob("intent.json"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_with_older(folder: Path) -> None:
    """An older checkpoint of the same stage, whole, under the committed one's name."""
    (older,) = (path for path in folder.parent.iterdir() if path.name.startswith("step-00000004"))
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


AVERAGE = "ema-00001-of-00002.safetensors"
"""A file of weights: two ranks wrote them."""
DAMAGE = {
    "one flipped byte": lambda folder, osctl: flip(folder / AVERAGE),
    "a missing file": lambda folder, osctl: (folder / AVERAGE).unlink(),
    "a truncated file": lambda folder, osctl: (folder / AVERAGE).write_bytes((folder / AVERAGE).read_bytes()[:-1]),
    "an edited manifest": lambda folder, osctl: (folder / "MANIFEST.json").write_text(
        (folder / "MANIFEST.json").read_text().replace('"complete":true', '"complete":false')
    ),
    "another stage's checkpoint": lambda folder, osctl: (shutil.rmtree(folder), shutil.copytree(checkpoint(osctl, "stage1"), folder)),
    "an older checkpoint": lambda folder, osctl: replace_with_older(folder),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_parent_is_refused_and_named(copy: Osctl, damage: str) -> None:
    folder = checkpoint(copy, "stage2")
    DAMAGE[damage](folder, copy)
    found = copy("lineage", "stage2", "--verify", expect=4)
    refused = copy("launch", "stage3", "--set", "stage3.steps=4", expect=4)
    name = "MANIFEST.json" if damage in ("an edited manifest", "another stage's checkpoint", "an older checkpoint") else AVERAGE
    assert name in refused.stderr and "stage2" in refused.stderr, refused.stderr
    assert name in found.stderr, found.stderr
    assert {stage["name"]: stage["state"] for stage in copy.json("status")["stages"]}["stage3"] != "committed"


def test_the_readme_names_every_command(tmp_path: Path) -> None:
    listing = Osctl(tmp_path)("--help").stdout.split("Commands:")[1]
    names = {line.split()[0] for line in listing.splitlines() if line.startswith("  ") and not line.startswith("   ")}
    assert {command.split()[1] for command in named(TABLE + ON_KUBERNETES)} == names


def test_every_command_of_the_table_has_somebody_who_types_it() -> None:
    assert set(named(TABLE)) <= {*COMMANDS, *OWN, *ELSEWHERE} and set(OWN) <= set(named(TABLE))
    assert "osctl launch --data ~/clips" in ELSEWHERE and "osctl plan -f open-sora-1.0" in COMMANDS and len(COMMANDS) > 20


def place(command: str) -> int:
    """A data set is made before the others look at it; a launch on other data comes last, since it is what they would look at then."""
    return 0 if command.startswith("osctl prepare run") else 2 if "--data" in command else 1


@pytest.mark.long
@pytest.mark.parametrize("command", sorted(COMMANDS, key=place))
def test_a_command_of_the_readme_does_what_it_says(desk: Osctl, command: str) -> None:
    arguments = words(command, desk)
    if command == "osctl launch --data mine":
        arguments += ["--set", "name=mine"]  # under the old name it asks what becomes of the result on the other clips
    done = desk(*arguments)
    if arguments[0] in ("plan", "compare", "cost", "lineage", "list", "explain"):
        assert done.stdout.strip(), "a result on stdout"
    if arguments[0] == "init":
        assert (desk.folder / "my-model/osctl.yaml").exists()


@pytest.mark.long
def test_mlflow_opens_on_the_stages_side_by_side_and_ctrl_c_ends_every_process_of_it(launched: Osctl) -> None:
    command = [OSCTL, *words(MLFLOW, launched), "--no-open", "--port", "0"]
    server = subprocess.Popen(command, cwd=launched.folder, env=launched.environment(), stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said, deadline = "", time.monotonic() + 150
    while "Ctrl-C" not in said and time.monotonic() < deadline and (line := server.stderr.readline()):
        said += line
    try:
        assert "http://127.0.0.1:" in said and "compare-runs" in said, said
        children = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert children and not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()
