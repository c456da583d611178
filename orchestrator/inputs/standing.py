"""Which result a stage's configuration means in a ledger: the `<inputs>` that it has there, and what a change of it does.

Owns the way from a stage to its folder `stages/<stage>@<inputs>`: by the digest of its identity (`opensora.identity`), by a person's
decision to keep an earlier result, or, for work of releases up to 0.1.0, by the configuration in its intent. Owns also what is said of a
stage that begins anew, and which changes are refused at a launch until a person has decided.
Refuses to write anything, and to guess: what an older release did not record counts as equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensora import identity
from opensora.identity import Contents, Difference
from orchestrator.ledger.records import Committed, Intent, Terms
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.pipeline import Pipeline, Stage

SHOWN = 3
"""Changes that a sentence names; `osctl diff` lists all."""


@dataclass(frozen=True)
class Earlier:
    """What was done for a stage under other inputs."""

    inputs_digest: str
    step: int
    """The last step that can be used; 0: there is none."""
    committed: bool
    changes: tuple[Difference, ...]
    """What changed from it to the stage as it is configured now."""
    since: float = 0.0
    """Unix time at which it was begun."""

    def changed(self, path: str) -> Difference | None:
        return next((change for change in self.changes if change.path == path), None)


@dataclass(frozen=True)
class Standing:
    """Where a stage stands in a ledger."""

    stage: Stage
    inputs_digest: str
    begun: bool
    """Whether anything lies under these inputs."""
    earlier: Earlier | None
    """The nearest work under other inputs; none: there is none."""
    decided: bool = False
    """Whether a person has decided that it is trained anew."""
    since: float | None = None
    """Unix time at which the work under these inputs was begun; none: it was not."""

    @property
    def anew(self) -> str:
        """Why the stage begins, or began, at step 1 although there is earlier work; empty where it did not."""
        if self.earlier is None or not self.earlier.step or (self.since is not None and self.since < self.earlier.since):
            return ""
        return f"{self.stage.name} begins anew, because {said(self.earlier.changes)}; {self.earlier.step} steps under earlier inputs"


def find(ledger: Ledger, stage: Stage, parent: Committed | None) -> str:
    """`<inputs>` of a stage, given its parent's result. Raises Unreachable, Refused."""
    wanted = name_of(stage, parent)
    known = ledger.inputs_of(stage.name)
    if wanted in known or not known:
        return wanted
    decision = ledger.decision(stage.name, wanted)
    if decision is not None and decision.action == "keep":
        return decision.earlier
    of_old = [inputs_digest for inputs_digest in known if _means_the_same(ledger, stage, parent, inputs_digest)]
    finished = [inputs_digest for inputs_digest in of_old if _is_finished(ledger, stage.name, inputs_digest)]
    return next(iter(finished or of_old), wanted)


def _is_finished(ledger: Ledger, stage: str, inputs_digest: str) -> bool:
    """A result that cannot be read is one: the stage must not be trained beside it."""
    looked = ledger.lenient()
    return looked.committed(stage, inputs_digest) is not None or ledger.keys.committed(stage, inputs_digest) in looked.remarks


def name_of(stage: Stage, parent: Committed | None) -> str:
    """The digest of a stage's identity."""
    return identity.name(stage.config, stage.devices, parent.digest() if parent else None, stage.contents)


def _means_the_same(ledger: Ledger, stage: Stage, parent: Committed | None, inputs_digest: str) -> bool:
    """Whether inputs are the stage's of now, although an older release named them, which counted every field."""
    found = first(ledger, stage.name, inputs_digest)
    if found is None or found[1] is not None:
        return False
    intent = found[0]
    if (intent.parent.committed_digest if intent.parent else None) != (parent.digest() if parent else None):
        return False
    then = identity.identity(intent.config, intent.nodes * intent.devices_per_node)
    return then == identity.identity(stage.config, stage.devices)


