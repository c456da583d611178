"""Law: of twenty films one crashes its decoder, one hangs it and one eats memory without end: these three are put aside, and nothing waits.

Here over each engine that needs no cluster: guards of this machine, Ray, and pods that divide the sources. Steps are those of
tests/prepare_steps.py; the processes, guards and kills are real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import prepare_steps
import pytest
from prepare_bench import Bench
from shard_pods import asked, launcher, worker

from orchestrator.prepare.run import Preparation, Prepared

if TYPE_CHECKING:
    from proofs import Proof

DEADLINE_S = 8.0
POISON = {"crash": "crash (SIGSEGV)", "hang": "takes too long", "memory": "needs too much memory"}


@pytest.mark.prove("poison-rows")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["inline", "ray", "indexed"])
def test_of_twenty_films_exactly_the_three_that_kill_are_put_aside(bench: Bench, engine: str, proof: Proof) -> None:
    for path in bench.videos.iterdir():
        path.unlink()
    for number in range(17):
        prepare_steps.write_video(bench.videos, f"v{number:02}", (0, 10, 1.0, f"a ball {number}"), (10, 20, 2.0, "a cube"))
    for first in POISON:
        prepare_steps.write_video(bench.videos, first, (0, 10, 1.0, "never"), first=first)
    with gaps(bench.folder) as longest:
        published = prepared(bench, engine).published
    assert published is not None and published.description.clips == 34
    quarantined: dict[str, int] = {}
    for step in published.description.steps.values():
        quarantined |= step["quarantined"]
    assert quarantined == dict.fromkeys(POISON.values(), 1)
    assert max(longest) <= DEADLINE_S + 10, f"{max(longest):.1f} s without a row"
    proof.count(1, f"{engine}: at most {max(longest):.1f} s without a row, the deadline is {DEADLINE_S:g} s")


def prepared(bench: Bench, engine: str) -> Prepared:
    limits = {"deadline_s": DEADLINE_S, "memory_gb": 0.6}
    if engine == "indexed":
        pod, head = worker(bench, 1), launcher(bench)
        for one in (pod, head):
            config = one.asked.config
            one.asked = dataclasses.replace(
                one.asked, config=config.model_copy(update={"limits": config.limits.model_copy(update=limits), "max_quarantined": 1.0})
            )
        other = threading.Thread(target=pod.run)
        other.start()
        try:
            return head.run()
        finally:
            other.join()
    one = asked(bench, "run", None)
    config = one.config.model_copy(update={"limits": one.config.limits.model_copy(update=limits), "max_quarantined": 1.0})
    return Preparation(dataclasses.replace(one, config=config, command=(*one.command, "--engine", engine)), say=bench.said.append).run()


@contextlib.contextmanager
def gaps(folder: Path) -> Iterator[list[float]]:
    """Seconds between two changes of what is looked at, by any process below this folder, from its first row on."""
    found, over = [0.0], threading.Event()

    def watch() -> None:
        before: dict[Path, list[int]] = {}
        since = 0.0
        while not over.wait(0.1):
            for path in folder.glob("*/status.json"):
                with contextlib.suppress(OSError, ValueError):
                    status = json.loads(path.read_bytes())
                    steps = [one for name, one in status["steps"].items() if name != "download"]  # that is done before Ray has started
                    looked = [one["kept"] + sum(one["dropped"].values()) + sum(one["quarantined"].values()) for one in steps]
                    if sum(looked) and before.get(path) != looked:
                        now = time.monotonic()
                        found.append(now - since if since else 0.0)
                        before[path], since = looked, now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
