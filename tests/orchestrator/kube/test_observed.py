"""Laws of reading one object of Kubernetes: what is kept of it, and whose clock counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from seen_objects import NOW, OWNER, job, note, pod, stamp, train_job, unscheduled

from orchestrator.kube.observed import when


def test_what_was_seen_of_a_pod_is_kept_when_its_status_is_gone() -> None:
    marked = pod(0, conditions={"DisruptionTarget": {"status": "True", "reason": "EvictionByEvictionAPI"}})
    later = pod(0, "Failed", state={"terminated": {"exitCode": 137, "finishedAt": stamp(NOW)}}).after(marked)
    assert later.preempted and later.failed == (int(NOW), 137)
    assert pod(0, "Failed").after(later).failed == later.failed
    assert pod(0, seen=NOW + 9).after(marked).bound == marked.bound


@given(st.floats(-5, 5), st.integers(0, 1_000))
def test_our_clock_counts_within_the_second_that_kubernetes_names(offset: float, second: int) -> None:
    told_time = when(float(second), second + offset)
    assert second <= told_time < second + 1
    assert told_time == second + offset or not 0 <= offset < 1


def test_only_a_job_that_was_met_and_left_alone_is_forgotten() -> None:
    assert job("Created").forgotten((), ())
    assert not job().forgotten((), ())
    assert not job("Created").forgotten([unscheduled(0)], ())
    assert not job("Created", "Running").forgotten((), ())
    assert not job("Created", "Suspended", suspend=True).forgotten((), ())
    assert not job("Created").forgotten((), (note("FailedCreatePod", "exceeded quota"),))


# --- TrainJobs ------------------------------------------------------------------------------------------------------------------------


def test_a_train_job_is_read_by_its_conditions_that_are_true() -> None:
    """After a resume its conditions still hold Suspended, as false: another reader took the newest of the list for its state."""
    resumed = train_job("-Suspended", ready=1)
    assert (resumed.conditions & {"Suspended"}, resumed.finished, resumed.has_run) == (frozenset(), False, True)
    assert (resumed.owner, resumed.pods, resumed.plural) == (OWNER, 2, "trainjobs")
    done = train_job("-Suspended", "Complete", succeeded=1)
    assert done.finished and done.has_run and done.completed == NOW
    assert train_job("Failed").finished and not train_job().finished


def test_a_queue_holds_a_train_job_back_until_it_was_let_go_once() -> None:
    """Kueue writes the places of pods first (generation 2) and then lets it go; a job that it takes back has a later generation."""
    for generation in (1, 2):
        assert train_job("Suspended", suspend=True, queue="train", generation=generation).held_back
    for generation in (4, 5):
        taken = train_job("Suspended", suspend=True, queue="train", generation=generation)
        assert taken.has_run and not taken.held_back
    assert not train_job("Suspended", suspend=True, queue="train", asked=True).held_back


def test_no_train_job_is_taken_for_one_that_the_training_operator_forgot() -> None:
    assert not train_job(ready=0).forgotten((), ())
    assert train_job().conditions == frozenset() and train_job(ready=0).conditions == {"Created"}, "whether it was taken up"
