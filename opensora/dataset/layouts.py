"""What a folder or a file of captioned clips is taken for, and its rows: the one reader of captions. Free of torch.

Owns the layouts that people have, and the rules of names. A trainer, `osctl launch` and `osctl data register` read with this module, so
they see the same rows, in the same order, with the same errors. Refuses to open videos, to unpickle anything, and to guess: what can be
meant in two ways is a ConfigError that names both.

A folder is read as the first of these that it has. `captions.csv` counts before all others; of the others one may be there.

    captions.csv                                     a table (`tables`), paths relative to the folder
    metadata.csv | metadata.jsonl | metadata.json    the same (HF VideoFolder, DiffSynth, CogKit, musubi-tuner)
    {caption,captions,prompt,prompts}.txt with {video,videos}.txt       one line a clip (finetrainers)
    videos/a.mp4 with metas/a.txt                    (Cosmos-Predict)
    a.mp4 with a.txt                                 beside each other, also in sub-folders (finetrainers, diffusion-pipe, musubi-tuner)
    *.parquet, or *.tar also in sub-folders          where there is nothing else: Open-Sora 2.0, OpenVid; shards of a WebDataset (`packed`)

A file that is named itself may also be the TOML of diffusion-pipe or musubi-tuner (`trainer_toml`). A clip that lies in a tar is called
`SHARD.tar/a.mp4`, and read there.

In a folder paths stay inside of it. A table that is named itself (`data.source` of kind manifest) may also name absolute paths and
addresses of fsspec; relative paths start at its folder. A file's name is found in any normal form, with the spaces around it, and with `\\`
for `/` (`places`); a file of exactly the written name comes first. The path of a row stays as it was written, so that a manifest says
what the table says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from opensora.dataset.beside import COSMOS, Placed, captions_beside, counted, is_hidden, pairs, some, without_clip
from opensora.dataset.packed import PARQUET, READ, REFUSED, TAR, TOML, Packed, read_packed, refusal
from opensora.dataset.places import Entry, Folder, denied, read_named
from opensora.dataset.tables import SUFFIXES, Record, is_clip, read_lines, read_table
from opensora.dataset.webdataset import Member
from opensora.errors import ConfigError
from opensora.printable import several

CAPTIONS = "captions.csv"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.json")
PROMPTS = ("captions.txt", "caption.txt", "prompts.txt", "prompt.txt")
VIDEOS = ("videos.txt", "video.txt")


class NotThere(ConfigError):
    """There is no such folder or file."""


@dataclass(frozen=True, slots=True)
class Row:
    path: str
    """As written: relative to the folder, absolute, or a URI."""
    text: str
    """Caption."""
    place: str
    """`FILE:LINE` or a file, for messages."""


@dataclass(frozen=True)
class Captioned:
    """Captioned clips, as a folder or a table names them."""

    layout: str
    """What it was taken for: `captions.csv, columns path and text`."""
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    """What people ought to know, and no clip that is left out tells: clips without a caption, captions that are not read."""
    missing: str = ""
    """Of captions whose file is not there; a trainer says so of each."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Of a folder's rows by path: the file that is meant, by its name in the listing, where that is another one."""
    listing: Mapping[str, Entry] | None = None
    """Of the folder; None: of a table, or not to be had."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """Of rows whose clip is part of a tar, by path; `files` has the tar then, also of a table."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Both, for whoever reads no clips."""
        return (*self.remarks, self.missing) if self.missing else self.remarks


def is_table(path: str) -> bool:
    """Whether a path that a person typed means a file, by the end of its name."""
    return path.lower().endswith((*SUFFIXES, *READ, *REFUSED))


def read_folder(folder: Folder, name: str) -> Captioned:
    """The rows of a folder. `name`: how messages call it. Raises NotThere, ConfigError, and what its file system says of a place that does
    not answer."""
    found = captions_in(folder, name)
    if found is None:
        raise _nothing(folder.listing, name)
    return found


