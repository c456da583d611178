"""`osctl data`: what a data set is, written down in the store. register, add, list, show, remove."""

from __future__ import annotations

import getpass
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensora.printable import several
from orchestrator.cli import options, output
from orchestrator.cli.options import stage_names
from orchestrator.cli.subject import opened
from orchestrator.cli.typed import Command

if TYPE_CHECKING:
    from opensora.dataset.manifest import DataManifest
    from orchestrator.inputs.datasets import DataSet
    from orchestrator.ports import Store

app = typer.Typer(no_args_is_help=True, help="Data sets by content: which clips with which captions, wherever they lie.")

Name = Annotated[str, typer.Argument(help="What to call it: lower-case letters, digits, '-' and '.'.")]


@app.command(cls=Command)
def register(
    name: Name,
    source: Annotated[
        str, typer.Argument(metavar="PATH|URI", help="A folder of captioned clips, or a table of them (path,text); a path or an address.")
    ],
    file: options.File = None,
    store: options.Store = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="NAME|FILE", help="Read it by a Job in this cluster: for what only its pods see."),
    ] = None,
    by_name: Annotated[
        bool,
        typer.Option("--by-name", help="Read the CSV alone: captions and paths count, contents do not. For data nobody wants to hash."),
    ] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Read a data set where it lies, hash every clip, and write its manifest into the store. Repeating it reads what changed.

    Examples: osctl data register bikes ~/clips          osctl data register hq /data/hq.csv --cluster pool.yaml --store s3://b/runs
    """
    from orchestrator.errors import NotFound, Refused
    from orchestrator.inputs import datasets
    from orchestrator.inputs.data_files import DataFiles
    from orchestrator.inputs.own_clips import source_of
    from orchestrator.pipelines.host import Host

    datasets.check_name(name)
    place = source_of(source)
    if cluster is not None:
        from orchestrator.pipelines.register_job import register_in_cluster

        one = register_in_cluster(opened(file, store=store, cluster=cluster), name, place.path, output.note, by_name=by_name)
        output.note(f"{name}: {several(one.rows, 'row')}, {_size(one.size)}, read in the cluster")
        output.emit(_row(one), output_, _COLUMNS)
        return
    kept = _store(file, store)
    files = DataFiles(Host.here().home)
    try:
        manifest, read = files.scan(place, by="name" if by_name else "content", progress=Progress(name))
    except NotFound as error:
        raise Refused(f"data register {name}: {error} is not there, as seen from this machine. Correct the path") from None
    kept.probe()
    holder = f"{getpass.getuser()}@{socket.gethostname()}"
    one = datasets.register(kept, name, place.path, manifest, now=time.time(), holder=holder)
    output.note(f"{name}: {read.layout}; {several(one.rows, 'row')}, {_size(one.size)}, {_size(files.bytes_read)} of them read now")
    for remark in read.notes:
        output.note(f"{name}: {remark}")
    if one.unreadable:
        output.note(f"{name}: {several(one.unreadable, 'file')} cannot be read; `osctl data show {name}` lists them")
    output.emit(_row(one), output_, _COLUMNS)


@app.command(cls=Command)
def add(
    name: Name,
    folder: Annotated[str, typer.Argument(metavar="PATH", help="A folder of captioned clips, or a table of them, on this machine.")],
    file: options.File = None,
    store: options.Store = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much would be sent, and stop.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Send clips of this machine into a bucket, for pods that do not see its disk. Repeating it sends what is missing.

    Examples: osctl data add bikes ~/clips --store s3://bucket/runs          osctl data add bikes ~/clips --store s3://bucket/runs --dry-run
    """
    from orchestrator.errors import NotFound, Refused, UsageError
    from orchestrator.inputs import datasets, sent_clips
    from orchestrator.inputs.data_files import DataFiles
    from orchestrator.inputs.own_clips import source_of
    from orchestrator.pipelines.host import Host

    datasets.check_name(name)
    source = source_of(folder)
    if "://" in source.path:
        raise UsageError(
            f"data add {name}: {source.path} is no path of this machine. Train on it where it lies: osctl launch --data ADDRESS"
        )
    kept = _store(file, store)
    if not kept.url.startswith("s3://"):
        fact = f"data add {name}: store {kept.url} is a folder of this machine, whose attempts read clips where they lie"
        raise Refused(f"{fact}. Name a bucket: --store s3://bucket/prefix")
    files = DataFiles(Host.here().home)
    try:
        manifest, read = files.scan(source, progress=Progress(name))
    except NotFound as error:
        raise Refused(f"data add {name}: {error} is not there, as seen from this machine. Correct the path") from None
    if read.members:
        fact = f"data add {name}: {source.path} holds its clips in tars, which are read where they lie"
        raise Refused(f"{fact}. Copy the folder into the bucket, and name its address: osctl launch --data s3://BUCKET/FOLDER")
    sending = sent_clips.prepare(kept, name, manifest, files.places(source, read))
    output.note(f"{name}: {read.layout}; {several(len(sending.clips), 'clip')}, {_size(sending.size)}")
    for remark in read.remarks:
        output.note(f"{name}: {remark}")
    if sending.unreadable:
        output.note(f"{name}: {several(sending.unreadable, 'file is', 'files are')} not there or may not be read, and left out")
    output.note(
        f"{name}: to send: {several(len(sending.missing), 'clip')} of {_size(sending.missing_size)} not in {kept.url} yet, about "
        f"{output.duration(sending.seconds)} at {sent_clips.ASSUMED_MBIT_S} Mbit/s; all of them kept there: about "
        f"{output.dollars(sending.usd_a_month)} a month (assumed: ${sent_clips.GB_MONTH_USD} a GB)"
    )
    if dry_run:
        return
    if not sending.clips:
        raise Refused(f"data add {name}: {source.path} has no clip that can be read; nothing was sent. Correct its table or its files")
    kept.probe()
    place = sent_clips.send(kept, sending, Progress(name, "sent"))
    holder = f"{getpass.getuser()}@{socket.gethostname()}"
    one = datasets.register(kept, name, place, sending.manifest, now=time.time(), holder=holder)
    output.emit(_row(one), output_, _COLUMNS)
    output.note(f"next, with the --cluster of your launch: osctl launch --data {place} --store {kept.url}")


