"""Options that several commands share, written once: one name, one help text, one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.output import Format

File = Annotated[
    str | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH|NAME",
        envvar="OSCTL_FILE",
        help="Pipeline: a file, a folder, or a shipped name (demo, open-sora-1.0). Default: ./osctl.yaml, else demo.",
    ),
]
LongFile = Annotated[
    str | None,
    typer.Option("--file", metavar="PATH|NAME", envvar="OSCTL_FILE", help="Pipeline, as in osctl launch -f; here -f follows."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one field, e.g. --set stage2.steps=500 --set stage2.optimizer.lr=1e-3. Repeatable."
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="Object store: a folder, or s3://bucket/prefix. Default: the pipeline's, else .osctl/store."
    ),
]


def cluster_names() -> list[str]:
    """For the shell's completion: the cluster profiles that are shipped."""
    from orchestrator.cluster import shipped_clusters
    from orchestrator.config import shipped_folder

    return list(shipped_clusters(shipped_folder()))


Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE",
        help="Cluster profile: a shipped name (h800-64, kind-cpu) or a file. Implies --backend kubernetes; "
        "OSCTL_CLUSTER names one without implying it.",
        autocompletion=cluster_names,
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option("--tracking", metavar="URI", help="MLflow: sqlite, http://host:port, or none."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FOLDER",
        help="Train on this folder of videos with a captions.csv (path,text) instead of the pipeline's own data.",
    ),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", help="With kubernetes: follow the driver to its end, and end with its exit code. Ctrl-C stops the looking only."
    ),
]
Foreground = Annotated[
    bool, typer.Option("--foreground", help="With kubernetes: drive from this process, as locally; Ctrl-C saves and stops.")
]
Output = Annotated[Format, typer.Option("--output", "-o", help="How the result is printed on stdout.")]
Mfu = Annotated[
    float | None,
    typer.Option(
        "--mfu",
        min=0.001,
        max=1.0,
        help="Model FLOPs utilisation to plan with, as a fraction, e.g. 0.45. Default: measured, else the price list's.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        envvar="OSCTL_CALIBRATION",
        help="Steps measured on your device, as bench/step.py and bench/gpu.py write them. Default: the shipped ones.",
    ),
]
Prices = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        metavar="FILE",
        envvar="OSCTL_PRICES",
        help="Price list, in place of the shipped one (osctl explain prices). Each attempt keeps the price at which it was made.",
    ),
]
