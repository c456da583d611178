"""Bring MLflow up to date with the ledger. It may run any number of times, and nothing is ever sent twice.

Nothing waits for it: the ledger has everything, and what MLflow missed is sent the next time.

Owns the comparison of what MLflow shows with what it should show (`runs`), and what is sent. Refuses to write to the ledger, and to read
anything from MLflow but what it shows already.

Why nothing is doubled, although MLflow has no idempotency keys:

- A run has our key (`osctl/run_key`) and the ledger's identity, and is searched for before it is made. If there are duplicates (two
  processes synced at once, or the answer of a create was lost), the first id stays and the others are deleted; every process finds the same
  one first.
- A curve is sent in order, and the tag `osctl/cursor` says how far it was sent. The tag is written after the points, in the same call.
  After a crash in between at most one call is repeated, with exactly the same points: key, value, time and step come from the ledger, and
  MLflow stores such a point once (they are the primary key of its table).
- A reading (dollars, hours) is sent only if it differs from what MLflow shows.
- Parameters, tags, data sets, samples, model versions and aliases are compared before they are written.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import Refused
from orchestrator.labels import Tag
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Point, TrackedRun, Tracker
from orchestrator.recipe.prices import Prices, load_prices
from orchestrator.tracking.facts import Facts, LedgerReader
from orchestrator.tracking.runs import RunSpec, VersionSpec, run_specs, version_specs

log = logging.getLogger(__name__)

POINTS_A_CALL = 900
"""Enough to make the call's own cost small (a call with 900 points takes 0.1 s on sqlite), within MLflow's 1000 a call."""


@dataclass
class Changes:
    """How much one update changed."""

    runs: int = 0
    points: int = 0
    samples: int = 0
    versions: int = 0


class Sync:
    """One ledger, one tracker. Any number of processes may `update` at any time, and each may be stopped anywhere."""

    def __init__(
        self, ledger: Ledger, tracker: Tracker, prices: Callable[[], Prices] = load_prices, clock: Callable[[], float] = time.time
    ):
        """`prices` gives the price list for attempts without a price in the ledger; see `orchestrator.accounting.history`. `clock` gives
        Unix time."""
        self.reader, self.tracker, self._clock = LedgerReader(ledger, prices), tracker, clock

    def update(self, lag: float = 0.0) -> Facts | None:
        """Bring MLflow up to date. Returns what the ledger says. None means there is nothing to show.

        Args:
            lag: how far the readings of a live run may lag behind, as a share of its age. Without a lag each update of a live bill would
                add a row to every reading: 100 000 a day for one stage. With 0.02 it is some hundreds.

        Raises:
            Unreachable: the store or MLflow.
        """
        driven, now = self._driven(), self._clock()  # read before the records, so that an end in between is in the records
        facts = self.reader.read()
        if facts is None:
            return None
        facts = replace(facts, driven=driven, now=now)
        changes = Changes()
        runs = self._update_runs(facts, lag, changes)
        if changes.runs:
            self._known_runs(facts)  # deletes duplicates of runs that were just made
        self._update_versions(facts, {key: run.id for key, run in runs.items()}, changes)
        self._update_checkpoints(facts, runs)
        if changes != Changes():
            log.debug("synced %s: %s", facts.pipeline.name, changes)
        return facts

    def _driven(self) -> bool:
        try:
            return self.reader.ledger.holder(self._clock()) is not None
        except Refused:  # nobody holds a lease that cannot be read
            return False

    # --- Runs ----------------------------------------------------------------------------------------------------------------------

    def _known_runs(self, facts: Facts) -> dict[str, TrackedRun]:
        """Runs of this ledger by key. Deletes duplicates: the first id stays, and every process makes the same choice."""
        known: dict[str, TrackedRun] = {}
        for run in sorted(self.tracker.runs(facts.pipeline.experiment, {Tag.LEDGER: facts.ledger}), key=lambda run: run.id):
            key = run.tags.get(Tag.RUN_KEY, "")
            if key in known:
                self.tracker.delete(run.id)
            else:
                known[key] = run
        return known

    def _update_runs(self, facts: Facts, lag: float, changes: Changes) -> dict[str, TrackedRun]:
        """Returns each run by our key, as MLflow showed it before."""
        known = self._known_runs(facts)
        there: dict[str, TrackedRun] = {}
        for spec in run_specs(facts):
            tags = dict(spec.tags) | {Tag.RUN_KEY: spec.key} | ({Tag.PARENT_RUN: there[spec.parent].id} if spec.parent else {})
            shown = known.get(spec.key)
            if shown is None:
                made = self.tracker.create(facts.pipeline.experiment, spec.name, tags | _made_by(), spec.start)
                shown = TrackedRun(made, "RUNNING", tags, {}, {})
                changes.runs += 1
            there[spec.key] = shown
            self._update_run(spec, shown, tags, lag, changes)
        return there

    def _update_run(self, spec: RunSpec, shown: TrackedRun, tags: Mapping[str, str], lag: float, changes: Changes) -> None:
        self._send_curve(spec, shown, changes)
        params = {name: value for name, value in spec.params.items() if name not in shown.params}
        changed = {name: value for name, value in tags.items() if shown.tags.get(name) != value}
        readings, as_of = _new_readings(spec, shown, lag)
        if readings:
            changed[Tag.AS_OF] = str(as_of)
        if params or changed:
            self.tracker.log(shown.id, points=readings, params=params, tags=changed)
        if spec.dataset is not None and spec.dataset[:2] not in shown.datasets:
            self.tracker.dataset(shown.id, *spec.dataset)
        self._send_samples(spec, shown, changes)
        # The status comes last, so that a run that is over has everything.
        if (spec.status, _milliseconds(spec.ended)) != (shown.status, _milliseconds(shown.ended)):
            self.tracker.status(shown.id, spec.status, spec.ended)

    def _send_curve(self, spec: RunSpec, shown: TrackedRun, changes: Changes) -> None:
        batch: list[Point] = []
        cursor = -1
        for cursor, group in spec.curve(int(shown.tags.get(Tag.CURSOR, -1))):
            batch += group
            changes.points += len(group)
            if len(batch) >= POINTS_A_CALL:
                self.tracker.log(shown.id, points=batch, tags={Tag.CURSOR: str(cursor)})
                batch = []
        if batch:
            self.tracker.log(shown.id, points=batch, tags={Tag.CURSOR: str(cursor)})

    def _send_samples(self, spec: RunSpec, shown: TrackedRun, changes: Changes) -> None:
        digest = hashlib.sha256(json.dumps(sorted(spec.samples.items())).encode()).hexdigest()[:16]
        if not spec.samples or shown.tags.get(Tag.SAMPLES) == digest:
            return
        store = self.reader.ledger.store
        there = self.tracker.artifacts(shown.id, "samples")
        for name, key in spec.samples.items():
            if there.get(name) == store.size(key):
                continue
            with tempfile.TemporaryDirectory() as folder:
                store.download(key, Path(folder) / name)
                self.tracker.attach(shown.id, "samples", Path(folder) / name)
            changes.samples += 1
        self.tracker.log(shown.id, tags={Tag.SAMPLES: digest})

    # --- Model versions ------------------------------------------------------------------------------------------------------------

    def _update_versions(self, facts: Facts, ids: Mapping[str, str], changes: Changes) -> None:
        """`ids`: MLflow's id of each run by our key."""
        specs = version_specs(facts)
        if not specs:
            return
        model = facts.pipeline.name
        ours, aliases = self._known_versions(facts)
        for spec in specs:
            number = ours.get(spec.run)
            if number is None:
                number = ours[spec.run] = self.tracker.register(model, spec.source, ids[spec.run], spec.tags)
                changes.versions += 1
            if spec.alias is not None and _takes_alias(spec, number, aliases, ours):
                self.tracker.alias(model, spec.alias, number)

    def _update_checkpoints(self, facts: Facts, runs: Mapping[str, TrackedRun]) -> None:
        """Each committed checkpoint as a model of its run. The run's tag says that it is whole, so it is looked for once."""
        for spec in version_specs(facts):
            run = runs[spec.run]
            if Tag.LOGGED_MODEL in run.tags and run.tags.get(Tag.EVALUATED, "") == spec.evaluated:
                continue
            unique = {Tag.RUN_KEY: spec.run, Tag.LEDGER: facts.ledger}
            made = self.tracker.log_checkpoint(facts.pipeline.experiment, run.id, spec.checkpoint, unique)
            self.tracker.log(run.id, tags={Tag.LOGGED_MODEL: made or "none", **({Tag.EVALUATED: spec.evaluated} if spec.evaluated else {})})

    def _known_versions(self, facts: Facts) -> tuple[dict[str, int], dict[str, int]]:
        """Numbers of this ledger's versions by our key, and of any ledger's by alias. Deletes versions that were registered twice."""
        model = facts.pipeline.name
        there, aliases = self.tracker.models(model)
        ours: dict[str, int] = {}
        for version in there:
            key = version.tags.get(Tag.RUN_KEY, "")
            if version.tags.get(Tag.LEDGER) != facts.ledger:
                continue
            if key in ours:
                self.tracker.unregister(model, version.number)
            else:
                ours[key] = version.number
        return ours, aliases


