"""MLflow as a picture of the ledger: pipeline > stage > attempt, brought up to date as often as anybody likes, nothing ever doubled.

`python -m orchestrator.projection --store URL --pipeline NAME --tracking URI [--follow-pid PID]` does it once, or beside a launch until
that ends. Nothing waits for it: the ledger is the spool, and what MLflow missed is there the next time.

Owns what a run in MLflow is called, carries and links to. Refuses to write to the ledger, and to take anything from MLflow but what it
shows already. A run's status is the ledger's. An end that nobody wrote there (a launcher was killed) is read from silence: nobody
holds the lease, and no journal has grown for a while. Then a run is KILLED as of the last thing heard of it, and RUNNING again once
more is heard or somebody drives it again.

How nothing is doubled, though MLflow has no idempotency keys:

- A run carries our key (`osctl/run_key`) and the ledger's identity, and is looked for before it is made. Of twins (two projections at
  once, or a create whose answer was lost) the first id stays, the others are deleted; everyone agrees which is first.
- A curve goes up in order, and the tag `osctl/cursor` says how far it is. It is written after the points, in the same call. A crash in
  between repeats at most one call, of the very same points: key, value, time and step come from the ledger, and MLflow keeps such a
  point once (they are the primary key of its table).
- A reading (dollars, hours) is sent only where it differs from what MLflow shows.
- Parameters, tags, data sets, samples, model versions and aliases are compared before they are written.

On a stage's curves each step stands once, from the attempt whose checkpoint first held it; the curves of attempts have every step, and
every reading.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
from pydantic import ValidationError

from opensora.config import StageConfig
from orchestrator.config import Pipeline, Published
from orchestrator.cost import AttemptBill, AttemptTime, Bill, Prices, account, load_prices, merge
from orchestrator.errors import OsctlError, Refused, Unreachable, UsageError
from orchestrator.history import AttemptHistory, History
from orchestrator.inputs import results
from orchestrator.ledger import Ledger
from orchestrator.ports import Point, RunStatus, TrackedRun, Tracker
from orchestrator.prices import named_prices
from orchestrator.records import Committed, Event, Intent, JournalPiece, Outcome, sha256

log = logging.getLogger(__name__)

RUN_KEY = "osctl/run_key"
LEDGER = "osctl/ledger"
CURSOR = "osctl/cursor"
AS_OF = "osctl/as_of"
SAMPLES = "osctl/samples"
PARENT = "mlflow.parentRunId"

POINTS_A_CALL = 900
"""Enough to make the call's own cost small (a call with 900 points takes 0.1 s on sqlite), within MLflow's 1000 a call."""
VALUE_CHARACTERS = 500
"""Longest parameter or tag, in characters; longer ones are cut. MLflow's own limit on every database."""
PICTURES = (".png", ".mp4")

KEPT_PIECES = 512
"""Journal pieces at hand: a stage's curve wants those of an attempt's once more when a checkpoint holds their steps."""

BOOKKEEPING = frozenset({"clips", "tokens", "data_wait_s", "checkpoint_s"})
"""Per-step readings that only the curves of attempts have: on a stage's page their sums (`seconds/...`) say more in less room."""

KILLED = frozenset({"drained", "signal", "lost"})
"""Ends that say nothing against the work: somebody or something stopped it."""
SILENT_S = 30.0
"""An agent that lives adds to its journal more often than that, or at the latest after three of its own intervals."""


# --- What the ledger says --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttemptFacts:
    intent: Intent
    outcome: Outcome | None
    time: AttemptTime
    samples: tuple[str, ...]
    """Keys in the store."""
    pieces: Callable[[int], Iterable[JournalPiece]]
    """Pieces of the first node behind a number, ascending; read when they are asked for. Raises Unreachable."""
    first_piece_with: Callable[[int], int]
    """Number of a piece that is not behind the first one with this step."""
    trouble: str = ""
    """Of one that lives: why its checkpoints do not reach the store."""


@dataclass(frozen=True)
class StageFacts:
    name: str
    published: Published | None
    """Of the newest revision that names the stage and can be read."""
    inputs: str
    current: bool
    """Whether the pipeline as launched last would use this result."""
    attempts: tuple[AttemptFacts, ...]
    """Ascending, at least one."""
    committed: Committed | None
    data: str | None = None
    """Digest of the data set; none: not recorded."""


