"""Captions from a server: many requests at a time, each clip asked until it has a caption or a reason why not.

Owns which clip is asked when: the pace (`pace`), the budget (`budget`), back-off, what is asked again, and when all of it ends. Refuses to
know the shapes of requests (`profiles`), connections (`connection`) and what a good answer is (`answers`).

- A failure of the server on one clip is tried again with the same seed, up to `tries` requests for that clip, with pauses that double and
  are shortened by chance. A bad answer (cut off, repeating, empty, a refusal) is asked again with another seed and a higher temperature, at
  most `MOST_ASKED` times in all. Then the clip is put aside with its reason.
- A server that is busy costs a clip no try. One that refuses `tries` requests in a row while one at a time is sent ends the run.
- A server that cannot be reached costs a clip no try either. After `timeout_s` without a connection the run ends, and says so once.
- An end (`halt`, budget, server) lets requests that are under way finish within their time limit and sends no new one. Clips that were not
  asked, or not to the end, are not reported: they are asked when the run goes on.

A killed process loses the answers that were under way: at most `concurrency` requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora.dataset.prepare_config import CaptionServer
from opensora.dataset.rows import Captioned, Clip, Leaves, Quarantine
from opensora.errors import ConfigError
from opensora.prepare.captions import answers, profiles
from opensora.prepare.captions.budget import Budget, SetAside, Spent
from opensora.prepare.captions.connection import Busy, Connection, Failed, Refused, Unreachable
from opensora.prepare.captions.language import language_of
from opensora.prepare.captions.pace import Pace
from opensora.prepare.captions.shown import FramesOf, shown

LOG = logging.getLogger("opensora.prepare")
MOST_ASKED = 3
"""Answers of one clip that are looked at."""
WARMER = 0.3
"""Added to the temperature each time that a clip is asked again."""
HOTTEST = 1.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
AHEAD = {"images": 32, "video_url": 8, "input_video": 8}
"""Clips that are made ready (decoded, encoded) while all requests are under way; of images at least as many as requests, since a server
that answers a whole batch at once wants a whole batch next. Fewer videos: one may hold 43 MB."""
LOOK_S = 0.05
"""How often `halt` is asked."""

OnDone = Callable[[str, Captioned | Leaves], None]


@dataclass(frozen=True)
class Run:
    """What a caller hands in."""

    folder: Path
    """`Clip.file.path` is relative to it."""
    on_done: OnDone
    on_spent: Callable[[Spent], None]
    halt: Callable[[], bool]
    frames_of: FramesOf
    first_pause_s: float = FIRST_PAUSE_S


def caption(clips: Sequence[Clip], settings: CaptionServer, run: Run, *, key: str, before: Spent) -> Spent:
    """
    Args:
        key: for the server; empty: none.
        before: what earlier runs used; counts against the budget.

    Raises:
        ConfigError: the server cannot be used. What was reported before stays.
    """
    return asyncio.run(_caption(clips, settings, run, key, before))


async def _caption(clips: Sequence[Clip], settings: CaptionServer, run: Run, key: str, before: Spent) -> Spent:
    began = asyncio.get_running_loop().time()
    async with Connection(settings, key) as connection:
        asking = _Asking(clips, settings, run, connection, Budget(settings, before))
        try:
            await asking.all()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # one worker's end is that of all
    return replace(asking.budget.spent, seconds=asyncio.get_running_loop().time() - began, stopped=asking.stopped)


@dataclass
class _Tried:
    """Of one clip, so far."""

    failures: int = 0
    bad: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def times(self) -> int:
        return self.failures + self.bad


class _Asking:
    def __init__(self, clips: Sequence[Clip], settings: CaptionServer, run: Run, connection: Connection, budget: Budget) -> None:
        self.budget, self.stopped = budget, ""
        self._clips, self._settings, self._run, self._connection = iter(clips), settings, run, connection
        ahead = AHEAD[settings.profile]
        self._workers = min(
            len(clips), settings.concurrency + (max(ahead, settings.concurrency) if settings.profile == "images" else ahead)
        )
        self._software: profiles.Software = ""
        self._pace = Pace(settings.concurrency)
        self._turn, self._news, self._stop = asyncio.Lock(), asyncio.Event(), asyncio.Event()
        self._error: ConfigError | None = None
        self._down_since: float | None = None
        self._down_times = 0
        self._odd_said = False

    async def all(self) -> None:
        """Ask for all clips.

        Raises:
            ConfigError, or what `on_done` raises; in an exception group.
        """
        watch = asyncio.create_task(self._watch())
        try:
            await self._greet()
            await asyncio.to_thread(language_of, "it loads its model once")  # 0.65 s in which no answer could be read otherwise
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._work())
        finally:
            watch.cancel()
        if self._error is not None:
            raise self._error

    # --- Ends -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while not self._stop.is_set():
            if self._run.halt():
                self._end("halted")
            await asyncio.sleep(LOOK_S)

    def _end(self, why: str) -> None:
        """No new request."""
        if not self._stop.is_set():
            self.stopped = why
            self._stop.set()
            self._news.set()

    def _fail(self, error: ConfigError) -> None:
        if not self._stop.is_set():
            self._error = error
        self._end(str(error))

    async def _pause(self, times: int) -> None:
        """Back off, the `times`-th time in a row; at once where the run ends."""
        seconds = min(self._run.first_pause_s * 2 ** min(times - 1, 16), LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return

    # --- The server -----------------------------------------------------------------------------------------------

    async def _greet(self) -> None:
        """Wait until the server is there, and find out what it is."""
        while not self._stop.is_set():
            try:
                listing = await self._connection.models()
            except Unreachable as error:
                await self._down(error)
                continue
            self._up()
            self._software, _ = profiles.software_of(listing, self._settings.model)
            profiles.check(self._settings, self._software)
            return

    async def _down(self, error: Unreachable) -> None:
        """No connection: say so once, and wait, or end the run."""
        now, address = asyncio.get_running_loop().time(), self._connection.address
        if self._down_since is None:
            self._down_since, self._down_times = now, 0
            LOG.warning("captioning server %s cannot be reached (%s); trying for %g s", address, error, self._settings.timeout_s)
        elif now - self._down_since >= self._settings.timeout_s:
            self._fail(
                ConfigError(
                    f"captioning server {address} could not be reached for {self._settings.timeout_s:g} s ({error}). Start it, or set "
                    f"caption.url to where it is; `curl {address}/models` answers when it is ready. Then run the same command again: "
                    "what was captioned is kept"
                )
            )
        self._down_times += 1
        await self._pause(self._down_times)

    def _up(self) -> None:
        if self._down_since is not None:
            LOG.warning("captioning server %s answers again", self._connection.address)
            self._down_since = None

    # --- Clips ----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        for clip in self._clips:
            if self._stop.is_set():
                return
            try:
                sees, body = await asyncio.to_thread(self._prepared, clip)
            except Leaves as leaves:
                self._run.on_done(clip.id, leaves)
                continue
            result = await self._ask(sees, body)
            if result is None:
                return
            self._run.on_done(clip.id, result)

    def _prepared(self, clip: Clip) -> tuple[profiles.Shown, bytes]:
        """In a thread: what a clip shows, and its first request as it is sent. Raises Quarantine."""
        sees = shown(clip, self._run.folder, self._settings, self._run.frames_of)
        return sees, self._body(sees, 0)

    def _body(self, sees: profiles.Shown, bad: int) -> bytes:
        """Of the request after so many bad answers."""
        settings = self._settings
        seed, temperature = settings.seed + bad, _warmer(settings.temperature, bad)
        return json.dumps(profiles.request(settings, self._software, sees, seed=seed, temperature=temperature)).encode()

    async def _ask(self, sees: profiles.Shown, body: bytes) -> Captioned | Quarantine | None:
        """A clip's caption, or why it has none; None: the run ends before."""
        tried = _Tried()
        while (given := await self._may_send(sees.pixels)) is not None:
            try:
                if tried.bad:
                    body = self._body(sees, tried.bad)
                result = await self._once(body, given, tried)
            except Busy as error:
                await self._busy(error)
            except Unreachable as error:
                await self._down(error)
            except Refused as error:
                return Quarantine(error.reason, error.detail)
            except Failed as error:
                tried.failures += 1
                if tried.times >= self._settings.tries:
                    return Quarantine(error.reason, f"{error.detail} ({tried.times} requests)")
                await self._pause(tried.failures)
            except ConfigError as error:
                self._fail(error)
            else:
                if isinstance(result, Captioned):
                    return result
                tried.bad += 1
                if tried.bad >= MOST_ASKED or tried.times >= self._settings.tries:
                    return result
        return None

    async def _may_send(self, pixels: int) -> SetAside | None:
        """Wait for a request's turn; None: the run ends. One clip waits here at a time, the others behind it in order."""
        async with self._turn:
            while not self._stop.is_set():
                wait = self._pace.wait(asyncio.get_running_loop().time())
                if wait == 0:
                    given = self.budget.set_aside(pixels)
                    if given is not None:
                        self._pace.sent()
                        return given
                    if self._pace.in_flight == 0:
                        self._end(self.budget.told(pixels))
                        return None
                    wait = None
                self._news.clear()
                try:
                    await asyncio.wait_for(self._news.wait(), wait)
                except TimeoutError:
                    continue
        return None

    async def _once(self, body: bytes, given: SetAside, tried: _Tried) -> Captioned | Quarantine:
        """One request. Raises what `Connection.ask` raises."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answer = await self._connection.ask(body)
        except BaseException as error:
            self._pace.done()
            if isinstance(error, Refused | Busy | Unreachable | ConfigError):
                self.budget.unused(given)
            else:
                self.budget.untold(given)
            raise
        else:
            self._pace.done()
            self._pace.answered()
            self._up()
            if answer.odd and not self._odd_said:
                self._odd_said = True
                address, most = self._connection.address, f"{profiles.MOST_TOKENS:,}"
                LOG.warning("captioning server %s counts %s: 0 to %s can be. It counts as not told", address, answer.odd, most)
            if answer.tokens_in is None or answer.tokens_out is None:
                self.budget.untold(given)
            else:
                self.budget.answered(given, answer.tokens_in, answer.tokens_out)
        finally:
            self._news.set()
            self._run.on_spent(self.budget.spent)
        tried.tokens_in += answer.tokens_in or 0
        tried.tokens_out += answer.tokens_out or 0
        # in a thread: sixteen answers come at a time, and the next sixteen requests are to go out first
        return await asyncio.to_thread(self._judged, answer, replace(tried), loop.time() - began)

    def _judged(self, answer: profiles.Answer, tried: _Tried, seconds: float) -> Captioned | Quarantine:
        settings, seed = self._settings, self._settings.seed + tried.bad
        text, problem = answers.judged(answer.text, answer.finish)
        if problem:
            return Quarantine(problem, f"{tried.bad + 1} answers, the last with seed {seed}: {answers.start(text)}")
        return Captioned(text, settings.model, settings.prompt, seed, tried.tokens_in, tried.tokens_out, seconds, language_of(text))

    async def _busy(self, error: Busy) -> None:
        settings, pace = self._settings, self._pace
        self._up()
        asked = error.retry_after_s
        if asked is not None and asked > settings.timeout_s:
            self._fail(
                ConfigError(
                    f"captioning server {self._connection.address} asks to wait {asked:.0f} s ({error}), longer than caption.timeout_s "
                    f"{settings.timeout_s:g}. Run the same command again later, or set caption.timeout_s above it: what was captioned "
                    "is kept"
                )
            )
            return
        pace.refused(asyncio.get_running_loop().time(), asked)
        if pace.refused_in_a_row >= settings.tries:
            self._fail(
                ConfigError(
                    f"captioning server {self._connection.address} refused {pace.refused_in_a_row} requests in a row, sent one at a time "
                    f"({error}). Run the same command again later: what was captioned is kept"
                )
            )
        elif pace.in_flight == 0 and asked is None:
            await self._pause(pace.refused_in_a_row)


def _warmer(temperature: float, times: int) -> float:
    return temperature if not times else max(temperature, min(round(temperature + WARMER * times, 3), HOTTEST))
