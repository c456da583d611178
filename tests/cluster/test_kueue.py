"""Laws of a pipeline in a queue of a real Kueue: it waits in Kueue's own words, is preempted, resumes. Pods are on nodes of 8 GPUs.

Nodes and agents are played (`played_kubelet`, `played_agent`); scheduler, operator, Kueue, its webhooks and the driver are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cluster.kube_rig import Drive, folder_ledger, gpu_profile, pipeline, until
from cluster.kueue_rig import Queues, queues
from cluster.played_agent import PlayedAgents
from cluster.played_kubelet import LABEL, PlayedKubelet, played_nodes

from orchestrator.kube import operator
from orchestrator.kube.client import Api
from orchestrator.kube.operator import Operator
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Pipeline

pytestmark = pytest.mark.cluster("gpus")
BOTH = [pytest.param(kind, id=kind.name) for kind in (operator.PYTORCH_JOB, operator.TRAIN_JOB)]
ONE_PROVED = [BOTH[0], pytest.param(operator.TRAIN_JOB, id="trainjob", marks=pytest.mark.prove("cluster-troubles"))]


@pytest.fixture
def kubelet(cluster: Any, api: Api) -> Iterator[PlayedKubelet]:
    with played_nodes(cluster.kubectl, api) as nodes:
        yield nodes


@pytest.fixture
def kueue(cluster: Any, kubelet: PlayedKubelet) -> Iterator[Queues]:
    with queues(cluster.kubectl, kubelet.api.namespace, kubelet.selector) as made:
        yield made


def queued(kind: Operator, namespace: str, queue: str = "train", **changes: Any) -> ClusterProfile:
    return gpu_profile(namespace, operator=kind.name, queue="kueue", kueue_queue=queue, node_selector={LABEL: namespace}, **changes)


def one_stage(profile: ClusterProfile, name: str = "demo") -> Pipeline:
    return pipeline(profile, name, (("one", None),))


@pytest.mark.parametrize("kind", ONE_PROVED)
def test_a_second_pipeline_waits_in_kueues_words_with_its_place(
    kind: Operator, api: Api, ledger: Ledger, kueue: Queues, tmp_path: Path
) -> None:
    kueue.open()
    other = folder_ledger(tmp_path / "other", "second")
    of = one_stage(queued(kind, api.namespace))
    with PlayedAgents(api, ledger, {("one", 1): [("hold",)]}), PlayedAgents(api, other), Drive.of(of, ledger, api) as first:
        first.trains("one", patience_s=60)
        with Drive.of(one_stage(queued(kind, api.namespace), "second"), other, api) as second:
            short = f"insufficient unused quota for nvidia.com/gpu in flavor {kueue.name}, 64 more needed; 1st of 1 in queue train"
            until(lambda: second.life("one").waits == short, "Kueue's reason and the place", 40)
            assert (second.life("one").waits_for, second.life("one").waits_on) == ("capacity", "quota")
            assert second.life("one").bound is None, "it holds nothing"
            first.runner.kill()
            first.ends()
            assert second.ends(90).exit_code == 0
    (inputs_digest,) = other.inputs_of("one")
    outcome = other.outcome("one", inputs_digest, 1)
    assert outcome is not None and outcome.class_ == "completed"


@pytest.mark.parametrize("kind", BOTH)
def test_a_preempted_attempt_saves_first_and_the_next_one_waits_and_goes_on(
    kind: Operator, api: Api, ledger: Ledger, kueue: Queues, tmp_path: Path, kubelet: PlayedKubelet
) -> None:
    kueue.open()
    low, high = kueue.priority("low", 1), kueue.priority("high", 100)
    other = folder_ledger(tmp_path / "other", "urgent")
    scripts = {("one", 1): [("publish", 10), ("saves", 20)]}
    of = one_stage(queued(kind, api.namespace, kueue_priority=low))
    with (
        PlayedAgents(api, ledger, scripts, kubelet=kubelet),
        PlayedAgents(api, other, {("one", 1): [("hold",)]}),
        Drive.of(of, ledger, api) as first,
    ):
        job = first.trains("one", patience_s=60)
        with Drive.of(one_stage(queued(kind, api.namespace, kueue_priority=high), "urgent"), other, api) as second:
            second.trains("one", patience_s=60)
            until(lambda: first.life("one", 2).waits_on == "quota", "the next attempt waits for quota")
            assert first.outcomes("one") == ["preempted", "open"]
            assert first.life("one", 2).bound is None, "it costs nothing"
            assert not [one for one in api.list(kind.plural)[0] if one["metadata"]["name"] == job], "Kueue cannot start it again"
            second.runner.kill()
            second.ends()
        assert first.ends(90).exit_code == 0
    (inputs_digest,) = ledger.inputs_of("one")
    ended, intent = ledger.outcome("one", inputs_digest, 1), ledger.intent("one", inputs_digest, 2)
    assert first.outcomes("one") == ["preempted", "completed"]
    assert (
        ended is not None
        and "Kueue preempted it for one attempt 1 of pipeline" in ended.reason
        and "prioritization in the ClusterQueue" in ended.reason
    )
    assert intent is not None and intent.resume is not None and intent.resume.step == 20, "it saved before it left"


@pytest.mark.parametrize("kind", ONE_PROVED)
def test_a_queue_that_is_drained_gives_its_attempts_back_and_they_go_on_when_it_is_open(
    kind: Operator, api: Api, ledger: Ledger, kueue: Queues, kubelet: PlayedKubelet
) -> None:
    whole = kueue.open()
    of = one_stage(queued(kind, api.namespace, start_deadline_s=1.0))
    with PlayedAgents(api, ledger, {("one", 1): [("publish", 10), ("saves", 20)]}, kubelet=kubelet), Drive.of(of, ledger, api) as drive:
        drive.trains("one", patience_s=60)
        kueue.stop(whole, "HoldAndDrain")
        said = f"cluster queue {whole} of queue train is stopped (HoldAndDrain)"
        until(lambda: drive.life("one", 2).waits == said, "the reason", 60)
        life = drive.life("one", 2)
        assert (life.waits_for, life.waits_on, life.bound) == ("capacity", "queue_stopped", None)
        kueue.stop(whole, "None")
        assert drive.ends(90).exit_code == 0
    (inputs_digest,) = ledger.inputs_of("one")
    ended, intent = ledger.outcome("one", inputs_digest, 1), ledger.intent("one", inputs_digest, 2)
    assert drive.outcomes("one") == ["preempted", "completed"]
    assert ended is not None and "The ClusterQueue is stopped" in ended.reason
    assert intent is not None and intent.resume is not None and intent.resume.step == 20


@pytest.mark.parametrize("kind", ONE_PROVED)
def test_a_team_gets_its_share_back_from_one_that_borrowed_it(
    kind: Operator, api: Api, kueue: Queues, kubelet: PlayedKubelet, tmp_path: Path
) -> None:
    for team in ("red", "blue"):
        kueue.open(team, gpus=32, cohort=kueue.name, fairSharing={"weight": "1"})
    ledgers = {name: folder_ledger(tmp_path / name, name) for name in ("red-1", "red-2", "blue-1")}
    drives: dict[str, Drive] = {}
    scripts = {("one", 1): [("saves", 20)]}
    with ExitStack() as stack:
        for name, ledger in ledgers.items():
            stack.enter_context(PlayedAgents(api, ledger, {("one", 1): [("hold",)]} if name == "blue-1" else scripts, kubelet=kubelet))
        for name, ledger in ledgers.items():
            of = pipeline(queued(kind, api.namespace, name.partition("-")[0]), name, (("one", None),), nodes=4)
            drives[name] = stack.enter_context(Drive.of(of, ledger, api))
            drives[name].trains("one", patience_s=60)
        reds = [drives["red-1"], drives["red-2"]]
        until(lambda: sorted(len(drive.outcomes("one")) for drive in reds) == [1, 2], "one of the red has given its nodes back")
        (taken,) = (drive for drive in reds if len(drive.outcomes("one")) == 2)
        until(lambda: taken.life("one", 2).waits_for == "capacity", "and waits")
        drives["blue-1"].runner.kill()
        drives["blue-1"].ends()
        assert taken.ends(90).exit_code == 0 and taken.outcomes("one") == ["preempted", "completed"]
