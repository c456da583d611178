"""What each lever of a recipe (docs/levers.md) gains: loss on held-out clips over CPU-seconds, with the lever and without.

Every run trains the video stage of the demo, shortened, from new weights, in one process of one thread. The loss is that of
`opensora.evaluation.held_out`: clips that no run trains on, fixed noise and levels, weights of the moving average, and without the weights
that a lever puts on its training loss. CPU-seconds are of the training steps alone: a machine with other work has no other clock.
A lever is compared with the same objective without it, on the same seeds.

Each run (lever, seed) is written into the JSON when it is done, and the next call makes those that are missing: stop it whenever you like.
Runs go seed by seed, all levers of a seed one after the other.

    OMP_NUM_THREADS=1 nice .venv/bin/python bench/levers.py --seeds 3 --steps 400
    OMP_NUM_THREADS=1 .venv/bin/python bench/levers.py --table
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import yaml

from opensora.config import StageConfig, write_stage
from opensora.distributed.ranks import Ranks
from opensora.evaluation import held_out
from opensora.evaluation.sampler import Sampler
from opensora.latents.cache import prepare
from opensora.latents.prepared import Prepared
from opensora.planning.flops import train_flops_per_clip
from opensora.training.run_directory import RunDirectory
from opensora.training.start import find_start
from opensora.training.trainer import DrainRequest, Trainer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks" / "2026-11-30-levers.json"
READINGS = 4
"""How often a run is judged, equally far apart."""
NOISE = {"objective": {"kind": "iddpm"}, "sampling": {"method": "ddim", "steps": 16}, "optimizer": {"lr": 1e-3}}
"""The published objective on the demo's clips; a third of the learning rate of its flow."""
WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "flow": (None, {}),
    "flow, routing 0.5": ("flow", {"routing": {"rate": 0.5, "first_blocks": 1, "last_blocks": 1}}),
    "flow, muon": ("flow", {"optimizer": {"matrices": "muon"}}),
    "iddpm": (None, NOISE),
    "iddpm, min_snr 5": ("iddpm", NOISE | {"objective": {"kind": "iddpm", "min_snr": 5.0}}),
}
"""By name: what it is compared with, and how its stage differs from the demo's."""

Run = dict[str, Any]
"""`points`: step, cpu_s and loss of each reading; `tflop`: operations of the run."""


