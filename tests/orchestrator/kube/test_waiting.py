"""Laws of the one reason why an attempt waits: the cluster's own words, capacity or fault, and the cause that counts where several hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from seen_objects import LACKS, NOW, job, note, pod, stuck, train_job, unscheduled

from orchestrator.kube.observed import Job, Notice, Pod
from orchestrator.kube.scheduler_words import is_ambiguous
from orchestrator.kube.waiting import OPERATOR_SILENT_S, why_it_waits
from orchestrator.ports import WaitCause


def why(this: Job, *pods: Pod, notices: tuple[Notice, ...] = (), now: float = NOW) -> tuple[str, str | None]:
    waiting = why_it_waits(this, pods, notices, now)
    return waiting.words, waiting.kind


def test_a_gang_that_trains_waits_for_nothing() -> None:
    assert why(job("Running"), pod(0), pod(1)) == ("", None)


def test_the_schedulers_own_words_are_passed_on() -> None:
    gang = unscheduled(0, "gang: not enough siblings\nmore"), unscheduled(1)
    assert why(job("Created"), *gang) == (LACKS, "capacity")
    assert why(job("Created"), gang[0], replace(gang[0], index=1)) == ("gang: not enough siblings", "capacity")


@pytest.mark.parametrize(
    "reason", ["ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "New"]
)
def test_a_container_that_cannot_be_started_is_a_fault_of_the_whole_gang(reason: str) -> None:
    assert why(job("Created"), pod(0), stuck(1, reason, "why\nmore")) == (f"worker-1: {reason}: why", "fault")


def test_an_image_that_cannot_be_pulled_is_one_fault_however_kubelet_puts_it() -> None:
    first = stuck(0, "ErrImagePull", "failed to pull: not found")
    again = stuck(0, "ImagePullBackOff", 'Back-off pulling image "x:1": ErrImagePull: failed to pull: not found')
    assert why(job("Created"), first) == why(job("Created"), again) == ("worker-0: ErrImagePull: failed to pull: not found", "fault")


def test_what_keeps_pods_from_being_made_is_a_fault_in_the_api_servers_words() -> None:
    quota = note("FailedCreatePod", 'Error creating: pods "j-worker-0" is forbidden: exceeded quota: q, requested: pods=1')
    assert why(job("Created"), notices=(quota,)) == (quota.message, "fault")
    assert why(job("Created"), unscheduled(0), notices=(quota,)) == (quota.message, "fault")
    assert why(job("Created"), unscheduled(0), unscheduled(1), notices=(quota,)) == (LACKS, "capacity"), "mended since"


def test_events_of_an_earlier_job_of_this_name_say_nothing() -> None:
    old = note("FailedCreatePod", "exceeded quota", about="job-0")
    assert why(job("Created"), notices=(old,))[0] == "the training operator made no pods of it"
    assert job("Created").forgotten((), (old,))


def test_a_volume_that_cannot_be_mounted_is_a_fault() -> None:
    mount = note("FailedMount", 'secret "x" not found', about="pod-0", kind="Pod")
    starting = pod(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    assert why(job("Created", pods=1), starting, notices=(mount,)) == ('worker-0: FailedMount: secret "x" not found', "fault")


def test_starting_and_pulling_are_no_faults() -> None:
    starting = pod(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    assert why(job("Created", pods=1), starting) == ("worker-0 starts", None)
    pulling = note("Pulling", "Pulling image x", about="pod-0", warning=False, kind="Pod")
    assert why(job("Created", pods=1), starting, notices=(pulling,)) == ("worker-0 starts: Pulling image x", None)


@pytest.mark.parametrize("conditions", [(), ("Created",)])
def test_a_silent_operator_is_a_fault_after_a_while_in_words_that_stay(conditions: tuple[str, ...]) -> None:
    young, old = job(*conditions, age=1), job(*conditions, age=OPERATOR_SILENT_S + 1)
    assert why(young)[1] is None and why(old)[1] == "fault"
    assert why(young)[0] == why(old)[0] == why(old, now=NOW + 100)[0] != ""


def test_a_pod_that_no_scheduler_takes_up_is_a_fault_after_a_while() -> None:
    unseen = pod(0, "Pending", conditions={"PodScheduled": {}})
    assert why(job("Created", pods=1), unseen)[1] is None
    assert why(job("Created", pods=1), unseen, now=NOW + 60) == ("no scheduler has taken up worker-0 yet", "fault")


# --- Which reason counts -----------------------------------------------------------------------------------------------------------

NO_CLAIM = (
    '0/9 nodes are available: persistentvolumeclaim "clips" not found. preemption: 0/9 nodes are available: 9 Preemption is not helpful.'
)
UNBOUND = "0/9 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"
TAINTED = "0/9 nodes are available: 1 Insufficient nvidia.com/gpu, 8 node(s) had untolerated taint {nvidia.com/gpu: present}. no new claims"
FULL_BESIDE_TAINTED = "0/12 nodes are available: 3 node(s) had untolerated taint {team: other}, 9 Insufficient nvidia.com/gpu."
ELSEWHERE = "0/12 nodes are available: 4 node(s) had untolerated taint {team: other}, 8 node(s) didn't match Pod's node affinity/selector."
NOT_MATCHED = (
    "0/9 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
    "8 node(s) didn't match Pod's node affinity/selector. preemption: 0/9 nodes are available: 9 Preemption is not helpful."
)
GANG = "rejected due to timeout after waiting 10s at plugin Coscheduling"


def cause(this: Job, *pods: Pod, notices: tuple[Notice, ...] = (), now: float = NOW) -> WaitCause | None:
    return why_it_waits(this, pods, notices, now).cause


@pytest.mark.parametrize(
    ("message", "named", "kind"),
    [
        (LACKS, "no_fit", "capacity"),
        (FULL_BESIDE_TAINTED, "no_fit", "capacity"),
        ("0/9 nodes are available: 9 node(s) were unschedulable.", "no_fit", "capacity"),
        ("0/9 nodes are available: 9 node(s) had untolerated taint {node.kubernetes.io/not-ready: }.", "no_fit", "capacity"),
        (TAINTED, "taint", "capacity"),
        (ELSEWHERE, "taint", "capacity"),
        (NOT_MATCHED, "selector", "capacity"),
        (NO_CLAIM, "volume", "fault"),
        (UNBOUND, "volume", "fault"),
        (GANG, "gang", "capacity"),
    ],
)
def test_what_the_scheduler_wrote_has_one_cause(message: str, named: str, kind: str) -> None:
    found = why_it_waits(job("Created"), [unscheduled(0, GANG), unscheduled(1, message)], (), NOW)
    assert (found.cause, found.kind) == (named, kind)
    assert found.words == (message.partition(". ")[0] if named != "gang" else GANG), "what follows is about preemption"


@pytest.mark.parametrize(
    ("reason", "message", "named"),
    [
        ("ErrImagePull", "failed to pull and unpack image", "image"),
        ("InvalidImageName", "", "image"),
        ("CreateContainerConfigError", 'secret "osctl-s3" not found', "secret"),
        ("CreateContainerError", "exec format error", "container"),
    ],
)
def test_a_container_that_cannot_be_started_has_one_cause(reason: str, message: str, named: str) -> None:
    assert cause(job("Created"), pod(0), stuck(1, reason, message)) == named


def test_a_registry_without_its_secret_is_a_missing_secret() -> None:
    no_login = note("FailedToRetrieveImagePullSecret", "Unable to retrieve some image pull secrets (registry)", about="pod-1", kind="Pod")
    refused = stuck(1, "ErrImagePull", "pull access denied")
    assert cause(job("Created"), pod(0), refused, notices=(no_login,)) == "secret"
    assert cause(job("Created"), pod(0), refused, notices=(replace(no_login, uid="pod-9"),)) == "image"


@pytest.mark.parametrize(
    ("reason", "message", "named"),
    [
        ("FailedMount", 'MountVolume.SetUp failed for volume "s3" : secret "osctl-s3" not found', "secret"),
        ("FailedMount", 'MountVolume.SetUp failed for volume "clips": mount failed: exit status 32', "volume"),
        ("FailedAttachVolume", "Multi-Attach error", "volume"),
        ("FailedCreatePodSandBox", "network plugin is not ready", "container"),
    ],
)
def test_a_pod_that_its_node_cannot_start_has_one_cause(reason: str, message: str, named: str) -> None:
    starting = pod(0, "Pending", state={"waiting": {"reason": "ContainerCreating"}})
    assert cause(job("Created", pods=1), starting, notices=(note(reason, message, about="pod-0", kind="Pod"),)) == named


def test_an_operator_that_is_away_and_a_webhook_that_is_down_are_told_apart() -> None:
    assert cause(job(age=OPERATOR_SILENT_S + 1)) == "operator"
    down = note("FailedCreatePod", 'Internal error occurred: failed calling webhook "mpod.kb.io": connection refused')
    assert cause(job("Created"), notices=(down,)) == "webhook"
    assert cause(job("Created"), notices=(note("FailedCreatePod", "exceeded quota: q"),)) == "refused"


def test_nodes_that_are_held_while_others_are_not_there_are_a_fault_since_the_last_was_bound() -> None:
    held = replace(pod(0, "Pending"), bound=NOW - 40), replace(pod(1), bound=NOW - 30)
    found = why_it_waits(job("Created", pods=3), [*held, unscheduled(2)], (), NOW)
    assert (found.cause, found.kind, found.since) == ("gang", "fault", NOW - 30)
    assert found.words == f"1 of 3 pods have no node ({LACKS}); 2 hold theirs and wait"


def test_a_fault_of_one_pod_comes_before_what_the_others_wait_for() -> None:
    assert cause(job("Created"), stuck(0, "ErrImagePull"), unscheduled(1)) == "image"
    refused = note("FailedCreatePod", "exceeded quota: q")
    assert cause(job("Created", pods=3), unscheduled(0), unscheduled(1), notices=(refused,)) == "refused"


def test_a_message_that_two_causes_give_is_told_by_the_nodes() -> None:
    assert is_ambiguous(ELSEWHERE)
    for clear in (LACKS, TAINTED, FULL_BESIDE_TAINTED, NOT_MATCHED, NO_CLAIM, GANG):
        assert not is_ambiguous(clear)


def test_of_a_train_job_the_child_that_makes_no_pods_is_asked_and_named() -> None:
    """Trainer makes a JobSet, that a Job, and that the pods; events about each lie on each."""
    assert why(train_job(), now=NOW + OPERATOR_SILENT_S) == ("Kubeflow Trainer has not taken it up", "fault")
    assert why(train_job(ready=0), now=NOW + OPERATOR_SILENT_S) == ("JobSet made no pods of it", "fault")
    quota = note("FailedCreate", "Error creating: pods is forbidden: exceeded quota: q", about="child", kind="Job")
    assert why(train_job(ready=0), notices=(quota,)) == (quota.message, "fault")
    webhook = note("TrainJobResourcesCreationFailed", "TrainJob resources reconciliation failed: failed calling webhook", kind="TrainJob")
    assert why(train_job(), notices=(webhook,)) == (webhook.message, "fault")
    assert why(job("Created"), notices=(quota,))[0] == "the training operator made no pods of it", "a PyTorchJob has no such child"
