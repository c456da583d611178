"""What a pod of a cluster is asked to prepare: written into the store before a Job names it, and read there.

Owns that only what pods can see is asked for. Refuses to start anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from opensora.dataset.prepare_config import CaptionLlava, CaptionServer, PrepareConfig
from opensora.printable import quoted
from orchestrator.errors import NotFound, Refused, StoreConflict, UsageError
from orchestrator.inputs import datasets
from orchestrator.inputs.datasets import DataSet
from orchestrator.ledger.record import Damaged
from orchestrator.ports import Store
from orchestrator.prepare import attempts
from orchestrator.prepare.finished import counted
from orchestrator.prepare.records import Keys, Order

FAR = ("s3", "http", "https")
"""Schemes of addresses that a pod reaches."""


def check_seen_by_pods(config: PrepareConfig, volumes: Iterable[str]) -> None:
    """Raises UsageError for what lies on this machine alone, and for an address with credentials in it, which would be written down.

    Args:
        volumes: paths at which a pod has claims with data.
    """
    places = list(volumes)
    for number, given in enumerate(config.sources):
        _check_place(f"sources[{number}]", given.path, places)
    caption = config.caption
    if isinstance(caption, CaptionLlava):
        _check_folder("caption.path", caption.path, places)
    if isinstance(caption, CaptionServer):
        _check_address("caption.url", caption.url)
    if config.filter.scores is not None:
        _check_folder("filter.scores", config.filter.scores, places)


def write(store: Store, order: Order) -> str:
    """Put it into the store; its digest there, 16 hex digits. The same order is the same object. Raises Unreachable, Refused."""
    digest = order.digest()[:16]
    with contextlib.suppress(StoreConflict):
        store.create(Keys(order.name).order(digest), order.encode())
    return digest


def read(store: Store, name: str, digest: str) -> Order:
    """Raises Refused where the store has no such order, Unreachable."""
    key = Keys(name).order(digest)
    try:
        return Order.decode(store.read(key).data)
    except NotFound:
        raise Refused(f"data set {name}: {key} is not in {store.url}. Ask for it again: osctl prepare run") from None
    except Damaged as error:
        raise Refused(f"{key}: {error}; {error.advice}") from error


def made_of(order: Order) -> str:
    """What of an order decides what comes out, as 16 hex digits: neither prices nor pods, nor whether to look again."""
    config = PrepareConfig.model_validate(order.config)
    content = [counted(config), order.stages, order.parents, order.imports]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def done(store: Store, order: Order) -> DataSet | None:
    """The data set that was made by such an order, if its name still means that; less what was taken out since. None: there is none.

    Nothing is looked at again, neither behind addresses nor on claims: no more than a run on a laptop asks a server. Raises Unreachable.
    """
    known = datasets.of_name(store, order.name)
    if not known or known[-1].prepared is None:
        return None
    now = known[-1]
    for one in reversed(attempts.all_of(store, Keys(order.name))):
        if one.intent is not None and one.outcome is not None and one.outcome.class_ == "completed":
            named = now.prepared == one.outcome.dataset or now.time > one.outcome.ended  # later: something was taken out of it
            return now if named and one.intent.made_of == made_of(order) else None
    return None


def is_asked(store: Store, name: str) -> bool:
    """Whether anybody ever asked a cluster for it. Raises Unreachable."""
    return any(True for _ in store.list(f"{Keys(name).folder}/asked/"))


def _check_place(subject: str, path: str, volumes: list[str]) -> None:
    scheme = path.partition("://")[0] if "://" in path else ""
    if scheme in FAR:
        _check_address(subject, path)
    elif scheme or not _below(path, volumes):
        raise UsageError(
            f"{subject}: {quoted(path, 200)} lies on this machine, which no pod sees. Give an address (s3://bucket/films, https://…), or "
            "prepare it here: leave --cluster out"
        )


def _check_folder(subject: str, path: str, volumes: list[str]) -> None:
    if not _below(path, volumes):
        where = f"below one of {', '.join(volumes)}" if volumes else "on a claim that the profile's `volumes` mounts"
        raise UsageError(f"{subject}: {quoted(path, 200)} lies on this machine, which no pod sees. Put the model {where}")


def _check_address(subject: str, address: str) -> None:
    if "@" in urlsplit(address).netloc:  # not quoted: it holds a password
        raise UsageError(f"{subject}: its address holds credentials, and orders are written down. Give it without them")


def _below(path: str, volumes: list[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(one) for one in volumes)
