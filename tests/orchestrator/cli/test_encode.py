"""`osctl encode`: the clips of a pipeline's stages, encoded where a launch looks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_recipe import Osctl, warm_trainer, write


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe", devices=1, trainer=warm_trainer(), changes={"steps": 2, "checkpoint": {"every_steps": 2}}))


@pytest.mark.long
def test_stages_are_encoded_once_as_their_parents_are_committed_and_launches_train_on_that(osctl: Osctl) -> None:
    first = osctl("encode", "-o", "json")
    rows = json.loads(first.stdout)
    assert [(row["name"], row["state"]) for row in rows] == [
        ("stage1", "encoded"),
        ("stage2", "waits for stage1"),
        ("stage3", "waits for stage2"),
    ]
    assert "stage1: 48 of 48 clips" in first.stderr
    folder, caches = Path(rows[0]["directory"]), osctl.folder / ".osctl/latents"
    assert folder.parent == caches
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    before = folder.stat().st_mtime_ns
    again = json.loads(osctl("encode", "stage1", "-o", "json").stdout)
    assert [(row["state"], row["directory"]) for row in again] == [("there already", str(folder))]

    osctl("launch", "stage1", "-q")
    assert list(caches.iterdir()) == [folder] and folder.stat().st_mtime_ns == before
    assert not list(osctl.folder.glob(".osctl/runs/**/latents"))
    shown = osctl("encode", "stage2").stdout
    (other,) = set(caches.iterdir()) - {folder}
    assert "encoded" in shown, "its parent's encoders are committed now"
    assert str(other) in shown and "MiB" in shown and "48" in shown, "a table says where it lies and how large it is"
    osctl("launch", "stage2", "-q")
    assert set(caches.iterdir()) == {folder, other}, "what the launch trains on is what was encoded"
    osctl("encode", "stage1", "--into", "elsewhere")
    assert [path.name for path in (osctl.folder / "elsewhere").iterdir()] == [folder.name]


@pytest.mark.long
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
