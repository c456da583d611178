"""Preparations that are killed and begun again, for tests/opensora/prepare/test_kills.py. The steps are those of tests/prepare_steps.py.

    python tests/killed_preparers.py FOLDER SEED TRIALS calls|moments

`calls`: the engine is killed before one of the calls that change a directory, chosen at random among all of a run. `moments`: the engine
or a process of its (fork server, guard, encoder) is killed at a random moment, up to four times a trial. In every other trial the data
set of an older configuration is there already. After each death `out` must be absent or whole; after the last run digest and rows must be
those of a run that nobody killed. Prints what it saw as JSON; ends with a traceback where a law is broken.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import prepare_steps
import psutil
import yaml

from opensora.prepare import engine, publish

CALLS = ("os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree", "open")
"""Audit events of what makes, renames or removes files; what is written lies in files that these have made."""
FINAL = {"rules": [{"column": "motion", "min": 0.5}], "duplicates": None}
OLDER = {"rules": [{"column": "motion", "min": 1.4}], "duplicates": None}


def sources(folder: Path) -> None:
    prepare_steps.write_video(folder, "a", (0, 10, 1.0, "a red ball"), (10, 30, 0.2, "nothing moves"), (30, 40, 2.0, "a blue ball"))
    prepare_steps.write_video(folder, "b", (0, 10, 1.5, "a green ball falls"))
    prepare_steps.write_video(folder, "c", (5, 25, 3.0, "a yellow ball"), (25, 40, 1.0, "a white ball"))
    prepare_steps.write_video(folder, "d", (0, 10, 1.5, "a green ball falls"))


def configure(run: Path, videos: Path, rules: object) -> None:
    (run / "stages").mkdir(parents=True, exist_ok=True)
    (run / "stages" / "first.yaml").write_text("steps: 1\n")
    content = {
        "name": "killed", "workers": 2, "sources": [{"path": str(videos)}], "limits": {"deadline_s": 60}, "filter": rules,
        "caption": {"kind": "digits"},
    }  # fmt: skip
    (run / "prepare.yaml").write_text(yaml.safe_dump(content))


def begin(run: Path, last_call: int | None = None) -> int:
    """Fork an engine; its pid. It is killed before call `last_call` of those that change a directory."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(run.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    counted = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal counted
        if event not in CALLS or (event == "open" and not writes(arguments)):
            return
        counted += 1
        if counted == last_call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    code = 99
    try:
        code = engine.run(run, prepare_steps.STEPS).code
        (run.parent / "counted").write_text(str(counted))
    except BaseException:  # noqa: BLE001 - a forked child
        traceback.print_exc()
    finally:
        os._exit(code)


def writes(arguments: tuple[object, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or bool(isinstance(flags, int) and flags & os.O_CREAT)


def whole(run: Path) -> None:
    """`out` is absent, or a data set with all its files."""
    out = run / "out"
    if not out.exists():
        return
    about = publish.read(out)
    assert publish.is_there(out, publish.Wanted(about["digest"], about["made_of"])), f"{out} is half there"


def rows(run: Path) -> tuple[str, str, list[str]]:
    about = publish.read(run / "out")
    return about["digest"], (run / "out" / "captions.csv").read_text(), sorted(about["files"])


def finished(run: Path) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(begin(run), 0)[1])
    assert code == 0, (code, (run / "result.json").read_text())


def killed_at_a_call(run: Path, draw: random.Random, calls: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(begin(run, draw.randint(1, calls)), 0)[1])
    assert code in (0, -signal.SIGKILL), code
    whole(run)
    return int(code != 0)


def killed_at_moments(run: Path, draw: random.Random, seconds: float) -> int:
    kills = 0
    for _ in range(draw.randint(1, 4)):
        pid = begin(run)
        time.sleep(draw.uniform(0, seconds))
        victims = guards(pid) if draw.random() < 0.4 else [pid]
        if victims:
            victim = draw.choice(victims)
            kills += 1
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                kills -= 1
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = (run / "result.json").read_text() if code == engine.CODE else ""
        assert code in (0, -signal.SIGKILL) or "encode: its process ended with exit code -9" in said, (code, said)
        whole(run)
    return kills


def guards(pid: int) -> list[int]:
    """The engine's processes: its fork server, guards and encoder."""
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def main() -> None:
    folder, seed, trials, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    draw = random.Random(f"{seed} {kind}")
    sources(folder / "videos")
    unbroken = folder / "unbroken" / "run"
    configure(unbroken, folder / "videos", FINAL)
    began = time.monotonic()
    finished(unbroken)
    seconds, calls = time.monotonic() - began, int((folder / "unbroken" / "counted").read_text())
    kills = 0
    for trial in range(trials):
        run = folder / f"trial-{trial}" / "run"
        if trial % 2:
            configure(run, folder / "videos", OLDER)
            finished(run)
        configure(run, folder / "videos", FINAL)
        kills += killed_at_a_call(run, draw, calls) if kind == "calls" else killed_at_moments(run, draw, seconds)
        finished(run)
        assert rows(run) == rows(unbroken)
        assert not (run / "out.partial").exists()
        assert not (run / "out.old").exists()
        shutil.rmtree(run.parent)
    print(json.dumps({"trials": trials, "kills": kills, "calls": calls}))


if __name__ == "__main__":
    sys.modules["killed_preparers"] = sys.modules["__main__"]
    main()