def captions_in(folder: Folder, name: str) -> Captioned | None:
    """As `read_folder`; None: there are no captions that are known."""
    try:
        listing = folder.listing
    except FileNotFoundError:
        raise NotThere(f"data.source {name}: no such folder. Give the folder that holds {CAPTIONS}") from None
    except NotADirectoryError:
        raise ConfigError(f"data.source {name}: is no folder. Give the folder that holds {CAPTIONS}") from None
    except PermissionError as error:
        raise denied(f"data.source {name}", error) from None
    found = _table_of(folder, listing, name) or _packed_in(folder, name)
    if found is None:
        return None
    if found.members:
        return Captioned(found.layout, _rows_of(found), tuple(found.remarks), "", _tars(found), listing, found.members)
    rows, files = _inside(found.records, folder, name)
    bare, missing = _differences(rows, files, listing)
    return Captioned(found.layout, rows, (*found.remarks, bare) if bare else tuple(found.remarks), missing, files, listing)


def read_file(folder: Folder, file: str, name: str) -> Captioned:
    """The rows of a table, or of lines of captions beside lines of videos. `folder`: where it lies. Raises as `read_folder`."""
    if (advice := refusal(file)) is not None:
        raise ConfigError(f"{name}: {advice}")
    if file.lower().endswith(READ):
        try:
            packed = read_packed(folder, [file], name.removesuffix(file).rstrip("/"))
        except FileNotFoundError:
            raise NotThere(f"{name}: no such file. Give a folder of clips, or a table with the header path,text") from None
        return Captioned(packed.layout, _rows_of(packed), tuple(packed.remarks), "", _tars(packed), None, packed.members)
    if file.lower() in (*PROMPTS, *VIDEOS) and (found := _lines_of(folder, name.removesuffix(file).rstrip("/"), file)):
        layout, records = found
    else:
        try:
            table = read_table(read_named(folder, file, name), name)
        except FileNotFoundError:
            raise NotThere(f"{name}: no such file. Write one with the header path,text and a line per clip") from None
        layout, records = f"{file}, {table.said}", [(record, f"{name}:{record.line}") for record in table.records]
    return Captioned(layout, _anywhere(records))


def _rows_of(packed: Packed) -> tuple[Row, ...]:
    """Members of tars are called by their tar and their name in it, and lie inside."""
    if packed.members:
        return tuple(Row(record.path, record.text, place) for record, place in packed.records)
    return _anywhere(packed.records)


def _tars(packed: Packed) -> dict[str, str]:
    return {path: member.tar for path, member in packed.members.items()}


# --- What a folder is -------------------------------------------------------------------------------------------------------------------


def _table_of(folder: Folder, listing: Mapping[str, Entry] | None, name: str) -> Packed | None:
    """What it was taken for, its records in order, and remarks; None: nothing that is text. Raises ConfigError."""
    tables, prompts, videos = (_there(folder, files) for files in ((CAPTIONS, *METADATA), PROMPTS, VIDEOS))
    lines = [f"{prompts[0]} with {videos[0]}"] if prompts and videos else []
    beside = pairs(listing or {})
    found = [*tables, *lines, *(pair for pair, members in beside.items() if members)]
    if not found:
        return None
    if len(found) > 1 and (found[0].lower() != CAPTIONS or found[1].lower() == CAPTIONS):
        first = tables[0] if tables else prompts[0] if lines else CAPTIONS
        raise ConfigError(
            f"data.source {name}: {' and '.join(found)} may both be meant. Move one of them away"
            + (f", or name the one that counts: {name}/{first}" if tables or lines else "")
        )
    remarks = [f"{' and '.join(found[1:])} are there too, and not read: {CAPTIONS} counts first"] if found[1:] else []
    if tables:
        place = f"{name}/{tables[0]}"
        table = read_table(read_named(folder, tables[0], place), place)
        return Packed(f"{tables[0]}, {table.said}", [(record, f"{place}:{record.line}") for record in table.records], remarks)
    if lines:
        layout, records = _lines_of(folder, name) or (lines[0], [])
        return Packed(layout, records, remarks)
    layout, members = next((pair, members) for pair, members in beside.items() if members)
    records, empty = captions_beside(folder, members, listing or {}, name)
    below = "metas/" if layout == COSMOS else ""
    return Packed(layout, records, [*remarks, *empty, *without_clip(listing or {}, members, below)])


