"""A launch that is driven on this machine: everything that can refuse it, then its driver, with MLflow kept up to date beside it.

Owns the order: plan and budget first, then the store, then decisions on stages that changed; nothing is written before all of them agree.
A launch whose driver lives in a cluster is `cluster_driver`'s.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.pipelines.changes import Decisions
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.accounting.plan import Plan
    from orchestrator.accounting.status import Snapshot
    from orchestrator.driver.runner import Runner
    from orchestrator.ledger.records import Event
    from orchestrator.pipelines.host import Host
    from orchestrator.ports import Backend, Evaluator, NodeCounter, Store
    from orchestrator.prepare.records import Order
    from orchestrator.recipe.pipeline import Pipeline

MLFLOW_WAIT_S = 60.0
"""How long the end of a launch waits for MLflow to show its last events. MLflow's first start on a small machine takes 20 s."""


@dataclass(frozen=True)
class Prepared:
    """A launch that nothing refused."""

    workspace: Workspace
    host: Host
    """This machine, as the attempts see it."""
    targets: tuple[str, ...]
    """Stages; empty: all."""
    all_committed: bool
    """Whether there is nothing left to train."""
    order: Order | None = None
    """What is prepared in the cluster first; none: nothing."""

    def runner(self, on_event: Callable[[Event], None] = lambda event: None, say: Callable[[str], None] = lambda text: None) -> Runner:
        """The driver, for one run in this process. Raises UsageError where there is no kubeconfig.

        Args:
            say: is told what people should hear of a preparation that comes first.
        """
        from orchestrator.driver.runner import Runner

        workspace = self.workspace
        backend = backend_of(workspace.pipeline, workspace.store, workspace.store_url, self.host)
        nodes = nodes_of(workspace.pipeline, self.host)
        first = None
        if self.order is not None:
            from orchestrator.pipelines import cluster_driver
            from orchestrator.pipelines.prepare_first import PreparedFirst

            first = PreparedFirst(workspace, self.order, self.targets, cluster_driver.connect(workspace), say)
        evaluator = evaluator_of(workspace.pipeline, workspace.store_url, self.host)
        return Runner(
            workspace.pipeline,
            workspace.ledger,
            backend,
            on_event=on_event,
            prices=workspace.prices,
            nodes=nodes,
            evaluator=evaluator,
            first=first,
        )

    def mlflow(self, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        """Keep MLflow up to date meanwhile; nothing where nothing is left to train, which saves MLflow's start of several seconds."""
        if self.all_committed:
            return contextlib.nullcontext()
        pipeline, log = self.workspace.pipeline, self.host.home / "log" / "mlflow-sync.log"
        return mlflow_beside(pipeline, self.workspace.store_url, self.host, say, log)


def prepare(
    workspace: Workspace,
    targets: Sequence[str],
    decisions: Decisions,
    say: Callable[[str], None],
    *,
    known: Snapshot | None,
    estimate: Plan,
    order: Order | None = None,
) -> Prepared:
    """Everything that comes before the driver, for a workspace that has its contents (`Workspace.with_contents`).

    Args:
        known: what a local ledger knows already (`plans.local_snapshot`).
        estimate: the plan, which is held against the budget.
        order: what the driver has prepared in the cluster first.

    Raises:
        UsageError: the pipeline, its store or a decision is not as it has to be.
        Refused: beyond the budget; a stage needs a decision; another driver lives in the cluster.
        Unreachable: the store did not answer.
    """
    from orchestrator.accounting.plan import check_budget
    from orchestrator.pipelines import changes, cluster_driver, prepare_first
    from orchestrator.pipelines.find import snapshot
    from orchestrator.recipe import adapt, launched

    pipeline = workspace.pipeline
    for line in adapt.ignored(pipeline):
        say(line)
    if pipeline.budget_usd is not None:
        check_budget(estimate, pipeline.budget_usd, (known or snapshot(workspace)).usd)
    if pipeline.backend == "kubernetes":
        cluster_driver.check_store(workspace)
        with contextlib.closing(cluster_driver.connect(workspace)) as api:
            cluster_driver.check_none(api, workspace)
    workspace.store.probe()
    launched.check_ours(workspace.ledger)
    if order is None:
        changes.settle(workspace, targets, decisions, say)
    else:
        prepare_first.check_decisions(pipeline.name, decisions)
    all_committed = order is None and all(row.basis == "committed" for row in estimate.rows)
    if pipeline.backend == "kubernetes" and not all_committed:
        from orchestrator.kube.image_check import refuse_old_image

        with contextlib.closing(cluster_driver.connect(workspace)) as api:
            refuse_old_image(api, pipeline, workspace.store_url, targets, say)
    workspace.keep_contents()
    host = workspace.host
    if pipeline.backend == "local":  # attempts share what one of them, or `osctl encode`, has encoded
        host = workspace.told_of_imports().having(OSCTL_LATENTS=str(host.latents))
    return Prepared(workspace, host, tuple(targets), all_committed, order)


def check_writable(workspace: Workspace) -> None:
    """Before hours of clips are read: whether a launch can write here. Raises Refused and UsageError; makes nothing."""
    from orchestrator.errors import Refused, UsageError

    store = [Path(workspace.store_url)] if "://" not in workspace.store_url else []
    for place in (*store, workspace.host.home):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if there.is_file():
            raise UsageError(
                f"launch {workspace.pipeline.name}: {there} is a file, and {place} has to be a folder. Choose other places: "
                "OSCTL_HOME, --store"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise Refused(
                f"launch {workspace.pipeline.name}: {there} may not be written, and {place} belongs there. Give this user the right to, "
                "or choose other places: OSCTL_HOME, --store"
            )


def backend_of(pipeline: Pipeline, store: Store, store_url: str, host: Host) -> Backend:
    """Where attempts of a pipeline live. Raises UsageError where there is no kubeconfig."""
    if pipeline.cluster is None:
        from orchestrator.local.backend import LocalBackend

        return LocalBackend(store_url, host.home, env=host.env)
    from orchestrator.kube.backend import KubeBackend
    from orchestrator.kube.client import Api
    from orchestrator.ledger.store import Ledger
    from orchestrator.pipelines.coming import profile_of_attempt

    profile, ledger = pipeline.cluster, Ledger(store, pipeline.name)
    api = Api.connect(profile.context, profile.namespace, host.env)
    return KubeBackend(
        store,
        api,
        profile,
        store_url,
        pipeline=pipeline.name,
        profile_of=lambda intent: profile_of_attempt(ledger, pipeline, intent) or profile,
    )


def evaluator_of(pipeline: Pipeline, store_url: str, host: Host) -> Evaluator | None:
    """What judges committed stages beside the training. None: their own ranks do, in a cluster and with a trainer of somebody else, whose
    checkpoints only that one can read."""
    if pipeline.backend != "local" or pipeline.trainer:
        return None
    from orchestrator.pipelines.evaluating_beside import BesideDriver

    return BesideDriver(pipeline.name, store_url, host)


def nodes_of(pipeline: Pipeline, host: Host) -> NodeCounter | None:
    """What counts the nodes of a pipeline's cluster. None: no stage of it may go on with fewer. Raises UsageError: no kubeconfig."""
    profile = pipeline.cluster
    if profile is None or all(stage.spec.resources.min_nodes is None for stage in pipeline.stages):
        return None
    from orchestrator.kube.client import Api
    from orchestrator.kube.nodes import KubeNodes

    return KubeNodes(Api.connect(profile.context, profile.namespace, host.env), profile)


@contextlib.contextmanager
def mlflow_beside(pipeline: Pipeline, store_url: str, host: Host, say: Callable[[str], None], log: Path | None = None) -> Iterator[None]:
    """Keep MLflow up to date with the ledger in a process beside the driver. Only the end waits for it, and that not for long.

    `log`: where that process writes; None: where this one does. A driver that leaves does not wait: the next one has a process of its own.
    """
    from orchestrator import modules
    from orchestrator.driver.runner import Detached

    tracking = pipeline.tracking
    if tracking == "none":
        yield
        return
    words = ["--store", store_url, "--pipeline", pipeline.name, "--tracking", tracking, "--follow-pid", str(os.getpid())]
    command = modules.command("orchestrator.tracking", *words)
    with contextlib.ExitStack() as opened:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = opened.enter_context(log.open("ab"))
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=host.for_children(), start_new_session=True
        )
    patience_s = MLFLOW_WAIT_S
    try:
        yield
    except Detached:
        patience_s = 0.0
        raise
    finally:
        process.terminate()  # it reads the ledger once more, shows what is new, and leaves
        try:
            code: int | None = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code != 0 and patience_s:
            say(f"MLflow ({tracking}) is behind the ledger. Bring it up to date with: osctl sync")


def cancel(workspace: Workspace, *, now: bool = False) -> str:
    """Ask the driver to save and stop, or with `now` to stop without saving; what was done, in a sentence. Raises Refused, Unreachable."""
    name, moment = workspace.pipeline.name, time.time()
    detail = f"{'now, ' if now else ''}by {workspace.host.env.get('USER') or 'somebody'}"
    holder = workspace.ledger.holder(moment)
    if holder is not None and workspace.ledger.ask_cancel(moment, detail=detail):
        asked = "stop without saving" if now else "save and stop"
        return f"{name}: asked {holder.holder} to {asked}. Follow it with: osctl watch"
    if workspace.pipeline.backend == "kubernetes":
        from orchestrator.pipelines import cluster_driver

        with contextlib.closing(cluster_driver.connect(workspace)) as api:
            return cluster_driver.cancel_coming(api, workspace, detail)
    return f"{name}: nobody drives it, nothing to cancel"
