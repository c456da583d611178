"""Imported weights and encoders in a store: files under the digest of what they are, where they came from, and the names people gave them.

    weights/<digest>/import.json               the files: {name: {size, sha256}}; its bytes have this digest
    weights/<digest>/files/<name>              the files themselves
    weights/<digest>/STORED.json               written when all of them are there; without it the import is used where it lies
    weights/<digest>/sources/<number>.json     where it came from, under which licence
    weights/<name>/registered/<number>.json    what a name means; the last one counts

Owns these keys and the records in them. Nothing is overwritten. Refuses to fetch anything from elsewhere (`import_sources`
does), and to open a file: what is in it is for the trainer to judge.
"""

from __future__ import annotations

import getpass
import hashlib
import re
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, StoreConflict, UsageError
from orchestrator.ledger.record import Damaged, Record
from orchestrator.ledger.records import FileRef
from orchestrator.ports import Store, check_key, numbered

ROOT = "weights"
NAME = re.compile(r"[a-z]([a-z0-9.-]{0,38}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-f]{64}")
TRANSFERS = 4
Role = Literal["weights", "autoencoder", "text"]
"""As which part of a stage something is imported."""


class Import(Record):
    """What is imported. Its digest is its identity: whoever writes it writes the same bytes."""

    files: dict[str, FileRef]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


class Source(Record):
    """Where an import came from."""

    manifest: str
    """Digest of the import."""
    role: Role
    source: str
    """A path of `holder`'s machine, an address, or owner/name@commit of the hub."""
    licence: str | None
    """As its source or a person said; None: nobody did."""
    name: str | None = None
    """What it is called in this store."""
    time: float
    holder: str


class Stored(Record):
    """That all files of an import are in the store."""


def holder() -> str:
    """Who writes a source down, for people."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def check_name(name: str) -> str:
    """Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"weights {name!r}: a name has lower-case letters, digits, '-' and '.', begins with a letter and has at most 40 characters. "
            "Choose another one"
        )
    return name


def select(role: Role, names: Sequence[str]) -> dict[str, str]:
    """Of the files of a model or a pipeline those that a role needs: name in the import → name in the source. Empty: it has none.

    Mirrors what the trainer opens: `opensora.checkpoint.foreign` and `opensora.encoders.pretrained`.
    """
    match role:
        case "weights":
            inside = "transformer/" if "model_index.json" in names else ""
            if "CHECKPOINT.json" in names:
                return {name: name for name in names if "/" not in name}
            return _model(names, inside, pickles=True)
        case "autoencoder":
            inside = "vae/" if "vae/config.json" in names else ""
            return _model(names, inside) if f"{inside}config.json" in names else {}
        case "text":
            inside = "text_encoder/" if "text_encoder/config.json" in names else ""
            words = "tokenizer/" if any(name.startswith("tokenizer/") for name in names) else ""
            if f"{inside}config.json" not in names:
                return {}
            model = [inside + name for name in _model(names, inside)]
            tokens = [name for name in names if name.rpartition("/")[0] == words.rstrip("/") and re.search(r"\.(json|model|txt)$", name)]
            return {name: name for name in sorted({*model, *tokens})} if model else {}


def _model(names: Sequence[str], inside: str, *, pickles: bool = False) -> dict[str, str]:
    here = [name.removeprefix(inside) for name in names if name.startswith(inside) and "/" not in name.removeprefix(inside)]
    files = [name for name in here if name.endswith(".safetensors") and ".fp16." not in name and ".non_ema." not in name]
    whole = [name for name in ("model.safetensors", "diffusion_pytorch_model.safetensors") if name in files]
    index = [name for name in here if name.endswith(".safetensors.index.json") and ".fp16." not in name]
    chosen = whole[:1] if whole and pickles else [*files, *index]
    if not chosen and pickles:
        chosen = [name for name in here if name.endswith((".pt", ".pth", ".bin"))]
    if not chosen:
        return {}
    return {name: inside + name for name in sorted({*chosen, *({"config.json"} & set(here))})}


# --- In the store -------------------------------------------------------------------------------------------------------------------------


def put(store: Store, imported: Import, files: Mapping[str, Path] | None) -> str:
    """Write it down, with its files where they are given; its digest. Idempotent: what is there is not sent again.

    Raises Refused where a file is not what it was when it was hashed, Unreachable.
    """
    digest = imported.digest()
    store.create(f"{ROOT}/{digest}/import.json", imported.encode())
    if files is not None and not is_stored(store, digest):
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: _send(store, digest, name, imported.files[name], files[name]), imported.files))
        store.create(f"{ROOT}/{digest}/STORED.json", Stored().encode())
    return digest


