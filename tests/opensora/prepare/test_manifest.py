"""Laws of the manifest and of what is exported from it."""

from __future__ import annotations

import csv
import gc
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from opensora.dataset.rows import Captioned, Clip, ClipFile, Media, Provenance, Shot, Source
from opensora.errors import ConfigError
from opensora.prepare import __main__ as command
from opensora.prepare import manifest

DOCS = Path(__file__).parents[3] / "docs" / "datasets.md"
MEDIA = Media("mov", "h264", 640, 360, 90, (1, 1), "yuv420p", 8, "", False, False, (1, 12800), 512, 99999, 200, 25.0, True, "aac")
CAPTIONS = ["a red ball", '=cmd|" /C calc"!A0', "two\nlines, a comma", "漢字 é", "-1"]


def clip(number: int, text: str) -> Clip:
    source = Source("https://host/a.mp4", "a", Provenance("mine", "https://host/a.mp4", "cc-by", "A film"))
    shot = Shot(512 + 1000 * number, 1512 + 1000 * number, (1, 12800), number, 10, {"motion": 1.23456, "static": 0.0}, "00ff00ff00ff00ff")
    file = ClipFile(f"clips/{number:020x}.mp4", "ab" * 32, 4, 10, 360, 640, 25.0)
    measures = {"words": float(len(text.split())), "language": "en"}
    return Clip(f"{number:020x}", "cd" * 32, source, MEDIA, shot, file, Captioned(text, "model", "what?", 1, 5, 6, 0.1, "en"), measures)


CLIPS = [clip(number, text) for number, text in enumerate(CAPTIONS)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "clips").mkdir(parents=True)
    for one in CLIPS:
        assert one.file is not None
        (folder / one.file.path).write_bytes(one.id[-4:].encode())
    columns: list[tuple[str, type]] = [("motion", float), ("static", float), ("words", float)]
    written = manifest.write_rows(iter(CLIPS), folder, columns, "content", "0123", {"name": "mine"})
    assert (written.clips, written.frames, written.bytes) == (5, 50, 20)
    return folder


def test_a_row_says_where_a_clip_comes_from_and_what_was_measured(out: Path) -> None:
    table = pyarrow.parquet.read_table(out / "manifest.parquet")
    row = table.to_pylist()[2]
    assert (row["start_pts"], row["end_pts"], row["time_base_num"], row["time_base_den"]) == (2512, 3512, 1, 12800)
    assert row["start_s"] == pytest.approx(2512 / 12800)
    assert (row["caption"], row["caption_by"], row["caption_prompt"], row["caption_seed"]) == ("two\nlines, a comma", "model", "what?", 1)
    assert (row["licence"], row["source_uri"], row["source_sha256"]) == ("cc-by", "https://host/a.mp4", "cd" * 32)
    assert (row["motion"], row["words"], row["language"]) == (1.23456, 4.0, "en")
    assert (row["detector"], row["settings"]) == ("content", "0123")
    assert table.schema.field("start_pts").metadata == {b"unit": b"time base", b"about": b"PTS of the first frame"}
    assert table.schema.metadata[b"osctl.name"] == b"mine"


def test_the_docs_show_the_schema() -> None:
    assert manifest.described() in DOCS.read_text(), "docs/datasets.md shows another schema than opensora/prepare/manifest.py has"


def test_more_rows_than_a_group_holds_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROWS_A_GROUP", 2)
    manifest.write_rows(iter(CLIPS), tmp_path, [], "content", "0123", {})
    assert [row["id"] for row in manifest.rows_of(tmp_path)] == [one.id for one in CLIPS]


def test_the_digest_counts_identity_caption_and_rounded_measures_in_order() -> None:
    digest = manifest.digest_of(CLIPS)
    assert CLIPS[0].caption is not None
    assert CLIPS[0].file is not None
    first = CLIPS[0]
    others = CLIPS[1:]
    nearly = replace(first, shot=replace(first.shot, measures={"motion": 1.2349, "static": 0.0}))
    assert manifest.digest_of([nearly, *others]) == digest
    assert manifest.digest_of([replace(first, file=replace(CLIPS[0].file, sha256="00")), *others]) == digest
    for changed in (
        replace(first, id="f" * 20),
        replace(first, caption=replace(CLIPS[0].caption, text="a blue ball")),
        replace(first, shot=replace(first.shot, measures={"motion": 1.25, "static": 0.0})),
    ):
        assert manifest.digest_of([changed, *others]) != digest
    assert manifest.digest_of([*others, first]) != digest


def shards(folder: Path) -> list[dict[str, object]]:
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its last file open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    return samples


def test_webdataset_reads_the_shards(out: Path, tmp_path: Path) -> None:
    assert manifest.write_webdataset(out, tmp_path / "shards", per_shard=2) == 3
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    read = shards(tmp_path / "shards")
    assert [sample["__key__"] for sample in read] == [one.id for one in CLIPS]
    for sample, one in zip(read, CLIPS, strict=True):
        assert one.caption is not None
        assert sample["txt"] == one.caption.text.encode()
        assert sample["mp4"] == one.id[-4:].encode()
        content = sample["json"]
        assert isinstance(content, bytes)
        assert json.loads(content)["start_pts"] == one.shot.start_pts


def test_equal_data_sets_give_equal_shards(out: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        manifest.write_webdataset(out, tmp_path / name, per_shard=3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_open_sora_reads_the_csv(out: Path, tmp_path: Path) -> None:
    assert manifest.write_open_sora(out, tmp_path / "csv") == 5
    with (tmp_path / "csv" / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "text", "num_frames", "width", "height", "aspect_ratio"]
    assert [row["text"] for row in rows] == CAPTIONS
    assert all(Path(row["path"]).is_absolute() and Path(row["path"]).is_file() for row in rows)
    assert float(rows[0]["aspect_ratio"]) == pytest.approx(640 / 360, rel=1e-5)


@pytest.mark.parametrize("form", ["webdataset", "open-sora"])
def test_the_command_exports_a_run_directory_and_a_data_set(out: Path, tmp_path: Path, form: str) -> None:
    for given, to in ((out, "one"), (out.parent, "other")):
        assert command.main(["export", str(given), "--format", form, "--to", str(tmp_path / to)]) == 0
        assert list((tmp_path / to).iterdir())


def test_what_is_no_data_set_is_told(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest\.parquet"):
        manifest.write_webdataset(tmp_path, tmp_path / "to")
    (out / "manifest.parquet").write_bytes(b"PAR1 is not all")
    assert command.main(["export", str(out), "--format", "webdataset", "--to", str(tmp_path / "to")]) == 64


def test_a_clip_that_is_gone_is_told(out: Path, tmp_path: Path) -> None:
    next((out / "clips").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"manifest\.parquet names it"):
        manifest.write_webdataset(out, tmp_path / "to")
    assert not list((tmp_path / "to").glob("*.tar"))
