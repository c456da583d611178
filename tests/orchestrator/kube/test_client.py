"""Laws of the Kubernetes adapter: one contract on a small API server in this process and on a real one, and faults on the former alone."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.kube_rig import allow_trainers, client
from fake_api_server import FakeApiServer, Fault, serve
from tiny_attempts import PROFILE, intend

from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.kube import manifest, names
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.faults import Conflict, Expired
from orchestrator.kube.names import selector
from orchestrator.kube.watch import STALE_S, Watcher
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Life
from orchestrator.stores.folder import FolderStore

STORE = "s3://bucket/prefix"
JOBS = "/apis/kubeflow.org/v1/namespaces/osctl/pytorchjobs"
PODS = "/api/v1/namespaces/osctl/pods"


def until(holds: Callable[[], bool], what: str, patience_s: float = 5.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.01)


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    with serve() as fake:
        yield fake


def connect(url: str, folder: Path, **user: Any) -> Api:
    """By a kubeconfig, as everybody does."""
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "one",
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}], "users": [{"name": "u", "user": user}],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(path))
        return Api.connect(None, "osctl")


@pytest.fixture
def fake_api(server: FakeApiServer, tmp_path: Path) -> Iterator[Api]:
    api = connect(server.url, tmp_path)
    yield api
    api.close()


@pytest.fixture
def cluster_api(cluster: Any, namespace: str) -> Iterator[Api]:
    with client(cluster.kubeconfig, namespace) as api:
        allow_trainers(api)
        yield api


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(FolderStore(tmp_path / "store"), "demo")


class Rig:
    """A backend, and intents for it."""

    def __init__(self, api: Api, ledger: Ledger):
        self.api, self.ledger = api, ledger
        self.profile = PROFILE.model_copy(update={"namespace": api.namespace})
        self.backends: list[KubeBackend] = []
        self.backend = self.another()

    def another(self, **changes: Any) -> KubeBackend:
        """As of a driver that has seen nothing yet."""
        profile = self.profile.model_copy(update=changes)
        self.backends.append(KubeBackend(self.ledger.store, self.api, profile, STORE, pipeline="demo"))
        return self.backends[-1]

    def intend(self, number: int = 1) -> Intent:
        return intend(self.ledger, number)

    def submit(self, intent: Intent, backend: KubeBackend | None = None) -> None:
        key = self.ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt)
        (backend or self.backend).submit(key, intent.run_key)

    def name(self, intent: Intent) -> str:
        return names.job_name(STORE, intent.run_key)

    def close(self) -> None:
        for backend in self.backends:
            backend._watcher.close()


@pytest.fixture
def faked(fake_api: Api, ledger: Ledger) -> Iterator[Rig]:
    rig = Rig(fake_api, ledger)
    yield rig
    rig.close()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.cluster("gpus"))])
def rig(request: pytest.FixtureRequest, ledger: Ledger) -> Iterator[Rig]:
    if request.param == "fake":
        api: Api = request.getfixturevalue("fake_api")
    else:
        api = request.getfixturevalue("cluster_api")
    rig = Rig(api, ledger)
    yield rig
    rig.close()


# --- The contract of a backend, on both --------------------------------------------------------------------------------------------


def test_an_attempt_is_made_once_however_often_it_is_submitted(rig: Rig) -> None:
    intent = rig.intend()
    assert rig.backend.observe(intent.run_key).state == "absent"
    rig.submit(intent)
    assert rig.backend.observe(intent.run_key).state == "running", "at once, whatever the watch has seen"
    rig.submit(intent)
    rig.submit(intent, rig.another())
    (job,) = rig.api.list("pytorchjobs", selector("demo"))[0]
    assert job["metadata"]["name"] == rig.name(intent)
    assert rig.another().observe(intent.run_key).state == "running"


def test_what_is_sent_is_what_is_rendered(rig: Rig) -> None:
    intent = rig.intend()
    rig.submit(intent)
    there = rig.api.get("pytorchjobs", rig.name(intent))
    sent = manifest.pytorch_job(intent, rig.profile, STORE)
    assert there["metadata"]["annotations"] == sent["metadata"]["annotations"]
    assert names.is_ours(there, STORE, intent.run_key)


def foreign(rig: Rig, intent: Intent, **metadata: Any) -> dict[str, Any]:
    job = manifest.pytorch_job(intent, rig.profile, STORE)
    job["metadata"] |= metadata
    job["spec"]["runPolicy"]["suspend"] = True
    return rig.api.create("pytorchjobs", job)


@pytest.mark.parametrize("whose", ["nobody", "another store"])
def test_a_foreign_job_of_our_name_is_never_touched(rig: Rig, whose: str) -> None:
    intent = rig.intend()
    if whose == "nobody":
        before = foreign(rig, intent, labels={}, annotations={})
    else:
        annotations = {Annotation.STORE: "s3://other", Annotation.RUN_KEY: intent.run_key}
        before = foreign(rig, intent, annotations=annotations)
    time.sleep(0.2)  # an operator may say what it thinks of it
    with pytest.raises(Refused, match="left alone"):
        rig.submit(intent)
    assert rig.backend.observe(intent.run_key).state == "absent"
    for harm in (rig.backend.drain, rig.backend.kill, rig.backend.forget):
        harm(intent.run_key)
    after = rig.api.get("pytorchjobs", rig.name(intent))
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])
    assert after["metadata"].get("annotations", {}) == before["metadata"].get("annotations", {})


def test_our_job_with_another_specification_is_refused(rig: Rig) -> None:
    intent = rig.intend()
    rig.submit(intent)
    with pytest.raises(Refused, match="another specification"):
        rig.submit(intent, rig.another(cpu="999m"))


def test_a_job_that_somebody_deletes_is_seen_to_be_deleted(rig: Rig) -> None:
    intent = rig.intend()
    rig.submit(intent)
    assert rig.backend.observe(intent.run_key).state == "running"
    rig.api.delete("pytorchjobs", rig.name(intent), uid=rig.api.get("pytorchjobs", rig.name(intent))["metadata"]["uid"])
    seen: list[Life] = []

    def is_over() -> bool:
        seen.append(rig.backend.observe(intent.run_key))
        return seen[-1].state == "ended"

    # Of one look: on a real cluster the operator may make a pod after the deletion, which lives until it is collected.
    until(is_over, "its end", 60)
    assert seen[-1].cause == "deleted"
    later = rig.another()
    until(lambda: later.observe(intent.run_key).state == "absent", "that nobody tells a driver that comes later", 60)


def test_killed_it_is_gone_when_kill_returns_and_nobody_is_accused(rig: Rig) -> None:
    intent = rig.intend()
    rig.submit(intent)
    rig.backend.observe(intent.run_key)
    rig.backend.kill(intent.run_key)
    life = rig.backend.observe(intent.run_key)
    assert (life.state, life.cause) == ("ended", None)
    with pytest.raises(NotFound):
        rig.api.get("pytorchjobs", rig.name(intent))
    rig.backend.kill(intent.run_key)


def test_drained_it_is_suspended_and_forgotten_it_is_gone(rig: Rig) -> None:
    intent = rig.intend()
    rig.submit(intent)
    rig.backend.drain(intent.run_key)
    assert rig.api.get("pytorchjobs", rig.name(intent))["spec"]["runPolicy"]["suspend"] is True
    until(lambda: rig.backend.observe(intent.run_key).state == "ended", "its end", 20)
    assert rig.backend.observe(intent.run_key).cause is None
    rig.backend.forget(intent.run_key)
    rig.backend.forget(intent.run_key)
    with pytest.raises(NotFound):
        rig.api.get("pytorchjobs", rig.name(intent))


def test_what_looks_at_one_uid_never_changes_another(rig: Rig) -> None:
    intent = rig.intend()
    rig.submit(intent)
    with pytest.raises(Conflict):
        rig.api.delete("pytorchjobs", rig.name(intent), uid="00000000-0000-0000-0000-000000000000")
    with pytest.raises(Conflict):
        rig.api.patch("pytorchjobs", rig.name(intent), {"metadata": {"labels": {"x": "y"}}}, uid="00000000-0000-0000-0000-000000000000")
    assert "x" not in rig.api.get("pytorchjobs", rig.name(intent))["metadata"]["labels"]


def test_a_dry_run_leaves_nothing(rig: Rig) -> None:
    rig.api.create("pytorchjobs", manifest.pytorch_job(rig.intend(), rig.profile, STORE), dry_run=True)
    assert rig.api.list("pytorchjobs")[0] == []


# --- Answers that are lost, late, or no -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [None, 500, 504])
def test_an_answer_lost_after_the_effect_makes_no_second_job(faked: Rig, server: FakeApiServer, status: int | None) -> None:
    server.faults.append(Fault("POST", status=status, effect=True))
    intent = faked.intend()
    faked.submit(intent)
    assert faked.backend.observe(intent.run_key).state == "running"
    assert [type_ for _, type_, _, _ in server.changes] == ["ADDED"]


@pytest.mark.parametrize("status", [None, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_waited_for(fake_api: Api, server: FakeApiServer, status: int | None) -> None:
    server.put(f"{JOBS}/one", {"metadata": {"name": "one"}})
    server.faults.append(Fault("GET", status=status, times=2))
    assert fake_api.get("pytorchjobs", "one")["metadata"]["name"] == "one"


def test_a_fault_that_does_not_pass_is_said_after_few_requests_and_short_pauses(
    fake_api: Api, server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.append(Fault("GET", status=503, message="etcd is away", times=99))
    pauses: list[float] = []
    monkeypatch.setattr(fake_api, "_sleep", pauses.append)
    with pytest.raises(Unreachable, match="etcd is away"):
        fake_api.get("pytorchjobs", "one")
    assert len(server.requests) == len(pauses) + 1 and 2 <= len(server.requests) <= 5
    assert sum(pauses) < 3


def test_retry_after_is_honoured(fake_api: Api, server: FakeApiServer) -> None:
    server.put(f"{JOBS}/one", {"metadata": {"name": "one"}})
    server.faults.append(Fault("GET", status=429, retry_after=1))
    fake_api.get("pytorchjobs", "one")
    first, second = (at for _, _, at in server.requests)
    assert 1.0 <= second - first < 1.2
    server.faults.append(Fault("GET", status=429, retry_after=3600))
    with pytest.raises(Unreachable):
        fake_api.get("pytorchjobs", "one")
    assert len(server.requests) == 3


def test_a_refusal_is_passed_on_in_the_servers_words_and_not_repeated(faked: Rig, server: FakeApiServer) -> None:
    words = 'admission webhook "x" denied the request: spec.y is invalid'
    server.faults.append(Fault("POST", status=400, message=words, times=9))
    intent = faked.intend()
    with pytest.raises(Refused, match=re.escape("spec.y is invalid")):
        faked.submit(intent)
    assert [method for method, path, _ in server.requests if path.endswith("/pytorchjobs")] == ["POST"]
    assert faked.backend.observe(intent.run_key).state == "absent"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (500, 'Internal error occurred: failed calling webhook "v": connection refused'),
        (403, 'pytorchjobs "j" is forbidden: exceeded quota: q, requested: count/pytorchjobs.kubeflow.org=1'),
    ],
)
def test_a_fault_that_somebody_can_mend_is_remembered_since_it_began(faked: Rig, server: FakeApiServer, status: int, words: str) -> None:
    server.faults.append(Fault("POST", status=status, message=words, times=2))
    intent = faked.intend()
    seen = []
    for _ in range(2):
        with pytest.raises(Unreachable):
            faked.submit(intent)
        seen.append(faked.backend.observe(intent.run_key))
    assert seen[0] == seen[1]
    assert (seen[0].state, seen[0].waits, seen[0].waits_for) == ("absent", words, "fault")
    faked.submit(intent)
    assert faked.backend.observe(intent.run_key).state == "running"


@pytest.mark.long
def test_an_api_server_that_is_away_makes_life_unknown_and_nothing_else(faked: Rig, server: FakeApiServer) -> None:
    intent = faked.intend()
    faked.submit(intent)
    assert faked.backend.observe(intent.run_key).state == "running"
    server.down = True
    until(lambda: faked.backend.observe(intent.run_key).state == "unknown", "that it cannot be asked", STALE_S + 5)
    with pytest.raises(Unreachable):
        faked.backend.kill(intent.run_key)
    server.down = False
    until(lambda: faked.backend.observe(intent.run_key).state == "running", "that it is there", 10)
    assert list(server.objects) == [f"{JOBS}/{faked.name(intent)}"]


def test_a_server_that_was_never_there_is_unknown_and_costs_the_first_look_alone(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = connect("http://127.0.0.1:9", tmp_path)
    rig = Rig(api, ledger)
    rig.backend._patience_s = 0.5
    try:
        assert rig.backend.observe(rig.intend().run_key).state == "unknown"
        waited_for: list[float] = []
        monkeypatch.setattr(rig.backend._watcher, "wait_until_fresh", lambda patience_s: bool(waited_for.append(patience_s)))
        assert rig.backend.observe(rig.intend().run_key).state == "unknown"
        assert set(waited_for) == {0.0}
    finally:
        rig.close()
        api.close()


def test_what_one_may_not_look_at_is_refused_and_not_unknown(faked: Rig, server: FakeApiServer) -> None:
    server.faults.append(Fault("GET", "/pods", status=403, message="pods is forbidden: User cannot list", times=99))
    with pytest.raises(Refused, match="cannot list"):
        faked.backend.observe(faked.intend().run_key)


def test_a_cluster_without_the_operator_says_what_is_missing(faked: Rig, server: FakeApiServer) -> None:
    server.serves.clear()
    with pytest.raises(Refused, match="install the training operator"):
        faked.backend.observe(faked.intend().run_key)


# --- The picture -------------------------------------------------------------------------------------------------------------------


def labelled(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {Label.MANAGED_BY: names.MANAGER, Label.RUN: "r", **labels}}}


def pod(name: str, phase: str = "Running") -> dict[str, Any]:
    return {**labelled(name), "spec": {"nodeName": "n"}, "status": {"phase": phase}}


@pytest.fixture
def watcher(fake_api: Api) -> Iterator[Watcher]:
    watcher = Watcher(fake_api, selector(), silence_s=1.0)
    yield watcher
    watcher.close()


def requests(server: FakeApiServer, method: str, path: str) -> int:
    return sum((method, path) == (verb, where) for verb, where, _ in server.requests)


def test_a_change_is_seen_without_asking(server: FakeApiServer, watcher: Watcher) -> None:
    watcher.start()
    assert watcher.wait_until_fresh(5)
    server.put(f"{PODS}/a", pod("a"))
    until(lambda: bool(watcher.cache.pods("r")), "the pod")
    assert requests(server, "GET", PODS) == 1


@pytest.mark.long
@pytest.mark.parametrize("trouble", ["410", "cut", "silence"])
def test_after_any_trouble_of_a_watch_nothing_that_happened_meanwhile_is_missed(
    server: FakeApiServer, watcher: Watcher, trouble: str
) -> None:
    server.put(f"{PODS}/stays", pod("stays"))
    server.put(f"{PODS}/goes", pod("goes"))
    if trouble == "silence":
        server.faults.append(Fault(ends_with="/pods", watch=True, silent=True))
    watcher.start()
    assert watcher.wait_until_fresh(5)
    until(lambda: requests(server, "WATCH", PODS) == 1, "a watch")
    if trouble == "cut":
        server.down = True
        time.sleep(0.3)
    server.remove(f"{PODS}/goes")
    server.put(f"{PODS}/comes", pod("comes"))
    if trouble == "410":
        server.forget_history()
    server.down = False

    def there() -> set[str]:
        return {one.name for one in watcher.cache.pods("r") if one.gone is None}

    until(lambda: there() == {"stays", "comes"}, "the truth", 8)
    assert requests(server, "GET", PODS) >= 2
    until(watcher.fresh, "freshness")


def test_a_watch_that_ends_as_it_should_goes_on_without_a_list(
    server: FakeApiServer, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.kube.client.WATCH_S", 0)
    watcher.start()
    until(lambda: requests(server, "WATCH", PODS) > 5, "watches")
    assert watcher.fresh()
    assert requests(server, "GET", PODS) == 1


def test_a_list_of_many_is_read_whole(server: FakeApiServer, fake_api: Api) -> None:
    server.page = 3
    for number in range(10):
        server.put(f"{PODS}/p{number}", pod(f"p{number}"))
    assert len(fake_api.list("pods", selector())[0]) == 10


def test_the_same_change_twice_or_late_is_one_change(server: FakeApiServer, watcher: Watcher) -> None:
    watcher.start()
    assert watcher.wait_until_fresh(5)
    last = server.put(f"{PODS}/a", pod("a", "Failed"))
    until(lambda: bool(watcher.cache.pods("r")), "the pod")
    watcher.cache.on_update("pods", {**last, "status": {"phase": "Running"}})
    (seen,) = watcher.cache.pods("r")
    assert seen.over(time.time()), "an end is never unseen"


def test_a_pod_of_the_same_name_is_another_pod(server: FakeApiServer, watcher: Watcher) -> None:
    watcher.start()
    assert watcher.wait_until_fresh(5)
    server.put(f"{PODS}/a", pod("a"))
    server.remove(f"{PODS}/a")
    server.put(f"{PODS}/a", pod("a"))
    until(lambda: len(watcher.cache.pods("r")) == 2, "both")
    assert sum(one.gone is None for one in watcher.cache.pods("r")) == 1


def test_closed_it_leaves_no_thread_behind(server: FakeApiServer, fake_api: Api) -> None:
    watcher = Watcher(fake_api, selector())
    watcher.start()
    assert watcher.wait_until_fresh(5)
    until(lambda: requests(server, "WATCH", PODS) == 1, "a watch")
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("watch ")]
    assert threads
    watcher.close()
    assert not [thread.name for thread in threads if thread.is_alive()]
    watcher.close()


def test_an_old_version_is_expired(server: FakeApiServer, fake_api: Api) -> None:
    server.forget_history()
    with pytest.raises(Expired):
        list(fake_api.watch("pods", "", "0"))


# --- An operator that forgot a job -------------------------------------------------------------------------------------------------


def test_a_job_that_was_met_and_left_alone_is_touched_now_and_then(faked: Rig, server: FakeApiServer) -> None:
    now, rig = [time.time()], faked
    backend = KubeBackend(rig.ledger.store, rig.api, rig.profile, STORE, clock=lambda: now[0])
    rig.backends.append(backend)
    intent = rig.intend()
    rig.submit(intent, backend)
    path = f"{JOBS}/{rig.name(intent)}"

    def looked_at(seconds: float) -> int:
        now[0] += seconds
        for _ in range(20):
            backend.observe(intent.run_key)
        return requests(server, "PATCH", path)

    created = server.objects[path]["metadata"] | {"creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now[0]))}
    server.put(path, {**server.objects[path], "metadata": created})
    time.sleep(0.3)
    assert looked_at(60) == 0, "an operator that has not met it is down, or slow"
    server.put(path, {**server.objects[path], "status": {"conditions": [{"type": "Created", "status": "True"}]}})
    until(lambda: looked_at(0) == 1, "a touch")
    assert looked_at(5) == 1
    assert looked_at(6) == 2
    server.put(f"{PODS}/w", {**pod("w"), "metadata": labelled("w", **{Label.RUN: names.run_hash(STORE, intent.run_key)})["metadata"]})
    until(lambda: backend.observe(intent.run_key).bound is not None, "a pod")
    assert looked_at(60) == 2


def test_a_gang_that_lost_a_pod_and_got_another_is_broken_up_once(faked: Rig, server: FakeApiServer) -> None:
    intent = faked.intend()
    faked.submit(intent)
    faked.backend.observe(intent.run_key)
    label = {Label.RUN: names.run_hash(STORE, intent.run_key)}
    for life in (1, 2):
        server.put(f"{PODS}/w", {**pod("w"), "metadata": labelled("w", **label)["metadata"]})
        until(lambda life=life: len(faked.backend._cache.pods(label[Label.RUN])) == life, "a pod")  # type: ignore[misc]
        if life == 1:
            assert faked.backend.observe(intent.run_key).state == "running"
            server.remove(f"{PODS}/w")
    for _ in range(3):
        assert faked.backend.observe(intent.run_key).state == "running"
    path = f"{JOBS}/{faked.name(intent)}"
    assert requests(server, "PATCH", path) == 1 and server.objects[path]["spec"]["runPolicy"]["suspend"] is True
    server.remove(f"{PODS}/w")
    until(lambda: faked.backend.observe(intent.run_key).state == "ended", "its end")
    assert faked.backend.observe(intent.run_key).cause == "preempted"


# --- Credentials -------------------------------------------------------------------------------------------------------------------


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: one
contexts: [{name: one, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://example.com"}}]
users: [{name: u, user: {token: secret-token}}]
"""


