"""How a snapshot looks: the stage tree of `status`, `watch` and `launch`, and the table that puts stages side by side."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from opensora.printable import several
from orchestrator.cli import output
from orchestrator.cli.typed import expanded

if TYPE_CHECKING:
    from orchestrator.accounting.status import AttemptStatus, PreparationStatus, Snapshot, StageStatus
    from orchestrator.pipelines.cluster_view import ClusterView

PODS = 32
"""Lines of pods in a table. Arbitrary: what a screen holds beside the stages."""
MARK = {"committed": "✔", "prepared": "✔", "running": "●", "failed": "✘", "ready": "○", "stopped": "○", "asked": "○", "blocked": "·"}
COLOUR = {"committed": "green", "prepared": "green", "running": "cyan", "failed": "red", "blocked": "dim"}
COLOUR |= dict.fromkeys(("ready", "stopped", "asked"), "yellow")


def tree(snapshot: Snapshot, cluster_view: ClusterView | None = None, trouble: str = "") -> Any:
    """Rich tables: one line a stage with a bar, its attempts below where there is more than one; then pods, and why it waits."""
    import rich.console

    parts = [_stages(snapshot, cluster_view)]
    parts += [output.styled(line, style="yellow") for line in not_used(snapshot)]
    if cluster_view is not None and cluster_view.pods:
        parts.append(_pods(cluster_view))
    if cluster_view is not None:
        parts += _waits(cluster_view)
    if trouble:
        parts.append(output.styled(expanded(trouble), style="red"))
    return rich.console.Group(*parts)


def not_used(snapshot: Snapshot, told: Collection[tuple[str, str]] = ()) -> list[str]:
    """What of their data the stages leave out or cut, once where several say the same, and where the list of clips lies.

    Args:
        told: what has been said already, by stage.
    """
    stages: dict[str, list[StageStatus]] = {}
    for stage in snapshot.stages:
        for sentence in stage.not_used:
            if (stage.name, sentence) not in told:
                stages.setdefault(sentence, []).append(stage)
    lines = []
    for sentence, saying in stages.items():
        listing = saying[0].data.listing if saying[0].data is not None and "left out" in sentence else None
        place = f" (all of them: {snapshot.store}/{listing})" if listing else ""
        lines.append(f"{', '.join(stage.name for stage in saying)}: {expanded(sentence)}{place}")
    return lines


def say_not_used(snapshot: Snapshot, told: Collection[tuple[str, str]] = ()) -> None:
    """Say at the end of a launch what the stages did not use, and what went wrong beside the training. `told`: as for `not_used`."""
    for line in not_used(snapshot, told):
        output.note(line)
    for stage in snapshot.stages:
        if stage.warning and (stage.name, stage.warning) not in told:
            output.note(f"{stage.name}: warning: {stage.warning}")


def _pods(cluster_view: ClusterView) -> Any:
    """Every pod that is not just running, and of those that are as many as fit a screen."""
    import rich.box
    import rich.table

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("pod", "of", "node", "on", "phase"):
        grid.add_column(heading, justify="right" if heading == "node" else "left")
    grid.add_column("why", max_width=60, no_wrap=True, overflow="ellipsis")  # in full below, where it is what is waited for
    odd = [pod for pod in cluster_view.pods if pod.phase != "Running" or pod.reason]
    calm = [pod for pod in cluster_view.pods if pod not in odd]
    shown = sorted([*odd, *calm[: max(0, PODS - len(odd))]], key=cluster_view.pods.index)
    for pod in shown:
        colour = {"Running": "cyan", "Succeeded": "green", "Failed": "red", "Pending": "yellow"}.get(pod.phase, "dim")
        cells = (pod.name, f"{pod.stage} a{pod.attempt}", str(pod.node), pod.host or "·", pod.phase, pod.reason)
        grid.add_row(*(output.styled(cell, style=colour if cell is pod.phase else "") for cell in cells))
    if len(shown) < len(cluster_view.pods):
        grid.add_row(output.styled(f"… and {len(cluster_view.pods) - len(shown)} more, running", style="dim"))
    return grid


def _waits(cluster_view: ClusterView) -> list[Any]:
    return [output.styled(line, style="yellow") for line in waiting_lines(cluster_view)]


def waiting_lines(cluster_view: ClusterView) -> list[str]:
    """Why it waits, for people, and where that is known from."""
    lines = []
    for one in cluster_view.waits:
        about = "" if one.stage is None else f"{one.stage} attempt {one.attempt} " if one.stage != "driver" else f"driver {one.attempt} "
        since = f" (for {output.duration(max(0.0, time.time() - one.since))})" if one.since is not None and one.source == "cluster" else ""
        if one.source == "driver" and one.since is not None:
            lines.append(f"{output.duration(max(0.0, time.time() - one.since))} ago its driver saw: {one.why}")
        else:
            devices = "waits for devices" if one.stage != "driver" else "waits for a node"
            kind = {"capacity": devices, "fault": "is held up"}.get(one.kind or "", "starts")
            lines.append(f"{about}{kind}{since}: {one.why}{f'. {one.next}' if one.next else ''}")
    lines = [expanded(line) for line in lines]
    return [*lines, *([cluster_view.note] if cluster_view.note else [])]


def _stages(snapshot: Snapshot, cluster_view: ClusterView | None) -> Any:
    import rich.box
    import rich.progress_bar
    import rich.table

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("stage", "", "step", "loss", "ETA", "time", "cost", ""):
        grid.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    if (made := snapshot.preparation) is not None:
        grid.add_row(*_clips_row(made, of_clips(snapshot)))
    for stage in snapshot.stages:
        colour = COLOUR.get(stage.state, "white")
        bar = rich.progress_bar.ProgressBar(total=max(stage.steps, 1), completed=stage.step, width=20)
        grid.add_row(
            output.styled(f"{MARK.get(stage.state, '?')} {stage.name}", style=colour),
            bar,
            f"{stage.step}/{stage.steps}",
            output.cell(stage.loss),
            output.duration(stage.eta_s) if stage.state == "running" else "",
            output.duration(stage.wall_s) if stage.attempts else "",
            spent(stage, cluster_view) if stage.attempts else "",
            output.styled("; ".join(filter(None, (describe(stage, cluster_view), beside(stage)))), style="dim"),
        )
        for attempt in stage.attempts[:-1] if len(stage.attempts) > 1 else ():
            number, state = f"  ↳ a{attempt.number}", " ".join(filter(None, (attempt.state, attempt.where)))
            reason = f"{state}: {expanded(attempt.reason)}" if attempt.reason else state
            cells = (number, "", output.cell(attempt.step), "", "", "", output.dollars(attempt.usd), reason)
            grid.add_row(*(output.styled(text, style="dim") for text in cells))
    for one in snapshot.former:
        cells = (f"- {one.stage}", "", str(one.step), "", "", "", output.dollars(one.bill.usd), "no longer in the recipe")
        grid.add_row(*(output.styled(text, style="dim") for text in cells))
    return grid


def _clips_row(made: PreparationStatus, doing: str) -> list[Any]:
    import rich.progress_bar

    running = made.state == "running"
    done = made.rows if made.state == "prepared" else made.done
    return [
        output.styled(f"{MARK.get(made.state, '·')} {made.name}", style=COLOUR.get(made.state, "dim")),
        rich.progress_bar.ProgressBar(total=max(made.rows, 1), completed=done, width=20),
        f"{made.done}/{made.rows}" if running else "",
        "",
        output.duration(made.eta_s) if running else "",
        "",
        output.dollars(made.usd) if made.attempts else "",
        output.styled(doing, style="dim"),
    ]


def of_clips(snapshot: Snapshot) -> str:
    """How far the clips are that are made first, or why they are not further; empty: there are none to make."""
    made = snapshot.preparation
    if made is None:
        return ""
    if made.state == "prepared":
        return f"prepared, {several(made.clips or 0, 'clip')}"
    doing = f"prepares clips: {made.step} {made.done:,} of {made.rows:,}" if made.state == "running" and made.step else ""
    seen = snapshot.said.detail if snapshot.driver is not None and snapshot.said is not None else ""
    state = {"unknown": "not prepared yet", "running": "prepares clips", "asked": "is to be prepared"}.get(made.state, made.state)
    return expanded(doing or seen or (f"{state}: {made.reason}" if made.reason else state))


def spent(stage: StageStatus, cluster_view: ClusterView | None) -> str:
    """A stage's cost. `not yet` where its only attempt may hold devices, and neither its agent nor the cluster says since when."""
    unseen = cluster_view is not None and cluster_view.note
    live = stage.attempts and stage.attempts[-1].state == "waiting"
    return "not yet" if unseen and live and not stage.bill.held_s else output.dollars(stage.bill.usd)