def _made_by() -> dict[str, str]:
    """Who makes a run. Not compared afterwards: whoever syncs later has not made it. Empty for a user without a name, as in a pod."""
    try:
        return {Tag.USER: getpass.getuser()}
    except (KeyError, OSError):
        return {}


def _takes_alias(spec: VersionSpec, number: int, aliases: Mapping[str, int], ours: Mapping[str, int]) -> bool:
    """Whether the alias must move to this version. A later version of another ledger keeps it: if two ledgers have one name, the newest
    result has the alias."""
    holder = aliases.get(spec.alias or "")
    return holder != number and (holder is None or holder < number or holder in ours.values())


def _new_readings(spec: RunSpec, shown: TrackedRun, lag: float) -> tuple[list[Point], int]:
    """The readings that MLflow does not show yet, and their common time in Unix milliseconds.

    MLflow shows the value with the newest time, and for equal times the largest value. So a reading that changed without a newer record (a
    price was corrected) needs a time after the last one.
    """
    before = int(shown.tags.get(Tag.AS_OF, -1))
    as_of = max(round(spec.as_of * 1000), before + 1)
    wanted = dict(spec.readings) | {name: 0.0 for name in shown.metrics if name.startswith("seconds/") and name not in spec.readings}
    changed = [name for name, value in wanted.items() if not _same(shown.metrics.get(name), value)]
    if spec.ended is None and before >= 0 and as_of - before < lag * (as_of - spec.start * 1000):
        return [], before
    return [Point(name, wanted[name], as_of / 1000) for name in changed], as_of


def _same(shown: float | None, value: float) -> bool:
    if shown is None:
        return False
    return math.isclose(shown, value, rel_tol=1e-12, abs_tol=1e-12) or (math.isnan(shown) and math.isnan(value))


def _milliseconds(time_s: float | None) -> int | None:
    return None if time_s is None else round(time_s * 1000)