@pytest.mark.parametrize(
    ("text", "context", "said"),
    [
        (None, None, "not found"),
        ("contexts: [", None, "kubeconfig"),
        ("[]", None, "kubeconfig"),
        (KUBECONFIG, "two", "two"),
        (KUBECONFIG.replace("cluster: c", "cluster: gone"), None, "gone"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_a_usage_error_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, context: str | None, said: str
) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(UsageError, match="KUBECONFIG") as caught:
        Api.connect(context, "osctl")
    assert said in str(caught.value) and "secret-token" not in str(caught.value)


def test_several_kubeconfigs_are_searched_for_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text(KUBECONFIG.replace("name: one", "name: other").replace("context: one", "context: other"))
    (tmp_path / "b").write_text(KUBECONFIG)
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    api = Api.connect("one", "osctl")
    assert api.server == "https://example.com"
    api.close()


def test_a_login_that_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = "exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: /nowhere/login}"
    (tmp_path / "k").write_text(KUBECONFIG.replace("token: secret-token", login))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "k"))
    api = Api.connect(None, "osctl")
    with pytest.raises(Refused, match="log in"):
        api.get("pods", "x")
    api.close()


def test_the_same_run_in_another_store_is_another_job(faked: Rig) -> None:
    intent = faked.intend()
    faked.submit(intent)
    stranger = KubeBackend(faked.ledger.store, faked.api, faked.profile, "s3://elsewhere/prefix")
    faked.backends.append(stranger)
    assert stranger.observe(intent.run_key).state == "absent"


