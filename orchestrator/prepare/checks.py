"""What of a preparation can be seen to be wrong before a video is opened: places that are not there, addresses that are none. Only reads.

Owns no rule of its own: the process refuses the same, hours later perhaps. Refuses to ask a server, and to judge what an address leads to.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from opensora.dataset import columns
from opensora.dataset.beside import is_hidden, text_beside
from opensora.dataset.layouts import is_table
from opensora.dataset.left_out import LeftOut
from opensora.dataset.places import on_disk
from opensora.dataset.prepare_config import CaptionBeside, CaptionLlava, CaptionServer, Given, PrepareConfig
from opensora.dataset.tables import FILMS
from opensora.errors import ConfigError
from opensora.printable import quoted
from orchestrator.errors import UsageError

TAR, TEXT = ".tar", ".txt"


def check(config: PrepareConfig, left_out: LeftOut) -> None:
    """Raises UsageError."""
    seen: set[tuple[str, bool]] = set()
    for number, given in enumerate(config.sources):
        one = given.path, given.index is not None
        if one not in seen and "://" not in given.path:
            _check_source(f"sources[{number}]: {quoted(given.path, 200)}", *one, left_out)
        seen.add(one)
    check_rules(config)
    caption = config.caption
    if isinstance(caption, CaptionServer) and not _is_address(caption.url):  # not quoted: what is no address may hold a password
        raise UsageError("caption.url is no address. Write it as http://host:8000/v1")
    if isinstance(caption, CaptionLlava):
        _check_model("caption.path", caption.path)
    if config.filter.scores is not None:
        _check_model("filter.scores", config.filter.scores)
    if isinstance(caption, CaptionBeside):
        _check_texts(config, left_out)


def check_rules(config: PrepareConfig) -> None:
    """Raises UsageError."""
    try:
        columns.check(config.filter)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _check_texts(config: PrepareConfig, left_out: LeftOut) -> None:
    """Captions that come along lie somewhere: else each clip would leave for want of one, after the decode."""
    try:
        if any(_may_have_texts(given, left_out) for given in config.sources):
            return
    except ConfigError as error:
        raise UsageError(str(error)) from None
    raise UsageError(
        "captions: neither a text (a.txt beside a.mp4) nor a table lies with the videos, and caption.kind is beside: no clip would stay. "
        "Write texts, or have a model do it: --caption-url http://host:8000/v1 --caption-model NAME, "
        "or --set 'caption={kind: llava, path: FOLDER}'"
    )


def _may_have_texts(given: Given, left_out: LeftOut) -> bool:
    """Whether a source may bring captions along. Of what is not on this machine nobody knows."""
    path = given.path
    if given.index is not None or "://" in path or (is_table(path) and not Path(path).is_dir()):
        return True
    if not Path(path).is_dir():
        return bool(text_beside(path))
    names = (name for name, _ in on_disk(path, [], left_out))
    return any(not is_hidden(name) and (name.lower().endswith((TEXT, TAR)) or is_table(name)) for name in names)


def _check_source(subject: str, path: str, is_list: bool, left_out: LeftOut) -> None:
    if not path.strip() or "\0" in path:
        raise UsageError(f"{subject}: path is empty. Give a file, a folder or an address")
    if not os.path.lexists(path):
        raise UsageError(f"{subject}: no such file or folder. Correct the path")
    if not Path(path).is_dir():
        return
    if is_list:
        raise UsageError(f"{subject}: no such list. Give the file of a list, or no `index` for a folder of videos")
    odd: list[str] = []
    try:
        if any(_may_hold(name) for name, _ in on_disk(path, odd, left_out)) or any(_may_hold(name) for name in odd):
            return
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{subject}: cannot be read ({error.strerror}). Mend the access to it") from None
    raise UsageError(f"{subject}: no video ({', '.join(FILMS[:4])} …) and no list of videos lies in it. Give a folder that holds videos")


def _may_hold(name: str) -> bool:
    """A video, or a table or an archive that may lead to some."""
    return not is_hidden(name) and (name.strip().lower().endswith((*FILMS, TAR)) or is_table(name))


def _is_address(url: str) -> bool:
    try:
        found = urlsplit(url.strip())
        return found.scheme in ("http", "https") and bool(found.hostname)
    except ValueError:
        return False


def _check_model(field: str, path: str) -> None:
    if not (Path(path) / "config.json").is_file():
        fact = "no config.json is in it" if Path(path).is_dir() else "no such folder"
        raise UsageError(f"{field} {quoted(path, 200)}: {fact}. Name the folder of a model as transformers saves it")
