"""Tables of clips and captions as people and their programs write them: CSV, TSV, JSON, JSON lines, and plain lines. Pure.

Owns the rules by which bytes become rows of a file's name and a caption, the same for a trainer and for what is checked before a launch.
Whatever cannot be read without guessing is a ConfigError that names the file and the line.

- Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Lines end with LF, CRLF or CR.
- Cells are divided by commas, semicolons or tabs: by what gives a header with known columns; a line `sep=;` before it decides.
- A quoted cell may hold line ends; a quote in it is written twice. Blank rows, and empty cells at the end of one, count for nothing.
- The header names the columns, in any case: `path` and `text`, or one each of FILE_COLUMNS and TEXT_COLUMNS. Others are ignored.
- Without a header a table is what Open-Sora 1.0 wrote: a video's name, a caption and perhaps a number of frames.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opensora.errors import ConfigError
from opensora.printable import several

FILE_COLUMNS = (
    "path", "video_path", "video", "videos", "file_name", "filename", "file", "file_path", "filepath", "video_file", "image", "image_path",
)  # fmt: skip
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description")
SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")
"""Of files that may be a table."""
FILMS = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".gif", ".3gp", ".ogv",
)  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif")
CLIPS = (*FILMS, *PICTURES)
"""Names of files that hold a clip end so, in any case."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Record:
    """One row."""

    line: int
    """On which it begins."""
    path: str
    """As it is written, with the spaces around it."""
    text: str
    """Caption, without spaces around it."""


@dataclass(frozen=True)
class Table:
    records: list[Record]
    said: str
    """What it was taken for: its columns, and what is unusual in its spelling."""


def read_table(data: bytes, name: str) -> Table:
    """The rows of a file. `name`: how messages call it; its ending says what it is. Raises ConfigError."""
    text, encoding = decoded(data, name)
    ending = name.rpartition(".")[2].lower()
    before = csv.field_size_limit(sys.maxsize)  # of the whole process; its default refuses a caption of 128 KiB
    try:
        table = _json(text, name) if ending == "json" else _json_lines(text, name) if ending in ("jsonl", "ndjson") else _cells(text, name)
    finally:
        csv.field_size_limit(before)
    return Table(table.records, f"{table.said}, {encoding.upper()}") if encoding != "utf-8" else table


