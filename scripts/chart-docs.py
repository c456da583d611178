"""Writes what helm/osctl says of itself: README.md from values.yaml, and the profile's part of values.schema.json from ClusterProfile.

    .venv/bin/python scripts/chart-docs.py            writes both
    .venv/bin/python scripts/chart-docs.py --check    exit 1 where one is not current

Owns those two files' generated parts. Refuses a value without a `# --` comment.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from orchestrator.recipe.cluster_profile import PINNED, ClusterProfile

CHART = Path(__file__).parent.parent / "helm/osctl"
OURS = ("namespace", "service_account", "driver_service_account")
"""Fields of a profile that the chart says itself."""
PROSE = "# -- "
DECIMAL = r"^[0-9]+(\.[0-9]+)?$"

INTRODUCTION = """\
# helm/osctl

What osctl needs in a cluster for good: service accounts, roles and network policies (those of `k8s/base`; a test compares them), MLflow,
and a cluster profile that `osctl --cluster` reads. Jobs are not in it: `osctl launch` makes them. Credentials are not in it either, only
the names of Secrets. Names are fixed (`osctl-mlflow`, `osctl-driver`, ...), so one release a namespace.

    kubectl apply -k k8s/namespace          # the namespace with its Pod Security labels, which Helm cannot set
    kubectl apply -k k8s/priority           # PriorityClasses: cluster-wide, by an administrator
    helm install osctl helm/osctl -n osctl -f my-values.yaml
    helm test osctl -n osctl                # MLflow answers, the store holds its conditional writes

Tried with Helm 4.1.4 on Kubernetes 1.34.1 (`tests/cluster/test_deploy.py`: install, test, upgrade, rollback, uninstall). `ci/*.yaml` are
complete values of sites. Where `kubectl apply -k` of an overlay in `k8s/overlays` made accounts, roles and policies, install with
`base.create: false`. The network policies are checked for structure only: no cluster of the tests enforces them.

MLflow has no login: whoever reaches its port may read and change everything in it. The policy lets in the driver alone, people come by
`kubectl port-forward`; put a proxy with a login before it if you publish it.

Written by `scripts/chart-docs.py`; change the comments in `values.yaml`.
"""


def main(arguments: list[str]) -> int:
    values = (CHART / "values.yaml").read_text()
    schema_path = CHART / "values.schema.json"
    schema = json.loads(schema_path.read_text())
    profile, definitions = profile_schema()
    schema["properties"]["profile"] = profile
    schema["$defs"] = definitions
    wanted = {schema_path: json.dumps(schema, indent=2) + "\n", CHART / "README.md": readme(values, profile)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(CHART.parent.parent)}: is not current; run .venv/bin/python scripts/chart-docs.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(CHART.parent.parent)}")
    return 0


def profile_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON schema of `profile`, and the definitions it refers to."""
    schema = ClusterProfile.model_json_schema()
    definitions = _for_helm(schema.pop("$defs", {}))
    properties = {name: _for_helm(field) for name, field in schema["properties"].items() if name not in OURS}
    for name, field in properties.items():
        field.setdefault("description", _described(name))
    pinned = {"pattern": PINNED.pattern}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": schema["required"],
        "properties": properties,
        # Which images `allow_unpinned` names is compared by the templates: a schema cannot.
        "if": {"not": {"required": ["allow_unpinned"], "properties": {"allow_unpinned": {"minItems": 1}}}},
        "then": {"properties": {"image": pinned, "driver_image": pinned}},
    }, definitions


def _for_helm(schema: Any) -> Any:
    """Without titles. What pydantic takes as a number or as any text is a decimal, and its text is told so."""
    if isinstance(schema, list):
        return [_for_helm(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _for_helm(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    choices = kept.get("anyOf", [])
    if {"type": "string"} in choices and any(choice.get("type") == "number" for choice in choices):
        kept["anyOf"] = [{**choice, "pattern": DECIMAL} if choice == {"type": "string"} else choice for choice in choices]
    return kept


def _described(name: str) -> str:
    """The docstring below a field of ClusterProfile."""
    source = Path(sys.modules[ClusterProfile.__module__].__file__ or "").read_text().partition("class ClusterProfile")[2]
    found = re.search(rf'^    {name}: .*\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"orchestrator/recipe/cluster_profile.py: {name} has no docstring that could be shown")
    return " ".join(found[1].split())


def readme(values: str, profile: dict[str, Any]) -> str:
    lines = [INTRODUCTION, "## Values", "", "| value | default | what |", "|---|---|---|"]
    lines += [f"| `{path}` | `{json.dumps(default)}` | {_cell(text)} |" for path, default, text in documented(values)]
    lines += ["", "### `profile`", "", "| field | default | what |", "|---|---|---|"]
    for name, field in profile["properties"].items():
        default = "required" if name in profile["required"] else f"`{json.dumps(field.get('default'))}`"
        default = "`{}`" if name == "node_selector" else default  # a default that is made anew has none in a schema
        lines.append(f"| `{name}` | {default} | {_cell(field['description'])} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def documented(values: str) -> list[tuple[str, Any, str]]:
    """(dotted path, default, text) of every value that carries a comment. Raises SystemExit for one that carries none."""
    defaults, found, stack, text = yaml.safe_load(values), [], [], ""
    for number, line in enumerate(values.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith(PROSE):
            text = stripped.removeprefix(PROSE)
        elif stripped.startswith("#") and text:
            text += " " + stripped.removeprefix("#").strip()
        elif match := re.match(r"( *)(\w+):", line):
            stack = [*stack[: len(match[1]) // 2], match[2]]
            default = defaults
            for name in stack:
                default = default[name]
            if text:
                found.append((".".join(stack), default, text))
            elif not (isinstance(default, dict) and default):
                raise SystemExit(f"helm/osctl/values.yaml:{number}: {'.'.join(stack)} has no `# --` comment")
            text = ""
        elif not stripped:
            text = ""
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