def _send(store: Store, digest: str, name: str, reference: FileRef, path: Path) -> None:
    found = _hash(path)
    if found != reference:
        raise Refused(f"{path}: sha256 {found.sha256}, it was {reference.sha256} when it was read before; run again")
    try:
        store.upload(f"{ROOT}/{digest}/files/{check_key(name)}", path)
    except StoreConflict as error:
        raise CorruptCheckpoint(f"import {error}; remove that object, and run again") from error


def is_stored(store: Store, digest: str) -> bool:
    """Whether all files are in the store. Raises Unreachable."""
    try:
        store.size(f"{ROOT}/{digest}/STORED.json")
    except NotFound:
        return False
    return True


def get(store: Store, digest: str) -> Import:
    """Raises NotFound, CorruptCheckpoint where it is not what its digest says, Unreachable."""
    key = f"{ROOT}/{digest}/import.json"
    try:
        imported = Import.decode(store.read(key).data)
    except Damaged as error:
        raise CorruptCheckpoint(f"import {key}: {error}; put back what was written") from error
    if imported.digest() != digest:
        raise CorruptCheckpoint(f"import {key}: has digest {imported.digest()}; put back what was written")
    return imported


def fetch(store: Store, digest: str, target: Path) -> Path:
    """Bring the files to a folder, every byte compared; it appears whole or not at all. One that is there is believed: a digest names it.

    Raises Refused, CorruptCheckpoint naming the file and both values, Unreachable.
    """
    if target.is_dir():
        return target
    if not is_stored(store, digest):
        raise Refused(f"import {digest[:12]}: its files are not in {store.url}. Bring them in with: osctl weights add NAME SOURCE")
    try:
        imported = get(store, digest)
    except NotFound as error:
        raise CorruptCheckpoint(f"import {error}: is not in {store.url}; put back what was written") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def receive(name: str) -> None:
        key, reference = f"{ROOT}/{digest}/files/{check_key(name)}", imported.files[name]
        try:
            store.download(key, partial / name)
        except NotFound:
            raise CorruptCheckpoint(f"import {key}: is not there; put back the file that was stored") from None
        if (found := _hash(partial / name)) != reference:
            raise CorruptCheckpoint(
                f"import {key}: {found.size} bytes of sha256 {found.sha256}, stored were {reference.size} of {reference.sha256}; "
                "put back the file that was stored"
            )

    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(receive, imported.files))
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def add_source(store: Store, source: Source) -> Source:
    """Write down where an import came from; said again, nothing changes. What lies there comes back."""
    place = f"{ROOT}/{source.manifest}/sources" if source.name is None else f"{ROOT}/{source.name}/registered"
    while True:
        there = numbered(store, place)
        before = list(_read(store, there.values()))
        for one in before[-1:] if source.name is not None else before:
            if (one.manifest, one.role, one.source, one.licence) == (source.manifest, source.role, source.source, source.licence):
                return one
        try:
            store.create(f"{place}/{max(there, default=0) + 1:06d}.json", source.encode())
            return source
        except StoreConflict:
            continue


def named(store: Store) -> list[Source]:
    """What every name means now."""
    names = [name for name in store.children(f"{ROOT}/") if not DIGEST.fullmatch(name)]
    found = (list(_read(store, numbered(store, f"{ROOT}/{name}/registered").values())) for name in names)
    return [each[-1] for each in found if each]


def sources_of(store: Store, digest: str) -> list[Source]:
    """Where an import came from: first those with a name."""
    return [one for one in named(store) if one.manifest == digest] + list(
        _read(store, numbered(store, f"{ROOT}/{digest}/sources").values())
    )


def find(store: Store, name: str, role: Role, names: Sequence[Source] | None = None) -> Source | None:
    """What a stage's word means here: a name, or a source that was brought in before; of a hub id without a revision, the newest.

    `names`: what every name means (`named`), where it was read already.
    """
    known = list(named(store) if names is None else names)
    for one in known:
        if one.name == name:
            return one
    for digest in store.children(f"{ROOT}/"):
        if DIGEST.fullmatch(digest):
            known += _read(store, numbered(store, f"{ROOT}/{digest}/sources").values())
    same = [one for one in known if one.role == role and (one.source == name or ("@" not in name and one.source.startswith(f"{name}@")))]
    return max(same, key=lambda one: one.time, default=None)


def _read(store: Store, keys: Iterable[str]) -> Iterable[Source]:
    for key in keys:
        try:
            yield Source.decode(store.read(key).data)
        except (Damaged, NotFound):  # one that cannot be read hides no other
            continue


def _hash(path: Path) -> FileRef:
    with path.open("rb") as file:
        return FileRef(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
