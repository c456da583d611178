"""What every test may need: a real S3 server, a real Kubernetes cluster, and a way to say that something is missing on this machine.

A test that needs a thing this machine lacks is skipped by that thing's name, and the end of the run sums up what was not tested.
With `OSCTL_REQUIRE=s3,browser,cluster` such a skip is a failure.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import pytest
from processes import open_files

pytest_plugins = ["durations", "proofs"]

REPOSITORY = Path(__file__).parent.parent
Require = Callable[[str, str], NoReturn]
MISSING = "not on this machine: "


def _require(name: str, reason: str) -> NoReturn:
    if name in os.environ.get("OSCTL_REQUIRE", "").split(","):
        pytest.fail(f"OSCTL_REQUIRE names {name}, but: {reason}", pytrace=False)
    pytest.skip(f"{MISSING}{name} ({reason})")


@pytest.fixture(scope="session")
def require() -> Require:
    """`require("browser", "chromium is not installed")` ends a test that lacks something: skipped, or failed if it was asked for."""
    return _require


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the cluster first: they take longest, and wait more than they work (see below)."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` each file has one worker, and files of one lane of the cluster one and the same: they share its fake GPUs, or
    the two cores that its pods run on.
    """
    from xdist.scheduler import LoadFileScheduling

    class OneWorkerForALane(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            lane = re.search(r'mark\.cluster\("(\w+)"', (REPOSITORY / file).read_text())
            return f"cluster: {lane[1]}" if lane else file

    return OneWorkerForALane(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = Counter(
        report.longrepr[2].partition(MISSING)[2]
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and MISSING in report.longrepr[2]
    )
    if reasons:
        terminalreporter.section("not tested here")
        for reason, number in sorted(reasons.items()):
            terminalreporter.write_line(f"{reason}: {number} tests skipped")


@dataclass(frozen=True)
class S3Server:
    """A versitygw of its own, over a temporary folder."""

    endpoint: str
    bucket: str
    root: Path
    """Objects lie below root/bucket as plain files, so that a test can damage them behind the server's back."""
    env: Mapping[str, str]
    """What a process needs to reach it."""
    stranger: Mapping[str, str]
    """The same with the credentials of a user who may do nothing."""

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a command of this process lends to its children (`osctl launch` does) is not there in the next test, and s3fs, which keeps its
    clients, does not ask the servers of this one.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()


LEFT_OPEN = 64
"""Files that a test may leave open: servers and clients that the next tests of its process use as well."""


@pytest.fixture(autouse=True)
def few_files_stay_open() -> Iterator[None]:
    """One test once left 684 open; the tests after it in that process failed, and not it."""
    with os.scandir("/proc/self/fd") as before:
        already = len(list(before))
    yield
    with os.scandir("/proc/self/fd") as after:
        left = len(list(after)) - already
    assert left <= LEFT_OPEN, f"{left} files stay open: {Counter(open_files()).most_common(10)}"


@pytest.fixture(scope="session")
def versitygw() -> Path:
    """Path of the server's binary; built on first use."""
    try:
        build = subprocess.run([REPOSITORY / "scripts/build-versitygw"], capture_output=True, text=True, timeout=280)
    except subprocess.TimeoutExpired:
        _require("s3", "building versitygw takes longer than 280 s; run scripts/build-versitygw once by itself")
    if build.returncode:
        _require("s3", (build.stderr.strip().splitlines() or ["scripts/build-versitygw failed"])[-1])
    return Path(build.stdout.strip())


@pytest.fixture(scope="session")
def start_s3(versitygw: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., S3Server]]:
    """Starts servers: `start_s3()`, or `start_s3(cert=..., key=...)` for one that speaks TLS."""
    running: list[subprocess.Popen[bytes]] = []

    def start(cert: Path | None = None, key: Path | None = None) -> S3Server:
        folder = tmp_path_factory.mktemp("s3")
        process, server = _start(versitygw, folder, ["--cert", str(cert), "--key", str(key)] if cert else [])
        running.append(process)
        return server

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="session")
def s3(start_s3: Callable[..., S3Server]) -> S3Server:
    """The S3 server of this test session. Take a prefix of your own: `s3.url("my-test")` with `s3.env` in the environment."""
    return start_s3()


