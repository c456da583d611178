"""What the forward pass keeps for the backward pass: `config.Activations`, applied to a model's blocks.

Owns when a block is computed again, where the inputs of blocks are kept until then, and the MLP in parts. Refuses to choose a policy
(`opensora.planning.memory.choose` does) and to know what a block is.

Law: on one device every `recompute` gives the same loss and gradients as `none`, bit for bit, because the same kernels run on the same
numbers, only later. With `mlp_chunks` they are equal up to the rounding of a sum, because a weight's gradient is added up part by part.
The blocks draw no random numbers, so no generator's state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from opensora.config import Activations

Block = TypeVar("Block")

ATEN = torch.ops.aten
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # opensora.model.linear's product, where torch has it
KEPT = frozenset(
    {
        *([_ONEDNN.default] if _ONEDNN is not None else []),
        ATEN.mm.default,
        ATEN.addmm.default,
        ATEN.bmm.default,
        ATEN.baddbmm.default,
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        ATEN._scaled_dot_product_flash_attention.default,
        ATEN._scaled_dot_product_efficient_attention.default,
        ATEN._scaled_dot_product_cudnn_attention.default,
    }
)
"""Operations whose results `selective` keeps: matrix products and attention, which take all but a few percent of a block's time."""


def run_blocks(blocks: Sequence[Block], x: Tensor, call: Callable[[int, Block, Tensor], Tensor], activations: Activations) -> Tensor:
    """Run `x` through the blocks one after the other, and keep for the backward pass what `activations` says.

    Args:
        x: the residual stream, any shape.
        call: computes block number i from the residual stream, `call(i, block, x)`. It may run again in the backward pass, so it must be
            a function of its arguments and of tensors that do not change until then.

    Raises:
        ValueError: `recompute` is auto; the caller has to choose a policy first.
    """
    if activations.recompute == "auto":
        raise ValueError("activations.recompute is auto, which is no policy; call opensora.planning.memory.choose first")
    if activations.recompute == "none" or not torch.is_grad_enabled():
        return _run(call, 0, blocks, x)
    if activations.recompute == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _selective)
        for index, block in enumerate(blocks):
            x = checkpoint(call, index, block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return x
    host = Host(x.device) if activations.offload else None
    for first in range(0, len(blocks), activations.every):
        group = partial(_run, call, first, blocks[first : first + activations.every])
        if host is None:
            x = checkpoint(group, x, use_reentrant=False, preserve_rng_state=False)
        else:
            # these hooks see only the group's input: inside, the checkpoint's own hooks are in place
            with torch.autograd.graph.saved_tensors_hooks(host.keep, host.fetch):
                x = checkpoint(group, x, use_reentrant=False, preserve_rng_state=False)
    return x


def in_chunks(mlp: Callable[[Tensor], Tensor], x: Tensor, chunks: int) -> Tensor:
    """`mlp(x)`, computed for `chunks` parts of the tokens. Each part keeps only its input; the rest is computed again in the backward pass.

    Args:
        mlp: works on each token by itself. It may include norm, modulation and gate if these work on each token by itself too.
        x: (B, ..., D).

    Returns:
        (B, ..., D_out), contiguous.
    """
    if chunks == 1:
        return mlp(x)
    tokens = x.flatten(1, -2)
    if torch.is_grad_enabled():
        parts = [checkpoint(mlp, part, use_reentrant=False, preserve_rng_state=False) for part in tokens.chunk(chunks, dim=1)]
    else:
        parts = [mlp(part) for part in tokens.chunk(chunks, dim=1)]
    return torch.cat(parts, dim=1).reshape(*x.shape[:-1], -1)


class Host:
    """Tensors of one forward pass that are kept in host memory until the backward pass, which asks for them in reverse order.

    On CUDA the copies run on a separate stream beside the computation. While the backward pass uses one tensor, the next one is copied
    back: two of them are on the device at a time. On a CPU each tensor is simply copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._kept: list[Tensor | None] = []
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def keep(self, tensor: Tensor) -> Tensor | int:
        """Start to copy the tensor to the host. Returns the handle that `fetch` takes."""
        if not tensor.numel():
            return tensor  # torch's own bookkeeping uses empty tensors
        if self._stream is None:
            self._kept.append(tensor.clone())
        else:
            # after the first step this comes from torch's cache of pinned memory
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # so that its memory is not reused before it is copied
            self._kept.append(host)
        return len(self._kept) - 1

    def fetch(self, kept: Tensor | int) -> Tensor:
        """The tensor, on the device again. Each can be fetched once."""
        if isinstance(kept, Tensor):
            return kept
        if self._stream is None:
            tensor, self._kept[kept] = self._kept[kept], None
            assert tensor is not None, f"boundary {kept} was fetched twice"
            return tensor
        self._start(kept)
        tensor, arrived = self._coming.pop(kept)
        if kept:
            self._start(kept - 1)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        tensor.record_stream(current)
        return tensor

    def _start(self, index: int) -> None:
        if index in self._coming:
            return
        host, self._kept[index] = self._kept[index], None
        assert host is not None, f"boundary {index} was fetched twice"
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            tensor = host.to(self._device, non_blocking=True)
            self._coming[index] = tensor, self._stream.record_event()


def _run(call: Callable[[int, Block, Tensor], Tensor], first: int, blocks: Sequence[Block], x: Tensor) -> Tensor:
    for index, block in enumerate(blocks, first):
        x = call(index, block, x)
    return x


def _selective(_: object, operation: object, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