def read_lines(data: bytes, name: str) -> list[str]:
    """The lines of a file, without spaces around them and without empty ones at the end. Raises ConfigError."""
    lines = [line.strip() for line in _LINE_END.split(decoded(data, name)[0])]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def decoded(data: bytes, name: str) -> tuple[str, str]:
    """A file's text, and its encoding. Raises ConfigError, where it is none that says so itself, or holds what no text does."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(_not_text(data, error, encoding, name)) from None
    if (nul := text.find("\0")) >= 0:
        raise ConfigError(
            f"{name}:{_line_at(text, nul)}: a NUL character, which no text holds. Save the file as UTF-8 text (in a spreadsheet: CSV UTF-8)"
        )
    return text, "utf-8" if encoding == "utf-8-sig" else encoding


def _not_text(data: bytes, error: UnicodeDecodeError, encoding: str, name: str) -> str:
    line = _line_at(data[: error.start].decode(encoding, "replace"), sys.maxsize)
    if encoding != "utf-8":
        return f"{name}:{line}: not {encoding.upper()} at byte {error.start:,} ({error.reason}). Save the file as UTF-8"
    byte = data[error.start]
    would_be = bytes([byte]).decode("cp1252", "replace")
    return (
        f"{name}:{line}: not UTF-8 at byte {error.start:,} (0x{byte:02x}; in Windows-1252 it is {would_be!r}). Save it as UTF-8 (in a "
        f"spreadsheet: CSV UTF-8), or: iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(name)} > NEW"
    )


def _line_at(text: str, position: int) -> int:
    return 1 + sum(1 for _ in _LINE_END.finditer(text[:position]))


# --- Cells ------------------------------------------------------------------------------------------------------------------------------


def _cells(text: str, name: str) -> Table:
    sep = re.match(r'"?sep=([,;\t|:])"?[ \t]*(?:\r\n|\r|\n|$)', text, re.IGNORECASE)
    tried = (sep[1],) if sep else tuple(_DELIMITERS)
    skip = 1 if sep else 0
    body = text[sep.end() :] if sep else text
    header = _header(body, name, tried, skip)
    records: list[Record] = []
    for line, row in _rows(body, name, header.delimiter, skip):
        if line <= header.line:
            continue
        path, caption = header.cells(row, f"{name}:{line}")
        if "\n" in caption or "\r" in caption:
            _refuse_swallowed(caption, header.delimiter, f"{name}:{line}")
        records.append(Record(line, path, caption.strip()))
    if not records:
        raise ConfigError(f"{name}: no clips. Write the header path,text and a line per clip")
    spelled = _DELIMITERS.get(header.delimiter, repr(header.delimiter))
    return Table(records, header.said if header.delimiter == "," else f"{header.said}, {spelled}")


@dataclass(frozen=True)
class _Header:
    line: int
    """Its own; 0: there is none."""
    delimiter: str
    path: int
    """Column."""
    text: int
    named: int
    """Columns up to the last one that has a name: a row has them all, since of a shorter one it cannot be known which ones are there."""
    columns: int
    """How many a row may have."""
    said: str

    def cells(self, row: list[str], place: str) -> tuple[str, str]:
        """Path and caption. Raises ConfigError."""
        if self.line == 0:
            return self._bare(row, place)
        while len(row) > self.columns and not row[-1].strip():
            row = row[:-1]
        if not self.named <= len(row) <= self.columns:
            divided = _DELIMITERS.get(self.delimiter, repr(self.delimiter))
            raise ConfigError(
                f"{place}: {several(len(row), 'column')}, the header has {self.named}. Write every column, and quote texts that hold "
                f"{divided}"
            )
        return row[self.path], row[self.text]

    def _bare(self, row: list[str], place: str) -> tuple[str, str]:
        while len(row) > 2 and not row[-1].strip():
            row = row[:-1]
        if len(row) == 2 or (len(row) == 3 and row[2].strip().isdecimal()):
            return row[0], row[1]
        raise ConfigError(
            f"{place}: {several(len(row), 'column')}; without a header a row is a video, its caption and perhaps a number of frames. Quote "
            "texts that hold a comma, or write a header that names path and text"
        )


def _header(text: str, name: str, delimiters: Sequence[str], skip: int) -> _Header:
    """Which columns there are, and what divides them. Raises ConfigError."""
    refused: ConfigError | None = None
    first: tuple[int, list[str]] | None = None
    bare: _Header | None = None
    for delimiter in delimiters:
        try:
            line, row = next(_rows(text, name, delimiter, skip))
        except StopIteration:
            raise ConfigError(f"{name}: no clips. Write the header path,text and a line per clip") from None
        except ConfigError as error:
            refused = refused or error
            continue
        first = first if first is not None and len(first[1]) >= len(row) else (line, row)
        names = [cell.strip() for cell in row]
        if _has(names, FILE_COLUMNS) and _has(names, TEXT_COLUMNS):
            path, caption = (column_of(names, known, f"{name}:{line}") for known in (FILE_COLUMNS, TEXT_COLUMNS))
            said = f"columns {names[path]} and {names[caption]}"
            return _Header(line, delimiter, path, caption, max(n for n, cell in enumerate(names, 1) if cell), len(names), said)
        if bare is None and len(row) > 1 and is_clip(row[0]):
            bare = _Header(0, delimiter, 0, 1, 2, 3, "no header, as Open-Sora 1.0 wrote it")
    if bare is not None:
        return bare
    if first is None:
        assert refused is not None, "each delimiter gave a row or an error"
        raise refused
    line, row = first
    shown = ",".join(row)
    raise ConfigError(
        f"{name}:{line}: the header is {shown if len(shown) <= 120 else f'{shown[:119]}…'}: it must name a column of files (path; or "
        f"video, file_name …) and one of captions (text; or caption, prompt …). Write path,text"
    )


def _has(names: Sequence[str], known: Sequence[str]) -> bool:
    return any(cell.casefold() in known for cell in names)


def column_of(names: Sequence[str], known: Sequence[str], place: str) -> int:
    """`path` or `text` where it is there, else the one that is. Raises ConfigError, where several are."""
    found = [number for number, cell in enumerate(names) if cell == known[0]]
    found = found or [number for number, cell in enumerate(names) if cell.casefold() == known[0]]
    found = found or [number for number, cell in enumerate(names) if cell.casefold() in known]
    if len(found) > 1:
        meant = " and ".join(names[number] for number in found)
        raise ConfigError(f"{place}: columns {meant} may both be meant. Call the one that counts {known[0]}")
    return found[0]


def is_clip(path: str) -> bool:
    return path.strip().lower().endswith(CLIPS)


def _rows(text: str, name: str, delimiter: str, skip: int) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of each row that is not blank. Raises ConfigError."""
    lines = _Lines(text)
    # `a.mp4, "a box, moving"`: a quote after a space opens a text too, and then the spaces are no part of any
    spaced = re.search(rf'{re.escape(delimiter)} +"', text) is not None
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        while True:
            lines.begin()
            try:
                row = next(reader)
            except StopIteration:
                return
            if any(cell.strip() for cell in row):
                yield lines.began + skip, row
    except csv.Error as error:
        raise ConfigError(f"{name}:{_quarrel(lines, delimiter, skip, error)}") from error


class _Lines:
    """Lines of a text with their ends, and those of the row that is being read."""

    def __init__(self, text: str) -> None:
        self._lines = io.StringIO(text, newline="")
        self.read, self.began = 0, 1
        self.row: list[str] = []

    def begin(self) -> None:
        self.began, self.row = self.read + 1, []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.read += 1
        self.row.append(line)
        return line


