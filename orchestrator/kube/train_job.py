"""Write the TrainJob (trainer.kubeflow.org/v1alpha1) of an attempt, and the objects that it needs beside it. Pure.

Owns what Kubeflow Trainer v2 and JobSet need around the pods. `trainer_pod` writes their spec, `names` the names. Refuses to talk to a
cluster.

An attempt is three objects of one name: a PodGroup if a scheduler with gangs starts it, a TrainingRuntime, and the TrainJob, which owns the
others. A TrainJob cannot say how a pod saves before it leaves, how long it may take, its priority or its security context: only a runtime
can. So each attempt has a runtime of its own, and the TrainJob names it.

Facts of Trainer 2.1.0 and JobSet 0.10.1, read in their source:
- `elasticPolicy` does nothing, and no policy sets PET_RDZV_ENDPOINT. So there is no policy, and the pods have torchrun's variables.
- A TTL in the runtime would delete the JobSet and not the TrainJob, and Trainer would make the JobSet anew: the attempt would train twice.
  So there is none, and drivers delete finished jobs (`AttemptObjects.remove_expired`).
- Trainer's own PodGroup always has minResources, see `_pod_group`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import Refused
from orchestrator.kube import names
from orchestrator.kube.manifest import pod_labels, queue_labels
from orchestrator.kube.parts import Manifest, check_store, part, template
from orchestrator.kube.trainer_pod import PORT, Surroundings, trainer_pod
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.keys import Keys
from orchestrator.ledger.records import Intent
from orchestrator.recipe.cluster_profile import ClusterProfile

API = "trainer.kubeflow.org/v1alpha1"
POD_NAME_CHARACTERS = 63
"""The longest name of a pod that JobSet's webhook accepts. It counts the five random characters that are appended."""


def train_job(intent: Intent, profile: ClusterProfile, store_url: str, *, exclude_nodes: Sequence[str] = ()) -> list[Manifest]:
    """All objects of one attempt, in the order in which they are created. The last is the TrainJob.

    Args:
        store_url: the store's URL for pods.
        exclude_nodes: host names on which no pod is placed, besides the profile's.

    Raises:
        Refused: the store's URL holds credentials, or there are too many nodes for the names of the pods.
    """
    check_store(store_url)
    name, labels = names.job_name(store_url, intent.run_key), pod_labels(intent, store_url)
    check_pod_names(name, intent.run_key, intent.nodes)
    intent_key = Keys(intent.pipeline).intent(intent.stage, intent.inputs_digest, intent.attempt)
    gang = profile.queue == "gang" and intent.nodes > 1
    annotations = {Annotation.RUN_KEY: intent.run_key, Annotation.STORE: store_url, Annotation.INTENT: intent_key}

    def metadata() -> Manifest:
        return part("V1ObjectMeta", name=name, namespace=profile.namespace, labels=dict(labels), annotations=dict(annotations))

    around = Surroundings("node", Label.COMPLETION_INDEX, "rendezvous", _rendezvous(name, intent.nodes))
    spec = {**trainer_pod(intent, intent_key, profile, store_url, exclude_nodes, around), "restartPolicy": "Never"}
    pods = template({**labels, **({Label.POD_GROUP: name} if gang else {})}, spec)
    job = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
        "trainer": {"numNodes": intent.nodes},
        "suspend": profile.queue == "kueue",  # Kueue starts it; a job that is not created suspended would race with Kueue's webhook
    }
    about_job = metadata()
    about_job["annotations"][Annotation.KEEP_S] = str(profile.keep_s)
    about_job["labels"] |= queue_labels(profile)
    job_set = {"metadata": {"labels": dict(labels), "annotations": dict(annotations)}, "spec": _job_set(pods, intent.nodes)}
    objects = [
        *([_pod_group(metadata(), intent.nodes)] if gang else []),
        {"apiVersion": API, "kind": "TrainingRuntime", "metadata": metadata(), "spec": {"template": job_set}},
        {"apiVersion": API, "kind": "TrainJob", "metadata": about_job, "spec": job},
    ]
    return names.sealed_together(objects)


def check_pod_names(name: str, run_key: str, nodes: int) -> None:
    """Raise Refused if the names of the pods of this attempt, or of a later one of its stage, would be too long for JobSet."""
    later = min(len(name) + len("9999") - len(run_key.rpartition("/a")[2]), names.NAME_CHARACTERS)
    longest = f"{name}{'9' * (later - len(name))}-{names.REPLICATED_JOB}-0-{nodes - 1}-abcde"
    if len(longest) > POD_NAME_CHARACTERS:
        raise Refused(
            f"{run_key}: {nodes} nodes give pods names of {len(longest)} characters, and JobSet takes {POD_NAME_CHARACTERS}; "
            "shorten the name of the pipeline or of the stage"
        )


def _pod_group(metadata: Manifest, nodes: int) -> Manifest:
    """How a scheduler with gangs starts all pods together.

    It is ours, and not made by Trainer's `podGroupPolicy`, since that one has minResources: Coscheduling then counts the whole cluster
    before each try and, once it found too little, is woken only by new pods, not by a node that became free (see `manifest`).
    """
    return {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": metadata, "spec": {"minMember": nodes}}


def _job_set(pods: Manifest, nodes: int) -> Manifest:
    """The spec of the JobSet: one Job, of which nothing is ever started again, because the driver decides what comes after an attempt."""
    job = part("V1JobSpec", parallelism=nodes, completions=nodes, completion_mode="Indexed", backoff_limit=0, template=pods)
    replicated = {
        "name": names.REPLICATED_JOB,
        "replicas": 1,
        "groupName": "default",  # JobSet's default, so that the runtime is stored as it was sent
        "template": {"metadata": {"labels": {Label.ANCESTOR: "trainer"}}, "spec": job},
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},  # the nodes meet before any is ready
        "failurePolicy": {"maxRestarts": 0, "restartStrategy": "Recreate"},  # the strategy is JobSet's default, and never used
        "replicatedJobs": [replicated],
    }


def _rendezvous(name: str, nodes: int) -> Mapping[str, str]:
    """torchrun's variables by which the nodes find each other: at the first one, by its name in JobSet's headless Service."""
    if nodes == 1:
        return {}
    first = f"{name}-{names.REPLICATED_JOB}-0-0.{name}"
    return {"PET_NNODES": f"{nodes}:{nodes}", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"{first}:{PORT}"}


def pods(objects: Sequence[Mapping[str, Any]]) -> list[Manifest]:
    """The pods that JobSet and Job make from `train_job`'s objects, for checkers that look for pods."""
    runtime = next(one for one in objects if one["kind"] == "TrainingRuntime")
    metadata, job = runtime["metadata"], runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                **job["template"]["metadata"],
                "name": f"{metadata['name']}-{names.REPLICATED_JOB}-0-{index}-abcde",
                "namespace": metadata["namespace"],
                "labels": {**job["template"]["metadata"]["labels"], Label.COMPLETION_INDEX: str(index)},
            },
            "spec": job["template"]["spec"],
        }
        for index in range(job["completions"])
    ]