@dataclass(frozen=True)
class Facts:
    pipeline: Pipeline
    ledger: str
    """Identity of the ledger, which outlives a move of its store: digest of its first revision."""
    store: str
    created: float
    events: tuple[Event, ...]
    """Of kinds launched and ended, in order."""
    stages: tuple[StageFacts, ...]
    driven: bool = True
    """Whether somebody holds the lease."""
    now: float = 0.0
    """When the lease was looked at."""


class Reader:
    """Reads a ledger again and again; events, journals and attempts that are over only once."""

    def __init__(self, ledger: Ledger, prices: Callable[[], Prices] = load_prices):
        """`prices`: for attempts whose ledger holds no price; see `orchestrator.history`.

        A picture shows what can be read; `osctl status` says what cannot.
        """
        self.history = History(ledger, prices, keep=KEPT_PIECES)
        self.ledger = self.history.ledger

    def read(self) -> Facts | None:
        """None: never launched. Raises Unreachable."""
        revisions = self.ledger.revisions()
        if not revisions:
            return None
        pipelines = [pipeline for _, revision in revisions[::-1] if (pipeline := _pipeline(revision.pipeline)) is not None]
        if not pipelines:
            return None
        first = revisions[0][1]
        return Facts(
            pipeline=pipelines[0],
            ledger=first.digest()[:12],
            store=self.ledger.store.url,
            created=first.created,
            events=tuple(event for event in self.events() if event.kind in ("launched", "ended")),
            stages=tuple(self._stages(pipelines, time.time())),
        )

    def events(self) -> list[Event]:
        return self.history.events()

    def _stages(self, pipelines: Sequence[Pipeline], now: float) -> Iterator[StageFacts]:
        """Every stage that was ever attempted: in the order of the newest revision that names it, then those that none names."""
        published: dict[str, Published | None] = {}
        for pipeline in pipelines:
            for stage in pipeline.stages:
                published.setdefault(stage.name, stage.spec.published)
        for name, _ in self.ledger.stages():
            published.setdefault(name, None)  # its revisions are of another version of this package; what it cost was paid all the same
        current = {name: inputs for name, (inputs, _) in results(pipelines[0], self.ledger).items()}
        for name, reference in published.items():
            for inputs in reversed(self.ledger.inputs_of(name)):
                attempts = tuple(self._attempt(one) for one in self.history.attempts(name, inputs, now))
                if attempts:
                    committed = self.ledger.committed(name, inputs)
                    terms = self.ledger.terms(name, inputs, attempts[-1].intent.attempt)
                    data = terms.contents.data if terms is not None else None
                    yield StageFacts(name, reference, inputs, current.get(name) == inputs, attempts, committed, data)

    def _attempt(self, one: AttemptHistory) -> AttemptFacts:
        intent = one.intent
        samples = tuple(self.ledger.samples(intent.stage, intent.inputs, intent.attempt))
        pieces = functools.partial(self.history.pieces, one)
        trouble = self.ledger.trouble(intent.stage, intent.inputs, intent.attempt) if one.outcome is None else None
        said = trouble.reason if trouble is not None else ""
        return AttemptFacts(intent, one.outcome, one.time, samples, pieces, one.first.first_piece_with, said)


def _pipeline(content: dict[str, Any]) -> Pipeline | None:
    try:
        return Pipeline.model_validate(content)
    except ValidationError:
        return None  # of another version of this package


# --- The picture that MLflow should show -----------------------------------------------------------------------------------------------

Curve = Callable[[int], Iterator[tuple[int, list[Point]]]]
"""From a cursor to the groups of points after it, each with its own cursor, ascending."""


@dataclass(frozen=True)
class RunPicture:
    """One run as MLflow should show it. `key` and `parent` are ours (`osctl/run_key`)."""

    key: str
    parent: str | None
    name: str
    start: float
    status: RunStatus
    ended: float | None
    tags: Mapping[str, str]
    readings: Mapping[str, float]
    as_of: float
    """Time of the newest record that the readings come from."""
    params: Mapping[str, str] = field(default_factory=dict)
    curve: Curve = lambda cursor: iter(())
    dataset: tuple[str, str, str] | None = None
    """(name, digest, source)."""
    samples: Mapping[str, str] = field(default_factory=dict)
    """File name -> key in the store."""


@dataclass(frozen=True)
class VersionPicture:
    """One version of the registered model as MLflow should have it."""

    run: str
    """Key of the stage's run."""
    source: str
    alias: str | None
    tags: Mapping[str, str]


