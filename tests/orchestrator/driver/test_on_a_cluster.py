"""Laws of the driver on a cluster, which takes things away and says why something waits."""

from __future__ import annotations

import pytest
from driver_rig import CHAIN, Rig, whole
from effect_fates import Crash

from opensora import identity
from orchestrator.errors import Unreachable
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Pipeline

PROFILE = ClusterProfile.model_validate(
    {
        "name": "test", "image": "t", "driver_image": "d", "allow_unpinned": ("t", "d"), "device": "cpu-core", "cpu": "1", "memory": "1Gi",
        "shm": "64Mi", "start_deadline_s": 60,
    }
)  # fmt: skip
CLUSTER = CHAIN.model_copy(update={"backend": "kubernetes", "cluster": PROFILE})


def ends(rig: Rig, of: Pipeline = CLUSTER) -> tuple[int, list[str]]:
    result = rig.launch(of)
    (inputs_digest, *_) = rig.ledger.inputs_of("two")
    for number, class_ in enumerate(rig.outcomes("two"), 1):
        assert class_ == "open" or f"demo/two@{inputs_digest}/a{number}" in rig.backend.forgotten
    return result.exit_code, rig.outcomes("two")


def test_what_the_cluster_takes_away_is_started_again_and_not_counted(rig: Rig) -> None:
    for number in range(1, 8):
        rig.backend.scripts["two", number] = [("publish", number * 2), ("vanish", "preempted")]
    assert ends(rig) == (0, ["preempted"] * 7 + ["completed"])


def test_ten_preemptions_in_a_row_without_a_checkpoint_do_not_end_a_run(rig: Rig) -> None:
    for number in range(1, 11):
        rig.backend.scripts["two", number] = [("step",), ("vanish", "preempted")]
    assert ends(rig) == (0, ["preempted"] * 10 + ["completed"])


def test_saved_for_somebody_else_it_goes_on_by_itself(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("publish", 10), ("end", "drained")]
    assert ends(rig) == (0, ["preempted", "completed"])


def test_killed_for_memory_it_is_tried_once_more(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = rig.backend.scripts["two", 2] = [("step",), ("vanish", "oom_killed")]
    assert ends(rig) == (3, ["oom_killed", "oom_killed"])


def test_a_job_that_somebody_deletes_is_not_made_again_until_somebody_asks(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("publish", 10), ("vanish", "deleted")]
    result = rig.launch(CLUSTER)
    assert result.exit_code == 3
    assert "deleted by someone else" in result.reason and "osctl resume" in result.reason and "step 10" in result.reason
    assert rig.outcomes("two") == ["lost"]
    assert ends(rig) == (0, ["lost", "completed"])


@pytest.mark.parametrize("traces", [True, False])
def test_a_job_deleted_while_no_driver_looked_is_found_out(rig: Rig, traces: bool) -> None:
    def die() -> None:
        raise Crash

    if not traces:
        rig.backend._journal = lambda body: None  # type: ignore[method-assign]
    rig.backend.scripts["one", 1] = [("step",), ("do", die), ("deleted",)]
    with pytest.raises(Crash):
        rig.launch(CLUSTER)
    rig.clock.time += 60
    rig.backend.live()
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("one")) == (3, ["lost"])
    assert "deleted by someone else" in result.reason
    assert rig.launch(CLUSTER).exit_code == 0


def test_a_job_that_a_dead_driver_killed_is_not_taken_for_deleted(rig: Rig) -> None:
    runner = rig.runner(CLUSTER)

    def kill_and_die(run_key: str) -> None:
        del rig.backend.bodies[run_key]
        raise Crash

    rig.backend.kill = kill_and_die  # type: ignore[method-assign]
    rig.backend.scripts["one", 1] = [("step",), ("do", runner.kill), *[("step",)] * 50]
    with pytest.raises(Crash):
        runner.run()
    rig.clock.time += 60
    assert rig.launch(CLUSTER).exit_code == 0
    assert rig.outcomes("one") == ["lost", "completed"]


def test_what_the_cluster_refuses_ends_with_4_in_its_words_and_nothing_stays_open(rig: Rig) -> None:
    rig.backend.refusals["two", 1] = 'admission webhook "x" denied the request: no'
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("two")) == (4, ["refused"])
    assert "denied the request: no" in result.reason
    assert ends(rig) == (0, ["refused", "completed"])


def test_a_fault_that_nobody_mends_ends_at_the_deadline_and_says_why(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("waits", "worker-0: ErrImagePull: not found", "fault"), *[("step",)] * 2000]
    began = rig.clock.time
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("two")) == (3, ["unstarted"])
    assert "ErrImagePull: not found" in result.reason and "60 s" in result.reason
    assert 60 <= rig.clock.time - began < 70
    assert sum("ErrImagePull" in said for said in rig.kinds("observed")) == 2, "once while it waited, and once when it was killed"


def test_a_fault_that_is_mended_in_time_only_delays(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("waits", "exceeded quota", "fault"), *[("step",)] * 300, ("waits", "", None), *whole()]
    assert ends(rig) == (0, ["completed"])


@pytest.mark.long
def test_a_wait_for_devices_has_no_end_and_is_said_once(rig: Rig) -> None:
    rig.backend.scripts["two", 1] = [("waits", "0/9 nodes are available", "capacity"), *[("step",)] * 9000, ("waits", "", None), *whole()]
    assert ends(rig) == (0, ["completed"])
    assert rig.clock.slept > 900
    assert sum("0/9 nodes" in said for said in rig.kinds("observed")) == 1


def test_a_job_that_cannot_be_made_ends_at_the_deadline_too(rig: Rig) -> None:
    rig.launch(CLUSTER, "one")
    (inputs_digest,) = rig.ledger.inputs_of("one")
    parent = rig.ledger.committed("one", inputs_digest)
    assert parent is not None
    two = identity.name(CLUSTER.stage("two").config, 1, parent.digest())
    rig.backend.faults[f"demo/two@{two}/a1"] = "failed calling webhook: connection refused"
    result = rig.launch(CLUSTER)
    assert (result.exit_code, rig.outcomes("two")) == (3, ["unstarted"])
    assert "failed calling webhook" in result.reason
    assert sum("failed calling webhook" in said for said in rig.kinds("observed")) == 1
    rig.backend.faults.clear()
    assert ends(rig) == (0, ["unstarted", "completed"])


def test_a_backend_that_cannot_tidy_up_keeps_nobody_waiting(rig: Rig) -> None:
    asked = []

    def away(run_key: str) -> None:
        asked.append(run_key)
        raise Unreachable("api: away")

    rig.backend.forget = away  # type: ignore[method-assign]
    assert rig.launch(CLUSTER).exit_code == 0
    assert len(asked) >= 3
