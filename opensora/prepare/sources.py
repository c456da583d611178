"""Which raw videos there are: files, folders, addresses, tables and published lists, each with its provenance.

Owns what a `Given` means and what each source is called. Captions that lie beside videos, or in a table of them, come along
(`opensora.dataset.layouts`). Refuses to open a video: what cannot be fetched is told by `download`, what is no video by `probe`.

A folder is taken with all below it, in the order of its names, as a trainer's is (`opensora.dataset.places`): through links, each circle
of them once, without hidden files. A name of a film under which no regular file lies (a pipe, a link into nothing or into itself), and a
row of a table whose file is not there, are sources too: fetching them says what is wrong, and they are counted.
"""

from __future__ import annotations

import logging
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import fsspec

from opensora.dataset.beside import is_hidden, text_beside
from opensora.dataset.layouts import Captioned, NotThere, Row, captions_in, is_table, read_file
from opensora.dataset.left_out import LeftOut
from opensora.dataset.places import Finder, Folder, Names, is_local
from opensora.dataset.prepare_config import Given
from opensora.dataset.rows import Provenance, Source
from opensora.dataset.tables import FILMS
from opensora.errors import ConfigError
from opensora.prepare import indexes
from opensora.prepare.addresses import (
    HTTP,
    is_address,
    last_part,
    member_address,
    refuse_credentials,
    refuse_unknown,
    scheme,
    tar_and_member,
    without_credentials,
)
from opensora.printable import quoted, several

log = logging.getLogger(__name__)


def listed(given: Sequence[Given], left_out: LeftOut | None = None) -> Iterator[Source]:
    """All raw videos, each address once, in the order in which they are given. Those in folders that `left_out` has are none.

    Raises ConfigError for a place that is not there, holds no video or cannot be read, and for a table or list that is broken.
    """
    names: set[str] = set()
    uris: set[str] = set()
    for number, one in enumerate(given):
        place = f"sources[{number}]"
        again = 0
        for source in _of(one, place, left_out):
            if source.uri in uris:
                again += 1
                continue
            uris.add(source.uri)
            name = _unique(source.name, source.provenance.set_name, names)
            names.add(name)
            yield Source(source.uri, name, source.provenance)
        if again:
            log.info("%s: %d addresses were listed before and count once", place, again)


def _unique(name: str, of: str, taken: set[str]) -> str:
    """The name; with that of its set, where another one is called so, and with a number, where that is taken too."""
    if name in taken and of:
        name = f"{of}/{name}"
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}~{number}"
    return free


def _of(one: Given, place: str, left_out: LeftOut | None) -> Iterator[Source]:
    path = one.path.strip()
    if not path or "\0" in path:
        raise ConfigError(f"{place}: path {quoted(one.path, 80)}: no path. Give a file, a folder or an address")
    if is_address(path):
        refuse_unknown(refuse_credentials(path, place), place)
        if scheme(path) == "file":
            path = url2pathname(path.partition("://")[2])
    else:
        path = os.path.normpath(Path(path).expanduser().absolute())
    base = Provenance(set_name=one.name or _called(path), licence=one.licence)
    files, root = _opened(path, place)
    if one.index is not None:
        yield from _of_index(one, files, root, path, base)
    elif is_table(path) and not (is_local(files) and Path(root).is_dir()):
        yield from _of_table(files, root, path, base)
    elif scheme(path) in HTTP or scheme(path) == "tar":
        yield Source(path, last_part(tar_and_member(path)[1] if scheme(path) == "tar" else path), _with(base, uri=path))
    elif _is_file(files, root, path, place):
        yield Source(path, last_part(path), _with(base, uri=path, caption=text_beside(root) if is_local(files) else ""))
    else:
        yield from _of_folder(Folder(files, root, left_out), files, path, base, place)


def _called(path: str) -> str:
    """A set's name: the last part of its path, without the ending of a table."""
    name = last_part(path)
    return posixpath.splitext(name)[0] or name if is_table(name) else name


def _with(
    base: Provenance, *, uri: str, caption: str = "", title: str = "", segments: tuple[tuple[float, float, str], ...] = ()
) -> Provenance:
    return Provenance(base.set_name, without_credentials(uri), base.licence, title, caption, segments)


def _opened(path: str, place: str) -> tuple[Any, str]:
    """The file system of a path, and how it calls the path. Raises ConfigError."""
    try:
        files, root = fsspec.core.url_to_fs(tar_and_member(path)[0] if scheme(path) == "tar" else path)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"{place}: {quoted(path, 120)}: {error}. Give a path, or an address that fsspec knows") from error
    return files, str(root)


def _is_file(files: Any, root: str, path: str, place: str) -> bool:
    """Whether it is a file, or no folder but there: a pipe is told by whoever would fetch it. Raises ConfigError."""
    if is_local(files):
        if not os.path.lexists(root):
            raise ConfigError(f"{place}: {quoted(path, 200)}: no such file or folder. Correct the path")
        return not Path(root).is_dir()
    try:
        return bool(files.isfile(root))
    except Exception as error:  # clients of file systems have kinds of their own
        raise _unread(path, error, place) from error


