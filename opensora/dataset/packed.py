"""Captioned clips in files that are no text: shards of a WebDataset, Parquet, the TOML of another trainer.

Owns the way from such files to rows, in the words of `layouts`, which chooses between them. Refuses what is compressed, and pickles: it
says so by name and opens none of them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opensora.dataset.beside import Placed, captions_beside, counted, pairs, some
from opensora.dataset.parquet import read_parquet
from opensora.dataset.places import Folder, denied, read_named
from opensora.dataset.tables import Record, read_table
from opensora.dataset.trainer_toml import Place, read_toml
from opensora.dataset.webdataset import PICKLES, Member, read_shard
from opensora.errors import ConfigError
from opensora.printable import quoted, several

PARQUET, TAR, TOML = ".parquet", ".tar", ".toml"
READ = (PARQUET, TAR, TOML)
"""Ends of names that this module reads."""
_PICKLE = "a pickle, which may run a program when it is opened: it is never opened. Write path and text into a CSV"
REFUSED: Mapping[str, str] = {
    ".arrow": "Arrow files are not read. Write them as CSV with the columns path and text",
    **dict.fromkeys(
        (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"), "a compressed tar has no places to read from. Unpack it into a .tar"
    ),
    ".zip": "zips are not read. Unpack it: a.mp4 beside a.txt is read",
    **dict.fromkeys(PICKLES, _PICKLE),
}
"""Ends of names that are no table and no clip, and what to do."""


@dataclass(frozen=True)
class Packed:
    layout: str
    records: Sequence[Placed]
    remarks: Sequence[str] = ()
    members: Mapping[str, Member] = field(default_factory=dict)
    """Of rows whose clip lies in a tar, by path."""


def refusal(name: str) -> str | None:
    """What to say of a file that is not read; None: it may be."""
    return next((advice for ending, advice in REFUSED.items() if name.lower().endswith(ending)), None)


def read_packed(folder: Folder, files: Sequence[str], name: str) -> Packed:
    """The rows of files of one kind. `name`: how messages call the folder. Raises ConfigError, FileNotFoundError."""
    if files[0].lower().endswith(TAR):
        return _of_tars(folder, files, name)
    if files[0].lower().endswith(TOML):
        return _of_toml(folder, files[0], name)
    return _of_parquet(folder, files, name)


def _place(name: str, file: str) -> str:
    return f"{name}/{file}" if name else file


def _of_parquet(folder: Folder, files: Sequence[str], name: str) -> Packed:
    records: list[Placed] = []
    said = ""
    for file in files:
        place = _place(name, file)
        try:
            with folder.open(file) as (opened, _):
                table = read_parquet(opened, place)
        except PermissionError as error:
            raise denied(place, error) from None
        except IsADirectoryError:
            raise ConfigError(f"{place}: is no regular file. Give the file of a table") from None
        said = said or table.said
        records += [(record, f"{place}:{record.line}") for record in table.records]
    return Packed(f"{_called(files, 'files of Parquet')}, {said}", records)


def _of_tars(folder: Folder, files: Sequence[str], name: str) -> Packed:
    records: list[Placed] = []
    members: dict[str, Member] = {}
    bare, pickled, left = [], [], []
    for file in files:
        place = _place(name, file)
        try:
            with folder.open(file) as (opened, size):
                shard = read_shard(opened, size, file, place)
        except PermissionError as error:
            raise denied(place, error) from None
        except IsADirectoryError:
            raise ConfigError(f"{place}: is no regular file. Give a shard of a WebDataset") from None
        for member, text in shard.clips:
            path = f"{file}/{member.name}"
            members[path] = member
            records.append((Record(1, path, text), f"{place}/{member.name}"))
        bare += [f"{file}/{clip}" for clip in shard.bare]
        pickled += [f"{file}/{clip}" for clip in shard.pickled]
        left += [f"{file}/{clip}" for clip in shard.left]
    if not records:
        fact = f"{several(len(bare), 'clip')} and no captions" if bare else "no clips"
        why = f" ({several(len(pickled), 'caption')} may be in pickles, which are never opened)" if pickled else ""
        raise ConfigError(
            f"{_place(name, files[0])}: {fact} in {_called(files, 'shards')}{why}. Pack a.mp4 with a.txt, or a.json with a caption"
        )
    remarks = []
    if bare:
        verb = "is" if len(bare) == 1 else "are"
        remarks.append(f"{counted(bare, 'clip has', 'clips have')} no caption and {verb} not used: {some(bare)}")
    if pickled:
        remarks.append(f"{counted(pickled, 'caption', 'captions')} may be in pickles, which are never opened: {some(pickled)}")
    if left:
        remarks.append(f"{counted(left, 'member is a link or has', 'members are links or have')} holes, and not read: {some(left)}")
    return Packed(f"WebDataset, {_called(files, 'shards')}", records, remarks, members)


def _called(files: Sequence[str], many: str) -> str:
    return files[0] if len(files) == 1 else f"{len(files):,} {many}"


def _of_toml(folder: Folder, file: str, name: str) -> Packed:
    place = _place(name, file)
    named = read_toml(read_named(folder, file, place), place)
    records: list[Placed] = []
    remarks = [f"{file} repeats clips (num_repeats): each counts once here"] if named.repeated else []
    for one in named.places:
        there, more = _of_folder(folder, one, place) if one.ending else (_of_list(folder, one, place), [])
        records += [(_moved(record, one), where) for record, where in there]
        remarks += more
    return Packed(f"{file}, {named.said}", records, remarks)


def _of_folder(folder: Folder, one: Place, place: str) -> tuple[Sequence[Placed], Sequence[str]]:
    """Captions beside clips in one folder, without those in folders below, as these trainers read it."""
    where = folder.elsewhere(one.path)
    try:
        listing = {name: entry for name, entry in (where.listing or {}).items() if "/" not in name}
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{place}: {quoted(one.path, 120)}: no such folder. Relative paths start at the folder of this file") from None
    except PermissionError as error:
        raise denied(f"{place}: {quoted(one.path, 120)}", error) from None
    found = next((members for members in pairs(listing, one.ending).values() if members), None)
    if not found:
        raise ConfigError(f"{place}: {quoted(one.path, 120)}: no clip with a caption beside it (a.mp4 with a{one.ending}). Write captions")
    return captions_beside(where, found, listing, one.path)


def _of_list(folder: Folder, one: Place, place: str) -> Sequence[Placed]:
    head, _, tail = one.path.rpartition("/")
    where = folder.elsewhere(head or ("/" if one.path.startswith("/") else "."))
    try:
        table = read_table(read_named(where, tail, one.path), one.path if one.path.lower().endswith("l") else f"{one.path}.jsonl")
    except FileNotFoundError:
        raise ConfigError(f"{place}: {quoted(one.path, 120)}: no such file. Relative paths start at the folder of this file") from None
    return [(record, f"{one.path}:{record.line}") for record in table.records]


def _moved(record: Record, one: Place) -> Record:
    """With a path that starts where the paths of the TOML do."""
    if record.path.strip().startswith("/") or "://" in record.path:
        return record
    base = one.path if one.ending else posixpath.dirname(one.path)
    return Record(record.line, posixpath.normpath(posixpath.join(base, record.path.strip())), record.text)
