"""One preparation, from its lease to its data set: the launcher of `python -m opensora.prepare`.

Owns the order, so that whoever is killed anywhere and runs again comes to the same data set and to nothing twice: lease, earlier attempts
closed, results brought back, intent, process, results copied while it runs, outcome, publication, name. Refuses to judge clips.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from opensora.dataset.left_out import LeftOut
from opensora.dataset.prepare_config import PrepareConfig
from opensora.printable import several
from orchestrator import modules
from orchestrator.agent.trainer_process import Ended, TrainerProcess
from orchestrator.driver.act import code_version
from orchestrator.driver.clock import Clock, SystemClock
from orchestrator.driver.held_lease import HeldLease
from orchestrator.errors import Refused, RunFailed, Unreachable, UsageError
from orchestrator.ledger.lease import TTL_S
from orchestrator.ledger.records import Price
from orchestrator.ledger.store import EventKind, Ledger
from orchestrator.local.attempt_lock import ALIVE, take_lock
from orchestrator.local.clock import AttemptClock
from orchestrator.ports import Store
from orchestrator.prepare import attempts, finished, published_report, removed, same_name, status_object
from orchestrator.prepare import pods as pods_of
from orchestrator.prepare.bill import bill
from orchestrator.prepare.mirror import Mirror
from orchestrator.prepare.publish import CAPTIONS, Published, publish, register
from orchestrator.prepare.records import EXIT_CODES, End, Intent, Keys, Outcome, ShardDone, held_of
from orchestrator.prepare.run_directory import RunDirectory
from orchestrator.prepare.shards import Place, Shards
from orchestrator.prepare.status_object import StatusObject

LOOK_S = 0.2
"""Between two looks at the process."""
LOOK_SHARDS_S = 1.0
"""Between two questions whether the other pods' shards are done."""
CANCEL_POLL_S = 2.0
"""Between two looks for a `cancel` in the store; on S3 each is a request."""
DEVICE = "cpu-core"
FOLLOW = "osctl prepare status"


@dataclass(frozen=True)
class Asked:
    """What is to be prepared, and where."""

    config: PrepareConfig
    stages: Mapping[str, Mapping[str, Any]]
    """By name, the resolved StageConfig that clips are encoded for."""
    store: Store
    folder: Path
    """The run directory."""
    env: Mapping[str, str]
    """Of the process."""
    parents: Mapping[str, str | None] = field(default_factory=dict)
    """Of each stage, whose embedded encoders it takes over; None: it makes its own."""
    price: Price | None = None
    """Of a core."""
    gpu: str = ""
    """Name in the price list of the GPU that models run on, if there is one here."""
    gpu_price: Price | None = None
    command: tuple[str, ...] = tuple(modules.command("opensora.prepare", "{run_dir}"))
    """Obeys the contract of the run directory; `{run_dir}` is filled in."""
    holder: str = ""
    """user@host, for people."""
    own: tuple[Path, ...] = ()
    """Folders that osctl writes itself, beside the store and the run directory: no sources."""
    replace: bool = True
    """Whether the name may stand for other sources so far."""
    retry: bool = False
    """Look again although nothing has changed: at addresses, and at rows that could not be worked on."""
    where: str = ""
    """Name of the Job or RayJob that this runs in; empty: on one machine."""
    made_of: str = ""
    """Of the order that it works on (`orchestrator.prepare.order.made_of`); empty: there is none."""
    pods: pods_of.Watch | None = None
    """Says which pods it holds there; None: none."""
    place: Place | None = None
    """Its place among the pods of an Indexed Job, shard 0: it merges what the others do. None: it does all itself."""

    @property
    def written(self) -> tuple[Path, ...]:
        """All folders that osctl writes itself."""
        store = () if "://" in self.store.url else (Path(self.store.url),)
        return (self.folder, *store, *self.own)


@dataclass(frozen=True)
class Prepared:
    """How it came out."""

    name: str
    published: Published | None
    """None: it was asked to stop."""
    nothing_to_do: bool
    """Everything was prepared, published and registered before."""
    attempt: int | None
    usd: Decimal
    """Of this attempt, of what is priced."""
    not_priced: tuple[str, ...] = ()
    """Names of devices that it held and whose price nobody knew."""


