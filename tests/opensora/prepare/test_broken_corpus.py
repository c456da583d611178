"""Law: whatever lies in a folder of videos is kept, dropped or put aside with a reason, and counted; nothing hangs or leaves the folder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import broken_videos as broken
import hand_made_videos as made
import pytest
import raw_videos as raw
import yaml

GOOD = 6
NAMES = ("=HYPERLINK(1).mp4", "two\nlines.mp4", "a,comma;semicolon.mp4", "-rf.mp4", "漢字 é.mp4", b"no-utf8-\xff.mp4")
"""Of good films, which must not break a table, a page or a command."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "videos"
    folder.mkdir()
    for name, make in broken.KINDS.items():
        make(folder / name)
    for seed, name in enumerate(NAMES, 1):
        path = folder / os.fsdecode(name)
        made.write(folder / "good.mp4", raw.moving(raw.texture(10 + seed, 96, 64), 40))
        (folder / "good.mp4").rename(path)
    (folder / "below").mkdir()
    (folder / "below" / "around").symlink_to(folder)
    (folder / "cover.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("no video\n")
    return folder


def prepare(run: Path, corpus: Path, **changed: Any) -> tuple[int, str, dict[str, Any]]:
    run.mkdir(exist_ok=True)
    content = {
        "name": "corpus", "sources": [{"path": str(corpus)}], "workers": 2, "caption": {"kind": "text"},
        "limits": {"deadline_s": 60, "memory_gb": 2}, "filter": {"rules": []},
    }  # fmt: skip
    (run / "prepare.yaml").write_text(yaml.safe_dump(content | changed))
    command = [sys.executable, "-m", "opensora.prepare", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, done.stdout + done.stderr, json.loads((run / "result.json").read_text())


def everything(folder: Path) -> set[str]:
    return {os.fspath(path) for path in folder.rglob("*") if "around" not in path.parts}


@pytest.mark.long
def test_a_corpus_of_broken_videos_is_told_in_full(corpus: Path, tmp_path: Path) -> None:
    before = everything(corpus)
    code, said, result = prepare(tmp_path / "run", corpus, max_quarantined=1)
    assert code == 0, said
    assert "Traceback" not in said
    steps = result["counts"]
    for name, step in steps.items():
        left = sum(step["dropped"].values()) + sum(step["quarantined"].values())
        assert step["in"] == step["kept"] + left, name
        assert all(step["dropped"]) and all(step["quarantined"]), f"{name}: a reason without words"
    listed = {
        Path(path).name for path in before if Path(path).suffix in (".mp4", ".mkv", ".avi", ".mov", ".ts") and not Path(path).is_dir()
    }
    assert steps["download"]["in"] == len(listed)
    put_aside = sum(sum(step["quarantined"].values()) + sum(step["dropped"].values()) for step in steps.values())
    assert put_aside >= len(listed) - len(NAMES) - 2, "a broken video came through"
    about = json.loads((tmp_path / "run" / "out" / "DATASET.json").read_text())
    good = {os.fsdecode(name).partition("-\udcff")[0] for name in NAMES if isinstance(name, str)}
    assert {Path(one["uri"]).name for one in about["sources"]} >= good
    with (tmp_path / "run" / "out" / "captions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == about["clips"]
    assert everything(corpus) == before, "nothing is written beside the videos"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.long
def test_above_the_share_the_run_stops_with_a_summary(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for name in [*broken.KINDS][:8]:
        broken.KINDS[name](tmp_path / "some" / name)
    code, said, result = prepare(tmp_path / "run", tmp_path / "some")
    assert code == 65
    assert "could not be worked on, max_quarantined 0.01 allows 5" in result["reason"]
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "out").exists()
