"""The driver's process: what it waits for, and how it leaves. Its life in a real pod is tested in tests/cluster/test_cli.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_recipe import write

from orchestrator.cli import drive, main
from orchestrator.driver.runner import Detached, Runner
from orchestrator.kube import jobs, names
from orchestrator.ledger.lease import LeaseHandle, acquire
from orchestrator.ledger.store import Ledger
from orchestrator.local.backend import LocalBackend
from orchestrator.local.processes import Process
from orchestrator.pipelines.signals import leave_on_signals
from orchestrator.recipe import resolve
from orchestrator.stores.folder import FolderStore


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(FolderStore(tmp_path / "store"), "tiny")


@pytest.fixture
def runner(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(drive, "LEASE_POLL_S", 0.01)
    pipeline = resolve.load(write(tmp_path / "recipe") / "osctl.yaml")
    return Runner(pipeline, ledger, LocalBackend(ledger.store.url, tmp_path))


def taken(ledger: Ledger, host: str) -> LeaseHandle:
    there = Process(host, 1, 1.0, "another boot")
    return acquire(ledger.store, ledger.keys.lease, time.time(), 60.0, me=there)


def pod_of(ledger: Ledger, launch: int = 1) -> str:
    return f"{names.driver_name('tiny', ledger.store.url, launch)}-x7k2p"


def test_a_driver_waits_for_the_lease_of_one_that_died_in_another_pod(ledger: Ledger, runner: Runner) -> None:
    held = taken(ledger, pod_of(ledger))
    threading.Timer(0.2, held.release).start()
    began = time.monotonic()
    drive.wait_for_lease(ledger, ledger.store.url, runner)
    assert time.monotonic() - began >= 0.15 and ledger.holder(time.time()) is None


@pytest.mark.parametrize("host", ["workstation", "tiny-driver-00000000-1-x7k2p"])
def test_any_other_holder_is_for_the_runner_to_refuse(ledger: Ledger, runner: Runner, host: str) -> None:
    taken(ledger, host)
    drive.wait_for_lease(ledger, ledger.store.url, runner)
    assert ledger.holder(time.time()) is not None


def test_a_driver_that_waits_can_be_asked_to_leave(ledger: Ledger, runner: Runner) -> None:
    taken(ledger, pod_of(ledger))
    with leave_on_signals(runner):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Detached):
            drive.wait_for_lease(ledger, ledger.store.url, runner)


def test_a_revision_that_is_not_there_ends_the_job(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["osctl", "drive", "--store", ledger.store.url, "--pipeline", "tiny", "--revision", "7"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 4 and "revision 7" in capsys.readouterr().err
    assert end.value.code in jobs.DRIVER_EXITS and drive.LEFT not in jobs.DRIVER_EXITS
