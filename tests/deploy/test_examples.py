"""k8s/examples: what `osctl render` prints, to the byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml
from deploy.rendering import REPOSITORY
from deploy.restricted import pods, weaknesses
from pod_security import violations

EXAMPLES = REPOSITORY / "k8s/examples"


def test_examples_are_what_osctl_render_prints(tmp_path: Path) -> None:
    subprocess.run([REPOSITORY / "scripts/render-examples", tmp_path], check=True, timeout=60)
    rendered = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in EXAMPLES.iterdir()}
    assert kept == rendered, "after a change that is meant, run scripts/render-examples and read the diff"


def test_examples_pods_are_restricted() -> None:
    examples = sorted(EXAMPLES.iterdir())
    assert examples
    for path in examples:
        found = [(manifest["kind"], pod) for manifest in yaml.safe_load_all(path.read_text()) for _, pod in pods(manifest)]
        assert [kind for kind, _ in found].count("Job") == 1 and len(found) >= 4
        for kind, pod in found:
            assert not violations(pod) and not weaknesses(pod, token=kind == "Job")
