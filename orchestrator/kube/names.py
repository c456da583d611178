"""The names of our objects in a cluster, and the check whether an object is ours. Pure.

Owns names, the values of labels and annotations that say whose an object is (`orchestrator.labels` has the keys), and the digest of what
was sent. Refuses to write an object (`manifest`, `jobs`) and to talk to a cluster.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.labels import Annotation, Label

MANAGER = "osctl"
"""Value of the label `app.kubernetes.io/managed-by` on everything that osctl makes."""
NAME_CHARACTERS = 50
"""The longest name of a job. The names of a pod, its host and its Service have at most 63, and the operator appends `-worker-<index>`."""
REPLICATED_JOB = "w"
"""Name of the only Job in the JobSet of a TrainJob. It is short, since JobSet puts it into the names of pods."""
ATTEMPT_NAME = re.compile(
    r"(?P<job>.+-a[0-9]+-[0-9a-f]{8})(?:-worker-(?P<index>[0-9]+)|(?P<child>-w-0)(?:-(?P<completion>[0-9]+)-[a-z0-9]{5})?)?"
)
"""A name by `job_name`, or of a pod of such a job, or of the Job in a TrainJob's JobSet. An object with another name is foreign."""


def job_name(store_url: str, run_key: str) -> str:
    """Name of an attempt's job: a DNS-1035 label of at most 50 characters.

    It has 8 digits of a hash of store and run key, so that two pipelines of one name in two stores never clash in a namespace.
    """
    pipeline, _, rest = run_key.partition("/")
    stage, _, tail = rest.partition("@")
    return _name(f"{pipeline}-{stage}", f"a{tail.rpartition('/a')[2]}-{run_hash(store_url, run_key)[:8]}")


def driver_name(pipeline: str, store_url: str, launch: int) -> str:
    """Name of a driver's Job. `launch` is the number of the launch."""
    return _name(pipeline, f"driver-{run_hash(store_url, pipeline)[:8]}-{launch}")


def register_name(data_set: str, store_url: str, number: int) -> str:
    """Name of a Job of `osctl data register`. `number` is how many such Jobs this data set had before it, plus one."""
    return _name(f"data-{data_set}", f"{run_hash(store_url, data_set)[:8]}-{number}")


def prepare_name(data_set: str, store_url: str, number: int) -> str:
    """Name of the Job or RayJob that prepares a data set, of at most 47 characters: KubeRay appends 6, and allows 53.

    `number` is how many this data set had before it, plus one.
    """
    return _name(f"prepare-{data_set}", f"{run_hash(store_url, data_set)[:8]}-{number}", 47)


def prepare_key(data_set: str, number: int) -> str:
    """Run key of such a Job or RayJob."""
    return f"prepare/{data_set}/{number}"


def image_check_name(store_url: str, key: str, number: int) -> str:
    """Name of a Job that checks an image. `number` is how many such Jobs with the same question there were before it, plus one."""
    return _name("image-check", f"{run_hash(store_url, key)[:8]}-{number}")


def image_check_key(image: str, needs: str) -> str:
    """Run key of such a Job. The same question about the same image has the same key."""
    return f"image-check/{hashlib.sha256(f'{image}{chr(10)}{needs}'.encode()).hexdigest()[:12]}"


def told(run_key: str) -> str:
    """An attempt's run key, for people: `stage2 attempt 1 of pipeline demo`."""
    pipeline, _, rest = run_key.partition("/")
    stage, at, tail = rest.partition("@")
    return f"{stage} attempt {tail.rpartition('/a')[2]} of pipeline {pipeline}" if at else run_key


def driver_key(pipeline: str, launch: int) -> str:
    """Run key of a driver's Job. It differs from every attempt's run key, since those contain an `@`."""
    return f"{pipeline}/driver/{launch}"


def register_key(data_set: str, number: int) -> str:
    """Run key of a Job of `osctl data register`."""
    return f"data/{data_set}/{number}"


def run_hash(store_url: str, key: str) -> str:
    """The value of the label `osctl/run`, 12 hex digits."""
    return hashlib.sha256(f"{store_url}\n{key}".encode()).hexdigest()[:12]


def selector(pipeline: str | None = None, roles: Sequence[str] = ("trainer",)) -> str:
    """A label selector for our objects with these roles, of one pipeline. None means of all pipelines."""
    one = f",{Label.PIPELINE}={pipeline}" if pipeline else ""
    return f"{Label.MANAGED_BY}={MANAGER},{Label.ROLE} in ({','.join(roles)}){one}"


def attempt_of(kind: str, name: str) -> tuple[str, int] | None:
    """(name of the attempt's job, node) that an object of this kind and name belongs to; the node is 0 for all but pods.

    None means that it is foreign: such a name is not one of ours, or ours has another kind.
    """
    parts = ATTEMPT_NAME.fullmatch(name)
    if parts is None:
        return None
    index = parts["index"] or parts["completion"]
    if index is not None:
        return (parts["job"], int(index)) if kind == "Pod" else None
    ours = ("Job",) if parts["child"] else ("PyTorchJob", "TrainJob", "JobSet")
    return (parts["job"], 0) if kind in ours else None


def owner(manifest: Mapping[str, Any]) -> tuple[str, str] | None:
    """(store URL, run key) of an object that osctl made. None means that it is foreign."""
    metadata = manifest.get("metadata") or {}
    annotations = metadata.get("annotations") or {}
    managed = (metadata.get("labels") or {}).get(Label.MANAGED_BY) == MANAGER
    if not managed or Annotation.STORE not in annotations or Annotation.RUN_KEY not in annotations:
        return None
    return annotations[Annotation.STORE], annotations[Annotation.RUN_KEY]


def is_ours(manifest: Mapping[str, Any], store_url: str, run_key: str) -> bool:
    """Whether an object with our name is ours. Any other is foreign, and osctl never adopts, changes or deletes it."""
    return owner(manifest) == (store_url, run_key)


def spec_hash(manifest: Mapping[str, Any]) -> str:
    """16 hex digits over everything except the annotation that has them. For an object as it is sent, not as a server returns it."""
    metadata = dict(manifest["metadata"])
    metadata["annotations"] = {key: value for key, value in metadata["annotations"].items() if key != Annotation.SPEC_HASH}
    return hashlib.sha256(json.dumps({**manifest, "metadata": metadata}, sort_keys=True).encode()).hexdigest()[:16]


def sealed_together(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add one `spec_hash` over all of several objects to each of them, and return them."""
    together = hashlib.sha256(" ".join(map(spec_hash, objects)).encode()).hexdigest()[:16]
    for one in objects:
        one["metadata"]["annotations"][Annotation.SPEC_HASH] = together
    return objects


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Add the `spec_hash` to an object, and return it."""
    manifest["metadata"]["annotations"][Annotation.SPEC_HASH] = spec_hash(manifest)
    return manifest


def _name(words: str, tail: str, most: int = NAME_CHARACTERS) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[: most - len(tail) - 1].strip("-")
    return f"{slug}-{tail}"
