"""How a snapshot looks: the stage tree of `status`, `watch` and `launch`, and the table that puts stages side by side."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from orchestrator.cli import output

if TYPE_CHECKING:
    from orchestrator.cli.workspace import Workspace
    from orchestrator.cost import Prices
    from orchestrator.snapshot import Snapshot, StageStatus

MARK = {"committed": "✔", "running": "●", "failed": "✘", "ready": "○", "blocked": "·"}
COLOUR = {"committed": "green", "running": "cyan", "failed": "red", "ready": "yellow", "blocked": "dim"}


def tree(snapshot: Snapshot) -> Any:
    """A rich table: one line a stage with a bar, its attempts below where there is more than one."""
    import rich.box
    import rich.progress_bar
    import rich.table
    import rich.text

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("stage", "", "step", "loss", "ETA", "time", "cost", ""):
        grid.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for stage in snapshot.stages:
        colour = COLOUR.get(stage.state, "white")
        bar = rich.progress_bar.ProgressBar(total=max(stage.steps, 1), completed=stage.step, width=20)
        grid.add_row(
            rich.text.Text(f"{MARK.get(stage.state, '?')} {stage.name}", style=colour),
            bar,
            f"{stage.step}/{stage.steps}",
            output.cell(stage.loss),
            output.duration(stage.eta_s) if stage.state == "running" else "",
            output.duration(stage.wall_s) if stage.attempts else "",
            output.dollars(stage.bill.usd) if stage.attempts else "",
            rich.text.Text(describe(stage), style="dim"),
        )
        for attempt in stage.attempts[:-1] if len(stage.attempts) > 1 else ():
            number, reason = f"  ↳ a{attempt.number}", f"{attempt.state}: {attempt.reason}" if attempt.reason else attempt.state
            cells = (number, "", output.cell(attempt.step), "", "", "", output.dollars(attempt.usd), reason)
            grid.add_row(*(rich.text.Text(text, style="dim") for text in cells))
    return grid


def describe(stage: StageStatus) -> str:
    """The last column: what it is doing or why it is not."""
    if stage.state == "committed":
        return ", ".join(readings(stage.evaluation)) or "committed"
    if stage.state == "running" and stage.attempts:
        attempt = stage.attempts[-1]
        doing = "evaluating" if stage.step >= stage.steps else attempt.state
        return f"attempt {attempt.number}, {doing}" if attempt.number > 1 or doing != "running" else "running"
    return stage.why or stage.state


def readings(evaluation: dict[str, float]) -> list[str]:
    return [
        f"{name} {output.percent(evaluation[key])}"
        for name, key in (("digit", "digit_accuracy"), ("direction", "direction_accuracy"))
        if key in evaluation
    ]


def rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """What json and yaml print of a snapshot."""
    return [
        {
            "name": stage.name,
            "state": stage.state,
            "step": stage.step,
            "steps": stage.steps,
            "loss": stage.loss,
            "eta_s": stage.eta_s,
            "attempts": [
                {
                    "attempt": a.number,
                    "state": a.state,
                    "step": a.step,
                    "reason": a.reason,
                    "bound": a.bound,
                    "ended": a.ended,
                    "usd": a.usd,
                }
                for a in stage.attempts
            ],
            "device_hours": stage.bill.device_hours,
            "gpu_hours": stage.bill.gpu_hours,
            "usd": stage.bill.usd,
            "inputs": stage.inputs,
            "why": describe(stage),
        }
        for stage in snapshot.stages
    ]


def comparison(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Stages side by side, with every figure a number."""
    lines = []
    for stage in snapshot.stages:
        bill, published = stage.bill, stage.published_gpu_hours
        lines.append(
            {
                "name": stage.name,
                "state": stage.state,
                "steps": stage.step,
                "loss": stage.loss,
                "attempts": len(stage.attempts),
                "wall_s": stage.wall_s,
                "device_hours": bill.device_hours,
                "gpu_hours": bill.gpu_hours,
                "usd": bill.usd,
                "goodput": bill.goodput,
                "device_seconds": bill.seconds,
                "published_gpu_hours": published,
                "ratio_vs_published": bill.gpu_hours / published if published and bill.gpu_hours else None,
                "weights_digest": stage.committed.weights_digest if stage.committed else None,
                "evaluation": stage.evaluation,
            }
        )
    return lines


