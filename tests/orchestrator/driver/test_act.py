"""Laws of what a driver writes down: the time that was held, its version."""

from __future__ import annotations

import pytest
from driver_rig import Body, Rig, pipeline

from orchestrator.driver.act import code_version, held_time
from orchestrator.errors import CorruptCheckpoint, Refused
from orchestrator.ports import Life


def test_what_follows_the_last_piece_is_unaccounted(rig: Rig) -> None:
    rig.backend.scripts["one", 1] = [("publish", 10), ("do", lambda: setattr(rig.clock, "time", rig.clock.time + 7)), ("vanish",)]
    journal = rig.backend._journal

    def only_two(body: Body) -> None:
        if body.pieces < 2:
            journal(body)

    rig.backend._journal = only_two  # type: ignore[method-assign]
    rig.launch()
    (inputs_digest,) = rig.ledger.inputs_of("one")
    outcome, pieces = rig.ledger.outcome("one", inputs_digest, 1), rig.ledger.journal("one", inputs_digest, 1)
    assert outcome is not None and outcome.bound is not None
    assert outcome.unaccounted_s == pytest.approx(7.05)
    assert outcome.ended - outcome.bound == pytest.approx(sum(sum(piece.spent.values()) for piece in pieces) + outcome.unaccounted_s)


def test_an_attempt_that_was_never_started_holds_nothing(rig: Rig) -> None:
    rig.launch(pipeline(("one", None)))
    (inputs_digest,) = rig.ledger.inputs_of("one")
    from orchestrator.driver.facts import AttemptView

    never_started = AttemptView("one", inputs_digest, 2, 1, 0, Life("absent"))
    assert held_time(never_started, [], 1, 5.0) == (None, 5.0, 0.0)


def test_what_could_never_be_submitted_is_refused_before_anything_is_written(rig: Rig) -> None:
    rig.backend.never[1] = "demo/one: 1 nodes give pods names of 64 characters; shorten the name of the pipeline"
    result = rig.launch(pipeline(("one", None)))
    assert (result.status, result.exit_code, result.reason) == ("failed", 4, rig.backend.never[1])
    assert not rig.ledger.inputs_of("one") and not rig.backend.submitted
    rig.backend.never.clear()
    assert rig.launch(pipeline(("one", None))).status == "succeeded" and rig.outcomes("one") == ["completed"]


def test_the_version_names_the_package() -> None:
    assert code_version().split("+")[0][0].isdigit()


def test_refusals_are_of_one_kind() -> None:
    assert issubclass(CorruptCheckpoint, Refused)
