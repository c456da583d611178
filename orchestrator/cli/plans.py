"""How a plan looks: per stage hours, dollars and memory, from optimistic to pessimistic. Shared by `plan` and `launch`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.cli import output

if TYPE_CHECKING:
    from opensora.planning.memory import Memory
    from orchestrator.accounting.plan import Fit, Plan, Row
    from orchestrator.accounting.size_plan import SizePlan


FITS = {True: "yes", False: "no", None: None}


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
            "pool": row.offers[0][0] if row.offers else None,
            "pools": [{"pool": pool, "usd_per_hour": usd} for pool, usd in row.offers],
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
    columns |= {"pool": "pool"} if any(row["pool"] for row in rows) else {}
    columns |= {"wall": "wall", "cost": "cost", "range": "range"}
    if estimate.published_gpu_hours:
        columns |= {"published_gpu_hours": "published GPU-h", "published_cost": "published", "share": "ratio"}
    output.table([_plan_cells(row) for row in [*rows, total]], columns)
    for row in rows:
        if row["pools"]:
            paid = ", ".join(f"{offer['pool']} ${offer['usd_per_hour']}" for offer in row["pools"])
            output.note(f"{row['name']}: cost in pool {row['pool']}, range over all: {paid} a device-hour")
    needs = [_memory_cells(row["name"], row["memory"]) for row in rows if row["memory"]]
    if needs:
        output.table(needs, {"name": "stage", "policy": "kept for backward", "peak": "memory", "of": "of", "fits": "fits", "host": "host"})
    for reason in sorted({f"{row['name']}: {row['memory']['reason']}" for row in rows if row["memory"] and row["memory"]["fits"] is False}):
        output.note(reason)
    for name, source in {row["basis"]: row["speed"] for row in rows if row["basis"] in ("assumed", "calibrated")}.items():
        output.note(f"speed {source}" if name == "assumed" else f"speed calibrated: {source}")
    if finish := estimate.expected.wall_h:
        output.note(f"started now and never waiting, it would end {_after(3600 * finish)}; encoding, checkpoints and queueing come on top")


def _after(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    except (OverflowError, ValueError, OSError):
        return "after the last day of every calendar"


def _fit(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    from opensora.planning.memory import describe

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
    from opensora.planning.memory import describe

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
