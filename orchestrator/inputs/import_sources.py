"""Weights and encoders where they come from: a path of this machine, s3://, https:// or a model of the hub.

Owns the way from a source to files on this disk, each hashed. A download goes on where it broke off, as long as the server says by its
ETag that it still is the same file; it has its name when it is whole. Nothing is opened and no code is run. Of a hub id the commit is part
of the source, since the same id may be another model tomorrow; what this machine has of the hub is used as it is, unless it is not whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.environment import at_home
from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.inputs.data_files import DataFiles
from orchestrator.inputs.imports import Import, Role, select
from orchestrator.ledger.records import FileRef
from orchestrator.redact import redacted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
TIMEOUT_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
TRIES = 5
"""Of a download that breaks off, without progress between."""
CHUNK = 1 << 20
IGNORED = ["*.fp16.*", "*.non_ema.*", "*onnx*", "*openvino*", "flax*", "tf_model*"]


@dataclass(frozen=True)
class Found:
    """An import on this disk."""

    role: Role
    source: str
    """As it is written down: an id of the hub with its commit."""
    imported: Import
    files: Mapping[str, Path]
    """By name in the import."""
    folder: Path
    """What the trainer opens: a file, or a folder of these files and perhaps more."""
    licence: str | None

    @property
    def digest(self) -> str:
        return self.imported.digest()


class ImportSources:
    def __init__(self, home: Path, env: Mapping[str, str] = os.environ) -> None:
        """`home`: holds downloads, and what is remembered of files that were hashed."""
        self._downloads, self._files, self._env = home / "downloads", DataFiles(home, env), env

    def fetch(self, source: str, role: Role | None, *, far: bool = True, renew: bool = False) -> Found:
        """Bring it to this disk, and hash it.

        Args:
            renew: the hub is asked for its newest, though this machine has one.
            role: None: as its files say.
            far: whether a network is asked; otherwise only this machine.

        Raises:
            NotFound: there is no such file or folder, address or model.
            UsageError: it is there, and has no files of that role.
            Refused, Unreachable: it cannot be had.
        """
        if source.startswith(("http://", "https://")):
            return self._found(source, source, self._of_web(source, far), role or "weights", None)
        if source.startswith("s3://"):
            return self._of_bucket(source, role, far)
        if "://" in source:
            raise UsageError(f"{redacted(source)}: not a path, s3://, https:// or owner/name[@revision] of the hub. Give one of them")
        path = at_home(source)
        if path.exists():
            return self._found(source, str(path.absolute()), path.absolute(), role, _licence(path))
        if HUB_ID.fullmatch(source):
            if far and not renew:
                with contextlib.suppress(NotFound, UsageError):
                    return self._of_hub(source, role, far=False)
            return self._of_hub(source, role, far)
        raise NotFound(source)

    def _found(self, named: str, source: str, path: Path, role: Role | None, licence: str | None) -> Found:
        if path.is_file():
            beside = path.parent / "config.json"
            files = {path.name: path} | ({"config.json": beside} if beside.is_file() and path != beside else {})
            role = role or "weights"
        else:
            names = sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file() and not _hidden(each, path))
            role = role or guessed(path)
            files = {name: path / inside for name, inside in select(role, names).items()}
        if not files:
            raise UsageError(f"{redacted(named)}: has no files that a stage opens as {role}{_hint(path)}")
        _refuse_lost(named, files)
        found = self._files.digests([str(each) for each in files.values()])
        lost = [str(each) for each, (size, _) in zip(files.values(), found, strict=True) if size is None]
        if lost:
            raise Refused(f"{lost[0]}: may not be read. Give this user the right to")
        references = {name: FileRef(size=size or 0, sha256=digest or "") for name, (size, digest) in zip(files, found, strict=True)}
        return Found(role, source, Import(files=references), files, path, licence)

    # From elsewhere

    def _of_web(self, url: str, far: bool) -> Path:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2] or "weights"
        if name.startswith(".") or "\\" in name:
            raise UsageError(f"{redacted(url)}: ends in {name!r}, which is no name of a file. Name the file itself")
        target = self._place(url) / name
        if far:
            _download(url, target)
        elif not target.exists():
            raise NotFound(redacted(url))
        return target

    def _of_bucket(self, source: str, role: Role | None, far: bool) -> Found:
        from orchestrator.stores import open_store

        if not far:
            raise NotFound(source)
        parent, _, last = source.rstrip("/").rpartition("/")
        single = bool(re.search(r"\.(safetensors|pth?|bin|ckpt)$", last))
        try:
            store = open_store(parent if single else source, self._env)
        except UsageError as error:
            raise UsageError(str(error).replace("store ", "", 1)) from error
        names = [last] if single else list(store.list(""))
        if not single and not names:
            raise NotFound(source)
        kind = role or ("weights" if single else None)
        folder = self._place(source)
        if kind is None:
            for name in ("config.json", "model_index.json"):
                if name in names:
                    store.download(name, folder / name)
            kind = guessed(folder)
        wanted = {last: last} if single else select(kind, names)
        if not wanted:
            raise UsageError(f"{source}: has no files that a stage opens as {kind}")
        for inside in wanted.values():
            store.download(inside, folder / inside)
        return self._found(source, source, folder / last if single else folder, kind, None)

    def _of_hub(self, source: str, role: Role | None, far: bool) -> Found:
        name, _, revision = source.partition("@")
        if not far:
            folder = _cached(name, revision or "main", self._env)
            return self._found(source, f"{name}@{folder.name}", folder, role, _licence(folder))
        try:
            from huggingface_hub import HfApi, constants, snapshot_download
            from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
        except ImportError as error:
            raise UsageError(
                f"{source}: huggingface_hub is not installed here, which asks the hub. Give a path, s3:// or https://"
            ) from error
        asked: dict[str, Any] = {"revision": revision or None, "allow_patterns": _patterns(role), "ignore_patterns": IGNORED}
        try:
            folder = Path(snapshot_download(name, etag_timeout=TIMEOUT_S, local_files_only=constants.is_offline_mode(), **asked))
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise NotFound(source) from error
        except LocalEntryNotFoundError as error:
            if constants.is_offline_mode():
                raise NotFound(source) from error
            raise Unreachable(f"{source}: {constants.ENDPOINT} does not answer; nothing was done. Give a path, or run again") from error
        except OSError as error:
            raise Unreachable(f"{source}: {' '.join(str(error).split())[:200]}; nothing was done") from error
        licence = _licence(folder)
        if licence is None and not constants.is_offline_mode():
            with contextlib.suppress(Exception):
                card = HfApi().model_info(name, revision=folder.name).card_data
                licence = str(card.license) if card and card.license else None
        return self._found(source, f"{name}@{folder.name}", folder, role, licence)

    def _place(self, source: str) -> Path:
        return self._downloads / hashlib.sha256(source.encode()).hexdigest()[:16]


def _refuse_lost(named: str, files: Mapping[str, Path]) -> None:
    """Raises UsageError, where an index names a file that is not there."""
    for name, path in files.items():
        if not name.endswith(".safetensors.index.json"):
            continue
        try:
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"{redacted(named)}: {name} is no index of shards ({error!r}). Copy the model again") from error
        inside = name.rpartition("/")[0]
        lost = sorted(shard for shard in shards if (f"{inside}/{shard}" if inside else shard) not in files)
        if lost:
            raise UsageError(f"{redacted(named)}: {name} names {lost[0]}, which is not there. Copy the model again")


def guessed(folder: Path) -> Role:
    """As what a folder is imported, by its config.json."""
    try:
        told = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return "weights"
    if not isinstance(told, dict):
        return "weights"
    return "autoencoder" if told.get("_class_name") == "AutoencoderKL" else "text" if told.get("model_type") == "t5" else "weights"


def _cached(name: str, revision: str, env: Mapping[str, str]) -> Path:
    """What this machine has of a model of the hub, in the layout of the hub's own cache; its client is not imported. Raises NotFound."""
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    cache = Path(env.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    reference = cache / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = cache / "snapshots" / commit
    if not folder.is_dir():
        raise NotFound(name)
    return folder


def _patterns(role: Role | None) -> list[str]:
    match role:
        case "autoencoder":
            return ["config.json", "*.safetensors", "*.index.json", "vae/*.json", "vae/*.safetensors", "README.md", "LICENSE*"]
        case "text":
            return ["*.json", "*.model", "*.txt", "model*.safetensors", "text_encoder/*", "tokenizer/*", "README.md", "LICENSE*"]
    return ["*.json", "*.safetensors", "*.pth", "*.pt", "transformer/*", "README.md", "LICENSE*"]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _hint(path: Path) -> str:
    pickled = path.is_dir() and any(each.suffix in (".bin", ".pt", ".pth") for each in path.rglob("*"))
    return "; pickled encoders are not opened. Save them as safetensors" if pickled else ". Name the folder or file that has them"


def _licence(path: Path) -> str | None:
    """What a model card beside the files says of it."""
    folder = path if path.is_dir() else path.parent
    try:
        card = (folder / "README.md").read_text(errors="replace")
    except OSError:
        return None
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    said = re.search(r"^license:[ \t]*(\S.*)$", head[1], re.MULTILINE) if head else None
    return said[1].strip().strip("'\"") if said else None


# --- A download -------------------------------------------------------------------------------------------------------------------------


def _download(url: str, target: Path) -> None:
    """Whole or not at all, and from where an earlier try broke off. What is here and still the same there is not fetched again.

    Raises NotFound, Refused, Unreachable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, mark = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.etag")
    failed = 0
    while True:
        had = partial.stat().st_size if partial.exists() else 0
        try:
            if _go_on(url, partial, mark, whole=target.exists()):
                partial.replace(target)
            return
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (404, 410):
                    raise NotFound(redacted(url)) from None
                if error.code == 416:  # what lies here is more than there is
                    partial.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 425, 429):
                    raise Refused(f"{redacted(url)}: answers {error.code} {error.reason}. Give an address that may be read") from None
                said = f"answers {error.code}"
        except (OSError, http.client.HTTPException) as error:
            said = f"does not answer ({' '.join(str(getattr(error, 'reason', error)).split())[:120]})"
        failed = 0 if partial.exists() and partial.stat().st_size > had else failed + 1
        if failed >= TRIES:
            raise Unreachable(f"{redacted(url)}: {said}, {TRIES} times; nothing was done. Run again: it goes on where it broke off")
        time.sleep(min(FIRST_PAUSE_S * 2**failed, LONGEST_PAUSE_S))


def _go_on(url: str, partial: Path, mark: Path, *, whole: bool) -> bool:
    """Append to what is there, if the server still has the same file. Raises HTTPError, OSError, HTTPException.

    Args:
        whole: whether an earlier download is here.

    Returns:
        whether there is something new; otherwise the earlier download still is what lies there.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "osctl", "Accept-Encoding": "identity"})
    here = partial.stat().st_size if partial.exists() and mark.exists() else 0
    if here:
        request.add_header("Range", f"bytes={here}-")
        request.add_header("If-Range", mark.read_text())
    elif whole and mark.exists():
        request.add_header("If-None-Match", mark.read_text())
    with contextlib.ExitStack() as opened:
        try:
            answer = opened.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except urllib.error.HTTPError as error:
            if error.code != 304:
                raise
            error.close()
            return False
        goes_on = answer.status == 206
        etag = answer.headers.get("ETag", "")
        if not goes_on:
            here = 0
            if etag and not etag.startswith("W/"):
                mark.write_text(etag)
            else:
                mark.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        with partial.open("ab" if goes_on else "wb") as file:
            _copy(answer, file)
            size = file.tell()
    if length is not None and size != here + int(length):
        raise OSError(f"broke off after {size:,} of {here + int(length):,} bytes")
    return True


def _copy(source: Any, file: BinaryIO) -> None:
    while chunk := source.read(CHUNK):
        file.write(chunk)
