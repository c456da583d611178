"""forked_torchrun.py without its imports: elastic agent and ranks are forked from a process that has imported the trainer.

    python tests/warm_torchrun.py serve DESCRIPTOR               says `ready`, then forks them for each client of this listening socket
    python tests/warm_torchrun.py SOCKET RUN_DIR DEVICES         a client, which stands for them: `trainer=warm_trainer()` of tiny_recipe

An attempt takes 5 CPU-seconds less. The client is what an agent's guard starts; it passes signals on and ends with the code of what it
stands for, which dies as soon as the client does. But what trains is not below the guard: a test that kills, or counts what is left
behind, takes `FORKED`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

REQUEST_BYTES = 1 << 20
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stand_for(server: str, run_dir: str, devices: str) -> int:
    """The client: its exit code."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.connect(server)
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: link.send(str(int(number)).encode()))
    request = {"run_dir": run_dir, "devices": int(devices), "env": dict(os.environ), "folder": os.getcwd(), "nice": os.nice(0)}  # noqa: PTH109 # pathlib would double the start
    socket.send_fds(link, [json.dumps(request).encode()], [1, 2])
    return int(link.recv(16) or 1)  # nothing: they were killed


def serve(listener: socket.socket) -> None:
    from forked_torchrun import import_all

    import_all()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked here: it tells its client how it ended
    while True:
        link, _ = listener.accept()
        if not os.fork():
            listener.close()
            run(link)
        link.close()


def run(link: socket.socket) -> None:
    """In the forked process: what the client was started to do."""
    import threading
    import traceback

    from forked_torchrun import launch

    code = 1
    try:
        data, (out, err), _, _ = socket.recv_fds(link, REQUEST_BYTES, 2)
        request = json.loads(data)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.nice(request["nice"] - os.nice(0))
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        os.dup2(out, 1)
        os.dup2(err, 2)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        threading.Thread(target=obey, args=(link,), daemon=True).start()
        launch(request["run_dir"], request["devices"])
        code = 0
    except BaseException:  # noqa: BLE001 # as Python itself ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        link.send(str(code).encode())
        os._exit(code)


def obey(link: socket.socket) -> None:
    """Signals that the client got; its death is everybody's."""
    while number := link.recv(16):
        os.kill(os.getpid(), int(number))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(stand_for(*sys.argv[1:]))
