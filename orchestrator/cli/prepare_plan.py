"""How the plan of a preparation looks. Shared by `osctl prepare plan` and `osctl prepare run --dry-run`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.printable import several
from orchestrator.cli import output

if TYPE_CHECKING:
    from opensora.config import StageConfig
    from opensora.dataset.prepare_config import PrepareConfig
    from orchestrator.pipelines.host import Host
    from orchestrator.prepare.balance import Balance

NOT_PRICED = "not priced"
COUNT_S = 3.0
"""Seconds that a plan counts files for at most: it is an estimate."""
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})@(\d{1,3}(?:\.\d+)?)")
VIDEOS = frozenset(
    {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mts", ".m2ts", ".ts", ".flv", ".wmv", ".mpg", ".mpeg", ".3gp", ".ogv"}
)


@dataclass(frozen=True)
class Asked:
    clips: int | None = None
    hours: float | None = None
    size: str = "1280x720@25"
    caption_gpu_s: float | None = None
    network: float | None = None
    gpus: int = 8
    prices: Path | None = None
    pod_cores: int = 16
    """Of a CPU pod."""
    gpu: str = "h800"
    """Its name in the price list."""


def show(config: PrepareConfig, asked: Asked, host: Host, output_: output.Format) -> None:
    """Raises UsageError."""
    from orchestrator.prepare import plan as planning
    from orchestrator.prepare.checks import check_rules
    from orchestrator.prepare.own_rates import measured
    from orchestrator.prepare.run import cores
    from orchestrator.recipe.prices import load_prices, named_prices

    check_rules(config)
    prices = load_prices(asked.prices) if asked.prices is not None else named_prices(host.env)
    seen, whole = counted(config)
    what = planning.amount(config, clips=asked.clips, hours=asked.hours, size=_size(asked.size), seen=seen)
    own = measured(host.home / "prepare")
    rows = planning.plan(
        config, what, prices, workers=config.workers or cores(), gpus=asked.gpus, stages=_stages(config, host), own=own,
        caption_gpu_s=asked.caption_gpu_s, network_mbit_s=asked.network, gpu=asked.gpu,
    )  # fmt: skip
    core_h, gpu_h, usd, size = planning.total(rows)
    pods = _streams(config, rows, what, asked)
    no_price = planning.not_priced(rows)
    if output_ is not output.Format.table:
        about = {"clips": what.clips, "hours": what.raw_s / 3600, "videos": what.videos, "raw_bytes": what.raw_bytes}
        content = [_content(row) for row in rows]
        total = {"core_hours": core_h, "gpu_hours": gpu_h, "usd": usd, "not_priced": no_price, "bytes": size}
        assumed = [vars(one) for one in what.assumed]
        balance = vars(pods) if pods is not None else None
        output.emit({"name": config.name, **about, "steps": content, "total": total, "balance": balance, "assumed": assumed}, output_)
        return
    cells = [_cells(row) for row in rows]
    cells.append(
        {
            "step": "total", "core_hours": output.hours(core_h), "gpu_hours": output.hours(gpu_h), "cost": money(usd, no_price),
            "size": output.gigabytes(size),
        }
    )  # fmt: skip
    columns = {"step": "step", "work": "work", "speed": "rate", "basis": "basis", "device": "device"}
    columns |= {"core_hours": "core-hours", "gpu_hours": "GPU-hours", "wall": "wall", "cost": "cost"}
    columns |= {"size": "bytes", "own": "yours, hours", "own_cost": "yours, cost"}
    output.table(cells, columns)
    _say_sources(config, rows, what, own, seen, whole)
    if pods is not None:
        _say_balance(pods)


def _streams(config: PrepareConfig, rows: Any, what: Any, asked: Asked) -> Balance | None:
    """A server captions what is cut already: no row streams to it."""
    from orchestrator.prepare.balance import balance

    if config.caption.kind != "llava":
        return None
    return balance(rows, clips=what.clips, gpus=asked.gpus, pod_cores=asked.pod_cores)


def _say_balance(pods: Balance) -> None:
    from orchestrator.prepare.rates import SUPPLY

    output.note(
        f"on --engine ray {several(pods.cpu_pods, 'CPU pod')} of {several(pods.pod_cores, 'core')} for {several(pods.gpu_pods, 'GPU pod')} "
        f"keeps the GPUs busy: {pods.cores_a_gpu:.2g} cores a GPU ({pods.core_s:.3g} CPU-s against {pods.gpu_s:.3g} GPU-s a clip, "
        f"times {pods.supply:g}; {SUPPLY.basis}, {SUPPLY.source}, {SUPPLY.date})"
    )


def money(usd: Decimal | None, no_price: Sequence[str] = ()) -> str:
    """Dollars, and what is not in them."""
    if usd is None or (not usd and no_price):
        return NOT_PRICED
    return " + ".join([output.dollars(usd), *(f"{name} {NOT_PRICED}" for name in no_price)])


def counted(config: PrepareConfig) -> tuple[tuple[int, int], bool]:
    """(videos, bytes) where the local sources are, and whether all were counted. Addresses and lists are not looked at."""
    videos = size = 0
    until = time.monotonic() + COUNT_S
    for given in config.sources:
        if "://" in given.path or given.index is not None:
            continue
        place = Path(given.path)
        found = [(str(place.parent), (), [place.name])] if place.is_file() else os.walk(place)
        for folder, _, names in found:
            if time.monotonic() > until:
                return (videos, size), False
            for name in names:
                if os.path.splitext(name)[1].lower() in VIDEOS:  # noqa: PTH122 - of each of a million names
                    try:
                        videos, size = videos + 1, size + os.stat(os.path.join(folder, name)).st_size  # noqa: PTH116, PTH118
                    except OSError:
                        continue
    return (videos, size), True


def _stages(config: PrepareConfig, host: Host) -> dict[str, StageConfig]:
    if config.encode is None:
        return {}
    from orchestrator.pipelines.workspace import Workspace

    return {stage.name: stage.config for stage in Workspace.open(config.encode, host=host).pipeline.stages}


def _size(text: str) -> tuple[int, int, float]:
    """Raises UsageError."""
    from orchestrator.errors import UsageError

    found = SIZE.fullmatch(text)
    if found is None or not int(found[1]) * int(found[2]) * float(found[3]):
        raise UsageError(f"--size {text[:40]}: is not width x height @ frames a second. Example: --size 1920x1080@30")
    return int(found[1]), int(found[2]), float(found[3])


def _content(row: Any) -> dict[str, Any]:
    rate = row.rate
    return {
        "name": row.step, "work": row.work, "rate": rate.value if rate else None, "unit": rate.unit if rate else None,
        "basis": rate.basis if rate else None, "source": rate.source if rate else None, "date": rate.date if rate else None,
        "device": row.device, "device_hours": row.device_hours, "wall_hours": row.wall_h, "usd": row.usd, "bytes": row.bytes,
        "in_total": row.counts, "own_device_hours": row.own_hours, "own_usd": row.own_usd,
    }  # fmt: skip


def _cells(row: Any) -> dict[str, Any]:
    rate = row.rate
    hours = output.hours(row.device_hours) if row.device_hours else None
    return {
        "step": row.step, "work": row.work, "speed": f"{rate.value:.3g} {rate.unit}" if rate else None,
        "basis": rate.basis if rate else None,
        "device": row.device if row.device_hours else None, "core_hours": None if row.on_gpu else hours,
        "gpu_hours": hours if row.on_gpu else None,
        "wall": output.duration(3600 * row.wall_h) if row.wall_h else None, "cost": money(row.usd) if row.usd is None or row.usd else None,
        "size": output.gigabytes(row.bytes) if row.bytes else None,
        "own": output.hours(row.own_hours) if row.own_hours is not None else None,
        "own_cost": output.dollars(row.own_usd) if row.own_usd is not None else None,
    }  # fmt: skip


def _say_sources(config: PrepareConfig, rows: Any, what: Any, own: Any, seen: tuple[int, int], whole: bool) -> None:
    from orchestrator.prepare.plan import hours_of

    about = f"{several(round(what.clips), 'clip')} of {what.clip_s:g} s, {hours_of(what.raw_s).replace(' of ', ' of raw ')}"
    output.note(f"{config.name}: {about}" + (f"; {several(seen[0], 'video')}, {output.gigabytes(seen[1])} are here" if seen[0] else ""))
    if not whole:
        output.note(f"more videos are there than were counted in {COUNT_S:g} s; say how many hours: --hours")
    for rate in what.assumed:
        output.note(f"{rate.basis}: {rate.value:g} {rate.unit} ({rate.source})")
    said = [f"{row.step}: {row.rate.basis}, {row.rate.source}, {row.rate.date}".rstrip(", ") for row in rows if row.rate is not None]
    for line in dict.fromkeys(said):
        output.note(line)
    output.note("devices at the prices of the list (osctl explain prices); of one without a price the hours alone are known")
    output.note(
        f"yours: measured in {own.runs} run{'' if own.runs == 1 else 's'} on this machine"
        if own.runs
        else "yours: nothing was measured on this machine yet"
    )
