from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opensora.errors import ConfigError
from opensora.ranks import Ranks, join

LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
import time
time.sleep(600)
"""
RANK = """
import os, sys, time
from opensora import ranks
ranks.die_with_launcher()
print(os.getpid(), flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_dies_with_its_launcher() -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert alive(pid)
        launcher.kill()
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        died = not alive(pid)
        if not died:
            os.kill(pid, signal.SIGKILL)
    assert died


def test_one_process_needs_no_group() -> None:
    with join() as ranks:
        assert (ranks.rank, ranks.world, ranks.is_first) == (0, 1, True)
        assert ranks.sum_(torch.ones(2)).tolist() == [1, 1]
        assert ranks.share("a path/ü") == "a path/ü"
        assert not torch.distributed.is_initialized()


def test_one_process_under_a_launcher_has_one() -> None:
    code = "from opensora import ranks; import torch\n"
    code += "with ranks.join() as ranks: print(ranks.world, torch.distributed.get_world_size(), ranks.share('x'))"
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | launched, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "1", "x"], done.stderr


def test_ranks_know_their_place() -> None:
    assert not Ranks(1, 2, torch.device("cpu")).is_first
    ranks = [Ranks(rank, 6, torch.device("cpu"), node=rank // 2, nodes=3) for rank in range(6)]
    assert [rank.is_first for rank in ranks] == [True] + 5 * [False]
    assert [rank.is_first_here for rank in ranks] == 3 * [True, False]


SHARING = """
import os, sys
from opensora import ranks
with ranks.join() as ranks:
    word = ranks.share(f"of rank {ranks.rank}")
    data = ranks.hand_out(bytes([0, ranks.rank, 0]) * 1000)
    print(ranks.rank, word, data == bytes([0, 0, 0]) * 1000, ranks.hand_out(b""), sep="|")
"""


def test_a_node_shares_its_own_text_and_the_first_rank_hands_its_bytes_to_all() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = []
    for rank in range(4):
        place = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2, "GROUP_WORLD_SIZE": 2}
        env = os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(subprocess.Popen([sys.executable, "-c", SHARING], env=env, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    assert said == [f"{rank}|of rank {rank // 2 * 2}|True|b''" for rank in range(4)]


def test_nodes_with_different_numbers_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="3 ranks on 2 nodes"), join():
        pass
