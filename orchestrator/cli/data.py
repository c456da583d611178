"""`osctl data`: what a data set is, written down in the store. register, list, show."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace, home

if TYPE_CHECKING:
    from opensora.config import FolderSource, ManifestSource
    from opensora.data.manifest import DataManifest
    from orchestrator.adapters.kube.api import Api
    from orchestrator.datasets import DataSet
    from orchestrator.ports import Store

LOOK_S = 1.0
"""Seconds between two looks at a Job."""

app = typer.Typer(no_args_is_help=True, help="Data sets by content: which clips with which captions, wherever they lie.")

Name = Annotated[str, typer.Argument(help="What to call it: lower-case letters, digits, '-' and '.'.")]


@app.command()
def register(
    name: Name,
    source: Annotated[
        str, typer.Argument(metavar="PATH|URI", help="A folder with captions.csv, or a CSV (path,text); a path or an address.")
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
    from orchestrator import datasets
    from orchestrator.adapters.data_files import DataFiles
    from orchestrator.errors import NotFound, Refused

    datasets.check_name(name)
    place = source_of(source)
    if cluster is not None:
        one = _in_cluster(Workspace.open(file, store=store, cluster=cluster), name, place.path, by_name=by_name)
        output.note(f"{name}: {one.rows:,} rows, {_size(one.size)}, read in the cluster")
        output.emit(_row(one), output_, _COLUMNS)
        return
    opened = _store(file, store)
    files = DataFiles(home())
    try:
        manifest = files.manifest(place, by="name" if by_name else "content", progress=Progress(name))
    except NotFound as error:
        raise Refused(f"data register {name}: {error} is not there, as seen from this machine. Correct the path") from None
    opened.probe()
    holder = f"{getpass.getuser()}@{socket.gethostname()}"
    one = datasets.register(opened, name, place.path, manifest, now=time.time(), holder=holder)
    output.note(f"{name}: {one.rows:,} rows, {_size(one.size)}, {_size(files.bytes_read)} of them read now")
    if one.unreadable:
        output.note(f"{name}: {one.unreadable:,} files cannot be read; `osctl data show {name}` lists them")
    output.emit(_row(one), output_, _COLUMNS)


@app.command("list")
def list_(file: options.File = None, store: options.Store = None, output_: options.Output = output.Format.table) -> None:
    """The data sets that have a name in a store.

    Example: osctl data list --store s3://bucket/runs
    """
    from orchestrator import datasets

    opened = _store(file, store)
    rows = [_row(one) for one in datasets.registered(opened)]
    if not rows:
        output.note(f"no data sets in {opened.url}. Register one with: osctl data register NAME PATH")
    output.emit(rows, output_, _COLUMNS)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A data set's name, or digits of its digest.")],
    other: Annotated[str | None, typer.Argument(help="Another one: show in which rows they differ.")] = None,
    file: options.File = None,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """The rows of a data set, or in which rows two of them differ.

    Examples: osctl data show bikes          osctl data show 0f3a9c bikes -o json
    """
    from orchestrator import datasets
    from orchestrator.errors import NotFound, Refused

    opened = _store(file, store)

    def manifest(wanted: str) -> DataManifest:
        digest, _ = datasets.find(opened, wanted)
        try:
            return datasets.get_manifest(opened, digest)
        except NotFound:
            raise Refused(f"data set {wanted}: its manifest {digest} is not in {opened.url}. Register the data again") from None

    rows: list[dict[str, Any]]
    if other is None:
        found = manifest(name)
        rows = [{"name": row.path, "bytes": row.size, "sha256": _content(row.sha256, found), "text": row.text} for row in found.rows]
        shown = [row | {"sha256": str(row["sha256"])[:12]} for row in rows] if output_ is output.Format.table else rows
        output.emit(shown, output_, {"name": "path", "bytes": "bytes", "sha256": "sha256", "text": "caption"})
        return
    from opensora.data.manifest import rows_that_differ

    differences = rows_that_differ(manifest(name), manifest(other))
    rows = [{"name": one.path, "change": one.kind, "old": one.old, "new": one.new} for one in differences]
    if not rows:
        output.note(f"{name} and {other} are the same data set")
    output.emit(rows, output_, {"name": "path", "change": "change", "old": name, "new": other})


def _in_cluster(workspace: Workspace, name: str, source: str, *, by_name: bool) -> DataSet:
    """Have a Job read it, and wait for its end. Raises UsageError, Refused, Unreachable."""
    from orchestrator import datasets, manifest
    from orchestrator.adapters.kube.api import AlreadyExists, Api
    from orchestrator.errors import NotFound, Refused

    if not workspace.store_url.startswith("s3://"):
        raise Refused(
            f"data register {name}: store {workspace.store_url} is a folder of this machine, which no pod sees. "
            "Name a bucket: --store s3://bucket/prefix"
        )
    profile = workspace.pipeline.cluster
    assert profile is not None, "a cluster was named"
    before = len(datasets.of_name(workspace.store, name))
    with contextlib.closing(Api.connect(profile.context, profile.namespace)) as api:
        for number in itertools.count(1):
            body = manifest.register_job(profile, workspace.store_url, name, source, number, by_name=by_name)
            try:
                job = api.create("jobs", body)
                break
            except AlreadyExists:  # of an earlier look; one that still runs is as good
                job = api.get("jobs", body["metadata"]["name"])
                if _end(job) is None and manifest.is_ours(job, workspace.store_url, manifest.register_key(name, number)):
                    break
        job_name = job["metadata"]["name"]
        output.note(f"{name}: read by Job {job_name} in namespace {api.namespace}; it goes on if this command is interrupted")
        said = ""
        while (end := _end(job)) is None:
            if (waits := _waits_for(api, job_name)) not in ("", said):
                output.note(f"{name}: Job {job_name} waits: {waits}")
            said = waits or said
            time.sleep(LOOK_S)
            try:
                job = api.get("jobs", job_name)
            except NotFound:
                raise Refused(f"data register {name}: somebody deleted Job {job_name}. Run it again") from None
        if end != "Complete":
            raise Refused(f"data register {name}: Job {job_name} failed{_last_words(api, job_name)}")
    found = datasets.of_name(workspace.store, name)
    if not found or (len(found) == before and found[-1].source != source):
        raise Refused(
            f"data register {name}: Job {job_name} is complete, and {workspace.store_url} has no {name}. Is that the Job's store?"
        )
    return found[-1]


def _end(job: dict[str, Any]) -> str | None:
    conditions = job.get("status", {}).get("conditions", ())
    return next((one["type"] for one in conditions if one["status"] == "True" and one["type"] in ("Complete", "Failed")), None)


def _waits_for(api: Api, job: str) -> str:
    """What keeps the Job's pod from a start, in Kubernetes' words; empty: nothing that it knows of."""
    from orchestrator.errors import NotFound, Refused, Unreachable

    with contextlib.suppress(NotFound, Refused, Unreachable):
        for pod in api.list("pods", f"batch.kubernetes.io/job-name={job}")[0]:
            status = pod.get("status", {})
            unmet = [
                one.get("message") for one in status.get("conditions", ()) if (one["type"], one["status"]) == ("PodScheduled", "False")
            ]
            states = [one.get("state", {}).get("waiting", {}) for one in status.get("containerStatuses", ())]
            unmet += [one.get("message") for one in states if one.get("reason") != "ContainerCreating"]
            if told := next(filter(None, unmet), ""):
                return str(told).splitlines()[0]
    return ""


def _last_words(api: Api, job: str) -> str:
    """What the last pod said, where it can be asked; else where to ask."""
    from orchestrator.errors import NotFound, Refused, Unreachable

    with contextlib.suppress(NotFound, Refused, Unreachable):
        pods, _ = api.list("pods", f"batch.kubernetes.io/job-name={job}")
        for pod in pods[-1:]:
            text = b"".join(api.pod_log(pod["metadata"]["name"], tail=1)).decode(errors="replace").strip()
            if text:
                return f": {text.removeprefix('error: ')}"
    return f". See: kubectl -n {api.namespace} logs job/{job}"


def source_of(place: str) -> FolderSource | ManifestSource:
    """A folder, or a CSV by its name; a local path is made absolute. Raises UsageError, where it holds credentials."""
    from opensora.config import FolderSource, ManifestSource
    from orchestrator.errors import UsageError
    from orchestrator.redact import holds_credentials, typed

    if holds_credentials(place, os.environ):
        raise UsageError(f"{typed(place)}: holds credentials, and would be written into the store. Put them into the environment")
    path = place.rstrip("/") if "://" in place else os.path.normpath(Path(place).expanduser().absolute())
    if path.endswith(".csv"):
        return ManifestSource.model_construct(kind="manifest", path=path, clips=0)  # as many as it has
    return FolderSource(kind="folder", path=path)


class Progress:
    """A line now and then on stderr, of reads that take long."""

    SPOKEN_S = 5.0

    def __init__(self, subject: str) -> None:
        self._subject, self._spoken = subject, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._spoken >= self.SPOKEN_S:
            self._spoken = now
            output.note(f"{self._subject}: {_size(done)} of {_size(total)} read")


_COLUMNS = {"name": "name", "rows": "clips", "size": "size", "digest": "digest", "by": "by", "source": "source"}


def _row(one: DataSet) -> dict[str, Any]:
    return {
        "name": one.name, "rows": one.rows, "size": _size(one.size), "bytes": one.size, "unreadable": one.unreadable,
        "digest": one.manifest, "by": one.by, "source": one.source, "time": one.time, "holder": one.holder,
    }  # fmt: skip


def _content(sha256: str | None, manifest: DataManifest) -> str:
    return sha256 or ("by name" if manifest.by == "name" else "unreadable")


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _store(file: str | None, store: str | None) -> Store:
    """The store alone, where it is named; else the pipeline's."""
    return Workspace.open(file, store=store).store