def describe(stage: StageStatus, cluster_view: ClusterView | None = None) -> str:
    """The last column: what it is doing or why it is not."""
    return expanded(_described(stage, cluster_view))


def _described(stage: StageStatus, cluster_view: ClusterView | None) -> str:
    if cluster_view is not None and stage.state == "running" and stage.attempts[-1].state == "waiting":
        doing = state_of(stage, stage.attempts[-1], cluster_view)
        return " ".join(filter(None, (f"attempt {stage.attempts[-1].number}, {doing}", stage.attempts[-1].where)))
    if stage.state == "committed":
        return ", ".join([*(readings(stage.evaluation) or ["committed"]), *([f"warning: {stage.warning}"] if stage.warning else [])])
    if stage.state == "running" and stage.attempts:
        attempt = stage.attempts[-1]
        doing = stage.at_the_end if stage.step >= stage.steps else attempt.state
        shown = f"attempt {attempt.number}, {doing}" if attempt.number > 1 or doing != "running" else "running"
        shown = " ".join(filter(None, (shown, attempt.where)))
        return f"{shown}: {attempt.reason}" if attempt.reason else shown
    return stage.why or stage.state


def state_of(stage: StageStatus, attempt: AttemptStatus, cluster_view: ClusterView | None) -> str:
    """The state of an attempt: the ledger's, but `starting` in place of `waiting` where the cluster shows that it waits for nothing."""
    if attempt.state != "waiting" or cluster_view is None:
        return attempt.state
    waits = [one for one in cluster_view.waits if (one.stage, one.attempt) == (stage.name, attempt.number)]
    pods = any((pod.stage, pod.attempt) == (stage.name, attempt.number) for pod in cluster_view.pods)
    return "waiting" if any(one.kind for one in waits) or not (waits or pods) else "starting"


