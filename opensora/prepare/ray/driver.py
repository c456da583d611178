"""`python -m opensora.prepare.ray.driver WIRE`: the process that drives Ray, a child of the engine.

Owns Ray's start and end, and the data set that rows stream through. It is a process of its own since Ray ends the process that drives it
when its raylet is lost, and takes over the handlers of its signals: the engine outlives both and starts another one. Refuses to know which
rows were answered: the engine does, and sends the others again.

Retries. A task of an actor that died is done again, at most TASK_RETRIES times; then the data set fails, and the engine starts another.
Actors themselves are restarted without a bound: Ray 2.60 replaces none that has used up its restarts, and a pool without actors waits for
ever. The read task is never retried: Ray would leave out as many rows of its second try as it had taken of the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from opensora.dataset.ray_cores import of_actor
from opensora.errors import ConfigError
from opensora.prepare.ray.feed import Feed, Rows
from opensora.prepare.ray.models import Models
from opensora.prepare.ray.setup import Answer, Ended, Failed, Heard, Leave, Ready, Refusal, Setup
from opensora.prepare.ray.worker import Worker
from opensora.printable import one_line

TASK_RETRIES = 2
IN_FLIGHT = 2
"""Rows of an actor: one that it works on and one that waits, since Ray Data takes up to 0.1 s to give out the next. With one a row of no
work took 50 ms in a pool of two, with two 12 ms, with four 11 ms, and then more rows wait behind one that hangs."""
INIT_DEATHS = 3
"""Actors in a row that may die while they start."""
LOOK_S = 1.0


def main(wire: Connection) -> int:
    setup: Setup = wire.recv()
    lock = threading.Lock()

    def send(message: object) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            wire.send(message)

    try:
        _start(setup)
        setup = _with_room(setup)
        feed = ray.remote(num_cpus=0, max_restarts=0)(Feed).remote()
        send(Ready())
        for target, name in ((_rows_in, "rows"), (_heard, "heard")):
            threading.Thread(target=target, args=(wire, send, feed, setup), daemon=True, name=name).start()
        for table in _answers(setup, feed):
            columns = (table.column(name).to_pylist() for name in (Answer._fields if setup.models is not None else Answer._fields[:3]))
            send([Answer(*one) for one in zip(*columns, strict=True)])
        send(Ended(_spilled()))
    except ConfigError as error:
        send(Refusal(str(error)))
    except Exception as error:  # noqa: BLE001 - whatever Ray raises, the engine decides
        send(Failed(one_line(f"{type(error).__name__}: {error}", 600)))
    finally:
        ray.shutdown()
    return 0


def _start(setup: Setup) -> None:
    if setup.address:
        ray.init(address=setup.address, log_to_driver=False)
    else:
        ray.init(
            num_cpus=_cores(setup), include_dashboard=False, log_to_driver=False,
            object_store_memory=setup.object_store, object_spilling_directory=setup.spill, _temp_dir=setup.temporary,
            _node_ip_address="127.0.0.1",  # Ray 2.60 takes the machine's own address all the same: its token keeps others out
        )  # fmt: skip
    context = DataContext.get_current()
    context.target_max_block_size = 1  # a block for each row
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a film of hours takes hours; the engine hears whether actors live
    context.max_consecutive_actor_init_deaths = INIT_DEATHS


def _with_room(setup: Setup) -> Setup:
    """In a Ray that runs, actors leave room for the read task. Raises ConfigError where an actor fits on no node."""
    if not setup.address:
        return setup
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    setup = replace(setup, num_cpus=_fitting(setup.num_cpus, nodes))
    if setup.models is None or not setup.models.num_cpus:  # who holds a GPU asks for no core
        return setup
    return replace(setup, models=replace(setup.models, num_cpus=_fitting(setup.models.num_cpus, nodes)))


def _fitting(wanted: float, nodes: Sequence[float]) -> float:
    fits = of_actor(wanted, nodes)
    if fits != wanted:
        sys.stdout.write(f"ray.num_cpus {wanted:g} would fill every node, so an actor asks for {fits:g}\n")  # into ray.log
    return fits


def _cores(setup: Setup) -> int:
    models = setup.models.actors * setup.models.num_cpus if setup.models is not None else 0.0
    return max(1, math.ceil(setup.actors * setup.num_cpus + models)) + 1


def _answers(setup: Setup, feed: Any) -> Any:
    """Blocks of answers, in the order in which they are ready."""
    rows = ray.data.read_datasource(Rows(feed), override_num_blocks=1, num_cpus=0.01, ray_remote_args={"max_retries": 0})
    fewest = setup.actors if not setup.address else 1
    pool = ActorPoolStrategy(min_size=fewest, max_size=setup.actors, max_tasks_in_flight_per_actor=IN_FLIGHT)
    resources = {"num_gpus": setup.num_gpus} if setup.num_gpus else {}
    done = rows.map_batches(
        Worker, fn_constructor_args=(setup, feed), batch_size=1, batch_format="numpy", compute=pool, num_cpus=setup.num_cpus,
        max_restarts=-1, max_task_retries=TASK_RETRIES, **resources,
    )  # fmt: skip
    if (models := setup.models) is not None:
        pool = ActorPoolStrategy(
            min_size=1 if setup.address else models.actors, max_size=models.actors, max_tasks_in_flight_per_actor=models.in_flight,
            max_concurrent_calls_per_actor=models.calls, enable_true_multi_threading=True,
        )  # fmt: skip
        gpus = {"num_gpus": models.num_gpus} if models.num_gpus else {}
        done = done.map_batches(
            Models, fn_constructor_args=(setup, feed), batch_size=1, batch_format="numpy", compute=pool, num_cpus=models.num_cpus,
            max_restarts=-1, max_task_retries=TASK_RETRIES, **gpus,
        )  # fmt: skip
    return done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _rows_in(wire: Connection, _send: Any, feed: Any, setup: Setup) -> None:
    """Rows of the engine, until it ends them or goes away."""
    try:
        while (rows := wire.recv()) is not None:
            ray.get(feed.leave.remote() if isinstance(rows, Leave) else feed.put.remote(rows))
        ray.get(feed.end.remote())
    except (EOFError, OSError):  # the engine is gone
        ray.shutdown()
        if not setup.address:
            shutil.rmtree(setup.temporary, ignore_errors=True)
        os._exit(1)
    except ray.exceptions.RayError:
        pass  # the data set fails by the same fault, and says so


def _heard(_wire: Connection, send: Any, feed: Any, _setup: Setup) -> None:
    with contextlib.suppress(ray.exceptions.RayError, OSError):
        while True:
            told, silent_s, worked_by = ray.get(feed.heard.remote())
            send(Heard(tuple(pickle.loads(one) for one in told), silent_s, worked_by))  # noqa: S301 - a guard of ours wrote it
            threading.Event().wait(LOOK_S)


def _spilled() -> int:
    """Bytes that all nodes have spilled so far."""
    from ray._private import internal_api

    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(internal_api.get_memory_info_reply(state).store_stats.spilled_bytes_total)


if __name__ == "__main__":
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    sys.exit(main(Connection(int(sys.argv[1]))))
