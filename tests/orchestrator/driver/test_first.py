"""What comes before the first stage: the lease is held already, a stop is heard, and a driver that takes over goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pytest
from driver_rig import PAIR, Rig, pipeline

from orchestrator.driver.decide import Finish
from orchestrator.driver.first import NotYet
from orchestrator.driver.runner import Detached, Runner
from orchestrator.errors import Refused, Unreachable
from orchestrator.recipe.pipeline import Pipeline

LATER = pipeline(("one", None), ("two", "one"), seeds={"one": 2})
"""The same stages, as they are known once that has come which comes first."""
Answer = Pipeline | Finish | NotYet | Exception
Stop = Literal["drain", "kill"] | None


@dataclass
class Scripted:
    """Answers as it is told, the last one again and again."""

    answers: list[Answer]
    on_look: Callable[[], None] = lambda: None
    stops: list[tuple[Stop, bool]] = field(default_factory=list)

    def look(self, stop: Stop, *, cancelled: bool) -> Pipeline | Finish | NotYet:
        self.on_look()
        self.stops.append((stop, cancelled))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def runner(rig: Rig, *answers: Answer, on_look: Callable[[], None] = lambda: None) -> tuple[Runner, Scripted]:
    first = Scripted(list(answers), on_look)
    return Runner(PAIR, rig.ledger, rig.backend, rig.clock, first=first), first


def test_stages_begin_with_what_came_first_and_its_pipeline_is_a_revision(rig: Rig) -> None:
    driver, first = runner(rig, NotYet("films are prepared"), NotYet("films are prepared"), LATER)
    held = []
    first.on_look = lambda: held.append(rig.ledger.holder(rig.clock.now()) is not None)
    assert driver.run().status == "succeeded"
    assert [revision.pipeline for _, revision in rig.ledger.revisions()] == [one.model_dump(mode="json") for one in (PAIR, LATER)]
    assert rig.outcomes("two") == ["completed"] and held == [True] * 3
    assert rig.kinds("observed").count("None films are prepared") == 1 and len(rig.kinds("launched")) == 1


def test_what_fails_first_ends_the_launch_before_anything_is_started(rig: Rig) -> None:
    driver, _ = runner(rig, Finish("failed", 4, "films were not prepared"))
    result = driver.run()
    assert (result.status, result.exit_code, result.reason) == ("failed", 4, "films were not prepared")
    assert rig.backend.submitted == [] and rig.kinds("ended") == ["None failed: films were not prepared"]


def test_a_refusal_is_written_down(rig: Rig) -> None:
    driver, _ = runner(rig, Refused("stage one needs a decision"))
    with pytest.raises(Refused, match="needs a decision"):
        driver.run()
    assert rig.kinds("ended") == ["None failed: stage one needs a decision"] and rig.ledger.holder(rig.clock.now()) is None


def test_a_store_that_is_away_is_asked_again(rig: Rig) -> None:
    driver, first = runner(rig, Unreachable("no answer"), Unreachable("no answer"), PAIR)
    assert driver.run().status == "succeeded" and len(first.stops) == 3


def test_a_cancel_is_heard_meanwhile(rig: Rig) -> None:
    driver, first = runner(rig, NotYet("goes on"), NotYet("goes on"), Finish("cancelled", 130, "stopped"))
    first.on_look = lambda: None if first.stops else rig.ledger.ask_cancel(rig.clock.now(), "by me") and None
    assert driver.run().exit_code == 130
    assert first.stops[0] == (None, False) and first.stops[-1] == ("drain", True)


def test_a_driver_that_leaves_meanwhile_gives_its_lease_back(rig: Rig) -> None:
    driver, first = runner(rig, NotYet("goes on"))
    first.on_look = driver.detach
    with pytest.raises(Detached):
        driver.run()
    assert rig.ledger.holder(rig.clock.now()) is None and rig.kinds("ended") == []


def test_a_parent_is_asked_for_once_its_data_is_known(rig: Rig) -> None:
    driver, _ = runner(rig, PAIR)
    with pytest.raises(Refused, match="one"):
        driver.run(["two"])
    assert rig.backend.submitted == []
