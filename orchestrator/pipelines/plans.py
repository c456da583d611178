"""What the stages of a pipeline will take and cost, from what is known on this machine: its recipe, measured steps, its price list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.pipelines.find import snapshot
from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.accounting.plan import Plan
    from orchestrator.accounting.size_plan import SizePlan
    from orchestrator.accounting.status import Snapshot


def local_snapshot(workspace: Workspace) -> Snapshot | None:
    """What the ledger knows already (committed stages, measured steps), where there is a local one: a plan needs no network."""
    if "://" in workspace.store_url or not Path(workspace.store_url).exists():
        return None
    return snapshot(workspace)


def plan_of(
    workspace: Workspace,
    *,
    mfu: float | None = None,
    calibration: Path | None = None,
    committed: Snapshot | None = None,
    target: str | None = None,
) -> Plan:
    """The plan of all stages, or of `target` alone. Raises UsageError.

    Args:
        mfu: model FLOPs utilisation to plan with, a fraction. None: measured, else the price list's.
        calibration: steps measured on a device, as bench/step.py writes them. None: OSCTL_CALIBRATION, else the shipped ones.
        committed: what the ledger knows already.
    """
    from orchestrator.accounting.plan import plan
    from orchestrator.recipe.prices import load_calibrations

    stages = committed.stages if committed else ()
    pipeline = workspace.pipeline
    if target is not None:
        pipeline = pipeline.model_copy(update={"stages": tuple(stage for stage in pipeline.stages if stage.name == target)})
    return plan(
        pipeline,
        workspace.prices,
        mfu=mfu,
        measured={stage.name: stage.step_s for stage in stages if stage.step_s is not None},
        calibrations=load_calibrations(calibration or _named_calibration(workspace)),
        committed={stage.name for stage in stages if stage.state == "committed"},
        pools={stage.name: one.pool for stage in stages for one in stage.attempts if one.ended is None and one.pool is not None},
    )


def size_plan_of(
    workspace: Workspace, shape: str, device: str, *, devices: int, batch: int, mfu: float | None, calibration: Path | None
) -> SizePlan:
    """One step of the last stage's model on clips of another size. `shape`: frames x height x width, `16x512x512`. Raises UsageError."""
    from orchestrator.accounting.size_plan import size_plan
    from orchestrator.errors import UsageError
    from orchestrator.recipe.prices import load_calibrations

    numbers = shape.lower().split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UsageError(f"--shape {shape}: is not frames x height x width. Example: --shape 16x512x512")
    frames, height, width = map(int, numbers)
    return size_plan(
        workspace.pipeline.stages[-1].config,
        workspace.prices,
        device,
        frames=frames,
        height=height,
        width=width,
        devices=devices,
        batch_size=batch,
        mfu=mfu,
        calibrations=load_calibrations(calibration or _named_calibration(workspace)),
    )


def _named_calibration(workspace: Workspace) -> Path | None:
    named = workspace.host.env.get("OSCTL_CALIBRATION")
    return Path(named) if named else None