def _packed_in(folder: Folder, name: str) -> Packed | None:
    """Parquet at the top of a folder, or shards anywhere in it, where there is nothing else. Raises ConfigError."""
    names = sorted(one for one in folder.listing or () if not is_hidden(one))
    tables = [one for one in names if one.lower().endswith(PARQUET) and "/" not in one]
    tars = [one for one in names if one.lower().endswith(TAR)]
    if tables and tars:
        raise ConfigError(
            f"data.source {name}: {tables[0]} and {tars[0]} may both be meant. Move one of them away, or name it: {name}/{tables[0]}"
        )
    return read_packed(folder, tables or tars, name) if tables or tars else None


def _there(folder: Folder, files: Sequence[str]) -> list[str]:
    """Which of these files a folder holds, as they are called there: Windows and macOS know no capitals."""
    if folder.listing is None:
        return [file for file in files if folder.has(file)]
    return [name for file in files for name in folder.tops if name.lower() == file]


def _lines_of(folder: Folder, name: str, file: str = "") -> tuple[str, Sequence[Placed]] | None:
    """Captions and videos, a line each; `file`: the one of the two that was named. None: the other is not there. Raises ConfigError."""
    prompts = [file] if file.lower() in PROMPTS else _there(folder, PROMPTS)
    videos = [file] if file.lower() in VIDEOS else _there(folder, VIDEOS)
    if not prompts or not videos:
        return None
    if len(prompts) > 1 or len(videos) > 1:
        both = " and ".join(prompts if len(prompts) > 1 else videos)
        raise ConfigError(f"data.source {name}: {both} may both be meant. Move one of them away")
    texts, paths = (read_lines(read_named(folder, one, f"{name}/{one}"), f"{name}/{one}") for one in (prompts[0], videos[0]))
    if len(texts) != len(paths):
        raise ConfigError(f"{name}: {prompts[0]} has {len(texts):,} lines, {videos[0]} {len(paths):,}. Write one line a clip in both")
    if not texts:
        raise ConfigError(f"{name}/{videos[0]}: no clips. Write one line a clip")
    placed = [
        (Record(line, path, text), f"{name}/{prompts[0] if path else videos[0]}:{line}")
        for line, (path, text) in enumerate(zip(paths, texts, strict=True), 1)
    ]
    return f"lines of {prompts[0]} and {videos[0]}", placed


def _nothing(listing: Mapping[str, Entry] | None, name: str) -> ConfigError:
    """What to say of a folder without captions."""
    names = [one for one in listing or () if not is_hidden(one)]
    clips = sum(map(is_clip, names))
    if refused := sorted(one for one in names if refusal(one) is not None):
        return ConfigError(f"data.source {name}: {refused[0]}: {refusal(refused[0])}")
    if unnamed := sorted(one for one in names if one.lower().endswith((PARQUET, TOML))):
        return ConfigError(f"data.source {name}: {unnamed[0]} may be meant. Name it: {name}/{unnamed[0]}")
    fact = f"{several(clips, 'clip')} and no captions" if clips else "no captions"
    for half, other in ((PROMPTS, VIDEOS[0]), (VIDEOS, PROMPTS[0])):
        if lone := [one for one in half if one in names]:
            fact = f"{lone[0]} without {other}"
    tables = [one for one in names if "/" not in one and one.lower().endswith((".csv", ".tsv", ".json", ".jsonl"))]
    named = f", or name the table: {name}/{tables[0]}" if tables else ""
    return ConfigError(
        f"{name}/{CAPTIONS}: no such file ({fact}). Write a {CAPTIONS} with the header path,text and a line per clip, or a.txt beside "
        f"a.mp4{named}"
    )


