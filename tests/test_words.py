"""Paths and addresses in the product's own words: messages, docstrings, help, pages, configurations, manifests. What they name is there."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

REPOSITORY = Path(__file__).parent.parent
ROOMS = ("docs", "k8s", "helm", "configs", "scripts", "bench", "tests", "opensora", "orchestrator")
PATH = re.compile(rf"(?<![\w./@$}}:-])(?:\./)?((?:{'|'.join(ROOMS)})/[\w.@/+-]*[\w/])(?![\w*<{{…])")
LINK = re.compile(r"\]\(([^)\s]+)\)")
URL = re.compile(r"https?://[^\s\"'`<>)\]}|\\,;]+")
MADE = ("orchestrator/configs",)
"""What building a package makes."""
OLD = ("CHANGELOG.md", "docs/log.md", "docs/adr/")
"""Pages that tell what was: they may name what is gone."""


@cache
def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


def spoken() -> list[str]:
    """Files whose words a person may read: all text but tests, locks and what was recorded."""
    kept = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".tpl", ".txt", "Dockerfile", ".json", ".csv")
    return [
        name
        for name in files()
        if (name.endswith(kept) or name.startswith("scripts/")) and not name.startswith("tests/") and name != "uv.lock"
    ]


def words(name: str) -> str:
    return (REPOSITORY / name).read_text(errors="replace")


@pytest.mark.parametrize("name", [name for name in spoken() if not name.startswith(OLD)])
def test_a_path_that_is_named_is_there(name: str) -> None:
    """`osctl doctor` sent people to docs/cluster.md, which was never written."""
    known = {*files(), *(str(parent) for path in files() for parent in Path(path).parents)}
    missing = []
    for found in PATH.findall(words(name)):
        path = found.rstrip("/.")
        candidates = (path, f"{path}.py", f"{path}.yaml", f"{path}.md", f"orchestrator/{path}")
        placeholder = Path(path).stem.isupper() and Path(path).suffix == ".yaml"  # configs/clusters/NAME.yaml
        if not placeholder and path not in MADE and not any(one in known for one in candidates):
            missing.append(found)
    assert not missing, f"{name} names what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("name", [name for name in spoken() if name.endswith(".md")])
def test_a_link_leads_to_a_file_and_to_a_heading(name: str) -> None:
    missing = []
    for link in LINK.findall(words(name)):
        target, _, heading = link.partition("#")
        if urlsplit(link).scheme:
            continue
        base = (REPOSITORY / name).parent
        path = base / target if target else REPOSITORY / name
        if not path.exists() or (heading and path.is_file() and heading not in headings(path)):
            missing.append(link)
    assert not missing, f"{name} links to what is not there: {', '.join(missing)}"


def headings(path: Path) -> set[str]:
    """As GitHub makes anchors of them."""
    lines = [line.lstrip("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", spoken())
def test_an_address_is_one(name: str) -> None:
    """Of other hosts by its form alone: nobody is asked."""
    for found in URL.findall(words(name)):
        parts = urlsplit(found.rstrip(".:"))
        if any(sign in found for sign in "${…*%") or not parts.netloc:
            continue
        assert re.fullmatch(r"(?:[\w.-]+(?::[\w.-]*)?@)?[A-Za-z0-9_.-]+(?::(?:\d+|port))?", parts.netloc), f"{name}: {found}"
