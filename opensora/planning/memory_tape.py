"""Tensors that know only their size: run a model's code on them and read how much memory it would take. No torch.

Owns the bookkeeping of storages as torch's autograd does it: what an operation keeps for its backward pass, when that is let go, how
gradients add up, and what checkpointing and host memory change about it. Refuses to know a model (`opensora.planning.sized_model`).

A storage is alive as long as Python refers to it, as in torch. So code on these tensors has to be written like the code on real ones: the
same local variables, deleted at the same places. The backward pass visits operations as autograd's engine does, the latest first.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

SHARED = 3
"""Counted references to a storage that another gradient uses too: the engine's own, getrefcount's, and that one."""


@dataclass
class Meter:
    """Bytes in one memory: now and at most."""

    live: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


class Storage:
    """Bytes that are there until nobody refers to them."""

    __slots__ = ("_meter", "size")

    def __init__(self, meter: Meter, size: float) -> None:
        self._meter, self.size = meter, round(size)
        meter.add(self.size)

    def __del__(self) -> None:
        self._meter.live -= self.size


class Placeholder:
    """A saved storage that will be computed again: number `index` of its frame."""

    __slots__ = ("frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame, self.index = frame, index

    def __del__(self) -> None:
        self.frame.again.pop(self.index, None)


Saved = Storage | Placeholder
Backward = Callable[[Storage, list[Storage]], list["Storage | None"]]
"""(gradient of the output, what was saved) -> gradients of the inputs, none where nobody wants one."""


@dataclass(eq=False)
class Node:
    """An operation of the graph."""

    number: int
    inputs: list[Node | None]
    backward: Backward
    saved: list[Saved]


@dataclass(eq=False)
class Tensor:
    """`count` numbers of `width` bytes in a storage, which other views may share."""

    storage: Storage
    count: int
    width: int
    node: Node | None = None
    cheap: bool = False
    """Whether the backward pass computes it again from what is kept anyway."""

    @property
    def size(self) -> int:
        return self.count * self.width


@dataclass(eq=False)
class Frame:
    """One checkpointed call."""

    run: Callable[[Tensor], Tensor]
    x: Saved | None
    like: tuple[int, int]
    """Count and width of the input."""
    selective: bool
    offload: bool
    count: int = 0
    """Storages that were saved in it."""
    kept: deque[Storage] = field(default_factory=deque)
    """Results that a selective one does not compute again."""
    again: dict[int, Storage] = field(default_factory=dict)
    """Storages of the second run, by number, until they are used."""


class _Enough(Exception):
    """All that was saved has been computed again."""


class Tape:
    """One device (and its host) on which a program runs.

    Args:
        host_apart: host memory is another memory than the device's; on a CPU it is not.
    """

    def __init__(self, *, host_apart: bool) -> None:
        self.device = Meter()
        self.host = Meter() if host_apart else self.device
        self._ahead: Storage | None = None
        """The input that is on its way back from the host, while the one after it is worked on."""
        self._number = 0
        self._frame: Frame | None = None
        """In which storages are replaced by placeholders."""
        self._again: Frame | None = None
        """Which is being computed again."""
        self._seen = 0

    def new(self, count: int, width: int) -> Tensor:
        """A tensor that nobody computed, and whose gradient nobody wants."""
        return Tensor(Storage(self.device, count * width), count, width)

    @property
    def again(self) -> bool:
        """Whether something is being computed again."""
        return self._again is not None

    def leaf(self) -> Node:
        """The end of a graph: a weight, or an input whose gradient goes nowhere."""
        return self._node([], _nothing, [])

    def temporary(self, size: float) -> None:
        """Memory that an operation takes while it runs."""
        Storage(self.device, size)

    def apply(
        self,
        inputs: Sequence[Tensor],
        size: float | None,
        backward: Backward,
        *,
        saves: Sequence[Storage] = (),
        saves_result: bool = False,
        beside: float = 0,
        costly: bool = False,
        like: tuple[int, int] | None = None,
    ) -> Tensor:
        """The result of an operation.

        Args:
            inputs: what it is computed from; the order is that of the gradients which `backward` returns.
            size: bytes of the result; none: a view of the first input.
            saves: what it keeps of its inputs for its backward pass.
            saves_result: whether it keeps its result too, and `beside`, bytes that only the backward pass wants (statistics).
            costly: a matrix product or attention, whose result a selective checkpoint keeps.
            like: count and width of the result; none: those of the first input.
        """
        count, width = like or (inputs[0].count, inputs[0].width)
        differentiable = any(tensor.node is not None for tensor in inputs)
        saved = [self._save(one) for one in saves] if differentiable else []
        storage = inputs[0].storage if size is None else self._result(size, costly)
        extra = self._result(beside, costly) if beside else None
        out = Tensor(storage, count, width)
        if differentiable:
            saved += [self._save(one) for one in (storage if saves_result else None, extra) if one is not None]
            out.node = self._node([tensor.node for tensor in inputs], backward, saved)
        return out

    def _result(self, size: float, costly: bool) -> Storage:
        if costly and self._frame is None and self._again is not None and self._again.kept:
            return self._again.kept.popleft()
        storage = Storage(self.device, size)
        if costly and self._frame is not None and self._frame.selective:
            self._frame.kept.append(storage)
        return storage

    def checkpoint(self, run: Callable[[Tensor], Tensor], x: Tensor, *, selective: bool = False, offload: bool = False) -> Tensor:
        """`run(x)`, of which the input alone is kept: on the device or the host. Selective: results of costly operations too."""
        boundary = Storage(self.host, x.size) if offload else self._save(x.storage)
        frame = Frame(run, boundary, (x.count, x.width), selective, offload)
        outer, self._frame = self._frame, frame
        again, self._again = self._again, None
        try:
            return run(x)
        finally:
            self._frame, self._again = outer, again

    def backward(self, loss: Tensor) -> None:
        """Walk the graph from `loss`, letting go of what each operation saved."""
        assert loss.node is not None
        pending: dict[Node, Storage] = {loss.node: Storage(self.device, loss.size)}
        queue = [(-loss.node.number, loss.node)]
        loss.node = None
        while queue:
            node = heapq.heappop(queue)[1]
            gradient = pending.pop(node)
            saved = [self._unpack(one) for one in node.saved]
            gradients = node.backward(gradient, saved)
            saved.clear()
            node.saved.clear()
            del gradient
            self._hand_on(node, gradients, pending, queue)

    def _hand_on(self, node: Node, gradients: list[Storage | None], pending: dict[Node, Storage], queue: list[tuple[int, Node]]) -> None:
        for target in reversed(node.inputs):
            one = gradients.pop()
            if target is None or one is None:
                continue
            if target not in pending:
                pending[target] = one
                heapq.heappush(queue, (-target.number, target))
            elif sys.getrefcount(pending[target]) >= SHARED:  # a new sum; otherwise it is added where it is
                pending[target] = Storage(self.device, one.size)

    def _node(self, inputs: list[Node | None], backward: Backward, saved: list[Saved]) -> Node:
        self._number += 1
        return Node(self._number, inputs, backward, saved)

    def _save(self, storage: Storage) -> Saved:
        if self._again is not None:
            self._again.again[self._seen] = storage
            self._seen += 1
            if self._seen == self._again.count:
                raise _Enough
            return storage
        if self._frame is None:
            return storage
        self._frame.count += 1
        return Placeholder(self._frame, self._frame.count - 1)

    def _unpack(self, saved: Saved) -> Storage:
        if isinstance(saved, Storage):
            return saved
        frame = saved.frame
        if saved.index not in frame.again:
            self._run_again(frame)
        return frame.again[saved.index]

    def _run_again(self, frame: Frame) -> None:
        assert frame.x is not None, "a checkpointed call runs again once"
        boundary = self._unpack(frame.x)
        if frame.offload:
            frame.x = None
            if self.host is not self.device:
                arrived, size = self._ahead, boundary.size
                boundary = arrived if arrived is not None else Storage(self.device, size)
                self._ahead = Storage(self.device, size)
                del arrived
        x = Tensor(boundary, *frame.like)
        del boundary
        x.node = self._node([], _nothing, [])
        state = self._frame, self._again, self._seen
        self._frame, self._again, self._seen = None, frame, 0
        try:
            with suppress(_Enough):  # raised by `_save` once all that was kept is there again: the rest of the function is not needed
                frame.run(x)
        finally:
            self._frame, self._again, self._seen = state
        assert len(frame.again) == frame.count, f"a call kept {frame.count} storages, and {len(frame.again)} when it ran again"
        frame.kept.clear()


def _nothing(_: Storage, __: list[Storage]) -> list[Storage | None]:
    return []
