"""How many attempts are rendered a second on one core: intent and profile to objects, and on to YAML, beside PyYAML's own emitter.

Both kinds of jobs: a PyTorchJob is one object, a TrainJob has a TrainingRuntime of its own and often a PodGroup.

Random valid specs, as the laws of manifests draw them; CPU-seconds of this process, best of N. Floor and goal: 500 specs a second.

    PYTHONPATH=tests .venv/bin/python bench/render.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import manifest_specs
import yaml
from harness import Measured, Row
from hypothesis import HealthCheck, Phase, given, settings
from manifest_specs import Spec

from orchestrator.kube import yaml_text
from orchestrator.kube.operator import PYTORCH_JOB, TRAIN_JOB, Operator

SPECS, ROUNDS = 500, 5


def drawn(number: int) -> list[Spec]:
    found: list[Spec] = []

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(manifest_specs.specs())
    def draw(spec: Spec) -> None:
        found.append(spec)

    draw()
    return found


def rendered(spec: Spec, kind: Operator = PYTORCH_JOB) -> list[dict[str, Any]]:
    return kind.objects(spec.intent, spec.profile, spec.store_url, exclude_nodes=spec.exclude_nodes)


def a_second(work: Callable[[Spec], object], specs: Sequence[Spec]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for spec in specs:
            work(spec)
        best = min(best, time.process_time() - began)
    return len(specs) / best


def measure(quick: bool) -> Measured:
    specs = drawn(5 if quick else SPECS)
    ways: dict[str, Callable[[Spec], object]] = {
        "object": rendered,
        "object and YAML": lambda spec: yaml_text.dump(rendered(spec)),
        "object and PyYAML's own emitter": lambda spec: yaml.safe_dump_all(rendered(spec), sort_keys=False),
        "TrainJob: objects": lambda spec: rendered(spec, TRAIN_JOB),
        "TrainJob: objects and YAML": lambda spec: yaml_text.dump(rendered(spec, TRAIN_JOB)),
    }
    speeds = {name: a_second(work, specs) for name, work in ways.items()}
    rows = [Row("jobs rendered as YAML", speeds["object and YAML"], "/s", 500, 500)]
    rows += [
        Row("TrainJobs with their runtimes rendered as YAML", speeds["TrainJob: objects and YAML"], "/s", 500, 500)
    ]  # two or three objects each
    return rows, {"a_second": speeds}


def main() -> None:
    harness.run("render", measure)


if __name__ == "__main__":
    main()
