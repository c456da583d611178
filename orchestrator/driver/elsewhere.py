"""Attempts of this pipeline that run on another machine or in another folder, as the ledger shows them.

A local backend sees its own run directories alone. Another launch of the same pipeline, from another folder or host, may have left an
attempt that lives: its launcher stands still or its lease has run out, and it trains on. Such an attempt is over only when that is
proved: it has reported; or its process, of this very host, is dead; or nothing of it has reached the store for so long that its agent
has ended itself (`AgentProcess.silent_s`, docs/contracts.md). That silence is measured by what arrives, and by this host's clock alone.

Owns the judgement of such attempts. Refuses to write anything, and to guess: an attempt that nothing shows to be over is `running`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.ledger.records import AgentProcess, Intent, Lease
from orchestrator.ledger.store import Ledger
from orchestrator.local.processes import Process
from orchestrator.ports import Life

SILENT_S = 300.0
"""An agent that has reached the store with nothing for so long is gone. Longer than most outages of a store: an agent that cannot reach
it ends its training within this time, since it cannot know whether another has taken its place."""
LOOK_S = 1.0
"""Between two looks at such an attempt: each is four requests."""


@dataclass
class _Heard:
    newest: tuple[str, ...]
    since: float
    """`elapsed` when that was first seen."""
    looked: float
    life: Life | None


class Elsewhere:
    def __init__(self, ledger: Ledger, before: Lease | None, elapsed: Callable[[], float]) -> None:
        """`before`: the lease that this driver has taken over; `elapsed`: seconds of a clock that nobody sets."""
        self._ledger, self._before, self._elapsed = ledger, before, elapsed
        self._heard: dict[str, _Heard] = {}

    def life(self, intent: Intent) -> Life | None:
        """None: nothing shows that it was ever started."""
        now = self._elapsed()
        heard = self._heard.get(intent.run_key)
        if heard is not None and now - heard.looked < LOOK_S:
            return heard.life
        newest = self._ledger.newest_sign(intent, heard.newest if heard else ("", "", ""))
        if heard is None or newest != heard.newest:
            heard = self._heard[intent.run_key] = _Heard(newest, now, now, None)
        heard.looked = now
        heard.life = self._life_now(intent, heard, now)
        return heard.life

    def _life_now(self, intent: Intent, heard: _Heard, now: float) -> Life | None:
        agent = self._ledger.agent(intent)
        if agent is None and not any(heard.newest):
            return None
        bound = agent.bound if agent is not None else None
        alive = _process(agent).alive() if agent is not None else self._launcher_alive(intent)
        if self._ledger.report(intent.stage, intent.inputs_digest, intent.attempt) is not None:
            return Life("ended", bound, where=_place(agent))
        if alive is False:
            return Life("ended", bound, where=f"{_place(agent)}, which is dead")
        silent_s = agent.silent_s if agent is not None else SILENT_S
        if alive is None and now - heard.since >= silent_s:
            return Life("ended", bound, where=f"{_place(agent)}, which was silent for {silent_s:g} s")
        if alive:
            return Life("running", bound, where=_place(agent))
        return Life("running", bound, where=f"{_place(agent)}, which counts as lost once it has been silent for {silent_s:g} s")

    def _launcher_alive(self, intent: Intent) -> bool | None:
        """Whether the launcher lives of an agent that did not say who it is: such an agent dies with its launcher. None: not known."""
        launcher = self._before
        if launcher is None or launcher.epoch != intent.epoch:
            return None
        alive = Process(launcher.host, launcher.pid, launcher.started, launcher.boot).alive()
        return None if alive else alive  # one that lives may have let it go


def _process(agent: AgentProcess) -> Process:
    return Process(agent.host, agent.pid, agent.started, agent.boot)


def _place(agent: AgentProcess | None) -> str:
    if agent is None:
        return "an agent of an older release in another folder or on another host"
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(agent.bound))
    return f"agent {agent.pid} on {agent.host}, since {began}, in another folder"
