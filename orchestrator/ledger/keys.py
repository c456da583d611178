"""Where each object of a pipeline lies in its store: one function a key (docs/contracts.md §2). Pure."""

from __future__ import annotations

from typing import ClassVar, Literal

RESERVED = ("datasets", "weights")
"""Folders at the root of a store that hold data sets and weights. No pipeline may have such a name."""


class Keys:
    """Keys of a pipeline's objects. `Keys("demo").committed("stage1", "0a1b2c3d4e5f")`."""

    CHECKPOINT_FORMAT: ClassVar[str] = "step-{step:08d}-a{attempt}"

    def __init__(self, pipeline: str):
        self.pipeline = pipeline

    def revision(self, number: int) -> str:
        return f"{self.pipeline}/revisions/{number:06d}.json"

    @property
    def lease(self) -> str:
        return f"{self.pipeline}/lease.json"

    def event(self, epoch: int, seq: int) -> str:
        return f"{self.pipeline}/events/{epoch:06d}-{seq:06d}.json"

    def stage(self, stage: str, inputs_digest: str) -> str:
        return f"{self.pipeline}/stages/{stage}@{inputs_digest}"

    def committed(self, stage: str, inputs_digest: str) -> str:
        return f"{self.stage(stage, inputs_digest)}/COMMITTED.json"

    def attempt(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.stage(stage, inputs_digest)}/attempts/{attempt}"

    def intent(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/intent.json"

    def placement(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/placement.json"

    def terms(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/terms.json"

    def decision(self, stage: str, inputs_digest: str, number: int) -> str:
        return f"{self.pipeline}/decisions/{stage}@{inputs_digest}/{number:06d}.json"

    def journal(self, stage: str, inputs_digest: str, attempt: int, node: int, seq: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/journal/{node:03d}-{seq:06d}.json"

    def totals(self, stage: str, inputs_digest: str, attempt: int, node: int, seq: int) -> str:
        """A folder for each 1,024 pieces, so that the newest are found without a listing of all."""
        return f"{self.attempt(stage, inputs_digest, attempt)}/totals/{seq // 1024:06d}/{node:03d}-{seq:06d}.json"

    def log(self, stage: str, inputs_digest: str, attempt: int, node: int, seq: int, written: float) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/log/{node:03d}-{seq:06d}-{round(1000 * written)}.txt"

    def sample(self, stage: str, inputs_digest: str, attempt: int, name: str) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/samples/{name}"

    def report(self, stage: str, inputs_digest: str, attempt: int, node: int = 0) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/report{f'-{node:03d}' if node else ''}.json"

    def clips(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/clips.json"

    def left_out(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/left-out.csv"

    def part(self, stage: str, inputs_digest: str, attempt: int, step: int, node: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/parts/step-{step:08d}-{node:03d}.json"

    def flight_record(self, stage: str, inputs_digest: str, attempt: int, node: int, name: str) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/flight-recorder/{node:03d}-{name}"

    def agent(self, stage: str, inputs_digest: str, attempt: int, node: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/agents/{node:03d}.json"

    def sign(self, stage: str, inputs_digest: str, attempt: int, node: int, seq: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/signs/{node:03d}-{seq:06d}.json"

    def asked(self, stage: str, inputs_digest: str, attempt: int, how: Literal["save", "now"]) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/asked/{how}.json"

    def trouble(self, stage: str, inputs_digest: str, attempt: int, node: int, seq: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/trouble/{node:03d}-{seq:06d}.json"

    def damaged(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/damaged.json"

    def outcome(self, stage: str, inputs_digest: str, attempt: int) -> str:
        return f"{self.attempt(stage, inputs_digest, attempt)}/outcome.json"

    def evaluation(self, stage: str, inputs_digest: str, digest: str) -> str:
        return f"{self.stage(stage, inputs_digest)}/evaluations/{digest}.json"

    def gate(self, stage: str, inputs_digest: str, number: int) -> str:
        return f"{self.stage(stage, inputs_digest)}/gate/{number:06d}.json"

    def evaluation_sample(self, stage: str, inputs_digest: str, digest: str, name: str) -> str:
        return f"{self.stage(stage, inputs_digest)}/samples/{digest}/{name}"

    def checkpoint(self, stage: str, inputs_digest: str, step: int, attempt: int) -> str:
        return f"{self.stage(stage, inputs_digest)}/checkpoints/{self.CHECKPOINT_FORMAT.format(step=step, attempt=attempt)}"


def run_key(pipeline: str, stage: str, inputs_digest: str, attempt: int) -> str:
    return f"{pipeline}/{stage}@{inputs_digest}/a{attempt}"
