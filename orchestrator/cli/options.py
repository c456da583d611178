"""Options that several commands share, written once: one name, one help text, one meaning."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from orchestrator.cli.output import Format

File = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--file", "-f", metavar="PATH|NAME", envvar="OSCTL_FILE", help="Pipeline: a file, a folder, or a shipped name (demo, open-sora-1.0). Default: ./osctl.yaml, else demo."),
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Override one field, e.g. --set stage2.steps=500 --set stage2.optimizer.lr=1e-3. Repeatable."),
]
Store = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--store", metavar="URL", help="Object store: a folder, or s3://bucket/prefix. Default: the pipeline's, else .osctl/store."),
]
Tracking = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--tracking", metavar="URI", help="MLflow: sqlite, http://host:port, or none."),
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--data", metavar="FOLDER", help="Train on this folder of videos with a captions.csv (path,text) instead of the pipeline's own data."),
]
Output = Annotated[Format, typer.Option("--output", "-o", help="How the result is printed on stdout.")]
Mfu = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--mfu", min=0.001, max=1.0, help="Model FLOPs utilisation to plan with, as a fraction, e.g. 0.45. Default: measured, else the price list's."),
]