@app.command("list", cls=Command)
def list_(file: options.File = None, store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """The data sets that have a name in a store; of those that were prepared also hours, licences and date.

    Example: osctl data list --store s3://bucket/runs
    """
    from orchestrator.inputs import datasets

    kept = _store(file, store)
    rows = [_row(one) for one in datasets.registered(kept)]
    if not rows:
        output.note(f"no data sets in {kept.url}. Register one with: osctl data register NAME PATH")
    output.emit(rows, output_, _COLUMNS)


@app.command(cls=Command)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A data set's name, digits of its digest, or where it lies.")],
    other: Annotated[str | None, typer.Argument(help="Another one: show in which rows they differ.")] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE.png", help="Draw it as the model sees it: a row for each clip, into this file.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="--sheet: in the sizes and at the rate of this stage of the pipeline.", autocompletion=stage_names),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size", metavar="TxHxW", help="--sheet: frames x height x width, e.g. 8x144x256. Repeatable: each clip goes to the nearest."
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option("--fps", min=0.01, help="--sheet: frames a second. Default: 8.")] = None,
    clips: Annotated[int, typer.Option("--clips", min=1, max=1000, help="--sheet: how many of the first ones.")] = 24,
    about: Annotated[
        bool, typer.Option("--about", help="Of a data set that was prepared: counts of its steps by reason, and its sources.")
    ] = False,
    file: options.File = None,
    settings: options.Set = None,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """The rows of a data set, or in which rows two of them differ; with --sheet a picture of what the model sees of it.

    Examples: osctl data show bikes          osctl data show 0f3a9c bikes -o json          osctl data show ~/clips --sheet clips.png

    osctl data show mine --about
    """
    from orchestrator.errors import UsageError

    if about:
        if other is not None or sheet is not None:
            raise UsageError("data show --about: says what one data set is made of. Leave out the second one and --sheet")
        from orchestrator.cli.prepared import show_about

        show_about(_store(file, store), name, output_)
        return
    if sheet is None and (stage or size or fps):
        raise UsageError("data show: --stage, --size and --fps say how a picture is drawn. Name its file: --sheet FILE.png")
    if sheet is not None:
        from orchestrator.cli import sheet as drawing
        from orchestrator.pipelines.host import Host

        if other is not None:
            raise UsageError(f"data show {name} {other}: --sheet draws one data set. Name one")
        if stage is not None and (size or fps):
            raise UsageError(f"data show --stage {stage}: has sizes and a rate of its own. Leave out --size and --fps")
        asked = drawing.as_asked(size or (), fps)
        if stage is not None:
            asked = drawing.of_stage(opened(file, settings=settings, store=store), stage)
        drawn = drawing.draw(Host.here(), _place(name, file, store), sheet, asked, clips, stage)
        drawing.emit(drawn, sheet, output_)
        return

    def manifest(wanted: str) -> DataManifest:
        return _registered(wanted, file, store) if not _is_place(wanted, file, store) else _manifest_here(wanted)

    rows: list[dict[str, Any]]
    if other is None:
        found = manifest(name)
        rows = [{"name": row.path, "bytes": row.size, "sha256": _content(row.sha256, found), "text": row.text} for row in found.rows]
        shown = [row | {"sha256": str(row["sha256"])[:12]} for row in rows] if output_ is output.Format.table else rows
        output.emit(shown, output_, {"name": "path", "bytes": "bytes", "sha256": "sha256", "text": "caption"})
        return
    from opensora.dataset.manifest import rows_that_differ

    differences = rows_that_differ(manifest(name), manifest(other))
    rows = [{"name": one.path, "change": one.kind, "old": one.old, "new": one.new} for one in differences]
    if not rows:
        output.note(f"{name} and {other} are the same data set")
    output.emit(rows, output_, {"name": "path", "change": "change", "old": name, "new": other})


