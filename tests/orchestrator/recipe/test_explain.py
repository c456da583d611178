"""Every field of every file has words, and every number a unit; paths in error messages can be explained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, get_args

import pytest
from pydantic import PositiveInt

from opensora.config import Frozen, Unit
from orchestrator.errors import UsageError
from orchestrator.recipe.explain import MODELS, Explained, Root, every_field, explain, json_schema

FIELDS = [field for root in get_args(Root) for field in every_field(root)]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_every_field_has_words(field: Explained) -> None:
    assert field.doc, f"{field.path} has no docstring"
    assert "\n" not in field.doc


def holds_number(node: Mapping[str, Any]) -> bool:
    """Whether a field's value is a number, or has some in it; of a model within it, that model's own fields tell."""
    inner = [*node.get("anyOf", ()), *node.get("prefixItems", ()), node.get("items"), node.get("additionalProperties")]
    return node.get("type") in ("integer", "number") or any(holds_number(each) for each in inner if isinstance(each, dict))


@pytest.mark.parametrize("root", get_args(Root))
def test_every_number_has_a_unit(root: Root) -> None:
    schema = json_schema(root)
    without = [
        f"{model['title']}.{name}"
        for model in [schema, *schema["$defs"].values()]
        for name, node in model["properties"].items()
        if holds_number(node) and not node.get("unit")
    ]
    assert not without, f"numbers without a unit (opensora.config.Unit): {', '.join(without)}"


def test_every_field_of_the_schemas_is_reached() -> None:
    for root in MODELS:
        schema = json_schema(root)
        models = [schema, *schema["$defs"].values()]
        expected = {name for model in models for name in model["properties"]}
        assert {field.path.rsplit(".", 1)[1] for field in every_field(root)} >= expected


def test_a_number_without_a_unit_is_found() -> None:
    class Forgotten(Frozen):
        """A file."""

        steps: Annotated[PositiveInt, Unit("optimizer steps")]
        """With one."""
        price: Decimal
        """Without; in JSON it may be text, too."""
        rates: tuple[float, float] | None = None
        """Without, and no plain number."""
        name: str
        """No number."""

    schema = Forgotten.model_json_schema()
    assert [name for name, node in schema["properties"].items() if holds_number(node) and "unit" not in node] == ["price", "rates"]


def test_a_field_shows_type_unit_default_and_words() -> None:
    assert explain("stage.optimizer.lr").subject == Explained(
        path="stage.optimizer.lr", type="number > 0", unit="per step", default="2e-05", doc="Learning rate, after the warm-up."
    )
    steps = explain("stage.steps").subject
    assert (steps.type, steps.unit, steps.default) == ("whole number >= 0", "optimizer steps", "required")
    assert explain("stage.ema_decay").subject.type == "number >= 0 and <= 1"
    assert explain("stage.model.patch").subject.type == "3 x whole number > 0"
    assert explain("backend").subject.type == "local | kubernetes"
    assert explain("stages.hang_timeout_s").subject.unit == "seconds"


def test_without_a_root_a_path_lies_in_the_pipeline() -> None:
    assert explain("stages.resources") == explain("pipeline.stages.resources")
    assert [field.path for field in explain("stages.resources").fields] == [
        "pipeline.stages.resources.nodes",
        "pipeline.stages.resources.devices_per_node",
        "pipeline.stages.resources.device",
        "pipeline.stages.resources.min_nodes",
        "pipeline.stages.resources.shrink_after_minutes",
    ]


def test_a_root_alone_shows_its_fields() -> None:
    assert {field.path for field in explain("stage").fields} >= {"stage.model", "stage.steps", "stage.evaluate"}
    assert explain("").subject.path == "pipeline"


def test_a_field_of_several_kinds_shows_each_kind_with_its_own_fields() -> None:
    explanation = explain("stage.objective")
    assert explanation.subject.type == "keys and values, kind: iddpm | flow"
    assert [field.path for field in explanation.fields] == [
        "stage.objective.iddpm",
        "stage.objective.iddpm.steps",
        "stage.objective.iddpm.min_snr",
        "stage.objective.flow",
        "stage.objective.flow.time",
        "stage.objective.flow.shift",
    ]
    assert explain("stage.autoencoder.kl.factor").subject.default == "8"
    assert explain("stage.autoencoder.patch.factor").subject.default == "4"


def test_a_device_of_a_price_list_may_be_named() -> None:
    assert explain("prices.devices.h800.usd_per_hour").subject.unit == "US dollars an hour"
    assert explain("prices.devices.h800.hardware.link_gb_s").subject.unit == "GB/s", "not seconds, though the name ends so"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("stage.optimiser", "stage.optimiser: no such field. Did you mean 'optimizer'?"),
        ("stages.resource", "pipeline.stages.resource: no such field. Did you mean 'resources'?"),
        ("stage.steps.x", "stage.steps.x: no such field. Known: none"),
        ("stage.objective.flaw", "stage.objective.flaw: no such field. Did you mean 'flow'?"),
    ],
)
def test_an_unknown_field_is_answered_with_the_closest(path: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(path)
    assert str(caught.value) == message


@pytest.mark.parametrize("root", get_args(Root))
def test_the_json_schema_is_json_with_words_for_editors(root: Root) -> None:
    schema = json.loads(json.dumps(json_schema(root)))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
