"""How a preparation looks: a table that moves on a terminal, plain lines elsewhere; its state, once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opensora.printable import several
from orchestrator.cli import output
from orchestrator.cli.prepare_plan import money

if TYPE_CHECKING:
    from orchestrator.prepare.bill import Bill
    from orchestrator.prepare.watching import State

PLAIN_S = 10.0
"""Between two plain lines."""
REASONS = 3
COLUMNS = {
    "name": "step", "in": "in", "kept": "kept", "dropped": "dropped", "quarantined": "put aside", "speed": "rate", "left": "left",
    "cpu": "CPU", "why": "why",
}  # fmt: skip


class Progress:
    """Shows status.json while a preparation runs: on a terminal in place, elsewhere a line now and then and at each new step."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self._name, self._quiet = name, quiet
        self._live: Any = None
        self._next, self._step, self._shown = 0.0, "", ""

    def __enter__(self) -> Progress:
        console = output.console(err=True)
        if not self._quiet and console.is_terminal:
            from rich.live import Live

            self._live = Live(console=console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, status: Mapping[str, Any]) -> None:
        if self._quiet or not status:
            return
        if self._live is not None:
            self._live.update(_table(self._name, status))
            return
        now, step = time.monotonic(), str(status.get("step", ""))
        if now >= self._next or step != self._step:
            self._next, self._step = now + PLAIN_S, step
            line = summary(self._name, status)
            if line != self._shown:
                self._shown = line
                output.note(line)


def summary(name: str, status: Mapping[str, Any]) -> str:
    """One line: `mine: clips 120 of 400 at 3.1/s, 4 put aside, 1 m 30 s left`."""
    from orchestrator.prepare.watching import steps_of

    rows = {row["name"]: row for row in steps_of(status)}
    row = rows.get(str(status.get("step", ""))) or (next(reversed(rows.values())) if rows else None)
    if row is None:
        return f"{name}: begins"
    done = row["kept"] + row["dropped"] + row["quarantined"]
    parts = [f"{row['name']} {done:,} of {row['in']:,}" + (f" at {row['rate']:.3g}/s" if row["rate"] else "")]
    parts += [f"{row['dropped']:,} dropped"] if row["dropped"] else []
    parts += [f"{row['quarantined']:,} put aside"] if row["quarantined"] else []
    eta = status.get("eta_s")
    parts += [f"{output.duration(float(eta))} left"] if isinstance(eta, int | float) else []
    usd = status.get("usd")
    parts += [f"captions {output.dollars(float(usd))}"] if isinstance(usd, int | float) and usd else []
    return f"{name}: {', '.join(parts)}"


