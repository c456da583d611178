"""Commands that make something happen: launch, resume, cancel."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.look import launched, say, stage_names, take
from orchestrator.cli.workspace import Workspace, home, latents, lend_places

if TYPE_CHECKING:
    from orchestrator.config import Pipeline
    from orchestrator.ports import Backend, Store
    from orchestrator.records import Event

TOGETHER_S = 1.0
"""Requests to stop that come within so long of each other are one."""
PROJECTION_WAIT_S = 60.0
"""How long a finished launch waits for MLflow to show its last words. MLflow's first start on a small machine takes 20 s."""


def launch(
    stage: Annotated[
        str | None, typer.Argument(help="One stage; its parent comes out of the ledger. Default: all.", autocompletion=stage_names)
    ] = None,
    file: options.File = None,
    data: options.Data = None,
    settings: options.Set = None,
    store: options.Store = None,
    tracking: options.Tracking = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="local|kubernetes", help="Where attempts run: processes of this machine, or PyTorchJobs of a cluster."),
    ] = None,
    cluster: options.Cluster = None,
    prices: options.Prices = None,
    wait: options.Wait = False,
    foreground: options.Foreground = False,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="STAGE", help="Keep this stage's result although its data changed.", autocompletion=stage_names),
    ] = None,
    anew: Annotated[
        list[str] | None,
        typer.Option("--anew", metavar="STAGE", help="Train this stage anew although earlier work is there.", autocompletion=stage_names),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and cost, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Train the stages, each from the verified checkpoint before it.

    Repeating it does nothing twice.
    Locally it shows progress until the end; Ctrl-C once saves and stops (exit 130), twice ends at once. Launching again goes on.
    On Kubernetes it creates a driver in the cluster and returns; launching again finds the driver that is there.

    Examples: osctl launch          osctl launch stage2 --set stage2.steps=500          osctl launch --data ~/clips

    osctl launch -f open-sora-1.0 --cluster my-pool.yaml --store s3://bucket/runs
    """
    workspace = Workspace.open(
        file, settings=settings, store=store, tracking=tracking, data=data, backend=backend, cluster=cluster, prices=prices
    )
    check_target(workspace, stage)
    changed = Changed(Again(file, store, cluster), tuple(keep or ()), tuple(anew or ()))
    if dry_run or workspace.pipeline.backend == "local" or foreground:
        workspace = workspace.with_contents(needed=not dry_run, say=output.note)
        run_here(workspace, stage, changed, dry_run=dry_run, quiet=quiet, output_=output_)
    else:
        launch_there(workspace, [stage] if stage else [], changed, attach=False, wait=wait, quiet=quiet, output_=output_)


def resume(
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    wait: options.Wait = False,
    foreground: options.Foreground = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
    output_: options.Output = output.Format.table,
) -> None:
    """Go on with what was launched last, exactly as it was then.

    Example: osctl resume
    """
    from orchestrator import launched as launches
    from orchestrator.errors import Refused

    workspace = Workspace.at(file, store=store, cluster=cluster)
    found = launches.last(workspace.ledger)
    if not found.is_last:
        unread = next(remark for remark in found.remarks if remark.kind != "foreign")
        raise Refused(f"resume {workspace.pipeline.name}: {unread}. To go on as the file says: osctl launch")
    if found.pipeline is None:
        raise Refused(f"resume {workspace.pipeline.name}: was never launched in {workspace.store_url}. Run: osctl launch")
    workspace = launched(workspace)
    if workspace.pipeline.backend == "local" or foreground:
        run_here(workspace, None, Changed(Again(file, store, cluster)), dry_run=False, quiet=quiet, output_=output_)
    else:
        changed = Changed(Again(file, store, cluster))
        launch_there(workspace, [], changed, attach=True, wait=wait, quiet=quiet, output_=output_)


def cancel(
    file: options.File = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    now: Annotated[bool, typer.Option("--now", help="Do not save: what was trained since the last checkpoint is lost.")] = False,
) -> None:
    """Ask the running launch to save and stop. It can be taken up again with osctl resume.

    Examples: osctl cancel -f demo          osctl cancel --now
    """
    workspace = launched(Workspace.at(file, store=store, cluster=cluster))
    name, moment = workspace.pipeline.name, time.time()
    detail = f"{'now, ' if now else ''}by {os.environ.get('USER', 'somebody')}"
    holder = workspace.ledger.holder(moment)
    if holder is not None and workspace.ledger.ask_cancel(moment, detail=detail):
        asked = "stop without saving" if now else "save and stop"
        output.note(f"{name}: asked {holder.holder} to {asked}. Follow it with: osctl watch")
    elif workspace.pipeline.backend == "kubernetes":
        from orchestrator.cli import remote

        with contextlib.closing(remote.connect(workspace)) as api:
            remote.cancel_coming(api, workspace, detail)
    else:
        output.note(f"{name}: nobody drives it, nothing to cancel")


@dataclass(frozen=True)
class Again:
    """What a person has to type to mean the same pipeline."""

    file: str | None
    store: str | None
    cluster: str | None

    def options(self, short: str = "-f") -> str:
        given = ((short, self.file), ("--store", self.store), ("--cluster", self.cluster))
        return "".join(f" {option} {shlex.quote(value)}" for option, value in given if value is not None)


@dataclass(frozen=True)
class Changed:
    """A person's decisions on stages that changed, and how to name the pipeline again."""

    again: Again
    keep: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()

    def settle(self, workspace: Workspace, targets: Sequence[str]) -> None:
        """See `changes.settle`."""
        from orchestrator.cli import changes

        changes.settle(workspace, targets, keep=self.keep, anew=self.anew, again=self.again.options())


def check_target(workspace: Workspace, target: str | None) -> None:
    """Raises UsageError."""
    from orchestrator.errors import UsageError

    pipeline = workspace.pipeline
    if target is not None and target not in {stage.name for stage in pipeline.stages}:
        raise UsageError(f"launch {target}: {pipeline.name} has no such stage; it has {', '.join(stage.name for stage in pipeline.stages)}")


def run_here(workspace: Workspace, target: str | None, changed: Changed, *, dry_run: bool, quiet: bool, output_: output.Format) -> None:
    """Plan, refuse or drive in this process; then say what came out. Ends the process with the run's exit code."""
    from orchestrator import launched as launches
    from orchestrator.cli import changes, display, remote
    from orchestrator.cli.recipe import ledger_of, plan_of, show_plan
    from orchestrator.plan import check_budget
    from orchestrator.records import UNUSED

    pipeline = workspace.pipeline
    targets = [target] if target else []
    known = ledger_of(workspace)
    estimate = plan_of(workspace, committed=known, target=target)
    remarks = known.remarks if known is not None else ()
    say(remarks if dry_run else [remark for remark in remarks if UNUSED not in remark])  # the driver tells what it does not use
    if dry_run:
        show_plan(estimate, output_)
        if known is not None:
            changes.foretell(workspace, targets, changed.again.options())
        return
    if pipeline.budget_usd is not None:
        check_budget(estimate, pipeline.budget_usd, (known or take(workspace)).usd)
    from orchestrator.runner import Runner

    if pipeline.backend == "kubernetes":
        remote.check_store(workspace)
        with contextlib.closing(remote.connect(workspace)) as api:
            remote.check_none(api, workspace)
    else:
        os.environ["OSCTL_LATENTS"] = str(latents())  # attempts share what one of them, or `osctl encode`, has encoded
        lend_places({})
    workspace.store.probe()
    launches.check_ours(workspace.ledger)
    changed.settle(workspace, targets)
    workspace.keep_contents()
    if pipeline.backend == "local":
        workspace.lend_places()
    backend = backend_of(pipeline, workspace.store, workspace.store_url)
    runner = Runner(pipeline, workspace.ledger, backend, on_event=tell, prices=workspace.prices)
    following = contextlib.nullcontext() if quiet else display.Follower(workspace)
    # With nothing left to train there is nothing new to show, and MLflow's start of several seconds is saved.
    tracking = any(row.basis != "committed" for row in estimate.rows)
    log = home() / "log" / "projection.log"
    with (
        on_interrupt(runner),
        projecting(pipeline, workspace.store_url, log) if tracking else contextlib.nullcontext(),
        following,
    ):
        result = runner.run(targets or None)
    current = take(workspace, quiet=True)  # its remarks were said at the start, or when they came
    lines = display.comparison(current)
    if output_ is output.Format.table:
        output.table(*display.comparison_cells(lines))
    else:
        output.emit(lines, output_)
    farewell(workspace, current, result)
    if result.exit_code:
        raise SystemExit(result.exit_code)


def launch_there(
    workspace: Workspace, targets: list[str], changed: Changed, *, attach: bool, wait: bool, quiet: bool, output_: output.Format
) -> None:
    """Plan, refuse or leave it to a driver in the cluster. With `wait`, ends the process with the driver's exit code.

    Args:
        attach: whether a live driver will do whatever stages it was given.
    """
    from orchestrator.cli import display, remote

    pipeline, again = workspace.pipeline, changed.again
    remote.check_store(workspace)
    with contextlib.closing(remote.connect(workspace)) as api:
        if not attach:
            workspace = workspace.with_contents(needed=True, say=output.note)
            pipeline = workspace.pipeline
        driver = remote.find_or_submit(api, workspace, targets, changed, attach=attach)
        if driver is None:
            output.note(f"{pipeline.name}: every stage that was asked for is committed. See: osctl compare{again.options()}")
            output.emit({"pipeline": pipeline.name, "driver": None, "revision": None}, output_)
            return
        if output_ is output.Format.table:
            output.raw(f"{driver.name}\n")  # a table of one line would cost rich's import, as much as all requests to the store
        else:
            output.emit({"pipeline": pipeline.name, "driver": driver.name, "revision": driver.revision}, output_)
        if not wait:
            output.note(f"next: osctl watch{again.options()} | osctl logs -f{again.options('--file')} | osctl cancel{again.options()}")
            return
        try:
            with contextlib.nullcontext() if quiet else display.Follower(workspace):
                code = remote.wait(api, workspace, driver)
        except KeyboardInterrupt:
            output.note(f"\n{pipeline.name}: the driver goes on. Stop it with: osctl cancel{again.options()}")
            raise
    current = take(workspace)
    output.note(f"{pipeline.name}: {current.state}, {output.dollars(current.usd)}")
    if code:
        output.note(f"next: osctl status{again.options()}, osctl logs{again.options('--file')}, then osctl resume{again.options()}")
        raise SystemExit(code)


def backend_of(pipeline: Pipeline, store: Store, store_url: str) -> Backend:
    """Where attempts of a pipeline live. Raises UsageError where there is no kubeconfig."""
    if pipeline.cluster is None:
        from orchestrator.adapters.local import LocalBackend

        return LocalBackend(store_url, home())
    from orchestrator.adapters.kube.api import Api
    from orchestrator.adapters.kube.backend import KubeBackend

    profile = pipeline.cluster
    return KubeBackend(store, Api.connect(profile.context, profile.namespace), profile, store_url, pipeline=pipeline.name)


@contextlib.contextmanager
def on_interrupt(runner: Any) -> Iterator[None]:
    """SIGINT, SIGTERM or SIGHUP once: save and stop. Again, `TOGETHER_S` later or more: end now.

    A machine that shuts down, or a terminal that closes, sends several at once. A SIGHUP that was ignored at the start stays so (nohup);
    SIGINT does not, since a shell ignores it in what it starts with `&`, and a person may send it all the same.
    """
    last: float | None = None

    def handle(signum: int, _frame: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if before is None:
            runner.drain()
            with contextlib.suppress(OSError):  # the terminal may be gone
                output.note("\nsaving, then stopping; once more to end at once without saving")
        elif last - before >= TOGETHER_S:
            runner.kill()

    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def projecting(pipeline: Pipeline, store_url: str, log: Path | None = None) -> Iterator[None]:
    """Keep MLflow up to the ledger in a process beside the launch. Nothing waits for it but the end, and that not for long.

    `log`: where its own words go; none: beside ours. A driver that leaves does not wait: the next one has a projection of its own.
    """
    from orchestrator.runner import Detached

    tracking = pipeline.tracking
    if tracking == "none":
        yield
        return
    command = [sys.executable, "-m", "orchestrator.projection", "--store", store_url, "--pipeline", pipeline.name]
    command += ["--tracking", tracking, "--follow-pid", str(os.getpid())]
    with contextlib.ExitStack() as opened:
        words = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            words = opened.enter_context(log.open("ab"))
        follower = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, start_new_session=True)
    patience_s = PROJECTION_WAIT_S
    try:
        yield
    except Detached:
        patience_s = 0.0
        raise
    finally:
        follower.terminate()  # it looks once more, shows what is new, and leaves
        try:
            code: int | None = follower.wait(patience_s)
        except subprocess.TimeoutExpired:
            follower.kill()
            code = follower.wait()
        if code != 0 and patience_s:
            output.note(f"MLflow ({tracking}) is behind the ledger. Bring it up to date with: osctl sync")


def tell(event: Event) -> None:
    """What of a driver's events a person at the terminal should not have to look for: what is tried again and from where, what is not
    used, what it waits for that is not its own."""
    about = f"{event.stage} attempt {event.attempt}" if event.attempt is not None else event.stage or ""
    about = f"{about}: " if about else ""
    again = event.kind == "retry" or (event.kind == "attempt" and event.attempt != 1)
    unused = event.says_unused
    waited = event.kind == "observed" and event.stage is None and not event.detail.endswith((" runs", " leaves"))
    if again or unused or waited:
        output.note(f"{about}{event.detail}")


def farewell(workspace: Workspace, current: Any, result: Any) -> None:
    """What came out, where it lies, and what one would type next."""
    name = workspace.pipeline.name
    if result.exit_code:
        output.note(f"{name}: {result.status}: {result.reason}")
        if "osctl " not in result.reason:  # an end has one next step, and most say their own
            output.note("next: osctl logs, osctl status, then osctl launch to go on")
        return
    for path in pictures(workspace, current):
        output.note(f"drew {path}")
    output.note(f"{name}: {result.status}, {output.dollars(current.usd)} (prices: osctl cost)")
    output.note(
        'next: osctl compare | osctl cost | osctl lineage --verify | osctl mlflow | osctl sample "a digit 3 moving left" --out three.mp4'
    )


def pictures(workspace: Workspace, current: Any) -> list[str]:
    """Bring the clips and sheets of the last committed stage out of the store, for people to open."""
    done = [stage for stage in current.stages if stage.committed]
    if not done:
        return []
    last = done[-1]
    folder = home() / "samples" / workspace.pipeline.name / last.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key in workspace.ledger.samples(last.name, last.committed.inputs, last.committed.attempt):
        path = folder / key.rsplit("/", 1)[-1]
        path.unlink(missing_ok=True)
        workspace.store.download(key, path)
        paths.append(os.path.relpath(path))
    sheets = [path for path in paths if path.endswith(".png")]
    clips = [path for path in paths if path.endswith(".mp4")]
    return sheets + clips[:1] if len(clips) <= 1 else [*sheets, f"{clips[0]} and {len(clips) - 1} more clips beside it"]
