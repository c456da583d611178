"""Laws of who can ask a launch to save and stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from orchestrator.agent.events import Events
from orchestrator.pipelines.signals import save_on_signals

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def ignored() -> Iterator[None]:
    """As a script leaves SIGINT for what it starts with `&`, and nohup leaves SIGHUP."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in ASKING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


class Asked:
    def __init__(self) -> None:
        self.drains = self.kills = 0

    def drain(self) -> None:
        self.drains += 1

    def kill(self) -> None:
        self.kills += 1


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("number", ASKING)
def test_a_launch_in_the_background_of_a_script_is_asked_to_stop_by_its_number_but_nohup_is_kept(number: signal.Signals) -> None:
    runner = Asked()
    with save_on_signals(runner, print):
        os.kill(os.getpid(), number)
    assert (runner.drains, runner.kills) == (int(number != signal.SIGHUP), 0)
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("number", ASKING)
def test_so_is_its_agent(number: signal.Signals) -> None:
    events = Events(None)
    os.kill(os.getpid(), number)
    assert events.asked_to_leave == int(number != signal.SIGHUP)
