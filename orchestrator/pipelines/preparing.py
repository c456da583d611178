"""A preparation beside a pipeline: what `osctl prepare run` and a recipe's `prepare:` need of this machine and of its store.

Owns which stages the clips are encoded for, and how a pipeline is put on what came out. Refuses to print.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.pipelines.host import Host
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.accounting.status import PreparationStatus
    from orchestrator.inputs.datasets import DataSet
    from orchestrator.ports import Store
    from orchestrator.prepare.run import Asked
    from orchestrator.recipe.pipeline import Pipeline


def folder_of(host: Host, name: str) -> Path:
    """The run directory of a preparation on this machine."""
    return host.home / "prepare" / name


def encoding_for(config: PrepareConfig, recipe: str | None, encode: bool | None = None) -> PrepareConfig:
    """The same, with the recipe that its clips are encoded for by name or absolute path.

    Args:
        recipe: a recipe's file, folder or shipped name. None: what prepare.yaml says.
        encode: False: for none. None: for one where one is named.

    Raises UsageError.
    """
    from orchestrator.recipe.files import find, shipped

    named = recipe or config.encode
    if encode is False or (named is None and not encode):
        return config.model_copy(update={"encode": None})
    path = find(named)
    names = {str(place): name for name, place in shipped().items()}
    return config.model_copy(update={"encode": names.get(str(path), str(path.absolute()))})


def asked_for(config: PrepareConfig, store: Store, host: Host) -> Asked:
    """What is to be prepared, with the stages of the recipe that `encode` names. Raises UsageError, Refused, Unreachable."""
    from orchestrator.prepare.run import DEVICE, Asked
    from orchestrator.recipe.adapt import gpu_of
    from orchestrator.recipe.prices import named_prices, price_of

    stages: Mapping[str, Mapping[str, Any]] = {}
    parents: Mapping[str, str | None] = {}
    prices = named_prices(host.env)
    gpu = gpu_of(None, prices)
    if config.encode is not None:
        workspace = Workspace.open(config.encode, store=store.url, host=host)
        gpu = gpu_of(workspace.pipeline, prices)
        stages, parents, host = stages_for(workspace, folder_of(host, config.name) / "out")
    holder = f"{getpass.getuser()}@{socket.gethostname()}"
    return Asked(
        config, stages, store, folder_of(host, config.name), host.env, parents=parents, price=price_of(prices, DEVICE), gpu=gpu,
        gpu_price=price_of(prices, gpu), holder=holder, own=(host.home,),
    )  # fmt: skip


def check(config: PrepareConfig, store: Store, host: Host) -> None:
    """What can be seen to be wrong before a video is opened. Raises UsageError."""
    from opensora.dataset.left_out import LeftOut
    from orchestrator.prepare import checks

    own = (host.home, folder_of(host, config.name), *(() if "://" in store.url else (Path(store.url),)))
    checks.check(config, LeftOut(own))


def gpu_here(config: PrepareConfig, host: Host) -> str:
    """Name in the price list of the GPU on which its models would run here. Raises UsageError."""
    from orchestrator.recipe.adapt import gpu_of
    from orchestrator.recipe.prices import named_prices

    return gpu_of(Workspace.open(config.encode, host=host).pipeline if config.encode is not None else None, named_prices(host.env))


def stages_for(workspace: Workspace, out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str | None], Host]:
    """By name, the stages of a recipe, on the data set in `out`, parents first; whose child each is, since a child takes over its parent's
    encoders; and this machine, which knows where published encoders lie.

    Raises UsageError, Refused, Unreachable.
    """
    from orchestrator.recipe import adapt

    nowhere = workspace.of_pipeline(adapt.on_prepared(workspace.pipeline, str(out / "not-there-yet")))
    told = nowhere.with_contents(needed=False, far=False, say=lambda _: None).told_of_imports()
    pipeline = adapt.on_prepared(workspace.pipeline, str(out))
    stages = {stage.name: stage.config.model_dump(mode="json") for stage in pipeline.stages}
    return stages, {stage.name: stage.spec.parent for stage in pipeline.stages}, told


def known(workspace: Workspace) -> DataSet | None:
    """The data set that was prepared last of the recipe's `prepare:`; None: none was. Raises Unreachable."""
    from orchestrator.inputs import datasets

    config = workspace.pipeline.prepare
    found = datasets.of_name(workspace.store, config.name) if config is not None else []
    return found[-1] if found and found[-1].prepared is not None else None


