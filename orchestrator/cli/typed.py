"""The command that a person typed, and the commands that are printed for them to paste.

Drivers, agents and the ledger write the next step as short as it is (`osctl logs stage1`): whoever reads it stands in another folder, and
named the pipeline in another way, than whoever wrote it. What is printed here gets the options with which this person named pipeline and
store, as far as the printed command takes them. After a launch that was looked at, or found by its name in a store, to go on means
`osctl resume`: the recipe at hand need not be what was launched.

Owns also what no argument may be: empty, or no text. Refuses to touch words that are no command of osctl: what stands in the quotes of a
shell is an argument, as a prompt of `osctl sample 'a man types osctl cost'`; names and captions in a sentence come from
`opensora.printable.quoted`, which leaves no command in them.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import typer
import typer.core

from orchestrator.errors import UsageError

NAMES = ("file", "store", "cluster", "tracking", "backend", "data", "settings", "prices", "foreground")
"""Parameters that say which pipeline, on what, where and as what; in this order they are printed."""
SET = ("store", "cluster", "tracking")
"""Options that `--set KEY=` stands for, where the printed command takes no `--set`."""
_COMMAND = re.compile(
    r"(?<![/\w.-])osctl (?P<verb>(?:data|weights|prepare) [a-z]+|[a-z]+)(?![\w-]|\.\w)(?P<stage> [a-z][a-z0-9.-]*(?![\w./-]))?"
)
_END = re.compile(r"[`\n]| \| |\bosctl |\. (?=[A-Z])")
"""What ends a command within a sentence."""
_QUOTED = re.compile(r"""(?<=[\s=])'[^'\n]*'(?:"'"'[^'\n]*')*""")
"""As `shlex.quote` writes an argument; an apostrophe stands behind a letter."""


@dataclass
class Typed:
    """A command line, and what it turned out to mean."""

    verb: str
    given: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that stood on the command line, by name."""
    verbs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Each command's parameters: the option, or nothing where the parameter is an argument."""
    name: str | None = None
    """The pipeline in its store, where it was named so and not by a recipe."""
    store: str | None = None
    """The store of that pipeline."""
    launched: tuple[str, ...] = ()
    """Stages of the last launch, where that is what the command is about."""

    def options(self, verb: str, rest: str = "") -> str:
        """What stands behind `osctl VERB` so that it means the same pipeline in the same store. `rest`: what stands there already."""
        takes = self.verbs.get(verb, {})
        as_typed = "settings" in takes and (verb != "resume" or self.verb == "resume")  # what was launched has them already
        settings = dict(one.partition("=")[::2] for one in map(str, self.given.get("settings") or ()))
        name = self.name or (None if as_typed else settings.get("name"))
        parts = [shlex.quote(name)] if name is not None and "pipeline" in takes else []
        for parameter in NAMES:
            value = self.given.get(parameter)
            if parameter not in takes or (parameter in ("settings", "data") and not as_typed):
                continue
            if parameter == "file" and name is not None:
                value = None if "pipeline" in takes else name
            elif parameter in SET and not as_typed and parameter in settings:
                value = settings[parameter]
            elif parameter == "store" and value is None and name is not None and self.given.get("file") not in (None, name):
                value = self.store  # as the recipe says, which is named no more
            for one in value if isinstance(value, list | tuple) else (value,):
                if one not in (None, False):
                    parts.append(takes[parameter] + ("" if one is True else f" {shlex.quote(str(one))}"))
        return "".join(f" {part}" for part in parts if not _holds(rest, part))

    def resumes(self, verb: str) -> bool:
        """Whether a printed `launch` is to be a `resume`: this command is about what was launched, whatever the recipe at hand says."""
        about_launched = self.name is not None or self.verb == "resume" or "settings" not in self.verbs.get(self.verb, {})
        return verb == "launch" and bool(self.launched) and about_launched

    def _of_launch_alone(self, after: str) -> bool:
        """Whether an option stands behind a printed `launch` that `resume` does not take: `--data`, for other clips than were launched."""
        options = set(self.verbs["launch"].values()) - set(self.verbs["resume"].values())
        return any(word in options for word in after.split())

    def expanded(self, text: str) -> str:
        """The text with each command of osctl as this person has to type it."""
        bare = _QUOTED.sub(lambda match: "'" * len(match[0]), text)
        found = [match for match in _COMMAND.finditer(bare) if match["verb"] in self.verbs]
        for match in reversed(found):
            verb, stage = match["verb"], match["stage"] or ""
            end = _END.search(bare, match.end("verb"))
            after = text[match.end() : end.start() if end else len(text)]
            stop = match.end()
            if verb == "launch" and "--dry-run" in after and self.name is not None:
                verb, stage = "status", ""  # a plan wants a recipe, and of what was named by its name none need be at hand
                stop = text.index("--dry-run", stop) + len("--dry-run")
            elif self.resumes(verb) and "--dry-run" not in after and not self._of_launch_alone(after):
                chosen = stage.strip() in self.launched
                verb, stage = "resume", f" --stage{stage}" if chosen else stage
            command = f"osctl {verb}{self.options(verb, stage + text[stop : end.start() if end else len(text)])}{stage}"
            text = text[: match.start()] + command + text[stop:]
        return text


