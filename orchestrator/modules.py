"""Whose modules a Python process of ours imports: those that osctl was installed with, never those of the folder in which it was started.

A folder may hold a `random.py`, a `torch.py`, or another project's package `opensora`. Python itself would take them: `python -m` looks
in the working folder first, and so does a PYTHONPATH with an empty entry, which `export PYTHONPATH=$PYTHONPATH:/some/where` leaves behind.

Owns the command and the environment of our Python children, and the search path of `osctl` itself. Refuses to judge entries of PYTHONPATH
that are absolute, unless they hold another package of one of our names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("orchestrator", "opensora")
ROOT = Path(__file__).resolve().parents[1]
"""Where both of them lie."""


def command(module: str, *words: str) -> list[str]:
    """What runs a module of ours, or of what we were installed with."""
    return [sys.executable, "-P", "-m", module, *words]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base`, without what would bring modules of the working folder into a process. For the children of a child as well."""
    return {**without_working_folder(base), "PYTHONSAFEPATH": "1"}


def reading_clips(base: Mapping[str, str]) -> dict[str, str]:
    """`base`, with what reaches the object store under the names that libraries read, since clips at s3:// lie where the ledger does.

    boto reads the endpoint and the authority's file; how buckets are addressed no variable of its says, but one of fsspec's does.
    """
    variables = dict(base)
    endpoint = variables.get("OSCTL_S3_ENDPOINT")
    if endpoint and not variables.get("AWS_ENDPOINT_URL"):
        variables.setdefault("AWS_ENDPOINT_URL_S3", endpoint)
    if authority := variables.get("OSCTL_S3_CA"):
        variables["AWS_CA_BUNDLE"] = authority
    style = {"1": "path", "0": "virtual"}.get(variables.get("OSCTL_S3_PATH_STYLE", ""))
    if style is not None:
        variables.setdefault("FSSPEC_S3", json.dumps({"config_kwargs": {"s3": {"addressing_style": style}}}))
    return variables


def without_working_folder(base: Mapping[str, str]) -> dict[str, str]:
    """`base`, with those entries of PYTHONPATH alone that mean the same place everywhere.

    A trainer that a person names (`trainer:` of a pipeline) is started with it: its script's own folder stays where Python looks.
    """
    variables = dict(base)
    entries = variables.pop("PYTHONPATH", "")
    if kept := [entry for entry in entries.split(os.pathsep) if entries and _is_kept(entry)]:
        variables["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in kept)
    return variables


def settle() -> None:
    """For `osctl` itself, before it imports more: what it looks through, and what its children inherit."""
    entries = os.environ.get("PYTHONPATH")
    if entries is None:
        return
    dropped = {os.path.abspath(entry) for entry in entries.split(os.pathsep) if not _is_kept(entry)}  # noqa: PTH100 - as Python's site does
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) not in dropped]  # noqa: PTH100
    variables = without_working_folder(os.environ)
    os.environ.pop("PYTHONPATH")
    if "PYTHONPATH" in variables:
        os.environ["PYTHONPATH"] = variables["PYTHONPATH"]


def _is_kept(entry: str) -> bool:
    """Whether an entry of PYTHONPATH is a place of its own. A relative one that we were imported from is one: else children lack us."""
    folder = Path(entry)
    if folder.resolve() == ROOT:
        return True
    # a package has its first module: an installed osctl keeps its recipes in a folder `orchestrator` of site-packages, which hides nothing
    return folder.is_absolute() and not any((folder / package / "__init__.py").is_file() for package in PACKAGES)
