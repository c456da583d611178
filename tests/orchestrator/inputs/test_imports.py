"""Imported weights and encoders are what their files are: brought in once, by digest, verified on every way, with source and licence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from file_servers import HUB, Files, hub, served
from tiny_recipe import stage, write

from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, Unreachable, UsageError
from orchestrator.inputs import imports
from orchestrator.inputs.contents import Resolved, resolve_contents
from orchestrator.inputs.data_files import DataFiles
from orchestrator.inputs.import_sources import ImportSources
from orchestrator.inputs.standing import name_of
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.resolve import load
from orchestrator.stores.folder import FolderStore

KL = {"config.json": b'{"_class_name": "AutoencoderKL"}', "diffusion_pytorch_model.safetensors": b"kl weights"}
T5 = {"config.json": b'{"model_type": "t5"}', "model.safetensors": b"t5 weights", "tokenizer.json": b"{}", "spiece.model": b"words"}


def model(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def sources(tmp_path: Path) -> ImportSources:
    return ImportSources(tmp_path / "home")


# --- What a role opens ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "names", "opened"),
    [
        ("weights", ["model.safetensors", "optimizer.safetensors", "config.json"], ["config.json", "model.safetensors"]),
        ("weights", ["model_index.json", "transformer/config.json", "transformer/x.safetensors", "vae/y.safetensors"],
         ["config.json", "x.safetensors"]),
        ("weights", ["a.pth", "notes.txt"], ["a.pth"]),
        ("weights", ["CHECKPOINT.json", "ema.safetensors", "samples/x.png"], ["CHECKPOINT.json", "ema.safetensors"]),
        ("weights", ["notes.txt"], []),
        ("autoencoder", ["vae/config.json", "vae/m.safetensors", "vae/m.fp16.safetensors", "unet/x.safetensors"],
         ["config.json", "m.safetensors"]),
        ("autoencoder", ["config.json", "m.bin"], []),
        ("text", list(T5), sorted(T5)),
        ("text", ["text_encoder/config.json", "text_encoder/m.safetensors", "tokenizer/spiece.model", "vae/config.json"],
         ["text_encoder/config.json", "text_encoder/m.safetensors", "tokenizer/spiece.model"]),
    ],
)  # fmt: skip
def test_of_a_model_what_its_role_opens_is_imported_and_nothing_else(role: Any, names: list[str], opened: list[str]) -> None:
    assert sorted(imports.select(role, names)) == sorted(opened)


def test_a_model_is_the_same_alone_and_inside_a_pipeline(sources: ImportSources, tmp_path: Path) -> None:
    alone = sources.fetch(str(model(tmp_path / "alone", KL)), "autoencoder")
    inside = sources.fetch(str(model(tmp_path / "pipeline/vae", KL).parent), "autoencoder")
    assert alone.digest == inside.digest
    other = sources.fetch(str(model(tmp_path / "other", KL | {"config.json": b"{}"})), "autoencoder")
    assert other.digest != alone.digest


# --- In the store -----------------------------------------------------------------------------------------------------------------------


def test_what_was_brought_in_comes_out_byte_by_byte(store: FolderStore, sources: ImportSources, tmp_path: Path) -> None:
    found = sources.fetch(str(model(tmp_path / "t5", T5)), None)
    assert found.role == "text"
    digest = imports.put(store, found.imported, found.files)
    assert imports.put(store, found.imported, found.files) == digest
    folder = imports.fetch(store, digest, tmp_path / "here" / digest)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == T5


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest"])
def test_a_damaged_import_is_refused_and_the_file_named(store: FolderStore, sources: ImportSources, tmp_path: Path, damage: str) -> None:
    found = sources.fetch(str(model(tmp_path / "t5", T5)), "text")
    digest = imports.put(store, found.imported, found.files)
    file = store.root / f"weights/{digest}/files/model.safetensors"
    if damage == "flipped":
        file.write_bytes(b"T5 weights")
    elif damage == "missing":
        file.unlink()
    else:
        file = store.root / f"weights/{digest}/import.json"
        file.write_bytes(file.read_bytes().replace(b"10", b"11"))
    with pytest.raises(CorruptCheckpoint, match=file.name.replace(".", r"\.")):
        imports.fetch(store, digest, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_an_import_that_was_never_finished_is_none(store: FolderStore, sources: ImportSources, tmp_path: Path) -> None:
    found = sources.fetch(str(model(tmp_path / "t5", T5)), "text")
    digest = imports.put(store, found.imported, None)
    assert not imports.is_stored(store, digest)
    with pytest.raises(Refused, match="osctl weights add"):
        imports.fetch(store, digest, tmp_path / "here")


# --- Downloads --------------------------------------------------------------------------------------------------------------------------


def test_a_download_goes_on_where_it_broke_off(sources: ImportSources) -> None:
    with served(Files({"/m/model.safetensors": bytes(range(256)) * 40})) as files:
        files.break_after = 4000
        found = sources.fetch(f"{files.url}/m/model.safetensors", "weights")
        assert found.files["model.safetensors"].read_bytes() == files.files["/m/model.safetensors"]
        assert files.sent == 10240, "no byte twice"
        assert [asked for _, asked in files.asked] == [None, "bytes=4000-", "bytes=8000-"]
        sources.fetch(f"{files.url}/m/model.safetensors", "weights")
        assert files.sent == 10240, "what is here and still the same is not fetched again"
        files.files["/m/model.safetensors"] = b"another"
        files.break_after = None
        assert sources.fetch(f"{files.url}/m/model.safetensors", "weights").digest != found.digest


def test_a_file_that_changes_while_it_is_fetched_is_never_mixed(sources: ImportSources, tmp_path: Path) -> None:
    with served(Files({"/model.safetensors": b"a" * 9000})) as files:
        files.break_after = 4000
        place = sources._place(f"{files.url}/model.safetensors")
        model(place, {".model.safetensors.partial": b"b" * 4000, ".model.safetensors.etag": b'"of another file"'})
        assert sources.fetch(f"{files.url}/model.safetensors", "weights").files["model.safetensors"].read_bytes() == b"a" * 9000


def test_what_is_not_there_is_said_as_such(sources: ImportSources, tmp_path: Path) -> None:
    with served(Files({})) as files, pytest.raises(NotFound):
        sources.fetch(f"{files.url}/none.safetensors", "weights")
    with pytest.raises(NotFound):
        sources.fetch("no/such-model", "weights", far=False)
    with pytest.raises(UsageError, match="ftp://"):
        sources.fetch("ftp://x/y", "weights")
    with pytest.raises(UsageError, match="pickled encoders are not opened"):
        sources.fetch(str(model(tmp_path / "kl", {"config.json": KL["config.json"], "m.bin": b"pickle"})), "autoencoder")
    with pytest.raises(UsageError, match=r"names b\.safetensors, which is not there"):
        index = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}).encode()
        sources.fetch(str(model(tmp_path / "lost", {"a.safetensors": b"a", "m.safetensors.index.json": index})), "weights")


def test_a_server_that_is_away_is_unreachable(sources: ImportSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.inputs.import_sources.FIRST_PAUSE_S", 0.0)
    with served(Files({})) as files:
        url = files.url
    with pytest.raises(Unreachable, match="Run again"):
        sources.fetch(f"{url}/model.safetensors", "weights")


@pytest.mark.s3
def test_a_model_in_a_bucket_is_the_same_model(s3: Any, sources: ImportSources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.stores.s3 import S3Store

    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    far = S3Store(s3.url("models/t5"))
    for name, data in T5.items():
        far.create(name, data)
    here = sources.fetch(str(model(tmp_path / "t5", T5)), None)
    assert sources.fetch(s3.url("models/t5"), None).digest == here.digest
    single = sources.fetch(s3.url("models/t5/model.safetensors"), "weights")
    assert list(single.files) == ["model.safetensors"]
    with pytest.raises(NotFound):
        sources.fetch(s3.url("models/none"), None)


# --- The hub ----------------------------------------------------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40
LOOK = """
import json, sys
from pathlib import Path
from orchestrator.inputs.import_sources import ImportSources
found = ImportSources(Path(sys.argv[1])).fetch(sys.argv[2], sys.argv[3] or None, renew=sys.argv[4] == "renew")
print(json.dumps([found.role, found.source, found.digest, sorted(found.files), found.licence]))
"""


def of_hub(files: Files, home: Path, source: str, role: str = "", renew: str = "") -> list[Any]:
    env = {
        **os.environ,
        "HF_ENDPOINT": files.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run([sys.executable, "-c", LOOK, str(home), source, role, renew], env=env, capture_output=True, text=True)
    if done.returncode:
        return [done.stderr.strip().splitlines()[-1]]
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
def test_a_model_of_the_hub_is_noted_with_its_commit(tmp_path: Path) -> None:
    card = {"README.md": b"---\nlicense: apache-2.0\n---\n# T5\n", "pytorch_model.bin": b"pickle"}
    commits = {OLD: T5 | card, NEW: T5 | card | {"model.safetensors": b"trained longer"}}
    with served(hub("owner/t5", commits, {"main": OLD}), HUB) as files:
        first = of_hub(files, tmp_path, "owner/t5", "text")
        assert first[:2] == ["text", f"owner/t5@{OLD}"] and first[3:] == [sorted(T5), "apache-2.0"]
        files.files |= hub("owner/t5", commits, {"main": NEW}).files
        assert of_hub(files, tmp_path, "owner/t5", "text") == first, "what this machine has is used as it is"
        assert of_hub(files, tmp_path, "owner/t5", "text", "renew")[1] == f"owner/t5@{NEW}"
        assert of_hub(files, tmp_path, f"owner/t5@{OLD}", "text") == first
        assert "NotFound" in of_hub(files, tmp_path, "owner/none", "text")[0]


# --- Stages -----------------------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, **changes: Any) -> Path:
    path = write(folder, stages=1) / "osctl.yaml"
    (folder / "stage1.yaml").write_text(yaml.safe_dump(stage(1) | changes))
    return path


def resolved(pipeline: Pipeline, store: FolderStore, home: Path, **options: Any) -> Resolved:
    return resolve_contents(pipeline, lambda: store, DataFiles(home), ImportSources(home), **({"needed": True} | options))


def named(name: str) -> dict[str, Any]:
    return {"autoencoder": {"kind": "kl", "path": name, "factor": 4}, "model": stage(1)["model"] | {"latent_channels": 4}}


def test_an_encoder_counts_by_its_files_not_by_its_place(store: FolderStore, tmp_path: Path) -> None:
    first, second = model(tmp_path / "one", KL), model(tmp_path / "two", KL)
    other = model(tmp_path / "three", KL | {"diffusion_pytorch_model.safetensors": b"other"})
    names = [
        name_of(resolved(load(recipe(tmp_path / f"r{place.name}", **named(str(place)))), store, tmp_path).pipeline.stages[0], None)
        for place in (first, second, other)
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("name", "failure"), [("nobody-has-this", Refused), ("no/such-model@v1", Refused), ("/no/such/file.pth", UsageError)]
)
def test_what_nobody_can_reach_is_refused_before_a_device_is_held(
    store: FolderStore, tmp_path: Path, name: str, failure: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = load(recipe(tmp_path / "recipe", weights=name))
    assert pipeline.stages[0].config.weights == name
    with pytest.raises(failure, match=r"no device is held.*osctl weights add [a-z.-]+ SOURCE --as weights"):
        resolved(pipeline, store, tmp_path)
    assert "not known here" in resolved(pipeline, store, tmp_path, needed=False).notes[0]


def test_a_name_in_the_store_is_what_was_added_under_it(store: FolderStore, tmp_path: Path) -> None:
    found = ImportSources(tmp_path).fetch(str(model(tmp_path / "w", {"model.safetensors": b"weights"})), "weights")
    digest = imports.put(store, found.imported, found.files)
    told = {"manifest": digest, "role": "weights", "source": "/w", "licence": "mit", "time": 1.0, "holder": "a@b"}
    imports.add_source(store, imports.Source.model_validate(told | {"name": "pixart"}))
    shutil.rmtree(tmp_path / "w")
    one = resolved(load(recipe(tmp_path / "recipe", weights="pixart")), store, tmp_path)
    assert one.pipeline.stages[0].contents.weights == digest
    places = one.places(store, tmp_path / "cache")
    assert (Path(places["pixart"]) / "model.safetensors").read_bytes() == b"weights"


def test_for_a_cluster_a_local_file_goes_into_the_store(store: FolderStore, tmp_path: Path) -> None:
    file = model(tmp_path / "w", {"PixArt.pth": b"weights"}) / "PixArt.pth"
    local = resolved(load(recipe(tmp_path / "recipe", weights=str(file))), store, tmp_path)
    local.commit(store)
    digest = local.pipeline.stages[0].contents.weights
    assert digest and not imports.is_stored(store, digest), "attempts of this machine use it where it lies"
    settings = {"backend": "kubernetes", "cluster": "kind-cpu", "store": store.url}
    away = resolved(load(recipe(tmp_path / "again", weights=str(file)), overrides=settings), store, tmp_path)
    away.commit(store)
    assert away.pipeline.stages[0].contents.weights == digest and imports.is_stored(store, digest)
    assert [one.source for one in imports.sources_of(store, digest)] == [str(file)]
