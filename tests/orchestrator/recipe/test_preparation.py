"""From what a person typed, or a recipe's `prepare:`, to a resolved PrepareConfig."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
import yaml

from orchestrator.errors import UsageError
from orchestrator.recipe import resolve
from orchestrator.recipe.adapt import on_prepared, with_data
from orchestrator.recipe.preparation import of_typed
from orchestrator.recipe.yaml_file import Document


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Summer 2025").mkdir()
    (tmp_path / "list.csv").write_text("path\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_made_of_the_folder_and_paths_are_absolute(here: Path) -> None:
    one = of_typed("Summer 2025")
    assert one.name == "summer-2025" and one.sources[0].path == str(here / "Summer 2025") and one.sources[0].index is None
    assert of_typed("https://host/films/list.csv").name == "list" and of_typed("list.csv").sources[0].index == "auto"
    assert of_typed(".", name="mine").name == "mine"


def test_what_wins_is_set_over_options_over_the_file(here: Path) -> None:
    (here / "deep").mkdir()
    (here / "deep/prepare.yaml").write_text("name: mine\nworkers: 1\nsources: [{path: raw}]\nfilter: {scores: clip}\nencode: recipe\n")
    (here / "deep/recipe").mkdir()
    one = of_typed("deep/prepare.yaml", own={"workers": 2}, settings=["workers=3", "cut.max_s=5"])
    assert (one.workers, one.cut.max_s) == (3, 5)
    assert one.sources[0].path == str(here / "deep/raw") and one.filter.scores == str(here / "deep/clip")
    assert one.encode == str(here / "deep/recipe")
    assert of_typed("deep/prepare.yaml", own={"workers": 2}).workers == 2


def test_options_make_a_kind_of_captions(here: Path) -> None:
    one = of_typed(".", name="x", own={"caption.kind": "server", "caption.url": "http://h/v1", "caption.model": "m"}, licence="cc0")
    assert one.caption.kind == "server" and one.sources[0].licence == "cc0"
    assert of_typed(".", name="x", settings=["caption={kind: text, text: a film}"]).caption.kind == "text"


@pytest.mark.parametrize(
    ("given", "settings", "said"),
    [
        ("nowhere", (), "no such file or folder"),
        (None, (), "osctl prepare run ~/videos"),
        (".", ('name="nl\\n"',), "no name of a data set"),
        ("/", (), "Give one: --name mine"),
        (".", ("caption_words=[10, 1]",), "caption_words: 10 words at least are more than 1 at most"),
        (".", ("limits.min_side=9000",), "min_side 9000 is more than max_side 8192"),
        (".", ("languages=[German]",), "'German' is no code of a language that captions are told in; give one of ISO 639-1, "),
        (".", ("exclude=[abc]",), "'abc' is no sha256 of a file"),
        (".", ("workers=100000",), "workers: must be at most 1024, found 100000"),
        (".", ("cut",), "KEY=VALUE"),
        (".", (".x=1",), "KEY=VALUE"),
        (".", ("cut.max_s=fast",), "--set cut.max_s=fast"),
        (".", ("caption={kind: server, url: 'http://u:a-long-password@h/v1', model: m}",), "OSCTL_CAPTION_KEY"),
    ],
)
def test_what_is_wrong_is_one_line(here: Path, given: str | None, settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        of_typed(given, name="mine" if given == "." else None, settings=settings)
    assert said in str(caught.value) and "a-long-password" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    content = tiny_recipe.stage(1, prompts=["a box"], evaluate={"kind": "digits", "clips": 4, "frames": 4})
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "osctl.yaml"
    path.write_text("name: tiny\nstages: [{name: one, config: one.yaml}]\nprepare: {sources: [{path: raw}]}\n")
    return path


def test_a_recipe_names_its_raw_videos_and_what_it_prepares_is_called_like_it(recipe: Path) -> None:
    one = resolve.load(recipe)
    assert one.prepare is not None and one.prepare.name == "tiny" and one.prepare.sources[0].path == str(recipe.parent / "raw")
    set_ = resolve.load(recipe, overrides={"prepare.cut.max_s": "3", "prepare.name": "other"}).prepare
    assert set_ is not None and (set_.cut.max_s, set_.name) == (3, "other")
    with pytest.raises(UsageError, match=r"osctl\.yaml:3: .*speed"):
        recipe.write_text(recipe.read_text().replace("{path: raw}]", "{path: raw, speed: 1}]"))
        resolve.load(recipe)


def test_a_recipe_without_raw_videos_is_what_older_releases_wrote(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().partition("prepare:")[0])
    assert "prepare" not in resolve.load(recipe).model_dump(mode="json")


def test_one_field_of_a_file_that_a_recipe_names_is_set_and_the_rest_of_the_file_stays(recipe: Path) -> None:
    """Paths of the file stay relative to it, a typed one is as everywhere in a recipe's `prepare:`."""
    (recipe.parent / "deep").mkdir()
    (recipe.parent / "deep/prepare.yaml").write_text("sources: [{path: raw, licence: cc-by}]\ncut: {max_s: 9, min_s: 1}\nworkers: 3\n")
    recipe.write_text(recipe.read_text().partition("prepare:")[0] + "prepare: deep/prepare.yaml\n")
    plain = resolve.load(recipe).prepare
    one = resolve.load(recipe, overrides={"prepare.cut.max_s": "4", "prepare.workers": "2"}).prepare
    assert plain is not None and one is not None
    assert (one.cut.max_s, one.workers) == (4, 2)
    assert one.model_copy(update={"cut": plain.cut, "workers": 3}) == plain
    assert one.sources[0].path == str(recipe.parent / "deep/raw") and one.cut.min_s == plain.cut.min_s == 1
    with pytest.raises(UsageError, match=r"--set prepare\.cut\.longest=4"):
        resolve.load(recipe, overrides={"prepare.cut.longest": "4"})


def test_what_was_launched_does_not_prepare_otherwise(recipe: Path) -> None:
    with pytest.raises(UsageError, match="prepared already"):
        resolve.changed(resolve.load(recipe), {"prepare.cut.max_s": "3"})
    assert resolve.changed(resolve.load(recipe), {"one.steps": "3"}).prepare == resolve.load(recipe).prepare


def test_a_recipe_of_raw_videos_keeps_its_prompts_and_its_judge_and_data_typed_instead_prepares_nothing(recipe: Path) -> None:
    from opensora.config import FolderSource

    one = resolve.load(recipe)
    on = on_prepared(one, "/store/datasets/tiny/prepared/1").stages[0].config
    assert on.data.source == FolderSource(kind="folder", path="/store/datasets/tiny/prepared/1")
    assert on.prompts == ("a box",) and on.evaluate is not None
    other = with_data(one, FolderSource(kind="folder", path=os.sep), ["a film"])
    assert other.prepare is None and other.stages[0].config.evaluate is None


def test_ten_times_as_many_sources_are_no_more_copies_of_the_document(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `with_value` copies the list of sources; a list of 30,000 took hours."""
    copies = [0]
    real = Document.with_value

    def counted(self: Document, *words: Any) -> Document:
        copies[0] += 1
        return real(self, *words)

    monkeypatch.setattr(Document, "with_value", counted)

    def of(count: int) -> int:
        copies[0] = 0
        (here / "many.yaml").write_text("name: many\nsources:\n" + "".join(f"  - {{path: raw{n}}}\n" for n in range(count)))
        config = of_typed("many.yaml", env={})
        assert [one.path for one in config.sources] == [str(here / f"raw{n}") for n in range(count)]
        return copies[0]

    assert of(100) == of(10)
