"""Of drivers of one pipeline one holds the lease, whatever dies, sleeps or disagrees about the time."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_ledger import NOW, Lies

from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable
from orchestrator.ledger import lease as leases
from orchestrator.ledger.store import Ledger
from orchestrator.local.processes import Process
from orchestrator.stores.folder import FolderStore


def foreign(number: int = 1) -> Process:
    return Process(f"host{number}", 100 + number, 5.0, f"boot{number}")


def test_a_second_driver_is_refused_and_told_who_drives_and_how_long(ledger: Ledger) -> None:
    held = ledger.acquire(NOW)
    with pytest.raises(Refused, match=rf"pipeline demo: is driven by .*:{os.getpid()} \(epoch 1\), its lease runs for another 11 s"):
        ledger.acquire(NOW + 4)
    holder = ledger.holder(NOW + 4)
    assert holder == held.record and holder.pid == os.getpid()


def test_a_released_lease_is_taken_at_once_and_the_epoch_grows(ledger: Ledger) -> None:
    for epoch in (1, 2, 3):
        held = ledger.acquire(NOW)
        assert held.epoch == epoch and held.valid(NOW + 14) and not held.valid(NOW + 15)
        held.renew(NOW + 10)
        assert held.valid(NOW + 24)
        held.release()
        assert not held.valid(NOW) and ledger.holder(NOW) is None


def test_an_expired_holder_is_taken_over_and_its_late_writes_fail(ledger: Ledger, lies: Lies) -> None:
    slow = ledger.acquire(NOW)
    fast = Ledger(lies.reach(), "demo").acquire(NOW + 15)
    assert fast.epoch == 2
    with pytest.raises(StoreConflict):
        slow.renew(NOW + 16)
    assert slow.lost and not slow.valid(NOW) and not slow.gone
    with pytest.raises(StoreConflict):
        ledger.append_event(slow, "observed", now=NOW + 16)
    slow.release()
    fast.renew(NOW + 17)
    assert ledger.lease() == fast.record and list(ledger.events()) == []


HOLDER = """
import os, sys, time
from pathlib import Path
from orchestrator.stores.folder import FolderStore
from orchestrator.ledger.store import Ledger
held = Ledger(FolderStore(Path(sys.argv[1])), "demo").acquire(float(sys.argv[2]))
print(held.epoch, flush=True)
time.sleep(60)
"""


def holder_process(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, str(NOW)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "1\n"
    return process


def test_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    ledger = Ledger(FolderStore(tmp_path), "demo")
    with holder_process(tmp_path) as process:
        try:
            with pytest.raises(Refused, match=f":{process.pid} "):
                ledger.acquire(NOW + 1)
        finally:
            process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ledger.acquire(NOW + 1).epoch == 2  # it is dead, but nobody has reaped it: a zombie drives nothing
    assert process.returncode == -signal.SIGKILL


def test_a_stopped_process_keeps_its_lease_until_it_expires(tmp_path: Path) -> None:
    ledger = Ledger(FolderStore(tmp_path), "demo")
    with holder_process(tmp_path) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(Refused):
                ledger.acquire(NOW + 14)
            assert ledger.acquire(NOW + 16).epoch == 2
        finally:
            process.kill()


def test_a_pid_used_again_is_another_process(folder_ledger: Ledger) -> None:
    me = Process.of(os.getpid())
    leases.acquire(folder_ledger.store, folder_ledger.keys.lease, NOW, me=replace(me, started=me.started - 1))
    assert folder_ledger.acquire(NOW + 1).epoch == 2


def test_a_process_of_another_boot_or_container_is_not_judged_by_its_pid(folder_ledger: Ledger) -> None:
    me = Process.of(os.getpid())
    leases.acquire(folder_ledger.store, folder_ledger.keys.lease, NOW, me=replace(me, started=1.0, boot="another"))
    with pytest.raises(Refused):
        folder_ledger.acquire(NOW + 1)


@pytest.mark.parametrize("ahead_s", [-1200, 1200])
def test_whether_another_host_drives_is_told_by_the_stores_clock_where_the_hosts_clocks_differ(tmp_path: Path, ahead_s: float) -> None:
    """`ahead_s`: so far is the holder's clock ahead of this one."""
    store = FolderStore(tmp_path)
    ledger, key = Ledger(store, "demo"), Ledger(store, "demo").keys.lease
    leases.acquire(store, key, NOW + ahead_s, me=foreign(1))
    holder = ledger.holder(NOW)
    assert holder is not None and holder.epoch == 1 and ledger.ask_cancel(NOW), "it was renewed a moment ago"
    os.utime(tmp_path / key, (time.time() - 100, time.time() - 100))
    assert ledger.holder(NOW) is None and not ledger.ask_cancel(NOW)


