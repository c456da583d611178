"""What differs between the kinds of job that an attempt can be: one class for each operator of a cluster that trains.

Owns, for each kind, its names in the API, the objects that are created for an attempt and their order, how its job is read, suspended and
given pods. Refuses to send requests (`backend`) and to choose a kind (`backend`, by the profile and by what the cluster serves).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from orchestrator.kube import manifest, train_job
from orchestrator.kube.observed import Job
from orchestrator.kube.parts import Manifest
from orchestrator.labels import Annotation
from orchestrator.ledger.records import Intent
from orchestrator.recipe.cluster_profile import ClusterProfile

Right = tuple[str, str, tuple[str, ...]]
"""API group, resource, verbs."""


class Operator(ABC):
    """One kind of job, and the operator that acts on it. It has no state."""

    name: ClassVar[str]
    """As a profile and the command line call it."""
    kind: ClassVar[str]
    """Kind of the job."""
    plural: ClassVar[str]
    """Name of its jobs in a path of the API."""
    api: ClassVar[str]
    """Path of the API that serves its jobs; `/apis/GROUP/VERSION`."""
    plurals: ClassVar[Mapping[str, str]]
    """By kind, the names in a path of all objects that `objects` returns."""
    beside: ClassVar[Sequence[str]] = ()
    """Names in a path of the objects that are created with a job, and that it owns."""
    below: ClassVar[Sequence[str]] = ()
    """Names in a path of what the operator makes of a job, under the job's own name, and what makes pods until it is gone too."""
    expires_by_driver: ClassVar[bool] = False
    """Whether a driver has to delete finished jobs after the profile's `keep_s`, because the operator cannot."""
    rights: ClassVar[Sequence[Right]]
    """What a person or a driver needs beside rights to pods and events."""
    install: ClassVar[str]
    """What to do where the cluster does not serve it."""

    @abstractmethod
    def objects(self, intent: Intent, profile: ClusterProfile, store_url: str, *, exclude_nodes: Sequence[str] = ()) -> list[Manifest]:
        """All objects of an attempt, in the order in which they are created. The last is its job; the job owns the others.

        Args:
            store_url: the store's URL for pods.
            exclude_nodes: host names on which no pod is placed, besides the profile's.

        Raises:
            Refused: the store's URL holds credentials.
        """

    def check_names(self, name: str, run_key: str, nodes: int) -> None:
        """Raise Refused if the pods of the job `name` would have names that are too long."""
        return None

    @abstractmethod
    def read(self, job: Mapping[str, Any], seen: float) -> Job:
        """A job as a server returns it, seen at a Unix time. Raises if it is not as Kubernetes writes it."""

    @abstractmethod
    def suspend(self, *, asked: bool) -> Manifest:
        """The patch that makes all pods of a job save and leave. `asked`: a driver asks for it, so that it counts as a drain."""

    @abstractmethod
    def pods(self, objects: Sequence[Mapping[str, Any]]) -> list[Manifest]:
        """The pods that the operator makes of an attempt's `objects`, for checkers that look for pods."""

    def is_early(self, refusal: str) -> bool:
        """Whether a webhook refused a job only because it does not see the objects beside it yet."""
        return False

    def is_finished(self, job: Mapping[str, Any]) -> bool:
        """Whether a job as a server returns it has ended by itself."""
        return self.read(job, 0.0).finished


class PyTorchJob(Operator):
    """kubeflow.org/v1, of the training operator (Kubeflow Trainer v1)."""

    name = "pytorchjob"
    kind = "PyTorchJob"
    plural = "pytorchjobs"
    api = "/apis/kubeflow.org/v1"
    plurals: ClassVar[Mapping[str, str]] = {"PyTorchJob": "pytorchjobs"}
    rights: ClassVar[Sequence[Right]] = (
        ("kubeflow.org", "pytorchjobs", ("get", "list", "watch", "create", "patch", "delete")),
        ("scheduling.x-k8s.io", "podgroups", ("get", "list", "watch")),
    )
    install = "install the training operator (k8s/operator/README.md)"

    def objects(self, intent: Intent, profile: ClusterProfile, store_url: str, *, exclude_nodes: Sequence[str] = ()) -> list[Manifest]:
        return [manifest.pytorch_job(intent, profile, store_url, exclude_nodes=exclude_nodes)]

    def read(self, job: Mapping[str, Any], seen: float) -> Job:
        return Job.read(job, seen)

    def suspend(self, *, asked: bool) -> Manifest:
        return {**_asked(asked), "spec": {"runPolicy": {"suspend": True}}}

    def pods(self, objects: Sequence[Mapping[str, Any]]) -> list[Manifest]:
        return manifest.pods(objects[-1])


class TrainJob(Operator):
    """trainer.kubeflow.org/v1alpha1, of Kubeflow Trainer v2, which runs it by JobSet."""

    name = "trainjob"
    kind = "TrainJob"
    plural = "trainjobs"
    api = "/apis/trainer.kubeflow.org/v1alpha1"
    plurals: ClassVar[Mapping[str, str]] = {"PodGroup": "podgroups", "TrainingRuntime": "trainingruntimes", "TrainJob": "trainjobs"}
    beside: ClassVar[Sequence[str]] = ("trainingruntimes", "podgroups")
    below: ClassVar[Sequence[str]] = ("jobsets",)
    expires_by_driver = True
    rights: ClassVar[Sequence[Right]] = (
        ("trainer.kubeflow.org", "trainjobs", ("get", "list", "watch", "create", "patch", "delete")),
        ("trainer.kubeflow.org", "trainingruntimes", ("get", "list", "watch", "create", "patch", "delete")),
        ("scheduling.x-k8s.io", "podgroups", ("get", "list", "watch", "create", "patch", "delete")),
        ("jobset.x-k8s.io", "jobsets", ("get", "list", "watch", "delete")),
    )
    install = "install Kubeflow Trainer v2 and JobSet (k8s/operator/README.md)"

    def objects(self, intent: Intent, profile: ClusterProfile, store_url: str, *, exclude_nodes: Sequence[str] = ()) -> list[Manifest]:
        return train_job.train_job(intent, profile, store_url, exclude_nodes=exclude_nodes)

    def check_names(self, name: str, run_key: str, nodes: int) -> None:
        train_job.check_pod_names(name, run_key, nodes)

    def read(self, job: Mapping[str, Any], seen: float) -> Job:
        return Job.read_train_job(job, seen)

    def suspend(self, *, asked: bool) -> Manifest:
        return {**_asked(asked), "spec": {"suspend": True}}

    def is_early(self, refusal: str) -> bool:
        # The first are Trainer's words, the others Kueue's.
        return "must be created before the TrainJob" in refusal or ("runtime '" in refusal and "not found" in refusal)

    def pods(self, objects: Sequence[Mapping[str, Any]]) -> list[Manifest]:
        return train_job.pods(objects)


def _asked(asked: bool) -> Manifest:
    return {"metadata": {"annotations": {Annotation.ASKED: "to leave"}}} if asked else {}


PYTORCH_JOB, TRAIN_JOB = PyTorchJob(), TrainJob()
OPERATORS: Sequence[Operator] = (PYTORCH_JOB, TRAIN_JOB)
"""All kinds, in the order in which one is chosen where a cluster serves several."""
BY_NAME: Mapping[str, Operator] = {one.name: one for one in OPERATORS}
BY_PLURAL: Mapping[str, Operator] = {one.plural: one for one in OPERATORS}


def of(job: Job) -> Operator:
    """The operator of a job that was read."""
    return BY_PLURAL[job.plural]
