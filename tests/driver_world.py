"""A model world for `decide`: a store, a backend and at most one driver, all in memory, in which anything may happen in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from attempt_views import CONFIG, NOW, checkpoint, outcome, report

from orchestrator.driver import placing
from orchestrator.driver.decide import CloseAttempt, Commit, Drain, Finish, Kill, Move, Note, StartAttempt, decide
from orchestrator.driver.facts import AttemptView, Checkpoint, Observed, Onward, Room, StageView
from orchestrator.ledger.records import EXIT_CODES, ExitClass, Placement
from orchestrator.ports import Life
from orchestrator.recipe.pipeline import Pipeline

FULL = "0/9 nodes are available"


@dataclass
class Truth:
    """One attempt as it really is, whatever anybody can see of it."""

    attempt: AttemptView
    state: str = "absent"
    exit_code: int | None = None
    draining: bool = False
    waits: bool = False
    """For nodes; it holds none yet."""
    held: bool = False
    """Whether it ever held a device."""


@dataclass
class World:
    """A store, a backend and at most one driver, all in memory. Acts as the runner does, and counts what must not happen."""

    pipeline: Pipeline
    epoch: int = 1
    now: float = NOW
    attempts: dict[tuple[str, str, int], Truth] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str], list[Checkpoint]] = field(default_factory=dict)
    committed: set[tuple[str, str]] = field(default_factory=set)
    hidden: set[tuple[str, str, int]] = field(default_factory=set)
    version: int = 0
    stop: str | None = None
    finished: Finish | None = None
    begins_at_once: bool = True
    """Whether what is submitted has its nodes at once."""
    nodes: dict[str | None, int] = field(default_factory=dict)
    """By pool, how many there are; as many as are asked for where none is given."""
    rooms: dict[tuple[str, str | None], Room] = field(default_factory=dict)
    """By (stage, pool), what events say of them."""
    made: list[tuple[AttemptView, float, int]] = field(default_factory=list)
    """Every attempt as it was intended, when, and how many of `counts` there were."""
    counts: list[tuple[float, str, str | None, int]] = field(default_factory=list)
    """(time, stage, pool, nodes) of every event."""

    def inputs_digest(self, name: str) -> str | None:
        parent = self.pipeline.stage(name).spec.parent
        if parent is None:
            return f"v{self.version}"
        above = self.inputs_digest(parent)
        return f"{above}.{name}" if above is not None and (parent, above) in self.committed else None

    def observe(self) -> Observed:
        seen = {}
        for stage in self.pipeline.stages:
            inputs_digest = self.inputs_digest(stage.name)
            mine = [self._see(key) for key in sorted(self.attempts) if key[0] == stage.name]
            published = (
                ()
                if inputs_digest is None
                else tuple(sorted(self.checkpoints.get((stage.name, inputs_digest), []), key=lambda c: (c.step, c.attempt)))
            )
            seen[stage.name] = StageView(
                stage.name,
                inputs_digest,
                committed=(stage.name, inputs_digest or "") in self.committed,
                attempts=tuple(one for one in mine if one.inputs_digest == inputs_digest),
                checkpoints=published,
                orphans=tuple(one for one in mine if one.inputs_digest != inputs_digest and one.outcome is None),
            )
            seen[stage.name] = self._with_room(seen[stage.name])
        return Observed(self.epoch, seen, frozenset(seen), self.stop)  # type: ignore[arg-type]

    def _with_room(self, view: StageView) -> StageView:
        stage = self.pipeline.stage(view.name)
        if stage.spec.resources.min_nodes is None or view.committed or view.inputs_digest is None:
            return view
        pool = placing.current_pool(self.pipeline.pools_of(stage), view.attempts)
        known = self.rooms.get((stage.name, pool), Room(pool, None))
        there = self.nodes.get(pool, stage.spec.resources.nodes)
        return replace(view, room=replace(known, nodes=there), sizes=placing.sizes(stage, lambda config, devices: ""))

    def _see(self, key: tuple[str, str, int]) -> AttemptView:
        truth = self.attempts[key]
        state = "unknown" if key in self.hidden else truth.state
        bound, ended = (None, None) if state == "absent" else (self.now, self.now if state == "ended" else None)
        life = Life(state, bound if truth.held else None, ended, truth.exit_code)  # type: ignore[arg-type]
        if truth.waits and state == "running":
            life = Life("running", waits=FULL, waits_for="capacity", since=self.now)
        return replace(
            truth.attempt,
            life=life if truth.attempt.outcome is None else Life("absent"),
            draining=truth.draining,
        )

    def tick(self, effects: int | None = None) -> list[object]:
        """One round of the driver; with `effects`, it is killed after so many of them."""
        actions = decide(self.pipeline, self.observe(), self.now)
        assert actions, "decide must always say something"
        done = 0
        for action in actions:
            for effect in self._effects(action):
                if effects is not None and done >= effects:
                    return list(actions)
                effect()
                done += 1
        return list(actions)

    def _effects(self, action: object) -> list[Callable[[], None]]:
        if isinstance(action, StartAttempt):
            return [lambda: self._intend(action), lambda: self._submit((action.stage, action.inputs_digest, action.number))]
        if isinstance(action, CloseAttempt):
            return [lambda: self._close(action)]
        if isinstance(action, Commit):
            return [lambda: self._commit(action)]
        if isinstance(action, Drain | Kill):
            return [lambda: self._signal(action)]
        if isinstance(action, Move):
            return [lambda: self._say(action), lambda: self._move(action)]
        if isinstance(action, Note):
            return [lambda: self._note(action)]
        if isinstance(action, Finish):
            self.finished = action
        return []

    def _intend(self, action: StartAttempt) -> None:
        parent = self.pipeline.stage(action.stage).spec.parent
        assert parent is None or (parent, self.inputs_digest(parent) or "") in self.committed, "started without a committed parent"
        assert (action.stage, action.inputs_digest) not in self.committed, "a committed stage was started again"
        assert self.stop is None, "started while stopping"
        assert action.inputs_digest == self.inputs_digest(action.stage)
        resumed = action.resume.step if action.resume else 0
        key = action.stage, action.inputs_digest, action.number
        view = AttemptView(action.stage, action.inputs_digest, action.number, self.epoch, resumed, Life("absent"), made=self.now)
        if action.nodes is not None:
            asked = self.pipeline.stage(action.stage).spec.resources.nodes
            placed = Placement(pool=action.nodes.pool, nodes_asked=asked, why=action.nodes.why)
            view = replace(view, nodes=action.nodes.nodes, placement=placed)
        if key not in self.attempts:
            self.attempts[key] = Truth(view)
            self.made.append((view, self.now, len(self.counts)))

    def _submit(self, key: tuple[str, str, int]) -> None:
        truth = self.attempts[key]
        if truth.state == "absent" and truth.attempt.epoch == self.epoch:  # an agent with an older intent refuses
            truth.state, truth.waits, truth.held = "running", not self.begins_at_once, self.begins_at_once

    def _close(self, action: CloseAttempt) -> None:
        key = action.attempt.stage, action.attempt.inputs_digest, action.attempt.number
        truth = self.attempts[key]
        assert truth.state != "running", "an attempt was closed while it lived"
        assert truth.attempt.outcome is None, "an attempt was closed twice"
        ended = outcome(action.class_, self.now)
        bound = ended.bound if truth.held else None
        truth.attempt = replace(
            truth.attempt, outcome=ended.model_copy(update={"reason": action.reason, "next_pool": action.next_pool, "bound": bound})
        )

    def _commit(self, action: Commit) -> None:
        key = action.attempt.stage, action.attempt.inputs_digest
        assert key not in self.committed, "a stage was committed twice"
        assert action.checkpoint.complete
        self.committed.add(key)

    def _signal(self, action: Drain | Kill) -> None:
        truth = self.attempts[action.attempt.stage, action.attempt.inputs_digest, action.attempt.number]
        truth.draining = True
        if isinstance(action, Kill):
            truth.state, truth.exit_code = "ended", -9

    def _say(self, action: Move) -> None:
        truth = self.attempts[action.attempt.stage, action.attempt.inputs_digest, action.attempt.number]
        truth.attempt = replace(truth.attempt, onward=Onward(action.change.why, action.change.pool, done=False))

    def _move(self, action: Move) -> None:
        truth = self.attempts[action.attempt.stage, action.attempt.inputs_digest, action.attempt.number]
        assert truth.waits != action.change.save, "what trains saves first, and what waits is ended at once"
        assert truth.attempt.onward is not None
        truth.attempt = replace(truth.attempt, onward=replace(truth.attempt.onward, done=True))
        if not action.change.save:
            truth.state, truth.exit_code = "ended", None

    def _note(self, action: Note) -> None:
        found = placing.COUNTED.fullmatch(action.detail)
        assert found is not None
        about, there, asked = (action.stage, found[1]), int(found[2]), int(found[3])
        self.rooms[about] = placing.counted(self.rooms.get(about), found[1], there, asked, self.now)
        self.counts.append((self.now, *about, there))

    # What attempts do by themselves.

    def waiting(self) -> list[tuple[str, str, int]]:
        return [key for key in self.running() if self.attempts[key].waits]

    def begin(self, key: tuple[str, str, int]) -> None:
        self.attempts[key].waits, self.attempts[key].held = False, True

    def running(self) -> list[tuple[str, str, int]]:
        return [key for key in sorted(self.attempts) if self.attempts[key].state == "running"]

    def publish(self, key: tuple[str, str, int], step: int, complete: bool) -> None:
        truth = self.attempts[key]
        step = max(step, truth.attempt.resumed_from, truth.attempt.published)
        self.checkpoints.setdefault(key[:2], []).append(checkpoint(step, key[2], complete))
        truth.attempt = replace(truth.attempt, published=step, left_traces=True)

    def end(self, key: tuple[str, str, int], class_: ExitClass) -> None:
        truth = self.attempts[key]
        truth.state, truth.exit_code = "ended", EXIT_CODES.get(class_)
        if class_ == "completed":
            self.publish(key, CONFIG.steps, complete=True)
        if class_ != "lost":
            truth.attempt = replace(truth.attempt, report=report(class_, truth.attempt.published), left_traces=True)

    def relaunch(self, survivors: bool) -> None:
        """The driver is gone, another comes. Locally its attempts die with it; in a cluster they live on."""
        for key in [] if survivors else self.running():
            self.end(key, "lost")
        self.epoch, self.stop, self.finished = self.epoch + 1, None, None
        for truth in self.attempts.values():
            truth.draining = False
            if truth.attempt.onward is not None:
                truth.attempt = replace(truth.attempt, onward=replace(truth.attempt.onward, done=False))
