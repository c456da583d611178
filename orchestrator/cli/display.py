"""How a snapshot looks: the stage tree of `status`, `watch` and `launch`, and the table that puts stages side by side."""

from __future__ import annotations

import threading
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from orchestrator.cli import output

if TYPE_CHECKING:
    from orchestrator.cli.live import Live, Sight
    from orchestrator.cli.workspace import Workspace
    from orchestrator.snapshot import Snapshot, StageStatus

PODS = 32
"""Lines of pods in a table. Arbitrary: what a screen holds beside the stages."""
BURST_S = 0.05
"""Pods of a gang move together: what moves within this is drawn as one."""
MARK = {"committed": "✔", "running": "●", "failed": "✘", "ready": "○", "blocked": "·"}
COLOUR = {"committed": "green", "running": "cyan", "failed": "red", "ready": "yellow", "blocked": "dim"}


def tree(snapshot: Snapshot, sight: Sight | None = None, trouble: str = "") -> Any:
    """Rich tables: one line a stage with a bar, its attempts below where there is more than one; then pods, and why it waits."""
    import rich.console
    import rich.text

    parts = [_stages(snapshot, sight)]
    if sight is not None and sight.pods:
        parts.append(_pods(sight))
    if sight is not None:
        parts += _waits(sight)
    if trouble:
        parts.append(rich.text.Text(trouble, style="red"))
    return rich.console.Group(*parts)


def _pods(sight: Sight) -> Any:
    """Every pod that is not just running, and of those that are as many as fit a screen."""
    import rich.box
    import rich.table
    import rich.text

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("pod", "of", "node", "on", "phase"):
        grid.add_column(heading, justify="right" if heading == "node" else "left")
    grid.add_column("why", max_width=60, no_wrap=True, overflow="ellipsis")  # in full below, where it is what is waited for
    odd = [pod for pod in sight.pods if pod.phase != "Running" or pod.reason]
    calm = [pod for pod in sight.pods if pod not in odd]
    shown = sorted([*odd, *calm[: max(0, PODS - len(odd))]], key=sight.pods.index)
    for pod in shown:
        colour = {"Running": "cyan", "Succeeded": "green", "Failed": "red", "Pending": "yellow"}.get(pod.phase, "dim")
        cells = (pod.name, f"{pod.stage} a{pod.attempt}", str(pod.node), pod.host or "·", pod.phase, pod.reason)
        grid.add_row(*(rich.text.Text(cell, style=colour if cell is pod.phase else "") for cell in cells))
    if len(shown) < len(sight.pods):
        grid.add_row(rich.text.Text(f"… and {len(sight.pods) - len(shown)} more, running", style="dim"))
    return grid


def _waits(sight: Sight) -> list[Any]:
    import rich.text

    return [rich.text.Text(line, style="yellow") for line in waiting_lines(sight)]


def waiting_lines(sight: Sight) -> list[str]:
    """Why it waits, for people, and where that is known from."""
    lines = []
    for one in sight.waits:
        about = "" if one.stage is None else f"{one.stage} attempt {one.attempt} " if one.stage != "driver" else f"driver {one.attempt} "
        since = f" (for {output.duration(max(0.0, time.time() - one.since))})" if one.since is not None and one.source == "cluster" else ""
        if one.source == "driver" and one.since is not None:
            lines.append(f"{output.duration(max(0.0, time.time() - one.since))} ago its driver saw: {one.why}")
        else:
            kind = {"capacity": "waits for devices", "fault": "is held up"}.get(one.kind or "", "starts")
            lines.append(f"{about}{kind}{since}: {one.why}")
    return [*lines, *([sight.note] if sight.note else [])]


def _stages(snapshot: Snapshot, sight: Sight | None) -> Any:
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
            rich.text.Text("; ".join(filter(None, (describe(stage, sight), beside(stage)))), style="dim"),
        )
        for attempt in stage.attempts[:-1] if len(stage.attempts) > 1 else ():
            number, reason = f"  ↳ a{attempt.number}", f"{attempt.state}: {attempt.reason}" if attempt.reason else attempt.state
            cells = (number, "", output.cell(attempt.step), "", "", "", output.dollars(attempt.usd), reason)
            grid.add_row(*(rich.text.Text(text, style="dim") for text in cells))
    for one in snapshot.former:
        cells = (f"- {one.stage}", "", str(one.step), "", "", "", output.dollars(one.bill.usd), "no longer in the recipe")
        grid.add_row(*(rich.text.Text(text, style="dim") for text in cells))
    return grid