def comparison_cells(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The same for people: rows and columns of a table. A reading stands with its 95% interval; columns that say nothing are left out."""
    shown = []
    for line in lines:
        evaluation = line["evaluation"]
        shown.append(
            {
                **line,
                "loss": f"{line['loss']:.4f}" if line["loss"] is not None else None,
                "image": interval(evaluation, "image_digit"),
                "digit": interval(evaluation, "digit"),
                "direction": interval(evaluation, "direction"),
                "held": output.duration(line["wall_s"]),
                "device_hours": output.hours(line["device_hours"]),
                "gpu_hours": output.hours(line["gpu_hours"]),
                "usd": output.dollars(line["usd"]),
                "goodput": output.percent(line["goodput"]),
                "published": line["published_gpu_hours"],
                "ratio": line["ratio_vs_published"],
            }
        )
    best: dict[str, float] = next((line["evaluation"] for line in reversed(lines) if line["evaluation"]), {})
    columns = {
        "name": "stage",
        "steps": "steps",
        "loss": "loss",
        "image": "image digit" + bounds(best, "image_digit"),
        "digit": "clip digit" + bounds(best, "digit"),
        "direction": "clip direction" + bounds(best, "direction"),
        "held": "time",
        "device_hours": "device-hours",
        "gpu_hours": "GPU-hours",
        "usd": "cost",
        "goodput": "goodput",
        "published": "published GPU-h",
        "ratio": "ratio",
    }
    optional = ("image", "digit", "direction", "published", "ratio")
    return shown, {key: heading for key, heading in columns.items() if key not in optional or any(row[key] is not None for row in shown)}


def interval(evaluation: dict[str, float], name: str) -> str | None:
    if f"{name}_accuracy" not in evaluation:
        return None
    low, high = evaluation.get(f"{name}_low"), evaluation.get(f"{name}_high")
    reading = output.percent(evaluation[f"{name}_accuracy"])
    return f"{reading} [{100 * low:.0f}–{100 * high:.0f}]" if low is not None and high is not None else reading


def bounds(evaluation: dict[str, float], name: str) -> str:
    chance, ceiling = evaluation.get(f"{name}_chance"), evaluation.get(f"{name}_ceiling")
    if chance is None or ceiling is None:
        return ""
    return f"\nchance {100 * chance:.0f}%, ceiling {100 * ceiling:.0f}%"


class Follower:
    """Shows a launch while it runs: a live tree on a terminal, a line whenever something moved elsewhere. A thread that only reads."""

    def __init__(self, workspace: Workspace, prices: Prices, interval_s: float = 1.0):
        from orchestrator.ledger import Ledger

        self.workspace, self.prices, self.interval_s = workspace, prices, interval_s
        self.ledger = Ledger(workspace.store, workspace.pipeline.name)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Follower:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(timeout=5)

    def _run(self) -> None:
        import rich.live

        from orchestrator import snapshot
        from orchestrator.errors import OsctlError

        screen = output.console(err=True)
        live = rich.live.Live(console=screen, transient=True, auto_refresh=False) if screen.is_terminal else None
        said: dict[str, str] = {}
        if live:
            live.start()
        while not self.stop.wait(self.interval_s):
            try:
                current = snapshot.take(self.workspace.pipeline, self.ledger, self.prices, time.time())
            except OsctlError as error:  # the display is no reason to stop a run; the runner has its own word on a store that is gone
                said.setdefault("store", str(error))
                continue
            if live:
                live.update(tree(current), refresh=True)
            else:
                self._say(current, said)
        if live:
            live.stop()

    @staticmethod
    def _say(current: Snapshot, said: dict[str, str]) -> None:
        for stage in current.stages:
            tenth = 10 * stage.step // max(stage.steps, 1)
            key = f"{stage.state} {tenth if stage.state == 'running' else ''} {stage.why}"
            if stage.attempts and said.get(stage.name) != key:
                said[stage.name] = key
                loss = f" loss {stage.loss:.4f}" if stage.loss is not None else ""
                eta = f" ETA {output.duration(stage.eta_s)}" if stage.state == "running" and stage.eta_s is not None else ""
                output.note(f"{stage.name}: {describe(stage)}, step {stage.step}/{stage.steps}{loss}{eta} {output.dollars(stage.bill.usd)}")
