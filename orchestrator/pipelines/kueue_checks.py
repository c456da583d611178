"""Whether Kueue is there, holds back the kind of job that osctl creates, and has a queue that can admit one attempt.

Owns what is asked of Kueue before a launch, with a person's own rights: a LocalQueue lies in the namespace and is read; its ClusterQueue
lies outside, and who may not read it is told so. Refuses to say why an attempt waits (`kube.waiting`).

Whether Kueue holds a kind back is asked by a dry run: its webhook suspends each job with a queue, of the kinds that it manages. Neither
its webhooks nor its settings, which lie in its own namespace, need to be read for it. Only a TrainJob cannot be asked so: Trainer's
webhook refuses one whose runtime is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.errors import NotFound, Refused
from orchestrator.kube.jobs import DRIVER_REQUESTS
from orchestrator.kube.manifest import pods
from orchestrator.kube.nodes import quantity
from orchestrator.pipelines import room
from orchestrator.pipelines.cluster_checks import NotChecked, serves_rayjobs
from orchestrator.pipelines.operator_checks import Installation

if TYPE_CHECKING:
    from orchestrator.kube.client import Api
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Stage

GROUP = "/apis/kueue.x-k8s.io"
FRAMEWORKS: Mapping[str, str] = {"pytorchjob": "kubeflow.org/pytorchjob", "trainjob": "trainer.kubeflow.org/trainjob"}
"""By operator, what Kueue's setting `integrations.frameworks` calls its jobs."""
RAYJOB = "ray.io/rayjob"
UNQUEUED = "Kueue holds back jobs without a queue here (its setting manageJobsWithoutQueueName): this one would never start"
SETTINGS = "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"
INSTALL = "an administrator installs it: kubectl apply --server-side -k k8s/kueue, then the queues: kubectl apply -k k8s/queues"
HELD_BACK = {
    "kueue": "look at its pods: kubectl -n kueue-system get pods; its settings: kubectl -n kueue-system describe configmap",
    "gang": "set queue: kueue and kueue_queue in the profile (kubectl get localqueues shows the names)",
}
"""By a profile's `queue`: what to do where `held_back` refuses."""
DRIVERS_QUEUE = "name a LocalQueue with driver_queue in the profile; kubectl get localqueues shows them, and k8s/queues makes one"
QUEUES = "an administrator makes it (k8s/queues, or the chart's values `kueue`), or name another with kueue_queue in the profile"
TOLERATIONS = "move them from the flavor into `tolerations` of the profile: kubectl edit resourceflavor NAME; or use operator: pytorchjob"
READER = "kubectl create clusterrolebinding osctl-queues --clusterrole=kueue-clusterqueue-viewer-role --group=osctl-users"

JsonObject = Mapping[str, Any]


def kueue(api: Api, profile: ClusterProfile) -> str:
    """Whether Kueue is there, where the profile needs it. Raises Refused, Unreachable."""
    there = _there(api)
    if profile.queue == "gang":
        return f"{'there' if there else 'not there'}, and this profile does not use it"
    if not there:
        raise Refused("the profile says queue: kueue, and the cluster knows nothing of kueue.x-k8s.io")
    return "Kueue is there"


def held_back(api: Api, profile: ClusterProfile, operator: Installation | None, job: dict[str, Any]) -> str:
    """Whether Kueue holds an attempt's job back if it has a queue, and only then. Raises Refused, NotChecked, Unreachable.

    Args:
        operator: the one that is used. None means that the cluster has none.
        job: an attempt's PyTorchJob, without or with a queue as the profile says.
    """
    if not _there(api):
        return "there is no Kueue that would hold a job back"
    if operator is None:
        raise NotChecked("there is no operator whose jobs Kueue could hold back")
    if operator.name == "trainjob":
        return _by_settings(api, profile, operator)
    suspended = _suspended(api, job)
    if profile.queue == "gang" and suspended:
        raise Refused(
            "Kueue holds back jobs without a queue here (its setting manageJobsWithoutQueueName), so that this one would never start"
        )
    if profile.queue == "kueue" and not suspended:
        lacking = FRAMEWORKS[operator.name]
        raise Refused(f"a job with a queue is not held back: Kueue does not run, or its setting integrations.frameworks lacks {lacking}")
    return f"Kueue holds back each {operator.said} with a queue" if suspended else "Kueue holds back no job without a queue"


