"""What a notebook imports: a pipeline as an object, with the verbs of `osctl`, and raw videos that become a data set.

    from orchestrator.api import Pipeline, prepare

    demo = Pipeline.load("demo", store="runs").override("stage3.steps=600")
    print(demo.plan().expected.usd)             # dollars
    launch = demo.launch()                      # returns; the driver is a process of its own
    for snapshot in demo.watch():
        print(snapshot.state, snapshot.usd)
    print(launch.wait().status)                 # "succeeded"
    pandas.DataFrame(demo.compare())

    films = prepare("videos", store="runs")     # cut, filtered, captioned; returns when it is done
    Pipeline.load("my-model", store="runs", data=films.place).launch()

Nothing here prints, ends the process, handles signals, changes the working folder or the environment. Remarks go to the logger
`orchestrator.api`. Each call opens a store of its own, so a `Pipeline` may be used from several threads, and from an event loop's executor
(every call blocks). Paths and variables are read when a pipeline is loaded, and do not change with the process afterwards.

Errors are those of `orchestrator.errors`: `UsageError` (change the recipe or the call), `Refused` (a budget, a lease or a contract says no;
nothing was done), `CorruptCheckpoint` (a kind of Refused), `RunFailed` (of `prepare`), `Unreachable` (a store or cluster did not answer).
Commands in their texts are those of `osctl`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, overload

from orchestrator.accounting.plan import Plan
from orchestrator.accounting.status import Snapshot
from orchestrator.environment import at_home
from orchestrator.errors import CorruptCheckpoint
from orchestrator.inputs.own_clips import may_be_name
from orchestrator.pipelines import accounts, cluster_driver, find, plans, prepare_first, preparing, watching
from orchestrator.pipelines import launch as launching
from orchestrator.pipelines.changes import Decisions
from orchestrator.pipelines.cluster_view import ClusterView
from orchestrator.pipelines.driver_process import DriverProcess, End
from orchestrator.pipelines.host import Host
from orchestrator.pipelines.preparing_process import DataSet
from orchestrator.pipelines.workspace import Workspace
from orchestrator.prepare.records import Order
from orchestrator.recipe import files

__all__ = ["ClusterView", "DataSet", "Launch", "Pipeline", "Plan", "Result", "Row", "Snapshot", "prepare"]

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""str, int, float, bool, None or a list of them by column; pandas takes a list of these. Units stand in the columns' names: `_s` seconds,
`_hours`, `usd` dollars, `device_seconds_step` device-seconds spent on steps; `goodput` and `…_accuracy` are fractions of 1."""


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    status: str
    """succeeded, failed (a stage could not be trained), cancelled or suspended (it was asked to stop)."""
    reason: str
    """In a sentence."""
    snapshot: Snapshot
    """The pipeline at its end."""


