"""What each run in MLflow should show: pipeline > stage > attempt, and pipeline > preparation. Pure.

Owns the names, contents and links of runs and model versions. Refuses to know what MLflow shows now, and to change it (`sync`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opensora.config import StageConfig
from orchestrator.accounting.cost import AttemptBill, Bill, account, merge
from orchestrator.labels import Tag
from orchestrator.ledger.evaluations import readings
from orchestrator.ledger.keys import Keys
from orchestrator.ledger.record import sha256
from orchestrator.ledger.records import ClipsUsed, Committed
from orchestrator.ports import LoggedCheckpoint, Point, RunStatus
from orchestrator.prepare.watching import State
from orchestrator.recipe.pipeline import Published
from orchestrator.tracking import descriptions, preparations
from orchestrator.tracking.curves import attempt_curve, stage_curve
from orchestrator.tracking.facts import AttemptFacts, Facts, StageFacts
from orchestrator.tracking.mlflow_text import alias_of, artifact_name, cut, flatten, metric_name, source_uri
from orchestrator.tracking.statuses import attempt_status, newest_record, pipeline_status, stage_status

PICTURES = (".png", ".mp4")
"""Endings of samples that MLflow shows."""

_SOURCE_TYPES = {"local": "LOCAL", "kubernetes": "JOB"}
"""MLflow's words for where a run was made."""

Curve = Callable[[int], Iterator[tuple[int, list[Point]]]]
"""Gives the groups of points after a cursor, each with its own cursor, ascending."""


@dataclass(frozen=True)
class RunSpec:
    """One run as MLflow should show it. Times are Unix seconds."""

    key: str
    """Our own key of the run (`osctl/run_key`)."""
    parent: str | None
    """Key of the run above it."""
    name: str
    start: float
    status: RunStatus
    ended: float | None
    tags: Mapping[str, str]
    readings: Mapping[str, float]
    """Metrics without steps, e.g. dollars."""
    as_of: float
    """Time of the newest record that the readings come from."""
    params: Mapping[str, str] = field(default_factory=dict)
    curve: Curve = lambda cursor: iter(())
    dataset: tuple[str, str, str] | None = None
    """(name, digest, source)."""
    samples: Mapping[str, str] = field(default_factory=dict)
    """Keys of samples in the store, by file name."""


@dataclass(frozen=True)
class VersionSpec:
    """One version of the registered model as MLflow should have it."""

    run: str
    """Key of the stage's run."""
    source: str
    alias: str | None
    tags: Mapping[str, str]
    checkpoint: LoggedCheckpoint
    """The same as a model of the run, with its readings and its data set."""
    evaluated: str = ""
    """Digest of the evaluation that the readings are of. Empty means that they are the attempt's own."""


def run_specs(facts: Facts) -> list[RunSpec]:
    """Every run, parents before their children. Reads nothing but journals, and these only when a curve is read."""
    bills = [account([attempt.time for attempt in stage.attempts], stage.evaluations) for stage in facts.stages]
    whole = merge(bills)
    categories = [category for category, seconds in whole.seconds.items() if seconds]
    runs = [_pipeline_run(facts, whole, categories)]
    if facts.preparation is not None:
        runs.append(_preparation_run(facts, facts.preparation))
    for stage, bill in zip(facts.stages, bills, strict=True):
        runs.append(_stage_run(facts, stage, bill, categories))
        runs += [_attempt_run(facts, stage, *pair, categories) for pair in zip(stage.attempts, bill.attempts, strict=True)]
    return runs


def version_specs(facts: Facts) -> list[VersionSpec]:
    """One version for each committed stage, in the order in which they were committed; the current one has the alias."""
    found = [(stage, stage.committed) for stage in facts.stages if stage.committed is not None]
    return [_version(facts, stage, committed) for stage, committed in sorted(found, key=lambda pair: pair[1].time)]


def _version(facts: Facts, stage: StageFacts, committed: Committed) -> VersionSpec:
    tags = {
        Tag.RUN_KEY: stage_key(facts, stage),
        Tag.LEDGER: facts.ledger,
        Tag.STAGE: stage.name,
        Tag.STEP: str(committed.step),
        Tag.WEIGHTS_DIGEST: committed.weights_digest,
        Tag.MANIFEST_DIGEST: committed.manifest_digest,
    }
    read = stage.evaluations[-1].ended if stage.evaluations else committed.time
    points = [Point(f"evaluation/{metric_name(name)}", value, read) for name, value in _evaluation(stage).items()]
    name, digest, _ = _dataset(stage.attempts[-1].intent.config, stage.data)
    return VersionSpec(
        run=stage_key(facts, stage),
        source=source_uri(facts.store, _folder(committed)),
        alias=alias_of(stage.name) if stage.current else None,
        tags=tags,
        checkpoint=LoggedCheckpoint(f"{stage.name}-step-{committed.step}", tags, committed.step, points, (name, digest)),
        evaluated=stage.evaluations[-1].question if stage.evaluations else "",
    )