def rayjobs(api: Api, profile: ClusterProfile) -> str:
    """Whether Kueue starts the RayJob of a preparation, which is sent suspended: of one that it does not know, nothing would ever start.

    Raises Refused, NotChecked where there are no RayJobs, Unreachable.
    """
    from orchestrator.kube.ray_job import ray_job

    if not serves_rayjobs(api):
        raise NotChecked("the cluster serves no RayJobs")
    job = ray_job(profile, "s3://osctl/asks", "asks", "0" * 16, 1, pods=1)
    returned = api.create("rayjobs", {**job, "spec": {**job["spec"], "suspend": False}}, dry_run=True)
    if not returned["spec"].get("suspend"):
        raise Refused(f"Kueue does not know RayJobs: its setting integrations.frameworks lacks {RAYJOB}, so that none would ever start")
    return "Kueue holds back and starts RayJobs with a queue"


def queue(api: Api, profile: ClusterProfile, requests: Sequence[Mapping[str, str]]) -> str:
    """Whether the profile's LocalQueue is there, may admit, and covers all that an attempt's pods request.

    Args:
        requests: of each pod, its resource requests.

    Raises:
        Refused: it is not so. NotFound: there is no such LocalQueue. Unreachable.
    """
    found = _local(api, profile)
    name, of = profile.kueue_queue, found["spec"]["clusterQueue"]
    if (policy := found["spec"].get("stopPolicy", "None")) != "None":
        raise Refused(f"LocalQueue {name} is stopped by an administrator (stopPolicy {policy})")
    for condition in (found.get("status") or {}).get("conditions", ()):
        if condition["type"] == "Active" and condition["status"] != "True":
            raise Refused(f"LocalQueue {name} is not active: {condition['message']}{_of_cluster_queue(api, of)}")
    covered = {resource["name"] for flavor in (found.get("status") or {}).get("flavorsReservation", ()) for resource in flavor["resources"]}
    if covered and (lacking := sorted(_names(requests) - covered)):
        raise Refused(
            f"ClusterQueue {of} of LocalQueue {name} covers {', '.join(sorted(covered))}, and an attempt's pods request "
            f"{', '.join(lacking)} too, so that Kueue would never admit it"
        )
    return f"LocalQueue {name} is active, in ClusterQueue {of}, and covers all that a pod requests"


def _of_cluster_queue(api: Api, name: str) -> str:
    """Why a ClusterQueue is not active, in its own words; nothing where this person may not read it."""
    try:
        conditions = api.get("clusterqueues", name).get("status", {}).get("conditions", ())
    except (Refused, NotFound):
        return ""
    return "".join(f"; ClusterQueue {name}: {one['message']}" for one in conditions if one["type"] == "Active")


def drivers_queue(api: Api, profile: ClusterProfile) -> str:
    """Whether the Job of a driver starts: at once, or in a queue that may admit it. Raises Refused, NotFound, Unreachable."""
    if profile.driver_queue is None:
        if _there(api) and _suspended_job(api):
            raise Refused("Kueue holds back Jobs without a queue here (its setting manageJobsWithoutQueueName): no driver would start")
        return "none: its Job starts at once"
    return queue(api, profile.model_copy(update={"kueue_queue": profile.driver_queue}), [DRIVER_REQUESTS])