def picture(facts: Facts) -> list[RunPicture]:
    """Every run, parents before their children. Reads nothing but, when it is followed, a curve's journal."""
    bills = [account([attempt.time for attempt in stage.attempts]) for stage in facts.stages]
    whole = merge(bills)
    categories = [category for category, seconds in whole.seconds.items() if seconds]
    runs = [_pipeline_picture(facts, whole, categories)]
    for stage, bill in zip(facts.stages, bills, strict=True):
        runs.append(_stage_picture(facts, stage, bill, categories))
        runs += [_attempt_picture(facts, stage, *pair, categories) for pair in zip(stage.attempts, bill.attempts, strict=True)]
    return runs


def versions(facts: Facts) -> list[VersionPicture]:
    """One version a committed stage, in the order in which they were committed; the alias is on the current one. Pure."""
    found = [stage for stage in facts.stages if stage.committed is not None]
    return [
        VersionPicture(
            run=stage_key(facts, stage),
            source=source_uri(facts.store, stage.committed.manifest.rpartition("/")[0]),
            alias=alias_of(stage.name) if stage.current else None,
            tags={
                RUN_KEY: stage_key(facts, stage),
                LEDGER: facts.ledger,
                "osctl/stage": stage.name,
                "osctl/step": str(stage.committed.step),
                "osctl/weights_digest": stage.committed.weights_digest,
                "osctl/manifest_digest": stage.committed.manifest_digest,
            },
        )
        for stage in sorted(found, key=lambda stage: stage.committed.time if stage.committed else 0.0)
        if stage.committed is not None
    ]


def _pipeline_picture(facts: Facts, bill: Bill, categories: Sequence[str]) -> RunPicture:
    status, ended = _pipeline_status(facts)
    published = [stage.published for stage in facts.stages if stage.current and stage.published]
    return RunPicture(
        key=facts.pipeline.name,
        parent=None,
        name=facts.pipeline.name,
        start=facts.created,
        status=status,
        ended=ended,
        tags=_common(facts) | {"osctl/kind": "pipeline", "osctl/store": facts.store, "osctl/backend": facts.pipeline.backend},
        readings=_bill_readings(bill, categories)
        | _reference(bill, sum(ref.gpu_hours for ref in published), sum(ref.usd for ref in published)),
        as_of=_as_of(facts),
    )


def _stage_picture(facts: Facts, stage: StageFacts, bill: Bill, categories: Sequence[str]) -> RunPicture:
    committed, last = stage.committed, stage.attempts[-1]
    intent, published = last.intent, stage.published
    config = intent.config
    status, ended = _stage_status(facts, stage)
    tags = {
        "osctl/kind": "stage",
        "osctl/stage": intent.stage,
        "osctl/inputs": stage.inputs,
        "osctl/current": str(stage.current).lower(),
        "osctl/attempts": str(len(stage.attempts)),
        "osctl/config_digest": intent.config_digest,
        "osctl/code": intent.code,
    }
    if intent.parent is not None:
        tags["osctl/parent_stage"] = intent.parent.stage
        tags["osctl/parent_manifest"] = intent.parent.manifest_digest
    if committed is not None:
        tags["osctl/attempt"] = str(committed.attempt)
        tags["osctl/weights_digest"] = committed.weights_digest
        tags["osctl/manifest_digest"] = committed.manifest_digest
        tags["osctl/checkpoint"] = f"{facts.store.rstrip('/')}/{committed.manifest.rpartition('/')[0]}"
    evaluation = committed.evaluation if committed else last.outcome.evaluation if last.outcome else {}
    return RunPicture(
        key=stage_key(facts, stage),
        parent=facts.pipeline.name,
        name=intent.stage,
        start=stage.attempts[0].intent.created,
        status=status,
        ended=ended,
        tags=_common(facts) | tags,
        readings=_bill_readings(bill, categories)
        | _reference(bill, published.gpu_hours if published else 0.0, published.usd if published else 0.0)
        | {f"evaluation/{metric_name(name)}": value for name, value in evaluation.items()},
        as_of=_as_of(facts),
        params=flatten(config) | {"devices": str(intent.nodes * intent.devices_per_node)},
        curve=lambda cursor: stage_curve(stage.attempts, cursor),
        dataset=_dataset(config, stage.data),
        samples={_file(key): key for attempt in stage.attempts for key in attempt.samples if key.endswith(PICTURES)},
    )


def _attempt_picture(facts: Facts, stage: StageFacts, attempt: AttemptFacts, bill: AttemptBill, categories: Sequence[str]) -> RunPicture:
    intent, outcome = attempt.intent, attempt.outcome
    status, ended = _attempt_status(facts, stage, attempt)
    tags = {
        "osctl/kind": "attempt",
        "osctl/stage": intent.stage,
        "osctl/inputs": intent.inputs,
        "osctl/attempt": str(intent.attempt),
        "osctl/code": intent.code,
    }
    if outcome is not None:
        tags |= {"osctl/class": outcome.class_, "osctl/reason": outcome.reason[:VALUE_CHARACTERS]}
    elif attempt.trouble:
        tags |= {"osctl/reason": attempt.trouble[:VALUE_CHARACTERS]}
    return RunPicture(
        key=intent.run_key,
        parent=stage_key(facts, stage),
        name=f"{intent.stage} a{intent.attempt}",
        start=intent.created,
        status=status,
        ended=ended,
        tags=_common(facts) | tags,
        readings=_bill_readings(bill, categories),
        as_of=_as_of(facts),
        params={
            "nodes": str(intent.nodes),
            "devices_per_node": str(intent.devices_per_node),
            "device": intent.device,
            "resumed_from": str(intent.resume.step if intent.resume else 0),
        },
        curve=lambda cursor: attempt_curve(attempt.pieces(cursor)),
    )


def _heard(attempt: AttemptFacts) -> float:
    """Time of the last sign of life that is in the ledger."""
    return max((node.end for node in attempt.time.nodes if node.end is not None), default=attempt.intent.created)


def _lives(facts: Facts, stage: StageFacts, attempt: AttemptFacts) -> bool:
    """Whether an attempt goes on, as far as the ledger tells: it has no outcome, and is driven or was heard a moment ago."""
    if attempt.outcome is not None:
        return False
    silent_s = facts.now - _heard(attempt)
    return (facts.driven and stage.current) or silent_s < max(SILENT_S, 3 * attempt.intent.flush_s)


def is_undecided(facts: Facts) -> bool:
    """Nobody drives it, and an attempt was heard a moment ago: whether that lives, silence will tell."""
    return not facts.driven and any(_lives(facts, stage, attempt) for stage in facts.stages for attempt in stage.attempts)


def _attempt_status(facts: Facts, stage: StageFacts, attempt: AttemptFacts) -> tuple[RunStatus, float | None]:
    if attempt.outcome is not None:
        return _status_of(attempt.outcome), attempt.outcome.ended
    return ("RUNNING", None) if _lives(facts, stage, attempt) else ("KILLED", _heard(attempt))


def _status_of(outcome: Outcome) -> RunStatus:
    return "FINISHED" if outcome.class_ == "completed" else "KILLED" if outcome.class_ in KILLED else "FAILED"


def _stage_status(facts: Facts, stage: StageFacts) -> tuple[RunStatus, float | None]:
    """A stage between two attempts is running as long as somebody drives it."""
    if stage.committed is not None:
        return "FINISHED", stage.committed.time
    last = stage.attempts[-1]
    if last.outcome is None:
        return _attempt_status(facts, stage, last)
    if _is_under_way(facts) and facts.driven and stage.current:
        return "RUNNING", None
    return ("FAILED" if _status_of(last.outcome) == "FAILED" else "KILLED"), last.outcome.ended


def _pipeline_status(facts: Facts) -> tuple[RunStatus, float | None]:
    if _is_under_way(facts):
        return ("RUNNING", None) if facts.driven or is_undecided(facts) else ("KILLED", _as_of(facts))
    last = facts.events[-1]
    ends: dict[str, RunStatus] = {"succeeded": "FINISHED", "failed": "FAILED"}
    return ends.get(last.detail.partition(":")[0], "KILLED"), last.time


def _is_under_way(facts: Facts) -> bool:
    """Whether a launch began and has not said that it ended."""
    return not facts.events or facts.events[-1].kind != "ended"


def _common(facts: Facts) -> dict[str, str]:
    return {"osctl/pipeline": facts.pipeline.name, LEDGER: facts.ledger}


def _bill_readings(bill: Bill | AttemptBill, categories: Sequence[str]) -> dict[str, float]:
    """`categories`: what the pipeline spent any time on. A run without it shows 0 beside the others, not nothing."""
    readings = {"usd": float(bill.usd), "gpu_hours": bill.gpu_hours, "device_hours": bill.device_hours}
    if bill.goodput is not None:
        readings["goodput"] = bill.goodput
    return readings | {f"seconds/{category}": bill.seconds[category] for category in categories}


def _reference(bill: Bill, gpu_hours: float, usd: float) -> dict[str, float]:
    """Beside the published run. A ratio needs GPUs on both sides: a CPU's 0 GPU-hours are no saving."""
    readings = {"usd_reference": usd, "gpu_hours_reference": gpu_hours} if gpu_hours or usd else {}
    return readings | ({"ratio_vs_reference": bill.gpu_hours / gpu_hours} if gpu_hours and bill.gpu_hours else {})


def attempt_curve(pieces: Iterable[JournalPiece]) -> Iterator[tuple[int, list[Point]]]:
    """Points of these pieces, a group a piece. A piece that is missing between two will never come: a node writes them in order."""
    for piece in pieces:
        yield piece.seq, [point for line in piece.metrics for point in points(line)]


def stage_curve(attempts: Sequence[AttemptFacts], cursor: int) -> Iterator[tuple[int, list[Point]]]:
    """Points after step `cursor`, a group a step; each step once, from the first attempt that published a checkpoint with it."""
    reached = cursor
    for attempt in attempts:
        if attempt.time.last_published <= max(reached, attempt.time.resumed_from):
            continue  # it holds no step that an earlier one has not
        for line in _lines(attempt.pieces(attempt.first_piece_with(reached + 1) - 1)):
            step = line.get("step")
            if isinstance(step, int) and step > attempt.time.last_published:
                break
            if isinstance(step, int) and reached < step:
                yield step, [point for point in points(line) if point.key not in BOOKKEEPING]
                reached = step


def _lines(pieces: Iterable[JournalPiece]) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        yield from piece.metrics


def points(line: Mapping[str, Any]) -> Iterator[Point]:
    """The numbers of one line of metrics.jsonl that is about a step."""
    if "step" not in line or "time" not in line:
        return
    for name, value in line.items():
        if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
            yield Point(metric_name(name), float(value), line["time"], line["step"])


def metric_name(name: str) -> str:
    """Only what MLflow takes in a name."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def flatten(config: StageConfig) -> dict[str, str]:
    """`model.depth: 4`: every field of a stage as MLflow's parameters, cut at VALUE_CHARACTERS."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(f"{prefix}.{name}" if prefix else name, part)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[prefix] = text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 1] + "…"

    walk("", config.model_dump(mode="json"))
    return flat


def _dataset(config: StageConfig, digest: str | None) -> tuple[str, str, str]:
    """(name, digest, source): by the data set's own digest, where that was recorded, else by the configuration."""
    content = config.data.model_dump_json()
    return config.data.source.kind, (digest or sha256(content.encode()))[:32], content


def stage_key(facts: Facts, stage: StageFacts) -> str:
    return f"{facts.pipeline.name}/{stage.name}@{stage.inputs}"


def source_uri(store: str, key: str) -> str:
    """Where a checkpoint lies, for people and for `osctl`.

    A folder gets a scheme of ours, with its own path as a query: an MLflow server refuses sources with a local path outside of its own
    artifacts, and those whose path is a symbolic link on its own disk.
    """
    base = store.rstrip("/")
    if "://" in base and not base.startswith("file:"):
        return f"{base}/{key}"
    return f"osctl://folder/{key}?store={quote(base.removeprefix('file://'))}"


def alias_of(stage: str) -> str:
    """A stage's name as MLflow takes it for an alias: no dots, neither `latest` nor `v1`."""
    alias = stage.replace(".", "-")
    return f"stage-{alias}" if alias == "latest" or re.fullmatch(r"v\d+", alias) else alias


def _file(key: str) -> str:
    return key.rpartition("/")[2]


def _as_of(facts: Facts) -> float:
    times = [facts.created, *(event.time for event in facts.events)]
    for stage in facts.stages:
        times += [stage.committed.time] if stage.committed else []
        for attempt in stage.attempts:
            times += [attempt.intent.created, *([attempt.outcome.ended] if attempt.outcome else [])]
            times += [node.end for node in attempt.time.nodes if node.end is not None]
    return max(times)


# --- Bringing MLflow up to it ----------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    """What one projection changed."""

    created: int = 0
    points: int = 0
    samples: int = 0
    versions: int = 0


class Projector:
    """One ledger, one tracker. `bring` may be called at any time, by any number of processes, and stopped anywhere."""

    def __init__(
        self, ledger: Ledger, tracker: Tracker, prices: Callable[[], Prices] = load_prices, clock: Callable[[], float] = time.time
    ):
        """`prices`: for attempts whose ledger holds no price; see `orchestrator.history`."""
        self.reader, self.tracker, self._clock = Reader(ledger, prices), tracker, clock

    def bring(self, lag: float = 0.0) -> Facts | None:
        """Bring MLflow up to the ledger.

        Args:
            lag: how far the readings of a live run may lie behind, as a share of its age. Each look at a live bill would else add a
                row to every reading: 100 000 a day for one stage. 0.02 makes it some hundreds.

        Raises:
            Unreachable: the store or MLflow.
        """
        driven, now = self._driven(), self._clock()  # before the records: what ended meanwhile says so itself
        facts = self.reader.read()
        if facts is None:
            return None
        facts = replace(facts, driven=driven, now=now)
        done = Done()
        known = self._known(facts)
        ids: dict[str, str] = {}
        for run in picture(facts):
            tags = dict(run.tags) | {RUN_KEY: run.key} | ({PARENT: ids[run.parent]} if run.parent else {})
            shown = known.get(run.key)
            if shown is None:
                number = self.tracker.create(facts.pipeline.experiment, run.name, tags, run.start)
                shown = TrackedRun(number, "RUNNING", tags, {}, {})
                done.created += 1
            ids[run.key] = shown.id
            self._update(run, shown, tags, lag, done)
        if done.created:
            self._known(facts)  # twins of what was just made
        self._models(facts, ids, done)
        if done != Done():
            log.debug("projected %s: %s", facts.pipeline.name, done)
        return facts

    def _driven(self) -> bool:
        try:
            return self.reader.ledger.holder(self._clock()) is not None
        except Refused:  # a lease that cannot be read is nobody's
            return False

    def _known(self, facts: Facts) -> dict[str, TrackedRun]:
        """Runs of this ledger by key. Of twins the first id stays: every projection makes the same choice."""
        known: dict[str, TrackedRun] = {}
        for run in sorted(self.tracker.runs(facts.pipeline.experiment, {LEDGER: facts.ledger}), key=lambda run: run.id):
            if run.tags.get(RUN_KEY, "") in known:
                self.tracker.delete(run.id)
            else:
                known[run.tags.get(RUN_KEY, "")] = run
        return known

    def _update(self, run: RunPicture, shown: TrackedRun, tags: Mapping[str, str], lag: float, done: Done) -> None:
        self._curve(run, shown, done)
        params = {name: value for name, value in run.params.items() if name not in shown.params}
        changed = {name: value for name, value in tags.items() if shown.tags.get(name) != value}
        readings, as_of = self._readings(run, shown, lag)
        if readings:
            changed[AS_OF] = str(as_of)
        if params or changed:
            self.tracker.log(shown.id, points=readings, params=params, tags=changed)
        if run.dataset is not None and run.dataset[:2] not in shown.datasets:
            self.tracker.dataset(shown.id, *run.dataset)
        self._samples(run, shown, done)
        # Last: a run that is over has everything.
        if (run.status, _ms(run.ended)) != (shown.status, _ms(shown.ended)):
            self.tracker.status(shown.id, run.status, run.ended)

    def _curve(self, run: RunPicture, shown: TrackedRun, done: Done) -> None:
        batch: list[Point] = []
        cursor = -1
        for cursor, group in run.curve(int(shown.tags.get(CURSOR, -1))):
            batch += group
            done.points += len(group)
            if len(batch) >= POINTS_A_CALL:
                self.tracker.log(shown.id, points=batch, tags={CURSOR: str(cursor)})
                batch = []
        if batch:
            self.tracker.log(shown.id, points=batch, tags={CURSOR: str(cursor)})

    def _readings(self, run: RunPicture, shown: TrackedRun, lag: float) -> tuple[list[Point], int]:
        """Those that MLflow does not show yet, and their common time in ms.

        MLflow shows the value of the newest time, and of equal times the largest value. So a reading that changed for another reason
        than a newer record (a price was corrected) needs a time after the last one.
        """
        before = int(shown.tags.get(AS_OF, -1))
        as_of = max(round(run.as_of * 1000), before + 1)
        wanted = dict(run.readings) | {name: 0.0 for name in shown.metrics if name.startswith("seconds/") and name not in run.readings}
        changed = [name for name, value in wanted.items() if not _same(shown.metrics.get(name), value)]
        if run.ended is None and before >= 0 and as_of - before < lag * (as_of - run.start * 1000):
            return [], before
        return [Point(name, wanted[name], as_of / 1000) for name in changed], as_of

    def _samples(self, run: RunPicture, shown: TrackedRun, done: Done) -> None:
        digest = hashlib.sha256(json.dumps(sorted(run.samples.items())).encode()).hexdigest()[:16]
        if not run.samples or shown.tags.get(SAMPLES) == digest:
            return
        store = self.reader.ledger.store
        there = self.tracker.artifacts(shown.id, "samples")
        for name, key in run.samples.items():
            if there.get(name) == store.size(key):
                continue
            with tempfile.TemporaryDirectory() as folder:
                store.download(key, Path(folder) / name)
                self.tracker.attach(shown.id, "samples", Path(folder) / name)
            done.samples += 1
        self.tracker.log(shown.id, tags={SAMPLES: digest})

    def _models(self, facts: Facts, ids: Mapping[str, str], done: Done) -> None:
        wanted = versions(facts)
        if not wanted:
            return
        model = facts.pipeline.name
        there, aliases = self.tracker.models(model)
        ours: dict[str, int] = {}
        for version in there:
            key = version.tags.get(RUN_KEY, "")
            if version.tags.get(LEDGER) != facts.ledger:
                continue
            if key in ours:
                self.tracker.unregister(model, version.number)  # a twin: its create was repeated
            else:
                ours[key] = version.number
        for result in wanted:
            number = ours.get(result.run)
            if number is None:
                number = ours[result.run] = self.tracker.register(model, result.source, ids[result.run], result.tags)
                done.versions += 1
            holder = aliases.get(result.alias or "")
            # An alias that a later version of another ledger holds is left there: of two ledgers under one name the newest result wins.
            if result.alias is not None and holder != number and (holder is None or holder < number or holder in ours.values()):
                self.tracker.alias(model, result.alias, number)


def project(
    ledger: Ledger, tracker: Tracker, prices: Callable[[], Prices] = load_prices, clock: Callable[[], float] = time.time
) -> Facts | None:
    """Bring MLflow up to the ledger, once and wholly. Idempotent. Raises Unreachable."""
    return Projector(ledger, tracker, prices, clock).bring()


def _same(shown: float | None, value: float) -> bool:
    if shown is None:
        return False
    return math.isclose(shown, value, rel_tol=1e-12, abs_tol=1e-12) or (math.isnan(shown) and math.isnan(value))


def _ms(time_s: float | None) -> int | None:
    return None if time_s is None else round(time_s * 1000)


# --- The process beside a launch -------------------------------------------------------------------------------------------------------


class Follower:
    """Projects every `interval_s` until the launch is over and everything is there. A dead MLflow costs one line, not a run.

    A launcher that was killed has written no end: then it looks on until silence has told what became of the attempts.
    """

    LAG = 0.02
    LAST_TRIES = 3
    """Tries after the launch has ended, 1 and 2 s between them; then it is `osctl sync`'s turn."""
    LAST_ANSWER_S = 4.0
    """How long a server may owe an answer once the launcher waits for this process to leave."""
    BACKOFF_S = 60.0
    """Longest pause between two tries while MLflow is down."""
    LINGER_S = 300.0
    """How long attempts are looked after that nobody drives any more."""

    def __init__(
        self,
        bring: Callable[[float], Facts | None],
        over: Callable[[], bool],
        rest: Callable[[float], None],
        interval_s: float,
        waited_for: Callable[[], bool] = lambda: False,
    ):
        """`waited_for`: whether the launcher waits for this process to leave."""
        self.bring, self.over, self.rest, self.interval_s, self.waited_for = bring, over, rest, interval_s, waited_for

    def follow(self) -> bool:
        """Whether MLflow is up to the ledger at the end."""
        down = 0
        last_tries = 0
        lingered_s = 0.0
        while True:
            over = self.over()  # before the look: what was written until then is seen by it
            try:
                facts = self.bring(0.0 if over else self.LAG)
            except Unreachable as error:
                down += 1
                if down == 1:
                    log.warning("%s", error)
                last_tries += over
                if last_tries >= self.LAST_TRIES:
                    return False
                self.rest(min(2.0 ** ((last_tries or down) - 1), self.BACKOFF_S))
                continue
            if down:
                log.warning("MLflow is back, and up to the ledger")
            down = 0
            if over and (lingered_s >= self.LINGER_S or self.waited_for() or facts is None or not is_undecided(facts)):
                return True
            lingered_s += self.interval_s if over else 0.0
            self.rest(self.interval_s)