def status_of(workspace: Workspace) -> PreparationStatus | None:
    """How far the clips of a recipe's `prepare:` are, and what they cost. None: it has none. Raises Unreachable."""
    from orchestrator.accounting.status import PreparationStatus
    from orchestrator.errors import Refused
    from orchestrator.prepare import watching
    from orchestrator.prepare.watching import State

    config = workspace.pipeline.prepare
    if config is None:
        return None
    try:
        state = watching.look(workspace.store, config.name, folder_of(workspace.host, config.name))
    except Refused:
        state = State(config.name, None, {}, (), None)
    steps = {row["name"]: row for row in watching.steps_of(state.status)}
    now = steps.get(str(state.status.get("step", ""))) or next(reversed(steps.values()), None)
    eta, bill, known = state.status.get("eta_s"), state.bill, state.data_set
    seconds: dict[str, float] = {}
    for line in bill.sorted():
        seconds[line.step] = seconds.get(line.step, 0.0) + line.seconds
    return PreparationStatus(
        name=config.name,
        state=state.word,
        step=str(now["name"]) if now is not None else "",
        done=now["kept"] + now["dropped"] + now["quarantined"] if now is not None else 0,
        rows=now["in"] if now is not None else 0,
        eta_s=float(eta) if isinstance(eta, int | float) else None,
        reason=state.reason,
        attempts=len(state.attempts),
        core_hours=bill.core_hours,
        gpu_hours=bill.gpu_hours,
        usd=bill.usd,
        not_priced=bill.not_priced,
        device_seconds=seconds,
        clips=known.rows if known is not None else None,
        place=known.source if known is not None else None,
        digest=known.prepared if known is not None else None,
    )


def on_prepared(workspace: Workspace, place: str) -> Workspace:
    """The same pipeline, whose stages train on what was prepared."""
    from orchestrator.recipe import adapt

    return workspace.of_pipeline(adapt.on_prepared(workspace.pipeline, place))


def to_come(workspace: Workspace) -> Workspace:
    """The same pipeline, whose stages train on a data set of which no version is known yet: nothing of it can be started so."""
    return workspace.of_pipeline(_without_clips(workspace.pipeline, _place_to_come(workspace)))


def is_to_come(workspace: Workspace) -> bool:
    """Whether its clips are still to be made by a driver in the cluster: nothing of them can be looked for."""
    if workspace.pipeline.prepare is None:
        return False
    place = _place_to_come(workspace)
    return all(getattr(stage.config.data.source, "path", "") == place for stage in workspace.pipeline.stages)


def _place_to_come(workspace: Workspace) -> str:
    from orchestrator.inputs.datasets import ROOT

    config = workspace.pipeline.prepare
    assert config is not None
    return f"{workspace.store_url}/{ROOT}/{config.name}"


def is_on_version(pipeline: Pipeline) -> bool:
    """Whether its stages train on a version of a prepared data set."""
    from orchestrator.inputs.contents import PREPARED

    return all(PREPARED in getattr(stage.config.data.source, "path", "") for stage in pipeline.stages)


def alike(one: Pipeline, other: Pipeline) -> bool:
    """Whether both are the same, whichever version of the data set that is made first they are on."""
    if one.prepare is None or other.prepare is None:
        return one == other
    return _without_clips(one, "") == _without_clips(other, "")


def _without_clips(pipeline: Pipeline, place: str) -> Pipeline:
    from orchestrator.recipe import adapt

    stages = []
    for stage in adapt.on_prepared(pipeline, place).stages:
        stages.append(stage.model_copy(update={"contents": stage.contents.model_copy(update={"data": None})}))
    return pipeline.model_copy(update={"stages": tuple(stages)})


def on_known(workspace: Workspace) -> Workspace:
    """The same, on what was prepared last, where the recipe has `prepare:` and something was. Raises Unreachable."""
    if workspace.pipeline.prepare is None or (found := known(workspace)) is None:
        return workspace
    return on_prepared(workspace, found.source)


def needs_prepared(workspace: Workspace) -> Workspace:
    """As `on_known`, for who prepares nothing itself. Raises UsageError where nothing is prepared yet, Unreachable."""
    config = workspace.pipeline.prepare
    if config is None or known(workspace) is not None:
        return on_known(workspace)
    from orchestrator.errors import UsageError

    raise UsageError(
        f"pipeline {workspace.pipeline.name}: its clips are made of raw videos first, and {config.name} is not in {workspace.store_url}. "
        "Launch the recipe once from a terminal, which prepares and trains: osctl launch"
    )
