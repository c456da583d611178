"""Laws of which kinds of jobs a cluster serves: each combination is named, and one that comes later is found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_api_server import FakeApiServer, Fault
from kube_objects import STORE
from tiny_attempts import PROFILE, intend

from orchestrator.errors import Refused
from orchestrator.kube import discovery, operator
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.names import selector
from orchestrator.kube.watch import Watcher
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.stores.folder import FolderStore

V1, V2 = operator.PYTORCH_JOB, operator.TRAIN_JOB
BOTH = {"pytorchjobs", "trainjobs"}
HERE = PROFILE.model_copy(update={"namespace": "osctl"})


@pytest.fixture
def watcher(api: Api) -> Iterator[Watcher]:
    watcher = Watcher(api, selector())
    watcher.start()
    yield watcher
    watcher.close()


def until(holds: Callable[[], object], what: str, patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.02)


@pytest.mark.parametrize("kinds", [set(), {"pytorchjobs"}, {"trainjobs"}, BOTH])
def test_what_is_served_is_found(server: FakeApiServer, api: Api, kinds: set[str]) -> None:
    server.serves = kinds
    assert {one.plural for one in discovery.served(api)} == kinds


@pytest.mark.parametrize(
    ("wanted", "served", "kind"),
    [("auto", (V1,), V1), ("auto", (V2,), V2), ("auto", (V1, V2), V1), ("trainjob", (V1, V2), V2), ("pytorchjob", (V1, V2), V1)],
)
def test_auto_takes_what_there_is_and_a_profile_may_insist(
    wanted: str, served: tuple[operator.Operator, ...], kind: operator.Operator
) -> None:
    assert discovery.chosen(HERE.model_copy(update={"operator": wanted}), served, "https://c") is kind


@pytest.mark.parametrize(
    ("wanted", "served", "words"),
    [
        ("auto", (), "knows neither pytorchjobs nor trainjobs; install the training operator .* or install Kubeflow Trainer v2 and JobSet"),
        ("trainjob", (V1,), "the profile says operator: trainjob, and the cluster has only pytorchjobs; install Kubeflow Trainer v2"),
        ("pytorchjob", (V2,), "the profile says operator: pytorchjob, and the cluster has only trainjobs; install the training operator"),
    ],
)
def test_what_is_not_there_is_named_with_what_to_install(wanted: str, served: tuple[operator.Operator, ...], words: str) -> None:
    with pytest.raises(Refused, match=words):
        discovery.chosen(HERE.model_copy(update={"operator": wanted}), served, "https://c")


def test_a_profile_that_names_no_operator_is_written_as_before() -> None:
    assert "operator" not in HERE.model_dump(mode="json")
    named = HERE.model_copy(update={"operator": "trainjob"})
    assert ClusterProfile.model_validate(named.model_dump(mode="json")).operator == "trainjob"


# --- Watches --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{"pytorchjobs"}, {"trainjobs"}, BOTH])
def test_a_kind_that_is_not_there_keeps_no_cache_from_being_fresh(server: FakeApiServer, watcher: Watcher, kinds: set[str]) -> None:
    server.serves = kinds
    until(lambda: {one.plural for one in watcher.served()} == kinds, "what is served")
    assert watcher.wait_until_fresh(5) and watcher.why() == ""

    def watched() -> set[str]:
        return {path.rpartition("/")[2] for method, path, _ in server.requests if method == "WATCH"}

    until(lambda: kinds <= watched(), "watches of what is served")
    assert watched() <= kinds | {"pods", "events"}


def test_a_cluster_without_any_says_what_to_install_until_there_is_one(server: FakeApiServer, api: Api) -> None:
    server.serves = set()
    watcher = Watcher(api, selector())
    try:
        watcher.start()
        with pytest.raises(Refused, match="neither pytorchjobs nor trainjobs; install"):
            watcher.wait_until_fresh(5)
        server.serves = {"trainjobs"}
        until(lambda: [one.plural for one in watcher.served()] == ["trainjobs"], "what was installed")
        assert watcher.wait_until_fresh(5)
    finally:
        watcher.close()


def test_a_kind_that_is_installed_later_is_watched_and_one_that_goes_takes_its_jobs_along(server: FakeApiServer, watcher: Watcher) -> None:
    path = f"{V2.api}/namespaces/osctl/trainjobs/one"
    job = {"metadata": {"name": "one", "labels": {"app.kubernetes.io/managed-by": "osctl"}}, "spec": {"trainer": {"numNodes": 2}}}
    assert watcher.wait_until_fresh(5) and watcher.cache.job("one") is None
    server.put(path, job)
    server.serves = BOTH
    until(lambda: (seen := watcher.cache.job("one")) is not None and seen.pods == 2, "the job of the new kind")
    until(lambda: watcher.fresh(), "freshness")
    server.serves = {"pytorchjobs"}
    server.forget_history()  # the server ends the watches of a kind that it forgets
    until(lambda: (seen := watcher.cache.job("one")) is not None and seen.gone is not None, "it is gone")
    assert watcher.wait_until_fresh(5)


def test_a_right_that_lacks_for_one_kind_is_named(server: FakeApiServer, api: Api) -> None:
    server.serves = BOTH
    server.faults.append(Fault("GET", "/trainjobs", status=403, message='trainjobs is forbidden: User "x" cannot list', times=10**6))
    watcher = Watcher(api, selector())
    try:
        watcher.start()
        with pytest.raises(Refused, match=r"cannot list; the cluster serves trainjobs, and an attempt may be one: grant that right"):
            watcher.wait_until_fresh(5)
    finally:
        watcher.close()


# --- A backend ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["pytorchjob", "trainjob"])
def test_an_attempt_is_made_once_whatever_kind_the_profile_says_next(server: FakeApiServer, api: Api, tmp_path: Path, first: str) -> None:
    server.serves = BOTH
    ledger = Ledger(FolderStore(tmp_path / "store"), "demo")
    intent = intend(ledger)
    key = ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt)
    for name in (first, "trainjob", "pytorchjob", "auto"):
        backend = KubeBackend(ledger.store, api, HERE.model_copy(update={"operator": name}), STORE)
        try:
            backend.submit(key, intent.run_key)
            assert backend.observe(intent.run_key).state == "running", name
        finally:
            backend._watcher.close()
    made = [path for method, path, _ in server.requests if method == "POST" and path.rpartition("/")[2] in BOTH]
    assert set(made) == {f"{operator.BY_NAME[first].api}/namespaces/osctl/{operator.BY_NAME[first].plural}"}
    jobs = [path for path in server.objects if path.rpartition("/")[0].rpartition("/")[2] in BOTH]
    assert len(jobs) == 1


def test_a_webhook_that_does_not_see_the_runtime_yet_is_asked_again(server: FakeApiServer, api: Api, tmp_path: Path) -> None:
    server.serves = {"trainjobs"}
    words = "admission webhook denied the request: specified trainingRuntime must be created before the TrainJob is created"
    server.faults.append(Fault("POST", "/trainjobs", status=403, message=words, times=2))
    ledger = Ledger(FolderStore(tmp_path / "store"), "demo")
    intent = intend(ledger)
    backend = KubeBackend(ledger.store, api, HERE, STORE)
    try:
        backend.submit(ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt), intent.run_key)
    finally:
        backend._watcher.close()
    assert [path for method, path, _ in server.requests if method == "POST"][-1].endswith("/trainjobs")
    runtime = next(thing for path, thing in server.objects.items() if "/trainingruntimes/" in path)
    assert [one["kind"] for one in runtime["metadata"]["ownerReferences"]] == ["TrainJob"]
