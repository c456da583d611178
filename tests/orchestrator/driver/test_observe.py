"""Laws of what a driver looks at: as little as tells what it needs to know."""

from __future__ import annotations

import pytest
from driver_rig import Body, Rig, pipeline

from orchestrator.ledger.records import JournalPiece
from orchestrator.ledger.store import Ledger


def test_how_far_a_vanished_attempt_came_is_told_by_the_end_of_its_journal(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 pieces of two nodes; the last piece of one of them ended between two steps."""
    rig.backend.scripts["one", 1] = [("vanish",)]

    def journal(body: Body) -> None:
        for node in (0, 1):
            for seq in range(50):
                step = None if (node, seq) == (1, 49) else 10 * node + seq
                piece = JournalPiece(node=node, seq=seq, start=seq, end=seq + 1, devices=1, spent={"step": 1.0}, last_step=step)
                rig.ledger.append_journal(body.intent, piece)
        body.pieces = 50

    begun: list[Body] = []
    rig.backend._journal = lambda body: None if body in begun else (begun.append(body), journal(body))[1]  # type: ignore[method-assign]
    runner = rig.runner(pipeline(("one", None)))
    runner.run(None)
    (inputs_digest,) = rig.ledger.inputs_of("one")
    view = runner._observer._attempt("one", inputs_digest, 1, 0)
    assert view is not None and view.outcome is not None and view.report is None
    read: list[str] = []
    piece = Ledger.piece
    monkeypatch.setattr(Ledger, "piece", lambda self, key: (read.append(key), piece(self, key))[1])
    monkeypatch.setattr(Ledger, "journal", None)
    assert runner._observer._heard_of(view) == 58
    assert len(read) == 3
