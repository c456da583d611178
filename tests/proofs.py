"""Long versions of the laws (`scripts/prove`), one law at a time, and the sum of their trials.

A test marked `prove("LAW")` proves a law; without a name, the law is called as the test is. Its fixture `proof` gives a seed that no
earlier piece of the same code has used, and takes the number of its trials. What each piece found is added to `.proofs/CODE.jsonl`, where
CODE is a digest of the code that is proved: trials of the same code add up, and another code begins at none.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
PROVED = ("opensora", "orchestrator", "configs", "uv.lock")
CONFIDENCE = 0.95


def code_digest() -> str:
    """12 hex digits over every file of the product, as it lies in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", *PROVED], cwd=REPOSITORY, capture_output=True, check=True
    )
    sums = hashlib.sha256()
    for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
        if (REPOSITORY / name).is_file():
            sums.update(f"{name}\0{hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()}\n".encode())
    return sums.hexdigest()[:12]


def record_path() -> Path:
    return Path(os.environ.get("OSCTL_PROOFS") or REPOSITORY / ".proofs") / f"{code_digest()}.jsonl"


def pieces(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def upper_bound(failures: int, trials: int) -> float:
    """Of the rate of failures, with 95% confidence (Clopper-Pearson, one-sided)."""
    from scipy.stats import beta

    return 1.0 if failures >= trials else float(beta.ppf(CONFIDENCE, failures + 1, trials - failures))


@dataclass
class Proof:
    law: str
    seed: int
    """Of this piece. Pieces of the same code draw from different seeds, so that their trials may be added."""
    trials: int = 0
    failures: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, trials: int = 1, note: str = "") -> None:
        """So many trials have held. A trial that does not hold fails its test, which counts as one failure."""
        self.trials += trials
        self.notes += [note] if note else []


def law_of(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("prove")
    if mark is None:
        return None
    return str(mark.args[0]) if mark.args else str(getattr(item, "originalname", item.name)).removeprefix("test_").replace("_", "-")


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Iterator[Proof]:
    """For tests marked `prove`."""
    law = law_of(request.node)
    assert law is not None, "a test that takes `proof` is marked prove"
    earlier = [piece for piece in pieces(record_path()) if piece["law"] == law]
    found = Proof(law, seed=len(earlier))
    request.node.stash[PROOF] = found
    yield found


PROOF = pytest.StashKey[Proof]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--law", metavar="LAW", help="with -m prove: this law alone")
    parser.addoption("--laws", action="store_true", help="with -m prove: run nothing, print each law with its trials so far")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    law = config.getoption("--law")
    if law is not None:
        known = sorted({named for item in items if (named := law_of(item)) is not None})
        if law not in known:
            raise pytest.UsageError(f"scripts/prove {law}: no such law; there are {', '.join(known)}")
        items[:] = [item for item in items if law_of(item) == law]
    if config.getoption("--laws"):
        print(table(sorted({named for item in items if (named := law_of(item)) is not None}), pieces(record_path())))
        items[:] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    law = law_of(item)
    if law is not None and report.when == "call" and report.outcome in ("passed", "failed"):
        found = item.stash.get(PROOF, Proof(law, 0, trials=1))
        path = record_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        failures = int(report.failed)
        piece = {
            "law": law,
            "test": item.nodeid,
            "trials": max(found.trials, failures),
            "failures": failures,
            "seconds": round(call.duration, 1),
            "seed": found.seed,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "notes": found.notes,
        }
        with path.open("a") as file:
            file.write(json.dumps(piece) + "\n")
    return report


def table(laws: list[str], found: list[dict[str, Any]]) -> str:
    """One line a law: pieces, trials, failures, bound, seconds."""
    rows = [("law", "trials", "failures", "95% bound", "seconds", "pieces")]
    for law in laws:
        mine = [piece for piece in found if piece["law"] == law]
        trials, failures = sum(piece["trials"] for piece in mine), sum(piece["failures"] for piece in mine)
        bound = f"{100 * upper_bound(failures, trials):.2g}%" if trials else "·"
        rows.append((law, str(trials), str(failures), bound, f"{sum(piece['seconds'] for piece in mine):,.0f}", str(len(mine))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([*lines, f"code {code_digest()}, {time.strftime('%Y-%m-%d')}"])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    law = config.getoption("--law")
    if law is not None:
        terminalreporter.section("proved so far")
        terminalreporter.write_line(table([law], pieces(record_path())))