def _unread(path: str, error: Exception, place: str) -> ConfigError:
    said = without_credentials(" ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200])
    return ConfigError(f"{place}: {quoted(path, 200)}: cannot be read ({said}). Mend the access to it")


# --- Folders ----------------------------------------------------------------------------------------------------------------------------


def _of_folder(folder: Folder, files: Any, path: str, base: Provenance, place: str) -> Iterator[Source]:
    try:
        listing = folder.listing or {}
        read = captions_in(folder, path)
    except (NotThere, FileNotFoundError):
        raise ConfigError(f"{place}: {quoted(path, 200)}: no such folder. Correct the address") from None
    except ConfigError:
        raise
    except Exception as error:
        raise _unread(path, error, place) from error
    captions = {(read.files.get(row.path, row.path)): row for row in read.rows} if read and not read.members else {}
    films = {name for name in listing if _is_film(name) and not is_hidden(name)}
    rows = {name for name in captions if _is_film(name)}
    odd = {name for name in folder.odd if _is_film(name) and not is_hidden(name)}
    if read is not None and read.members:
        yield from _of_members(folder, read, base)
        rows = odd = films = set()
    elif not (films or rows or odd):
        what = f"{several(len(listing), 'file')}, none of them a film" if listing else "empty"
        raise ConfigError(f"{place}: {quoted(path, 200)}: {what} ({', '.join(FILMS[:4])} …). Give a folder that holds videos")
    for name in sorted(films | rows | odd, key=lambda name: (unicodedata.normalize("NFC", name), name)):
        where = folder.place(name)
        uri = where if folder.is_local else files.unstrip_protocol(where)
        caption = captions[name].text if name in captions else ""
        yield Source(uri, unicodedata.normalize("NFC", name), _with(base, uri=uri, caption=caption))


def _is_film(name: str) -> bool:
    return name.strip().lower().endswith(FILMS)


def _of_members(folder: Folder, read: Captioned, base: Provenance) -> Iterator[Source]:
    """Clips of a WebDataset, by addresses that lead into their tar."""
    for row in read.rows:
        where = folder.place(read.files[row.path])
        tar = f"file://{where}" if folder.is_local else folder.address(where)
        uri = member_address(read.members[row.path].name, tar)
        yield Source(uri, row.path, _with(base, uri=uri, caption=row.text))


# --- Tables and lists -------------------------------------------------------------------------------------------------------------------


def _of_table(files: Any, root: str, path: str, base: Provenance) -> Iterator[Source]:
    """Rows of a table whose paths may lie anywhere, as in `--data TABLE`."""
    head, _, tail = root.rpartition("/")
    folder = Folder(files, head)
    try:
        read = read_file(folder, tail, path)
    except ConfigError:
        raise
    except Exception as error:
        raise _unread(path, error, "sources") from error
    if read.members:
        yield from _of_members(folder, read, base)
        return
    finder = Finder()
    for row in read.rows:
        uri = _uri_of(row, files, folder, finder)
        yield Source(uri, row.path.strip(), _with(base, uri=uri, caption=row.text))


def _uri_of(row: Row, files: Any, folder: Folder, finder: Finder) -> str:
    written = row.path.strip()
    if is_address(written):
        return without_credentials(refuse_unknown(written, row.place))
    if written.startswith("/") and not is_local(files):
        return written
    where = finder.located(files, written if written.startswith("/") else folder.place(row.path))
    return os.path.normpath(where) if is_local(files) else str(files.unstrip_protocol(where))


def _of_index(one: Given, files: Any, root: str, path: str, base: Provenance) -> Iterator[Source]:
    """Videos of a published list. Their own addresses are believed; file names lie below the list's folder."""
    layout = one.index
    assert layout is not None, "the caller asked"
    folder = Folder(files, root.rpartition("/")[0])
    try:
        with files.open(root, "rb") as file:
            for video in indexes.read(file, layout, path, lambda: _by_last_part(folder)):
                uri = video.address
                if not is_address(uri):
                    where = folder.place(uri)
                    uri = where if folder.is_local else str(files.unstrip_protocol(where))
                found = _with(base, uri=uri, caption=video.caption, title=video.title, segments=video.segments)
                yield Source(uri, video.name, replace(found, licence=video.licence or base.licence))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{quoted(path, 200)}: no such list. Give the file of a list, or no `index` for a folder of videos") from None
    except ConfigError:
        raise
    except Exception as error:
        raise _unread(path, error, "sources") from error


class _LastParts(Names):
    """Files below a folder, found by the last part of their names alone."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._last = {name.rpartition("/")[2]: name for name in sorted(names, reverse=True)}

    def find(self, written: str) -> str | None:
        return super().find(written) or self._last.get(written)


def _by_last_part(folder: Folder) -> Names:
    return _LastParts(tuple(folder.listing or ()))