@dataclass
class Preparation:
    """For one run, in one thread. `drain` and `kill` only set flags, so a signal handler may call them."""

    asked: Asked
    say: Callable[[str], None] = lambda text: None
    """Is told what people should hear at once."""
    on_progress: Callable[[Mapping[str, Any]], None] = lambda status: None
    """Is shown status.json again and again."""
    clock: Clock = field(default_factory=SystemClock)
    cancelled: bool = False
    """Whether the stop was asked for in the store: `osctl prepare cancel`."""
    _stop: str = ""
    _told: str = ""

    @property
    def stopped(self) -> bool:
        """Whether somebody has asked it to stop."""
        return bool(self._stop)

    def drain(self) -> None:
        """Finish what is at hand, keep it, and leave."""
        self._stop = self._stop or "drain"

    def kill(self) -> None:
        """End now. What is kept already is kept."""
        self._stop = "kill"

    def run(self) -> Prepared:
        """Prepare, publish and register.

        Raises:
            UsageError: prepare.yaml cannot be prepared.
            RunFailed: too many rows could not be worked on, the disk is full, or the process broke.
            Refused: somebody else prepares it, or took over; or the name stands for other sources.
            Unreachable: the store did not answer.
        """
        asked, name = self.asked, self.asked.config.name
        directory = RunDirectory(asked.folder)
        left_out = LeftOut(asked.written)
        mark = finished.mark(asked.config, asked.stages, directory, left_out)
        if told := left_out.told():
            self.say(f"{name}: {told}")
        if not asked.retry and (published := finished.found(directory, asked.store, name, mark)) is not None:
            return Prepared(name, published, nothing_to_do=True, attempt=None, usd=Decimal(0))
        if not asked.replace:
            same_name.check(asked.store, asked.config)
        ledger = Ledger(asked.store, Keys(name).folder)
        handle = ledger.acquire(self.clock.now())
        try:
            held = HeldLease(handle, self.clock, TTL_S, f"data set {name}", follow=FOLLOW, again=directory.again)
            with held as lease, self._alone(directory) as lock:
                return _Run(self, ledger, lease, directory, lock, mark).run()
        finally:
            with contextlib.suppress(Unreachable):
                handle.release()

    @contextlib.contextmanager
    def _alone(self, directory: RunDirectory) -> Iterator[int]:
        directory.path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(directory.path)
        if lock is None:
            raise Refused(
                f"data set {self.asked.config.name}: {directory.path} is in use by another preparation of this machine, for another store. "
                "Wait for it, or prepare under another name: --name"
            )
        try:
            yield lock
        finally:
            os.close(lock)


