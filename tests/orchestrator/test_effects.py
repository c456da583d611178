"""Whatever changes the outside world goes through one port: numbered, told before and after, and nothing goes around it."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from orchestrator import effects
from orchestrator.effects import KINDS, Effect, perform
from orchestrator.errors import Unreachable

PACKAGE = Path(effects.__file__).parent


class Recorder:
    """Remembers what it is told, and fails where it is told to."""

    def __init__(self, before: Exception | None = None, after: Exception | None = None) -> None:
        self.told: list[str] = []
        self._before, self._after = before, after

    def before(self, effect: Effect) -> None:
        self.told.append(f"before {effect.number} {effect.kind} {effect.subject}")
        if self._before:
            raise self._before

    def after(self, effect: Effect, answer: object) -> None:
        self.told.append(f"after {effect.number} {answer}")
        if self._after:
            raise self._after


def test_a_witness_is_told_before_and_after_each_effect_by_number() -> None:
    witness = Recorder()
    with effects.watched_by(witness):
        assert perform("store.create", "a", lambda: 1) == 1
        with effects.unwatched():
            perform("store.create", "of somebody else", lambda: 2)
        assert perform("process.kill", "b", lambda: 3) == 3
    perform("store.create", "after the watch", lambda: 4)
    assert witness.told == ["before 1 store.create a", "after 1 1", "before 2 process.kill b", "after 2 3"]


def test_an_effect_can_be_kept_from_being_done_and_its_answer_can_be_lost() -> None:
    done: list[int] = []
    with effects.watched_by(Recorder(before=Unreachable("away"))), pytest.raises(Unreachable):
        perform("store.create", "a", lambda: done.append(1))
    assert done == []
    with effects.watched_by(Recorder(after=Unreachable("away"))), pytest.raises(Unreachable):
        perform("store.create", "a", lambda: done.append(1))
    assert done == [1]


def test_an_effect_that_fails_is_not_told_as_done() -> None:
    witness = Recorder()

    def fail() -> None:
        raise Unreachable("away")

    with effects.watched_by(witness), pytest.raises(Unreachable):
        perform("store.create", "a", fail)
    assert witness.told == ["before 1 store.create a"]


# --- Nothing goes around the port --------------------------------------------------------------------------------------------------

S3 = {
    "put_object", "copy", "copy_object", "upload_part_copy", "create_multipart_upload", "upload_part", "complete_multipart_upload",
    "abort_multipart_upload", "delete_object", "delete_objects", "upload_file", "upload_fileobj", "put_object_tagging",
}  # fmt: skip
MLFLOW = {
    "create_experiment", "restore_experiment", "create_run", "log_batch", "log_metric", "log_param", "set_tag", "update_run",
    "set_terminated", "delete_run", "restore_run", "log_inputs", "log_artifact", "log_artifacts", "create_registered_model",
    "create_model_version", "set_registered_model_alias", "delete_registered_model_alias", "delete_model_version", "log_dict", "log_text",
}  # fmt: skip
FOLDER = {"_link", "link", "symlink", "unlink", "rename", "replace", "rmdir", "rmtree", "remove", "write_bytes", "write_text"}
PROCESSES = {"Popen", "_signal", "_order", "kill", "killpg", "pidfd_send_signal", "send_signal", "terminate"}

RULES: dict[str, set[str]] = {
    "stores/s3.py": S3, "stores/s3_requests.py": S3, "inputs": S3, "cli": S3, "ledger": S3,
    "stores/folder.py": FOLDER,
    "tracking": MLFLOW,
    "local/backend.py": PROCESSES - {"kill"},
    "agent/trainer_process.py": PROCESSES,
    "prepare": (PROCESSES - {"kill"}) | S3,
}  # fmt: skip
"""By file or folder, the names of calls that change the outside world."""

PRIVATE = {
    "stores/folder.py": {
        "_link": "the effect itself",
        "_temporary": "a draft below .tmp",
        "_clear": "generations that no reader looks at",
        "download": "a file of this machine",
        "probe": "drafts below .tmp",
        "_remove": "the effect itself",
    },
    "local/backend.py": {"_signal": "the effect itself", "_start": "its own submitted.json, of an agent that was not started"},
    "agent/trainer_process.py": {"__init__": "the guard, which starts nothing by itself", "_order": "the effect itself"},
}
"""By file, functions whose calls are no effect, and why."""


def files(place: str) -> list[Path]:
    path = PACKAGE / place
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def around(source: str, names: set[str], private: Collection[str] = ()) -> Iterator[str]:
    """Calls of these names outside of `perform(…)`, as "line function name"; `private`: functions that are not looked into.

    `partial(call, …)` counts as a call, and as one within `perform` where the name that it is given is an argument of `perform`.
    """

    def walk(node: ast.AST, function: ast.FunctionDef | None, inside: bool) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            if node.name in private:
                return
            function = function or node
        if isinstance(node, ast.Assign) and function is not None and isinstance(target := node.targets[0], ast.Name):
            inside = inside or target.id in handed_over(function)
        if isinstance(node, ast.Call):
            called = named(node.func)
            if called == "partial" and node.args:
                called = named(node.args[0])
            inside = inside or named(node.func) == "perform"
            if called in names and not inside:
                yield f"{node.lineno} {function.name if function else '-'} {called}"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, inside)

    yield from walk(ast.parse(source), None, False)


def named(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def handed_over(function: ast.FunctionDef) -> set[str]:
    """Names that a function hands to `perform`."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and named(node.func) == "perform"]
    return {named(argument) for call in calls for argument in call.args}


@pytest.mark.parametrize("place", RULES)
def test_no_call_that_changes_the_outside_world_goes_around_the_port(place: str) -> None:
    found = []
    for path in files(place):
        name = str(path.relative_to(PACKAGE))
        found += [f"{name}: {line}" for line in around(path.read_text(), RULES[place], PRIVATE.get(name, ()))]
    assert not found, "\n".join(found)


def test_the_law_above_sees_a_call_that_goes_around() -> None:
    source = """
def good(client):
    perform("store.create", "k", lambda: client.put_object())
    make = partial(client.put_object, 1)
    perform("store.create", "k", make)

def bad(client):
    perform("store.create", "k", lambda: 1)
    client.put_object()
    partial(client.put_object, 1)()

def private(client):
    client.put_object()
"""
    assert list(around(source, S3, {"private"})) == ["9 bad put_object", "10 bad put_object"]


def test_a_cluster_is_changed_by_three_calls_of_one_client_alone() -> None:
    """Whatever is sent to an API server goes through `Api._ask`; requests that change something are in `perform`, or are a question."""
    found = []
    for path in files("kube"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and named(call.func) in ("_ask", "_send", "call_api"):
                        method = next((one.value for one in call.args if isinstance(one, ast.Constant) and one.value in METHODS), "")
                        found.append((path.name, node.name, method))
    writes = sorted({(name, function, method) for name, function, method in found if method not in ("", "GET")})
    assert writes == [
        ("client.py", "can_i", "POST"),  # a question
        ("client.py", "create", "POST"),
        ("client.py", "delete", "DELETE"),
        ("client.py", "patch", "PATCH"),
    ]
    source = (PACKAGE / "kube/client.py").read_text()
    assert source.count('perform("cluster.') == 3


METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def test_every_kind_has_a_place_and_every_place_a_kind() -> None:
    used = set()
    for path in files(""):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                used |= {one.value for one in node.args if isinstance(one, ast.Constant) and one.value in KINDS}
    assert used == set(KINDS)


def test_the_contract_lists_every_kind() -> None:
    page = (PACKAGE.parent / "docs/contracts.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []
