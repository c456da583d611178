"""What a driver does: it starts and ends attempts, writes their outcomes, and commits results.

Owns every record that a driver writes but its events: terms, intents, outcomes, COMMITTED. Every effect is written down before it is done
(an intent before a submit) or can be repeated (put-if-absent), so a driver may be killed after any single one. Before each effect the
lease is checked.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from opensora import identity
from orchestrator.accounting.cost import NodeTime
from orchestrator.accounting.history import History
from orchestrator.driver.decide import (
    Action,
    CloseAttempt,
    Commit,
    Drain,
    Evaluate,
    Finish,
    Kill,
    Move,
    Note,
    PassGate,
    StartAttempt,
    TellUnjudged,
    Wait,
)
from orchestrator.driver.facts import AttemptView, Checkpoint, Onward
from orchestrator.driver.launch import ASKED_TO_SAVE, NOT_EVALUATED, SUBMITTED, WAS_KILLED, Launch
from orchestrator.driver.placing import COUNTED, MOVES_ON, RESIZES, NodeSet, counted
from orchestrator.errors import CorruptCheckpoint, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.inputs import standing as stage_inputs
from orchestrator.ledger import lineage
from orchestrator.ledger.checkpoints import Place
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import (
    EXIT_CODES,
    NO_NEWER,
    Asked,
    Committed,
    GateDecision,
    Intent,
    Manifest,
    Outcome,
    ParentRef,
    Placement,
    Price,
    ResumeRef,
    Terms,
)
from orchestrator.recipe.pipeline import Stage
from orchestrator.recipe.prices import Prices, price_of

HASH_AT_MOST_BYTES = 64 * 2**20
"""What an attempt starts from is hashed before it is intended where it lies in a folder, up to this size (0.2 s). Beyond that its agent
is the first to read every byte, as it does anyway."""


class Actor:
    def __init__(self, launch: Launch, prices: Prices) -> None:
        """`prices`: what devices cost where this pipeline runs, written down with each attempt."""
        self._launch, self._prices = launch, prices
        self._pipeline, self._ledger, self._backend = launch.pipeline, launch.ledger, launch.backend
        self._clock, self._lease, self._results = launch.clock, launch.lease, launch.results
        self._unforgotten: list[str] = []
        """Run keys that have an outcome, and perhaps something lying around."""

    def act(self, action: Action) -> None:
        match action:
            case StartAttempt():
                self._start(action)
            case CloseAttempt():
                self._close(action)
            case Commit():
                self._commit(action)
            case Drain(attempt):
                self._launch.announce(attempt, ASKED_TO_SAVE)
                if attempt.life.where:
                    self._ask(attempt, "save")
                else:
                    self._backend.drain(self._launch.run_key(attempt))
                self._launch.draining.add(self._launch.run_key(attempt))
            case Kill(attempt, why):
                self._launch.announce(attempt, f"{WAS_KILLED}: {why}" if why else WAS_KILLED)
                if attempt.life.where:
                    self._ask(attempt, "now")
                    self._launch.ended_elsewhere.add(self._launch.run_key(attempt))
                    return
                self._backend.kill(self._launch.run_key(attempt))
                self._launch.given_up[self._launch.run_key(attempt)] = why
            case Move():
                self._move(action)
            case Evaluate(stage, inputs_digest, yields):
                assert self._launch.evaluator is not None
                self._launch.evaluator.start(stage, inputs_digest, yields=yields)
            case PassGate():
                self._pass_gate(action)
            case TellUnjudged(stage, inputs_digest, reason):
                self._launch.event("observed", stage=stage, detail=f"{NOT_EVALUATED}{reason}. Try again with: osctl eval {stage}")
                self._launch.unjudged.add((stage, inputs_digest))
            case Note(stage, detail):
                self._note(stage, detail)
            case Wait() | Finish():
                raise AssertionError(f"{action} is no effect")

    def _pass_gate(self, action: PassGate) -> None:
        gate = self._pipeline.stage(action.stage).spec.gate
        assert gate is not None
        content = {"stage": action.stage, "inputs_digest": action.inputs_digest, "gate": gate, "action": "passed", "note": action.why}
        holder = self._lease.handle.record.holder
        with contextlib.suppress(StoreConflict):  # a person decides at the same moment: the next look sees it
            self._ledger.decide_gate(GateDecision.model_validate({**content, "by": holder, "time": self._clock.now()}))
        self._launch.event("observed", stage=action.stage, detail=f"gate passed: {gate}, {action.why}")

    def _move(self, action: Move) -> None:
        attempt, change = action.attempt, action.change
        key = self._launch.run_key(attempt)
        self._launch.announce(attempt, f"{MOVES_ON}{change.pool}: {change.why}" if change.pool else f"{RESIZES}{change.why}")
        self._launch.onward[key] = Onward(change.why, change.pool, done=False)  # the answer to what follows may be lost
        if change.save:
            self._backend.drain(key)
        else:
            self._backend.kill(key)
        self._launch.onward[key] = Onward(change.why, change.pool, done=True)

    def _note(self, stage: str, detail: str) -> None:
        self._launch.event("observed", stage=stage, detail=detail)
        found = COUNTED.fullmatch(detail)
        assert found is not None, detail
        about = stage, found[1]
        self._launch.rooms[about] = counted(self._launch.rooms.get(about), found[1], int(found[2]), int(found[3]), self._clock.now())

    def _ask(self, attempt: AttemptView, how: Literal["save", "now"]) -> None:
        """Write the request into the ledger, where the attempt's agent looks for it."""
        self._ledger.ask_attempt(
            self._launch.intent_of(attempt), Asked(how=how, epoch=self._lease.epoch, by=self._lease.handle.record.holder)
        )

    def _start(self, action: StartAttempt) -> None:
        intent = self._ledger.intent(action.stage, action.inputs_digest, action.number)
        if intent is None:
            intent = self._intend(action)
        if intent is None:
            return
        self._lease.check()
        try:
            self._backend.submit(self._ledger.keys.intent(intent.stage, intent.inputs_digest, intent.attempt), intent.run_key)
        except Refused as error:
            self._results.refused[action.stage] = str(error)
            return
        if self._pipeline.backend == "kubernetes":
            self._launch.event("observed", stage=intent.stage, attempt=intent.attempt, detail=SUBMITTED)

    def _intend(self, action: StartAttempt) -> Intent | None:
        """Write the intent. None: what the attempt would start from does not verify, so `decide` has to decide anew."""
        stage = self._pipeline.stage(action.stage)
        try:
            parent = self._verified_parent(stage)
        except Refused as error:
            self._results.refused[stage.name] = str(error)
            return None
        if action.resume is not None and not self._verified(action.resume, stage, action.inputs_digest):
            return None
        resume = action.resume
        resources = stage.spec.resources
        self._lease.check()
        nodes = action.nodes or NodeSet(None, resources.nodes, stage.config.accumulate)
        try:
            self._backend.check(run_key(self._pipeline.name, stage.name, action.inputs_digest, action.number), nodes.nodes)
        except Refused as error:
            self._results.refused[stage.name] = str(error)
            return None
        number = self._placed(stage, action, nodes)
        judging = "beside" if self._launch.evaluator is not None else stage.config.judging
        config = stage.config.model_copy(update={"accumulate": nodes.accumulate, "judging": judging})
        device = self._pipeline.device_of(stage, nodes.pool)
        named_by = identity.VERSION if action.inputs_digest == stage_inputs.name_of(stage, self._results.of_parent(stage)) else 1
        terms = Terms(identity=named_by, contents=stage.contents, price=self._price(device, nodes.pool))
        self._ledger.write_terms(stage.name, action.inputs_digest, number, terms)
        intent = self._ledger.create_intent(
            Intent(
                run_key=run_key(self._pipeline.name, stage.name, action.inputs_digest, number),
                pipeline=self._pipeline.name,
                stage=stage.name,
                inputs_digest=action.inputs_digest,
                attempt=number,
                epoch=self._lease.epoch,
                created=self._clock.now(),
                config=config,
                config_digest=config.digest(),
                nodes=nodes.nodes,
                devices_per_node=resources.devices_per_node,
                device=device,
                trainer=self._pipeline.trainer,
                hang_timeout_s=stage.spec.hang_timeout_s,
                flush_s=self._pipeline.flush_s,
                parent=parent,
                resume=ResumeRef(key=resume.key, manifest_digest=resume.digest, step=resume.step) if resume else None,
                code=code_version(),
            )
        )
        start = f"from step {resume.step}" if resume else f"from {parent.stage}" if parent else "from the start"
        if resume and (otherwise := lineage.resumed_otherwise(self._ledger, intent)):
            start += f", {otherwise}"
        for place in self._ledger.unfinished(stage.name, action.inputs_digest):  # nobody uploads any more: no attempt of this stage lives
            key = f"{self._ledger.keys.checkpoint(place.stage, place.inputs_digest, place.step, place.attempt)}/MANIFEST.json"
            if key not in self._launch.broken and _is_newer(place, stage.name, action):
                self._launch.pass_over(key, place.step, place.attempt, stage, f"{key} is not there: its upload was not finished")
        places = map(Place.parse, self._launch.broken)
        if any(place is not None and _is_newer(place, stage.name, action) for place in places):
            start += f", {NO_NEWER}"
        start += f", in pool {nodes.pool}" if nodes.pool is not None else ""
        start += f", on {nodes.nodes} of {resources.nodes} nodes" if nodes.nodes != resources.nodes else ""
        detail = f"{start}, after {action.why}" if action.why else start
        self._launch.event("retry" if action.why else "attempt", stage=stage.name, attempt=number, detail=detail)
        return intent

    def _placed(self, stage: Stage, action: StartAttempt, nodes: NodeSet) -> int:
        """Write down where the attempt is made; its number. A driver that was killed here may have given a number to an attempt elsewhere
        that was never made: then the next number is taken, because nothing in the ledger is overwritten."""
        if self._pipeline.backend != "kubernetes":
            return action.number
        region = self._pipeline.cluster.pool(nodes.pool).region if self._pipeline.cluster and nodes.pool else None
        wanted = Placement(pool=nodes.pool, region=region, nodes_asked=stage.spec.resources.nodes, why=nodes.why)
        for number in itertools.count(action.number):
            try:
                found = self._ledger.placement(stage.name, action.inputs_digest, number)
            except Refused:  # nobody knows to which pool the number belongs
                continue
            if found is None and action.nodes is not None:
                found = self._ledger.write_placement(stage.name, action.inputs_digest, number, wanted)
            if found is None or (found.pool, found.nodes_asked) == (wanted.pool, wanted.nodes_asked):
                return number
        raise AssertionError("unreachable")

    def _price(self, device: str, pool: str | None) -> Price | None:
        """What a device costs in a pool now. None: it is in no list."""
        prices = self._prices
        if pool is not None and self._pipeline.cluster is not None:
            with contextlib.suppress(UsageError):  # the list may lack the pool's device; the plan has said so before the launch
                prices = prices.at(self._pipeline.cluster.in_pool(pool))
        return price_of(prices, device)

    def _verified_parent(self, stage: Stage) -> ParentRef | None:
        """Raises Refused where the parent's result is not what was committed."""
        if stage.spec.parent is None:
            return None
        parent = self._pipeline.stage(stage.spec.parent)
        inputs_digest = self._results.inputs(parent)
        assert inputs_digest is not None
        ref = lineage.parent_ref(self._ledger, parent.name, inputs_digest)
        self._verify(ref.key, ref.manifest_digest)
        return ref

    def _verify(self, manifest_key: str, manifest_digest: str) -> Manifest:
        """Raises CorruptCheckpoint."""
        manifest = self._ledger.verify(manifest_key, manifest_digest, full=False)
        size = sum(file.size for file in manifest.files.values())
        if not self._ledger.store.url.startswith("s3://") and size <= HASH_AT_MOST_BYTES:
            self._ledger.verify(manifest_key, manifest_digest, full=True)
        return manifest

    def _verified(self, checkpoint: Checkpoint, stage: Stage, inputs_digest: str) -> Manifest | None:
        """The manifest; None, and never used again, where the checkpoint is not what was published or not of this stage."""
        try:
            manifest = self._verify(checkpoint.key, checkpoint.digest)
        except CorruptCheckpoint as error:
            self._launch.pass_over(checkpoint.key, checkpoint.step, checkpoint.attempt, stage, str(error))
            return None
        if (manifest.stage, manifest.inputs_digest) != (stage.name, inputs_digest):
            other = f"{checkpoint.key}: is of {manifest.stage}@{manifest.inputs_digest}, not of {stage.name}@{inputs_digest}"
            self._launch.pass_over(checkpoint.key, checkpoint.step, checkpoint.attempt, stage, other)
            return None
        return manifest

    def _close(self, action: CloseAttempt) -> None:
        attempt = action.attempt
        intent = self._ledger.intent(attempt.stage, attempt.inputs_digest, attempt.number)
        assert intent is not None
        history = History(self._ledger)
        heard = history.of(intent, self._clock.now())
        for totals in history.unwritten(intent):
            with contextlib.suppress(StoreConflict):
                self._ledger.append_totals(intent, totals)
        bound, ended, unaccounted_s = held_time(attempt, heard, intent.nodes, self._clock.now())
        manifests = self._ledger.checkpoints(attempt.stage, attempt.inputs_digest)
        published = max((manifest.step for _, manifest in manifests if manifest.attempt == attempt.number), default=attempt.resumed_from)
        exit_code = attempt.life.exit_code
        if exit_code is None and attempt.report is not None:
            exit_code = EXIT_CODES.get(attempt.report.class_)
        outcome = Outcome.model_validate(
            {
                "class": action.class_,
                "exit_code": exit_code,
                "reason": action.reason,
                "step": published or None,
                "bound": bound,
                "ended": ended,
                "devices": intent.nodes * intent.devices_per_node,
                "unaccounted_s": unaccounted_s,
                "by_person": action.by_person,
                "evaluation": attempt.report.evaluation if attempt.report else {},
                "next_pool": action.next_pool,
                "epoch": self._lease.epoch,
            }
        )
        if attempt.report is None and attempt.life.last_words:
            self._keep_last_words(intent, attempt.life.last_words, ended)
        written = self._ledger.write_outcome(intent, outcome)
        self._unforgotten.append(intent.run_key)
        self._launch.event("outcome", attempt, f"{written.class_}: {written.reason}" if written.reason else written.class_)

    def _keep_last_words(self, intent: Intent, said: str, ended: float) -> None:
        """Append what an agent printed that left no report to its trainer's output, since people look into `osctl logs`."""
        pieces = list(self._ledger.log(intent.stage, intent.inputs_digest, intent.attempt, node=0))
        heading = "osctl: the agent left without a report; the end of what it printed:\n"
        if not pieces or not pieces[-1].text().startswith(heading.encode()):  # else a driver that was killed here has written it
            self._ledger.append_log(intent, 0, len(pieces), (heading + said).encode(), ended)

    def _commit(self, action: Commit) -> None:
        attempt, outcome = action.attempt, action.attempt.outcome
        assert outcome is not None
        stage = self._pipeline.stage(attempt.stage)
        manifest = self._verified(action.checkpoint, stage, attempt.inputs_digest)
        if manifest is None:
            return
        parent = self._results.of_parent(stage)
        # Nothing in it depends on who commits or when: a driver that takes over commits the very same bytes.
        committed = Committed(
            run_key=manifest.run_key,  # an earlier attempt's, where this one found its complete checkpoint and only evaluated it
            stage=attempt.stage,
            inputs_digest=attempt.inputs_digest,
            attempt=manifest.attempt,
            step=manifest.step,
            manifest=action.checkpoint.key,
            manifest_digest=action.checkpoint.digest,
            weights_digest=manifest.weights_digest,
            parent_committed=parent.digest() if parent else None,
            evaluation=outcome.evaluation,
            time=outcome.ended,
            epoch=outcome.epoch,
        )
        self._lease.check()
        try:
            written = self._ledger.commit(committed)
        except StoreConflict as error:
            raise Refused(f"{attempt.stage}: another result is already committed ({error}). See: osctl lineage --verify") from error
        self._launch.log_committed(written)

    def tidy(self) -> None:
        """Let the backend clear away attempts that are over. A backend that cannot be asked is asked again later: nothing depends on it."""
        with contextlib.suppress(Unreachable):
            while self._unforgotten:
                self._backend.forget(self._unforgotten[-1])
                self._unforgotten.pop()


def held_time(attempt: AttemptView, nodes: Sequence[NodeTime], count: int, now: float) -> tuple[float | None, float, float]:
    """(bound, ended, unaccounted_s) of an attempt of `count` nodes that is over; `nodes`: what was heard of them.

    `ended` is death as seen from outside; where nobody saw it, the last thing that was heard. `unaccounted_s` is the time between a
    node's last journal piece and death, averaged over the nodes, so that devices × unaccounted_s is what the bill must add.
    """
    if attempt.never_started:
        return None, now, 0.0
    last = {node.node: node.end for node in nodes if node.end is not None}
    heard = [*last.values(), *([attempt.report.ended] if attempt.report else [])]
    starts = [node.start for node in nodes if node.start is not None]
    bound = attempt.life.bound if attempt.life.bound is not None else min(starts, default=None)
    ended = max([attempt.life.ended, *last.values()]) if attempt.life.ended is not None else max(heard, default=bound or now)
    if bound is None:
        return None, ended, 0.0
    ends = [max(bound, last.get(node, bound)) for node in range(count)]
    return bound, ended, max(0.0, sum(ended - end for end in ends) / len(ends))


def _is_newer(place: Place, stage: str, action: StartAttempt) -> bool:
    """Whether a checkpoint would be what this attempt goes on from, if it could be used."""
    resumed = action.resume.step if action.resume else 0
    return (place.stage, place.inputs_digest) == (stage, action.inputs_digest) and place.step >= resumed


def code_version() -> str:
    """Version of this package, and the git revision where it runs from a checkout."""
    version = importlib.metadata.version("osctl")
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        revision = (git / head.removeprefix("ref: ")).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return version
    return f"{version}+g{revision[:12]}"
