"""`osctl prepare`, and data sets by name: what is typed, what is printed, what is refused. No video is decoded here."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from prepare_bench import Bench
from tiny_recipe import Osctl, write

from orchestrator.api import Pipeline
from orchestrator.errors import UsageError
from orchestrator.ledger.records import Price
from orchestrator.prepare.run_directory import RunDirectory, write_json
from orchestrator.recipe.files import shipped_folder
from orchestrator.stores.folder import FolderStore


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe", devices=1, stages=1))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "My videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"film a")
    (folder / "a.txt").write_text("a film")
    return folder


@pytest.fixture
def prepared(osctl: Osctl, videos: Path) -> Osctl:
    """`mine` lies in the store of the recipe, and its run directory is here."""
    state = osctl.folder / ".osctl"
    (state / "prepare").mkdir(parents=True)
    bench = Bench(state / "prepare", FolderStore(state / "store"), videos)
    bench.run("--parquet", run_dir="mine")
    return osctl


def test_pods_are_of_a_cluster_and_of_cores_alone(osctl: Osctl, videos: Path) -> None:
    said = osctl("prepare", "run", str(videos), "--pods", "4", expect=2).stderr
    assert "--pods 4: on one machine there are none" in said and "--cluster" in said
    asked = (
        "prepare",
        "render",
        "s3://bucket/films",
        "--name",
        "films",
        "--store",
        "s3://bucket/runs",
        "--cluster",
        "kind-cpu",
        "--pods",
        "4",
    )
    said = osctl(*asked, "--gpus", "1", expect=2).stderr
    assert "--pods 4 with --gpus 1" in said and "--engine ray" in said
    job = yaml.safe_load(osctl(*asked).stdout)
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", 4)


def test_a_plan_of_400_000_clips_names_its_rates_and_the_published_captions(osctl: Osctl, videos: Path) -> None:
    found = osctl.json("prepare", "plan", str(videos), "--clips", "400000", "--caption-gpu-s", "1.5", "-f", "open-sora-1.0")
    steps = {step["name"]: step for step in found["steps"]}
    assert steps["(by LLaVA)"]["device_hours"] == pytest.approx(400_000 * 6 / 3600) and not steps["(by LLaVA)"]["in_total"]
    assert steps["(by LLaVA)"]["own_device_hours"] == pytest.approx(400_000 * 1.5 / 3600)
    assert steps["frames"]["basis"] == "measured" and steps["encode"]["device_hours"] > 0 and found["total"]["core_hours"] > 100
    shown = osctl("prepare", "plan", str(videos), "--clips", "400000")
    assert "assumption: 5 seconds a clip" in shown.stderr and "1 video, " in shown.stderr


def test_a_plan_tells_cores_from_gpus_and_a_device_without_a_price_is_told_as_such(osctl: Osctl, videos: Path) -> None:
    llava = ("--set", "caption.kind=llava", "--set", "caption.path=/models/llava", "--clips", "400000")
    shown = osctl("prepare", "plan", str(videos), *llava).stdout
    assert "core-hours" in shown and "GPU-hours" in shown and "h800" in shown and "not priced" not in shown
    cores = yaml.safe_load((shipped_folder() / "prices.yaml").read_text())["devices"]["cpu-core"]
    (osctl.folder / "cores.yaml").write_text(yaml.safe_dump({"devices": {"cpu-core": cores}}))
    found = osctl.json("prepare", "plan", str(videos), *llava, "--prices", "cores.yaml")
    caption = next(step for step in found["steps"] if step["name"] == "caption")
    assert (caption["device"], caption["usd"], found["total"]["not_priced"]) == ("h800", None, ["h800"])
    assert found["total"]["gpu_hours"] == pytest.approx(400_000 * 6 / 3600) and float(found["total"]["usd"]) > 0
    assert found["balance"].items() >= {"gpu_s": 6.0, "gpu_pods": 8, "pod_cores": 16}.items()
    assert found["balance"]["cpu_pods"] * 16 >= 8 * found["balance"]["cores_a_gpu"] > 0
    fast = osctl("prepare", "plan", str(videos), *llava, "--caption-gpu-s", "0.5", "--pod-cores", "4", "--gpus", "2").stderr
    assert "CPU pods of 4 cores for 2 GPU pods" in fast and "GPU-s a clip" in fast
    assert "h800 not priced" in osctl("prepare", "plan", str(videos), *llava, "--prices", "cores.yaml").stdout


def test_the_bill_of_a_preparation_has_a_line_for_each_step_and_device(osctl: Osctl, videos: Path) -> None:
    state = osctl.folder / ".osctl"
    (state / "prepare").mkdir(parents=True)
    preparation = Bench(state / "prepare", FolderStore(state / "store"), videos).preparation("--gpu", "NVIDIA H200", run_dir="mine")
    cores = Price(usd_per_hour=Decimal("3.6"), is_gpu=False, basis="assumption", source="a test", date="2026-11-30")
    preparation.asked = replace(preparation.asked, price=cores, gpu="local-gpu")
    preparation.run()
    found = osctl.json("prepare", "status", "mine")
    (line,) = [line for line in found["bill"] if line["is_gpu"]]
    assert (line["name"], line["device"], line["device_name"], line["usd"]) == ("download", "local-gpu", "NVIDIA H200", None)
    assert line["device_hours"] == found["gpu_hours"] == pytest.approx(4 / 3600) and found["not_priced"] == ["local-gpu"]
    step = found["steps"][0]
    assert (step["device"], step["devices"], step["held_s"]) == ("NVIDIA H200", 1, {"cpu": 0.01, "cuda": 4.0})
    shown = osctl("prepare", "status", "mine")
    row = next(row for row in shown.stdout.splitlines() if "local-gpu (NVIDIA H200)" in row)
    assert "0.0011" in row and "not priced" in row and "$" not in row
    assert "0.0011 GPU-hours" in shown.stderr and "local-gpu not priced" in shown.stderr


def test_a_failed_try_of_another_name_leaves_no_doubt_which_data_set_is_meant(prepared: Osctl) -> None:
    for name in ("typo", "mime"):
        folder = RunDirectory(prepared.folder / ".osctl/prepare" / name)
        folder.path.mkdir()
        write_json(folder.config, {"name": name})
        write_json(folder.path / "result.json", {"class": "failed"})
    assert prepared.json("prepare", "status")["name"] == "mine"
    shutil.rmtree(prepared.folder / ".osctl/prepare/mine")
    assert "which data set is meant? There are: mime, typo" in prepared("prepare", "status", expect=2).stderr


def test_a_rule_on_no_column_is_refused_before_anything_runs(osctl: Osctl, videos: Path) -> None:
    rule = ("--set", "filter.rules=[{column: moton, min: 1}]")
    for words in (("run", str(videos)), ("run", str(videos), "--dry-run"), ("plan", str(videos))):
        assert "filter.rules[0]: no column moton. Is motion meant?" in osctl("prepare", *words, *rule, expect=2).stderr
    assert not (osctl.folder / ".osctl/prepare").exists()


def test_a_dry_run_starts_nothing(osctl: Osctl, videos: Path) -> None:
    said = osctl("prepare", "run", str(videos), "--dry-run").stderr
    assert "my-videos: would be prepared in" in said and not (osctl.folder / ".osctl").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run",), 2, "osctl prepare run ~/videos"),
        (("run", "nowhere"), 2, "no such file or folder"),
        (("run", "VIDEOS", "--name", "Mine"), 2, "no name of a data set"),
        (("run", "VIDEOS", "--set", "cut.min_s=20"), 2, "min_s 20 is more than max_s 10"),
        (("run", "VIDEOS", "--set", "cut.speed=1"), 2, "unknown key 'speed'"),
        (("run", "VIDEOS", "--set", "cut"), 2, "KEY=VALUE"),
        (("run", "VIDEOS", "--caption-url", "http://x/v1"), 2, "--caption-model is missing"),
        (("run", "https://user:secret-of-mine@host/list.csv"), 2, "holds credentials"),
        (("run", "VIDEOS", "--encode", "-f", "nothing"), 2, "no such file, folder or shipped pipeline"),
        (("plan", "VIDEOS", "--size", "big"), 2, "1920x1080@30"),
        (("run", "EMPTY"), 2, "no video (.mp4"),
        (("status", "mine"), 4, "osctl prepare run ~/videos"),
        (("status", "../x"), 2, "a name has lower-case letters"),
        (("status",), 2, "Name one"),
        (("why", "abcdef", "--of", "mine"), 4, "osctl prepare run"),
        (("report", "mine"), 4, "osctl prepare run"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_type(osctl: Osctl, videos: Path, words: tuple[str, ...], code: int, said: str) -> None:
    (videos.parent / "empty").mkdir()
    places = {"VIDEOS": str(videos), "EMPTY": str(videos.parent / "empty")}
    typed = [places.get(word, word) for word in words]
    if words[:2] == ("run", "VIDEOS") or words[:2] == ("run", "https://user:secret-of-mine@host/list.csv"):
        typed.append("--dry-run")
    found = osctl("prepare", *typed, expect=code).stderr
    assert said in found and "secret-of-mine" not in found


def test_a_prepare_yaml_is_told_by_file_and_line(osctl: Osctl) -> None:
    (osctl.folder / "prepare.yaml").write_text("name: mine\nsources:\n  - path: raw\ncut:\n  max_s: fast\n")
    assert "prepare.yaml:5: cut.max_s" in osctl("prepare", "run", "--dry-run", expect=2).stderr
    (osctl.folder / "prepare.yaml").write_text("name: mine\nsources:\n  - path: raw\n")
    assert "raw: no such file or folder" in osctl("prepare", "run", "--dry-run", expect=2).stderr
    (osctl.folder / "raw").mkdir()
    (osctl.folder / "raw/a.mp4").touch()
    (osctl.folder / "raw/a.txt").write_text("a film")
    assert osctl("prepare", "run", "--dry-run").returncode == 0
    assert "seconds" in osctl("explain", "prepare.cut").stdout and '"sources"' in osctl("explain", "--schema", "prepare").stdout


@pytest.mark.long
def test_a_preparation_is_shown_as_it_stands(prepared: Osctl) -> None:
    found = prepared.json("prepare", "status", "mine")
    assert (found["state"], found["clips"], found["attempts"][0]["state"]) == ("prepared", 2, "completed")
    assert found["steps"][0]["name"] == "download" and found["tokens_in"] == 7
    shown = prepared("prepare", "status", "mine")
    assert "download" in shown.stdout and "mine: prepared, 2 clips; 1 attempt," in shown.stderr
    page = Path(prepared("prepare", "report", "mine").stdout.strip())
    assert "half 1 of a" in (prepared.folder / page).read_text()
    for folder in (".", "/"):
        assert f"--out {folder}: is a folder. Name a file in it" in prepared("prepare", "report", "mine", "--out", folder, expect=2).stderr
    clip = next((prepared.folder / ".osctl/prepare/mine/out/clips").iterdir()).stem
    assert prepared.json("prepare", "why", clip[:9], "--of", "mine")["verdict"] == "kept"
    assert "2 of 2 clips are kept" in prepared("prepare", "why", "a.mp4", "--of", "mine").stdout


def test_the_page_of_another_machines_preparation_comes_out_of_the_store(prepared: Osctl) -> None:
    shutil.rmtree(prepared.folder / ".osctl/prepare")
    page = prepared("prepare", "report", "mine").stdout.strip()
    assert page == "mine-report.html" and "half 1 of a" in (prepared.folder / page).read_text()


@pytest.mark.long
def test_a_data_set_is_named_by_its_name_and_a_folder_of_that_name_comes_first(prepared: Osctl, tmp_path: Path) -> None:
    said = prepared("launch", "--data", "mine", "--dry-run").stderr
    assert "--data mine: 2 clips at" in said and "prepared as mine; 2 rows" in said
    assert not (prepared.folder / ".osctl/seen.sqlite").exists(), "no clip was read for its digest"
    refused = prepared("launch", "--data", "other", "--dry-run", expect=2).stderr
    assert "or a data set of the store (mine)" in refused
    (prepared.folder / "mine").mkdir()
    (prepared.folder / "mine/captions.csv").write_text("path,text\nx.mp4,a film\n")
    said = prepared("launch", "--data", "mine", "--dry-run").stderr
    assert "is the folder or file of that name here, and not the data set mine" in said and "captions.csv" in said


def test_the_api_takes_a_name_too(prepared: Osctl) -> None:
    one = Pipeline.load(prepared.folder / "osctl.yaml", home=prepared.folder / ".osctl", data="mine")
    assert one.plan().rows[0].steps == 8
    with pytest.raises(UsageError, match=r"or a data set of the store \(mine\)"):
        Pipeline.load(prepared.folder / "osctl.yaml", home=prepared.folder / ".osctl", data="other")


@pytest.mark.long
def test_data_sets_are_listed_with_hours_and_licences_and_shown_with_their_sources(prepared: Osctl) -> None:
    (one,) = prepared.json("data", "list")
    assert (one["name"], one["rows"], one["licences"], one["hours"]) == ("mine", 2, ["cc0"], 2 / 3600)
    about = prepared.json("data", "show", "mine", "--about")
    assert about["sources"][0]["name"] == "a.mp4" and about["steps"][0]["kept"] == 1
    assert "cc0" in prepared("data", "show", "mine", "--about").stdout
    assert len(prepared.json("data", "show", "mine")) == 2
    assert "only source" in prepared("data", "remove", "a.mp4", expect=4).stderr
    assert "no such source" in prepared("data", "remove", "zzz", expect=4).stderr


def test_what_the_last_run_did_not_use_is_removed_when_it_is_asked_for(prepared: Osctl) -> None:
    assert "Run it once: osctl prepare run" in prepared("data", "clean", "mine", expect=4).stderr, "the stand-in names no digests"
    assert "There are: osctl data list" in prepared("data", "clean", "other", expect=4).stderr
    status = prepared.folder / ".osctl/prepare/mine/status.json"
    used = dict.fromkeys(("download", "probe", "frames", "clips", "caption"), "0" * 16) | {"frames": "f" * 16, "clips": "c" * 16}
    status.write_text(json.dumps(json.loads(status.read_text()) | {"digests": used}))
    told = prepared("data", "clean", "mine", "--dry-run").stderr
    assert f"caption/{'e' * 16}, download/{'d' * 16}, probe/{'a' * 16}" in told and "would remove" in told
    assert prepared.json("data", "clean", "mine")["objects"] > 0
    assert "was used by its last run" in prepared("data", "clean", "mine").stderr
    assert len(prepared.json("data", "show", "mine")) == 2


def test_a_recipe_with_raw_videos_says_first_what_it_prepares(osctl: Osctl, videos: Path) -> None:
    recipe = osctl.folder / "osctl.yaml"
    before = recipe.read_text()
    recipe.write_text(f'{before}\nprepare: {{name: raw, sources: [{{path: "{videos}"}}], cut: {{max_s: 0}}}}\n')
    assert "cut.max_s" in osctl("launch", "--dry-run", expect=2).stderr
    recipe.write_text(f'{before}\nprepare: {{name: raw, sources: [{{path: "{videos}"}}]}}\n')
    assert f"first: prepares raw of {videos}; not prepared yet" in osctl("launch", "--dry-run").stderr
    assert f"first: prepares raw of {videos}; not prepared yet" in osctl("plan").stderr
    with pytest.raises(UsageError, match="osctl launch"):
        Pipeline.load(recipe, home=osctl.folder / ".osctl").launch()
    assert "cut.min_s 20" in osctl("launch", "--dry-run", "--set", "prepare.cut.min_s=20", expect=2).stderr.replace(
        "cut: min_s", "cut.min_s"
    )
    (osctl.folder / "raw.yaml").write_text(json.dumps({"sources": [{"path": os.path.relpath(videos, osctl.folder)}]}))
    recipe.write_text(f"{before}\nprepare: raw.yaml\n")
    assert f"first: prepares tiny of {videos}" in osctl("launch", "--dry-run").stderr


@pytest.mark.long
def test_to_resume_what_was_stopped_before_its_first_stage_is_to_prepare(osctl: Osctl, videos: Path) -> None:
    recipe = osctl.folder / "osctl.yaml"
    recipe.write_text(f'{recipe.read_text()}\nprepare: {{name: raw, sources: [{{path: "{videos}"}}]}}\n')
    said = osctl("resume", expect=3).stderr
    assert "the preparation goes on" in said and "data set raw:" in said, "its only file is no video"
    assert osctl.json("prepare", "status", "raw")["state"] == "failed"
