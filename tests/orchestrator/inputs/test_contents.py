"""A stage's result is a result of its clips and captions, not of their folder; what nobody can see is refused with the command to paste."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import write

from opensora.config import FolderSource
from opensora.dataset.manifest import DataManifest
from orchestrator.errors import CorruptCheckpoint, Refused, UsageError
from orchestrator.inputs import datasets, imports
from orchestrator.inputs.contents import Resolved, resolve_contents, suggested
from orchestrator.inputs.data_files import DataFiles
from orchestrator.inputs.imports import Source
from orchestrator.inputs.standing import name_of
from orchestrator.recipe.adapt import with_data
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.resolve import load
from orchestrator.stores.folder import FolderStore

PLAIN = {"a.mp4": "one", "b.mp4": "two"}


def clips(folder: Path, told: Mapping[str, str] = PLAIN) -> Path:
    folder.mkdir(parents=True)
    (folder / "captions.csv").write_text("path,text\n" + "".join(f"{name},{text}\n" for name, text in told.items()))
    for name in told:
        (folder / name).write_bytes(b"film " + name.encode())
    return folder


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "recipe") / "osctl.yaml"


def resolved(pipeline: Pipeline, store: FolderStore, home: Path, *, needed: bool = True) -> Resolved:
    return resolve_contents(pipeline, lambda: store, DataFiles(home), needed=needed)


def inputs_digest(recipe: Path, folder: Path, store: FolderStore, home: Path) -> str:
    return name_of(resolved(own(recipe, folder), store, home).pipeline.stages[0], None)


def own(recipe: Path, folder: Path) -> Pipeline:
    return with_data(load(recipe), FolderSource(kind="folder", path=str(folder)), ["one", "two"])


def away(recipe: Path, source: Mapping[str, Any], store: FolderStore) -> Pipeline:
    """For a cluster."""
    settings = {f"stage{number}.data.source": str(dict(source)) for number in (1, 2, 3)}
    return load(recipe, overrides={"backend": "kubernetes", "cluster": "kind-cpu", "store": store.url, **settings})


def test_the_same_clips_in_another_folder_are_the_same_result(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    first = inputs_digest(recipe, clips(tmp_path / "one"), store, tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    assert inputs_digest(recipe, tmp_path / "two", store, tmp_path) == first


@pytest.mark.parametrize(
    "told", [{"a.mp4": "uno", "b.mp4": "two"}, {**PLAIN, "c.mp4": "three"}, {"a.mp4": "one"}], ids=["caption", "added", "removed"]
)
def test_other_captions_or_clips_are_another_result(recipe: Path, tmp_path: Path, store: FolderStore, told: dict[str, str]) -> None:
    assert inputs_digest(recipe, clips(tmp_path / "one"), store, tmp_path) != inputs_digest(
        recipe, clips(tmp_path / "two", told), store, tmp_path
    )


def test_another_film_under_the_same_name_is_another_result(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    folder = clips(tmp_path / "one")
    first = inputs_digest(recipe, folder, store, tmp_path)
    (folder / "a.mp4").write_bytes(b"film x.mp4")
    assert inputs_digest(recipe, folder, store, tmp_path) != first


def test_synthetic_clips_have_no_manifest(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    found = resolved(load(recipe), store, tmp_path)
    assert found.pipeline == load(recipe) and not found.manifests and not found.notes


def test_a_manifest_is_in_the_store_once_a_launch_goes_ahead(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    found = resolved(own(recipe, clips(tmp_path / "one")), store, tmp_path)
    digest = found.pipeline.stages[0].contents.data
    assert digest is not None and not list(store.list("")), "nothing is written before"
    found.commit(store)
    found.commit(store)
    assert [row.text for row in datasets.get_manifest(store, digest).rows] == ["one", "two"]


def test_the_resolved_pipeline_is_what_a_driver_reads_again(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    pipeline = resolved(own(recipe, clips(tmp_path / "one")), store, tmp_path).pipeline
    assert Pipeline.model_validate(pipeline.model_dump(mode="json")) == pipeline


@pytest.mark.parametrize(
    "source",
    [{"kind": "folder", "path": "/volume/of/pods/HQ clips"}, {"kind": "manifest", "path": "memory://nowhere/hq-20k.csv", "clips": 2}],
    ids=["folder", "manifest"],
)
def test_what_nobody_sees_is_refused_with_the_command(recipe: Path, tmp_path: Path, store: FolderStore, source: dict[str, Any]) -> None:
    pipeline = away(recipe, source, store)
    with pytest.raises(
        Refused, match=rf"this machine does not see it.*osctl data register h[a-z0-9-]* '?{source['path']}'? --cluster kind-cpu"
    ):
        resolved(pipeline, store, tmp_path)
    planned = resolved(pipeline, store, tmp_path, needed=False)
    assert planned.pipeline == pipeline and "not known here" in planned.notes[0]


def test_data_of_a_local_launch_must_be_here(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    pipeline = own(recipe, clips(tmp_path / "one"))
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(Refused, match="is not on this machine"):
        resolved(pipeline, store, tmp_path)


def test_what_was_registered_counts_where_this_machine_sees_nothing(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    seen = DataFiles(tmp_path).manifest(own(recipe, clips(tmp_path / "pod")).stages[0].config.data.source)  # type: ignore[arg-type]
    datasets.register(store, "hq", "/volume/clips", seen, now=1.0, holder="a@b")
    found = resolved(away(recipe, {"kind": "folder", "path": "/volume/clips"}, store), store, tmp_path)
    assert {stage.contents.data for stage in found.pipeline.stages} == {seen.digest}
    assert name_of(found.pipeline.stages[0], None) == inputs_digest(recipe, tmp_path / "pod", store, tmp_path), "laptop and cluster"


def test_a_csv_that_is_not_as_it_was_registered_is_said_row_by_row(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    import fsspec

    memory, address = fsspec.filesystem("memory"), "memory://bucket/all.csv"
    memory.pipe("/bucket/all.csv", b"path,text\na.mp4,one\nb.mp4,two\n")
    pipeline = away(recipe, {"kind": "manifest", "path": address, "clips": 2}, store)
    source = pipeline.stages[0].config.data.source
    datasets.register(store, "all", address, DataFiles(tmp_path).manifest(source, by="name"), now=1.0, holder="a@b")  # type: ignore[arg-type]
    assert resolved(pipeline, store, tmp_path).pipeline.stages[0].contents.data
    memory.pipe("/bucket/all.csv", b"path,text\na.mp4,one\nb.mp4,dos\n")
    with pytest.raises(Refused, match=r"1 row is not as registered as all \(b.mp4: caption was 'two', is 'dos'\).*register all"):
        resolved(pipeline, store, tmp_path)


def test_a_csv_that_is_none_is_a_usage_error(recipe: Path, tmp_path: Path, store: FolderStore) -> None:
    pipeline = own(recipe, clips(tmp_path / "one"))
    (tmp_path / "one/captions.csv").write_text("clip,words\na.mp4,one\n")
    with pytest.raises(UsageError, match=r"captions.csv:1: the header is"):
        resolved(pipeline, store, tmp_path)


def test_a_name_means_the_last_data_that_was_registered(tmp_path: Path, store: FolderStore) -> None:
    files = DataFiles(tmp_path)
    one, two = (FolderSource(kind="folder", path=str(clips(tmp_path / name, told))) for name, told in (("1", PLAIN), ("2", {"a.mp4": "x"})))
    first = datasets.register(store, "bikes", one.path, files.manifest(one), now=1.0, holder="a@b")
    assert datasets.register(store, "bikes", one.path, files.manifest(one), now=2.0, holder="a@b") == first, "said again, nothing changes"
    second = datasets.register(store, "bikes", two.path, files.manifest(two), now=3.0, holder="a@b")
    assert datasets.registered(store) == [second] and datasets.of_name(store, "bikes") == [first, second]
    assert datasets.find(store, "bikes") == (second.manifest, second) and datasets.find(store, first.manifest[:8]) == (first.manifest, None)
    with pytest.raises(Refused, match="registered are: bikes"):
        datasets.find(store, "cars")


def test_a_registration_that_cannot_be_read_keeps_its_number_and_stops_no_other(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for key in ("datasets/bikes/registered/000001.json", "datasets/bikes/registered/000001 (1).json", "weights/t5/registered/000001.json"):
        store.create(key, b"")
    one = datasets.register(store, "bikes", "/clips", DataManifest((), "content"), now=1.0, holder="a@b")
    assert datasets.registered(store) == [one]
    source = Source(manifest="0" * 64, role="text", source="/t5", licence=None, name="t5", time=1.0, holder="a@b")
    assert imports.add_source(store, source) == source and imports.named(store) == [source]


def test_a_damaged_manifest_is_refused_and_a_damaged_name_hides_no_other(tmp_path: Path, store: FolderStore) -> None:
    source = FolderSource(kind="folder", path=str(clips(tmp_path / "1")))
    one = datasets.register(store, "bikes", source.path, DataFiles(tmp_path).manifest(source), now=1.0, holder="a@b")
    store.create("datasets/cars/registered/000001.json", b"{}")
    assert datasets.registered(store) == [one]
    (store.root / datasets.manifest_key(one.manifest)).write_bytes(b"half")
    with pytest.raises(CorruptCheckpoint, match="register the data again"):
        datasets.get_manifest(store, one.manifest)


def test_a_suggested_name_is_one_that_may_be_given() -> None:
    assert suggested("s3://open-sora/data/hd-vg-130m-split1.csv") == "hd-vg-130m-split1"
    for place in ("/a/2024 Clips!/", "s3://b/étape", "/", "x" * 90):
        assert datasets.check_name(suggested(place))
