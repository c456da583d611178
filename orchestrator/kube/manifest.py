"""Write the PyTorchJob (kubeflow.org/v1) that is sent to Kubernetes, from an intent and a cluster profile. Pure.

Owns what the training operator needs around the pods: how many, how they meet, how they are scheduled. `trainer_pod` writes their spec,
`names` the names. Refuses to talk to a cluster.

A manifest depends only on the arguments: not on a clock, on the epoch or on the checkpoint that an attempt resumes. So what `osctl render`
prints before an intent exists is what `osctl launch` sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.kube import names
from orchestrator.kube.parts import Manifest, check_store, part, template
from orchestrator.kube.trainer_pod import trainer_pod
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.keys import Keys
from orchestrator.ledger.records import Intent
from orchestrator.recipe.cluster_profile import ClusterProfile


def pytorch_job(intent: Intent, profile: ClusterProfile, store_url: str, *, exclude_nodes: Sequence[str] = ()) -> Manifest:
    """The PyTorchJob of one attempt: as many workers as nodes, and no master.

    Without a master there is one kind of pod, the operator adds no init container, and all nodes are scheduled as one set.

    Args:
        store_url: the store's URL for pods.
        exclude_nodes: host names on which no pod is placed, besides the profile's.

    Raises:
        Refused: the store's URL holds credentials.
    """
    check_store(store_url)
    labels = pod_labels(intent, store_url)
    intent_key = Keys(intent.pipeline).intent(intent.stage, intent.inputs_digest, intent.attempt)
    metadata = part(
        "V1ObjectMeta",
        name=names.job_name(store_url, intent.run_key),
        namespace=profile.namespace,
        labels={**labels, **queue_labels(profile)},
        annotations={Annotation.RUN_KEY: intent.run_key, Annotation.STORE: store_url, Annotation.INTENT: intent_key},
    )
    pods = template(labels, trainer_pod(intent, intent_key, profile, store_url, exclude_nodes))
    spec = part(
        "KubeflowOrgV1PyTorchJobSpec",
        run_policy=_run_policy(intent, profile),
        nproc_per_node=str(intent.devices_per_node),
        elastic_policy=_rendezvous(metadata["name"], intent.nodes),
        pytorch_replica_specs={"Worker": part("KubeflowOrgV1ReplicaSpec", replicas=intent.nodes, restart_policy="Never", template=pods)},
    )
    return names.sealed(part("KubeflowOrgV1PyTorchJob", api_version="kubeflow.org/v1", kind="PyTorchJob", metadata=metadata, spec=spec))


def pod_labels(intent: Intent, store_url: str) -> dict[str, str]:
    """Labels of an attempt's job and of its pods, of whatever kind the job is."""
    return {
        Label.MANAGED_BY: names.MANAGER,
        Label.PIPELINE: intent.pipeline,
        Label.STAGE: intent.stage,
        Label.ATTEMPT: str(intent.attempt),
        Label.RUN: names.run_hash(store_url, intent.run_key),
        Label.ROLE: "trainer",
    }


def queue_labels(profile: ClusterProfile) -> dict[str, str]:
    """Labels by which Kueue finds a job, of whatever kind. Empty without Kueue."""
    queue = {Label.QUEUE_NAME: profile.kueue_queue} if profile.kueue_queue else {}
    return queue | ({Label.QUEUE_PRIORITY: profile.kueue_priority} if profile.kueue_priority else {})


def _run_policy(intent: Intent, profile: ClusterProfile) -> Manifest:
    """The run policy. The operator must not restart anything of an attempt, because the driver decides what comes after it."""
    # minResources is written as empty, otherwise the operator fills it in. Coscheduling would then count the whole cluster before each try
    # and, once it found too little ("resource gap"), be woken only by new pods, not by a node that became free. A gang would then wait for
    # up to five minutes beside free nodes (seen with scheduler-plugins 0.34.7).
    gang = part("KubeflowOrgV1SchedulingPolicy", min_available=intent.nodes, min_resources={})
    return part(
        "KubeflowOrgV1RunPolicy",
        clean_pod_policy="Running",  # ends the other nodes if one failed; finished pods keep their logs
        backoff_limit=0,
        ttl_seconds_after_finished=profile.keep_s,
        suspend=profile.queue == "kueue",  # Kueue starts it; a job that is not created suspended would race with Kueue's webhook
        scheduling_policy=gang if profile.queue == "gang" else None,  # beside Kueue, two gangs would wait for each other
    )


def _rendezvous(name: str, nodes: int) -> Manifest | None:
    """How the nodes find each other. A single node needs no policy; without one the operator sets no PET_RDZV_ENDPOINT."""
    if nodes == 1:
        return None
    return part(
        "KubeflowOrgV1ElasticPolicy",
        rdzv_backend="c10d",
        rdzv_id=name,
        min_replicas=nodes,  # min = max: another number of nodes would be another global batch
        max_replicas=nodes,
        max_restarts=0,  # the agent says how long they wait for each other: PET_RDZV_CONF
    )


def pods(manifest: Mapping[str, Any]) -> list[Manifest]:
    """The pods that an operator would make from a PyTorchJob or a Job, for checkers that cannot read a PyTorchJob."""
    metadata, spec = manifest["metadata"], manifest["spec"]
    worker = spec.get("pytorchReplicaSpecs", {}).get("Worker", {})
    made_from = spec["template"] if "template" in spec else worker["template"]
    policy = {"restartPolicy": worker["restartPolicy"]} if worker else {}
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{metadata['name']}-worker-{index}", "namespace": metadata["namespace"], **made_from["metadata"]},
            "spec": {**made_from["spec"], **policy},
        }
        for index in range(worker.get("replicas", 1))
    ]
