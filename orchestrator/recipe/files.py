"""Which file a person means by a pipeline or a cluster profile: a path, a folder, or a name that is shipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import overload

from orchestrator.recipe.cluster_profile import ClusterProfile, shipped_clusters
from orchestrator.recipe.pipeline import NAME
from orchestrator.recipe.yaml_file import closest, read, usage_error, validate

DEFAULT_CLUSTER = "h800-64"


def shipped_folder() -> Path:
    """`configs/`: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped() -> dict[str, Path]:
    """Pipelines that come with this package, by name."""
    return {path.parent.name: path for path in sorted(shipped_folder().glob("*/pipeline.yaml"))}


@overload
def find(file: str | None) -> Path: ...
@overload
def find(file: str | None, *, missing_ok: bool) -> Path | None: ...
def find(file: str | None, *, missing_ok: bool = False) -> Path | None:
    """The pipeline file that is meant: a file, a folder that holds one, or a shipped name; none: `./osctl.yaml`, else the demo.

    Raises:
        UsageError: there is no such file, folder or name. With `missing_ok`: it can be no name either.
    """
    if file is None:
        return Path("osctl.yaml") if Path("osctl.yaml").is_file() else shipped()["demo"]
    path = Path(file)
    try:
        if path.is_file():
            return path
        for name in ("pipeline.yaml", "osctl.yaml"):
            if (path / name).is_file():
                return path / name
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise usage_error(f"{_short(file)}: cannot be looked at: {error.strerror}. Name a pipeline file") from None
    names = shipped()
    if file in names:
        return names[file]
    if missing_ok and NAME.fullmatch(file):  # a folder of that name, of clips say, hides no pipeline of a store
        return None
    if is_folder:
        raise usage_error(f"{file}: a folder without pipeline.yaml or osctl.yaml. Name the pipeline file in it")
    raise usage_error(f"{_short(file)}: no such file, folder or shipped pipeline. {closest(file, list(names))}")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"


def store_of(file: str | None) -> str | None:
    """The store that a recipe names; None: it names none, or there is no recipe. Raises UsageError."""
    path = find(file)
    named = read(path).value.get("store")
    return named if isinstance(named, str) else None


def name_for(text: str) -> str:
    """A pipeline's name that is like this text; empty: nothing of it can stand in one."""
    name = re.sub(r"[^a-z0-9.-]+", "-", text.lower()).lstrip("-.0123456789")[:40].rstrip("-.")
    return name if NAME.fullmatch(name) else ""


def cluster_file(named: str, path: Path) -> Path | None:
    """The profile of that name: shipped, beside the pipeline's file `path`, or in the working folder. None: there is none."""
    candidates = (shipped_clusters(shipped_folder()).get(named), path.parent / named, Path(named))
    return next((candidate for candidate in candidates if candidate is not None and candidate.is_file()), None)


def cluster_of(file: str | None) -> ClusterProfile | None:
    """The cluster that a recipe runs on; None: it runs on this machine, there is no recipe, or no such profile. Raises UsageError."""
    path = find(file)
    content = read(path).value
    named = content.get("cluster") or DEFAULT_CLUSTER
    found = cluster_file(named, path) if content.get("backend") == "kubernetes" and isinstance(named, str) else None
    return validate(ClusterProfile, read(found), "cluster") if found is not None else None


def cluster_profile(named: str) -> ClusterProfile:
    """A shipped profile, or a file. Raises UsageError."""
    found = cluster_file(named, Path.cwd() / "pipeline")
    if found is None:
        raise usage_error(f"no such file or shipped cluster profile: {named!r}. {closest(named, list(shipped_clusters(shipped_folder())))}")
    return validate(ClusterProfile, read(found), "cluster")
