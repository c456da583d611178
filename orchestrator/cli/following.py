"""Shows a launch while it runs: a live tree on a terminal, elsewhere a line whenever something moved.

Owns what was said already, so that nothing is said twice. Refuses to say how a pipeline looks (`display` does) and to read anything by
itself (`pipelines.watching` does).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from orchestrator.cli import display, output

if TYPE_CHECKING:
    from orchestrator.accounting.status import Snapshot
    from orchestrator.pipelines.cluster_view import ClusterView, PodRow
    from orchestrator.pipelines.watching import View
    from orchestrator.pipelines.workspace import Workspace


def pods_that_moved(cluster_view: ClusterView, said: dict[str, str]) -> list[str]:
    """A line for each pod whose state has changed, and one for all pods of an attempt that are in the same trouble.

    The scheduler writes its long message to each pod of a gang; what they wait for is said once, by `display.waiting_lines`.

    Args:
        said: what was said before, by name of the pod; it is brought up to date.
    """
    lines: list[str] = []
    alike: dict[tuple[str, int, str], list[PodRow]] = {}
    for pod in cluster_view.pods:
        without_node = pod.host is None and pod.phase == "Pending"
        now = "Pending, without a node" if without_node else f"{pod.phase} {pod.reason}".strip()
        if said.get(pod.name) == now:
            continue
        said[pod.name] = now
        if without_node or pod.reason:
            alike.setdefault((pod.stage, pod.attempt, now), []).append(pod)
        else:
            lines.append(f"{pod.name}: {now}{f' on {pod.host}' if pod.host and pod.phase == 'Running' else ''}")
    for (_, _, now), pods in alike.items():
        lines.append(f"{pods[0].name}{f' and {len(pods) - 1} more' if len(pods) > 1 else ''}: {now}")
    return lines


class Follower:
    """Shows a launch while it runs, from a thread of its own: a live tree on a terminal, elsewhere a line whenever something moved."""

    def __init__(self, workspace: Workspace, interval_s: float = 1.0, format: output.Format = output.Format.table):
        """`format` json or yaml: the whole to stdout, whenever something changed."""
        from orchestrator.pipelines.watching import Views

        self.format = format
        self.over = threading.Event()
        """Set once nobody drives the pipeline, and nobody is about to."""
        self.told: set[tuple[str, str]] = set()
        """What was said of `not_used` and of warnings, by stage. A live tree takes its own along when it ends."""
        self.whys: set[str] = set()
        """The reasons of waiting that were said."""
        self._views = Views(workspace, interval_s)
        self._thread = threading.Thread(target=self._run, name="shows the launch", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._views.close()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        screen = output.console(err=True)
        try:
            if screen.is_terminal and self.format is output.Format.table:
                import rich.live

                with rich.live.Live(console=screen, transient=True, auto_refresh=False) as live:
                    for view in self._views:
                        live.update(display.tree(view.snapshot, view.cluster, view.trouble), refresh=True)
                        self._note_the_end(view)
            else:
                self._say_what_moves()
        finally:
            self.over.set()  # whoever waits for the end is not left waiting by a display that broke

    def _say_what_moves(self) -> None:
        said: dict[str, str] = {}
        for view in self._views:
            if view.first:  # a line that the cluster changes a moment later would be said twice
                continue
            if self.format is output.Format.table:
                self._say(view.snapshot, view.cluster, said)
            elif said.get("all") != (now := repr(row := display.whole(view.snapshot, view.cluster))):
                said["all"] = now
                output.line(row, "", self.format)
            self._note_the_end(view)

    def _note_the_end(self, view: View) -> None:
        if view.over:
            self.over.set()

    def _say(self, current: Snapshot, cluster_view: ClusterView | None, said: dict[str, str]) -> None:
        if (made := current.preparation) is not None:
            doing = display.of_clips(current)
            words = "".join(letter for letter in doing if not letter.isdigit())
            key = f"{made.state} {10 * made.done // max(made.rows, 1)} {words}"
            if said.get(f"clips of {made.name}") != key:
                said[f"clips of {made.name}"] = key
                output.note(f"{made.name}: {doing}{f' {output.dollars(made.usd)}' if made.attempts else ''}")
        for stage in current.stages:
            doing = display.describe(stage, cluster_view)
            tenth = 10 * stage.step // max(stage.steps, 1)
            words = "".join(
                letter for letter in f"{stage.why} {doing}" if not letter.isdigit()
            )  # how many steps are at risk changes always
            key = f"{stage.state} {tenth if stage.state == 'running' else ''} {len(stage.attempts)} {words}"
            if stage.attempts and said.get(stage.name) != key:
                said[stage.name] = key
                self.told.add((stage.name, stage.warning))
                loss = f" loss {stage.loss:.4f}" if stage.loss is not None else ""
                eta = f" ETA {output.duration(stage.eta_s)}" if stage.state == "running" and stage.eta_s is not None else ""
                output.note(f"{stage.name}: {doing}, step {stage.step}/{stage.steps}{loss}{eta} {display.spent(stage, cluster_view)}")
        for line in display.not_used(current, self.told):
            output.note(line)
        self.told |= {(stage.name, sentence) for stage in current.stages for sentence in stage.not_used}
        if cluster_view is None:
            return
        for line, why in zip(
            display.waiting_lines(cluster_view), [*(one.why for one in cluster_view.waits), cluster_view.note], strict=False
        ):
            if why and why not in self.whys:
                self.whys.add(why)
                output.note(line)
        for line in pods_that_moved(cluster_view, said):
            output.note(line)
