"""How many CPU pods keep the GPU pods of a preparation busy: cores that make clips against GPUs that caption them. Pure.

Owns the ratio. It is of what streams at the same time on `--engine ray`: clips' files and text area on cores, LLaVA on GPUs. Before it all
films are looked at (near duplicates need the whole set), and after it comes the encoding: neither is in the ratio. Refuses to know rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.prepare import rates
from orchestrator.prepare.plan import Row

ON_CORES, ON_GPUS = ("score", "clips"), "caption"
"""Steps that stream beside each other."""


@dataclass(frozen=True)
class Balance:
    core_s: float
    """CPU-seconds a clip, of decoders."""
    gpu_s: float
    """GPU-seconds a clip, of the captioner."""
    supply: float
    """How many times as many rows decoders are to make as the captioner takes."""
    cores_a_gpu: float
    """That keep one GPU busy."""
    pod_cores: int
    cpu_pods: int
    gpu_pods: int
    """With one GPU each."""


def balance(rows: Sequence[Row], *, clips: float, gpus: int, pod_cores: int) -> Balance | None:
    """None: no GPU captions in this plan. What was measured of the person's own runs comes before the table.

    Args:
        clips: that are left in the end.
        gpus: pods with a GPU each.
        pod_cores: cores of a CPU pod.
    """
    hours = {row.step: row.own_hours if row.own_hours is not None else row.device_hours for row in rows if row.counts}
    on_gpu = any(row.step == ON_GPUS and row.counts and row.on_gpu for row in rows)
    if not on_gpu or not clips or not hours[ON_GPUS]:
        return None
    core_s, gpu_s = (3600 * sum(hours.get(step, 0.0) for step in steps) / clips for steps in (ON_CORES, (ON_GPUS,)))
    cores = rates.SUPPLY.value * core_s / gpu_s
    return Balance(core_s, gpu_s, rates.SUPPLY.value, cores, pod_cores, max(1, math.ceil(gpus * cores / pod_cores - 1e-9)), gpus)
