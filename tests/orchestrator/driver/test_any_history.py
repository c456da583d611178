"""A model world in which anything may happen in any order: what `decide` must never do in it."""

from __future__ import annotations

import pytest
from attempt_views import CONFIG, pipeline
from driver_world import World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from proofs import Proof

from orchestrator.driver.decide import Finish, Wait, decide
from orchestrator.driver.retries import RULES
from orchestrator.ledger.records import ExitClass


class AnyHistory(RuleBasedStateMachine):
    world: World

    @initialize(backend=st.sampled_from(["local", "kubernetes"]))
    def build(self, backend: str) -> None:
        self.world = World(pipeline(("one", None), ("two", "one"), ("left", "two"), ("right", "two"), backend=backend))

    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule(effects=st.integers(0, 3), survivors=st.booleans())
    def driver_is_killed_within_a_round(self, effects: int, survivors: bool) -> None:
        self.world.tick(effects)
        self.world.relaunch(survivors)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), step=st.integers(1, CONFIG.steps - 1))
    def publishes(self, data: st.DataObject, step: int) -> None:
        self.world.publish(data.draw(st.sampled_from(self.world.running())), step, complete=False)

    @precondition(lambda self: self.world.running())
    @rule(data=st.data(), class_=st.sampled_from(["completed", "completed", *RULES]))
    def ends(self, data: st.DataObject, class_: ExitClass) -> None:
        self.world.end(data.draw(st.sampled_from(self.world.running())), class_)

    @precondition(lambda self: self.world.attempts)
    @rule(data=st.data())
    def cannot_be_seen(self, data: st.DataObject) -> None:
        self.world.hidden.add(data.draw(st.sampled_from(sorted(self.world.attempts))))

    @rule()
    def can_be_seen_again(self) -> None:
        self.world.hidden.clear()

    @precondition(lambda self: any(self.world.checkpoints.values()))
    @rule(data=st.data())
    def checkpoint_is_found_broken(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(key for key, found in self.world.checkpoints.items() if found)))
        if name not in self.world.committed:
            self.world.checkpoints[name].pop()

    @rule(stop=st.sampled_from(["drain", "kill"]))
    def is_stopped(self, stop: str) -> None:
        self.world.stop = stop if self.world.stop != "kill" else "kill"

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: self.world.version < 2)
    @rule(survivors=st.booleans())
    def is_launched_with_another_configuration(self, survivors: bool) -> None:
        self.world.relaunch(survivors)
        self.world.version += 1

    @invariant()
    def at_most_one_live_attempt_a_stage(self) -> None:
        live = [key[0] for key in self.world.running()]
        assert len(live) == len(set(live)), live

    @invariant()
    def deciding_twice_says_the_same_and_acting_settles(self) -> None:
        observed = self.world.observe()
        assert decide(self.world.pipeline, observed, self.world.now) == decide(self.world.pipeline, observed, self.world.now)

    def teardown(self) -> None:
        """When faults stop, one more launch ends within a bounded number of rounds, with every stage committed."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.hidden.clear()
        world.relaunch(survivors=True)
        bound = 8 * len(world.pipeline.stages) + 2 * len(world.attempts)
        for _ in range(bound):
            actions = world.tick()
            if world.finished is not None:
                break
            if isinstance(actions[0], Wait):
                for key in world.running():
                    world.end(key, "drained" if world.attempts[key].draining else "completed")
                world.now += 60
        assert world.finished == Finish("succeeded", 0, "every stage is committed"), (world.finished, actions)
        assert not world.running()


AnyHistory.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestAnyHistory = AnyHistory.TestCase


@pytest.mark.prove("any-history")
def test_any_history_at_length(proof: Proof) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        AnyHistory, settings=settings(max_examples=1000, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    )
    proof.count(1000, "histories of at most 50 steps")
