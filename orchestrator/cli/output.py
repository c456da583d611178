"""The one place that prints. stdout carries a command's result, stderr everything that is said about it.

What people wrote (captions, prompts, names, errors that quote them) steers no terminal: it is shown as `opensora.printable` shows it. JSON
escapes by itself and stays exact, and so does YAML.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from opensora.printable import one_line, printable
from orchestrator.cli.typed import expanded

ALLOWED = re.compile(r"(\x1b\[[0-9;]*m|\r)")
"""What a trainer's output may ask of a terminal: colours, and the line again, as bars of progress do."""


class Format(enum.StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"
    name = "name"


def emit(rows: Sequence[dict[str, Any]] | dict[str, Any], format: Format, columns: dict[str, str] | None = None, title: str = "") -> None:
    """Print a result to stdout.

    Args:
        rows: what json and yaml print whole; in a table, one line each.
        columns: key to heading, in the order of a table; none: all keys of the first row.
    """
    if format is Format.json:
        print(json.dumps(rows, indent=2, default=_plain))
    elif format is Format.yaml:
        import yaml

        content = json.loads(json.dumps(rows, default=_plain))
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        print(text if printable(text) == text else yaml.safe_dump(content, sort_keys=False), end="")
    else:
        lines = [rows] if isinstance(rows, dict) else list(rows)
        columns = columns or {key: key for key in (lines[0] if lines else {})}
        if format is Format.name:
            for line in lines:
                print(_name(line["name"] if "name" in line else next(iter(line.values()))))
        else:
            table(lines, columns, title)


def table(rows: Iterable[dict[str, Any]], columns: dict[str, str], title: str = "", *, err: bool = False) -> None:
    """A table for people. Numbers stand right, missing values are a middle dot."""
    import rich.box
    import rich.table

    rows = list(rows)
    grid = rich.table.Table(title=title or None, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for key, heading in columns.items():
        values = [row.get(key) for row in rows]
        right = any(isinstance(value, int | float | Decimal) for value in values) or all(_numeric(value) for value in values)
        grid.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell(row.get(key)) for key in columns))
    console(err=err).print(grid)


def console(*, err: bool = False) -> Any:
    """A rich console. Away from a terminal it is plain and wide, so that pipes and logs get whole lines. `[b]` and `:smile:` are text."""
    import rich.console

    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else 200
    return rich.console.Console(file=stream, width=width, highlight=False, soft_wrap=False, markup=False, emoji=False)


def styled(text: str, style: str = "") -> Any:
    """A rich text that steers nothing."""
    import rich.text

    return rich.text.Text(printable(text), style=style)


def note(text: str) -> None:
    """Something about the result, for people: stderr. A stderr that takes nothing (a full disk, a terminal that is gone) stops no work."""
    from orchestrator.redact import redacted

    with contextlib.suppress(OSError):
        print(printable(redacted(expanded(text))), file=sys.stderr, flush=True)


def error(text: str) -> None:
    note(f"error: {text}")


def raw(text: str) -> None:
    """Text that is itself the result (logs, a schema), without an added newline."""
    sys.stdout.write(text)
    sys.stdout.flush()


def of_trainer(text: str) -> None:
    """A trainer's output: as it is, but that on a terminal it may colour and begin its line anew, and nothing else."""
    if sys.stdout.isatty():
        text = "".join(part if ALLOWED.fullmatch(part) else printable(part) for part in ALLOWED.split(text))
    raw(text)


def line(row: dict[str, Any], text: str, format: Format) -> None:
    """One of many results that come one after another: json is one object a line, yaml one document each."""
    if format is Format.json:
        print(json.dumps(row, default=_plain), flush=True)
    elif format is Format.yaml:
        emit([row], format)
    else:
        print(_name(row["name"]) if format is Format.name else printable(text), flush=True)


def _name(value: Any) -> str:
    """Exact for a pipe; what a terminal shows steers nothing."""
    return one_line(str(value)) if sys.stdout.isatty() else str(value)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None or value == "":
        return "·"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:,.4f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return one_line(str(value))


def duration(seconds: float | None) -> str:
    """`4 s`, `3 m 05 s`, `2 h 07 m`."""
    if seconds is None:
        return "·"
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def percent(value: float | None) -> str:
    return "·" if value is None else f"{100 * value:.0f}%"


def hours(value: float) -> str:
    """Four digits where a demo's hours would round to nothing."""
    return f"{value:.4f}" if 0 < value < 10 else f"{value:,.0f}"


def gigabytes(size: float | None) -> str:
    """Of 10^9 bytes; a demo's in thousandths."""
    if size is None:
        return "·"
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def dollars(value: Decimal | float | None) -> str:
    """Four digits below a dollar: a demo costs cents, and a bill that says $0.00 says nothing."""
    if value is None:
        return "·"
    number = float(value)
    return f"${number:,.2f}" if abs(number) >= 1 or number == 0 else f"${number:.4f}"


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value[:1] in "0123456789$<·")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Decimal) else vars(value) if hasattr(value, "__dict__") else str(value)
