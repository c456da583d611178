"""`osctl encode`: the clips of a pipeline's stages, encoded where a launch looks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_recipe import Osctl, write


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe"))


def test_a_stage_is_encoded_once_and_later_ones_wait_for_their_parents_encoders(osctl: Osctl) -> None:
    first = osctl("encode", "-o", "json")
    rows = json.loads(first.stdout)
    assert [(row["name"], row["state"]) for row in rows] == [
        ("stage1", "encoded"),
        ("stage2", "waits for stage1"),
        ("stage3", "waits for stage2"),
    ]
    assert "stage1: 48 of 48 clips" in first.stderr
    folder = Path(rows[0]["directory"])
    assert folder.parent == osctl.folder / ".osctl/latents"
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    again = json.loads(osctl("encode", "stage1", "-o", "json").stdout)
    assert [(row["state"], row["directory"]) for row in again] == [("there already", str(folder))]


@pytest.mark.long
def test_a_launch_trains_on_what_was_encoded_and_leaves_its_own_for_the_next(osctl: Osctl) -> None:
    osctl("encode", "stage1")
    caches = osctl.folder / ".osctl/latents"
    (encoded,) = caches.iterdir()
    before = encoded.stat().st_mtime_ns
    osctl("launch", "stage1", "-q")
    assert list(caches.iterdir()) == [encoded] and encoded.stat().st_mtime_ns == before
    assert not list(osctl.folder.glob(".osctl/runs/**/latents"))
    (row,) = json.loads(osctl("encode", "stage2", "-o", "json").stdout)
    assert row["state"] == "encoded", "its parent's encoders are committed now"
    osctl("launch", "stage2", "-q")
    assert {path.name for path in caches.iterdir()} == {encoded.name, Path(row["directory"]).name}


def test_a_table_says_where_it_lies_and_how_large_it_is(osctl: Osctl) -> None:
    shown = osctl("encode", "stage1", "--into", "elsewhere").stdout
    (folder,) = (osctl.folder / "elsewhere").iterdir()
    assert str(folder) in shown and "MiB" in shown and "48" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("stage9",), 2, ("stage9", "stage1, stage2, stage3")),
        (("stage2",), 4, ("stage1", "not committed", "osctl launch stage1")),
        (
            ("stage1", *(f"--set=stage{number}.autoencoder={{kind: kl, path: /nowhere, factor: 4}}" for number in (1, 2, 3))),
            2,
            ("autoencoder.path /nowhere", "no such folder"),
        ),
    ],
    ids=["a stage that is not there", "a parent that is not there", "an encoder that is not there"],
)
def test_what_cannot_be_encoded_is_one_line(osctl: Osctl, arguments: tuple[str, ...], code: int, said: tuple[str, ...]) -> None:
    refused = osctl("encode", *arguments, expect=code)
    assert refused.stdout == "" and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert all(word in refused.stderr for word in said), refused.stderr