def _holds(rest: str, part: str) -> bool:
    """Whether a command has this already: the option with whatever value, of `--set` the same key."""
    option, _, value = part.partition(" ")
    if not option.startswith("-"):
        return rest.split(" ")[1:2] == [option]
    if option == "--set":
        return f" --set {value.partition('=')[0]}=" in rest
    return f" {option} " in f"{rest} "


_typed = Typed("")


def typed() -> Typed:
    """The command line of this process."""
    return _typed


def expanded(text: str) -> str:
    return _typed.expanded(text) if "osctl " in text else text


class Command(typer.core.TyperCommand):
    """Every command of osctl: takes no empty argument, and remembers what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        global _typed
        if not ctx.resilient_parsing:
            _typed = Typed(_path(ctx), {}, _verbs(ctx.find_root().command))
            raw, _, _ = self.make_parser(ctx).parse_args(list(args))
            parameters = {parameter.name: parameter for parameter in self.get_params(ctx)}
            for name, value in raw.items():
                if name in parameters:
                    _check(_spelled(parameters[name]), value if isinstance(value, list | tuple) else (value,))
            _typed.given = {name: value for name, value in raw.items() if value not in (None, [], ())}
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            for parameter in self.get_params(ctx):
                _check_number(_spelled(parameter), ctx.params.get(parameter.name))
        return rest


def _check(option: str, values: Iterable[Any]) -> None:
    for value in values:
        if not isinstance(value, str):
            continue
        if not value.strip():
            raise UsageError(f"{option}: is empty. Give it a value, or leave it out (is a variable of the shell not set?)")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            byte = value[error.start].encode(errors="surrogateescape")[0] if "\udc80" <= value[error.start] <= "\udcff" else 0
            raise UsageError(f"{option}: byte 0x{byte:02x} at character {error.start + 1} is not UTF-8. Give it as UTF-8") from None


def _check_number(option: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{option} {value}: is no finite number. Give one")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"{option}: has {len(str(abs(value)))} digits, more than 64 bits hold. Give a smaller number")


def _spelled(parameter: Any) -> str:
    """As a person types it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).strip("[]").upper()
    return str(max(parameter.opts, key=len))


def _path(ctx: Any) -> str:
    """`launch`, `data register`."""
    words = []
    while ctx.parent is not None:
        words.append(ctx.info_name)
        ctx = ctx.parent
    return " ".join(reversed(words))


def _verbs(group: Any) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= {f"{name} {inner}": takes for inner, takes in _verbs(command).items()}
        else:
            found[name] = {
                parameter.name: "" if parameter.param_type_name == "argument" else min(parameter.opts, key=len)
                for parameter in command.params
            }
    return found
