"""Preparations on Ray of which a process is killed at a chosen effect, for tests/opensora/prepare/test_kills.py.

    python tests/killed_on_ray.py FOLDER SEED TRIALS          each trial: one run on Ray with one death, then a run inline
    python tests/killed_on_ray.py FOLDER 0 1 guard worker engine      one trial: one run on Ray in which these die, one after the other

Killed are the engine, the process that drives Ray, a raylet, an actor and a guard. When is told by what has happened, not by time: effects
of the engine are counted (each row that is kept, each call that makes, renames or removes a file: so also those between data and commit)
from the first one at which there is somebody to kill. A run that ended before is done again with an earlier effect, so that each trial
has its death. After a death `out` is absent or whole; a run whose engine lives completes by itself; then digest, captions and files are
those of a run inline that nobody killed. Prints the deaths as JSON; ends with a traceback where a law is broken.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import killed_preparers
import prepare_steps
import psutil
from killed_preparers import CALLS, FINAL, OLDER, configure, finished, rows, whole, writes

from opensora.prepare import engine
from opensora.prepare.open_pack import OpenPack

WORDS = {"driver": "opensora.prepare.ray.driver", "raylet": "raylet/raylet", "worker": "MapWorker", "guard": "multiprocessing.forkserver"}
KINDS = ("engine", *WORDS)


def sources(folder: Path) -> None:
    killed_preparers.sources(folder)
    for number in range(8):
        prepare_steps.write_video(folder, f"e{number}", (0, 10, 1.0 + 0.1 * number, f"ball {number}"), (10, 20, 2.0, f"cube {number}"))


@dataclass
class Effects:
    """Of this process. What is to be killed is killed right before an effect."""

    deaths: Sequence[tuple[str, int]]
    """(whom, at which effect of those at which there was one), one after the other."""
    note: Path
    """Where they are written down: {"seen": {KIND: effects}, "killed": [[KIND, effect]]}."""
    seen: Counter[str] = field(default_factory=Counter)
    killed: list[tuple[str, str]] = field(default_factory=list)
    _looks: bool = False

    def install(self) -> None:
        def heard(event: str, arguments: tuple[object, ...]) -> None:
            if event in CALLS and (event != "open" or writes(arguments)):
                self.before(event)

        sys.addaudithook(heard)
        added = OpenPack.add

        def add(pack: OpenPack, key: str, content: bytes) -> tuple[int, int]:
            self.before(f"a row of {Path(pack._folder).parent.name} is kept")
            return added(pack, key, content)

        OpenPack.add = add  # type: ignore[method-assign]

    def before(self, effect: str) -> None:
        if self._looks or threading.current_thread() is not threading.main_thread():  # status.json is written by the clock
            return
        self._looks = True
        try:
            self._look(effect)
        finally:
            self._looks = False

    def _look(self, effect: str) -> None:
        there = on_ray()
        wanted = self.deaths[len(self.killed)] if len(self.killed) < len(self.deaths) else ("", 0)
        for kind in KINDS:
            victims = there.get(kind, [])
            self.seen[kind] += bool(victims)
            if kind == wanted[0] and victims and self.seen[kind] >= wanted[1]:
                self.killed.append((kind, effect))
                self.seen.clear()
                self.write()
                os.kill(victims[-1], signal.SIGKILL)
                return

    def write(self) -> None:
        self.note.write_text(json.dumps({"seen": self.seen, "killed": self.killed}))


def on_ray() -> dict[str, list[int]]:
    """Pids by kind; of the engine once Ray has an actor, or has been there."""
    found: dict[str, list[int]] = {}
    for driver in psutil.Process().children():
        if WORDS["driver"] in words_of(driver):
            found["driver"] = [driver.pid]
            for process in driver.children(recursive=True):
                kind = next((kind for kind, word in WORDS.items() if word in words_of(process)), "")
                found.setdefault(kind, []).append(process.pid)
    global _began
    _began = _began or "worker" in found
    return found | ({"engine": [os.getpid()]} if _began else {})


_began = False


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def begun(run: Path, deaths: Sequence[tuple[str, int]]) -> tuple[int, dict[str, Any]]:
    """A run on Ray, to its end: its exit code, and what was noted of it."""
    note = run.parent / "effects.json"
    note.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(run.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 99
        try:
            effects = Effects(deaths, note)
            effects.install()
            code = engine.run(run, prepare_steps.STEPS, engine="ray").code
            effects.write()
        except BaseException:  # noqa: BLE001 - a forked child
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, json.loads(note.read_text())


def prepared(run: Path, videos: Path, *, older: bool) -> None:
    """A run directory; with the data set of an older configuration in it, or without."""
    if older:
        configure(run, videos, OLDER)
        finished(run)
    configure(run, videos, FINAL)


def trial(run: Path, deaths: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """Who died before what. Empty: the run had ended before."""
    code, noted = begun(run, deaths)
    killed = [(kind, effect) for kind, effect in noted["killed"]]
    assert code == (-signal.SIGKILL if killed and killed[-1][0] == "engine" else 0), (
        killed,
        code,
        (run.parent / "log.txt").read_text()[-3000:],
    )
    whole(run)
    return killed


def many(folder: Path, draw: random.Random, trials: int, unbroken: tuple[Any, ...]) -> Counter[str]:
    videos, effects = folder / "videos", []
    for older in (False, True):
        noted = folder / f"noted-{older}" / "run"
        prepared(noted, videos, older=older)
        code, found = begun(noted, ())
        assert code == 0 and rows(noted) == unbroken
        effects.append(found["seen"])
    deaths = Counter[str]()
    for number in range(trials):
        whom, older = KINDS[number % len(KINDS)], bool(number // len(KINDS) % 2)
        killed: list[tuple[str, str]] = []
        most, tries = effects[older][whom], 0
        assert most, f"{whom} is never there: {effects}"
        while not killed:
            assert tries < 4, f"{whom}: no death in {tries} runs"
            tries += 1
            run = folder / f"trial-{number}-{tries}" / "run"
            prepared(run, videos, older=older)
            killed = trial(run, [(whom, draw.randint(1, max(1, most // tries)))])
        finished(run)
        assert rows(run) == unbroken, killed
        assert not (run / "out.partial").exists() and not (run / "out.old").exists()
        deaths.update(f"{kind} before {effect}" for kind, effect in killed)
        print(number, killed, file=sys.stderr, flush=True)
        shutil.rmtree(run.parent)
    return deaths


def main() -> None:
    folder, seed, trials, whom = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    sources(folder / "videos")
    inline = folder / "unbroken" / "run"
    prepared(inline, folder / "videos", older=False)
    finished(inline)
    unbroken = rows(inline)
    if whom:
        run = folder / "trial" / "run"
        prepared(run, folder / "videos", older=False)
        killed = trial(run, [(kind, 3) for kind in whom])
        assert [kind for kind, _ in killed] == whom, killed
        finished(run)
        assert rows(run) == unbroken, killed
        deaths = Counter(f"{kind} before {effect}" for kind, effect in killed)
    else:
        deaths = many(folder, random.Random(seed), trials, unbroken)
    print(json.dumps({"trials": trials, "deaths": deaths}))


if __name__ == "__main__":
    main()
