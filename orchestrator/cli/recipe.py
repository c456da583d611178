"""Commands about recipes: init, plan, explain. They read files and compute; nothing runs."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options, output
from orchestrator.cli.workspace import Workspace

if TYPE_CHECKING:
    from opensora.memory import Memory
    from orchestrator.plan import Fit, Plan, Row, SizePlan
    from orchestrator.snapshot import Snapshot


def init(
    folder: Annotated[Path, typer.Argument(help="Where to put osctl.yaml and its stage files.")] = Path(),
    recipe: Annotated[str, typer.Option("--from", metavar="NAME", help="Shipped recipe to start from: demo or open-sora-1.0.")] = "demo",
) -> None:
    """Write a recipe to start from. Overwrites nothing.

    Example: osctl init my-model --from open-sora-1.0
    """
    from orchestrator import config
    from orchestrator.errors import UsageError

    source = config.find(recipe)
    files = {folder / ("osctl.yaml" if path == source else path.name): path for path in sorted(source.parent.glob("*.yaml"))}
    taken = [str(target) for target in files if target.exists()]
    if taken:
        raise UsageError(f"init {folder}: {taken[0]} is there already. Choose another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for target, path in files.items():
        target.write_bytes(path.read_bytes())
        output.note(f"wrote {target}")
    output.note(f"next: osctl plan -f {folder}")


def plan(
    file: options.File = None,
    mfu: options.Mfu = None,
    settings: options.Set = None,
    store: options.Store = None,
    cluster: options.Cluster = None,
    calibration: options.Calibration = None,
    prices: options.Prices = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="TxHxW", help="Plan one step on clips of this size instead, with the last stage's model."),
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="With --shape: how many devices.")] = 8,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="With --shape: a device of the price list.")] = "h800",
    batch: Annotated[int, typer.Option("--batch", min=1, help="With --shape: clips of each group of devices that share one.")] = 1,
    output_: options.Output = output.Format.table,
) -> None:
    """Hours, dollars and memory of every stage, beside the published run. With --cluster on that cluster's devices, at its price.

    With --shape: what fits the devices for clips of that size, and what a step takes (pipeline: open-sora-1.0 where none is named).

    Examples: osctl plan -f open-sora-1.0 --mfu 0.45          osctl plan --shape 1440x1088x1920 --devices 8
    """
    if shape is not None:
        workspace = Workspace.open(file or "open-sora-1.0", settings=settings, store=store, cluster=cluster, prices=prices)
        show_size(size_plan_of(workspace, shape, device, devices=devices, batch=batch, mfu=mfu, calibration=calibration), output_)
        return
    workspace = Workspace.open(file, settings=settings, store=store, cluster=cluster, prices=prices)
    workspace = workspace.with_contents(needed=False, far=False, ask_store=False, say=output.note)
    known = ledger_of(workspace)
    show_plan(plan_of(workspace, mfu=mfu, calibration=calibration, committed=known), output_)
    if known is not None:
        from orchestrator.cli.look import say

        say(known.remarks)


def ledger_of(workspace: Workspace) -> Snapshot | None:
    """What the ledger knows already, where there is a local one: committed stages and measured steps. A plan needs no network.

    It has what cannot be read in `remarks`.
    """
    if "://" in workspace.store_url or not Path(workspace.store_url).exists():
        return None
    from orchestrator.cli.look import take

    return take(workspace, quiet=True)


def plan_of(
    workspace: Workspace,
    *,
    mfu: float | None = None,
    calibration: Path | None = None,
    committed: Snapshot | None = None,
    target: str | None = None,
) -> Plan:
    from orchestrator.plan import plan as compute
    from orchestrator.prices import load_calibrations

    stages = committed.stages if committed else ()
    pipeline = workspace.pipeline
    if target is not None:
        pipeline = pipeline.model_copy(update={"stages": tuple(stage for stage in pipeline.stages if stage.name == target)})
    return compute(
        pipeline,
        workspace.prices,
        mfu=mfu,
        measured={stage.name: stage.step_s for stage in stages if stage.step_s is not None},
        calibrations=load_calibrations(calibration or _named_calibration()),
        committed={stage.name for stage in stages if stage.state == "committed"},
    )


def size_plan_of(
    workspace: Workspace, shape: str, device: str, *, devices: int, batch: int, mfu: float | None, calibration: Path | None
) -> SizePlan:
    from orchestrator.errors import UsageError
    from orchestrator.plan import size_plan
    from orchestrator.prices import load_calibrations

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
        calibrations=load_calibrations(calibration or _named_calibration()),
    )


def _named_calibration() -> Path | None:
    """Of a plan that is made on the way to something else (launch), too."""
    named = os.environ.get("OSCTL_CALIBRATION")
    return Path(named) if named else None


def show_plan(estimate: Plan, output_: output.Format) -> None:
    """Per stage what is expected, from optimistic to pessimistic, and what the published run took."""
    rows = [
        {
            "name": row.stage,
            "parent": row.parent,
            "steps": row.steps,
            "flops": row.flops,
            "devices": row.devices,
            "device": row.device,
            "mfu": row.mfu,
            "basis": row.basis,
            "speed": row.source,
            "memory": _fit(row.fit),
            **_figures(row),
            "published_gpu_hours": row.published.gpu_hours if row.published else None,
            "published_usd": row.published.usd if row.published else None,
            "ratio": row.ratio,
        }
        for row in estimate.rows
    ]
    total = {
        "name": "total",
        **_figures(estimate),
        "published_gpu_hours": estimate.published_gpu_hours or None,
        "published_usd": estimate.published_usd or None,
        "ratio": estimate.ratio,
    }
    if output_ is not output.Format.table:
        output.emit({"stages": rows, "total": total}, output_)
        return
    columns = {"name": "stage", "steps": "steps", "work": "FLOPs", "on": "on", "speed": "MFU", "hours": "device-hours", "gpu": "GPU-hours"}
    columns |= {"wall": "wall", "cost": "cost", "range": "range"}
    if estimate.published_gpu_hours:
        columns |= {"published_gpu_hours": "published GPU-h", "published_cost": "published", "share": "ratio"}
    output.table([_plan_cells(row) for row in [*rows, total]], columns)
    needs = [_memory_cells(row["name"], row["memory"]) for row in rows if row["memory"]]
    if needs:
        output.table(needs, {"name": "stage", "policy": "kept for backward", "peak": "memory", "of": "of", "fits": "fits", "host": "host"})
    for reason in sorted({f"{row['name']}: {row['memory']['reason']}" for row in rows if row["memory"] and row["memory"]["fits"] is False}):
        output.note(reason)
    for name, source in {row["basis"]: row["speed"] for row in rows if row["basis"] in ("assumed", "calibrated")}.items():
        output.note(f"speed {source}" if name == "assumed" else f"speed calibrated: {source}")
    if finish := estimate.expected.wall_h:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 3600 * finish))
        output.note(f"started now and never waiting, it would end {when}; encoding, checkpoints and queueing come on top")


FITS = {True: "yes", False: "no", None: None}


def _fit(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    from opensora.memory import describe

    return {
        "policy": describe(fit.activations),
        "activations": fit.activations.model_dump(mode="json"),
        **_bytes(fit.memory),
        "device_bytes": fit.device_bytes,
        "fits": fit.fits,
        "reason": fit.reason,
    }


def _bytes(memory: Memory) -> dict[str, int]:
    return {f"{name}_bytes": size for name, size in asdict(memory).items()}


def _memory_cells(name: str, needs: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "policy": needs["policy"],
        "peak": output.gigabytes(needs["total_bytes"]),
        "of": output.gigabytes(needs["device_bytes"]),
        "fits": FITS[needs["fits"]],
        "host": output.gigabytes(needs["host_bytes"]),
    }


def show_size(found: SizePlan, output_: output.Format) -> None:
    """Memory by part under each policy, what fits, and what a step takes."""
    from opensora.memory import describe

    data, chosen = found.stage.data, found.chosen
    result = {
        "shape": [data.frames, data.height, data.width],
        "clip_tokens": found.clip_tokens,
        "frames": found.frames,
        "tokens": found.tokens,
        "device": found.device,
        "devices": found.devices,
        "device_bytes": found.device_bytes,
        "strategy": found.stage.parallel.strategy,
        "sequence": found.stage.parallel.sequence,
        "batch_size": found.stage.batch_size,
        "flops": found.flops,
        "mfu": found.mfu,
        "speed": found.source,
        "chosen": describe(chosen.activations) if chosen else None,
        "reason": found.reason,
        "step_s": found.step_s,
        "exchanged_bytes": found.exchanged,
        "state_exchanged_bytes": found.state_exchanged,
        "host_bytes": chosen.memory.host * found.devices if chosen else None,
    }
    if output_ is not output.Format.table:
        every = [
            {
                "policy": describe(option.activations),
                "activations": option.activations.model_dump(mode="json"),
                **_bytes(option.memory),
                "fits": option.fits,
                "step_s": option.step_s,
            }
            for option in found.options
        ]
        output.emit({**result, "options": every}, output_)
        return
    rows = [
        {
            "policy": describe(option.activations),
            **{part: output.gigabytes(size) for part, size in asdict(option.memory).items()},
            "fits": FITS[option.fits],
            "step": output.duration(option.step_s),
        }
        for option in found.options
    ]
    output.table(
        rows, {"policy": "kept for backward", **{part: part for part in asdict(found.options[0].memory)}, "fits": "fits", "step": "step"}
    )
    strategy, share = found.stage.parallel.strategy, found.stage.parallel.sequence
    output.note(
        f"{data.frames}x{data.height}x{data.width}: {found.clip_tokens:,} tokens a clip ({found.frames:,} x {found.tokens:,}), "
        f"{found.flops:.2e} FLOPs a step on {found.devices} x {found.device}, {strategy}, {share} of them share a clip"
    )
    output.note(found.reason)
    output.note(f"speed: {100 * found.mfu:.3g}% of the peak before recomputation, {found.source}")
    if chosen is not None:
        output.note(
            f"a step takes {output.duration(found.step_s)}; each device sends {output.gigabytes(found.exchanged)} to those that it shares "
            f"a clip with and {output.gigabytes(found.state_exchanged)} of weights and gradients; the hosts hold "
            f"{output.gigabytes(chosen.memory.host * found.devices)}"
        )
    output.note("memory and speed on GPUs are derived from the code, not measured")


def _figures(one: Plan | Row) -> dict[str, Any]:
    return {
        "device_hours": one.expected.device_hours,
        "gpu_hours": one.expected.gpu_hours,
        "wall_h": one.expected.wall_h,
        "usd": one.expected.usd,
        "usd_low": one.low.usd,
        "usd_high": one.high.usd,
    }


def _plan_cells(row: dict[str, Any]) -> dict[str, Any]:
    mfu = row.get("mfu")
    return {
        **row,
        "work": f"{row['flops']:.1e}" if "flops" in row else None,
        "on": f"{row['devices']} x {row['device']}" if "devices" in row else None,
        "speed": f"{100 * mfu:.3g}% {row['basis']}" if mfu else row.get("basis"),
        "hours": output.hours(row["device_hours"]),
        "gpu": output.hours(row["gpu_hours"]),
        "wall": output.duration(3600 * row["wall_h"]),
        "cost": output.dollars(row["usd"]),
        "range": f"{output.dollars(row['usd_low'])}–{output.dollars(row['usd_high'])}",
        "published_cost": output.dollars(row["published_usd"]) if row["published_usd"] is not None else None,
        "share": f"{row['ratio']:.2f}" if row["ratio"] else None,
    }


def explain(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIELD]", help="Dotted field, e.g. stages.resources, stage.optimizer.lr, cluster.shm. Default: all of a pipeline."
        ),
    ] = None,
    schema: Annotated[
        str | None, typer.Option("--schema", metavar="pipeline|stage|cluster", help="Print the JSON Schema for editors instead.")
    ] = None,
    output_: options.Output = output.Format.table,
) -> None:
    """Explain a field of pipeline, stage and cluster files.

    Examples: osctl explain stage.optimizer          osctl explain --schema stage > stage.schema.json
    """
    import json

    from orchestrator import explain as schema_

    if schema is not None:
        if schema not in ("pipeline", "stage", "cluster"):
            raise typer.BadParameter(f"{schema} is none of pipeline, stage, cluster", param_hint="--schema")
        output.raw(json.dumps(schema_.json_schema(schema), indent=2) + "\n")
        return
    explanation = schema_.explain(path or "pipeline")
    rows = [
        {"name": field.path, "type": field.type, "unit": field.unit, "default": field.default, "meaning": field.doc}
        for field in explanation.fields
    ]
    subject = explanation.subject
    if output_ is output.Format.table:
        unit = f" [{subject.unit}]" if subject.unit else ""
        output.raw(f"{subject.path}: {subject.type}{unit}, default {subject.default}\n{subject.doc}\n\n")
    if rows or output_ is not output.Format.table:
        output.emit(rows or [vars(subject)], output_)