def test_a_lease_that_runs_longer_than_any_is_given_is_watched_too(ledger: Ledger) -> None:
    """Its holder's clock is ahead of ours: for as long as that, one that died would keep everybody out."""
    key, waits = ledger.keys.lease, list[float]()
    there = leases.acquire(ledger.store, key, NOW + 1200, me=foreign(1))
    with pytest.raises(Refused):
        leases.acquire(ledger.store, key, NOW, me=foreign(2), pause=lambda seconds: there.renew(NOW + 1205))
    assert leases.acquire(ledger.store, key, NOW, me=foreign(2), pause=waits.append).epoch == 2 and waits == [7.5]


def test_another_hosts_expired_lease_is_watched_before_it_is_taken(ledger: Ledger) -> None:
    """Its clock may be behind ours: one that renews meanwhile lives."""
    key, waits = ledger.keys.lease, list[float]()
    there = leases.acquire(ledger.store, key, NOW, me=foreign(1))
    with pytest.raises(Refused, match="has just renewed"):
        leases.acquire(ledger.store, key, NOW + 1200, me=foreign(2), pause=lambda seconds: there.renew(NOW + 5))
    taken = leases.acquire(ledger.store, key, NOW + 1200, me=foreign(2), pause=waits.append)
    assert taken.epoch == 2 and waits == [7.5]
    with pytest.raises(StoreConflict):
        there.renew(NOW + 10)


def test_a_store_that_does_not_answer_does_not_cost_the_lease(folder_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    held = folder_ledger.acquire(NOW)

    def silent(*_: object) -> str:
        raise Unreachable("gone")

    with monkeypatch.context() as patch, pytest.raises(Unreachable):
        patch.setattr(folder_ledger.store, "replace", silent)
        held.renew(NOW + 5)
    assert not held.lost
    held.renew(NOW + 6)
    assert held.expires == NOW + 21


RACER = """
import sys, time
from orchestrator.stores import open_store
from orchestrator.errors import Refused
from orchestrator.ledger.store import Ledger
store, handles = open_store(sys.argv[1]), []
print("ready", flush=True)
for line in sys.stdin:
    at, pipeline, now = line.split()
    while time.time() < float(at): pass
    try: handles.append(Ledger(store, pipeline).acquire(float(now))); print("holds", handles[-1].epoch, flush=True)
    except Refused: print("refused", flush=True)
"""


@pytest.mark.long
def test_of_two_drivers_that_start_together_one_is_refused(lies: Lies, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    env = dict(os.environ)
    if lies.store.url.startswith("s3:"):
        env.update(request.getfixturevalue("s3").env)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    racers = [subprocess.Popen([sys.executable, "-c", RACER, lies.store.url], **pipes) for _ in range(2)]
    try:
        assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["ready\n"] * 2
        for number in range(20):
            # Even rounds begin without a lease, odd ones with one that its dead holder has left.
            if number % 2:
                leases.acquire(lies.store, f"p{number}/lease.json", NOW, me=replace(Process.of(os.getpid()), started=1.0))
            at = time.time() + 0.01
            for racer in racers:
                assert racer.stdin
                racer.stdin.write(f"{at} p{number} {NOW}\n")
                racer.stdin.flush()
            answers = sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout)
            assert answers == [f"holds {1 + number % 2}", "refused"]
    finally:
        for racer in racers:
            racer.communicate()


@pytest.mark.parametrize(
    ("removed", "said"),
    [("demo/lease.json", "its lease is gone: .*has no demo/lease.json any more"), ("", "the store .* is gone, or empty")],
)
def test_a_lease_that_was_removed_is_lost_and_it_is_told_that_nobody_has_it(
    folder_ledger: Ledger, tmp_path: Path, removed: str, said: str
) -> None:
    held = folder_ledger.acquire(NOW)
    folder_ledger.append_event(held, "launched", now=NOW)
    place = tmp_path / "store" / removed
    place.unlink() if removed else shutil.rmtree(place)
    with pytest.raises(NotFound):
        folder_ledger.store.read(folder_ledger.keys.lease)
    with pytest.raises(StoreConflict):
        held.renew(NOW + 1)
    assert held.lost and not held.valid(NOW) and re.search(said, held.gone)
    with pytest.raises(StoreConflict):
        folder_ledger.append_event(held, "observed", now=NOW + 1)
