"""Commands that make something happen: launch, resume, cancel."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options, output
from orchestrator.cli.subject import launched, opened, remembered, say, snapshot
from orchestrator.pipelines.changes import Decisions
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Collection

    from orchestrator.accounting.status import Snapshot
    from orchestrator.driver.runner import Result
    from orchestrator.ledger.records import Event
    from orchestrator.prepare.records import Order


def launch(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; its parent comes out of the ledger. Default: all.", autocompletion=options.stage_names)
    ] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    tracking: options.Tracking = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="local|kubernetes", help="Where attempts run: processes of this machine, or jobs of a cluster."),
    ] = None,
    cluster: options.Cluster = None,
    prices: options.Prices = None,
    wait: options.Wait = False,
    foreground: options.Foreground = False,
    keep: options.Keep = None,
    anew: options.Anew = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and cost, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Train the stages, each from the verified checkpoint before it.

    Repeating it does nothing twice.
    Locally it shows progress until the end; Ctrl-C once saves and stops (exit 130), twice ends at once. Launching again goes on.
    On Kubernetes it creates a driver in the cluster and returns; launching again finds the driver that is there.
    A recipe with `prepare:` makes its clips of raw videos first: in this process, or in the cluster where its pods reach the videos.

    Examples: osctl launch          osctl launch stage2 --set stage2.steps=500          osctl launch --data ~/clips

    osctl launch -f open-sora-1.0 --cluster my-pool.yaml --store s3://bucket/runs
    """
    from orchestrator.pipelines.find import check_stage

    workspace = opened(file, settings=settings, store=store, tracking=tracking, data=data, backend=backend, cluster=cluster, prices=prices)
    workspace.check_recipe()
    check_stage(workspace, stage, "launch")
    decisions = Decisions(tuple(keep or ()), tuple(anew or ()))
    _launch(workspace, stage, decisions, foreground=foreground, dry_run=dry_run, wait=wait, quiet=quiet, output_=output_)


def _launch(
    workspace: Workspace,
    stage: str | None,
    decisions: Decisions,
    *,
    foreground: bool,
    dry_run: bool,
    wait: bool,
    quiet: bool,
    output_: output.Format,
) -> None:
    """What a recipe asks for, from its raw videos on where it has any."""
    from orchestrator.pipelines.launch import check_writable
    from orchestrator.pipelines.preparing import is_to_come

    order = None
    if workspace.pipeline.prepare is not None:
        from orchestrator.cli.prepare_run import before_launch

        workspace, order = before_launch(workspace, dry_run=dry_run, quiet=quiet)
    if not dry_run and workspace.pipeline.backend == "local":
        check_writable(workspace)
    if dry_run or workspace.pipeline.backend == "local" or foreground:
        workspace = workspace.with_contents(needed=not dry_run, clips=not is_to_come(workspace), say=output.note)
        run_here(workspace, stage, decisions, dry_run=dry_run, quiet=quiet, output_=output_, order=order)
        return
    targets = [stage] if stage else []
    launch_there(workspace, targets, decisions, attach=False, wait=wait, quiet=quiet, output_=output_, order=order)