class Launch:
    """The launcher whose end is waited for: a process, or its word in the ledger that it is done, or a SIGTERM from it."""

    def __init__(self, pid: int, events: Callable[[], Sequence[Event]]):
        self.events = events
        self.asked = False
        """Whether the launcher waits for this process to leave."""
        try:
            self.process: psutil.Process | None = psutil.Process(pid)
            self.since = self.process.create_time()
        except psutil.NoSuchProcess:
            self.process, self.since = None, 0.0

    def over(self) -> bool:
        return self.asked or not self._alive() or self._ended()

    def ask(self, *_: object) -> None:
        """Signal handler: the launch is over, project once more and leave."""
        self.asked = True

    def rest(self, seconds: float) -> None:
        """Sleep, but not past a SIGTERM."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.asked:
            time.sleep(min(left, 0.1))

    def _alive(self) -> bool:
        try:
            return self.process is not None and self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _ended(self) -> bool:
        try:
            ends = [event for event in self.events() if event.kind in ("launched", "ended")]
        except Unreachable:
            return False
        return bool(ends) and ends[-1].kind == "ended" and ends[-1].time >= self.since


def main(arguments: Sequence[str] | None = None) -> int:
    from orchestrator.adapters import open_store
    from orchestrator.adapters.tracking import open_tracker

    parser = argparse.ArgumentParser(prog="python -m orchestrator.projection", description="Bring MLflow up to the ledger.")
    parser.add_argument("--store", required=True, metavar="URL", help="object store: a folder, or s3://bucket/prefix")
    parser.add_argument("--pipeline", required=True, metavar="NAME")
    parser.add_argument("--tracking", required=True, metavar="URI", help="sqlite, or MLflow's URI")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="artifacts of a local database; default: mlartifacts beside it")
    parser.add_argument("--follow-pid", type=int, metavar="PID", help="go on until this process is gone or its launch has ended")
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="seconds between two looks while following")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        tracker = open_tracker(options.tracking, Path(os.environ.get("OSCTL_HOME", ".osctl")), options.artifacts)
        if tracker is None:
            raise UsageError("projection: tracking is none, there is nothing to bring up to date. Give --tracking sqlite or a URI")
        projector = Projector(Ledger(open_store(options.store), options.pipeline), tracker, named_prices)
        if options.follow_pid is None:
            facts = projector.bring()
            if facts is not None and is_undecided(facts):
                fact = "nobody drives it, and an attempt was heard a moment ago, so MLflow shows it as RUNNING"
                log.warning("%s: %s; run `osctl sync` again in %.0f s", facts.pipeline.name, fact, SILENT_S)
            return 0
        return _follow(projector, options.follow_pid, options.interval)
    except OsctlError as error:
        log.error("%s", error)
        return error.exit_code


def _follow(projector: Projector, pid: int, interval_s: float) -> int:
    launch = Launch(pid, projector.reader.events)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the launcher, which ends first
    signal.signal(signal.SIGTERM, launch.ask)
    os.nice(10)  # training comes first
    threading.Thread(target=_leave_in_time, args=(launch, projector.tracker), daemon=True).start()
    follower = Follower(projector.bring, launch.over, launch.rest, interval_s, lambda: launch.asked)
    return 0 if follower.follow() else Unreachable.exit_code


def _leave_in_time(launch: Launch, tracker: Tracker) -> None:
    """End this process where a server that does not answer keeps it, and with it the launcher. It may be stopped anywhere."""
    owed_s, answers, before = 0.0, 0, time.monotonic()
    while True:
        time.sleep(0.1)
        passed_s, before = time.monotonic() - before, time.monotonic()
        if not launch.asked or tracker.answers != answers:
            owed_s, answers = 0.0, tracker.answers
        elif tracker.waits:
            owed_s += passed_s
        if owed_s > Follower.LAST_ANSWER_S:
            log.warning("MLflow %s: does not answer at the end of the launch; `osctl sync` brings it up to date", tracker.url)
            os._exit(Unreachable.exit_code)


if __name__ == "__main__":
    raise SystemExit(main())
