"""Train a pipeline and draw its loss over the dollars that it cost, one line a stage.

    .venv/bin/python docs/examples/loss_over_dollars.py                                    # the demo, as it is shipped
    .venv/bin/python docs/examples/loss_over_dollars.py my-model --set stage1.steps=100    # another recipe, shorter

What has been trained already is not trained again, so a second run only draws. matplotlib comes with MLflow.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from pathlib import Path

from matplotlib.figure import Figure

from orchestrator.api import Pipeline, Row

WINDOW = 25
"""Steps over which the bold line is a mean: the loss of one step says more about its clips than about the model."""


def train(pipeline: Pipeline) -> None:
    """Launch it and print a line whenever something has changed."""
    print(f"{pipeline.name}: planned {pipeline.plan().expected.usd:.4f} dollars")
    launch = pipeline.launch()
    for snapshot in pipeline.watch(interval_s=2):
        steps = " ".join(f"{stage.name} {stage.step}/{stage.steps}" for stage in snapshot.stages)
        print(f"{snapshot.state}: {steps}, {snapshot.usd:.4f} dollars")
    result = launch.wait()
    if result.status != "succeeded":
        raise SystemExit(f"{pipeline.name} {result.status}: {result.reason}")


def draw(rows: list[Row], title: str, out: Path) -> None:
    """`rows`: of `Pipeline.losses`. `out`: .png, .svg or .pdf."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (stage, steps) in enumerate(itertools.groupby(rows, key=lambda row: row["name"])):
        dollars, losses = zip(*((row["usd"], row["loss"]) for row in steps), strict=True)
        means = [sum(losses[max(0, last - WINDOW) : last]) / min(last, WINDOW) for last in range(1, len(losses) + 1)]
        axes.plot(dollars, losses, color=f"C{place}", linewidth=0.5, alpha=0.3)
        axes.plot(dollars, means, color=f"C{place}", label=f"{stage}: {len(losses)} steps, {means[-1]:.3f} at the end")
    axes.set(title=title, xlabel="dollars spent", ylabel=f"loss (bold: mean of {WINDOW} steps)")
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a pipeline's loss over dollars.")
    parser.add_argument("pipeline", nargs="?", help="recipe: a file, a folder or a shipped name. Default: ./osctl.yaml, else the demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for osctl launch; repeatable")
    parser.add_argument("--store", help="a folder, or s3://bucket/prefix")
    parser.add_argument("--out", type=Path, default=Path("loss-over-dollars.png"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the API's remarks
    pipeline = Pipeline.load(options.pipeline, store=options.store).override(*options.set)
    train(pipeline)
    for row in pipeline.compare():
        print(f"{row['name']}: loss {row['loss']:.4f} after {row['steps']} steps, {row['usd']:.4f} dollars, {row['wall_s']:.0f} s")
    draw(pipeline.losses(), f"{pipeline.name}: loss over dollars", options.out)
    print(f"drew {options.out}")


if __name__ == "__main__":
    main()