# --- Rows -------------------------------------------------------------------------------------------------------------------------------


def _inside(records: Sequence[Placed], folder: Folder, name: str) -> tuple[tuple[Row, ...], dict[str, str]]:
    """Rows of a folder, and the files that are meant where these are called otherwise. Raises ConfigError."""
    rows: list[Row] = []
    files: dict[str, str] = {}
    seen: dict[str, str] = {}
    listed = folder.listing is not None
    for record, place in records:
        _refuse_empty(record, place)
        path = _relative(record.path, folder, name, place)
        found = folder.names.find(path) if listed else None
        if path not in folder.names:
            path = path.strip()
            path = path if path in folder.names else path.replace("\\", "/")
        path = str(PurePosixPath(path))
        _refuse_twice(seen, found or path, path, place)
        if found is not None and found != path:
            files[path] = found
        rows.append(Row(path, record.text, place))
    return tuple(rows), files


def _relative(path: str, folder: Folder, name: str, place: str) -> str:
    """A path below the folder, which may also be written from the root on. Raises ConfigError, where it is none."""
    for root in (folder.root, name):
        if (root.startswith("/") or "://" in root) and path.strip().startswith(f"{root.rstrip('/')}/"):
            path = path.strip()[len(root.rstrip("/")) + 1 :]
            break
    slashed = path.strip().replace("\\", "/")
    if slashed.startswith("/") or re.match("[A-Za-z]:/", slashed) or ".." in slashed.split("/") or "://" in path:
        raise ConfigError(f"{place}: path {path.strip()!r} does not lie inside the folder. Give it relative to the folder, with /")
    return path


def _anywhere(records: Iterable[Placed]) -> tuple[Row, ...]:
    """Rows of a table that may name files anywhere. Raises ConfigError."""
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for record, place in records:
        _refuse_empty(record, place)
        path = record.path.strip()
        path = path if "://" in path else str(PurePosixPath(path))
        _refuse_twice(seen, path, path, place)
        rows.append(Row(path, record.text, place))
    return tuple(rows)


def _refuse_empty(record: Record, place: str) -> None:
    path = record.path.strip()
    if not record.text:
        raise ConfigError(f"{place}: {path or 'the row'} has no text. Write a caption or drop the line")
    if not path:
        raise ConfigError(f"{place}: no path. Give the file, relative to the folder, or drop the line")


def _refuse_twice(seen: dict[str, str], file: str, path: str, place: str) -> None:
    if file in seen:
        line = seen[file].rpartition(":")[2]
        earlier = f"on line {line}" if line.isdecimal() else f"of {seen[file]}"
        raise ConfigError(f"{place}: {path} is {earlier} already. Keep one of the two")
    seen[file] = place


def _differences(rows: Sequence[Row], files: Mapping[str, str], listing: Mapping[str, Entry] | None) -> tuple[str, str]:
    """What is to be said of clips without a caption, and of captions without a clip; empty: nothing."""
    if listing is None:
        return "", ""
    used = {files.get(row.path, row.path) for row in rows}
    said = ["", ""]
    if bare := sorted(name for name in listing if is_clip(name) and name not in used and not is_hidden(name)):
        said[0] = f"{counted(bare, 'clip has', 'clips have')} no caption and {'is' if len(bare) == 1 else 'are'} not used: {some(bare)}"
    if gone := [row.path for row in rows if files.get(row.path, row.path) not in listing]:
        said[1] = f"{counted(gone, 'caption names a file that is', 'captions name files that are')} not there: {some(gone)}"
    return said[0], said[1]
