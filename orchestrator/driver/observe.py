"""What a driver observes: the ledger and the backend, read into the values that `decide` judges.

Owns what is remembered between two looks, so that a long history is read once. Refuses to start, end or write anything, but for the event
that says that a checkpoint cannot be used.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Literal

from orchestrator.driver.elsewhere import Elsewhere
from orchestrator.driver.facts import AttemptView, Checkpoint, Judged, Observed, Onward, StageView
from orchestrator.driver.launch import ASKED_TO_SAVE, SUBMITTED, WAS_KILLED, Launch
from orchestrator.driver.nodes import NodesSeen
from orchestrator.driver.placing import MOVES_ON, RESIZES
from orchestrator.errors import Refused
from orchestrator.ledger import evaluations
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import DamagedCheckpoint, Intent, JournalPiece, Outcome, Placement, Report
from orchestrator.ports import Life
from orchestrator.recipe.gates import Gate, stands
from orchestrator.recipe.pipeline import Stage

TROUBLE_POLL_S = 5.0
"""Seconds between two looks for an agent that cannot publish; on S3 each is a request for each attempt that lives."""


class Observer:
    def __init__(self, launch: Launch, nodes: NodesSeen) -> None:
        self._launch, self._nodes = launch, nodes
        self._pipeline, self._ledger, self._backend = launch.pipeline, launch.ledger, launch.backend
        self._clock, self._lease, self._results = launch.clock, launch.lease, launch.results
        self._elsewhere = Elsewhere(launch.ledger, launch.lease.handle.before, launch.clock.elapsed)
        self._finished: dict[str, AttemptView] = {}
        """By run key, attempts with an outcome. Their records never change again, so they are read once."""
        self._orphans: dict[str, set[tuple[str, int]]] | None = None
        """By stage: (inputs, number) of open attempts of other inputs. Only a driver makes attempts, so they are listed once."""
        self._damaged: dict[str, DamagedCheckpoint | None] = {}
        """By run key, for attempts whose agent says `parent`: what they were to go on from and found damaged."""
        self._trouble: dict[str, tuple[float, str]] = {}
        """By run key, when the ledger was last asked, and why checkpoints do not reach the store."""
        self._submitted: set[tuple[int, str, int]] = set()
        """(epoch, stage, number) of attempts that an earlier driver has surely submitted."""
        self._ended_by_us: dict[tuple[str, int], int] = {}
        """(stage, number) of attempts that a driver has asked to end, with the last epoch in which it did."""
        self._adopted: set[str] = set()
        """Run keys of attempts of earlier drivers that this one has found alive."""
        self._onward: dict[tuple[str, int], tuple[int, Onward]] = {}
        """(stage, number) of attempts that an earlier driver wanted elsewhere: the last epoch in which it did, and where."""
        self._placements: dict[str, Placement | None] = {}
        """By run key."""

    def observe(self, wanted: frozenset[str], stop: Literal["drain", "kill"] | None, cancelled: bool) -> Observed:
        """Raises Unreachable; Refused where an attempt may hold devices and its intent cannot be read."""
        first = self._orphans is None
        orphans: dict[str, set[tuple[str, int]]] = {} if self._orphans is None else self._orphans
        views: dict[str, StageView] = {}
        for stage in self._pipeline.stages:
            inputs_digest = self._results.inputs(stage)
            if first:
                orphans[stage.name] = {
                    (other, number)
                    for other in self._ledger.inputs_of(stage.name)
                    if other != inputs_digest
                    for number in self._ledger.attempts(stage.name, other)
                }
            view = self._nodes.seen(stage, self._look(stage, inputs_digest, orphans[stage.name]), stage.name in wanted)
            if view.committed:
                view = replace(view, judged=self._judged(stage, view))
                view = replace(view, gate=self._gate(stage, view.judged))
            views[stage.name] = view
            orphans[stage.name] = {(attempt.inputs_digest, attempt.number) for attempt in views[stage.name].orphans}
        self._orphans = orphans
        found = (attempt for view in views.values() for attempt in (*view.orphans, *view.attempts) if attempt.alive)
        self._launch.alive = {self._launch.run_key(attempt): attempt for attempt in found}
        return Observed(self._lease.epoch, views, wanted, stop, cancelled)

    def _gate(self, stage: Stage, judged: Judged | None) -> Gate | None:
        committed = self._results.of(stage)
        if stage.spec.gate is None or committed is None:
            return None
        decisions = self._ledger.gate_decisions(stage.name, committed.inputs_digest)
        pending = judged is not None and judged.state in ("asked", "running")
        own = None if pending else self._read(stage)
        parent = self._pipeline.stage(stage.spec.parent) if stage.spec.parent is not None else None
        return stands(stage.spec.gate, stage.name, decisions[-1] if decisions else None, own, self._read(parent) if parent else {})

    def _read(self, stage: Stage) -> dict[str, float]:
        """The readings of a stage as it is asked now."""
        committed, question = self._results.of(stage), evaluations.digest_of(stage.config)
        if committed is None:
            return {}
        found = self._ledger.evaluation(stage.name, committed.inputs_digest, question) if question is not None else None
        return dict(found.readings if found is not None else committed.evaluation)

    def _judged(self, stage: Stage, view: StageView) -> Judged | None:
        """How far the evaluation of a committed stage is; the ledger is asked first, since another process may have made it."""
        question, evaluator, committed = evaluations.digest_of(stage.config), self._launch.evaluator, self._results.of(stage)
        if evaluator is None or question is None or committed is None:
            return None
        about = stage.name, committed.inputs_digest
        state, reason = evaluator.state(*about)  # before the ledger: what has ended has written its answer
        if self._ledger.evaluation(*about, question) is not None:
            return Judged("done")
        if evaluations.answered_by_attempt(committed, self._ledger.intent(*about, committed.attempt), question):
            return Judged("done")
        if state == "absent":
            return Judged("asked")
        if state == "running":
            return Judged("running")
        return Judged("failed", reason or "it ended without an answer", about in self._launch.unjudged)

    def _look(self, stage: Stage, inputs_digest: str | None, orphans: set[tuple[str, int]]) -> StageView:
        orphans_seen = tuple(
            attempt
            for other, number in sorted(orphans)
            if (attempt := self._attempt(stage.name, other, number, 0)) is not None and attempt.outcome is None
        )
        if inputs_digest is None:
            return StageView(stage.name, None, orphans=orphans_seen, refused=self._results.refused.get(stage.name))
        # Lives are read before checkpoints: what an attempt that is seen dead has published is then seen too.
        lives = [self._attempt(stage.name, inputs_digest, number, 0) for number in self._ledger.attempts(stage.name, inputs_digest)]
        attempts = [attempt for attempt in lives if attempt is not None]
        committed = self._results.of(stage) is not None
        refused = self._results.refused.get(stage.name)
        if stage.name in self._results.unreadable:  # without checkpoints: nothing is committed over what lies there
            return StageView(stage.name, inputs_digest, False, tuple(attempts), orphans=orphans_seen, refused=refused)
        if committed and all(attempt.outcome is not None for attempt in attempts):
            return StageView(stage.name, inputs_digest, True, tuple(attempts), orphans=orphans_seen, refused=refused)
        manifests = self._ledger.checkpoints(stage.name, inputs_digest)
        for place, remark in self._ledger.unread_manifests(stage.name, inputs_digest):
            if remark.key not in self._launch.broken:
                self._launch.pass_over(remark.key, place.step, place.attempt, stage, str(remark))
        published = {number: max(m.step for _, m in manifests if m.attempt == number) for number in {m.attempt for _, m in manifests}}
        attempts = [self._with_reached(_with_published(attempt, published.get(attempt.number, 0))) for attempt in attempts]
        self._finished |= {self._launch.run_key(attempt): attempt for attempt in attempts if attempt.outcome is not None}
        checkpoints = tuple(
            Checkpoint(key, manifest.digest(), manifest.step, manifest.attempt, manifest.complete)
            for key, manifest in manifests
            if key not in self._launch.broken
        )
        return StageView(stage.name, inputs_digest, committed, tuple(attempts), checkpoints, orphans_seen, refused)

    def _with_reached(self, attempt: AttemptView) -> AttemptView:
        """Adds how far an attempt of this launch came. What earlier launches lost is not said again."""
        if attempt.outcome is None or attempt.outcome.epoch != self._lease.epoch:
            return attempt
        said = attempt.report.step if attempt.report is not None else None
        return replace(attempt, reached=self._heard_of(attempt) if said is None else said)

    def _heard_of(self, attempt: AttemptView) -> int | None:
        """The last step that a journal tells of, for an attempt without a report: of each node, pieces are read from the last one back."""
        steps: dict[int, int] = {}
        for key in reversed(self._ledger.journal_keys(attempt.stage, attempt.inputs_digest, attempt.number)):
            node = int(key.rpartition("/")[2].partition("-")[0])
            if node in steps:
                continue
            piece = self._ledger.piece(key)
            if isinstance(piece, JournalPiece) and piece.last_step is not None:
                steps[node] = piece.last_step
        return max(steps.values(), default=None)

    def _damage(self, stage: str, inputs_digest: str, number: int, report: Report | None) -> DamagedCheckpoint | None:
        """The damaged checkpoint that an attempt was to go on from, if it was one. No attempt uses that checkpoint again."""
        if report is None or report.class_ != "parent":
            return None
        key = run_key(self._pipeline.name, stage, inputs_digest, number)
        if key not in self._damaged:
            self._damaged[key] = self._ledger.damaged(stage, inputs_digest, number)
        found = self._damaged[key]
        if found is not None:
            self._launch.broken.add(found.key)
        return found

    def _attempt(self, stage: str, inputs_digest: str, number: int, published: int) -> AttemptView | None:
        """None: the folder has no intent, so no driver made it."""
        key = run_key(self._pipeline.name, stage, inputs_digest, number)
        if key in self._finished:
            return self._finished[key]
        try:
            intent = self._ledger.intent(stage, inputs_digest, number)
        except Refused as error:
            return self._without_intent(stage, inputs_digest, number, error)
        if intent is None:
            return self._without_terms(stage, inputs_digest, number)
        try:
            outcome = self._ledger.outcome(stage, inputs_digest, number)
        except Refused as error:  # a driver has written it, so the attempt is over; how it ended is no longer known
            outcome = _unknown_end(
                f"how it ended cannot be told: {error}", intent.created, intent.nodes * intent.devices_per_node, intent.epoch
            )
        life = self.life(intent) if outcome is None else Life("absent")
        report = self._ledger.report(stage, inputs_digest, number)  # after its life: one that is seen dead has no more to say
        traces = report is not None or (life.state == "absent" and outcome is None and self._ledger.has_journal(intent))
        lived = traces or (intent.epoch, stage, number) in self._submitted
        if self._pipeline.backend == "kubernetes" and outcome is None and life.state == "absent" and lived:
            # No process of ours deletes a job that nobody asked to end: one that lived and is not there was deleted by a person.
            ours = self._ended_by_us.get((stage, number), 0) >= intent.epoch
            life, traces = Life("ended", cause=None if ours else "deleted"), True
        if life.state == "running" and intent.epoch < self._lease.epoch:
            self._adopted.add(key)
        return AttemptView(
            stage,
            inputs_digest,
            number,
            intent.epoch,
            intent.resume.step if intent.resume else 0,
            life,
            published,
            traces,
            report,
            outcome,
            draining=key in self._launch.draining,
            adopted=key in self._adopted,
            given_up=self._launch.given_up.get(key, ""),
            told_to_end=key in self._launch.ended_elsewhere,
            damaged=self._damage(stage, inputs_digest, number, report),
            made=intent.created,
            nodes=intent.nodes,
            placement=self._placement(intent),
            onward=self._onward_of(intent),
        )

    def _placement(self, intent: Intent) -> Placement | None:
        """Where an attempt is; None also where the record cannot be read: no other record depends on it, so it stops nobody.

        It is written before the intent, so one look is enough."""
        if self._pipeline.backend != "kubernetes":
            return None
        if intent.run_key not in self._placements:
            found = None
            try:
                found = self._ledger.placement(intent.stage, intent.inputs_digest, intent.attempt)
            except Refused as error:
                self._launch.event(
                    "observed", stage=intent.stage, attempt=intent.attempt, detail=f"in which pool it is cannot be told: {error}"
                )
            self._placements[intent.run_key] = found
        return self._placements[intent.run_key]

    def _onward_of(self, intent: Intent) -> Onward | None:
        if (mine := self._launch.onward.get(intent.run_key)) is not None:
            return mine
        epoch, onward = self._onward.get((intent.stage, intent.attempt), (-1, None))
        return onward if epoch >= intent.epoch else None  # else it was said of an attempt under other inputs

    def _without_terms(self, stage: str, inputs_digest: str, number: int) -> AttemptView | None:
        """A number without an intent is free, unless terms lie there that cannot be read: they would be another attempt's."""
        try:
            self._ledger.terms(stage, inputs_digest, number)
        except Refused as error:
            return self._without_intent(stage, inputs_digest, number, error)
        return None

    def _without_intent(self, stage: str, inputs_digest: str, number: int, error: Refused) -> AttemptView:
        """An attempt whose intent cannot be read. Raises Refused unless it is over, or never began: it could hold devices."""
        outcome = None
        with contextlib.suppress(Refused):
            outcome = self._ledger.outcome(stage, inputs_digest, number)
        if outcome is None:
            life = self._backend.observe(run_key(self._pipeline.name, stage, inputs_digest, number))
            if life.state in ("running", "unknown"):
                raise Refused(f"{stage} attempt {number} may hold devices, and its intent cannot be read: {error}") from error
            outcome = _unknown_end(f"its intent cannot be read: {error}", life.ended or self._clock.now(), 1, 0)
        return AttemptView(stage, inputs_digest, number, outcome.epoch, 0, Life("absent"), outcome=outcome)

    def life(self, intent: Intent) -> Life:
        """What the backend sees of an attempt; where a local backend sees nothing, what the ledger tells (`elsewhere`)."""
        life = self._backend.observe(intent.run_key)
        if life.state == "absent" and self._pipeline.backend == "local" and intent.epoch < self._lease.epoch:
            life = self._elsewhere.life(intent) or life
        if life.state == "running" and not life.trouble:
            life = replace(life, trouble=self._trouble_of(intent))
        return life

    def _trouble_of(self, intent: Intent) -> str:
        now = self._clock.elapsed()
        looked, reason = self._trouble.get(intent.run_key, (-math.inf, ""))
        if now - looked >= TROUBLE_POLL_S:
            trouble = self._ledger.trouble(intent.stage, intent.inputs_digest, intent.attempt)
            reason = trouble.reason if trouble is not None else ""
            self._trouble[intent.run_key] = now, reason
        return reason

    def remember(self) -> None:
        """Read from the events what earlier drivers did to attempts whose jobs may be gone by now.

        A local backend needs none of it: each process leaves its run directory.
        """
        if self._pipeline.backend != "kubernetes":
            return
        for event in self._ledger.events():
            if event.kind == "observed" and event.stage is not None and event.attempt is None:
                self._nodes.remember(event.stage, event.detail, event.time)
            if event.kind != "observed" or event.stage is None or event.attempt is None:
                continue
            if event.detail == SUBMITTED:
                self._submitted.add((event.epoch, event.stage, event.attempt))
            elif event.detail.startswith((ASKED_TO_SAVE, WAS_KILLED, MOVES_ON, RESIZES)):
                self._ended_by_us[event.stage, event.attempt] = event.epoch
                if (onward := _onward(event.detail)) is not None:
                    self._onward[event.stage, event.attempt] = event.epoch, onward


def _onward(detail: str) -> Onward | None:
    """What an event says that an earlier driver wanted of an attempt; None: nothing of that kind."""
    if detail.startswith(MOVES_ON):
        pool, _, why = detail.removeprefix(MOVES_ON).partition(": ")
        return Onward(why, pool, done=False)
    return Onward(detail.removeprefix(RESIZES), None, done=False) if detail.startswith(RESIZES) else None


def _unknown_end(reason: str, ended: float, devices: int, epoch: int) -> Outcome:
    """Takes the place of an outcome that cannot be read. It is never written."""
    content = {"class": "lost", "exit_code": None, "reason": reason, "step": None, "bound": None, "ended": ended, "devices": devices}
    return Outcome.model_validate(content | {"unaccounted_s": 0.0, "epoch": epoch})


def _with_published(attempt: AttemptView, step: int) -> AttemptView:
    return replace(attempt, published=step, left_traces=attempt.left_traces or step > 0)