def cells(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a step, for a table."""
    from orchestrator.prepare.watching import steps_of

    rows = []
    for row in steps_of(status):
        reasons = sorted(
            [(count, reason) for kind in ("dropped", "quarantined") for reason, count in row["reasons"][kind].items()], reverse=True
        )
        why = [f"{reason}: {count:,}" for count, reason in reasons[:REASONS]]
        why += [f"{len(reasons) - REASONS} more"] if len(reasons) > REASONS else []
        rows.append(
            row
            | {
                "speed": f"{row['rate']:.3g}/s" if row["rate"] else None,
                "left": output.duration(row["eta_s"]) if isinstance(row["eta_s"], int | float) else None,
                "cpu": output.duration(row["cpu_s"]) if isinstance(row["cpu_s"], int | float) else None,
                "why": "; ".join(why),
            }
        )
    return rows


def whole(state: State) -> dict[str, Any]:
    """What json and yaml print."""
    from orchestrator.prepare.watching import steps_of

    known = state.data_set
    return {
        "name": state.name,
        "state": state.word,
        "reason": state.reason,
        "holder": state.holder.holder if state.holder is not None else None,
        "steps": steps_of(state.status),
        "eta_s": state.status.get("eta_s"),
        "tokens_in": state.status.get("tokens_in", 0),
        "tokens_out": state.status.get("tokens_out", 0),
        "usd": state.bill.usd,
        **bill_of(state.bill),
        "idle": idle(state) or None,
        "attempts": [_attempt(one) for one in state.attempts],
        "place": known.source if known is not None else None,
        "digest": known.prepared if known is not None else None,
        "clips": known.rows if known is not None else None,
        "hours": known.seconds / 3600 if known is not None else None,
    }


def _attempt(one: Any) -> dict[str, Any]:
    from orchestrator.prepare.bill import bill

    outcome = one.outcome
    return {
        "number": one.number,
        "state": "running" if outcome is None else outcome.class_,
        "reason": outcome.reason if outcome is not None else "",
        "device_seconds": outcome.device_seconds if outcome is not None else None,
        "gpu_seconds": outcome.gpu_seconds if outcome is not None else None,
        "usd": bill([one]).usd,
        "pods": [
            {**pod.model_dump(mode="json", exclude={"schema_"}), "core_seconds": pod.core_seconds, "gpu_seconds": pod.gpu_seconds}
            for pod in one.pods
        ],
    }


def bill_of(bill: Bill) -> dict[str, Any]:
    """What json and yaml print of it."""
    return {
        "core_hours": bill.core_hours, "gpu_hours": bill.gpu_hours, "captions_usd": bill.captions_usd, "not_priced": bill.not_priced,
        "bill": [
            {
                "name": line.step, "device": line.device, "device_name": line.name, "is_gpu": line.is_gpu,
                "device_hours": line.seconds / 3600, "usd": line.usd,
            }
            for line in bill.sorted()
        ],
    }  # fmt: skip


def show_bill(bill: Bill) -> None:
    """A row a step and device, for people."""
    rows = []
    for line in bill.sorted():
        hours = output.hours(line.seconds / 3600)
        device = line.device if line.name in ("cpu", line.device) else f"{line.device} ({line.name})"
        hours_of = {"core_hours": None, "gpu_hours": hours} if line.is_gpu else {"core_hours": hours, "gpu_hours": None}
        rows.append({"step": line.step, "device": device, **hours_of, "cost": money(line.usd)})
    if bill.captions_usd:
        rows.append({"step": "caption", "device": "captions' server", "cost": money(bill.captions_usd)})
    if rows:
        columns = {"step": "step", "device": "device", "core_hours": "core-hours", "gpu_hours": "GPU-hours", "cost": "cost"}
        output.table(rows, columns)


def idle(state: State) -> str:
    """How busy the pods of the last attempt are, or were; empty: it had none."""
    pods = state.attempts[-1].pods if state.attempts else ()
    held = sum(pod.core_seconds for pod in pods)
    if not held:
        return ""
    steps = state.status.get("steps")
    numbers = [one.get("cpu_s") for one in steps.values() if isinstance(one, dict)] if isinstance(steps, dict) else []
    busy = sum(float(one) for one in [*numbers, state.status.get("engine_cpu_s")] if isinstance(one, int | float))
    share = f"{max(0.0, 1 - busy / held):.0%}"
    return (
        f"attempt {state.attempts[-1].number} held {several(len(pods), 'pod')} for {held:,.0f} core-seconds: {busy:,.0f} busy, {share} idle"
    )


def show(state: State) -> None:
    """For people."""
    rows = cells(state.status)
    if rows:
        output.table(rows, COLUMNS)
    about = f"{state.name}: {state.word}" + (f", {state.reason}" if state.reason else "")
    show_bill(state.bill)
    bill = state.bill
    hours = f"{output.hours(bill.core_hours)} core-hours, " + (f"{output.hours(bill.gpu_hours)} GPU-hours, " if bill.gpu_hours else "")
    output.note(f"{about}; {several(len(state.attempts), 'attempt')}, {hours}{money(bill.usd, bill.not_priced)}")
    if told := idle(state):
        output.note(f"{state.name}: {told}")
    if state.holder is not None:
        output.note(f"{summary(state.name, state.status)}; prepared by {state.holder.holder}")
    known = state.data_set
    if known is not None:
        licences = f", {', '.join(known.licences)}" if known.licences else ""
        output.note(
            f"{several(known.rows, 'clip')}, {output.duration(known.seconds)}, {output.gigabytes(known.size)}{licences} at {known.source}"
        )


def _table(name: str, status: Mapping[str, Any]) -> Any:
    import rich.box
    import rich.console
    import rich.table

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in COLUMNS.values():
        grid.add_column(heading, justify="left" if heading in ("step", "why") else "right")
    for row in cells(status):
        style = "cyan" if row["name"] == status.get("step") else ""
        grid.add_row(*(output.styled(output.cell(row.get(key)), style=style) for key in COLUMNS))
    return rich.console.Group(grid, output.styled(summary(name, status), style="dim"))


def show_why(found: dict[str, Any]) -> None:
    """For people."""
    from opensora.printable import one_line

    verdict = f"left at {found['step']}: {found['verdict']}" if found["step"] else found["verdict"]
    output.raw(output.cell(f"{found['kind']} {found['name']}: {verdict}") + "\n")
    lines = [name for name in ("detail", "source", "uri", "licence", "caption", "caption_by", "file") if found.get(name)]
    for name in lines:
        output.note(one_line(f"{name}: {found[name]}", 4000))
    if "columns" in found:
        output.table([{"column": name, "value": value} for name, value in found["columns"].items()], {"column": "column", "value": "value"})
    if found.get("clips"):
        columns = {"id": "clip", "start_s": "from s", "end_s": "to s", "step": "step", "verdict": "verdict", "detail": "detail"}
        output.table(found["clips"], columns)
