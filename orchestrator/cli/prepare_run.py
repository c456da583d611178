"""A preparation that this process drives, as a person sees it: progress, signals, what came out and what to type next.

Owns the words; `orchestrator.prepare.run` does the work. Refuses to read what was typed (`cli.prepare`, `cli.run`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.printable import several
from orchestrator.cli import output

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.inputs.datasets import DataSet
    from orchestrator.pipelines.workspace import Workspace
    from orchestrator.prepare.records import Order
    from orchestrator.prepare.run import Asked, Prepared


def drive(asked: Asked, *, quiet: bool, follow: bool) -> Prepared | None:
    """Prepare in this process, with progress and signals. None: somebody else's run was followed to its end.

    Ends the process with 130 where it was asked to stop. Raises as `Preparation.run`.
    """
    from orchestrator.cli.prepare_view import Progress
    from orchestrator.errors import Refused
    from orchestrator.pipelines.signals import save_on_signals
    from orchestrator.prepare.run import Preparation
    from orchestrator.prepare.run_directory import RunDirectory
    from orchestrator.prepare.watching import is_held

    name = asked.config.name
    try:
        with Progress(name, quiet=quiet) as progress:
            preparation = Preparation(asked, say=output.note, on_progress=progress)
            with save_on_signals(preparation, output.note):
                prepared = preparation.run()
    except Refused as error:
        if not follow or not is_held(error):
            raise
        _follow(asked, quiet=quiet)
        return None
    if prepared.published is None:
        from orchestrator.cli.prepare_plan import money

        again = f"osctl prepare run {shlex.quote(os.path.relpath(RunDirectory(asked.folder).config))}"
        output.note(f"{name}: stopped; what is done is kept, {money(prepared.usd, prepared.not_priced)}. To go on: {again}")
        raise SystemExit(130)
    return prepared


def before_launch(workspace: Workspace, *, dry_run: bool, quiet: bool) -> tuple[Workspace, Order | None]:
    """The same pipeline on the data set that its recipe's `prepare:` makes; that is made first, unless nothing has changed.

    Returns:
        With an order, the data set is still to come: a driver in the cluster has it made.

    Raises as `drive`.
    """

    config = workspace.pipeline.prepare
    assert config is not None
    if workspace.pipeline.backend == "kubernetes":
        from orchestrator.pipelines.prepare_first import only_here

        if not (why := only_here(workspace)):
            return _before_launch_there(workspace, dry_run=dry_run)
        output.note(f"{config.name}: is prepared on this machine, which has to stay on until then. {why}")
    return _before_launch_here(workspace, dry_run=dry_run, quiet=quiet), None


def _before_launch_there(workspace: Workspace, *, dry_run: bool) -> tuple[Workspace, Order | None]:
    from orchestrator.pipelines import cluster_driver, prepare_first, preparing

    config = workspace.pipeline.prepare
    assert config is not None
    if dry_run:
        found = preparing.known(workspace)
        foretell(config, found, "its driver")
        return preparing.to_come(workspace) if found is None else preparing.on_prepared(workspace, found.source), None
    cluster_driver.check_store(workspace)
    with contextlib.closing(cluster_driver.connect(workspace)) as api:
        cluster_driver.drivers(api, workspace)  # with the cluster away, the store is not written to
    return prepare_first.at_launch(workspace, output.note)


def _before_launch_here(workspace: Workspace, *, dry_run: bool, quiet: bool) -> Workspace:
    from orchestrator.pipelines import preparing

    config = workspace.pipeline.prepare
    assert config is not None
    preparing.check(config, workspace.store, workspace.host)
    if dry_run:
        found = preparing.known(workspace)
        foretell(config, found)
        return workspace if found is None else preparing.on_prepared(workspace, found.source)
    if workspace.pipeline.backend == "local":
        from orchestrator.pipelines.launch import check_writable

        check_writable(workspace)
    else:
        from orchestrator.pipelines import cluster_driver

        cluster_driver.check_store(workspace)  # before hours of work, not after them; and so is the cluster
        with contextlib.closing(cluster_driver.connect(workspace)) as api:
            cluster_driver.drivers(api, workspace)
    workspace.store.probe()
    prepared = drive(preparing.asked_for(config, workspace.store, workspace.host), quiet=quiet, follow=False)
    assert prepared is not None and prepared.published is not None
    about = prepared.published.description
    done = "nothing has changed since it was prepared" if prepared.nothing_to_do else "prepared"
    output.note(f"{config.name}: {done}; {several(about.clips, 'clip')}, {output.duration(about.seconds)}, at {prepared.published.place}")
    return preparing.on_prepared(workspace, prepared.published.place)


def foretell(config: PrepareConfig, found: DataSet | None, who: str = "") -> None:
    """The first line of a plan. `who`: prepares it, where that is not this process."""
    there = f"prepared already: {several(found.rows, 'clip')} at {found.source}" if found is not None else "not prepared yet"
    verb = f"{who} has {config.name} prepared" if who else f"prepares {config.name}"
    output.note(f"first: {verb} of {', '.join(given.path for given in config.sources)}; {there}")


def emit(prepared: Prepared, output_: output.Format) -> None:
    """What came out, and what one would type next."""
    assert prepared.published is not None
    about, name = prepared.published.description, prepared.name
    if prepared.nothing_to_do:
        output.note(f"{name}: nothing to do, it is prepared and nothing it is made of has changed")
    if prepared.nothing_to_do and any(counts.get("quarantined") for counts in about.steps.values()):
        output.note(f"{name}: to try again what was put aside, run the same with --retry")
    for step, counts in about.steps.items():
        dropped, aside = sum(counts.get("dropped", {}).values()), sum(counts.get("quarantined", {}).values())
        output.note(f"{name}: {step}: {counts['in']:,} in, {counts['kept']:,} kept, {dropped:,} dropped, {aside:,} put aside")
    row: dict[str, Any] = {
        "name": name, "clips": about.clips, "seconds": about.seconds, "bytes": about.bytes, "digest": about.digest,
        "place": prepared.published.place, "new": prepared.published.new, "attempt": prepared.attempt, "usd": prepared.usd,
        "not_priced": prepared.not_priced,
    }  # fmt: skip
    if output_ is output.Format.table:
        shown = row | {"length": output.duration(about.seconds), "size": output.gigabytes(about.bytes), "digest": about.digest[:16]}
        output.table([shown], {"name": "name", "clips": "clips", "length": "length", "size": "size", "digest": "digest", "place": "place"})
    else:
        output.emit(row, output_)
    data = name if not Path(name).exists() else shlex.quote(prepared.published.place)  # to `--data` a path that is there is no name
    output.note(f"next: osctl launch --data {data} | osctl prepare report {name} | osctl data show {name} --about")


def _follow(asked: Asked, *, quiet: bool) -> None:
    from orchestrator.cli.prepare_view import Progress, show
    from orchestrator.errors import RunFailed
    from orchestrator.prepare import same_name
    from orchestrator.prepare.watching import follow

    same_name.check_followed(asked.store, asked.config)
    name = asked.config.name
    output.note(f"{name}: somebody else prepares it; this command follows. Ctrl-C ends the following alone")
    with Progress(name, quiet=quiet) as progress:
        state = follow(asked.store, name, asked.folder, lambda state: progress(state.status))
    show(state)
    if state.word != "prepared":
        fact = f"data set {name}: {state.word}, {state.reason or 'nobody prepares it any more'}"
        raise RunFailed(f"{fact}. Run the same command again, without --follow")