@dataclass(frozen=True)
class Launch:
    """A launch that goes on by itself: it ends with neither this object nor this process. Stop it with `Pipeline.cancel`."""

    driver: str | None
    """A process of this machine (`process 4711`), or the name of a Job in the cluster. None: there was nothing left to do."""
    _end: Callable[[float | None], End | None]
    _workspace: Workspace

    def wait(self, timeout_s: float | None = None) -> Result:
        """Wait for the end. An interrupt (Ctrl-C, the notebook's Stop) ends the waiting alone.

        Raises:
            TimeoutError: it has not ended after `timeout_s` seconds.
            Refused, UsageError, Unreachable: the driver ended with that.
        """
        end = self._end(timeout_s)
        if end is None:
            raise TimeoutError(f"{self._workspace.pipeline.name}: {self.driver} has not ended after {timeout_s:g} s")
        end.check()
        status, _, reason = end.reason.partition(": ")
        return Result(status, reason, find.snapshot(self._workspace.fresh()))


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, resolved: every file read, every override applied. Frozen: `override` returns another one.

    `plan` and `launch` are about the recipe; everything else is about what was launched last under its name, whatever the recipe says.
    """

    _workspace: Workspace
    _asked: Mapping[str, Any]
    """What `load` was called with."""

    @classmethod
    def load(
        cls,
        file: str | Path | None = None,
        *,
        store: str | Path | None = None,
        tracking: str | None = None,
        data: str | Path | None = None,
        backend: Literal["local", "kubernetes"] | None = None,
        cluster: str | Path | None = None,
        prices: Path | None = None,
        home: Path | None = None,
        env: Mapping[str, str] | None = None,
        settings: Sequence[str] = (),
    ) -> Pipeline:
        """Read a recipe, as `osctl -f` does.

        Args:
            file: a pipeline's file or its folder, a shipped name (demo, open-sora-1.0), or the name of a pipeline that was launched into
                the store. None: ./osctl.yaml, else the demo.
            store: a folder, or s3://bucket/prefix. None: the recipe's, else `store` in `home`.
            tracking: MLflow: sqlite, http://host:port, or none.
            data: train on these clips instead of the recipe's: a folder, a table of clips, an address, or the name of a data set in the
                store (`osctl data list`). A path that exists comes before a name.
            cluster: a shipped cluster profile, or its file; implies `backend="kubernetes"`.
            prices: a price list in place of the shipped one.
            home: folder of local state. None: OSCTL_HOME, else ./.osctl.
            env: environment variables to go by (OSCTL_*, AWS_*, KUBECONFIG), for child processes too. None means this process's, as now.
            settings: overrides, see `override`.

        Raises:
            UsageError: there is no such recipe, or it is not as it has to be; one line says file, line, key and what to do.
            Refused, Unreachable: of a pipeline that is looked for by its name in a store.
        """
        recipe = files.find(_text(file), missing_ok=True)
        asked: dict[str, Any] = {
            "file": str(recipe.absolute()) if recipe is not None else _text(file),
            "store": _text(store),
            "tracking": tracking,
            "data": _place_or_name(data),
            "backend": backend,
            "cluster": _absolute(cluster) if cluster is not None and Path(cluster).is_file() else _text(cluster),
            "prices": prices.absolute() if prices is not None else None,
            "host": Host.here(env, home),
            "settings": tuple(settings),
        }
        return cls(Workspace.open(**asked), asked)

    def override(self, *settings: str) -> Pipeline:
        """The same with some fields set otherwise. Its files are read again.

        Args:
            settings: `KEY=VALUE` as for `osctl --set`: `"stage2.steps=100"`, `"stage2.optimizer.lr=1e-3"`, `"budget_usd=5"`. Later ones
                win.

        Raises UsageError.
        """
        asked = {**self._asked, "settings": (*self._asked["settings"], *settings)}
        return Pipeline(Workspace.open(**asked), asked)

    @property
    def name(self) -> str:
        return self._workspace.pipeline.name

    @property
    def store(self) -> str:
        """URL, or the folder's absolute path."""
        return self._workspace.store_url

    @property
    def stages(self) -> tuple[str, ...]:
        """Names, every parent before its children."""
        return tuple(stage.name for stage in self._workspace.pipeline.stages)

    # --- Before ----------------------------------------------------------------------------------------------------------------------

    def plan(self, *, mfu: float | None = None, calibration: Path | None = None) -> Plan:
        """Hours, dollars and memory of every stage. Nothing runs, and nothing but this machine is asked.

        Args:
            mfu: model FLOPs utilisation to plan with, a fraction of 1. None: measured, else the price list's.
            calibration: a file of measured steps. None: OSCTL_CALIBRATION, else the shipped ones.

        Raises UsageError.
        """
        workspace = self._workspace.fresh().with_contents(needed=False, far=False, ask_store=False, say=log.info)
        return plans.plan_of(workspace, mfu=mfu, calibration=calibration, committed=plans.local_snapshot(workspace))

    @overload
    def launch(
        self, stage: str | None = None, *, wait: Literal[False] = False, keep: Sequence[str] = (), anew: Sequence[str] = ()
    ) -> Launch: ...
    @overload
    def launch(self, stage: str | None = None, *, wait: Literal[True], keep: Sequence[str] = (), anew: Sequence[str] = ()) -> Result: ...
    def launch(
        self, stage: str | None = None, *, wait: bool = False, keep: Sequence[str] = (), anew: Sequence[str] = ()
    ) -> Launch | Result:
        """Train the stages, each from the verified checkpoint before it. Repeating it does nothing twice.

        Its driver is a process of this machine, or with a cluster a Job there. It goes on when this process ends. It has begun when this
        returns: `status` then says so.

        Args:
            stage: this one alone; its parent has to be committed. None: all.
            wait: return when it has ended, with its `Result`.
            keep: stages whose result is kept although their data changed.
            anew: stages that are trained anew although earlier work is there.

        Raises:
            UsageError: the recipe, a stage's name or a decision is not as it has to be.
            Refused: over its budget; another driver holds the lease; a stage that changed needs a decision (`keep` or `anew`).
            Unreachable: the store or the cluster did not answer; nothing was done.
        """
        workspace = self._workspace.fresh()
        workspace.check_recipe()
        find.check_stage(workspace, stage, "launch")
        launched = _launch(workspace, stage, Decisions(tuple(keep), tuple(anew)), resume=False)
        return launched.wait() if wait else launched

    # --- What was launched -----------------------------------------------------------------------------------------------------------

    def status(self) -> Snapshot:
        """The pipeline as its ledger has it now, and what cannot be read of it in `remarks`. Raises Refused, Unreachable."""
        return watching.view(self._launched()).snapshot

    def cluster(self) -> ClusterView | None:
        """Its pods by node, and why it waits, in the cluster's words. None: it runs on this machine. Raises Refused, Unreachable."""
        return watching.view(self._launched()).cluster

    def watch(self, interval_s: float = 1.0) -> Iterator[Snapshot]:
        """A snapshot now and whenever something changed, until nobody drives the pipeline. The last one is its end.

        A store that does not answer meanwhile is asked again and again, and what was known stays. Leaving the loop ends the watching.

        Args:
            interval_s: seconds between two reads of the ledger.

        Raises Refused, Unreachable, at the start.
        """
        workspace = self._launched()
        last = watching.view(workspace).snapshot
        yield last
        if last.state != "running":
            return
        for view in watching.Views(workspace.fresh(), interval_s):
            if view.snapshot != last and not view.first:
                last = view.snapshot
                yield last
            if view.over:
                return

    def cost(self, *, by_attempt: bool = False, verify: bool = False) -> list[Row]:
        """The bill: a row a stage, or a row an attempt. What was spent under earlier inputs has rows of its own (`earlier`).

        `device_seconds_*` sum to `held_s`, both in device-seconds; `usd` is at the price of the day on which an attempt was made.

        Args:
            verify: add up every journal piece anew.

        Raises CorruptCheckpoint where that is another bill; Refused, Unreachable.
        """
        workspace = self._launched()
        current = find.snapshot(workspace)
        return _plain(accounts.cost(accounts.added_up_anew(workspace, current) if verify else current, by_attempt=by_attempt))

    def compare(self) -> list[Row]:
        """Stages side by side: a row a stage with its loss, its readings (`evaluation_*`), time, cost and the published reference.

        Raises Refused, Unreachable.
        """
        return _plain(accounts.comparison(find.snapshot(self._launched())))

    def losses(self) -> list[Row]:
        """A row for every training step that was done: `name` (the stage), `attempt`, `step`, `loss`, and `usd` spent until then.

        Raises Refused, Unreachable.
        """
        return _plain(accounts.losses(self._launched()))

    def lineage(self, stage: str | None = None, *, verify: bool = False, check: bool = True) -> list[Row]:
        """A row for each checkpoint from a stage's result back to its root; then one for each data set that was made of raw videos.

        Args:
            stage: None: the last that is committed.
            verify: read and hash every file of every checkpoint. Else it is only seen that they are there.
            check: raise where something is wrong. Else the row's `verdict` says so.

        Raises CorruptCheckpoint; Refused where nothing is committed; UsageError, Unreachable.
        """
        found = accounts.lineage(self._launched(), stage, verify=verify)
        if found.fault and check:
            raise CorruptCheckpoint(found.fault)
        return _plain(found.rows)

    def cancel(self, *, now: bool = False) -> str:
        """Ask whoever drives it to save and stop, or with `now` to stop at once; `resume` takes it up again.

        Returns what was done, in a sentence: that nobody drives it is no error. Raises Refused, Unreachable.
        """
        return launching.cancel(self._launched(), now=now)

    @overload
    def resume(
        self, *settings: str, stage: str | None = None, wait: Literal[False] = False, keep: Sequence[str] = (), anew: Sequence[str] = ()
    ) -> Launch: ...
    @overload
    def resume(
        self, *settings: str, stage: str | None = None, wait: Literal[True], keep: Sequence[str] = (), anew: Sequence[str] = ()
    ) -> Result: ...
    def resume(
        self, *settings: str, stage: str | None = None, wait: bool = False, keep: Sequence[str] = (), anew: Sequence[str] = ()
    ) -> Launch | Result:
        """Go on with what was launched last, exactly as it was then, but for these settings (see `override`). Else as `launch`.

        The overrides of this object are the recipe's, and do not count here. Raises as `launch`; Refused where nothing was launched.
        """
        workspace = find.to_resume(self._workspace.fresh(), settings)
        find.check_stage(workspace, stage, "resume")
        launched = _launch(workspace, stage, Decisions(tuple(keep), tuple(anew)), resume=True, changed=bool(settings))
        return launched.wait() if wait else launched

    def _launched(self) -> Workspace:
        return find.as_launched(self._workspace.fresh())


