"""Who a process is: pid, start time, boot; and whether it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.local.processes import Process


def test_a_process_is_the_same_each_time_it_is_looked_at() -> None:
    me = Process.of(os.getpid())
    assert me == Process.of(os.getpid()) and me.alive() is True
    assert Process.of(os.getppid()) != me


def test_a_process_that_has_died_does_not_live_whether_it_is_reaped_or_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = Process.of(child.pid)
    assert process.alive() is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.alive() is False
    child.communicate()
    assert process.alive() is False
    with pytest.raises(ProcessLookupError):
        Process.of(child.pid)


def test_a_name_full_of_parentheses_does_not_hide_the_start_time(tmp_path: Path) -> None:
    program = tmp_path / ") Z (0 0"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as child:
        try:
            process = Process.of(child.pid)
            assert process.alive() is True and process.started >= Process.of(os.getpid()).started
        finally:
            child.kill()


def test_processes_elsewhere_are_not_judged() -> None:
    me = Process.of(os.getpid())
    assert replace(me, host="elsewhere").alive() is None
    assert replace(me, boot="another boot, or another container").alive() is None