def _quarrel(lines: _Lines, delimiter: str, skip: int, error: csv.Error) -> str:
    """Where a row cannot be read, and why."""
    opened = _opened(lines.row, delimiter)
    twice = 'write a quote inside of a quoted text twice ("")'
    if opened is None:
        return f"{lines.read + skip}: {error}. Mend the line"
    line = lines.began + skip + opened
    if "unexpected end of data" in str(error):
        return f"{line}: the quote that opens here is never closed. Close it, and {twice}"
    place = "here" if line == lines.read + skip else f"on line {lines.read + skip}"
    return f"{line}: the quoted text that begins here has something behind its closing quote {place}. Quote the whole text, and {twice}"


def _opened(row: Sequence[str], delimiter: str) -> int | None:
    """Number of the row's line on which its last quoted cell opens."""
    opened: int | None = None
    state = "fresh"  # at the beginning of a cell; else plain, quoted, or closed by a quote, which a second one opens again
    for number, line in enumerate(row):
        for letter in line:
            if state == "quoted":
                state = "closed" if letter == '"' else state
            elif letter == '"' and state in ("fresh", "closed"):
                opened = number if state == "fresh" else opened
                state = "quoted"
            elif letter == delimiter:
                state = "fresh"
            elif state == "closed" or letter != " ":
                state = "plain"
    return opened


def _refuse_swallowed(caption: str, delimiter: str, place: str) -> None:
    """A quote that was forgotten swallows rows until the next one. Raises ConfigError."""
    for number, line in enumerate(_LINE_END.split(caption)[1:], 1):
        if is_clip(line.partition(delimiter)[0]) and delimiter in line:
            file, _, first = place.rpartition(":")
            raise ConfigError(
                f"{place}: the quoted text of this row holds what looks like another row, on line {int(first) + number} or near it "
                f"({line[:60]!r}). Close the quote before it ({file})"
            )


# --- JSON -------------------------------------------------------------------------------------------------------------------------------


def _json_lines(text: str, name: str) -> Table:
    found = []
    for line, written in enumerate(_LINE_END.split(text), 1):
        if written.strip():
            found.append((line, _parsed(written, name, line, json.loads)))
    return _entries(found, name)


def _json(text: str, name: str) -> Table:
    """A list of objects."""
    position = _skipped(text, 0)
    if not text.startswith("[", position):
        raise ConfigError(f'{name}:{_line_at(text, position)}: not a list of objects. Write [{{"path": …, "text": …}}, …], or JSON lines')
    decoder, found = json.JSONDecoder(), []
    line, counted, position = 1, 0, _skipped(text, position + 1)
    while not text.startswith("]", position):
        line, counted = line + _line_at(text[counted:position], sys.maxsize) - 1, position
        entry, end = _parsed(text, name, 1, lambda text, position=position: decoder.raw_decode(text, position))  # type: ignore[misc]
        found.append((line, entry))
        position = _skipped(text, end)
        if text.startswith(",", position):
            position = _skipped(text, position + 1)
        elif not text.startswith("]", position):
            raise ConfigError(f"{name}:{_line_at(text, position)}: the list is not closed here. Write a comma or ]")
    if (rest := _skipped(text, position + 1)) < len(text):
        raise ConfigError(f"{name}:{_line_at(text, rest)}: something behind the list. Take it away, or write JSON lines (.jsonl)")
    return _entries(found, name)


def _skipped(text: str, position: int) -> int:
    found = re.compile(r"[ \t\r\n]*").match(text, position)
    assert found is not None, "it matches nothing, too"
    return found.end()


def _parsed(text: str, name: str, line: int, read: Callable[[str], Any]) -> Any:
    """`line`: of the text's first one."""
    try:
        return read(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{line - 1 + _line_at(text, error.pos)}: no JSON ({error.msg}). Mend the line") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}:{line}: no JSON that can be read ({error}). Mend the line") from None


def _entries(found: Iterable[tuple[int, Any]], name: str) -> Table:
    records, said = [], ""
    for line, entry in found:
        place = f"{name}:{line}"
        if not isinstance(entry, dict):
            raise ConfigError(f'{place}: not an object. Write {{"path": …, "text": …}}')
        names = [key.strip() for key in entry]
        values = list(entry.values())
        cells = []
        for known, what in ((FILE_COLUMNS, "file"), (TEXT_COLUMNS, "caption")):
            if not _has(names, known):
                raise ConfigError(f"{place}: no {what} among {', '.join(names) or 'nothing'}. Name it {known[0]}")
            column = column_of(names, known, place)
            if not isinstance(values[column], str):
                raise ConfigError(f"{place}: {names[column]} is {_kind(values[column])}, one text is needed. Write one")
            if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in values[column]):
                raise ConfigError(f"{place}: {names[column]} holds NUL or half of a character. Write it anew")
            cells.append((column, values[column]))
        said = said or f"{names[cells[0][0]]} and {names[cells[1][0]]} of each object"
        records.append(Record(line, cells[0][1], cells[1][1].strip()))
    if not records:
        raise ConfigError(f"{name}: no clips. Write an object with path and text per clip")
    return Table(records, said)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
    return f"{value!r}"[:40]
