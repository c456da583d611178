"""Laws of commands: what is printed names what was typed, and nothing that was typed may be empty."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from tiny_recipe import OSCTL

from orchestrator.cli import typed
from orchestrator.cli.commands import app
from orchestrator.cli.typed import Command, Typed
from orchestrator.errors import OsctlError, UsageError

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def parse(*words: str) -> Typed:
    """What a command line means, without running it."""
    context = ROOT.make_context("osctl", list(words))
    name, command, rest = ROOT.resolve_command(context, [*context._protected_args, *context.args])
    while hasattr(command, "commands"):
        context = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest, parent=context)
    return typed.typed()


def test_every_command_is_one_of_ours() -> None:
    assert all(isinstance(command, Command) for _, command in commands())


VALUES = [
    (words, parameter)
    for words, command in commands()
    for parameter in command.params
    if parameter.param_type_name == "argument" or not getattr(parameter, "is_flag", False)
]


@pytest.mark.parametrize("empty", ["", " ", "\t\n"], ids=["empty", "blank", "blanks"])
@pytest.mark.parametrize(("words", "parameter"), VALUES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.name)
def test_no_argument_of_any_command_may_be_empty(words: tuple[str, ...], parameter: Any, empty: str) -> None:
    arguments = [each for each in dict(commands())[words].params if each.param_type_name == "argument"]
    is_option = parameter not in arguments
    given = [max(parameter.opts, key=len), empty] if is_option else ["x"] * arguments.index(parameter) + [empty]
    with pytest.raises(UsageError, match="is empty") as error:
        parse(*words, *given)
    assert str(error.value).startswith(given[0] if is_option else "") and error.value.exit_code == 2


@pytest.mark.parametrize(
    ("line", "text", "shown"),
    [
        ("launch", "Run: osctl launch stage1", "Run: osctl launch stage1"),
        ("launch -f own --data 'my clips'", "Run: osctl launch stage1", "Run: osctl launch -f own --data 'my clips' stage1"),
        ("launch -f own --data clips --store s", "`osctl logs stage1` shows it", "`osctl logs --file own --store s stage1` shows it"),
        ("launch --set name=x --set a.steps=3", "see: osctl status -o json", "see: osctl status x -o json"),
        ("launch --set name=x --set a.steps=3", "osctl sample 'a b'", "osctl sample -f x 'a b'"),
        ("launch --set name=x", "osctl logs stage1", "osctl logs x stage1"),
        ("launch --set store=s", "next: osctl cost | osctl list", "next: osctl cost --store s | osctl list --store s"),
        ("launch --tracking none", "osctl mlflow | osctl cost", "osctl mlflow --tracking none | osctl cost"),
        ("launch --data c", "`osctl resume` goes on", "`osctl resume` goes on"),
        ("launch --set a.lr=2", "`osctl launch a --set a.lr=1`", "`osctl launch a --set a.lr=1`"),
        ("launch --set a.lr=2 --set a.steps=3", "`osctl launch a --set a.lr=1`", "`osctl launch --set a.steps=3 a --set a.lr=1`"),
        ("launch --store s", "osctl data register n p --store t", "osctl data register n p --store t"),
        ("status -f own", "an osctl before 0.1.0; osctl is", "an osctl before 0.1.0; osctl is"),
        ("launch --cluster 'my pool.yaml' --foreground", "osctl resume", "osctl resume --cluster 'my pool.yaml' --foreground"),
        (
            "launch --store s",
            "next: osctl cost | osctl sample 'a man types osctl launch -f x and osctl logs s1. Then'\"'\"'osctl cost'",
            "next: osctl cost --store s | osctl sample --store s 'a man types osctl launch -f x and osctl logs s1. Then'\"'\"'osctl cost'",
        ),
        (
            "launch --store s",
            "the trainer's osctl logs, a node's `osctl cost`",
            "the trainer's osctl logs --store s, a node's `osctl cost --store s`",
        ),
        ("status x", "left out osctl\\x20cancel.mp4: empty", "left out osctl\\x20cancel.mp4: empty"),
        ("weights list --store s", "with: osctl weights add NAME SOURCE", "with: osctl weights add --store s NAME SOURCE"),
    ],
)
def test_a_printed_command_names_what_was_typed(line: str, text: str, shown: str) -> None:
    one = parse(*shlex.split(line))
    assert one.expanded(text) == shown
    assert one.expanded(shown) == shown, "what is whole already stays"


@pytest.mark.parametrize(
    ("line", "text", "shown"),
    [
        ("status", "`osctl launch` goes on", "`osctl resume` goes on"),
        ("status -f own", "`osctl launch s1 --set s1.lr=1` trains", "`osctl resume -f own --stage s1 --set s1.lr=1` trains"),
        ("resume --set s1.lr=2", "anew: osctl launch --anew s1", "anew: osctl resume --set s1.lr=2 --anew s1"),
        ("diff --data c", "osctl launch --dry-run shows", "osctl launch --data c --dry-run shows"),
        ("launch --data c", "`osctl launch s1`", "`osctl launch --data c s1`"),
        ("status -f own", "osctl launch --data s3://b/c", "osctl launch -f own --data s3://b/c"),
    ],
)
def test_to_go_on_with_what_was_launched_is_resume(line: str, text: str, shown: str) -> None:
    one = parse(*shlex.split(line))
    one.launched = ("s1",)
    assert one.expanded(text) == shown


def test_a_pipeline_that_was_named_by_its_name_in_the_store_is_named_so_again() -> None:
    one = parse("status", "demo", "--store", "s3://b/runs")
    one.name, one.launched = "demo", ("s1",)
    assert one.expanded("`osctl launch s1`") == "`osctl resume demo --store s3://b/runs --stage s1`"
    assert one.expanded("osctl launch --data c") == "osctl launch -f demo --store s3://b/runs --data c", "resume takes no --data"
    assert one.expanded("osctl logs s1") == "osctl logs demo --store s3://b/runs s1"
    assert one.expanded("osctl export DIR") == "osctl export -f demo --store s3://b/runs DIR"


def test_a_plan_is_asked_of_a_recipe_and_never_of_a_name_in_the_store() -> None:
    """No recipe of that name need be there: what was launched has `resume`, and its state `status`."""
    one = parse("status", "mine", "--store", "s")
    one.name, one.launched = "mine", ("s1",)
    assert one.expanded("see: osctl launch --dry-run") == "see: osctl status mine --store s"
    assert one.expanded("`osctl launch s1 --dry-run` shows") == "`osctl status mine --store s` shows"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_is_finite(value: str) -> None:
    with pytest.raises((OsctlError, Exception)) as error:
        parse("sample", "a box", f"--guidance={value}")
    assert getattr(error.value, "exit_code", None) == 2


def test_an_argument_is_text(tmp_path: Path) -> None:
    done = subprocess.run([OSCTL, "status", "--store", b"\xff"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "0xff" in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["OSCTL_HOME", "OSCTL_STORE", "OSCTL_FILE", "OSCTL_LATENTS", "OSCTL_S3_PATIENCE_S", "OSCTL_CLUSTER", "HOME"]
)
def test_an_empty_variable_is_not_set_here_and_in_children(name: str, tmp_path: Path) -> None:
    code = "import os, sys; from orchestrator import environment; environment.unset_empty(os.environ); sys.exit(sys.argv[1] in os.environ)"
    assert subprocess.run([sys.executable, "-c", code, name], env={**os.environ, name: " "}).returncode == 0
    done = subprocess.run([OSCTL, "status"], cwd=tmp_path, env={**os.environ, name: ""}, capture_output=True, text=True)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
