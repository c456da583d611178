"""`osctl prepare`: raw videos become a data set of the store. run, plan, status, report, why.

cancel, render and drive are in `prepare_cluster`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output, prepare_cluster
from orchestrator.cli.prepare_options import (
    Cluster,
    EngineOf,
    Given,
    Gpus,
    Licence,
    Name,
    Named,
    PodsOf,
    Recipe,
    Set,
    There,
    encoding,
    meant,
    site_at,
    store_of,
    wanted_of,
)
from orchestrator.cli.typed import Command

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.cli.prepare_plan import Asked as PlanAsked
    from orchestrator.pipelines.host import Host
    from orchestrator.prepare.clip_rows import Clips

app = typer.Typer(no_args_is_help=True, help="Raw videos become a data set: cut into clips, filtered, captioned, encoded.")


@app.command(cls=Command)
def run(
    given: Given = None,
    name: Name = None,
    file: Recipe = None,
    encode: Annotated[
        bool | None,
        typer.Option("--encode/--no-encode", help="Encode clips and captions ahead. Default: with -f, or where prepare.yaml says so."),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=1024, help="Processes that decode. Default: one a core.")] = None,
    engine: EngineOf = None,
    caption_url: Annotated[
        str | None,
        typer.Option(
            "--caption-url", metavar="URL", help="Captions by a server that speaks OpenAI's chat completions: http://host:8000/v1."
        ),
    ] = None,
    caption_model: Annotated[str | None, typer.Option("--caption-model", metavar="NAME", help="Name of the model at that server.")] = None,
    licence: Licence = None,
    changes: Set = None,
    store: options.Store = None,
    cluster: Cluster = None,
    gpus: Gpus = None,
    pods: PodsOf = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Where somebody else prepares it already, watch that run to its end. With --cluster: watch the Job, and end with its exit "
            "code; Ctrl-C ends this command only.",
        ),
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Look again although nothing here has changed: at addresses, and at what was put aside.")
    ] = False,
    replace_: Annotated[bool, typer.Option("--replace", help="Let the name stand for these sources, though it stood for others.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be checked without opening a video, show the plan, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Prepare raw videos: probe, cut, filter, caption, encode, and publish into the store as a data set with a name.

    Repeating it does nothing twice: what is kept of a step is used again, here and on another machine.
    Ctrl-C once saves and stops (exit 130), twice ends at once. Run again to go on.
    It runs where it is typed, also for a training in a cluster: then name a bucket with --store. With --cluster it runs there, and this
    machine may be switched off.

    Examples: osctl prepare run ~/videos          osctl prepare run ~/videos --caption-url http://gpu:8000/v1 --caption-model llava

    osctl prepare run prepare.yaml -f open-sora-1.0 --store s3://bucket/runs
    """
    from orchestrator.cli.prepare_run import drive, emit
    from orchestrator.errors import UsageError
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.preparing import asked_for, check, folder_of
    from orchestrator.prepare import same_name
    from orchestrator.recipe.preparation import is_file, of_typed

    host = Host.here()
    own = _own(workers, caption_url, caption_model)
    own |= {} if engine is None else {"engine": engine.value}
    config = encoding(of_typed(given, name=name, licence=licence, settings=changes or (), own=own, env=host.env), file, encode)
    opened = store_of(store, host, config.encode, cluster)
    may_replace = replace_ or is_file(given)
    if cluster is not None:
        from orchestrator.cli import prepare_there

        wanted = wanted_of(config, opened, host, cluster, gpus, pods=pods, replace=may_replace, retry=retry)
        prepare_there.launch(wanted, follow=follow, quiet=quiet, dry_run=dry_run)
        return
    if pods is not None:
        raise UsageError(f"--pods {pods}: on one machine there are none; it decodes with --workers. Name a --cluster")
    check(config, opened, host)
    if dry_run:
        from orchestrator.cli import prepare_plan

        if not may_replace:
            same_name.check(opened, config)
        output.note(f"{config.name}: would be prepared in {folder_of(host, config.name)}, for {opened.url}")
        prepare_plan.show(config, _asked_here(config, host), host, output_)
        return
    opened.probe()
    prepared = drive(replace(asked_for(config, opened, host), retry=retry, replace=may_replace), quiet=quiet, follow=follow)
    if prepared is not None:
        emit(prepared, output_)


