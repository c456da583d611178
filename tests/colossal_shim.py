"""What ColossalAI 0.5.0 lacks on a CPU, for the tests alone: its plugins beside TorchDDP believe that they run on CUDA.

Stands in for streams, random states and pinned memory, none of which changes a number. What it cannot show: overlap of exchange and
computation, NCCL, CUDA kernels (HybridAdam's is replaced by its own branch in torch), and memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from opensora.distributed import colossal_plugins


class EmptyStream:
    """A queue that is always empty."""

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


def on_a_device(initialise: Any) -> Any:
    """Gemini tells CUDA from the host by a tensor's device, and would take its chunks for those that wait on the host."""

    def initialised(self: Any, *arguments: Any, **named: Any) -> None:
        initialise(self, *arguments, **named)
        self.shard_device = torch.device("cuda")

    return initialised


def install() -> None:
    """Let every plugin run on the CPU of this process, until it ends."""
    from colossalai import accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.nn.optimizer import cpu_adam
    from colossalai.zero.gemini.chunk import Chunk

    class Pretender(CpuAccelerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"

        def synchronize(self, device: object = None) -> None: ...

        def get_rng_state(self, device: object = None) -> torch.Tensor:
            return torch.get_rng_state()

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def Stream(self, *_: object, **__: object) -> EmptyStream:
            return EmptyStream()

        def current_stream(self, device: object = None) -> EmptyStream:
            return EmptyStream()

        def stream(self, stream_: object) -> Any:
            return nullcontext()

    class NoKernel:
        """HybridAdam takes this only for fp32 gradients; Gemini's are bf16, and those go through torch."""

        def load(self) -> NoKernel:
            return self

        def CPUAdamOptimizer(self, *_: object) -> None: ...

    accelerator.set_accelerator(Pretender())
    cpu_adam.CPUAdamLoader = NoKernel
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    Chunk.__init__ = on_a_device(Chunk.__init__)
    Chunk.shard_move = lambda *_, **__: None
    colossal_plugins.ON_CPU.update(("low_level_zero", "gemini", "hybrid_parallel"))
