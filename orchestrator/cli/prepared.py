"""What `osctl data` says and does of data sets that were prepared: what they are made of, and a source taken out."""

from __future__ import annotations

import contextlib
import getpass
import shlex
import socket
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from opensora.printable import several
from orchestrator.cli import output

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.pipelines.host import Host
    from orchestrator.ports import Store
    from orchestrator.prepare.trainings import Training

SHOWN = 50
"""Sources that a table shows; json has all. Arbitrary: what a person reads."""


def show_about(store: Store, wanted: str, output_: output.Format) -> None:
    """Counts of the steps and sources of a prepared data set. Raises Refused, Unreachable."""
    from orchestrator.errors import NotFound, Refused
    from orchestrator.inputs import datasets
    from orchestrator.prepare.publish import described

    _, one = datasets.find(store, wanted)
    if one is None or one.prepared is None:
        raise Refused(f"data show {wanted} --about: was not prepared, its clips were there already. See its rows: osctl data show {wanted}")
    try:
        about = described(store, one.name, one.source.rpartition("/")[2])
    except NotFound:
        raise Refused(f"data show {wanted} --about: {one.source} has no DATASET.json any more. Prepare it again") from None
    steps = [{"name": name, **counts} for name, counts in about.steps.items()]
    latents = sorted({path.split("/")[1] for path in about.files if path.startswith("latents/")})
    whole = {
        "name": one.name, "digest": about.digest, "place": one.source, "clips": about.clips, "hours": about.seconds / 3600,
        "bytes": about.bytes, "licences": list(about.licences), "time": one.time, "steps": steps, "sources": about.sources,
        "config": about.config, "latents": latents, "alone": about.alone,
    }  # fmt: skip
    if output_ is not output.Format.table:
        output.emit(whole, output_)
        return
    output.table([_step(step) for step in steps], {"name": "step", "in": "in", "kept": "kept", "lost": "dropped, put aside", "why": "why"})
    if about.alone:
        output.table([{"rule": rule, "clips": count} for rule, count in about.alone.items()], {"rule": "rule", "clips": "would drop alone"})
    sources = [dict(source) | {"digest": str(source["sha256"])[:12]} for source in about.sources[:SHOWN]]
    output.table(sources, {"name": "source", "clips": "clips", "licence": "licence", "digest": "sha256", "uri": "from"})
    if len(about.sources) > SHOWN:
        output.note(f"and {len(about.sources) - SHOWN:,} more sources: -o json has all of them")
    encoded = f", encoded for {several(len(latents), 'stage')}" if latents else ""
    size = f"{several(about.clips, 'clip')}, {output.duration(about.seconds)}, {output.gigabytes(about.bytes)}{encoded}"
    output.note(f"{one.name}: {size}, digest {about.digest[:16]}, at {one.source}")


def take_out(store: Store, wanted: str, name: str | None, host: Host, *, dry_run: bool, output_: output.Format) -> None:
    """Raises Refused, CorruptCheckpoint, Unreachable."""

    from orchestrator.driver.clock import SystemClock
    from orchestrator.driver.held_lease import HeldLease
    from orchestrator.errors import Unreachable
    from orchestrator.ledger.lease import TTL_S
    from orchestrator.ledger.store import Ledger
    from orchestrator.pipelines.preparing import folder_of
    from orchestrator.prepare.records import Keys
    from orchestrator.prepare.remove import find, manifests_with
    from orchestrator.prepare.remove import take_out as take
    from orchestrator.prepare.trainings import trainings_on

    meant = find(store, wanted, name)
    about = f"{meant.source['name']} ({meant.source['uri']}), {several(meant.source['clips'], 'clip')} of {meant.name}"
    if dry_run:
        trainings = trainings_on(store, manifests_with(store, meant))
        output.note(f"would take out {about}; a shorter version of {meant.name} would be published, and older ones deleted")
        _name_trainings(trainings, None)
        if output_ is not output.Format.table:
            output.emit({"name": meant.name, "source": dict(meant.source), **_trainings(trainings)}, output_)
        return
    holder = f"{getpass.getuser()}@{socket.gethostname()}"
    handle = Ledger(store, Keys(meant.name).folder).acquire(time.time())
    try:
        again = f"osctl data list --store {shlex.quote(store.url)}"
        with HeldLease(handle, SystemClock(), TTL_S, f"data set {meant.name}", follow="osctl prepare status", again=again):
            taken = take(store, meant, folder_of(host, meant.name), handle, now=time.time(), holder=holder)
    finally:
        with contextlib.suppress(Unreachable):
            handle.release()
    left = taken.published.description
    output.note(
        f"took out {about}: {several(taken.objects, 'object')} deleted; {several(left.clips, 'clip is', 'clips are')} left, "
        f"at {taken.published.place}"
    )
    output.note("the raw video itself is where it was, and so are copies that others made of the data set")
    _name_trainings(taken.trainings, taken.published.place)
    row = {
        "name": meant.name, "source": dict(meant.source), "objects": taken.objects, "clips": left.clips, "place": taken.published.place,
        "digest": left.digest, **_trainings(taken.trainings),
    }  # fmt: skip
    if output_ is not output.Format.table:
        output.emit(row, output_)


