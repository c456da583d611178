"""From `prepare.yaml` to a pool on Ray: what its actors get, and where Ray keeps its own files.

Owns the folders of Ray, and what is said where the package is missing. Refuses to import ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from opensora.dataset.prepare_config import CaptionLlava, PrepareConfig
from opensora.errors import ConfigError
from opensora.prepare.ray.pool import Away, Kind, RayPool
from opensora.prepare.ray.setup import ModelActors, Setup
from opensora.prepare.ray.stream import Stream
from opensora.prepare.steps import Steps

LONGEST = 40
"""Characters of Ray's folder: it makes sockets in it with up to 65 more, and their names may have 107."""
PREFIX = "osctl-ray-"
SCORED_AT_ONCE = 8
"""Rows that wait in an actor that computes scores and holds no LLaVA; they are scored one by one."""
SILENT_S = 120.0
SILENT_CLUSTER_S = 900.0
"""Nodes of a cluster may have to be started."""


def pool(config: PrepareConfig, run_dir: Path, steps: Steps, actors: int, halt: Callable[[], bool]) -> RayPool:
    """Ray starts when the first row comes. Raises ConfigError, where it is not installed."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pandas") is None:
        raise ConfigError("engine ray: the package ray is not installed. Run: pip install 'osctl[ray]'")
    settings = config.ray
    address = settings.address or os.environ.get("RAY_ADDRESS", "")

    def opened(kind: Kind) -> Stream:
        gpu = kind == "gpu"
        folder = "" if address else _folder(run_dir)
        setup = Setup(
            address=address, temporary=folder, spill=f"{run_dir}/temporary/spill", object_store=int(settings.object_store_gb * 1e9),
            actors=settings.gpu_actors if gpu else actors, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus if gpu else 0.0,
            limits=config.limits, preload=steps.preload, models=models if kind == "chain" else None,
            silent_s=SILENT_CLUSTER_S if address else SILENT_S,
        )  # fmt: skip
        Path(setup.spill).mkdir(parents=True, exist_ok=True)
        return Stream(setup, run_dir / "ray.log")

    models = model_actors(config)
    on_gpu = frozenset({steps.measure.__name__}) if settings.num_gpus and config.filter.scores else frozenset[str]()
    shared = not address if settings.shared_files is None else settings.shared_files
    limits = config.limits
    away = Away(steps.fetch, config.download, limits.max_bytes, settings.scratch, int(settings.scratch_gb * 1e9))
    rows = models.actors * models.in_flight if models is not None else 0
    return RayPool(opened, actors, halt, on_gpu, None if shared else away, rows)


def model_actors(config: PrepareConfig) -> ModelActors | None:
    """Those that hold LLaVA and the models of scores; None: nothing needs them. With a GPU they ask for no core: decoders may have all."""
    settings, caption = config.ray, config.caption
    if not (config.filter.scores or isinstance(caption, CaptionLlava)):
        return None
    batch = caption.batch if isinstance(caption, CaptionLlava) else SCORED_AT_ONCE
    return ModelActors(settings.gpu_actors, 0.0 if settings.num_gpus else settings.num_cpus, settings.num_gpus, batch)


def _folder(run_dir: Path) -> str:
    """Within the run directory, or in the system's folder for what is temporary, where the first has too long a name."""
    near = run_dir.absolute() / "temporary" / "ray"
    if len(os.fsencode(near)) <= LONGEST:
        return str(near)
    note = run_dir / "ray.folder"
    with contextlib.suppress(OSError, ValueError):
        earlier = Path(note.read_text())  # of a run that was killed
        if earlier.name.startswith(PREFIX) and earlier.parent == Path(tempfile.gettempdir()) and earlier.stat().st_uid == os.getuid():
            shutil.rmtree(earlier, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=PREFIX)
    note.write_text(folder)
    return folder