@dataclass(frozen=True)
class Settings:
    """What two runs must have in common to be compared."""

    steps: int
    batch_size: int
    clips: int
    """Held-out clips of a reading."""

    def stage(self, way: str, seed: int) -> StageConfig:
        """The demo's second stage, shortened."""
        content = yaml.safe_load((ROOT / "configs" / "demo" / "stage2.yaml").read_text())
        content["data"]["source"]["clips"] = 2048
        short = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seed": seed,
            "optimizer": {"warmup_steps": max(1, self.steps // 20)},
            "checkpoint": {"every_steps": self.steps, "background": False},
            "prompts": [],
            "evaluate": None,
        }
        for changes in (short, WAYS[way][1]):
            for name, value in changes.items():
                replaces = not isinstance(value, dict) or name in ("objective", "routing")
                content[name] = value if replaces else content[name] | value
        return StageConfig.model_validate(content)


def trained(settings: Settings, way: str, seed: int) -> Run:
    """One run from new weights to its last step."""
    stage = settings.stage(way, seed)
    with tempfile.TemporaryDirectory(prefix="levers-") as folder:
        (Path(folder) / "checkpoints").mkdir()
        write_stage(stage, Path(folder) / "stage.yaml")
        run, ranks = RunDirectory(Path(folder), rank=0), Ranks(0, 1, torch.device("cpu"))
        start = find_start(run, stage, 1)
        prepared = Prepared.open(prepare(stage, run.latents, start.encoders), stage)
        trainer = Trainer(run, stage, ranks, DrainRequest(), prepared, start)
        asked = held_out.held_out(stage, prepared.autoencoder, prepared.text, clips=settings.clips, frames=stage.data.frames, seed=0)
        due = {settings.steps * number // READINGS for number in range(1, READINGS + 1)}
        points, spent = [], 0.0
        with trainer.loader:
            while trainer.step < settings.steps:
                began = time.process_time()
                trainer.launch()
                trainer.settle(0)
                spent += time.process_time() - began
                if trainer.step in due:
                    sampler = Sampler(stage, trainer.strategy.averaged(), prepared.autoencoder, prepared.text, device=ranks.device)
                    loss = float(held_out.losses(sampler, asked, 0).mean())
                    points.append({"step": trainer.step, "cpu_s": round(spent, 3), "loss": loss})
    tflop = train_flops_per_clip(stage) * stage.batch_size * stage.steps / 1e12
    return {"points": points, "tflop": round(tflop, 4)}


def missing(runs: Mapping[str, Run], seeds: int, ways: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The runs that are not done yet, seed by seed."""
    for seed, way in itertools.product(range(seeds), ways):
        if name_of(way, seed) not in runs:
            yield way, seed


def name_of(way: str, seed: int) -> str:
    return f"{way} / seed {seed}"


def cpu_to_reach(points: Sequence[Mapping[str, float]], loss: float) -> float | None:
    """CPU-seconds until the held-out loss was so low, on straight lines between the readings. None: it never was, or before the first."""
    for before, after in itertools.pairwise(points):
        if before["loss"] > loss >= after["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["cpu_s"] + share * (after["cpu_s"] - before["cpu_s"])
    return None


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Quantile of Student's distribution for a 95% interval of the mean of so many readings."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval; of one reading an interval without ends."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = STUDENT.get(len(values), 2.3) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def compared(runs: Mapping[str, Run], way: str) -> dict[str, list[float]] | None:
    """Of each seed that both have: the lever's last loss less that without it, ratios of CPU-seconds a step and of CPU-seconds to reach the
    loss that the one without it ended at. None: no seed is done on both sides."""
    against = WAYS[way][0]
    assert against is not None
    found: dict[str, list[float]] = {"difference": [], "step_ratio": [], "cpu_ratio": []}
    for name, run in runs.items():
        lever, _, seed = name.partition(" / seed ")
        other = runs.get(name_of(against, int(seed)))
        if lever != way or other is None:
            continue
        mine, theirs = run["points"], other["points"]
        found["difference"].append(mine[-1]["loss"] - theirs[-1]["loss"])
        found["step_ratio"].append(mine[-1]["cpu_s"] / theirs[-1]["cpu_s"])
        reached = cpu_to_reach(mine, theirs[-1]["loss"])
        if reached is not None:
            found["cpu_ratio"].append(reached / theirs[-1]["cpu_s"])
    return found if found["difference"] else None


def table(content: Mapping[str, Any]) -> str:
    """The JSON as a page."""
    settings, runs, about = content["settings"], content["runs"], content["about"]
    lines = [
        f"# Levers, {about['date']}",
        "",
        f"`bench/levers.py`: the video stage of the demo from new weights, {settings['steps']} steps of {settings['batch_size']} clips, "
        f"one thread. Loss over {settings['clips']} held-out clips at ten noise levels each, moving average of the weights. "
        f"CPU-seconds of the training steps. {about['machine']}, load {' to '.join(str(load) for load in about['load'])}. "
        "Losses of flow and of iddpm are of different quantities.",
        "",
        "| run | seeds | loss at the end (each seed) | CPU-s of a step | TFLOP of the run |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        some = [run for name, run in runs.items() if name.partition(" / seed ")[0] == way]
        if some:
            losses = ", ".join(f"{run['points'][-1]['loss']:.4f}" for run in some)
            step = statistics.mean(run["points"][-1]["cpu_s"] / run["points"][-1]["step"] for run in some)
            lines.append(f"| {way} | {len(some)} | {losses} | {step:.3f} | {some[0]['tflop']:.3f} |")
    lines += [
        "",
        "| lever | seeds | loss, difference to the run without it (95%) | CPU-s of a step, ratio | CPU-s to the other's last loss, ratio |",
        "|---|---|---|---|---|",
    ]
    for way, (against, _) in WAYS.items():
        found = compared(runs, way) if against is not None else None
        if found is not None:
            mean, low, high = interval(found["difference"])
            span = f" ({low:+.4f} to {high:+.4f})" if math.isfinite(low) else ", one seed: no interval"
            reached, count = found["cpu_ratio"], len(found["difference"])
            cpu = f"{statistics.mean(reached):.2f}, {len(reached)} of {count} seeds" if reached else f"reached by none of {count} seeds"
            lines.append(f"| {way} | {count} | {mean:+.4f}{span} | {statistics.mean(found['step_ratio']):.2f} | {cpu} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Make the missing runs, one after the other, and the page."""
    parser = argparse.ArgumentParser(prog="bench/levers.py")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each lever [3]")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of a run [400]")
    parser.add_argument("--batch-size", type=int, default=16, help="clips of a step [16]")
    parser.add_argument("--clips", type=int, default=80, help="held-out clips of a reading [80]")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="these alone [all]")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON; the page lies beside it [docs/benchmarks]")
    parser.add_argument("--table", action="store_true", help="write the page alone, and make no run")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Settings(args.steps, args.batch_size, args.clips)
    out: Path = args.out
    content: dict[str, Any] = {"settings": vars(settings), "runs": {}}
    if out.is_file():
        content = json.loads(out.read_text())
        if content["settings"] != vars(settings) and not args.table:
            raise SystemExit(f"{out}: its runs have {content['settings']}, this call {vars(settings)}; name another file with --out")
    for way, seed in [] if args.table else list(missing(content["runs"], args.seeds, args.ways)):
        load = os.getloadavg()[0]
        content["runs"][name_of(way, seed)] = trained(settings, way, seed)
        loads = [*content.get("about", {}).get("load", []), round(load, 1)]
        content["about"] = {"machine": harness.machine(), "date": datetime.date.today().isoformat(), "load": [min(loads), max(loads)]}
        part = out.with_suffix(".partial")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(out)
        print(f"{name_of(way, seed)}: {content['runs'][name_of(way, seed)]['points'][-1]}", flush=True)
    out.with_suffix(".md").write_text(table(content))


if __name__ == "__main__":
    main()
