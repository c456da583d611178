"""What tests of the backend need of the shared cluster: a namespace of their own, pipelines for its fake nodes, a driver in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_attempts import CONFIG

from orchestrator.driver.runner import Detached, Result, Runner
from orchestrator.errors import OsctlError
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.nodes import KubeNodes
from orchestrator.ledger.records import Event, Intent
from orchestrator.ledger.store import Ledger
from orchestrator.pipelines.coming import profile_of_attempt
from orchestrator.ports import Life
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Pipeline, Stage, StageSpec
from orchestrator.recipe.yaml_file import read, validate
from orchestrator.stores.folder import FolderStore

REPOSITORY = Path(__file__).parents[2]
STORE = "s3://osctl-test/runs"
"""As pods would reach it; the tests keep the ledger in a folder, since no pod of a fake node reads it."""
STAGES = (("one", None), ("two", "one"))


def until(holds: Callable[[], bool], what: str, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.05)


def unschedulable(pod: dict[str, Any]) -> bool:
    """The scheduler has looked at it, and keeps no node for it until the rest of its gang comes."""
    return any(one["type"] == "PodScheduled" and one["status"] == "False" for one in pod["status"].get("conditions", []))


@contextmanager
def client(kubeconfig: Path, namespace: str) -> Iterator[Api]:
    """For a namespace that exists, as the cluster's administrator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(kubeconfig))
        api = Api.connect(None, namespace)
    yield api
    api.close()


def allow_trainers(api: Api) -> None:
    """What a deployed namespace has: the account of the trainer's pods."""
    api.create("serviceaccounts", {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "osctl-trainer"}})


def gpu_profile(namespace: str, **changes: Any) -> ClusterProfile:
    """The published profile, in this namespace and without what its site has and this one lacks."""
    path = REPOSITORY / "configs/clusters/h800-64.yaml"
    profile = validate(ClusterProfile, read(path), "cluster profile")
    return profile.model_copy(update={"namespace": namespace, "priority_class": None, "start_deadline_s": 30, **changes})


def pipeline(profile: ClusterProfile, name: str = "demo", stages: tuple[tuple[str, str | None], ...] = STAGES, nodes: int = 8) -> Pipeline:
    resources = {"nodes": nodes, "devices_per_node": 8 if profile.gpu_resource else 1, "device": profile.device}
    return Pipeline.model_validate(
        {
            "name": name,
            "backend": "kubernetes",
            "store": STORE,
            "tracking": "none",
            "experiment": name,
            "cluster": profile,
            "budget_usd": None,
            "flush_s": 1.0,
            "trainer": (),
            "stages": tuple(
                Stage(
                    spec=StageSpec.model_validate({"name": stage, "config": "x.yaml", "parent": parent, "resources": resources}),
                    config=CONFIG,
                )
                for stage, parent in stages
            ),
        }
    )


@dataclass
class Drive:
    """A driver in a thread of this process."""

    ledger: Ledger
    backend: KubeBackend
    runner: Runner
    result: Result | None = None
    fault: BaseException | None = None
    events: list[Event] = field(default_factory=list)
    thread: threading.Thread = field(init=False)

    @classmethod
    @contextmanager
    def of(cls, of: Pipeline, ledger: Ledger, api: Api) -> Iterator[Drive]:
        profile = of.cluster
        assert profile is not None
        in_pool: Callable[[Intent], ClusterProfile] = lambda intent: profile_of_attempt(ledger, of, intent) or profile  # noqa: E731
        backend = KubeBackend(ledger.store, api, profile, STORE, pipeline=of.name, profile_of=in_pool)
        runner = Runner(of, ledger, backend, nodes=KubeNodes(api, profile))
        drive = cls(ledger, backend, runner)
        runner.on_event = drive.events.append
        drive.thread = threading.Thread(target=drive._run, name="driver", daemon=True)
        drive.thread.start()
        try:
            yield drive
        finally:
            runner.kill()
            drive.thread.join(60)
            backend._watcher.close()

    def _run(self) -> None:
        try:
            with suppress(Detached):  # a driver that was asked to leave has no result
                self.result = self.runner.run()
        except OsctlError as error:
            self.fault = error

    def counts_looks(self) -> Callable[[], int]:
        """How often the driver has looked at an attempt since now."""
        observe, looks = self.backend.observe, [0]

        def counted(run_key: str) -> Life:
            looks[0] += 1
            return observe(run_key)

        self.backend.observe = counted  # type: ignore[method-assign]
        return lambda: looks[0]

    def ends(self, patience_s: float = 60.0) -> Result:
        self.thread.join(patience_s)
        assert not self.thread.is_alive(), f"still driving after {patience_s} s: {[event.detail for event in self.events][-5:]}"
        if self.fault is not None:
            raise self.fault
        assert self.result is not None
        return self.result

    def key(self, stage: str, number: int = 1) -> str | None:
        """Run key of an attempt, once it is intended."""
        for inputs_digest in self.ledger.inputs_of(stage):
            intent = self.ledger.intent(stage, inputs_digest, number)
            if intent is not None:
                return intent.run_key
        return None

    def life(self, stage: str, number: int = 1) -> Life:
        key = self.key(stage, number)
        return self.backend.observe(key) if key else Life("absent")

    def outcomes(self, stage: str) -> list[str]:
        found = []
        for inputs_digest in self.ledger.inputs_of(stage):
            for number in self.ledger.attempts(stage, inputs_digest):
                outcome = self.ledger.outcome(stage, inputs_digest, number)
                found.append(outcome.class_ if outcome else "open")
        return found

    def trains(self, stage: str, number: int = 1, patience_s: float = 30.0) -> str:
        """Waits until all its pods run; the job's name."""

        def running() -> bool:
            life = self.life(stage, number)
            return life.state == "running" and life.bound is not None and not life.waits

        until(running, f"{stage} attempt {number} trains", patience_s)
        key = self.key(stage, number)
        assert key is not None
        return self.backend._name(key)


def folder_ledger(folder: Path, name: str = "demo") -> Ledger:
    return Ledger(FolderStore(folder / "store"), name)
