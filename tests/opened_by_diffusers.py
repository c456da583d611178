"""Run as a program: opens exports with a stock diffusers and draws clips. Imports nothing of osctl, and nothing that osctl brings along.

Reads a list of jobs from stdin: {folder, open (keywords of from_pretrained), draw (keywords of the pipeline), seeds, save}.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.abc import MetaPathFinder

import numpy as np
import torch

NOT_STOCK = ("opensora", "orchestrator", "einops", "pydantic")


class Stock(MetaPathFinder):
    """An environment of torch, diffusers and transformers."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in NOT_STOCK:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    sys.meta_path.insert(0, Stock())
    torch.set_num_threads(1)
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    for job in json.load(sys.stdin):
        pipeline = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True, **job.get("open", {}))
        if "save_pretrained" in job:
            pipeline.save_pretrained(job["save_pretrained"])
        if "seeds" in job:
            generators = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
            clips = pipeline(**job["draw"], generator=generators).frames
            if isinstance(clips, list):
                clips = np.stack([np.stack([np.asarray(image) for image in clip]) for clip in clips])
            np.save(job["save"], clips)
    assert not any(name.split(".")[0] in NOT_STOCK for name in sys.modules)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    main()