def resume(
    pipeline: options.Named = None,
    file: options.File = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="One stage; its parent comes out of the ledger. Default: all.", autocompletion=options.stage_names),
    ] = None,
    wait: options.Wait = False,
    foreground: options.Foreground = False,
    keep: options.Keep = None,
    anew: options.Anew = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Go on with what was launched last, exactly as it was then but for what --set changes.

    Examples: osctl resume          osctl resume demo --set stage2.optimizer.lr=5e-4
    """
    from orchestrator.pipelines.find import check_stage, to_resume
    from orchestrator.pipelines.preparing import is_on_version

    at_hand = (
        Workspace.of_name(pipeline, file=file, store=store, cluster=cluster)
        if pipeline is not None
        else Workspace.at(file, store=store, cluster=cluster)
    )
    if at_hand.pipeline.prepare is not None and not at_hand.named and not at_hand.ledger.revisions():
        output.note(f"{at_hand.pipeline.name}: was stopped before its first stage began; the preparation goes on")
        launch(stage, file, settings=settings, store=store, cluster=cluster, wait=wait, foreground=foreground, quiet=quiet)
        return
    workspace = remembered(to_resume(remembered(at_hand), settings or ()))
    if settings:
        workspace = workspace.with_contents(needed=True, say=output.note)
    check_stage(workspace, stage, "resume")
    decisions = Decisions(tuple(keep or ()), tuple(anew or ()))
    if workspace.pipeline.prepare is not None and not is_on_version(workspace.pipeline):
        _launch(workspace, stage, decisions, foreground=foreground, dry_run=False, wait=wait, quiet=quiet, output_=output_)
        return
    if workspace.pipeline.backend == "local" or foreground:
        run_here(workspace, stage, decisions, dry_run=False, quiet=quiet, output_=output_)
    else:
        launch_there(workspace, [stage] if stage else [], decisions, attach=True, wait=wait, quiet=quiet, output_=output_)


def cancel(
    pipeline: options.Named = None,
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    now: Annotated[bool, typer.Option("--now", help="Do not save: what was trained since the last checkpoint is lost.")] = False,
) -> None:
    """Ask the running launch to save and stop. It can be taken up again with osctl resume.

    Examples: osctl cancel -f demo          osctl cancel demo --now
    """
    from orchestrator.pipelines.launch import cancel as ask

    output.note(ask(launched(pipeline, file, store=store, cluster=cluster), now=now))


def run_here(
    workspace: Workspace,
    target: str | None,
    decisions: Decisions,
    *,
    dry_run: bool,
    quiet: bool,
    output_: output.Format,
    order: Order | None = None,
) -> None:
    """Plan, refuse or drive in this process; then say what came out. Ends the process with the run's exit code.

    Args:
        order: what this driver has prepared in the cluster first.
    """
    from orchestrator.cli import display
    from orchestrator.cli.following import Follower
    from orchestrator.cli.plans import show_plan
    from orchestrator.ledger.records import UNUSED
    from orchestrator.pipelines import accounts, changes
    from orchestrator.pipelines.launch import prepare
    from orchestrator.pipelines.plans import local_snapshot, plan_of
    from orchestrator.pipelines.signals import save_on_signals

    targets = [target] if target else []
    known = local_snapshot(workspace)
    estimate = plan_of(workspace, committed=known, target=target)
    remarks = known.remarks if known is not None else ()
    say(remarks if dry_run else [remark for remark in remarks if UNUSED not in remark])  # the driver says what it does not use
    if dry_run:
        show_plan(estimate, output_)
        if known is not None:
            changes.foretell(workspace, targets, output.note)
        return
    prepared = prepare(workspace, targets, decisions, output.note, known=known, estimate=estimate, order=order)
    following = Follower(workspace) if not quiet else None
    whys = following.whys if following is not None else frozenset[str]()
    runner = prepared.runner(lambda event: tell(event, whys), output.note)
    with save_on_signals(runner, output.note), prepared.mlflow(output.note), following or contextlib.nullcontext():
        result = runner.run(targets or None)
    current = snapshot(workspace, quiet=True)  # its remarks were said at the start, or when they came
    lines = accounts.comparison(current)
    if output_ is output.Format.table:
        output.table(*display.comparison_cells(lines))
    else:
        output.emit(lines, output_)
    display.say_not_used(current, following.told if following is not None else ())
    farewell(workspace, current, result)
    if result.exit_code:
        raise SystemExit(result.exit_code)


def launch_there(
    workspace: Workspace,
    targets: list[str],
    decisions: Decisions,
    *,
    attach: bool,
    wait: bool,
    quiet: bool,
    output_: output.Format,
    order: Order | None = None,
) -> None:
    """Plan, refuse or leave it to a driver in the cluster. With `wait`, ends the process with the driver's exit code.

    Args:
        attach: whether a live driver will do whatever stages it was given.
        order: what that driver has prepared first.
    """
    from orchestrator.cli import display
    from orchestrator.cli.following import Follower
    from orchestrator.pipelines import cluster_driver

    pipeline = workspace.pipeline
    cluster_driver.check_store(workspace)
    with contextlib.closing(cluster_driver.connect(workspace)) as api:
        if not attach:
            workspace = workspace.with_contents(needed=True, clips=order is None, say=output.note)
            pipeline = workspace.pipeline
        driver = cluster_driver.find_or_submit(api, workspace, targets, decisions, output.note, attach=attach, order=order)
        if driver is None:
            output.note(f"{pipeline.name}: every stage that was asked for is committed. See: osctl compare")
            output.emit({"pipeline": pipeline.name, "driver": None, "revision": None}, output_)
            return
        if output_ is output.Format.table:
            output.raw(f"{driver.name}\n")  # a table of one line would cost rich's import, as much as all requests to the store
        else:
            output.emit({"pipeline": pipeline.name, "driver": driver.name, "revision": driver.revision}, output_)
        if not wait:
            output.note("next: osctl watch | osctl logs -f | osctl cancel")
            return
        following = None if quiet else Follower(workspace)
        try:
            with following or contextlib.nullcontext():
                code = cluster_driver.wait(api, workspace, driver, output.note)
        except KeyboardInterrupt:
            output.note(f"\n{pipeline.name}: the driver goes on. Stop it with: osctl cancel")
            raise
    current = snapshot(workspace)
    display.say_not_used(current, following.told if following is not None else ())
    output.note(f"{pipeline.name}: {current.state}, {output.dollars(current.usd)}")
    if code:
        output.note("next: osctl status, osctl logs, then osctl resume")
        raise SystemExit(code)


def tell(event: Event, whys: Collection[str] = ()) -> None:
    """Say those of a driver's events that a person at the terminal should see: what is tried again and from where, what is not used,
    and what it waits for that is not its own. `whys`: reasons of waiting that were said already."""
    about = f"{event.stage} attempt {event.attempt}" if event.attempt is not None else event.stage or ""
    about = f"{about}: " if about else ""
    from orchestrator.driver.launch import NOT_EVALUATED

    again = event.kind == "retry" or (event.kind == "attempt" and event.attempt != 1)
    unused = event.says_unused or event.detail.startswith(NOT_EVALUATED)
    waited = event.kind == "observed" and event.stage is None and not event.detail.endswith((" runs", " leaves"))
    told = waited and any(event.detail.endswith(f" waits: {why}") for why in whys)
    if again or unused or (waited and not told):
        output.note(f"{about}{event.detail}")


def farewell(workspace: Workspace, current: Snapshot, result: Result) -> None:
    """What came out, where it lies, and what one would type next."""
    name = workspace.pipeline.name
    if result.exit_code:
        output.note(f"{name}: {result.status}: {result.reason}")
        if "osctl " not in result.reason:  # an end has one next step, and most say their own
            output.note("next: osctl logs, osctl status")
        return
    for path in pictures(workspace, current):
        output.note(f"drew {path}")
    output.note(f"{name}: {result.status}, {output.dollars(current.usd)} (prices: osctl cost)")
    prompt = known_prompt(workspace, current)
    pages = ["osctl mlflow"] if workspace.pipeline.tracking != "none" else []
    drawn = [f"osctl sample {prompt}"] if prompt else []
    output.note("next: " + " | ".join(["osctl compare", "osctl cost", "osctl lineage --verify", *pages, *drawn]))


def known_prompt(workspace: Workspace, current: Snapshot) -> str:
    """A prompt of the last committed stage, as a shell wants it: one of the stage's own, else a caption. Empty: neither is at hand."""
    done = [stage for stage in current.stages if stage.committed]
    if not done:
        return ""
    config, digest = workspace.pipeline.stage(done[-1].name).config, workspace.pipeline.stage(done[-1].name).contents.data
    manifest = workspace.found.manifests.get(digest) if workspace.found is not None and digest is not None else None
    captions = (row.text for row in manifest.rows) if manifest is not None else iter(())
    for text in (*config.prompts, *itertools.islice(captions, 100)):
        if text.strip() and text.isprintable() and len(text) <= 200:  # a line that a terminal takes as one
            return f"-- {shlex.quote(text)}" if text.startswith("-") else shlex.quote(text)
    return ""


def pictures(workspace: Workspace, current: Snapshot) -> list[str]:
    """Bring the clips and sheets of the last committed stage out of the store, for people to open."""
    done = [stage for stage in current.stages if stage.committed]
    if not done:
        return []
    last, committed = done[-1], done[-1].committed
    assert committed is not None
    folder = workspace.host.home / "samples" / workspace.pipeline.name / last.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    evaluated = [workspace.ledger.evaluation_samples(one) for one in last.evaluations[-1:]]
    for key in evaluated[0] if evaluated else workspace.ledger.samples(last.name, committed.inputs_digest, committed.attempt):
        path = folder / key.rsplit("/", 1)[-1]
        path.unlink(missing_ok=True)
        workspace.store.download(key, path)
        paths.append(os.path.relpath(path))
    sheets = [path for path in paths if path.endswith(".png")]
    clips = [path for path in paths if path.endswith(".mp4")]
    return sheets + clips[:1] if len(clips) <= 1 else [*sheets, f"{clips[0]} and {len(clips) - 1} more clips beside it"]