def of_earlier(snapshot: Snapshot) -> str:
    """A phrase behind a total: how much of it was spent under inputs that are not the current ones."""
    from orchestrator.accounting.cost import merge

    return f", {output.dollars(merge(one.bill for one in snapshot.earlier).usd)} of it under earlier inputs" if snapshot.earlier else ""


def beside(stage: StageStatus) -> str:
    """Work that does not count now: steps that are being done again, and steps under other inputs."""
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


def whole(snapshot: Snapshot, cluster_view: ClusterView | None) -> dict[str, Any]:
    """What json and yaml print of a pipeline; with its pods and waits where it lives in a cluster."""
    about = {
        "name": snapshot.name,
        "state": snapshot.state,
        "driver": snapshot.driver,
        "usd": snapshot.usd,
        "preparation": vars(snapshot.preparation) if snapshot.preparation is not None else None,
        "stages": rows(snapshot, cluster_view),
        "remarks": list(map(expanded, snapshot.remarks)),
        "earlier": [
            {
                "stage": one.stage,
                "inputs": one.inputs_digest,
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
    return about | (cluster_view.rows() if cluster_view is not None else {})


def rows(snapshot: Snapshot, cluster_view: ClusterView | None = None) -> list[dict[str, Any]]:
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
                    "state": state_of(stage, a, cluster_view),
                    "step": a.step,
                    "reason": expanded(a.reason) if a.reason else a.reason,
                    "pool": a.pool,
                    "nodes": a.nodes,
                    "nodes_asked": a.nodes_asked,
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
            "inputs": stage.inputs_digest,
            "data": data(stage),
            "why": next((one.why for one in (cluster_view.waits if cluster_view else ()) if one.stage == stage.name), "")
            or describe(stage, cluster_view),
        }
        for stage in snapshot.stages
    ]


def data(stage: StageStatus) -> dict[str, Any] | None:
    """What json and yaml print of the data that a stage uses; None: it has not reported it yet."""
    if stage.data is None:
        return None
    content = stage.data.model_dump(mode="json", exclude={"schema_"})
    return content | {"clips_left_out": stage.data.clips - stage.data.used, "sentences": list(map(expanded, stage.data.sentences()))}


def comparison_cells(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Stages side by side, for people: rows and columns of a table. A reading stands with its 95% interval; empty columns are left out."""
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
                "both": interval(evaluation, "both"),
                "held_out": loss_interval(evaluation, "held_out_loss"),
                "pool": ", ".join(line["pools"] or ()) or None,
                "held": output.duration(line["wall_s"]),
                "device_hours": output.hours(line["device_hours"]),
                "gpu_hours": output.hours(line["gpu_hours"]),
                "usd": output.dollars(line["usd"]),
                "earlier": output.dollars(line["earlier_usd"]) if line["earlier_usd"] else None,
                "goodput": output.percent(line["goodput"]),
                "published": line["published_gpu_hours"],
                "ratio": line["ratio_vs_published"],
                "left_out": f"{line['clips_left_out']:,} of {line['clips']:,}" if line["clips_left_out"] else None,
                "cut": f"{line['captions_cut']:,}" if line["captions_cut"] else None,
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
        "both": "clip both" + bounds(best, "both"),
        "held_out": "held-out loss",
        "pool": "pool",
        "held": "time",
        "device_hours": "device-hours",
        "gpu_hours": "GPU-hours",
        "usd": "cost",
        "earlier": "earlier inputs",
        "goodput": "goodput",
        "published": "published GPU-h",
        "ratio": "ratio",
        "left_out": "clips left out",
        "cut": "captions cut",
    }
    optional = ("pool", "left_out", "cut", "earlier", "image", "digit", "direction", "both", "held_out", "published", "ratio")
    return shown, {key: heading for key, heading in columns.items() if key not in optional or any(row[key] is not None for row in shown)}


def interval(evaluation: dict[str, float], name: str) -> str | None:
    if f"{name}_accuracy" not in evaluation:
        return None
    low, high = evaluation.get(f"{name}_low"), evaluation.get(f"{name}_high")
    reading = output.percent(evaluation[f"{name}_accuracy"])
    return f"{reading} [{100 * low:.0f}–{100 * high:.0f}]" if low is not None and high is not None else reading


def loss_interval(evaluation: dict[str, float], name: str) -> str | None:
    if name not in evaluation:
        return None
    low, high = evaluation.get(f"{name}_low"), evaluation.get(f"{name}_high")
    reading = f"{evaluation[name]:.4f}"
    return f"{reading} [{low:.4f}–{high:.4f}]" if low is not None and high is not None else reading


def bounds(evaluation: dict[str, float], name: str) -> str:
    chance, ceiling = evaluation.get(f"{name}_chance"), evaluation.get(f"{name}_ceiling")
    if chance is None or ceiling is None:
        return ""
    return f"\nchance {100 * chance:.0f}%, ceiling {100 * ceiling:.0f}%"
