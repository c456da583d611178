"""Agents for pods of fake nodes, which run nothing: writes into the real ledger what the agents of a gang would, and ends the pods as a
kubelet would.

An attempt whose pods all run does what its script says, one word after the other:
("publish", step) · ("train",): to the last step, and completed · ("hold",): nothing, until its pods are gone ·
("saves", step): waits until its pods are asked to leave, publishes the step, says that it drained, and only then its pods go ·
("oom",): the last node's container is killed for memory, and says nothing · ("do", callable) with the attempt's job name.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.played_kubelet import PlayedKubelet

from orchestrator.errors import NotFound, OsctlError
from orchestrator.kube import names
from orchestrator.kube.client import Api
from orchestrator.kube.faults import Conflict
from orchestrator.labels import Label
from orchestrator.ledger.records import Intent, JournalPiece, Report
from orchestrator.ledger.store import Ledger, read_intent

LOOK_S = 0.1
Script = list[tuple[Any, ...]]


class PlayedAgents:
    """Context manager: plays in a background thread until it is left."""

    def __init__(
        self, api: Api, ledger: Ledger, scripts: dict[tuple[str, int], Script] | None = None, *, kubelet: PlayedKubelet | None = None
    ):
        """`scripts`: by (stage, attempt); ("train",) where none is given. `kubelet`: of the nodes on which pods save before they leave."""
        self.api, self.ledger, self.scripts, self.kubelet = api, ledger, scripts or {}, kubelet
        self.faults: list[BaseException] = []
        self._over = threading.Event()
        self._played: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> PlayedAgents:
        self._begin(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._folder.cleanup()
        if self.faults:
            raise self.faults[0]

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except (OsctlError, NotFound, AssertionError) as error:
                self.faults.append(error)

        thread = threading.Thread(target=guarded, name="played agent", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            gangs: dict[str, list[dict[str, Any]]] = {}
            for pod in self.api.list("pods", f"{Label.PIPELINE}={self.ledger.pipeline},{Label.ROLE}=trainer")[0]:
                gangs.setdefault(pod["metadata"]["labels"][Label.RUN], []).append(pod)
            for run, pods in gangs.items():
                if run in self._played or any(pod["status"].get("phase") != "Running" for pod in pods):
                    continue
                command = pods[0]["spec"]["containers"][0]["command"]
                intent = read_intent(self.ledger.store, command[command.index("--intent") + 1])
                if len(pods) == intent.nodes:
                    self._played.add(run)
                    self._begin(self._play, intent, run, sorted(pod["metadata"]["name"] for pod in pods))

    def _play(self, intent: Intent, run: str, pods: list[str]) -> None:
        began = time.time()
        script = self.scripts.get((intent.stage, intent.attempt), [("train",)])
        pieces = 0
        for verb, *rest in script:
            if verb == "do":
                parts = names.ATTEMPT_NAME.fullmatch(pods[0])
                assert parts is not None, pods[0]
                rest[0](parts["job"])
                continue
            if verb == "hold":
                return
            if verb == "saves":
                self._save(intent, run, pods, rest[0], began, pieces)
                return
            if verb == "oom":
                self._end(pods[-1], 137, "OOMKilled")
                return
            step = rest[0] if verb == "publish" else intent.config.steps
            now = time.time()
            for node in range(intent.nodes):
                spent = {"step": now - began}
                piece = JournalPiece(node=node, seq=pieces, start=began, end=now, devices=intent.devices_per_node, spent=spent)
                self.ledger.append_journal(intent, piece)
            began, pieces = now, pieces + 1
            if step > (intent.resume.step if intent.resume else 0):
                self._publish(intent, step)
        self.ledger.write_report(intent, _ended(intent, "completed", intent.config.steps, began))
        for pod in pods:
            self._end(pod, 0, "Completed")

    def _save(self, intent: Intent, run: str, pods: list[str], step: int, began: float, pieces: int) -> None:
        """As a preStop that is waited for; only a played kubelet waits for it."""
        assert self.kubelet is not None, "pods of other fake nodes are gone at once"
        self.kubelet.held.add(run)
        while not (asked := self._asked_to_leave(pods)) and not self._over.wait(LOOK_S):
            pass
        if asked:
            now = time.time()
            for node in range(intent.nodes):
                piece = JournalPiece(
                    node=node, seq=pieces, start=began, end=now, devices=intent.devices_per_node, spent={"step": now - began}
                )
                self.ledger.append_journal(intent, piece)
            self._publish(intent, step)
            for node in range(intent.nodes):
                self.ledger.write_report(intent, _ended(intent, "drained", step, began, node))
        self.kubelet.held.discard(run)

    def _asked_to_leave(self, pods: list[str]) -> bool:
        try:
            return all("deletionTimestamp" in self.api.get("pods", pod)["metadata"] for pod in pods)
        except NotFound:  # killed
            return False

    def _publish(self, intent: Intent, step: int) -> None:
        """Weights are a function of stage and step alone: whoever trains them, they come out equal."""
        folder = Path(self._folder.name) / f"{intent.stage}-{intent.attempt}-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "ema.safetensors"):
            (folder / name).write_text(f"{name} {intent.stage} {step}")
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        steps = intent.config.steps
        description = {"schema": 1, "step": step, "steps": steps, "complete": step == steps, "files": files}
        (folder / "CHECKPOINT.json").write_text(json.dumps(description))
        self.ledger.publish(intent, folder)

    def _end(self, pod: str, exit_code: int, reason: str) -> None:
        end_pod(self.api, pod, exit_code, reason)


def end_pod(api: Api, pod: str, exit_code: int, reason: str) -> None:
    """What a kubelet writes when the container has ended. A pod that is gone stays gone."""
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        name = api.get("pods", pod)["spec"]["containers"][0]["name"]
    except NotFound:
        return
    state = {"terminated": {"exitCode": exit_code, "reason": reason, "finishedAt": finished, "startedAt": finished}}
    container = {"name": name, "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    status = {"phase": "Failed" if exit_code else "Succeeded", "containerStatuses": [container]}
    try:
        api._ask("PATCH", f"{api._path('pods', pod)}/status", {}, {"status": status})
    except (NotFound, Conflict):
        return


def _ended(intent: Intent, how: str, step: int, began: float, node: int = 0) -> Report:
    return Report.model_validate(
        {
            "class": how,
            "reason": "",
            "step": step,
            "node": node,
            "evaluation": {"accuracy": 0.5},
            "started": began,
            "ended": time.time(),
        }
    )