def describe(stage: StageStatus, sight: Sight | None = None) -> str:
    """The last column: what it is doing or why it is not."""
    if sight is not None and stage.state == "running" and stage.attempts[-1].state == "waiting":
        waits = any(one.stage == stage.name for one in sight.waits)
        doing = "waits" if waits else "is starting" if any(pod.stage == stage.name for pod in sight.pods) else "waiting"
        return f"attempt {stage.attempts[-1].number}, {doing}"
    if stage.state == "committed":
        said = stage.attempts[-1].reason if stage.attempts and stage.attempts[-1].state == "completed" else ""
        return ", ".join([*(readings(stage.evaluation) or ["committed"]), *([f"warning: {said}"] if said else [])])
    if stage.state == "running" and stage.attempts:
        attempt = stage.attempts[-1]
        doing = "evaluating" if stage.step >= stage.steps else attempt.state
        shown = f"attempt {attempt.number}, {doing}" if attempt.number > 1 or doing != "running" else "running"
        return f"{shown}: {attempt.reason}" if attempt.reason else shown
    return stage.why or stage.state


def of_earlier(snapshot: Snapshot) -> str:
    """Behind a total: how much of it was spent under inputs that are not the current ones."""
    from orchestrator.cost import merge

    return f", {output.dollars(merge(one.bill for one in snapshot.earlier).usd)} of it under earlier inputs" if snapshot.earlier else ""


def beside(stage: StageStatus) -> str:
    """What was done before and does not count now: steps that are being done again, and those under other inputs."""
    parts = []
    if stage.reached > stage.step:
        parts.append(f"steps up to {stage.reached} are to be done again")
    if stage.earlier:
        parts.append(f"{sum(one.step for one in stage.earlier)} steps under earlier inputs, {output.dollars(stage.earlier_bill.usd)}")
    return "; ".join(parts)


def readings(evaluation: dict[str, float]) -> list[str]:
    return [
        f"{name} {output.percent(evaluation[key])}"
        for name, key in (("digit", "digit_accuracy"), ("direction", "direction_accuracy"))
        if key in evaluation
    ]


def whole(snapshot: Snapshot, sight: Sight | None) -> dict[str, Any]:
    """What json and yaml print of a pipeline; with its pods and waits where it lives in a cluster."""
    about = {
        "name": snapshot.name,
        "state": snapshot.state,
        "driver": snapshot.driver,
        "usd": snapshot.usd,
        "stages": rows(snapshot, sight),
        "remarks": list(snapshot.remarks),
        "earlier": [
            {
                "stage": one.stage,
                "inputs": one.inputs,
                "attempts": one.attempts,
                "step": one.step,
                "committed": one.committed,
                "device_hours": one.bill.device_hours,
                "gpu_hours": one.bill.gpu_hours,
                "usd": one.bill.usd,
            }
            for one in snapshot.earlier
        ],
    }
    return about | (sight.rows() if sight is not None else {})


def rows(snapshot: Snapshot, sight: Sight | None = None) -> list[dict[str, Any]]:
    """What json and yaml print of a snapshot."""
    return [
        {
            "name": stage.name,
            "state": stage.state,
            "step": stage.step,
            "reached": stage.reached,
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
            "earlier_usd": stage.earlier_bill.usd,
            "inputs": stage.inputs,
            "why": next((one.why for one in (sight.waits if sight else ()) if one.stage == stage.name), "") or describe(stage, sight),
        }
        for stage in snapshot.stages
    ]


