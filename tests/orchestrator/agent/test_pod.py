"""Laws of an agent that is PID 1 of a pod: a user without rights, a read-only root, nobody above it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live_attempts import Attempts, stage_config, until

from orchestrator.agent.events import TOGETHER_S

POD = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind / /
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /mnt
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
shift
exec setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --inh-caps=-all,+dac_read_search --ambient-caps=+dac_read_search \\
  --bounding-set=-all,+dac_read_search "$@"
"""
"""$1: the store, which is not on the pod's own disk. Reading everywhere stands for an image that this user may read."""


class Pod:
    """An agent in namespaces of its own, started as a kubelet starts a container."""

    def __init__(self, attempts: Attempts, key: str) -> None:
        store = attempts.root / "store"
        for path in (store, *store.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        argv = [sys.executable, "-m", "orchestrator.agent", "--store", attempts.store.url, "--intent", key, "--run-dir", "/mnt/attempt"]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", POD, "pod", str(store)]
        self.log = attempts.root / "agent.log"
        with self.log.open("wb") as log:
            self.outer = subprocess.Popen([*unshare, *argv], stdout=log, stderr=log, env=os.environ | {"HOME": "/mnt", "TMPDIR": "/mnt"})
        self.pid = until(self._agent, "an agent")

    def _agent(self) -> int | None:
        assert self.outer.poll() is None, self.log.read_text()
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()
        for child in children:
            if "orchestrator.agent" in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
                return int(child)
        return None

    def zombies(self) -> int:
        stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
        return sum(fields[0] == "Z" and int(fields[1]) == self.pid for fields in stats)

    def execute(self, *argv: str) -> None:
        """What `kubectl exec` and a preStop hook do."""
        subprocess.run(["nsenter", "-t", str(self.pid), "-p", "-m", *argv], check=True)


@pytest.fixture
def attempts(tmp_path: Path, require: Callable[[str, str], None]) -> Attempts:
    if os.getuid() or not all(shutil.which(tool) for tool in ("unshare", "setpriv", "nsenter")):
        require("namespaces", "needs root, unshare, setpriv and nsenter")
    allowed = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    if allowed.returncode:
        require("namespaces", allowed.stderr.strip())
    tmp_path.chmod(0o755)
    return Attempts(tmp_path)


@pytest.mark.long
def test_pid_1_without_rights_buries_strangers_saves_on_the_first_signal_and_leaves(attempts: Attempts) -> None:
    intent = attempts.intend("--step-ms", "50", config=stage_config(steps=1000))
    pod = Pod(attempts, attempts.key(intent))
    attempts.reaches(intent, 5)
    assert "Uid:\t1000\t" in Path(f"/proc/{pod.pid}/status").read_text()
    assert " / / ro" in Path(f"/proc/{pod.pid}/mountinfo").read_text()
    for _ in range(3):
        pod.execute("sh", "-c", "sleep 0.01 & exit 0")
    until(lambda: not pod.zombies(), "nobody left unburied", patience_s=10)
    pod.execute("sh", "-c", "kill -TERM 1")
    assert pod.outer.wait(timeout=30) == 143, pod.log.read_text()
    report = attempts.report(intent)
    assert report is not None and report.class_ == "drained"
    assert attempts.published(intent)[-1] == report.step
    assert attempts.journal(intent)


@pytest.mark.long
def test_a_second_signal_hurries_a_trainer_that_does_not_save(attempts: Attempts) -> None:
    intent = attempts.intend("--step-ms", "50", "--fail", "drainless@9999", config=stage_config(steps=1000))
    pod = Pod(attempts, attempts.key(intent))
    attempts.reaches(intent, 5)
    os.kill(pod.pid, signal.SIGTERM)
    time.sleep(TOGETHER_S + 0.5)
    os.kill(pod.pid, signal.SIGTERM)
    assert pod.outer.wait(timeout=30) == 137, pod.log.read_text()
    report = attempts.report(intent)
    assert report is not None and report.class_ == "signal"
    assert attempts.published(intent)[0] == 5