@app.command(cls=Command)
def plan(
    given: Given = None,
    clips: Annotated[int | None, typer.Option("--clips", min=1, max=10**9, help="Clips that are wanted in the end.")] = None,
    hours: Annotated[float | None, typer.Option("--hours", min=0.001, max=1e7, help="Hours of raw video.")] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="WxH@FPS", help="Of the raw video; decoding grows with its pixels.")
    ] = "1280x720@25",
    caption_gpu_s: Annotated[
        float | None,
        typer.Option("--caption-gpu-s", min=0.001, max=1e5, help="Your own GPU-seconds a caption, beside the published 6."),
    ] = None,
    network: Annotated[float | None, typer.Option("--network", metavar="MBIT", min=0.1, max=1e7, help="Mbit/s of the line.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=100_000, help="Cores. Default: this machine's.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=100_000, help="GPUs that caption and encode.")] = 8,
    pod_cores: Annotated[int, typer.Option("--pod-cores", min=1, max=1024, help="Cores of a CPU pod; with --engine ray.")] = 16,
    file: Recipe = None,
    changes: Set = None,
    prices: options.Prices = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Hours, dollars and bytes of each step before anything runs, from measured rates; what is an assumption is called one.

    Captions stand there with the published 6 GPU-seconds each, and yours beside it. What this machine's own runs took is beside the rest.
    Where LLaVA captions, it says how many CPU pods of --pod-cores keep --gpus pods with one GPU each busy (--engine ray).

    Examples: osctl prepare plan prepare.yaml --clips 400000          osctl prepare plan ~/videos --hours 20 --caption-gpu-s 1.5
    """
    from orchestrator.cli import prepare_plan
    from orchestrator.pipelines.host import Host
    from orchestrator.recipe.preparation import of_typed

    host = Host.here()
    config = encoding(of_typed(given, settings=changes or (), env=host.env, any_name=True), file, None)
    if workers is not None:  # of a whole cluster, too: one machine's run has fewer
        config = config.model_copy(update={"workers": workers})
    asked = prepare_plan.Asked(clips, hours, size, caption_gpu_s, network, gpus, prices, pod_cores)
    prepare_plan.show(config, asked, host, output_)


@app.command(cls=Command)
def status(
    name: Named = None,
    store: options.Store = None,
    cluster: There = None,
    output_: options.Output = output.Format.table,
) -> None:
    """How far a preparation is: counts of each step by reason, rates, time left, cost.

    Examples: osctl prepare status          osctl prepare status mine -o json
    """
    from orchestrator.cli import prepare_view
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.preparing import folder_of
    from orchestrator.prepare.watching import look

    host = Host.here()
    opened = store_of(store, host, None, cluster)
    which = meant(name, opened, host)
    state = look(opened, which, folder_of(host, which))
    if cluster is not None and state.holder is None:
        from orchestrator.cli import prepare_there

        if waits := prepare_there.waiting(opened, which, host, site_at(cluster)):
            output.note(waits)
    if output_ is output.Format.table:
        prepare_view.show(state)
    else:
        output.emit(prepare_view.whole(state), output_)


@app.command(cls=Command)
def report(
    name: Named = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help="Where the page goes. Default: report.html in its run directory; NAME-report.html of another machine's.",
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Write one HTML page: what each rule would keep before it is applied, counts by reason, pictures, captions.

    Of a preparation of this machine, also while it runs; of another machine's the page that was published with the data set.
    The page is one file that fetches nothing.

    Examples: osctl prepare report          osctl prepare report mine --out mine.html
    """
    import time

    from orchestrator.errors import Refused, UsageError
    from orchestrator.pipelines.host import Host
    from orchestrator.prepare import published_report
    from orchestrator.prepare.report import page
    from orchestrator.prepare.run_directory import write_text

    if out is not None and (out.is_dir() or not out.name):
        raise UsageError(f"prepare report: --out {out}: is a folder. Name a file in it: --out {out / 'report.html'}")
    try:
        which, clips, place = _here(name, store)
        with clips:
            path, text = out or clips.directory.path / "report.html", page(clips, clips.directory.status(), place, time.time())
    except Refused:
        host = Host.here()
        opened = store_of(store, host, None)
        which = meant(name, opened, host)
        if (published := published_report.find(opened, which)) is None:
            raise
        path, text = out or Path(f"{which}-report.html"), published.decode()
    write_text(path, text)
    row = {"name": which, "report": str(path.absolute())}
    if output_ is output.Format.table:
        output.raw(f"{path}\n")
    else:
        output.emit(row, output_)
    if open_:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())


@app.command(cls=Command)
def why(
    wanted: Annotated[str, typer.Argument(metavar="CLIP|SOURCE", help="6 digits or more of a clip's id; a source's name, path or sha256.")],
    name: Annotated[str | None, typer.Option("--of", metavar="NAME", help="The data set. Default: the only one of this machine.")] = None,
    store: options.Store = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Why a clip, or the clips of a source, are in the data set or are not: the step at which they left, the reason, the numbers.

    Examples: osctl prepare why 0f3a9c1b          osctl prepare why holiday.mp4 --of mine -o json
    """
    from orchestrator.prepare.why import why as ask

    _, clips, place = _here(name, store)
    with clips:
        found = ask(clips, wanted, place)
    if output_ is output.Format.table:
        from orchestrator.cli.prepare_view import show_why

        show_why(found)
    else:
        output.emit(found, output_)


def _here(name: str | None, store: str | None) -> tuple[str, Clips, str | None]:
    """(name, its clips as kept on this machine, where it is published). Raises Refused where this machine has nothing of it."""
    from orchestrator.errors import Refused
    from orchestrator.inputs import datasets
    from orchestrator.pipelines.host import Host
    from orchestrator.pipelines.preparing import folder_of
    from orchestrator.prepare.clip_rows import Clips
    from orchestrator.prepare.run_directory import RunDirectory

    host = Host.here()
    opened = store_of(store, host, None)
    which = meant(name, opened, host)
    directory = RunDirectory(folder_of(host, which))
    try:
        clips = Clips.in_store(directory, opened, which)
    except ValueError:
        raise Refused(
            f"data set {which}: {directory.path} has nothing of its steps. Prepare the same here once, which brings back what is kept: "
            f"osctl prepare run SOURCES --name {which}"
        ) from None
    known = datasets.of_name(opened, which)
    return which, clips, known[-1].source if known else None


def _own(workers: int | None, caption_url: str | None, caption_model: str | None) -> dict[str, Any]:
    """Raises UsageError."""
    from orchestrator.errors import UsageError

    if (caption_url is None) != (caption_model is None):
        missing = "--caption-model" if caption_model is None else "--caption-url"
        raise UsageError(f"prepare: captions by a server need both its address and a model's name; {missing} is missing. Give it")
    own: dict[str, Any] = {} if workers is None else {"workers": workers}
    if caption_url is not None:
        own |= {"caption.kind": "server", "caption.url": caption_url, "caption.model": caption_model}
    return own


def _asked_here(config: PrepareConfig, host: Host) -> PlanAsked:
    """A plan for the GPUs of this machine, where it has some. Raises UsageError."""
    from orchestrator.cli.prepare_plan import Asked
    from orchestrator.local.backend import cuda_devices
    from orchestrator.pipelines.preparing import gpu_here

    gpus = cuda_devices()
    return Asked(gpus=gpus, gpu=gpu_here(config, host)) if gpus else Asked()


app.command("cancel", cls=Command)(prepare_cluster.cancel)
app.command("render", cls=Command)(prepare_cluster.render)
app.command("drive", hidden=True, cls=Command)(prepare_cluster.drive)
