"""The network of a stage and its loss, on tensors that know only their size: what one training step keeps in memory.

Owns the mirror of `opensora.model.stdit`: this code has to say what the model says, in the same order, because a storage is alive as long
as a local variable refers to it (`opensora.planning.memory_tape`). Whoever changes the model changes this too: the tests of `memory` fail
otherwise.

Legend: B batch · T latent frames · S spatial tokens · D width · L text tokens · n ranks that share a clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from opensora.config import Bucket, StageConfig
from opensora.planning.flops import TIME_WAVES
from opensora.planning.memory_tape import Storage, Tape, Tensor

FP32, BF16 = 4, 2
"""Bytes of a number."""
QUERY_BLOCK, HEAD_BLOCK = 128, 32
"""Flash attention rounds queries and head width up to these in the fp32 sum of its backward pass."""
LOSS_COPIES = {"flow": 1, "iddpm": 21}
"""Latent-sized tensors that the loss keeps for its backward pass; iddpm's bound of the variance is a long formula (measured)."""

DeviceKind = Literal["cuda", "cpu"]

Gradients = list["Storage | None"]


class SizedModel:
    """`opensora.model.stdit.STDiT` and the loss around it, on sized tensors. Names and order of statements are the model's."""

    def __init__(self, tape: Tape, stage: StageConfig, size: Bucket, compute: int, device: DeviceKind, *, divided: bool) -> None:
        """
        Args:
            compute: bytes of a number in matrix products, FP32 or BF16.
            divided: whether the ranks divide the weights, so that no bf16 copies of them are kept.
        """
        self.tape, self.stage, self.model, self.compute = tape, stage, stage.model, compute
        self.batch, self.latents = size.batch_size, size.batch_size * math.prod(stage.latent_shape_of(size))
        self.frames, self.tokens = stage.tokens_of(size)
        n = stage.parallel.sequence
        self.own_frames = -(-self.frames // n)
        self.autocast = compute == BF16
        self.fused = device == "cuda" and stage.compile
        self.cuda = device == "cuda"
        self.divided = divided
        self.casts: dict[str, Storage] = {}
        """Weights in bf16 by name, which autocast keeps until the forward pass is over."""
        self.waiting = 0
        """Bytes of the boundaries that are sent to the host."""

    def step(self) -> tuple[int, int, int]:
        """Bytes of the inputs, bytes more at the end of the forward pass, and the most in forward and backward pass, inputs included."""
        tape = self.tape
        clean, noise = tape.new(self.latents, FP32), tape.new(self.latents, FP32)
        vectors = tape.new(self.batch * self.model.caption_tokens * self.model.caption_width, FP32)
        inputs = tape.device.live
        noisy = tape.new(self.latents, FP32)
        prediction = self.forward(noisy, vectors)
        kept = LOSS_COPIES[self.stage.objective.kind] * clean.size
        target = tape.new(self.latents, FP32)
        loss = self._loss(prediction, kept)
        activations = tape.device.live - inputs
        self.casts.clear()
        del prediction, noise, target, noisy
        tape.backward(loss)
        return inputs, activations, tape.device.peak

    def forward(self, x: Tensor, captions: Tensor) -> Tensor:
        model, tape, width = self.model, self.tape, self.model.width
        numbers = math.prod(model.patch) * model.latent_channels
        spatial, temporal = tape.new(self.tokens * width, self.compute), tape.new(self.frames * width, self.compute)
        patches = tape.new(self.batch * self.own_frames * self.tokens * numbers, FP32)
        tokens = self.plus(self.linear(patches, numbers, width, "patches"), spatial)
        if model.temporal_position == "residual":
            tokens = self.plus(tokens, temporal)

        embedded = self.mlp(tape.new(self.batch * TIME_WAVES, FP32), (TIME_WAVES, width, width), "time")
        time6 = self.linear(self.pointwise(embedded), width, 6 * width, "time6")
        dropped = tape.new(captions.count, FP32)
        text = self.mlp(dropped, (model.caption_width, width, width), "captions")

        def through(index: int, x: Tensor, spatial: int = self.tokens) -> Tensor:
            position = temporal if index == 0 and model.temporal_position == "attention" else None
            return self.block(f"{index}", x, text, time6, position, spatial)

        routing = self.stage.routing
        some = self.tokens if routing is None else routing.tubes_through(self.tokens)
        if routing is None or some == self.tokens:
            tokens = self.run_blocks(tokens, range(model.depth), through)
        else:
            first, stop = routing.first_blocks, model.depth - routing.last_blocks
            tokens = self.run_blocks(tokens, range(first), through)
            routed = self.run_blocks(self.taken(tokens, some), range(first, stop), lambda index, x: through(index, x, some))
            tokens = self.put(tokens, routed)
            del routed
            tokens = self.run_blocks(tokens, range(stop, model.depth), through)
        patches = self.linear(self.modulated(tokens, embedded), width, math.prod(model.patch) * self.stage.out_channels, "final")
        if self.stage.parallel.sequence > 1:
            patches = self.collect(patches)
        return self.cast(self.copy(patches), FP32)

    def run_blocks(self, x: Tensor, blocks: range, call: Callable[[int, Tensor], Tensor]) -> Tensor:
        policy = self.stage.activations
        if policy.recompute == "none":
            for index in blocks:
                x = call(index, x)
            return x
        step = policy.every if policy.recompute == "full" else 1
        for first in range(0, len(blocks), step):

            def group(x: Tensor, some: range = blocks[first : first + step]) -> Tensor:
                for index in some:
                    x = call(index, x)
                return x

            if policy.offload:
                self.waiting += x.size
            x = self.tape.checkpoint(group, x, selective=policy.recompute == "selective", offload=policy.offload)
        return x

    def taken(self, x: Tensor, some: int) -> Tensor:
        """B T S D -> B T S' D; the index is a few numbers."""
        tape, size, count = self.tape, x.size, x.count // self.tokens * some
        return tape.apply([x], count * x.width, lambda _, __: [Storage(tape.device, size)], like=(count, x.width))

    def put(self, x: Tensor, routed: Tensor) -> Tensor:
        """B T S D, a part of it replaced. Both gradients are new."""
        tape, size, some = self.tape, x.size, routed.size
        return tape.apply([x, routed], size, lambda _, __: [Storage(tape.device, size), Storage(tape.device, some)])

    def block(self, name: str, x: Tensor, text: Tensor, time6: Tensor, position: Tensor | None, spatial_tokens: int) -> Tensor:
        modulation = self.small(self.small(time6, FP32), x.width)
        divided, width = self.stage.parallel.sequence > 1, self.model.width

        spatial = self.self_attention(f"{name}.spatial", self.modulated(x, modulation), spatial_tokens)
        x = self.gated(x, modulation, spatial)

        if self.stage.freeze != "temporal":
            tokens = -(-spatial_tokens // self.stage.parallel.sequence)
            if divided:
                x = self.exchange(x, self.frames * tokens)
            stream = x if position is None else self.plus(x, position)
            across = self.self_attention(f"{name}.temporal", self.across(stream, self.frames, tokens), self.frames)
            temporal = self.view(across, self.frames > 1 and tokens > 1)
            del across
            x = self.gated(x, modulation, temporal)
            if divided:
                x = self.exchange(x, self.own_frames * spatial_tokens)

        x = self.plus(x, self.cross_attention(f"{name}.cross", x, text))
        hidden = int(width * self.model.mlp_ratio)
        return self.gated(x, modulation, self.in_chunks(f"{name}.mlp", self.modulated(x, modulation), (width, hidden, width)))

    def self_attention(self, name: str, x: Tensor, keys: int) -> Tensor:
        width = self.model.width
        q = self.unbound(self.linear(x, width, 3 * width, f"{name}.qkv"))
        attended = self.attention(q, None, keys)
        return self.linear(attended, width, width, f"{name}.proj")

    def cross_attention(self, name: str, x: Tensor, text: Tensor) -> Tensor:
        width = self.model.width
        q = self.linear(x, width, width, f"{name}.query")
        k = self.unbound(self.linear(text, width, 2 * width, f"{name}.key_value"))
        attended = self.attention(q, k, x.count // width // self.batch)
        return self.linear(attended, width, width, f"{name}.proj")

    def mlp(self, x: Tensor, widths: tuple[int, int, int], name: str) -> Tensor:
        inner, hidden, outer = widths
        return self.linear(self.pointwise(self.linear(x, inner, hidden, f"{name}.fc1")), hidden, outer, f"{name}.fc2")

    def in_chunks(self, name: str, x: Tensor, widths: tuple[int, int, int]) -> Tensor:
        chunks, tape = self.stage.activations.mlp_chunks, self.tape
        if chunks == 1:
            return self.mlp(x, widths, name)
        rows, total, result = self.batch * widths[0], x.size, x.count * self.compute
        tokens = x.count // rows
        share = -(-tokens // chunks)
        whole = tape.apply([x], None, lambda _, __: [Storage(tape.device, total)])
        parts = []
        for start in range(0, tokens, share):
            part = Tensor(whole.storage, min(share, tokens - start) * rows, x.width, whole.node)
            parts.append(tape.checkpoint(lambda part: self.mlp(self.gathered(part), widths, name), part))
        count = len(parts)
        return tape.apply(parts, result, lambda gradient, _: [gradient] * count, like=(x.count, self.compute))

    def gathered(self, part: Tensor) -> Tensor:
        """Some tokens of each clip, next to each other."""
        return self.tape.apply([part], part.size, lambda gradient, _: [gradient]) if self.batch > 1 else part

    # --- operations ---

    def linear(self, x: Tensor, inner: int, outer: int, name: str) -> Tensor:
        """x times a weight (inner, outer). Keeps x, and the weight where it is a cast; `name` tells casts apart."""
        tape, wanted, rows = self.tape, x.node is not None, x.count // inner
        cheap, x, width, weight = x.cheap, self.cast(x, self.compute), self.compute, inner * outer
        cast = [self.cast_weight(name, weight * width)] if self.autocast and not self.divided else []

        def backward(_: Storage, __: list[Storage]) -> Gradients:
            again = Storage(tape.device, rows * inner * width) if cheap else None
            own = Storage(tape.device, rows * inner * width) if wanted else None
            del again
            tape.temporary(weight * (width + FP32 if width != FP32 else width))
            return [own]

        like = x if x.node is not None else Tensor(x.storage, x.count, x.width, tape.leaf())
        saves = cast if cheap else [x.storage, *cast]
        return tape.apply([like], rows * outer * width, backward, saves=saves, costly=True, like=(rows * outer, width))

    def cast_weight(self, name: str, size: float) -> Storage:
        if self.tape.again:
            return Storage(self.tape.device, size)
        if name not in self.casts:
            self.casts[name] = Storage(self.tape.device, size)
        return self.casts[name]

    def attention(self, q: Tensor, k: Tensor | None, keys: int) -> Tensor:
        """Keeps queries, keys, values, the result and the logarithms of the sums. `q` holds all three where there is no `k`."""
        tape, heads = self.tape, self.model.heads
        count = q.count if k is not None else q.count // 3
        rows = count // self.model.width
        sums = rows * heads * FP32
        other = 0 if k is None else k.size
        summed = 0.0
        if self.cuda:
            head = self.model.width // heads
            blocks = -(-keys // QUERY_BLOCK) * QUERY_BLOCK / keys
            summed = rows * blocks * heads * -(-head // HEAD_BLOCK) * HEAD_BLOCK * FP32
        inputs = [q] if k is None else [q, k]

        def backward(_: Storage, __: list[Storage]) -> Gradients:
            fp32 = Storage(tape.device, summed)
            gradients: Gradients = [Storage(tape.device, q_size)]
            del fp32
            return [*gradients, Storage(tape.device, other)] if other else gradients

        q_size, result = q.size, count * q.width
        return tape.apply(
            inputs,
            result,
            backward,
            saves=[one.storage for one in inputs],
            saves_result=True,
            beside=sums,
            costly=True,
            like=(count, q.width),
        )

    def unbound(self, x: Tensor) -> Tensor:
        """Views of heads and of q, k, v; their gradients are stacked, and then put in order."""
        return self.view(self.view(x, True), True)

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """LayerNorm, which autocast computes in fp32, times 1 + scale, plus shift. Fused: only statistics are kept."""
        tape = self.tape
        stats = 2 * (x.count // self.model.width) * FP32
        if self.fused:
            size, inputs, kept = x.size, [x, modulation], [x.storage, modulation.storage]
            small = modulation.size
            result = x.count * self.compute

            def backward(_: Storage, __: list[Storage]) -> Gradients:
                return [Storage(tape.device, size), Storage(tape.device, small / 6)]

            out = tape.apply(inputs, result, backward, saves=kept, beside=stats, like=(x.count, self.compute))
            out.cheap = True
            return out
        wide = self.cast(x, FP32)
        size = wide.size
        normed = tape.apply([wide], size, lambda _, __: [Storage(tape.device, size)], saves=[wide.storage], beside=stats)
        del wide
        return self.plus(self.times(normed, modulation), modulation)

    def times(self, x: Tensor, vector: Tensor) -> Tensor:
        """x times a vector of each clip. Keeps both."""
        tape, size, small = self.tape, x.size, vector.size

        def backward(_: Storage, __: list[Storage]) -> Gradients:
            own = Storage(tape.device, size)
            tape.temporary(size)  # before it is summed over the tokens
            return [own, Storage(tape.device, small / 6)]

        return tape.apply([x, vector], size, backward, saves=[x.storage, vector.storage])

    def gated(self, x: Tensor, modulation: Tensor, branch: Tensor) -> Tensor:
        """x plus a branch times its gate, a vector of each clip. Keeps the branch."""
        if not self.fused:
            return self.plus(x, self.times(branch, modulation))
        tape, size, small = self.tape, branch.size, modulation.size

        def backward(gradient: Storage, _: list[Storage]) -> Gradients:
            return [gradient, Storage(tape.device, size), Storage(tape.device, small / 6)]

        return tape.apply([x, branch, modulation], x.size, backward, saves=[branch.storage, modulation.storage])

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The gradient of a sum is that of both, or of a vector its sum."""
        tape, size = self.tape, other.size
        if other.count == x.count:
            return tape.apply([x, other], x.size, lambda gradient, _: [gradient, gradient])
        return tape.apply([x, other], x.size, lambda gradient, _: [gradient, Storage(tape.device, size / 6)])

    def pointwise(self, x: Tensor) -> Tensor:
        """GELU or SiLU."""
        tape, size = self.tape, x.size
        out = tape.apply([x], size, lambda _, __: [Storage(tape.device, size)], saves=[x.storage])
        out.cheap = self.fused
        return out

    def small(self, x: Tensor, width: int) -> Tensor:
        """Something done to the vectors of each clip."""
        tape, size = self.tape, x.size
        return tape.apply([x], x.count * width, lambda _, __: [Storage(tape.device, size)], like=(x.count, width))

    def cast(self, x: Tensor, width: int) -> Tensor:
        if x.width == width:
            return x
        tape, size = self.tape, x.size
        return tape.apply([x], x.count * width, lambda _, __: [Storage(tape.device, size)], like=(x.count, width))

    def copy(self, x: Tensor) -> Tensor:
        """The same numbers in another order."""
        tape, size = self.tape, x.size
        return tape.apply([x], size, lambda _, __: [Storage(tape.device, size)])

    def across(self, x: Tensor, frames: int, tokens: int) -> Tensor:
        """B T S D -> (B S) T D."""
        if frames == 1 or tokens == 1:
            return x
        out = self.copy(x)
        out.cheap = self.fused
        return out

    def view(self, x: Tensor, copies: bool) -> Tensor:
        """A view, whose gradient may have to be put in order."""
        tape, size = self.tape, x.size
        return tape.apply([x], None, lambda gradient, _: [Storage(tape.device, size) if copies else gradient])

    def exchange(self, x: Tensor, tokens: int) -> Tensor:
        """An all-to-all within a clip's ranks: numbers put in order, sent, received, and put in order."""
        tape, size, count = self.tape, x.size, self.batch * tokens * self.model.width
        result = count * x.width

        def backward(_: Storage, __: list[Storage]) -> Gradients:
            sent = Storage(tape.device, result)
            received = Storage(tape.device, result)
            del sent
            own = Storage(tape.device, size)
            del received
            return [own]

        sent = Storage(tape.device, size)
        received = Storage(tape.device, size)
        del sent
        out = tape.apply([x], result, backward, like=(count, x.width))
        del received
        return out

    def collect(self, x: Tensor) -> Tensor:
        """Every rank's part of the prediction, on every rank."""
        tape, size, count = self.tape, x.size, x.count // self.own_frames * self.frames
        return tape.apply([x], count * x.width, lambda _, __: [Storage(tape.device, size)], like=(count, x.width))

    def _loss(self, prediction: Tensor, kept: int) -> Tensor:
        tape, size = self.tape, prediction.size
        saved = Storage(tape.device, kept)
        return tape.apply([prediction], FP32, lambda _, __: [Storage(tape.device, size)], saves=[saved], like=(1, FP32))