def comparison(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Stages side by side, with every figure a number."""
    from orchestrator.cost import merge

    lines: list[dict[str, Any]] = []
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
                "earlier_usd": stage.earlier_bill.usd,
                "goodput": bill.goodput,
                "device_seconds": bill.seconds,
                "published_gpu_hours": published,
                "ratio_vs_published": bill.gpu_hours / published if published and bill.gpu_hours else None,
                "weights_digest": stage.committed.weights_digest if stage.committed else None,
                "evaluation": stage.evaluation,
            }
        )
    for name in dict.fromkeys(one.stage for one in snapshot.former):
        spent = merge(one.bill for one in snapshot.former if one.stage == name)
        former = {"name": name, "state": "former", "steps": 0, "attempts": 0, "wall_s": 0.0, "device_hours": 0.0, "gpu_hours": 0.0}
        lines.append({**dict.fromkeys(lines[0]), **former, "usd": Decimal(0), "earlier_usd": spent.usd, "evaluation": {}})
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
                "earlier": output.dollars(line["earlier_usd"]) if line["earlier_usd"] else None,
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
        "earlier": "earlier inputs",
        "goodput": "goodput",
        "published": "published GPU-h",
        "ratio": "ratio",
    }
    optional = ("earlier", "image", "digit", "direction", "published", "ratio")
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
    """Shows a launch while it runs: a live tree on a terminal, a line whenever something moved elsewhere. Only reads.

    One thread reads the ledger every `interval_s`, another draws: what moves in a cluster is shown at once, however slow the store is.
    """

    def __init__(self, workspace: Workspace, interval_s: float = 1.0, format: output.Format = output.Format.table):
        """`format` json or yaml: the whole to stdout, whenever something changed."""
        from orchestrator.history import History
        from orchestrator.ledger import Ledger
        from orchestrator.prices import named_prices

        self.workspace, self.interval_s, self.format = workspace, interval_s, format
        self.history = History(
            Ledger(workspace.store, workspace.pipeline.name), named_prices, calm=True
        )  # a thread of its own reads with it
        self.over = threading.Event()
        """Set once nobody drives the pipeline, and nobody is about to."""
        self._current: Snapshot | None = None
        self._trouble = ""
        """Why the ledger is not read anew."""
        self._stopped, self._moved = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._read, self._run)]

    def __enter__(self) -> Follower:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._moved.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _read(self) -> None:
        from orchestrator import snapshot
        from orchestrator.errors import OsctlError

        while not self._stopped.is_set():
            try:
                self._current = snapshot.take(self.workspace.pipeline, self.history, time.time())
                self._trouble = ""
            except OsctlError as error:  # the display is no reason to stop a run; the runner has its own word on a store that is gone
                self._trouble = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, a display that stands still without a word is worse
                self._trouble = f"the ledger cannot be shown: {type(error).__name__}: {error}"
            self._moved.set()
            self._stopped.wait(self.interval_s)

    def _run(self) -> None:
        import contextlib

        from orchestrator.cli.live import Live

        screen = output.console(err=True)
        try:
            with contextlib.ExitStack() as opened:
                live = opened.enter_context(Live(self.workspace, self._moved.set)) if self.workspace.pipeline.cluster is not None else None
                picture = None
                if screen.is_terminal and self.format is output.Format.table:
                    import rich.live

                    picture = opened.enter_context(rich.live.Live(console=screen, transient=True, auto_refresh=False))
                self._draw(picture, live)
        finally:
            self.over.set()  # whoever waits for the end is not left waiting by a display that broke

    def _draw(self, picture: Any, live: Live | None) -> None:
        said: dict[str, str] = {}
        first = True
        while True:
            self._moved.wait()
            self._moved.clear()
            if self._stopped.is_set():
                return
            current = self._current
            if current is None:
                continue
            if picture and first:
                picture.update(tree(current), refresh=True)  # the ledger at once; a cluster may take its time
            first = False
            sight = live.look(current) if live is not None else None
            if picture:
                picture.update(tree(current, sight, self._trouble), refresh=True)
            elif self.format is output.Format.table:
                self._say(current, sight, said)
            elif said.get("all") != (now := repr(row := whole(current, sight))):
                said["all"] = now
                output.line(row, "", self.format)
            if current.state != "running" and (sight is None or sight.driver is None):
                self.over.set()
            if live is not None:
                self._stopped.wait(BURST_S)

    @staticmethod
    def _say(current: Snapshot, sight: Sight | None, said: dict[str, str]) -> None:
        for stage in current.stages:
            doing = describe(stage, sight)
            tenth = 10 * stage.step // max(stage.steps, 1)
            words = "".join(
                letter for letter in f"{stage.why} {doing}" if not letter.isdigit()
            )  # how many steps are at risk changes always
            key = f"{stage.state} {tenth if stage.state == 'running' else ''} {len(stage.attempts)} {words}"
            if stage.attempts and said.get(stage.name) != key:
                said[stage.name] = key
                loss = f" loss {stage.loss:.4f}" if stage.loss is not None else ""
                eta = f" ETA {output.duration(stage.eta_s)}" if stage.state == "running" and stage.eta_s is not None else ""
                output.note(f"{stage.name}: {doing}, step {stage.step}/{stage.steps}{loss}{eta} {output.dollars(stage.bill.usd)}")
        if sight is None:
            return
        for line, why in zip(waiting_lines(sight), [*(one.why for one in sight.waits), sight.note], strict=False):
            if why and said.get(f"why {why}") is None:
                said[f"why {why}"] = why
                output.note(line)
        for pod in sight.pods:
            if said.get(pod.name) != (now := f"{pod.phase} {pod.reason}".strip()):
                said[pod.name] = now
                output.note(f"{pod.name}: {now}{f' on {pod.host}' if pod.host and pod.phase == 'Running' else ''}")
