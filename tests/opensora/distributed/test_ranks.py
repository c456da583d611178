from __future__ import annotations

import os
import signal
import subprocess
import sys

import gang
import pytest
import torch
from processes import has_spoken, running

from opensora.distributed.ranks import Ranks, join
from opensora.errors import ConfigError

LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
"""Ends with its rank: a rank that fails before its first word leaves nobody who waits for that word."""
RANK = """
import os, sys, time
from opensora.distributed import ranks
ranks.die_with_launcher()
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.long
def test_a_rank_dies_with_its_launcher() -> None:
    with running(sys.executable, "-c", LAUNCHER, RANK, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        rank = os.pidfd_open(pid)
        launcher.kill()
        died = has_spoken(rank, 60)
        if not died:
            signal.pidfd_send_signal(rank, signal.SIGKILL)
        os.close(rank)
    assert died


def test_one_process_needs_no_group() -> None:
    with join() as ranks:
        assert (ranks.rank, ranks.world, ranks.is_first) == (0, 1, True)
        assert ranks.sum_(torch.ones(2)).tolist() == [1, 1]
        assert ranks.share("a path/ü") == "a path/ü"
        assert not torch.distributed.is_initialized()


@pytest.mark.long
def test_one_process_under_a_launcher_has_one() -> None:
    code = "from opensora.distributed import ranks; import torch\n"
    code += "with ranks.join() as ranks: print(ranks.world, torch.distributed.get_world_size(), ranks.share('x'))"
    (rank,) = gang.start(1, "-c", code)
    assert rank.communicate(60).split() == ["1", "1", "x"]


def test_ranks_know_their_place() -> None:
    assert not Ranks(1, 2, torch.device("cpu")).is_first
    ranks = [Ranks(rank, 6, torch.device("cpu"), node=rank // 2, nodes=3) for rank in range(6)]
    assert [rank.is_first for rank in ranks] == [True] + 5 * [False]
    assert [rank.is_first_here for rank in ranks] == 3 * [True, False]


SHARING = """
import os
from opensora.distributed import ranks
rank = int(os.environ["RANK"])
os.environ |= {"LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2), "GROUP_WORLD_SIZE": "2"}
with ranks.join() as ranks:
    word = ranks.share(f"of rank {ranks.rank}")
    data = ranks.broadcast(bytes([0, ranks.rank, 0]) * 1000)
    print(ranks.rank, word, data == bytes([0, 0, 0]) * 1000, ranks.broadcast(b""), sep="|")
"""


@pytest.mark.long
def test_a_node_shares_its_own_text_and_the_first_rank_hands_its_bytes_to_all() -> None:
    ranks = gang.start(4, "-c", SHARING)
    said = [rank.communicate(60).strip() for rank in ranks]
    assert said == [f"{rank}|of rank {rank // 2 * 2}|True|b''" for rank in range(4)]


def test_nodes_with_different_numbers_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="3 ranks on 2 nodes"), join():
        pass