def prepare(
    videos: str | Path,
    *,
    name: str | None = None,
    store: str | Path | None = None,
    encode: str | Path | None = None,
    licence: str | None = None,
    settings: Sequence[str] = (),
    retry: bool = False,
    replace: bool = False,
    home: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> DataSet:
    """Make a data set of raw videos, as `osctl prepare run` does: probe, cut, filter, caption, encode. Returns when it is published.

    It runs in a process of its own, which ends with this one. An interrupt (Ctrl-C, the notebook's Stop) has it save, and is raised when it
    has. The same call again goes on; on finished work it does nothing. What people should hear goes to the logger `orchestrator.api`.

    Args:
        videos: a folder or a file of videos, an address, a list of videos, or a prepare.yaml.
        name: of the data set. None: the folder's, or what prepare.yaml says.
        store: a folder, or s3://bucket/prefix. None: OSCTL_STORE, else what the recipe at hand says, else `store` in `home`.
        encode: a recipe, for whose stages clips are encoded, too.
        licence: under which the videos are used; stands in every row.
        settings: `KEY=VALUE` as for `--set`: `"cut.max_s=5"`, `"caption={kind: server, url: http://gpu:8000/v1, model: llava}"`.
        retry: look again at addresses and at what was put aside, although nothing here has changed.
        replace: the name may stand for these videos, though it stood for others.
        home, env: as of `Pipeline.load`.

    Raises:
        UsageError: something typed is wrong, the videos cannot be prepared, or the captions' server refuses.
        RunFailed: too many rows could not be worked on, the disk is full, no clip is left, or it was asked to stop from elsewhere.
        Refused: somebody else prepares it, or the name stands for other videos.
        Unreachable: the store did not answer.
    """
    from orchestrator.pipelines import preparing, preparing_process
    from orchestrator.pipelines.workspace import reached, store_at
    from orchestrator.recipe.preparation import is_file, of_typed

    host, given = Host.here(env, home), os.fspath(videos)
    config = of_typed(given, name=name, licence=licence, settings=settings, env=host.env)
    config = preparing.encoding_for(config, _text(encode))
    url = store_at(_text(store), host, config.encode)
    host = reached(url, host, file=config.encode)
    return preparing_process.prepare(config, url, host, retry=retry, replace=replace or is_file(given), say=log.info)


def _launch(workspace: Workspace, stage: str | None, decisions: Decisions, *, resume: bool, changed: bool = False) -> Launch:
    targets = [stage] if stage else []
    order = None
    if workspace.pipeline.prepare is not None and not preparing.is_on_version(workspace.pipeline):
        workspace, order = _with_clips(workspace)
        resume = False
    if workspace.pipeline.backend == "kubernetes":
        return _launch_in_cluster(workspace, targets, decisions, resume=resume, changed=changed, order=order)
    launching.check_writable(workspace)
    if changed or not resume:
        workspace = workspace.with_contents(needed=True, say=log.info)
    known = plans.local_snapshot(workspace)
    estimate = plans.plan_of(workspace, committed=known, target=stage)
    prepared = launching.prepare(workspace, targets, decisions, log.info, known=known, estimate=estimate)
    process = DriverProcess.start(prepared)
    return Launch(f"process {process.pid}", process.wait, workspace)


def _with_clips(workspace: Workspace) -> tuple[Workspace, Order | None]:
    """The pipeline on the clips that its recipe's raw videos became; with an order its driver has them made first. Raises UsageError where
    a terminal has to make them."""
    if workspace.pipeline.backend == "kubernetes" and not prepare_first.only_here(workspace):
        cluster_driver.check_store(workspace)
        return prepare_first.at_launch(workspace, log.info)
    return preparing.needs_prepared(workspace), None


def _launch_in_cluster(
    workspace: Workspace, targets: Sequence[str], decisions: Decisions, *, resume: bool, changed: bool, order: Order | None
) -> Launch:
    cluster_driver.check_store(workspace)
    with contextlib.closing(cluster_driver.connect(workspace)) as api:
        if changed or not resume:
            workspace = workspace.with_contents(needed=True, clips=order is None, say=log.info)
        driver = cluster_driver.find_or_submit(api, workspace, targets, decisions, log.info, attach=resume, order=order)
    if driver is None:
        return Launch(None, lambda _: End(0, "succeeded: every stage that was asked for is committed"), workspace)

    def end(timeout_s: float | None) -> End | None:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with contextlib.closing(cluster_driver.connect(workspace)) as api:
            code = cluster_driver.wait(api, workspace, driver, log.info, until)
        return None if code is None else End(code, cluster_driver.last_words(workspace))

    return Launch(driver.name, end, workspace)


def _absolute(place: str | Path | None) -> str | None:
    """An address stays as it is."""
    return _text(place) if place is None or "://" in str(place) else str(at_home(place).absolute())


def _place_or_name(data: str | Path | None) -> str | None:
    """What is no path of this machine may be a data set's name."""
    return str(data) if data is not None and may_be_name(str(data)) and not at_home(data).exists() else _absolute(data)


def _text(value: str | Path | None) -> str | None:
    return None if value is None else os.fspath(value)


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    return [{name: _number(value) for name, value in _flat(row).items()} for row in rows]


def _flat(row: Mapping[str, Any]) -> Row:
    """One level: `{"evaluation": {"loss": 1}, "pools": ["a", "b"]}` → `{"evaluation_loss": 1, "pools": "a, b"}`."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{inner}": each for inner, each in _flat(value).items()}
        elif isinstance(value, list):
            flat[name] = ", ".join(map(str, value))
        elif value is not None or name not in ("device_seconds", "evaluation", "contents"):  # of a row that has none of them
            flat[name] = value
    return flat


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value
