"""How a running attempt differs from what would be sent now, and what that means. Pure.

Owns the comparison of two jobs (one as a server returns it, one as `manifest` writes it now) and of two intents. Fields that differ between
any two attempts (name, number, intent), and fields that a server, a queue or a drain wrote into a job, do not count. Refuses to find the
jobs or intents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensora import identity
from orchestrator.labels import Annotation, Label
from orchestrator.ledger.records import Intent

NEXT = "takes effect at the next attempt"
ANEW = "another result: the stage starts again from its parent, and the old result stays"


@dataclass(frozen=True)
class Difference:
    """One field that differs."""

    path: str
    """`container.resources.limits.memory`, `stage.model.depth`."""
    old: Any
    """The value in the running attempt. None means it has none."""
    new: Any
    """The value that would be sent now. None means none."""
    meaning: str
    """What the difference means, for people."""


_MEANINGS: Sequence[tuple[str, str]] = (
    ("namespace", "another place: the running job stays where it is, end it first with osctl cancel"),
    ("store", "another ledger, which knows nothing of this run"),
    ("container.image", f"{NEXT}; other code may give other numbers"),
    ("pod.terminationGracePeriodSeconds", f"{NEXT}; until then a save must fit into the old one"),
    ("container.lifecycle", f"{NEXT}; until then a save must fit into the old one"),
)
"""Meanings by the beginning of a path. Any other change takes effect at the next attempt, since a pod is never changed while it runs."""


def job_differences(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The fields in which `old`, an attempt's objects as a server returns them, differ from `new`, those that would be sent now.

    The last of each is the job. Where they are jobs of two kinds, only the kinds and what both kinds have are compared.
    """
    before, after = _comparable(old), _comparable(new)
    if before["job.kind"] != after["job.kind"]:
        before, after = ({path: value for path, value in one.items() if path in _OF_ANY_KIND} for one in (before, after))
    return [Difference(path, was, now, _meaning(path)) for path, was, now in _changes(before, after)]


def stage_differences(old: Intent, new: Intent) -> list[Difference]:
    """The fields in which two intents differ: what is trained, and how.

    A change of identity (`opensora.identity`) makes another result. After any other change the next attempt resumes the last one.
    """
    before, after = old.nodes * old.devices_per_node, new.nodes * new.devices_per_node
    changed = identity.differences(old.config, new.config, before, after)
    found = [_stage_difference(one) for one in changed]
    if old.inputs_digest != new.inputs_digest and not any(one.kind == "identity" for one in changed):
        found.append(
            Difference("inputs", old.inputs_digest, new.inputs_digest, f"its parent has another result now, or its data changed; {ANEW}")
        )
    resumes = f"{NEXT}, which resumes" + (": as many devices as before" if before == after else " at the same global batch, not bitwise")
    devices = ANEW if any(one.path == "global batch" for one in changed) else resumes
    meanings = {
        "nodes": devices,
        "devices_per_node": devices,
        "device": f"{NEXT}; an attempt is billed at the price that it was made under",
        "trainer": NEXT,
        "hang_timeout_s": NEXT,
        "flush_s": NEXT,
    }
    found += [
        Difference(name, getattr(old, name), getattr(new, name), meaning)
        for name, meaning in meanings.items()
        if getattr(old, name) != getattr(new, name)
    ]
    return found


def _stage_difference(changed: identity.Difference) -> Difference:
    if changed.path == "global batch":
        old, new = (batch[0] if batch is not None and len(batch) == 1 else batch for batch in (changed.old, changed.new))
        return Difference("global batch", old, new, f"exact resume is not possible; {ANEW}")
    meaning = ANEW if changed.kind == "identity" else f"{NEXT}, which goes on from the last checkpoint"
    return Difference(f"stage.{changed.path}", changed.old, changed.new, meaning)


def _meaning(path: str) -> str:
    return next((meaning for beginning, meaning in _MEANINGS if path.startswith(beginning)), NEXT)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for path in [*new, *(path for path in old if path not in new)]:
        if old.get(path) != new.get(path):
            yield path, old.get(path), new.get(path)


_OF_ANY_KIND = ("namespace", "store", "job.kind", "job.queue", "job.queuePriority", "container.image")


def _comparable(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of an attempt's objects by short paths, without those that belong to one attempt alone or to the cluster."""
    job = objects[-1]
    metadata, name = job["metadata"], job["metadata"]["name"]
    told = _train_job(objects) if job["kind"] == "TrainJob" else _pytorch_job(job)
    return {
        "namespace": metadata["namespace"],
        "store": metadata["annotations"][Annotation.STORE],
        "job.kind": job["kind"],
        **_flat({"queue": metadata["labels"].get(Label.QUEUE_NAME)}, "job"),
        **_flat({"queuePriority": metadata["labels"].get(Label.QUEUE_PRIORITY)}, "job"),
        **{path: value.replace(name, "NAME") if isinstance(value, str) else value for path, value in told.items()},
    }


def _train_job(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_kind = {one["kind"]: one for one in objects}
    if "TrainingRuntime" not in by_kind:
        return {}
    template = by_kind["TrainingRuntime"]["spec"]["template"]["spec"]
    job_set = {key: value for key, value in template.items() if key != "replicatedJobs"}
    job = dict(template["replicatedJobs"][0]["template"]["spec"])
    pods = job.pop("template")
    for count in ("parallelism", "completions"):  # `stage_differences` compares the numbers of nodes
        del job[count]
    gang = {"gang": "PodGroup" in by_kind}
    return {
        **_flat({**job_set, **job, **gang, "keepS": objects[-1]["metadata"]["annotations"].get(Annotation.KEEP_S)}, "job"),
        **_pod(pods),
    }


def _pytorch_job(manifest: Mapping[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    policy = {key: value for key, value in spec["runPolicy"].items() if key != "suspend"}  # Kueue writes it, and a drain does
    elastic = {key: value for key, value in spec.get("elasticPolicy", {}).items() if key != "rdzvId"}
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    return {
        **_flat(policy, "job"),
        **_flat({key: value for key, value in elastic.items() if "Replicas" not in key}, "job"),
        "worker.restartPolicy": worker["restartPolicy"],
        **_pod(worker["template"]),
    }


def _pod(template: Mapping[str, Any]) -> dict[str, Any]:
    pod = dict(template["spec"])
    container = dict(pod.pop("containers")[0])
    words = container.pop("command")
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    given = zip(words[first::2], words[first + 1 :: 2], strict=False)
    options = {name: value for name, value in given if name not in ("--store", "--intent")}
    # Requests equal limits. `stage_differences` compares the numbers of nodes and processes, which are the stage's devices.
    container["resources"] = {"limits": container["resources"]["limits"]}
    return {
        "container.command": " ".join(words[:first]),
        **_flat(options, "container.command"),
        **_flat(container, "container"),
        **_flat(pod, "pod"),
    }


def _flat(value: Any, path: str) -> dict[str, Any]:
    """Values by dotted path. The items of a list are named by their `name`; a list whose items have no name is one value."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "name" in each for each in value):
        value = {each["name"]: each.get("value", {key: inner for key, inner in each.items() if key != "name"}) for each in value}
    if isinstance(value, dict) and value:
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{path}.{key}").items()}
    return {} if value in (None, [], {}) else {path: value}
