"""Commands that only look, over stores in which anything may lie: one remark for what cannot be read, and everything else is shown."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proofs import Proof
from tiny_recipe import write
from written_ledger import Writer

from orchestrator.cli import main
from orchestrator.cli.process import INTERNAL
from orchestrator.ledger.store import Ledger
from orchestrator.recipe import adapt, resolve
from orchestrator.stores.folder import FolderStore

EXIT_CODES = (0, 1, 2, 3, 4, 5)
LOOKS = (
    ("list",), ("status",), ("cost",), ("compare",), ("lineage",), ("lineage", "--verify"), ("logs",), ("events",), ("plan",),
    ("launch", "--dry-run"), ("cancel",),
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def remarks(self) -> list[str]:
        return [line.removeprefix("remark: ") for line in self.err.splitlines() if line.startswith("remark: ")]


@dataclass(frozen=True)
class Place:
    """A recipe and a store with two pipelines: `tiny`, which is damaged, and `whole`, which is not."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / ".osctl" / "store"

    def path(self, pattern: str) -> Path:
        """The one object of `tiny` whose path ends so."""
        [found] = (self.store / "tiny").glob(f"**/{pattern}")
        return found

    def __call__(self, *arguments: str) -> Said:
        """`osctl` in this process, where an exception that `main` does not expect is one of the test."""
        out, err = io.StringIO(), io.StringIO()
        argv, here = sys.argv, Path.cwd()
        sys.argv = ["osctl", *arguments]
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
            assert code != INTERNAL, err.getvalue()
        finally:
            sys.argv = argv
            os.chdir(here)
        return Said(code, out.getvalue(), err.getvalue())

    def rows(self) -> dict[str, dict[str, Any]]:
        said = self("list", "-o", "json")
        assert said.code == 0, said.err
        return {row["name"]: row for row in json.loads(said.out)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 is committed; of stage 2 one attempt is lost and another one is open, each with a checkpoint."""
    folder = write(tmp_path_factory.mktemp("written") / "recipe", changes={"steps": 30})
    pipeline = adapt.on_devices(resolve.load(folder / "osctl.yaml", overrides={}, env={}), 0)
    for name in ("tiny", "whole"):
        ledger = Ledger(FolderStore(folder / ".osctl" / "store"), name)
        writer = Writer(ledger, pipeline.model_copy(update={"name": name}))
        writer.launch()
        writer.finish(writer.begin("stage1"))
        lost = writer.begin("stage2")
        writer.train(lost, 15)
        writer.publish(lost, 10)
        ledger.append_log(lost, 0, 0, b"step 1\nstep 2\n", writer.now)
        writer.close(lost, "lost", silent_s=1.5)
        running = writer.begin("stage2", resume=10)
        writer.train(running, 25)
        writer.publish(running, 20)
        ledger.append_log(running, 0, 0, b"step 11\nstep 12\n", writer.now)
        writer.end("suspended")
    return folder


@pytest.fixture
def place(written: Path, tmp_path: Path) -> Place:
    return copied(written, tmp_path)


def copied(written: Path, folder: Path) -> Place:
    shutil.copytree(written, folder / "recipe")
    return Place(folder / "recipe")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HALF = b'{"schema": 1, "run'
OBJECTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "half written": (lambda path: path.write_bytes(HALF), "is half written", "put back the copy"),
    "empty": (lambda path: path.write_bytes(b""), "is empty", "put back the copy"),
    "nothing but zeros": (lambda path: os.truncate(path, 0) or os.truncate(path, 4096), "4096 bytes of nothing", "put back the copy"),
    "100 MB": (lambda path: os.truncate(path, 100_000_000), "100000000 bytes", "move it"),
    "of a newer schema": (lambda path: edit(path, schema=2), "its schema is 2, and this one reads schema 1", "upgrade osctl"),
    "of an older schema": (lambda path: edit(path, schema=0), "before 0.1.0", "the release that wrote it"),
    "with an unknown field": (lambda path: edit(path, wings=2), "it has the field wings", "upgrade osctl"),
    "text": (lambda path: path.write_text("read me"), "is not osctl's", "left alone"),
    "other JSON": (lambda path: path.write_text('{"jobs": []}'), "is not osctl's", "left alone"),
    "no UTF-8": (lambda path: path.write_bytes(b'{"schema": 1, "\xff": 1}'), "was changed after it was written", "put back the copy"),
    "a link": (lambda path: path.unlink() or path.symlink_to("/etc/passwd"), "", ""),
}


@pytest.mark.parametrize(
    ("object_", "name"),
    [("revisions/000001.json", name) for name in OBJECTS if name != "a link"]
    + [(where, "half written") for where in ("stage1@*/COMMITTED.json", "step-00000020-a2/MANIFEST.json")],
)
def test_what_cannot_be_read_is_one_remark_with_what_to_do(place: Place, name: str, object_: str) -> None:
    damage, fact, advice = OBJECTS[name]
    path = place.path(object_)
    damage(path)
    key = path.relative_to(place.store).as_posix()
    for said in (place("list"), place("status")):
        assert said.code == 0, said.err
        [remark] = [line for line in said.remarks if key in line]
        assert fact in remark and advice in remark, remark
    row = json.loads(place("list", "-o", "json").out)
    assert [one["remark"] is None for one in row] == [False, True], "whole has none"
    shown = json.loads(place("status", "-o", "json").out)
    assert any(key in remark for remark in shown["remarks"])


def test_a_pipeline_of_another_release_is_one_line_of_the_list_and_the_others_are_shown(place: Place) -> None:
    path = place.path("revisions/000001.json")
    revision = json.loads(path.read_text())
    revision["pipeline"]["stages"][0]["spec"]["wings"] = 2
    path.write_text(json.dumps(revision))
    rows = place.rows()
    assert rows["tiny"]["state"] == "unreadable" and "wings" in rows["tiny"]["remark"] and "upgrade osctl" in rows["tiny"]["remark"]
    assert (rows["whole"]["state"], rows["whole"]["stages"], rows["whole"]["remark"]) == ("suspended", "1/3", None)
    status = place("status")
    assert status.code == 0 and "wings" in status.err and "shown is what the file says" in status.err
    assert place("logs").code == 0 and "step 11" in place("logs").out


def test_a_pipeline_of_a_newer_release_is_never_written_to(place: Place) -> None:
    edit(place.path("revisions/000001.json"), wings=2)
    before = sorted((place.store / "tiny").rglob("*"))
    for command in ("launch", "resume"):
        said = place(command, "-q")
        assert said.code == 4 and "000001.json" in said.err and "upgrade osctl" in said.err, said.err
    assert sorted((place.store / "tiny").rglob("*")) == before


def test_an_earlier_launch_is_shown_where_the_last_cannot_be_read(place: Place) -> None:
    (place.store / "tiny/revisions/000002.json").write_bytes(HALF)
    row = place.rows()["tiny"]
    assert (row["state"], row["stages"]) == ("suspended", "1/3") and "000002.json is half written" in row["remark"]
    assert "shown is the one before it" in place("status").err
    assert place("resume", "-q").code == 4


def test_cancel_needs_the_lease_alone(place: Place) -> None:
    place.path("revisions/000001.json").write_bytes(HALF)
    ledger = Ledger(FolderStore(place.store), "tiny")
    held = ledger.acquire(1_900_000_000.0)  # long after this test, so that it lives
    assert place("cancel").code == 0
    held.release()
    [event] = [event for event in ledger.events() if event.kind == "cancel"]
    assert event.epoch == held.epoch


FOREIGN = ("README.txt", "000001.json.bak", "000001 (1).json", "notes.json")
LITTER = (".DS_Store", "Thumbs.db", "._x", "x~", "_SUCCESS")


@pytest.mark.parametrize("folder", ["revisions", "events", "stages/{stage}/attempts/2/journal", "stages/{stage}/attempts/2/log"])
def test_foreign_objects_are_named_and_left_alone(place: Place, folder: str) -> None:
    stage = place.path("stage2@*").name
    paths = [place.store / "tiny" / folder.format(stage=stage) / name for name in FOREIGN]
    for path in paths:
        path.write_text("{}")
    for name in LITTER:
        paths[0].with_name(name).touch()
    said = {command: place(command) for command in ("status", "list", "logs", "events")}
    assert [one.code for one in said.values()] == [0, 0, 0, 0]
    assert not any(name in one.err for name in LITTER for one in said.values()), "passed over without a word"
    for path in paths if not folder.endswith("log") else ():
        [remark] = [line for line in said["status"].remarks if f"{path.name} is not osctl's" in line]
        assert "left alone" in remark
    assert [path.read_text() for path in paths] == ["{}"] * len(FOREIGN)


def test_folders_that_are_no_pipelines_are_told_from_those_that_are(place: Place) -> None:
    for key in ("photos/one.jpg", "tiny/stages/stage3/notes.txt", "tiny/stages/stage1@/x", "tiny/stages/a\\b@c/x", "b\\c/d"):
        path = place.store / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for name in ("datasets/mine/manifest.json", "weights/t5/manifest.json"):
        (place.store / name).parent.mkdir(parents=True)
        (place.store / name).write_text("{}")
    assert list(place.rows()) == ["tiny", "whole"]
    said = place("list")
    assert "photos/ is not osctl's" in said.err and "datasets" not in said.err and "weights" not in said.err
    assert place("status").code == 0


@pytest.mark.parametrize("name", ["datasets", "weights"])
def test_a_pipeline_has_no_name_of_the_stores_own(place: Place, name: str) -> None:
    path = place.folder / "osctl.yaml"
    path.write_text(path.read_text().replace("name: tiny", f"name: {name}"))
    said = place("plan")
    assert said.code == 2 and name in said.err and "another name" in said.err


def test_an_attempt_whose_records_are_damaged_is_shown(place: Place) -> None:
    place.path("stage2@*/attempts/1/outcome.json").write_bytes(HALF)
    place.path("stage2@*/attempts/2/intent.json").write_bytes(HALF)
    stage = json.loads(place("status", "-o", "json").out)["stages"][1]
    assert [(one["attempt"], one["state"]) for one in stage["attempts"]] == [(1, "lost"), (2, "unreadable")]
    assert "outcome.json is half written" in stage["attempts"][0]["reason"]
    assert "its cost is not counted" in stage["attempts"][1]["reason"] and stage["state"] == "ready"
    assert "step 11" in place("logs").out, "what was written outlives the intent"


def test_a_damaged_result_is_that_stages_alone(place: Place) -> None:
    place.path("stage1@*/COMMITTED.json").write_bytes(HALF)
    stages = json.loads(place("status", "-o", "json").out)["stages"]
    assert [stage["state"] for stage in stages] == ["failed", "blocked", "blocked"]
    assert "COMMITTED.json is half written" in stages[0]["why"]
    said = place("lineage", "--verify")
    assert said.code == 4 and "COMMITTED.json" in said.err
    assert place.rows()["whole"]["stages"] == "1/3"


# Whatever lies there


def values() -> st.SearchStrategy[Any]:
    plain = st.sampled_from([None, True, -1, 0, 10**30, 1e300, float("nan"), "", "x", "../..", "\x00", [], {}, [[]], {"a": {"b": []}}])
    return plain | st.integers() | st.text(max_size=3)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Place], None]:
    """One damage to one object of `tiny`, or one object too many in one of its folders."""
    kind = draw(st.sampled_from(["object", "bytes", "cut", "deep", "deep", "deep", "gone", "folder", "neighbour", "blocked"]))
    number = draw(st.integers(0, 10**6))
    ways = list(OBJECTS.values())
    way, share, data = draw(st.sampled_from(ways)), draw(st.floats(0, 1)), draw(st.binary(max_size=40))
    value, picks, drop = draw(values()), draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6)), draw(st.booleans())
    name = draw(
        st.sampled_from([*FOREIGN, "stage1", "01", "0", "x@y", "9" * 40, "a\\b", "\x01", "é", "000001-000000-1.txt", "report-x.json"])
    )

    def damage(place: Place) -> None:
        objects = sorted(path for path in (place.store / "tiny").rglob("*") if path.is_file() and "@" not in path.name)
        path = objects[number % len(objects)]
        content = path.read_bytes()
        match kind:
            case "object":
                with contextlib.suppress(ValueError):  # a text has no fields to edit
                    way[0](path)
            case "bytes":
                path.write_bytes(data)
            case "cut":
                path.write_bytes(content[: int(share * len(content))])
            case "deep" if path.suffix == ".json":
                path.write_text(json.dumps(changed(json.loads(content), picks, value, drop=drop)))
            case "gone":
                path.unlink()
            case "folder":
                path.unlink()
                path.mkdir()
                (path / name).write_bytes(content)
            case "neighbour":
                other = path.parent / name
                if not other.exists():
                    other.write_bytes(content)
            case "blocked" if path.parent != place.store / "tiny":
                shutil.rmtree(path.parent)
                path.parent.write_bytes(content)
            case _:
                path.write_bytes(data)

    return damage


def changed(content: Any, picks: list[int], value: Any, *, drop: bool) -> Any:
    """The same JSON with another value somewhere, or without it."""
    if not picks or not isinstance(content, dict | list) or not content:
        return value
    places = sorted(content) if isinstance(content, dict) else list(range(len(content)))
    place, inner = places[picks[0] % len(places)], content[places[picks[0] % len(places)]]
    if drop and (len(picks) == 1 or not isinstance(inner, dict | list)):
        del content[place]
    else:
        content[place] = changed(inner, picks[1:], value, drop=drop)
    return content


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("scratch")


CALM: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@pytest.mark.long
@settings(max_examples=5, derandomize=True, **CALM)
@given(damage=damages())
def test_whatever_lies_in_the_store_no_look_ends_in_a_traceback(written: Path, scratch: Path, damage: Callable[[Place], None]) -> None:
    looked_at(written, scratch, damage)


@pytest.mark.prove("damages")
@pytest.mark.timeout(3000)
@settings(max_examples=200, **CALM)
@given(damage=damages())
def test_whatever_lies_in_the_store_of_hundreds_of_damages_no_look_ends_in_a_traceback(
    written: Path, scratch: Path, proof: Proof, damage: Callable[[Place], None]
) -> None:
    looked_at(written, scratch, damage)
    proof.count()


def looked_at(written: Path, scratch: Path, damage: Callable[[Place], None]) -> None:
    place = copied(written, scratch / uuid.uuid4().hex)
    try:
        damage(place)
        for command in LOOKS:
            said = place(*command)
            assert said.code in EXIT_CODES and len(said.errors) == (said.code != 0), (command, said)
            if command == ("list",):
                assert said.code == 0 and "whole" in said.out, said
        whole = place.rows()["whole"]
        assert (whole["state"], whole["stages"], whole["remark"]) == ("suspended", "1/3", None)
    finally:
        shutil.rmtree(place.folder.parent)
