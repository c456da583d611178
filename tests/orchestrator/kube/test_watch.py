"""Laws of the watches: no fault ends one in silence and no odd object hides the others."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_api_server import FakeApiServer
from kube_objects import JOB, KEY, STORE, event, job, labelled, pod
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException
from tiny_attempts import PROFILE, intend
from urllib3.exceptions import ProtocolError, ReadTimeoutError

from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.kube import manifest, names, watch
from orchestrator.kube.backend import KubeBackend
from orchestrator.kube.client import Api
from orchestrator.kube.names import selector
from orchestrator.kube.watch import Watcher
from orchestrator.labels import Label
from orchestrator.ledger.store import Ledger
from orchestrator.stores.folder import FolderStore

TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"
PODS, JOBS, EVENTS, TRAIN_JOBS = (
    f"{base}/namespaces/osctl/{kind}"
    for base, kind in (("/api/v1", "pods"), ("/apis/kubeflow.org/v1", "pytorchjobs"), ("/api/v1", "events"), (TRAINER, "trainjobs"))
)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


FAULTS: list[Callable[[], BaseException]] = [
    lambda: Unreachable("no answer"),
    lambda: Refused("no right"),
    lambda: NotFound("no such kind"),
    lambda: UsageError("no kubeconfig"),
    lambda: ConfigException("exec: process returned 1"),
    lambda: ConfigException("Service token file does not exist."),
    lambda: ApiException(status=0, reason="SSLError\ncertificate has expired"),
    lambda: ApiException(status=500, reason="odd"),
    lambda: ProtocolError("Connection broken"),
    lambda: ReadTimeoutError(None, "/", "Read timed out."),  # type: ignore[arg-type]
    lambda: ssl.SSLError("bad record"),
    lambda: OSError(24, "Too many open files"),
    lambda: PermissionError(13, "token"),
    lambda: FileNotFoundError(2, "aws"),
    lambda: ConnectionResetError(104, "reset"),
    lambda: TimeoutError("late"),
    lambda: subprocess.TimeoutExpired("aws", 5),
    lambda: ValueError("odd value"),
    lambda: KeyError("metadata"),
    lambda: TypeError("'NoneType' object is not subscriptable"),
    lambda: AttributeError("get"),
    lambda: IndexError("list index out of range"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    lambda: json.JSONDecodeError("Expecting value", "<html>", 0),
    lambda: RecursionError("maximum recursion depth exceeded"),
    lambda: MemoryError(),
    lambda: ArithmeticError("odd"),
    lambda: AssertionError("odd"),
    lambda: RuntimeError("cannot start new thread"),
    lambda: StopIteration(),
    lambda: SystemExit(1),
    lambda: KeyboardInterrupt(),
    lambda: Unspeakable(),
]


class Faulty:
    """The real client, but for faults that are thrown where it is told to."""

    def __init__(self, api: Api):
        self._api = api
        self.server = api.server
        self.throws: dict[tuple[str, str], list[Callable[[], BaseException]]] = {}
        """What is still to be thrown, by place and kind."""
        self.always: Callable[[], BaseException] | None = None
        self.holds: threading.Event | None = None
        """Nothing is answered until it is set."""

    def _throw(self, place: str, kind: str) -> None:
        if self.holds is not None:
            self.holds.wait(10)
        if self.always is not None:
            raise self.always()
        if waiting := self.throws.get((place, kind)):
            raise waiting.pop()()

    def ask(self, path: str) -> Any:
        return self._api.ask(path)

    def list(self, kind: str, selector: str = "") -> Any:
        self._throw("list", kind)
        return self._api.list(kind, selector)

    def watch(self, kind: str, selector: str, version: str, *, silence_s: float) -> Any:
        self._throw("open", kind)
        stream = self._api.watch(kind, selector, version, silence_s=silence_s)
        changes = iter(stream.changes)

        class Read:
            def __iter__(self) -> Any:
                return self

            def __next__(_: Any) -> Any:
                self._throw("read", kind)
                return next(changes)

        stream.changes = Read()  # type: ignore[assignment]
        return stream


def until(holds: Callable[[], Any], what: str, patience_s: float = 8.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.01)


@pytest.fixture
def faulty(api: Api) -> Faulty:
    return Faulty(api)


class Listener:
    def __init__(self) -> None:
        self.throws: list[Callable[[], BaseException]] = []
        self.called = 0

    def __call__(self) -> None:
        self.called += 1
        if self.throws:
            raise self.throws.pop()()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def watcher(faulty: Faulty, listener: Listener) -> Iterator[Watcher]:
    watcher = Watcher(faulty, selector(), listener)  # type: ignore[arg-type]
    yield watcher
    faulty.always = None
    watcher.close()


def alive() -> int:
    return sum(thread.name.startswith("watch ") for thread in threading.enumerate())


def lines(caplog: pytest.LogCaptureFixture, word: str = "") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == watch.__name__ and word in record.getMessage()]


# --- Faults ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("place", ["list", "open", "read", "listener"])
def test_no_fault_ends_a_watch_in_silence(
    server: FakeApiServer, faulty: Faulty, watcher: Watcher, listener: Listener, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    assert len(FAULTS) >= 30
    server.serves.add("trainjobs")
    caplog.set_level(logging.INFO)
    if place == "listener":
        listener.throws = list(FAULTS)
    else:
        faulty.throws = {(place, kind): list(FAULTS) for kind in ("pytorchjobs", "trainjobs", "pods", "events")}
    watcher.start()

    def thrown() -> bool:
        server.put(f"{PODS}/again", pod("again"))  # what is read, and told of
        server.put(f"{JOBS}/{JOB}", job())
        server.put(f"{TRAIN_JOBS}/other", labelled("other", spec={}))
        server.put(f"{EVENTS}/e", event(JOB, kind="PyTorchJob"))
        time.sleep(0.02)
        return not listener.throws and not any(faulty.throws.values())

    until(thrown, f"{place}: all are thrown", 60)
    assert alive() == 4, f"{place}: a thread has ended"
    server.put(f"{PODS}/later", pod("later"))
    until(lambda: {one.name for one in watcher.cache.pods("r")} == {"again", "later"}, "what came later is seen")
    until(lambda: watcher._was_fresh and watcher.fresh(), "freshness")
    said = lines(caplog)
    for name in (
        "no answer",
        "process returned 1",
        "ValueError",
        "RecursionError",
        "MemoryError",
        "SystemExit",
        "KeyboardInterrupt",
        "Unspeakable",
    ):
        assert any(name in line for line in said), f"{place}: {name} is not said"


def test_a_fault_that_stays_is_said_once_makes_life_unknown_and_is_mended_by_a_list(
    server: FakeApiServer, api: Api, faulty: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STALE_S", 0.2)
    caplog.set_level(logging.INFO)
    backend = KubeBackend(FolderStore(tmp_path / "store"), faulty, PROFILE, STORE)  # type: ignore[arg-type]
    server.put(f"{JOBS}/{JOB}", job())
    server.put(f"{PODS}/{JOB}-worker-0", pod(f"{JOB}-worker-0", **labelled(f"{JOB}-worker-0", names.run_hash(STORE, KEY))))
    try:
        assert backend.observe(KEY).state == "running"
        faulty.always = lambda: ValueError("odd")
        for kind in (PODS, JOBS):
            server.tell(kind, {"metadata": {}}, "BOOKMARK")
        until(lambda: backend.observe(KEY).state == "unknown", "that nobody watches")
        assert not backend._watcher.fresh()
        server.remove(f"{PODS}/{JOB}-worker-0")
        time.sleep(0.3)
        assert [len(lines(caplog, f"watch of {kind}: ValueError: odd")) for kind in ("pods", "pytorchjobs")] == [1, 1]
        faulty.always = None
        until(lambda: backend._watcher.fresh(), "freshness")
        until(lambda: all(one.gone for one in backend._cache.pods(names.run_hash(STORE, KEY))), "what went meanwhile")
    finally:
        faulty.always = None
        backend._watcher.close()


def test_an_outage_is_one_plain_sentence_for_all_watches(
    server: FakeApiServer, watcher: Watcher, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STALE_S", 0.2)
    monkeypatch.setattr("orchestrator.kube.client.TRIES", 1)
    caplog.set_level(logging.INFO)
    watcher.start()
    assert watcher.wait_until_fresh(5)
    server.down = True
    until(lambda: watcher._faults.keys() >= {"pods", "pytorchjobs", "events"}, "that each watch has met it", 5)
    until(lambda: not watcher.fresh(), "that nobody watches", 5)
    assert lines(caplog) == [
        f"{server.url}: cannot be watched now (the connection broke); osctl goes on asking, and reads anew what it missed"
    ]


def test_a_login_that_hangs_between_two_watches_is_not_taken_for_quiet(
    server: FakeApiServer, faulty: Faulty, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STALE_S", 0.2)
    monkeypatch.setattr("orchestrator.kube.client.WATCH_S", 1)
    watcher.start()
    assert watcher.wait_until_fresh(5)
    faulty.holds = threading.Event()
    until(lambda: not watcher.fresh(), "that nobody watches", 5)
    faulty.holds.set()
    faulty.holds = None
    until(watcher.fresh, "freshness", 5)


def test_a_right_that_goes_is_unknown_and_one_that_was_never_there_is_refused(
    server: FakeApiServer, faulty: Faulty, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STALE_S", 0.2)
    faulty.always = lambda: Refused("pods is forbidden")
    watcher.start()
    with pytest.raises(Refused, match="forbidden"):
        watcher.wait_until_fresh(5)
    faulty.always = None
    until(lambda: watcher._was_fresh, "freshness")
    faulty.always = lambda: Refused("pods is forbidden")
    for kind in (PODS, JOBS):
        server.tell(kind, {"metadata": {}}, "BOOKMARK")
    until(lambda: not watcher.fresh(), "that nobody watches")
    assert "forbidden" in watcher.why()


# --- Odd objects -------------------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, 5, "pod", [], {}, {"metadata": None}, {"metadata": {}}, {"metadata": []}, {"metadata": {"name": 5, "uid": "u"}},
    {"metadata": {"name": "x", "uid": None}}, {"metadata": {"uid": "x"}}, {"metadata": {"name": None, "uid": "u"}},
]  # fmt: skip
ODD_PODS: list[Any] = [
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u", "labels": []}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u", "labels": {Label.REPLICA_INDEX: "x"}}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u", "labels": {Label.RUN: 7}}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u", "creationTimestamp": 5}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u", "creationTimestamp": "yesterday"}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, status={"phase": 7}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, status={"conditions": "none"}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, status={"conditions": [None]}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, status={"containerStatuses": [5]}),
    pod(
        "odd",
        metadata={**labelled("odd")["metadata"], "uid": "u"},
        status={"containerStatuses": [{"state": {"terminated": {"exitCode": "x"}}}]},
    ),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, status={"containerStatuses": [{"state": {"waiting": {"reason": 7}}}]}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, spec={"nodeName": 5}),
    pod("odd", metadata={**labelled("odd")["metadata"], "uid": "u"}, spec=[1]),
]


@pytest.mark.parametrize("way", ["list", "watch"])
def test_an_odd_object_is_skipped_with_one_line_and_the_others_are_seen(
    server: FakeApiServer, watcher: Watcher, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.INFO)
    odd = [*ODD, *ODD_PODS]
    server.put(f"{PODS}/before", pod("before"))
    if way == "list":
        server.odd = odd
    watcher.start()
    assert watcher.wait_until_fresh(5)
    for _ in range(2):
        for one in odd if way == "watch" else ():
            server.tell(PODS, one)
    server.put(f"{PODS}/after", pod("after"))
    server.put(f"{JOBS}/{JOB}", job())
    until(lambda: {one.name for one in watcher.cache.pods("r")} >= {"before", "after"}, "the others")
    until(lambda: watcher.cache.job(JOB), "jobs")
    assert watcher.wait_until_fresh(5) and alive() == 4
    said = lines(caplog, "watch of pods")
    assert len(said) == len(set(said)) and len(said) >= len(ODD)
    assert any("odd" in line for line in said)


def test_events_of_any_shape_never_reach_whoever_asks(server: FakeApiServer, watcher: Watcher) -> None:
    watcher.start()
    until(lambda: ("WATCH", EVENTS) in {(verb, path) for verb, path, _ in server.requests}, "a watch")
    server.put(f"{JOBS}/{JOB}", job())
    for odd in (
        {"involvedObject": None},
        {"involvedObject": {"name": 5}},
        {"reason": 7},
        {"message": []},
        {"lastTimestamp": 5},
        {"type": {}},
    ):
        server.tell(EVENTS, {**event(JOB, kind="PyTorchJob"), **odd})
    server.tell(EVENTS, event(JOB, "Seen", kind="PyTorchJob"))
    until(lambda: any(note.reason == "Seen" for note in watcher.cache.notices(JOB)), "a good one")
    assert all(isinstance(word, str) for note in watcher.cache.notices(JOB) for word in (note.reason, note.message, note.about))


def test_what_is_asked_of_a_job_with_an_unreadable_pod_is_unknown_until_it_can_be_read(
    server: FakeApiServer, api: Api, tmp_path: Path
) -> None:
    backend = KubeBackend(FolderStore(tmp_path / "store"), api, PROFILE, STORE)
    name, run = f"{JOB}-worker-0", names.run_hash(STORE, KEY)
    server.put(f"{JOBS}/{JOB}", job())
    server.put(f"{PODS}/{name}", {**pod(name), **labelled(name, run)})
    try:
        assert backend.observe(KEY).state == "running"
        server.put(f"{PODS}/{name}", {**pod(name), **labelled(name, run), "status": {"phase": 7}})
        until(lambda: backend.observe(KEY).state == "unknown", "that it cannot be read")
        server.put(f"{PODS}/{name}", {**pod(name), **labelled(name, run)})
        until(lambda: backend.observe(KEY).state == "running", "that it can")
    finally:
        backend._watcher.close()


def test_a_submission_sees_what_its_intent_says(api: Api, server: FakeApiServer, tmp_path: Path) -> None:
    """The whole way with the official models, against the server: what was sent is what was described."""
    ledger = Ledger(FolderStore(tmp_path / "store"), "demo")
    intent = intend(ledger, 1)
    backend = KubeBackend(ledger.store, api, PROFILE.model_copy(update={"namespace": "osctl"}), STORE)
    backend.submit(ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt), intent.run_key)
    (stored,) = server.objects.values()
    sent = manifest.pytorch_job(intent, PROFILE.model_copy(update={"namespace": "osctl"}), STORE)
    assert stored["spec"] == sent["spec"]
    backend._watcher.close()
