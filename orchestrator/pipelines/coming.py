"""The attempt that comes next of each stage, as a driver would intend it, and the one that was launched last: what `render`, `diff` and the
checks show. Only reads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.ledger.records import Committed, Intent
    from orchestrator.ledger.store import Ledger
    from orchestrator.recipe.cluster_profile import ClusterProfile
    from orchestrator.recipe.pipeline import Pipeline, Stage

UNKNOWN_INPUTS = "0" * 12
"""Stands for the digest of inputs that are not known yet, since a parent is not committed."""


@dataclass(frozen=True)
class Coming:
    """The next attempt of a stage."""

    intent: Intent
    """As a driver would write it, but for what is verified only then: parent and checkpoint."""
    said: str
    """Which attempt, and what it starts from, for people."""


def coming(pipeline: Pipeline, ledger: Ledger | None) -> Mapping[str, Coming | str]:
    """By stage: its next attempt, or why there is none. `ledger` None: nothing has run. Raises Refused, Unreachable."""
    from orchestrator.inputs.standing import find, name_of

    found: dict[str, Coming | str] = {}
    results: dict[str, Committed] = {}
    for stage in pipeline.stages:
        parent = stage.spec.parent
        if parent is not None and parent not in results:
            said = f"{stage.name}: attempt 1, once {parent} is committed; {UNKNOWN_INPUTS} stands for its inputs, and its name will differ"
            found[stage.name] = Coming(_intent(pipeline, stage, UNKNOWN_INPUTS, 1), said)
            continue
        result = results[parent] if parent else None
        inputs_digest = find(ledger, stage, result) if ledger else name_of(stage, result)
        committed = ledger.committed(stage.name, inputs_digest) if ledger else None
        if committed is not None:
            results[stage.name] = committed
            found[stage.name] = f"{stage.name}: is committed, launch sends nothing for it"
            continue
        attempts = ledger.attempts(stage.name, inputs_digest) if ledger else []
        checkpoints = ledger.checkpoints(stage.name, inputs_digest) if ledger else []
        number = max(attempts, default=0) + 1
        said = f"{stage.name}: attempt {number}"
        if parent is not None:
            said += f", from {parent}@{results[parent].inputs_digest} at step {results[parent].step}"
        if checkpoints:
            said += f", resumes at step {checkpoints[-1][1].step}"
        if ledger and attempts and ledger.outcome(stage.name, inputs_digest, attempts[-1]) is None:
            said += f"; attempt {attempts[-1]} is still open, and launch goes on with it"
        found[stage.name] = Coming(_intent(pipeline, stage, inputs_digest, number), said)
    return found


def next_revision(pipeline: Pipeline, ledger: Ledger) -> int:
    """The number that a launch of this pipeline gets. Raises Refused, Unreachable."""
    number, latest = max(ledger.revisions(), key=lambda item: item[0], default=(0, None))
    return number if latest is not None and latest.pipeline == pipeline.model_dump(mode="json") else number + 1


def open_attempt(stage: Stage, ledger: Ledger) -> Intent | None:
    """The newest attempt of a stage, whatever its inputs, that has no outcome yet."""
    for inputs_digest in ledger.inputs_of(stage.name):
        for number in reversed(ledger.attempts(stage.name, inputs_digest)):
            if (
                ledger.outcome(stage.name, inputs_digest, number) is None
                and (intent := ledger.intent(stage.name, inputs_digest, number)) is not None
            ):
                return intent
    return None


def last_launch(ledger: Ledger) -> dict[str, Intent]:
    """By stage, its attempt as the last launch meant it, whether that made one or not. Raises Refused, Unreachable."""
    from orchestrator.inputs.standing import results
    from orchestrator.recipe import launched

    pipeline = launched.last(ledger).pipeline
    found: dict[str, Intent] = {}
    if pipeline is None:
        return found
    known = results(pipeline, ledger)
    for stage in pipeline.stages:
        inputs_digest = known[stage.name][0] if stage.name in known else UNKNOWN_INPUTS
        found[stage.name] = _intent(pipeline, stage, inputs_digest, max(ledger.attempts(stage.name, inputs_digest), default=1))
    return found


def _intent(pipeline: Pipeline, stage: Stage, inputs_digest: str, number: int) -> Intent:
    from orchestrator.ledger.keys import run_key
    from orchestrator.ledger.records import Intent

    resources = stage.spec.resources
    return Intent(
        run_key=run_key(pipeline.name, stage.name, inputs_digest, number),
        pipeline=pipeline.name,
        stage=stage.name,
        inputs_digest=inputs_digest,
        attempt=number,
        epoch=0,
        created=time.time(),
        config=stage.config,
        config_digest=stage.config.digest(),
        nodes=resources.nodes,
        devices_per_node=resources.devices_per_node,
        device=pipeline.device_of(stage, next(iter(pipeline.pools_of(stage)), None)),
        trainer=pipeline.trainer,
        hang_timeout_s=stage.spec.hang_timeout_s,
        flush_s=pipeline.flush_s,
        parent=None,
        resume=None,
        code="",
    )


def profile_of_attempt(ledger: Ledger, pipeline: Pipeline, intent: Intent) -> ClusterProfile | None:
    """The cluster profile of an attempt that is, or would be, made: that of its pool; for one that is not in the ledger, of the first pool.

    None: the pipeline has no cluster. Raises Refused where the record of its pool cannot be read, Unreachable.
    """
    if pipeline.cluster is None:
        return None
    placement = ledger.placement(intent.stage, intent.inputs_digest, intent.attempt)
    names = [pool.name for pool in pipeline.cluster.pools]
    if placement is not None and (placement.pool is None or placement.pool in names):
        return pipeline.cluster.in_pool(placement.pool)
    return first_profile(pipeline, intent.stage)


def first_profile(pipeline: Pipeline, stage: str) -> ClusterProfile | None:
    """The cluster profile of the pool in which a stage's attempts are made first. None: the pipeline has no cluster."""
    if pipeline.cluster is None:
        return None
    return pipeline.cluster.in_pool(next(iter(pipeline.pools_of(pipeline.stage(stage))), None))


def first_objects(pipeline: Pipeline, stage: Stage, profile: ClusterProfile, store_url: str, operator: str) -> list[dict[str, Any]]:
    """All objects of a stage's first attempt, as `osctl render --operator` prints them."""
    from orchestrator.kube.operator import BY_NAME

    first = coming(pipeline, None)[stage.name]
    assert isinstance(first, Coming), f"{stage.name}: nothing is committed where nothing has run"
    return BY_NAME[operator].objects(first.intent, profile, store_url)


def first_job(pipeline: Pipeline, stage: Stage, profile: ClusterProfile, store_url: str) -> dict[str, Any]:
    """The PyTorchJob of a stage's first attempt, as `osctl render` prints it."""
    from orchestrator.kube import manifest

    first = coming(pipeline, None)[stage.name]
    assert isinstance(first, Coming), f"{stage.name}: nothing is committed where nothing has run"
    return manifest.pytorch_job(first.intent, profile, store_url)
