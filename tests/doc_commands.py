"""Commands that README and docs show, as a person would type them.

A block of commands says in a comment above it who runs it: `<!-- run: tests/…py -->`, or `<!-- not run: reason -->`. Readers do not see it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
FENCE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (run|not run): ([^>]+?) -->\n\Z")


@dataclass(frozen=True)
class Block:
    page: str
    """Path below the repository."""
    line: int
    commands: tuple[str, ...]
    run_by: str
    """The file that runs it; empty: it is not run."""
    reason: str
    """Why it is not run."""


def pages() -> list[str]:
    """README, and whatever people read below the project's folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


def blocks(page: str) -> Iterator[Block]:
    text = (REPOSITORY / page).read_text()
    for found in FENCE.finditer(text):
        commands = tuple(line[2:] for line in found[1].splitlines() if line.startswith("$ "))
        mark = MARK.search(text[: found.start()])
        kind, words = (mark[1], mark[2]) if mark else ("", "")
        yield Block(
            page, text.count("\n", 0, found.start()) + 1, commands, words if kind == "run" else "", words if kind == "not run" else ""
        )


def commands_of(page: str, runner: str) -> list[str]:
    """Those that this file runs, in order."""
    return [command for block in blocks(page) if block.run_by == runner for command in block.commands]


@dataclass
class Shell:
    """A person's bash: what one command exports or enters is there for the next."""

    folder: Path
    env: Mapping[str, str]

    def __call__(self, *commands: str, timeout_s: float = 300) -> str:
        """Stdout and stderr of all. A command that fails ends the test with its words."""
        state = self.folder / ".shell"
        restored = f"[ ! -f {state} ] || . {state}\n"
        kept = f"\n{{ export -p; printf 'cd %q\\n' \"$PWD\"; }} >{state}\n"
        script = restored + "set -e\n" + "\n".join(commands) + kept
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=dict(self.env), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0 and "Traceback" not in said, f"{'; '.join(commands)}: {done.returncode}\n{said}"
        return said
