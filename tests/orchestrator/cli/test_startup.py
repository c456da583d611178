"""What a command may import: `osctl --help` answers at once because it imports typer and nothing that is heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SDKS = ("torch", "mlflow", "boto3", "botocore", "kubernetes", "kubeflow", "urllib3", "fsspec", "numpy")
HEAVY = (*SDKS, "pydantic", "yaml", "rich", "psutil")

PROBE = """
import sys
sys.argv = {argv!r}
from orchestrator.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def imported(*argv: str) -> str:
    code = PROBE.format(argv=["osctl", *argv], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.strip().splitlines()[-1]


def test_help_imports_nothing_heavy() -> None:
    assert imported("--help") == "[]"


@pytest.mark.parametrize("command", ["launch", "sample", "encode", "logs", "doctor"])
def test_help_of_a_command_imports_pydantic_at_most(command: str) -> None:
    """typer itself imports pydantic when it parses a command (0.29), 0.1 CPU-s that are not ours to save."""
    assert imported(command, "--help") in ("[]", "['pydantic']")


def test_a_plan_imports_no_sdk_and_no_torch() -> None:
    heavy = imported("plan", "-f", "open-sora-1.0")
    assert "pydantic" in heavy, "the probe sees what is imported"
    assert not any(name in heavy for name in SDKS)


def test_a_local_pipeline_never_imports_a_kubernetes_client(tmp_path: Path) -> None:
    for command in (("launch", "--dry-run"), ("status",)):
        heavy = imported(*command, "-f", "demo", "--store", str(tmp_path))
        assert "pydantic" in heavy and not any(name in heavy for name in SDKS), command
