"""What the stages of a pipeline have come to, in one ledger: under which inputs each lies, and its committed result.

Read once: neither changes any more while a driver holds the lease. Owns the stages that are refused because one of the two cannot be read.
"""

from __future__ import annotations

from orchestrator.errors import Refused
from orchestrator.inputs import standing as stage_inputs
from orchestrator.ledger.records import Committed
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline, Stage


class Results:
    def __init__(self, pipeline: Pipeline, ledger: Ledger) -> None:
        self._pipeline, self._ledger = pipeline, ledger
        self.refused: dict[str, str] = {}
        """By stage, why this driver must not start it."""
        self.unreadable: set[str] = set()
        """Stages whose COMMITTED.json is there and cannot be read. They are among the refused."""
        self._inputs: dict[str, str] = {}
        """`<inputs>` by stage."""
        self._committed: dict[tuple[str, str], Committed] = {}

    def inputs(self, stage: Stage) -> str | None:
        """`<inputs>` of a stage; None while its parent is not committed, or where it cannot be told. Raises Unreachable."""
        parent = self.of_parent(stage)
        if stage.spec.parent is not None and parent is None:
            return None
        if stage.name not in self._inputs:
            try:
                self._inputs[stage.name] = stage_inputs.find(self._ledger, stage, parent)
            except Refused as error:  # which result is meant cannot be told; other stages go on
                self.refused[stage.name] = str(error)
                return None
        return self._inputs[stage.name]

    def of_parent(self, stage: Stage) -> Committed | None:
        """The parent's result, where there is one. Raises Unreachable."""
        return self.of(self._pipeline.stage(stage.spec.parent)) if stage.spec.parent is not None else None

    def of(self, stage: Stage) -> Committed | None:
        """The stage's result, where there is one that can be read. Raises Unreachable."""
        inputs_digest = self.inputs(stage)
        if inputs_digest is None:
            return None
        key = stage.name, inputs_digest
        if key not in self._committed:
            try:
                committed = self._ledger.committed(stage.name, inputs_digest)
            except Refused as error:  # its result can neither be used nor be made again; other stages go on
                self.refused[stage.name] = str(error)
                self.unreadable.add(stage.name)
                return None
            if committed is None:
                return None
            self._committed[key] = committed
        return self._committed[key]
