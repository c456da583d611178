"""A pod of an Indexed Job that works on one shard of the sources: looks at them, cuts their clips, and brings what it kept into the store.

Owns the order: results first, under the names of their content, then the one conditional write that says that the shard is done. So a pod
that is killed anywhere and started again comes to the same, and of two pods of one shard the first counts. Holds no lease: the pod of shard
0 has it, merges and publishes (`orchestrator.prepare.run`). Refuses to make a data set.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from opensora.dataset.kept_packs import SUFFIX
from orchestrator import modules
from orchestrator.agent.trainer_process import TrainerProcess
from orchestrator.driver.clock import Clock, SystemClock
from orchestrator.errors import Refused, RunFailed, Unreachable, UsageError
from orchestrator.local.attempt_lock import ALIVE, take_lock
from orchestrator.local.clock import AttemptClock
from orchestrator.prepare import removed
from orchestrator.prepare.mirror import Mirror
from orchestrator.prepare.pods import PodsObject
from orchestrator.prepare.records import Keys, ShardDone
from orchestrator.prepare.run import LOOK_S, Asked, end_of
from orchestrator.prepare.run_directory import RunDirectory
from orchestrator.prepare.shards import Place, Shards


@dataclass
class ShardWorker:
    """For one run, in one thread. `drain` and `kill` only set flags, so a signal handler may call them."""

    asked: Asked
    place: Place
    pod: str
    """Name of this pod."""
    say: Callable[[str], None] = lambda text: None
    clock: Clock = field(default_factory=SystemClock)
    _stop: str = ""

    def drain(self) -> None:
        self._stop = self._stop or "drain"

    def kill(self) -> None:
        self._stop = "kill"

    def run(self) -> bool:
        """Whether the shard is done; False: it was asked to stop, and what is done is kept.

        Raises:
            UsageError: prepare.yaml cannot be prepared.
            RunFailed: the disk is full, or the process broke.
            Unreachable: the store did not answer.
        """
        store, keys = self.asked.store, Keys(self.asked.config.name)
        self._shards = Shards(store, keys, self.place)
        if self._shards.is_done(self.place.shard):
            self.say(f"{keys.name}: shard {self.place.shard} of {self.place.of} is done already")
            return True
        directory = RunDirectory(self.asked.folder)
        directory.lay_out(removed.without(store, keys, self.asked.config), {}, None, self.asked.written)
        mirror = Mirror(directory.kept, store, keys.kept)
        mirror.bring_back(only=SUFFIX)
        code = self._process(directory, mirror)
        mirror.copy_new(all_=True)
        kind = end_of(code)
        if kind == "drained" or self._stop:
            return False
        if kind != "completed":
            said = directory.result().get("reason") or directory.last_words() or f"the process ended with {code}"
            raise (UsageError if kind == "config" else RunFailed)(f"data set {keys.name}: shard {self.place.shard}: {said}")
        Mirror(directory.quarantined, store, self._shards.aside).copy_new(all_=True)
        new = self._shards.commit(ShardDone(shard=self.place.shard, of=self.place.of, pod=self.pod, ended=self.clock.now()))
        self.say(f"{keys.name}: shard {self.place.shard} of {self.place.of} is done{'' if new else ', by another pod'}")
        return True

    def _process(self, directory: RunDirectory, mirror: Mirror) -> int:
        """Its exit code; a signal is negative."""
        lock = take_lock(directory.path)
        if lock is None:
            raise Refused(f"{directory.path} is in use by another process")
        clock = AttemptClock.here()
        process = TrainerProcess(directory.path, lock, clock)
        try:
            words = [word.replace("{run_dir}", str(directory.path)) for word in (*self.asked.command, *self.place.words)]
            variables = modules.reading_clips(modules.environment(self.asked.env)) | {"PYTHONUNBUFFERED": "1"}
            process.start(words, variables, log=directory.log)
            self._watch(process, clock, directory, mirror)
            assert process.ended is not None
            return os.waitstatus_to_exitcode(process.ended.status)
        finally:
            process.close()
            (directory.path / ALIVE).unlink(missing_ok=True)
            os.close(lock)

    def _watch(self, process: TrainerProcess, clock: AttemptClock, directory: RunDirectory, mirror: Mirror) -> None:
        pods = None
        if self.asked.pods is not None:
            pods = PodsObject(self.asked.store, self._shards.pod(self.pod), self.asked.pods, self.clock)
        asked = ""
        while process.ended is None:
            if process.has_spoken(LOOK_S):
                process.listen(clock())
            with contextlib.suppress(Unreachable):  # the steps need no store; what is new is copied later
                mirror.copy_new()
                if pods is not None:
                    pods.look_sometimes()
            stop = self._stop
            if stop == "kill" and process.ended is None:
                process.kill(clock())
            elif stop and stop != asked:
                directory.ask_to_drain()
            asked = stop
        if pods is not None:
            with contextlib.suppress(Unreachable):
                pods.look()
