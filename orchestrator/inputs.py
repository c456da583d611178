"""Which result a stage's configuration means in a ledger: the `<inputs>` that it has there, and what a change of it does.

Owns the way from a stage to its folder `stages/<stage>@<inputs>`: by the digest of its identity (`opensora.identity`), by a person's
decision to keep an earlier result, or, for work of releases up to 0.1.0, by the configuration in its intent. Owns also what is said of a
stage that begins anew, and which changes are refused at a launch until a person has decided.
Refuses to write anything, and to guess: what an older release did not record counts as equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora import identity
from opensora.identity import Contents, Difference
from orchestrator.config import Pipeline, Stage
from orchestrator.ledger import Ledger
from orchestrator.records import Committed, Intent, Terms

SHOWN = 3
"""Changes that a sentence names; `osctl diff` lists all."""


@dataclass(frozen=True)
class Earlier:
    """What was done for a stage under other inputs."""

    inputs: str
    step: int
    """The furthest that it came to; 0: nothing was trained that could be used."""
    committed: bool
    changes: tuple[Difference, ...]
    """From it to the stage as it is configured now."""

    def changed(self, path: str) -> Difference | None:
        return next((change for change in self.changes if change.path == path), None)


@dataclass(frozen=True)
class Standing:
    """Where a stage stands in a ledger."""

    stage: Stage
    inputs: str
    begun: bool
    """Whether anything lies under these inputs."""
    earlier: Earlier | None
    """The nearest work under other inputs; none: there is none."""

    @property
    def anew(self) -> str:
        """Why the stage begins at step 1 although there is earlier work; empty where it does not."""
        if self.earlier is None or not self.earlier.step:
            return ""
        return f"{self.stage.name} begins anew, because {said(self.earlier.changes)}; {self.earlier.step} steps under earlier inputs"


def find(ledger: Ledger, stage: Stage, parent: Committed | None) -> str:
    """`<inputs>` of a stage, given its parent's result. Raises Unreachable, Refused."""
    wanted = name_of(stage, parent)
    known = ledger.inputs_of(stage.name)
    if wanted in known:
        return wanted
    decision = ledger.decision(stage.name, wanted)
    if decision is not None and decision.action == "keep":
        return decision.earlier
    of_old = [inputs for inputs in known if _means_the_same(ledger, stage, parent, inputs)]
    finished = [inputs for inputs in of_old if ledger.committed(stage.name, inputs) is not None]
    return next(iter(finished or of_old), wanted)


def name_of(stage: Stage, parent: Committed | None) -> str:
    """The digest of a stage's identity."""
    return identity.name(stage.config, stage.devices, parent.digest() if parent else None, stage.contents)


def _means_the_same(ledger: Ledger, stage: Stage, parent: Committed | None, inputs: str) -> bool:
    """Whether these inputs, named by a release that counted every field, are of the stage as it is now."""
    found = first(ledger, stage.name, inputs)
    if found is None or found[1] is not None:
        return False
    intent = found[0]
    if (intent.parent.committed_digest if intent.parent else None) != (parent.digest() if parent else None):
        return False
    then = identity.identity(intent.config, intent.nodes * intent.devices_per_node)
    return then == identity.identity(stage.config, stage.devices)


def first(ledger: Ledger, stage: str, inputs: str) -> tuple[Intent, Terms | None] | None:
    """The oldest attempt under some inputs that can be read, and its terms. None: there is none."""
    for number in ledger.attempts(stage, inputs):
        intent = ledger.intent(stage, inputs, number)
        if intent is not None:
            return intent, ledger.terms(stage, inputs, number)
    return None


def stand(ledger: Ledger, stage: Stage, parent: Committed | None) -> Standing:
    """Where a stage stands: its inputs, and what else was done for it. Raises Unreachable, Refused."""
    inputs = find(ledger, stage, parent)
    known = ledger.inputs_of(stage.name)
    others = [_earlier(ledger, stage, parent, other) for other in known if other != inputs]
    of_use = [one for one in others if one is not None and one.changes]
    return Standing(stage, inputs, inputs in known, min(of_use, key=lambda one: (not one.step, len(one.changes)), default=None))


def _earlier(ledger: Ledger, stage: Stage, parent: Committed | None, inputs: str) -> Earlier | None:
    found = first(ledger, stage.name, inputs)
    if found is None:
        return None
    intent, terms = found
    steps = [0]
    for number in ledger.attempts(stage.name, inputs):
        report, outcome = ledger.report(stage.name, inputs, number), ledger.outcome(stage.name, inputs, number)
        steps += [one.step or 0 for one in (report, outcome) if one is not None]
    committed = ledger.committed(stage.name, inputs)
    changes = changes_since(intent, terms, stage)
    was, now = (intent.parent.committed_digest if intent.parent else None), (parent.digest() if parent else None)
    if was != now:
        changes.append(Difference(f"the result of {stage.spec.parent or 'its parent'}", was, now, "identity"))
    return Earlier(inputs, max([*steps, committed.step if committed else 0]), committed is not None, tuple(changes))


def changes_since(intent: Intent, terms: Terms | None, stage: Stage) -> list[Difference]:
    """In what a stage's identity differs from that of an attempt. Contents that either of them has not recorded are not compared."""
    recorded = (terms.contents if terms else Contents()).model_dump()
    both = {kind: digest for kind, digest in recorded.items() if digest is not None and getattr(stage.contents, kind) is not None}
    then = identity.identity(intent.config, intent.nodes * intent.devices_per_node, Contents(**both))
    known_now = Contents(**{kind: getattr(stage.contents, kind) for kind in both})
    now = identity.identity(stage.config, stage.devices, known_now)
    return identity.changes(then, now, identity.flat_defaults())


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


def layout_changed(before: Intent, after: Intent) -> str:
    """How an attempt is laid out otherwise than the one it goes on from, which then is not bitwise; empty where it is not."""
    if before.nodes != after.nodes:
        return f"resumed on {after.nodes} of {before.nodes} nodes, not bitwise"
    was, now = before.nodes * before.devices_per_node, after.nodes * after.devices_per_node
    if was != now:
        return f"resumed on {now} of {was} devices, not bitwise"
    if (before.config.parallel, before.config.accumulate) != (after.config.parallel, after.config.accumulate):
        return "resumed with another strategy, not bitwise"
    return ""


def results(pipeline: Pipeline, ledger: Ledger) -> Mapping[str, tuple[str, Committed | None]]:
    """`<inputs>` of each stage that is committed or could be started now, with its result where there is one."""
    found: dict[str, tuple[str, Committed | None]] = {}
    for stage in pipeline.stages:
        parent = found.get(stage.spec.parent) if stage.spec.parent else None
        if stage.spec.parent is not None and (parent is None or parent[1] is None):
            continue
        inputs = find(ledger, stage, parent[1] if parent else None)
        found[stage.name] = inputs, ledger.committed(stage.name, inputs)
    return found
