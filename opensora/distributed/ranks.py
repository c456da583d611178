"""Ranks: how the processes of one training job meet, agree and die.

Owns the process group (gloo on a CPU, NCCL on CUDA), the device of a rank and its threads. The nodes of a job share nothing but
that group: each has a run directory of its own, and its first rank writes metrics and result there for all of the node.
How the ranks divide the work between them is `opensora.distributed.parallel`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from opensora.errors import ConfigError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PEER_LOST = 75
"""Exit code of a rank that ended because another rank was gone: the cause is with the other rank."""
PATIENCE = timedelta(days=7)
"""How long ranks wait while one of them encodes a stage's clips. The agent watches its heartbeats; if it dies, the wait ends at once."""
POLL_S, BEAT_S = 0.01, 1.0
LONGEST_TEXT = 4096
"""Bytes that `Ranks.share` carries: a path's limit on Linux."""
LONGEST_WORD = 2048
"""Bytes that `Ranks.tell` carries of each rank."""


class PeerLost(Exception):
    """Another rank went away in the middle of an exchange. That rank reports the cause; this one reports nothing."""


def is_peer_lost(error: Exception) -> bool:
    """Whether a collective inside of a forward or backward pass failed because a rank is gone: gloo has no exception of its own."""
    return isinstance(error, PeerLost | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. A job of one process needs no process group."""

    rank: int
    world: int
    device: torch.device
    node: int = 0
    nodes: int = 1
    patient: dist.ProcessGroup | None = None
    """All ranks over gloo, for waits that may take hours. None if there is one rank."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def here(self) -> tuple[int, ...]:
        """The ranks of this node."""
        count = self.world // self.nodes
        return tuple(range(self.node * count, (self.node + 1) * count))

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.rank == self.here[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` over all ranks, in place; the same bits on every rank.

        Raises:
            PeerLost: a rank is gone.
        """
        if self.world > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:  # gloo and NCCL both say it this way; an all-reduce of a plain tensor has no other failure
                raise PeerLost(str(error)) from error
        return tensor

    def barrier(self, beat: Callable[[], None] = lambda: None) -> None:
        """Return when every rank got here, however long that takes; `beat` as in `share`. Raises PeerLost.

        Over gloo on every device: with NCCL a host goes on as soon as its stream has been told to wait.
        """
        self.share("", beat)

    def share(self, text: str, beat: Callable[[], None] = lambda: None) -> str:
        """The text of a node's first rank, on every rank of that node, once every node's has come here, however long that takes.

        `beat` is called about every second while this waits. Raises PeerLost.
        """
        if self.patient is None:
            return text
        row = self.node if self.is_first_here else None
        return self._exchange(text, row, (self.nodes, LONGEST_TEXT), beat)[self.node]

    def tell(self, text: str, beat: Callable[[], None] = lambda: None) -> list[str]:
        """Every rank's text (LONGEST_WORD bytes at most), in the order of the ranks; `beat` as in `share`. Raises PeerLost."""
        if self.patient is None:
            return [text]
        return self._exchange(text, self.rank, (self.world, LONGEST_WORD), beat)

    def _exchange(self, text: str, row: int | None, shape: tuple[int, int], beat: Callable[[], None]) -> list[str]:
        """The texts of all rows; each row comes from the rank that has it. Over gloo, however long that takes."""
        content = torch.zeros(shape, dtype=torch.uint8)
        if text and row is not None:
            content[row, : len(text.encode())] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        try:
            work, beaten = dist.all_reduce(content, group=self.patient, async_op=True), time.monotonic()
            while not work.is_completed():
                time.sleep(POLL_S)
                if time.monotonic() - beaten > BEAT_S:
                    beat()
                    beaten = time.monotonic()
            work.wait()
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return [bytes(one.tolist()).rstrip(b"\0").decode() for one in content]

    def broadcast(self, data: bytes) -> bytes:
        """The first rank's bytes, on every rank of every node; the bytes of the others are ignored. Raises PeerLost."""
        size = int(self.sum_(torch.tensor([len(data) if self.is_first else 0], device=self.device)))
        content = torch.zeros(size, dtype=torch.uint8)
        if self.is_first and data:
            content[:] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.sum_(content.to(self.device)).cpu().numpy().tobytes()


@contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other ranks of the launcher (torchrun's environment), or be the only one.

    Raises:
        ConfigError: a rank has no device of its own, or the nodes have different numbers of ranks.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    node, nodes = int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if world % nodes:
        raise ConfigError(f"{world} ranks on {nodes} nodes: each node must have as many as the others; start the same number on each")
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if world == 1 and "MASTER_ADDR" not in os.environ:
        yield Ranks(rank, world, device, node, nodes)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, timeout=timedelta(minutes=10))
    yield Ranks(rank, world, device, node, nodes, cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE)))
    dist.destroy_process_group()  # only after a good end: with a peer gone this would wait for it


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this node has no device: {torch.cuda.device_count()} CUDA devices are visible; start one rank per device"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def die_with_launcher() -> None:
    """Ask the kernel to SIGKILL this process when the one that started it dies, so that no rank is left holding a device.

    A launcher that died before the call is noticed by the changed parent; one that a subreaper replaced is noticed by
    `join`, whose store lived in it.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