def pool(api: Api, profile: ClusterProfile, name: str, stage: Stage, job: Mapping[str, Any]) -> str:
    """A pool that a stage falls back to: its queue, and whether its nodes take the stage's pods. Raises Refused, NotFound, Unreachable.

    Args:
        profile: the one with all pools.
        name: the pool's.
        job: an attempt's PyTorchJob.
    """
    there = profile.in_pool(name)
    found = f"{queue(api, there, requests_of(job))}; " if there.queue == "kueue" else ""
    return found + room.nodes(api, there, stage, job)


def requests_of(job: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """Of each pod of an attempt's PyTorchJob, what it requests."""
    return [container["resources"]["requests"] for pod in pods(job) for container in pod["spec"]["containers"]]


def quota(api: Api, profile: ClusterProfile, stage: str, requests: Sequence[Mapping[str, str]]) -> str:
    """Whether an attempt fits into the queue when nothing else is in it. Raises Refused, NotChecked, NotFound, Unreachable."""
    of = _local(api, profile)["spec"]["clusterQueue"]
    try:
        found = api.get("clusterqueues", of)
        others = [one for one in api.list("clusterqueues")[0] if one["metadata"]["name"] != of]
    except Refused as error:
        raise NotChecked(
            f"you may not read ClusterQueue {of}, so its quota is not compared; an administrator lets you: {READER}"
        ) from error
    spec = found["spec"]
    cohort = _cohort(spec)
    mates = [one["spec"] for one in others if cohort and _cohort(one["spec"]) == cohort]
    needs: dict[str, Decimal] = {}
    for pod in requests:
        for name, value in pod.items():
            needs[name] = needs.get(name, Decimal(0)) + quantity(value)
    short = []
    for group in spec.get("resourceGroups", ()):
        wanted = {name: needs[name] for name in group["coveredResources"] if name in needs}
        tries = [_short(flavor, wanted, mates) for flavor in group["flavors"]]
        if all(tries):
            short.append(min(tries, key=len))
    if short:
        raise Refused(f"{stage} never fits into ClusterQueue {of}: {'; '.join(one for words in short for one in words)}")
    return f"{stage} fits into ClusterQueue {of} when it is empty; who uses it now is not looked at"


def flavors(api: Api, profile: ClusterProfile, operator: Installation | None) -> str:
    """Whether pods keep their tolerations in the queue. Raises Refused, NotChecked, NotFound, Unreachable.

    Read in Kueue 0.15.0 and Trainer 2.1.0: Kueue adds a flavor's tolerations to a PyTorchJob's; into a TrainJob it writes them as an
    override, and Trainer's overrides replace the whole list.
    """
    if operator is None or operator.name != "trainjob":
        return "Kueue adds the tolerations of a flavor to those of the pods"
    of = _local(api, profile)["spec"]["clusterQueue"]
    try:
        spec = api.get("clusterqueues", of)["spec"]
        named = [flavor["name"] for group in spec.get("resourceGroups", ()) for flavor in group["flavors"]]
        replacing = [name for name in dict.fromkeys(named) if (api.get("resourceflavors", name).get("spec") or {}).get("tolerations")]
    except Refused as error:
        raise NotChecked(
            f"you may not read the flavors of ClusterQueue {of}, so their tolerations are not looked at; an administrator lets you: "
            "kubectl create clusterrolebinding osctl-flavors --clusterrole=kueue-resourceflavor-viewer-role --group=osctl-users"
        ) from error
    if replacing:
        raise Refused(
            f"{_flavor(replacing)} tolerations, and Kueue puts them in place of those of a TrainJob's pods: these would lack the profile's "
            f"and stay bound to a lost node for 300 s in place of {profile.lost_node_s}"
        )
    return f"no flavor of ClusterQueue {of} has tolerations that would replace those of a TrainJob's pods"


def _flavor(names: Sequence[str]) -> str:
    return f"flavor {names[0]} has" if len(names) == 1 else f"the flavors {', '.join(names)} have"


def _short(flavor: JsonObject, wanted: Mapping[str, Decimal], mates: Sequence[JsonObject]) -> list[str]:
    """What a flavour has too little of at most, with all that its cohort lends."""
    short = []
    for resource in flavor["resources"]:
        name = resource["name"]
        most = quantity(resource["nominalQuota"])
        lent = sum((_lent(mate, flavor["name"], name) for mate in mates), Decimal(0))
        most += min(quantity(resource["borrowingLimit"]), lent) if resource.get("borrowingLimit") is not None else lent
        if name in wanted and wanted[name] > most:
            short.append(f"{name}: needs {wanted[name]:f}, flavor {flavor['name']} has {most:f} at most")
    return short


def _lent(queue: JsonObject, flavor: str, resource: str) -> Decimal:
    quotas = [
        one
        for group in queue.get("resourceGroups", ())
        for its in group["flavors"]
        if its["name"] == flavor
        for one in its["resources"]
        if one["name"] == resource
    ]
    return sum((quantity(one["nominalQuota"] if one.get("lendingLimit") is None else one["lendingLimit"]) for one in quotas), Decimal(0))


def _cohort(queue: JsonObject) -> str | None:
    name: str | None = queue.get("cohortName") or queue.get("cohort")  # as v1beta2 and as v1beta1 call it
    return name


def _local(api: Api, profile: ClusterProfile) -> JsonObject:
    assert profile.kueue_queue is not None
    try:
        return api.get("localqueues", profile.kueue_queue)
    except NotFound as error:
        names = ", ".join(sorted(one["metadata"]["name"] for one in api.list("localqueues")[0]))
        raise NotFound(
            f"namespace {api.namespace} has no LocalQueue {profile.kueue_queue}; there {'are: ' + names if names else 'is none'}"
        ) from error


def _there(api: Api) -> bool:
    try:
        return bool(api.ask(GROUP))
    except NotFound:
        return False


def _suspended(api: Api, job: dict[str, Any]) -> bool:
    """Whether a PyTorchJob, sent as a dry run without being suspended, comes back suspended. Raises Refused, Unreachable."""
    metadata = {"name": f"{job['metadata']['name'][:50]}-asks", "namespace": api.namespace, "labels": job["metadata"]["labels"]}
    spec = {**job["spec"], "runPolicy": {**job["spec"]["runPolicy"], "suspend": False}}
    returned = api.create("pytorchjobs", {**job, "metadata": metadata, "spec": spec}, dry_run=True)
    return bool(returned["spec"].get("runPolicy", {}).get("suspend"))


def _suspended_job(api: Api) -> bool:
    """Whether a Job without a queue, sent as a dry run, comes back suspended. Raises Refused, Unreachable."""
    container = {"name": "asks", "image": "none"}
    spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "osctl-asks", "namespace": api.namespace}, "spec": spec}
    return bool(api.create("jobs", job, dry_run=True)["spec"].get("suspend"))


def _by_settings(api: Api, profile: ClusterProfile, operator: Installation) -> str:
    """By Kueue's settings, which mostly administrators alone may read."""
    framework = FRAMEWORKS[operator.name]
    try:
        settings = yaml.safe_load(api.ask(SETTINGS)["data"]["controller_manager_config.yaml"])
        frameworks = (settings.get("integrations") or {}).get("frameworks") or ()
    except (Refused, NotFound, KeyError) as error:
        raise NotChecked(f"whether Kueue holds back {framework} shows only with a job; its settings cannot be read: {error}") from error
    if profile.queue == "gang":
        if settings.get("manageJobsWithoutQueueName") and framework in frameworks:
            raise Refused(UNQUEUED)
        return "Kueue holds back no job without a queue"
    if framework not in frameworks:
        raise Refused(f"Kueue's setting integrations.frameworks has {', '.join(frameworks)}, and lacks {framework}")
    return f"Kueue holds back each {operator.said} with a queue"


def _names(requests: Sequence[Mapping[str, str]]) -> set[str]:
    return {name for pod in requests for name in pod}