def _start(binary: Path, folder: Path, options: list[str]) -> tuple[subprocess.Popen[bytes], S3Server]:
    bucket = "osctl-test"
    (folder / "data" / bucket).mkdir(parents=True)
    (folder / "iam").mkdir()
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    env = {**os.environ, "ROOT_ACCESS_KEY": access, "ROOT_SECRET_KEY": secret}
    for _ in range(5):  # another process may take the free port before the server does
        port = _free_port()
        arguments = ["--quiet", "--port", f"127.0.0.1:{port}", "--iam-dir", folder / "iam", *options, "posix", folder / "data"]
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen([binary, *arguments], env=env, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        if _answers(process, port):
            break
    else:
        raise RuntimeError(f"versitygw does not start: {(folder / 'log').read_text()[-2000:]}")
    endpoint = f"{'https' if options else 'http'}://127.0.0.1:{port}"
    stranger = (secrets.token_hex(8), secrets.token_hex(16))
    admin = ["admin", "--access", access, "--secret", secret, "--endpoint-url", endpoint, "--allow-insecure", "create-user"]
    subprocess.run([binary, *admin, "--access", stranger[0], "--secret", stranger[1], "--role", "user"], check=True, capture_output=True)
    settings = {"OSCTL_S3_ENDPOINT": endpoint, "AWS_REGION": "us-east-1"}
    return process, S3Server(
        endpoint=endpoint,
        bucket=bucket,
        root=folder / "data",
        env={**settings, "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret},
        stranger={**settings, "AWS_ACCESS_KEY_ID": stranger[0], "AWS_SECRET_ACCESS_KEY": stranger[1]},
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.02)
    return False


def _die_with_parent() -> None:
    """A test run that is killed leaves no server behind (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass(frozen=True)
class Cluster:
    """The machine's test cluster (tests/cluster), shared by all tests: one node, 8 fake ones of 8 GPUs, PyTorchJob operator, gangs, S3."""

    kubeconfig: Path
    """Of its administrator; `alice.kubeconfig` beside it is of a person who may do nothing."""
    bin: Path
    """kubectl and helm are in this folder."""
    bucket: str
    s3: Mapping[str, str]
    """Environment that reaches the S3 server; the same endpoint holds here and in pods."""

    def kubectl(self, *arguments: str | Path, stdin: str | None = None, check: bool = True, timeout_s: float = 60) -> str:
        """Stdout of kubectl; with `check=False` stderr too, whatever it ended with."""
        return self._run(self.bin / "kubectl", arguments, stdin, check, timeout_s)

    def helm(self, *arguments: str | Path, stdin: str | None = None, check: bool = True, timeout_s: float = 240) -> str:
        """Stdout of helm; with `check=False` stderr too, whatever it ended with."""
        return self._run(self.bin / "helm", arguments, stdin, check, timeout_s)

    def stop(self, *servers: str) -> None:
        """Takes servers such as kube-apiserver or training-operator away from everybody, until `start`: for `cluster(LANE, alone=True)`."""
        self._run(REPOSITORY / "tests/cluster/down", servers, None, True, 170)

    def start(self) -> None:
        """Brings back what was stopped, and fake nodes that were deleted."""
        self._run(REPOSITORY / "tests/cluster/up", (), None, True, 240)

    @property
    def trainer_image(self) -> str:
        """localhost/osctl-trainer@sha256:..., of this working tree."""
        return self._images["trainer"]

    @property
    def driver_image(self) -> str:
        """localhost/osctl@sha256:..., of this working tree: CLI and driver, without torch."""
        return self._images["slim"]

    @cached_property
    def _images(self) -> dict[str, str]:
        lines = self._run(REPOSITORY / "tests/cluster/image", (), None, True, 280).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def _run(self, program: Path, arguments: Sequence[str | Path], stdin: str | None, check: bool, timeout_s: float) -> str:
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run([program, *arguments], env=env, input=stdin, capture_output=True, text=True, timeout=timeout_s)
        if check and done.returncode:
            raise AssertionError(f"{program.name} {' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout if check else done.stdout + done.stderr


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The test cluster, brought up if it is not; it stays up, for the next run."""
    try:
        up = subprocess.run([REPOSITORY / "tests/cluster/up"], capture_output=True, text=True, timeout=280)
    except subprocess.TimeoutExpired:
        _require("cluster", "tests/cluster/up takes longer than 280 s; run scripts/setup-test-servers once by itself")
    if up.returncode:
        _require("cluster", (up.stderr.strip().splitlines() or ["tests/cluster/up failed"])[-1])
    home = _cluster_home()
    s3 = dict(line.split("=", 1) for line in (home / "conf/s3.env").read_text().splitlines())
    return Cluster(kubeconfig=home / "conf/admin.kubeconfig", bin=home / "bin", bucket="osctl", s3=s3)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests of the cluster run beside one another, in lanes; of `cluster(LANE, alone=True)` each waits until no other runs, and none begins
    before it has ended. Fixtures of whole files are made and left inside of this; the wait counts for no test's timeout.
    """
    mark = item.get_closest_marker("cluster")
    if mark is None:
        return (yield)
    folder = _cluster_home()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lease").open("w") as lease, (folder / ".lease-next").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # who waits to be alone is the next: those who come later wait behind it
        fcntl.flock(lease, fcntl.LOCK_EX if mark.kwargs.get("alone") else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


def _cluster_home() -> Path:
    cache = Path(os.environ.get("OSCTL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "osctl")
    return cache / "cluster"


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace in which Pod Security enforces "restricted". Afterwards its pods are gone, so that their GPUs are free."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    # A pod is refused until a controller has made the namespace's account.
    cluster.kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s", timeout_s=90)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
    cluster.kubectl("-n", name, "delete", "pods", "--all", "--grace-period=1", timeout_s=90)