def first(ledger: Ledger, stage: str, inputs_digest: str) -> tuple[Intent, Terms | None] | None:
    """The oldest attempt under some inputs that can be read, and its terms. None: there is none."""
    looked = ledger.lenient()
    for number in ledger.attempts(stage, inputs_digest):
        intent = looked.intent(stage, inputs_digest, number)
        if intent is not None:
            return intent, looked.terms(stage, inputs_digest, number)
    return None


def stand(ledger: Ledger, stage: Stage, parent: Committed | None) -> Standing:
    """Where a stage stands: its inputs, and what else was done for it. Raises Unreachable, Refused."""
    inputs_digest = find(ledger, stage, parent)
    known = ledger.inputs_of(stage.name)
    others = [_earlier(ledger, stage, parent, other) for other in known if other != inputs_digest]
    of_use = [one for one in others if one is not None and one.changes]
    nearest = min(of_use, key=lambda one: (not one.step, len(one.changes)), default=None)
    decision = ledger.decision(stage.name, inputs_digest) if known else None  # decided is only on earlier work
    mine = first(ledger, stage.name, inputs_digest) if inputs_digest in known else None
    since = mine[0].created if mine is not None else None
    return Standing(stage, inputs_digest, inputs_digest in known, nearest, decision is not None and decision.action == "anew", since)


def _earlier(ledger: Ledger, stage: Stage, parent: Committed | None, inputs_digest: str) -> Earlier | None:
    found = first(ledger, stage.name, inputs_digest)
    if found is None:
        return None
    intent, terms = found
    steps = [0, *ledger.published_steps(stage.name, inputs_digest)]
    for number in ledger.attempts(stage.name, inputs_digest):
        report, outcome = ledger.report(stage.name, inputs_digest, number), ledger.outcome(stage.name, inputs_digest, number)
        steps += [one.step or 0 for one in (report, outcome) if one is not None]
    committed = ledger.committed(stage.name, inputs_digest)
    changes = changes_since(intent, terms, stage)
    was, now = (intent.parent.committed_digest if intent.parent else None), (parent.digest() if parent else None)
    if was != now:
        changes.append(Difference(f"the result of {stage.spec.parent or 'its parent'}", was, now, "identity"))
    return Earlier(inputs_digest, max([*steps, committed.step if committed else 0]), committed is not None, tuple(changes), intent.created)


def changes_since(intent: Intent, terms: Terms | None, stage: Stage) -> list[Difference]:
    """How a stage's identity differs from that of an attempt. Contents that one of them has not recorded are not compared."""
    recorded = (terms.contents if terms else Contents()).model_dump()
    both = {kind: digest for kind, digest in recorded.items() if digest is not None and getattr(stage.contents, kind) is not None}
    then = identity.identity(intent.config, intent.nodes * intent.devices_per_node, Contents(**both))
    known_now = Contents(**{kind: getattr(stage.contents, kind) for kind in both})
    now = identity.identity(stage.config, stage.devices, known_now)
    return identity.changes(then, now, identity.flat_defaults())


def goes_on_otherwise(ledger: Ledger, standing: Standing) -> str:
    """How a stage that goes on is computed otherwise than by its last attempt; empty where it is not, or does not go on."""
    stage, numbers = standing.stage, ledger.attempts(standing.stage.name, standing.inputs_digest)
    last = ledger.intent(stage.name, standing.inputs_digest, numbers[-1]) if numbers else None
    if last is None or ledger.committed(stage.name, standing.inputs_digest) is not None:
        return ""
    then = last.nodes * last.devices_per_node
    differences = identity.differences(last.config, stage.config, then, stage.devices)
    changed = [one for one in differences if one.kind == "execution" and one.path != "judging"]  # a driver's choice, and no person's
    if then != stage.devices:
        changed.insert(0, Difference("devices", then, stage.devices, "execution"))
    return f"{stage.name} goes on where it was: {said(changed)}; its numbers stay the same result" if changed else ""