def clean(store: Store, name: str, host: Host, *, dry_run: bool, output_: output.Format) -> None:
    """`osctl data clean`. Raises Refused, Unreachable."""
    from orchestrator.driver.clock import SystemClock
    from orchestrator.driver.held_lease import HeldLease
    from orchestrator.errors import Refused, Unreachable
    from orchestrator.ledger.lease import TTL_S
    from orchestrator.ledger.store import Ledger
    from orchestrator.pipelines.preparing import folder_of
    from orchestrator.prepare.clean import discard, unused
    from orchestrator.prepare.records import Keys

    if not store.children(f"{Keys(name).folder}/"):
        raise Refused(f"data clean {name}: {store.url} has no data set of that name. There are: osctl data list")
    handle = Ledger(store, Keys(name).folder).acquire(time.time())
    try:
        with HeldLease(handle, SystemClock(), TTL_S, f"data set {name}", follow="osctl prepare status"):
            found = unused(store, name, folder_of(host, name))
            here = found.bytes_here
            objects = sum(len(keys) for keys in found.objects.values())
            if not dry_run:
                discard(store, found)
    finally:
        with contextlib.suppress(Unreachable):
            handle.release()
    steps = sorted({*found.objects, *_places(found.folders)})
    if not steps:
        output.note(f"{name}: all that is kept was used by its last run")
    else:
        done = "would remove" if dry_run else "removed"
        output.note(f"{name}: {done} {several(objects, 'object')} in {store.url} and {here / 1e6:,.1f} MB here: {', '.join(steps)}")
    if output_ is not output.Format.table:
        output.emit({"name": name, "objects": objects, "bytes_here": here, "of": steps, "dry_run": dry_run}, output_)


def _places(folders: Iterable[Path]) -> list[str]:
    return [f"{one.parent.name}/{one.name}" for one in folders]


def _trainings(trainings: Sequence[Training]) -> dict[str, Any]:
    states = [{"name": one.name, "state": one.state, "step": one.step, "parent": one.parent or None} for one in trainings]
    return {"models": [one.name for one in trainings], "trainings": states}


def _name_trainings(trainings: Sequence[Training], place: str | None) -> None:
    """`place`: of the shorter version; None: there is none yet."""
    from orchestrator.inputs.taken_out import anew

    if not trainings:
        output.note("no training of this store has used it")
    for one in trainings:
        by = f" (by {one.parent}, from whose weights it began)" if one.parent else ""
        if place is None:
            again = ""
        elif one.parent:
            again = f". To train it anew, train {one.parent} anew first; then: osctl resume {one.pipeline} --stage {one.stage}"
        else:
            again = f". To train it anew: {anew(one.pipeline, one.stage, place)}"
        match one.state:
            case "committed":
                output.note(f"trained on it: {one.name}{by}{again}")
            case "under way":
                saved = f"its last checkpoint at step {one.step}" if one.step else "without a checkpoint yet"
                output.note(f"is being trained on it: {one.name}{by}, {saved}. To stop it: osctl cancel {one.pipeline}{again}")
            case "not finished":
                output.note(f"was trained on it to step {one.step}, and not finished: {one.name}{by}{again}")


def _step(step: dict[str, Any]) -> dict[str, Any]:
    reasons = {**step.get("dropped", {}), **step.get("quarantined", {})}
    shown = sorted(reasons.items(), key=lambda item: -item[1])
    return step | {"lost": sum(reasons.values()), "why": "; ".join(f"{reason}: {count:,}" for reason, count in shown[:4])}