class _Run:
    """While the lease and the run directory are ours."""

    def __init__(self, whole: Preparation, ledger: Ledger, lease: HeldLease, directory: RunDirectory, lock: int, mark: str) -> None:
        self.whole, self.asked, self.ledger, self.lease = whole, whole.asked, ledger, lease
        self.directory, self.lock, self.mark, self.clock = directory, lock, mark, whole.clock
        self.store, self.name = whole.asked.store, whole.asked.config.name
        self.keys = Keys(self.name)
        self.mirror = Mirror(directory.kept, self.store, self.keys.kept)
        self.status = StatusObject(self.store, self.keys.status, self.clock)
        self.pods: pods_of.PodsObject | None = None
        self._away = ""
        self._heard = (self.lease.epoch, -1)
        self._listen_next = 0.0

    def run(self) -> Prepared:
        self._event("launched", detail=self.asked.holder)
        attempts.close_lost(self.store, self.keys, self.lease.handle, self.clock.now(), self._event, self._last_status())
        config = removed.without(self.store, self.keys, self.asked.config)
        self.directory.lay_out(config, self.asked.stages, self.asked.parents, self.asked.written)
        brought = self.mirror.bring_back()
        if brought:
            self.whole.say(f"{self.name}: brought back {several(brought, 'result')} that another run has kept in {self.store.url}")
        intent = self._intent(config)
        if self.asked.pods is not None:
            self.pods = pods_of.PodsObject(self.store, self.keys.pods(intent.attempt), self.asked.pods, self.clock)
        try:
            return self._through(intent)
        finally:
            if self.pods is not None:
                with contextlib.suppress(Unreachable, Refused):  # what was seen before is written
                    self.pods.look()

    def _through(self, intent: Intent) -> Prepared:
        """From its intent to what is published of it."""
        outcome = self._attempt(intent)
        self._event("outcome", attempt=intent.attempt, detail=f"{outcome.class_}: {outcome.reason}")
        if outcome.class_ != "completed":
            self._event("ended", detail="cancelled" if outcome.class_ == "drained" else "failed")
            return self._ended(intent, outcome)
        if not published_report.add(self.directory, self.clock.now()):
            self.whole.say(f"{self.name}: too many clips for a page beside them; to make it: osctl prepare report {self.name}")
        published = publish(self.store, self.name, self.directory.out)
        captions = (self.directory.out / CAPTIONS).read_bytes()
        register(self.store, self.name, published, captions, now=self.clock.now(), holder=self.asked.holder)
        said = f"{published.description.digest} {published.place}"
        if not any(event.kind == "committed" and event.detail == said for event in self.ledger.events()):
            self._event("committed", attempt=intent.attempt, detail=said)
        finished.remember(self.directory, self.mark, published)
        self._event("ended", detail="succeeded")
        return self._prepared(published, intent, outcome)

    # The attempt

    def _intent(self, config: PrepareConfig) -> Intent:
        number = max(attempts.numbers(self.store, self.keys), default=0) + 1
        intent = Intent(
            name=self.name, attempt=number, epoch=self.lease.epoch, created=self.clock.now(), config=config.model_dump(mode="json"),
            stages=tuple(self.asked.stages), workers=config.workers or cores(), device=DEVICE, price=self.asked.price,
            gpu=self.asked.gpu, gpu_price=self.asked.gpu_price, where=self.asked.where, made_of=self.asked.made_of,
            code=code_version(),
        )  # fmt: skip
        self.lease.check()
        self.store.create(self.keys.intent(number), intent.encode())
        self._event("attempt", attempt=number)
        return intent

    def _last_status(self) -> Mapping[str, Any]:
        """status.json of an earlier attempt: as it lies here, or as its launcher, elsewhere, wrote it into the store."""
        return status_object.newer(self.directory.status(), status_object.read(self.store, self.keys.status))

    def _attempt(self, intent: Intent) -> Outcome:
        clock = AttemptClock.here()
        bound = clock()
        place = self.asked.place
        ended = self._process(clock) if place is None else self._sharded(clock, Shards(self.store, self.keys, place))
        self._copy(all_=True)
        outcome = self._outcome(intent, bound, ended.time, ended.status)
        self.lease.check()
        self.store.create(self.keys.outcome(intent.attempt), outcome.encode())
        self.status.write(self.directory.status())
        return outcome

    def _process(self, clock: AttemptClock, *more: str) -> Ended:
        """Run the process over the run directory, to its end."""
        self.lease.check()
        process = TrainerProcess(self.directory.path, self.lock, clock)
        try:
            words = [word.replace("{run_dir}", str(self.directory.path)) for word in (*self.asked.command, *more)]
            variables = modules.reading_clips(modules.environment(self.asked.env)) | {"PYTHONUNBUFFERED": "1"}
            process.start(words, variables, log=self.directory.log)
            self._watch(process, clock)
            assert process.ended is not None
            return process.ended
        finally:
            process.close()  # whatever happened: nothing of it outlives this launcher
            (self.directory.path / ALIVE).unlink(missing_ok=True)

    def _sharded(self, clock: AttemptClock, shards: Shards) -> Ended:
        """Own shard, then all that the other pods have done of theirs, as one data set."""
        shards.forget_others()
        if not shards.is_done(0):
            ended = self._process(clock, *shards.place.words)
            if ended.status != 0:
                return ended
            self._copy(all_=True)
            Mirror(self.directory.quarantined, self.store, shards.aside).copy_new(all_=True)
            shards.commit(ShardDone(shard=0, of=shards.place.of, pod=self.asked.holder, ended=self.clock.now()))
        self._wait_for(shards)
        self.mirror.bring_back()
        Mirror(self.directory.quarantined, self.store, shards.aside).bring_back()
        return self._process(clock, "--retry", "none")  # each pod has tried its own rows

    def _wait_for(self, shards: Shards) -> None:
        """Until all shards are done, or somebody asks to stop: then the process that merges leaves at once."""
        said = ""
        while not self.whole.stopped:
            with contextlib.suppress(Unreachable):  # asked again
                missing = shards.missing()
                if not missing:
                    return
                words = f"{self.name}: {shards.place.of - len(missing)} of {shards.place.of} shards are done"
                if words != said:
                    self.whole.say(words)
                said = words
                self._listen()
                if self.pods is not None:
                    self.pods.look_sometimes()
            self.lease.check()
            self.clock.sleep(LOOK_SHARDS_S)
        self.directory.ask_to_drain()

    def _watch(self, process: TrainerProcess, clock: AttemptClock) -> None:
        asked = ""
        while process.ended is None:
            if process.has_spoken(LOOK_S):
                process.listen(clock())
            try:
                self.lease.check()
                self._listen()
                self._copy()
                self.status.write_sometimes(self.directory.status())
                if self.pods is not None:
                    self.pods.look_sometimes()
            except Unreachable as error:  # the steps need no store; what is new is copied later
                self._say_away(str(error))
            except Refused:  # somebody else has it now
                process.kill(clock())
                raise
            self.whole.on_progress(self.directory.status())
            stop = self.whole._stop
            if stop == "kill" and process.ended is None:
                process.kill(clock())
            elif stop and stop != asked:
                self.directory.ask_to_drain()
            asked = stop

    def _listen(self) -> None:
        """Look for a `cancel` that another process wrote into our epoch. Raises Unreachable."""
        if self.clock.elapsed() < self._listen_next:
            return
        self._listen_next = self.clock.elapsed() + CANCEL_POLL_S
        for event in self.ledger.events(after=self._heard):
            self._heard = (event.epoch, event.seq)
            if event.kind == "cancel" and event.epoch == self.lease.epoch:
                self.whole.cancelled = True
                if event.asks_to_kill:
                    self.whole.kill()
                else:
                    self.whole.drain()

    def _copy(self, *, all_: bool = False) -> None:
        self.mirror.copy_new(all_=all_)
        self._away = ""

    def _say_away(self, text: str) -> None:
        before, self._away = self._away, text
        if before != text:
            self.whole.say(f"{self.name}: {text}; the steps go on, and what they keep is copied once it answers")

    def _outcome(self, intent: Intent, bound: float, ended: float, wait_status: int) -> Outcome:
        code = os.waitstatus_to_exitcode(wait_status)
        result, status = self.directory.result(), self.directory.status()
        kind = end_of(code)
        if kind == "completed" and not self.directory.description():
            kind, reason = "code", "it says that it is complete, and there is no DATASET.json"
        else:
            killed = f"the process was ended by {signal.Signals(-code).name}" if code < 0 else ""
            reason = str(result.get("reason") or "") or killed or (self.directory.last_words() if kind != "completed" else "")
        before = [one.outcome for one in attempts.all_of(self.store, self.keys) if one.outcome is not None]
        captions = spent_since(status, before)
        cores_s = intent.workers * max(0.0, ended - bound)
        if self.pods is not None:
            with contextlib.suppress(Unreachable, Refused):  # pods.json, which the bill goes by, is written at the end once more
                cores_s = sum(one.core_seconds for one in self.pods.look())
        return Outcome(
            class_=kind, exit_code=code, reason=reason, bound=bound, ended=ended, epoch=self.lease.epoch,
            device_seconds=cores_s, held=held_of(status),
            tokens_in=captions[0], tokens_out=captions[1], caption_usd=captions[2],
            dataset=str(result["digest"]) if kind == "completed" and result.get("digest") else None,
        )  # fmt: skip

    def _ended(self, intent: Intent, outcome: Outcome) -> Prepared:
        """Raises UsageError, RunFailed, where it was not asked to stop."""
        if outcome.class_ == "drained" or self.whole._stop:
            return self._prepared(None, intent, outcome)
        fact = f"data set {self.name}: {outcome.reason or f'the process ended with {outcome.exit_code}'}"
        kind = UsageError if outcome.class_ == "config" else RunFailed
        again = "Correct that, and run the same command again" if kind is UsageError else f"To go on: {self.directory.again}"
        advice = "" if "osctl " in fact else f". Its output is in {self.directory.log}; what is done is kept. {again}"
        raise kind(f"{fact}{advice}")

    def _prepared(self, published: Published | None, intent: Intent, outcome: Outcome) -> Prepared:
        held = self.pods.known if self.pods is not None else ()
        spent = bill([attempts.Attempt(intent.attempt, intent, outcome, held)])
        return Prepared(self.name, published, nothing_to_do=False, attempt=intent.attempt, usd=spent.usd, not_priced=spent.not_priced)

    def _event(self, kind: EventKind, *, attempt: int | None = None, detail: str = "") -> None:
        with self.lease.ours():
            self.ledger.append_event(self.lease.handle, kind, now=self.clock.now(), attempt=attempt, detail=detail)


def end_of(code: int) -> End:
    """What an exit code says; a negative one is a signal."""
    if code < 0 or code - 128 in (9, 11, 6):
        return "signal"
    return next((kind for kind, number in EXIT_CODES.items() if number == code), "code")


def spent_since(status: Mapping[str, Any], before: Iterable[Outcome]) -> tuple[int, int, float]:
    """(tokens in, tokens out, dollars) of an attempt's captions: status.json counts those of earlier attempts as well."""
    totals = [status.get(name) for name in ("tokens_in", "tokens_out", "usd")]
    tokens_in, tokens_out, usd = (total if isinstance(total, int | float) and total >= 0 else 0 for total in totals)
    for one in before:
        tokens_in, tokens_out, usd = tokens_in - one.tokens_in, tokens_out - one.tokens_out, usd - one.caption_usd
    return max(0, int(tokens_in)), max(0, int(tokens_out)), max(0.0, float(usd))


def cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0))