def stage_key(facts: Facts, stage: StageFacts) -> str:
    """Key of a stage's run."""
    return f"{facts.pipeline.name}/{stage.name}@{stage.inputs_digest}"


# --- The four kinds of runs -----------------------------------------------------------------------------------------------------------


def _pipeline_run(facts: Facts, bill: Bill, categories: Sequence[str]) -> RunSpec:
    status, ended = pipeline_status(facts)
    published = [stage.published for stage in facts.stages if stage.current and stage.published]
    return RunSpec(
        key=facts.pipeline.name,
        parent=None,
        name=facts.pipeline.name,
        start=facts.created,
        status=status,
        ended=ended,
        tags=_common_tags(facts, "pipeline")
        | {Tag.STORE: facts.store, Tag.BACKEND: facts.pipeline.backend, Tag.NOTE: descriptions.of_pipeline(facts)},
        readings=_with_clips(_bill_readings(bill, categories), facts) | _reference_readings(bill, published),
        as_of=newest_record(facts),
    )


def _with_clips(readings: dict[str, float], facts: Facts) -> dict[str, float]:
    """One bill: what the clips cost is in the pipeline's."""
    if facts.preparation is None:
        return readings
    made = preparations.readings(facts.preparation)
    return readings | {name: readings[name] + made[name] for name in ("usd", "gpu_hours", "device_hours")}


def _preparation_run(facts: Facts, state: State) -> RunSpec:
    status, ended = preparations.status(state)
    first = state.attempts[0].intent
    return RunSpec(
        key=preparations.key_of(facts.pipeline.name, state.name),
        parent=facts.pipeline.name,
        name=f"prepare {state.name}",
        start=first.created if first is not None else facts.created,
        status=status,
        ended=ended,
        tags=_common_tags(facts, "preparation") | preparations.tags(state),
        readings=preparations.readings(state),
        as_of=preparations.newest(state),
        params=preparations.params(state),
        dataset=preparations.dataset(state),
    )


def _stage_run(facts: Facts, stage: StageFacts, bill: Bill, categories: Sequence[str]) -> RunSpec:
    intent = stage.attempts[-1].intent
    status, ended = stage_status(facts, stage)
    return RunSpec(
        key=stage_key(facts, stage),
        parent=facts.pipeline.name,
        name=intent.stage,
        start=stage.attempts[0].intent.created,
        status=status,
        ended=ended,
        tags=_stage_tags(facts, stage),
        readings=_bill_readings(bill, categories)
        | _reference_readings(bill, [stage.published] if stage.published else [])
        | (_data_readings(stage.used) if stage.used is not None else {})
        | {f"evaluation/{metric_name(name)}": value for name, value in _evaluation(stage).items()},
        as_of=newest_record(facts),
        params=flatten(intent.config) | {"devices": str(intent.nodes * intent.devices_per_node)},
        curve=lambda cursor: stage_curve(stage.attempts, cursor),
        dataset=_dataset(intent.config, stage.data),
        samples={artifact_name(_file(key)): key for key in _samples(facts, stage) if key.endswith(PICTURES)},
    )


def _attempt_run(facts: Facts, stage: StageFacts, attempt: AttemptFacts, bill: AttemptBill, categories: Sequence[str]) -> RunSpec:
    intent, outcome = attempt.intent, attempt.outcome
    status, ended = attempt_status(facts, stage, attempt)
    tags = {Tag.STAGE: intent.stage, Tag.INPUTS: intent.inputs_digest, Tag.ATTEMPT: str(intent.attempt), Tag.CODE: intent.code}
    tags |= _commit(intent.code)
    if outcome is not None:
        tags |= {Tag.CLASS: outcome.class_, Tag.REASON: cut(outcome.reason)}
    elif attempt.trouble:
        tags |= {Tag.REASON: cut(attempt.trouble)}
    if attempt.placement is not None and attempt.placement.pool is not None:
        tags |= {Tag.POOL: attempt.placement.pool}
    if attempt.placement is not None and attempt.placement.nodes_asked != intent.nodes:
        tags |= {Tag.NODES_ASKED: str(attempt.placement.nodes_asked)}
    return RunSpec(
        key=intent.run_key,
        parent=stage_key(facts, stage),
        name=f"{intent.stage} a{intent.attempt}",
        start=intent.created,
        status=status,
        ended=ended,
        tags=_common_tags(facts, "attempt") | tags,
        readings=_bill_readings(bill, categories),
        as_of=newest_record(facts),
        params={
            "nodes": str(intent.nodes),
            "devices_per_node": str(intent.devices_per_node),
            "device": intent.device,
            "resumed_from": str(intent.resume.step if intent.resume else 0),
        },
        curve=lambda cursor: attempt_curve(attempt.pieces(cursor)),
    )


# --- Their parts -----------------------------------------------------------------------------------------------------------------------


