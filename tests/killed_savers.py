"""Ranks that do nothing but save in the background, as fast as they can, and are killed: for tests/opensora/checkpoint/test_writer.py.

    python tests/killed_savers.py STAGE_YAML FOLDER ROUNDS RANKS [WHO]
    python tests/killed_savers.py STAGE_YAML FOLDER

Each round forks the ranks anew (a fork of a process that has imported torch costs milliseconds), kills all of them or the one of number
WHO at a random moment, and looks at what is left: every checkpoint must be whole, and none may be lost that was there. The others of a
killed one must end by themselves. Without ROUNDS, one rank is killed before each of the calls that change a directory, one after the other.
Prints what it saw; ends with a traceback where a law is broken.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from opensora.checkpoint import reader as checkpoint
from opensora.checkpoint.writer import PeerFailed, Saver
from opensora.config import StageConfig, read_stage

PEER_FAILED = 75
PATIENCE_S = 10


def shards_of(step: int, rank: int, ranks: int) -> dict[str, dict[str, checkpoint.TensorShard]]:
    tensors = {"w": torch.full((5, 3000), float(step)), "b": torch.full((), float(step))}
    return {part: checkpoint.divide(tensors, rank, ranks) for part in checkpoint.TENSORS}


def save_for_ever(stage: StageConfig, folder: Path, encoders: Path, rank: int, ranks: int, step: int, made: int, go: int) -> None:
    saver = Saver(folder, stage, writer=rank, writers=ranks, here=tuple(range(ranks)), device=torch.device("cpu"))
    os.write(made, b".")
    os.read(go, 1)
    while True:
        saver.save(shards_of(step, rank, ranks), encoders, step=step, world_size=ranks, seen=(step,), clips="", carried=(), reset=())
        step += 1


def one_round(stage: StageConfig, folder: Path, encoders: Path, ranks: int, who: int | None, number: int) -> int:
    """One life of the ranks; step of the newest checkpoint."""
    before = checkpoint.latest(folder)
    first = 1 if before is None else checkpoint.step_of(before) + 1
    (made, make), (gone, go) = os.pipe(), os.pipe()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(stage, folder, encoders, rank, ranks, first, make, gone)
            except PeerFailed:
                os._exit(PEER_FAILED)
            finally:
                os._exit(1)
        pids.append(pid)
    for _ in range(ranks):
        os.read(made, 1)
    os.write(go, b"." * ranks)
    while number % 2 and checkpoint.latest(folder) == before:  # a loaded machine may otherwise never come to the end of a save
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    victims = pids if who is None else [pids[who]]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + PATIENCE_S
    for pid in pids:
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < until, "a rank waits for one that is gone"
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(ended[1])
        assert code == (-signal.SIGKILL if pid in victims else PEER_FAILED), code
    for descriptor in (made, make, gone, go):
        os.close(descriptor)
    return look(folder, before)


CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")
"""Audit events of what makes, renames or removes files; what is written lies in files that these have made."""


def one_call(stage: StageConfig, folder: Path, encoders: Path, last: int) -> bool:
    """One life of one rank, which ends before call `last` of its second save; whether it came to that."""
    before = checkpoint.latest(folder)
    step = 1 if before is None else checkpoint.step_of(before) + 1
    pid = os.fork()
    if pid == 0:
        saver = Saver(folder, stage, writer=0, writers=1, here=(0,), device=torch.device("cpu"))
        counted = -1

        def count(event: str, _arguments: object) -> None:
            nonlocal counted
            if counted >= 0 and event in CALLS:
                counted += 1
                if counted > last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        for number in (step, step + 1):
            saver.wait()
            counted = 0 if number > step else -1
            saver.save(shards_of(number, 0, 1), encoders, step=number, world_size=1, seen=(number,), clips="", carried=(), reset=())
        saver.wait()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    assert look(folder, before) >= step, "the save before the last was whole"
    return code != 0


def look(folder: Path, before: Path | None) -> int:
    found = [path for path in folder.iterdir() if path.name.startswith("step-")]
    for path in found:
        reader = checkpoint.Reader(path)
        for part in checkpoint.TENSORS:
            for name, shape in {"w": (5, 3000), "b": ()}.items():
                assert torch.equal(reader.tensor(part, name), torch.full(shape, float(reader.record.step))), path
    newest = checkpoint.latest(folder)
    assert before is None or (newest is not None and newest >= before), "a good checkpoint is gone"
    return 0 if newest is None else checkpoint.step_of(newest)


def main() -> None:
    torch.set_num_threads(1)
    stage, folder = read_stage(Path(sys.argv[1])), Path(sys.argv[2])
    encoders = folder.parent / "encoders"
    halves = 0
    steps: list[int] = []
    if len(sys.argv) == 3:
        while one_call(stage, folder, encoders, len(steps)):
            steps.append(look(folder, None))
    else:
        rounds, ranks, who = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]) if len(sys.argv) > 5 else None
        for number in range(rounds):
            steps.append(one_round(stage, folder, encoders, ranks, who, number))
            halves += any(path.name.endswith((".partial", ".failed")) for path in folder.iterdir())
    print(json.dumps({"steps": steps, "halves": halves}))


if __name__ == "__main__":
    main()