def said(changes: tuple[Difference, ...] | list[Difference]) -> str:
    """`optimizer.lr is 0.01 (was 0.001) and seed is 7 (was 42)`, for people."""
    shown = [f"{one.path} is {_short(one.new)} (was {_short(one.old)})" for one in changes[:SHOWN]]
    more = len(changes) - len(shown)
    return " and ".join(shown) + (f" and {more} more (osctl diff)" if more else "")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return _short(value[0]) if len(value) == 1 else f"[{', '.join(map(_short, value))}]"
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_digest else text if len(text) <= 60 else f"{text[:59]}…"


def to_decide(standing: Standing, rows: Callable[[Difference], str] = lambda _: "", alike: Sequence[str] = ()) -> str:
    """Why a launch of a stage is refused until a person has decided; empty where it is not.

    Work is at stake where a stage was trained with another batch, which a person who takes other devices seldom means, or on other data;
    and where it was stopped on the way and would now begin on clips from elsewhere, as a launch does that forgets its `--data`.

    Args:
        rows: of data that changed, which rows, for people; empty: nobody knows.
        alike: later stages with the same data and a result, which will ask the same.
    """
    earlier, name = standing.earlier, standing.stage.name
    if standing.begun or standing.decided or earlier is None or not earlier.step:
        return ""
    anew = f"osctl launch --anew {name}"
    if batch := earlier.changed("global batch"):
        stage = standing.stage
        fact = f"{name}: its global batch would be {_clips(batch.new)} clips ({stage.devices} devices)"
        keep = _same_batch(stage, batch.old[0])
        return f"{fact}, its {earlier.step} steps were trained with {_clips(batch.old)}. {keep}, or train anew: {anew}"
    if data := earlier.changed("data"):
        keep = " ".join(f"--keep {one}" for one in (name, *alike))
        kept = f"Keep its result as it is: `osctl launch {keep}`. Or train" if earlier.committed else "Put the data back, or train"
        fact = f"{name}: its data changed: it is {_short(data.new)}, its {earlier.step} steps were trained on {_short(data.old)}"
        return f"{fact}{rows(data)}. {kept} anew: {anew}"
    if not earlier.committed and (source := earlier.changed("data.source.kind") or earlier.changed("data.source.path")):
        fact = f"{name}: stopped at step {earlier.step} on other clips: {said((source,))}"
        return f"{fact}. Go on as it was launched: `osctl resume`. Or begin anew: {anew}"
    return ""


def _clips(batch: list[int]) -> str:
    return " / ".join(map(str, batch))


def _same_batch(stage: Stage, wanted: int) -> str:
    """How a person keeps the batch."""
    readers = stage.devices // stage.config.parallel.ranks_per_clip
    per_part = stage.config.buckets[0].batch_size * readers
    if not stage.config.data.buckets and wanted % per_part == 0:
        return f"Keep it with `osctl launch --set {stage.name}.accumulate={wanted // per_part}`"
    if not stage.config.data.buckets and wanted % readers == 0:
        return f"Keep it with `osctl launch --set {stage.name}.batch_size={wanted // readers} --set {stage.name}.accumulate=1`"
    return "Keep it by batch_size and accumulate"


def results(pipeline: Pipeline, ledger: Ledger) -> Mapping[str, tuple[str, Committed | None]]:
    """`<inputs>` of each stage that is committed or could be started now, with its result where there is one."""
    found: dict[str, tuple[str, Committed | None]] = {}
    for stage in pipeline.stages:
        parent = found.get(stage.spec.parent) if stage.spec.parent else None
        if stage.spec.parent is not None and (parent is None or parent[1] is None):
            continue
        inputs_digest = find(ledger, stage, parent[1] if parent else None)
        found[stage.name] = inputs_digest, ledger.committed(stage.name, inputs_digest)
    return found
