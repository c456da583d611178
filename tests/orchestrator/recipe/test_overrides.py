"""What flags and variables set, and how a wrong one is blamed."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import PIPELINE, STAGE, refusal, replaced

from orchestrator.errors import UsageError
from orchestrator.recipe.resolve import changed, load


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(recipe: Path) -> None:
    assert load(recipe).store == ".osctl/store"
    assert load(recipe, env={"OSCTL_HOME": "/h"}).store == "/h/store"
    replaced("pipeline.yaml", "name: small", "name: small\nstore: in-file")
    assert load(recipe, env={"OSCTL_HOME": "/h"}).store == "in-file"
    assert load(recipe, env={"OSCTL_STORE": "s3://b/env"}).store == "s3://b/env"
    assert load(recipe, env={"OSCTL_STORE": "s3://b/env"}, overrides={"store": "s3://b/flag"}).store == "s3://b/flag"


def test_every_scalar_of_the_pipeline_can_come_from_the_environment(recipe: Path) -> None:
    env = {
        "OSCTL_TRACKING": "none",
        "OSCTL_BACKEND": "kubernetes",
        "OSCTL_BUDGET_USD": "1e2",
        "OSCTL_FLUSH_S": "1",
        "OSCTL_EXPERIMENT": "7",
    }
    pipeline = load(recipe, env=env)
    assert (pipeline.tracking, pipeline.backend, pipeline.budget_usd, pipeline.flush_s, pipeline.experiment) == (
        "none",
        "kubernetes",
        100.0,
        1.0,
        "7",
    )


def test_an_empty_variable_says_nothing(recipe: Path) -> None:
    assert load(recipe, env={"OSCTL_STORE": ""}).store == ".osctl/store"


def test_overrides_reach_pipeline_stage_and_resources(recipe: Path) -> None:
    pipeline = load(
        recipe,
        overrides={
            "name": "other",
            "stage2.steps": "20",
            "stage2.optimizer.lr": "1e-3",
            "stage2.resources.devices_per_node": "2",
            "stages.stage1.max_attempts": "1",
            "stage2.parent.weights": "model",
            "stage2.prompts": "[a digit 4, a digit 5]",
            "stage1.evaluate": "null",
        },
    )
    first, second = pipeline.stages
    assert pipeline.name == "other"
    assert (second.config.steps, second.config.optimizer.lr, second.devices, second.config.parent.weights) == (20, 1e-3, 2, "model")
    assert second.config.prompts == ("a digit 4", "a digit 5")
    assert second.spec.parent == "stage1"
    assert (first.config.steps, first.config.optimizer.lr, first.devices, first.spec.max_attempts) == (10, 2e-5, 1, 1)
    assert first.config.evaluate is None


def test_a_stage_name_with_dots_is_no_path(recipe: Path) -> None:
    Path("pipeline.yaml").write_text(PIPELINE.replace("stage2\n", "stage1.b\n"))
    pipeline = load(recipe, overrides={"stage1.b.steps": "20"})
    assert [stage.config.steps for stage in pipeline.stages] == [10, 20]


def test_an_override_may_name_another_stage_file(recipe: Path) -> None:
    Path("long.yaml").write_text(STAGE.replace("steps: 10\nbatch", "steps: 99\nbatch"))
    assert load(recipe, overrides={"stage2.config": "long.yaml"}).stage("stage2").config.steps == 99


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage2.stpes", "5", "--set stage2.stpes=5: stpes: unknown key 'stpes'. Did you mean 'steps'?"),
        ("stage2.steps", "ten", "--set stage2.steps=ten: steps: expected a whole number, found 'ten'. See `osctl explain stage.steps`"),
        ("stage2.steps", "-5", "--set stage2.steps=-5: steps: must be at least 0, found -5. See `osctl explain stage.steps`"),
        (
            "stage2.resources.nodes",
            "0",
            "--set stage2.resources.nodes=0: stages.stage2.resources.nodes: must be above 0, found 0. "
            "See `osctl explain pipeline.stages.resources.nodes`",
        ),
        (
            "stage2.resources.node",
            "1",
            "--set stage2.resources.node=1: stages.stage2.resources.node: unknown key 'node'. Did you mean 'nodes'?",
        ),
        ("stage3.steps", "5", "--set stage3.steps=5: no stage or field 'stage3' in this pipeline. Did you mean 'stage2'?"),
        ("stor", "x", "--set stor=x: no stage or field 'stor' in this pipeline. Did you mean 'store'?"),
        (
            "stage2.steps",
            "[1",
            "--set stage2.steps=[1:1: not YAML: expected ',' or ']', but got '<stream end>'. Correct the line, or quote the value",
        ),
        (
            "stage2.parent",
            "stage9",
            "--set stage2.parent=stage9: stages.stage2.parent: no stage 'stage9' in this pipeline. Did you mean 'stage1'?",
        ),
    ],
)
def test_an_override_is_validated_like_the_file_and_blamed_by_its_own_words(recipe: Path, key: str, value: str, message: str) -> None:
    assert refusal(recipe, overrides={key: value}) == message


def test_a_variable_is_blamed_by_its_own_words(recipe: Path) -> None:
    message = refusal(recipe, env={"OSCTL_FLUSH_S": "fast"})
    assert message == "OSCTL_FLUSH_S=fast: flush_s: expected a number, found 'fast'. See `osctl explain pipeline.flush_s`"


@pytest.mark.parametrize("key", ["store", "tracking", "name", "cluster"])
def test_an_empty_value_is_refused_and_means_no_folder(recipe: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"{key}=.*is empty"):
        load(recipe, overrides={key: " "})


def test_a_field_of_the_cluster_profile_is_set_for_one_launch_and_kept_by_the_next(recipe: Path) -> None:
    where = {"backend": "kubernetes", "cluster.queue": "kueue", "cluster.kueue_queue": "train"}
    launched = load(recipe, overrides={**where, "cluster.kueue_priority": "urgent"})
    assert launched.cluster is not None and launched.cluster.kueue_priority == "urgent"
    again = changed(launched, {"cluster.kueue_priority": "later"})
    assert again.cluster is not None and (again.cluster.kueue_priority, again.cluster.kueue_queue) == ("later", "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"cluster.kueue_priority": "urgent"},
            "--set cluster.kueue_priority=urgent: this pipeline runs on this machine and has no cluster profile. Add --backend kubernetes",
        ),
        (
            {"backend": "kubernetes", "cluster.kueue_prio": "urgent"},
            "--set cluster.kueue_prio=urgent: kueue_prio: unknown key 'kueue_prio'. Did you mean 'kueue_priority'?",
        ),
    ],
)
def test_a_field_of_the_cluster_profile_is_blamed_by_its_own_words(recipe: Path, overrides: dict[str, str], message: str) -> None:
    assert refusal(recipe, overrides=overrides) == message


def test_a_label_of_nodes_has_dots_in_its_key(recipe: Path) -> None:
    overrides = {
        "backend": "kubernetes",
        "cluster.node_selector.nvidia.com/gpu.product": "NVIDIA-H100",
        'cluster.node_selector."a.b/c"': "x",
        "cluster.node_selector.plain": '"7"',
    }
    cluster = load(recipe, overrides=overrides).cluster
    assert cluster is not None
    assert cluster.node_selector.items() >= {"nvidia.com/gpu.product": "NVIDIA-H100", "a.b/c": "x", "plain": "7"}.items()
    with pytest.raises(UsageError, match=r"node_selector: expected a label's key .* found 'a b'"):
        load(recipe, overrides={"backend": "kubernetes", "cluster.node_selector.a b": "x"})