def test_a_port_where_nobody_listens_is_told_in_the_systems_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.kube.client.TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one = [{"name": "one", "context": {"cluster": "c", "user": "u"}}]
    content = {"current-context": "one", "contexts": one, "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}]}
    (tmp_path / "kubeconfig").write_text(json.dumps({**content, "users": [{"name": "u", "user": {"token": "t"}}]}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with contextlib.closing(Api.connect(None, "osctl")) as api, pytest.raises(Unreachable) as caught:
        api.list("pods")
    assert str(caught.value) == f"http://127.0.0.1:{port}: GET /api/v1/namespaces/osctl/pods: connection refused"


def test_too_many_nodes_for_the_names_of_pods_are_refused_before_a_submission(
    faked: Rig, server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"{'p' * 40}/{'s' * 40}@000000000000/a1"
    faked.backend.check(key, 101)  # PyTorchJobs have shorter names
    server.serves = {"trainjobs"}
    of_train_jobs = faked.another()
    of_train_jobs.check(key, 100)
    with pytest.raises(Refused, match="101 nodes give pods names of 64 characters"):
        of_train_jobs.check(key, 101)
    monkeypatch.setattr("orchestrator.kube.client.TRIES", 1)
    server.down = True
    of_train_jobs.check(key, 101)  # what cannot be asked now, the submission says
    assert not [verb for verb, _, _ in server.requests if verb == "POST"]