def _common_tags(facts: Facts, kind: str) -> dict[str, str]:
    source = {Tag.SOURCE_NAME: f"osctl launch -f {facts.pipeline.name}", Tag.SOURCE_TYPE: _SOURCE_TYPES[facts.pipeline.backend]}
    return {Tag.KIND: kind, Tag.PIPELINE: facts.pipeline.name, Tag.LEDGER: facts.ledger, **source}


def _commit(code: str) -> dict[str, str]:
    """Of a version such as `0.3.0+g1234567890ab`: the git commit that an agent ran from."""
    _, found, commit = code.partition("+g")
    return {Tag.SOURCE_COMMIT: commit} if found else {}


def _stage_tags(facts: Facts, stage: StageFacts) -> dict[str, str]:
    committed, intent = stage.committed, stage.attempts[-1].intent
    tags = _common_tags(facts, "stage") | {
        Tag.STAGE: intent.stage,
        Tag.INPUTS: stage.inputs_digest,
        Tag.CURRENT: str(stage.current).lower(),
        Tag.ATTEMPTS: str(len(stage.attempts)),
        Tag.CONFIG_DIGEST: intent.config_digest,
        Tag.CODE: intent.code,
        Tag.NOTE: descriptions.of_stage(facts, stage),
        **_commit(intent.code),
    }
    pools = dict.fromkeys(one.placement.pool for one in stage.attempts if one.placement is not None and one.placement.pool is not None)
    if pools:
        tags |= {Tag.POOL: ", ".join(pools)}
    if facts.preparation is not None and preparations.made_by(intent.config, facts.preparation):
        tags |= {Tag.PREPARATION: preparations.key_of(facts.pipeline.name, facts.preparation.name)}
    if intent.parent is not None:
        tags |= {Tag.PARENT_STAGE: intent.parent.stage, Tag.PARENT_MANIFEST: intent.parent.manifest_digest}
    if committed is not None:
        tags |= {
            Tag.ATTEMPT: str(committed.attempt),
            Tag.WEIGHTS_DIGEST: committed.weights_digest,
            Tag.MANIFEST_DIGEST: committed.manifest_digest,
            Tag.CHECKPOINT: f"{facts.store.rstrip('/')}/{_folder(committed)}",
        }
    if stage.used is not None and (not_used := stage.used.sentences()):
        tags[Tag.NOT_USED] = cut("; ".join(not_used))
    return tags


def _evaluation(stage: StageFacts) -> Mapping[str, float]:
    """Evaluation of the result, or of the last attempt if there is no result yet."""
    if stage.committed is not None:
        return readings(stage.committed, stage.evaluations)
    outcome = stage.attempts[-1].outcome
    return outcome.evaluation if outcome is not None else {}


def _samples(facts: Facts, stage: StageFacts) -> Iterator[str]:
    """Keys of its samples, those of the newest evaluation last: of the same name, they are shown."""
    for attempt in stage.attempts:
        yield from attempt.samples
    for evaluation in stage.evaluations[-1:]:
        keys = Keys(facts.pipeline.name)
        yield from (keys.evaluation_sample(stage.name, stage.inputs_digest, evaluation.question, name) for name in evaluation.samples)


def _bill_readings(bill: Bill | AttemptBill, categories: Sequence[str]) -> dict[str, float]:
    """`categories` are those that the pipeline spent any time on. A run that spent none on one of them shows 0 for it."""
    readings = {"usd": float(bill.usd), "gpu_hours": bill.gpu_hours, "device_hours": bill.device_hours}
    if bill.goodput is not None:
        readings["goodput"] = bill.goodput
    return readings | {f"seconds/{category}": bill.seconds[category] for category in categories}


def _reference_readings(bill: Bill, published: Sequence[Published]) -> dict[str, float]:
    """The bill beside the published run. A ratio needs GPUs on both sides: the 0 GPU-hours of a CPU are not a saving."""
    gpu_hours, usd = sum(one.gpu_hours for one in published), sum(one.usd for one in published)
    readings = {"usd_reference": usd, "gpu_hours_reference": gpu_hours} if gpu_hours or usd else {}
    return readings | ({"ratio_vs_reference": bill.gpu_hours / gpu_hours} if gpu_hours and bill.gpu_hours else {})


def _data_readings(used: ClipsUsed) -> dict[str, float]:
    counted = {"data/captions_cut": float(used.captions_cut)} if used.captions_cut is not None else {}
    return {"data/clips": float(used.clips), "data/clips_left_out": float(used.clips - used.used)} | counted


def _dataset(config: StageConfig, digest: str | None) -> tuple[str, str, str]:
    """(name, digest, source). The digest is the data set's own if it was recorded, otherwise that of the configuration."""
    content = config.data.model_dump_json()
    return config.data.source.kind, (digest or sha256(content.encode()))[:32], content


def _folder(committed: Committed) -> str:
    """Key of the folder in which the committed checkpoint lies."""
    return committed.manifest.rpartition("/")[0]


def _file(key: str) -> str:
    return key.rpartition("/")[2]