@app.command(cls=Command)
def remove(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Its name, its address or path, or 6 digits or more of its sha256.")],
    from_: Annotated[
        str | None, typer.Option("--from", metavar="NAME", help="The data set. Default: the only prepared one that has the source.")
    ] = None,
    file: options.File = None,
    store: options.Store = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and which models were trained on it, and stop.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Take a source out of a prepared data set: a version without its clips, which its name means from then on.

    Older versions that hold it are deleted from the store, with their latents and all that was kept of its steps; no later preparation
    under this name uses it. The raw video itself is left alone. Models that were trained on it are named: no model forgets.

    Examples: osctl data remove holiday.mp4 --from mine          osctl data remove 0f3a9c --store s3://bucket/runs
    """
    from orchestrator.cli.prepared import take_out
    from orchestrator.pipelines.host import Host

    take_out(_store(file, store), source, from_, Host.here(), dry_run=dry_run, output_=output_)


@app.command(cls=Command)
def clean(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A prepared data set.")],
    file: options.File = None,
    store: options.Store = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Remove what is kept of a preparation's steps and its last run did not use: of other prompts, detectors, thresholds of the probe.

    Whoever goes back to those settings pays for their captions and decodes again. Published versions stay as they are.

    Examples: osctl data clean mine --dry-run          osctl data clean mine --store s3://bucket/runs
    """
    from orchestrator.cli.prepared import clean
    from orchestrator.pipelines.host import Host

    clean(_store(file, store), name, Host.here(), dry_run=dry_run, output_=output_)


def _registered(wanted: str, file: str | None, store: str | None) -> DataManifest:
    """Raises Refused."""
    from orchestrator.errors import NotFound, Refused
    from orchestrator.inputs import datasets

    kept = _store(file, store)
    digest, _ = datasets.find(kept, wanted)
    try:
        return datasets.get_manifest(kept, digest)
    except NotFound:
        raise Refused(f"data set {wanted}: its manifest {digest} is not in {kept.url}. Register the data again") from None


def _manifest_here(place: str) -> DataManifest:
    """What lies at a place, read now. Raises Refused."""
    from orchestrator.errors import NotFound, Refused
    from orchestrator.inputs.data_files import DataFiles
    from orchestrator.inputs.own_clips import source_of
    from orchestrator.pipelines.host import Host

    try:
        return DataFiles(Host.here().home).manifest(source_of(place), by="content", progress=Progress(place))
    except NotFound as error:
        raise Refused(f"data show {place}: {error} is not there. Correct the path") from None


def _is_place(wanted: str, file: str | None, store: str | None) -> bool:
    """Whether it says where a data set lies. A name that is registered wins over a folder that is called so."""
    from orchestrator.environment import at_home
    from orchestrator.errors import Refused
    from orchestrator.inputs import datasets

    if "/" in wanted or wanted.startswith((".", "~")):
        return True
    if not at_home(wanted).exists():
        return False
    try:
        datasets.find(_store(file, store), wanted)
    except Refused:
        return True
    return False


def _place(wanted: str, file: str | None, store: str | None) -> str:
    """Where a data set lies. Raises Refused."""
    from orchestrator.errors import Refused
    from orchestrator.inputs import datasets

    if _is_place(wanted, file, store):
        return wanted
    _, one = datasets.find(_store(file, store), wanted)
    if one is None:
        raise Refused(f"data show {wanted}: has no name, so it is not known where it lies. Name the folder: osctl data show PATH --sheet …")
    return one.source


class Progress:
    """A line now and then on stderr, of reads that take long."""

    SPOKEN_S = 5.0

    def __init__(self, subject: str, done: str = "read") -> None:
        self._subject, self._done, self._spoken = subject, done, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._spoken >= self.SPOKEN_S:
            self._spoken = now
            output.note(f"{self._subject}: {_size(done)} of {_size(total)} {self._done}")


_COLUMNS = {
    "name": "name", "rows": "clips", "length": "length", "size": "size", "licence": "licence", "date": "date", "digest": "digest",
    "by": "by", "source": "source",
}  # fmt: skip


def _row(one: DataSet) -> dict[str, Any]:
    return {
        "name": one.name, "rows": one.rows, "size": _size(one.size), "bytes": one.size, "unreadable": one.unreadable,
        "digest": one.manifest, "by": one.by, "source": one.source, "time": one.time, "holder": one.holder,
        "hours": one.seconds / 3600 if one.prepared is not None else None, "licences": list(one.licences), "prepared": one.prepared,
        "length": output.duration(one.seconds) if one.prepared is not None else None, "licence": ", ".join(one.licences) or None,
        "date": time.strftime("%Y-%m-%d", time.localtime(one.time)),
    }  # fmt: skip


def _content(sha256: str | None, manifest: DataManifest) -> str:
    return sha256 or ("by name" if manifest.by == "name" else "unreadable")


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _store(file: str | None, store: str | None) -> Store:
    """The store alone, where it is named; else the pipeline's."""
    return opened(file, store=store).store
