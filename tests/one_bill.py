"""Everybody who says what a pipeline cost, asked one after the other: CLI, and MLflow over REST."""

from __future__ import annotations

import json
import re
import urllib.request
from decimal import Decimal
from typing import Any

import pytest
from tiny_recipe import Osctl

CENT = Decimal("0.01")


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/{path}", json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def shown(url: str, experiment: str) -> dict[str, dict[str, Any]]:
    """By key of a run: its readings, in dollars and hours."""
    number = ask(url, f"experiments/get-by-name?experiment_name={experiment}")["experiment"]["experiment_id"]
    runs = ask(url, "runs/search", {"experiment_ids": [number], "max_results": 1000})["runs"]
    return {
        next(tag["value"] for tag in run["data"]["tags"] if tag["key"] == "osctl/run_key"): {
            metric["key"]: metric["value"] for metric in run["data"]["metrics"]
        }
        for run in runs
    }


def cents(usd: Any) -> Decimal:
    return Decimal(str(usd)).quantize(CENT)


def agree(osctl: Osctl, url: str, name: str, *options: str) -> Decimal:
    """What all of them say is the sum; asserts that they say the same."""
    rows = osctl.json("cost", *options)
    attempts = osctl.json("cost", "--by-attempt", *options)
    status = osctl.json("status", *options)
    compared = osctl.json("compare", *options)
    listed = next(
        row for row in osctl.json("list", *(options[options.index("--store") :] if "--store" in options else ())) if row["name"] == name
    )
    runs = shown(url, name)
    total = sum(Decimal(row["usd"]) for row in rows)
    said = {
        "cost --by-attempt": sum(Decimal(row["usd"]) for row in attempts),
        "status": status["usd"],
        "status, stages": sum(Decimal(stage["usd"]) + Decimal(stage["earlier_usd"]) for stage in status["stages"]),
        "compare": sum(Decimal(line["usd"]) + Decimal(line["earlier_usd"]) for line in compared),
        "list": listed["usd"],
        "MLflow, pipeline": runs[name]["usd"],
        "MLflow, attempts": sum(readings["usd"] for key, readings in runs.items() if re.search(r"/a\d+$", key)),
    }
    assert {who: cents(usd) for who, usd in said.items()} == dict.fromkeys(said, cents(total))
    assert runs[name]["device_hours"] == pytest.approx(sum(row["device_hours"] for row in rows))
    return total
