"""What is shipped loads; what a person gets wrong is one line with file, line, key, both values and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_recipe import PIPELINE, STAGE, refusal, replaced

from opensora.config import IDDPM, FolderSource, KLAutoencoder, ManifestSource, StageConfig, read_stage
from orchestrator.errors import UsageError
from orchestrator.recipe.files import find, shipped, shipped_folder
from orchestrator.recipe.resolve import load
from orchestrator.recipe.yaml_file import read, validate

# What is shipped


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_pipeline_loads(name: str) -> None:
    pipeline = load(find(name))
    assert pipeline.name == name
    assert pipeline.stages[0].name == "stage1"


@pytest.mark.parametrize("path", sorted(shipped_folder().glob("*/stage*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_stage_file_loads_in_a_pipeline_or_beside_it(path: Path) -> None:
    assert validate(StageConfig, read(path), "stage").batch_size >= 1


def test_a_stage_file_means_the_same_to_the_trainer_and_to_the_control_plane() -> None:
    for stage in load(find("open-sora-1.0")).stages:
        assert read_stage(shipped_folder() / "open-sora-1.0" / stage.spec.config) == stage.config


def test_open_sora_1_0_has_the_published_numbers() -> None:
    pipeline = load(find("open-sora-1.0"))
    rows = {}
    for stage in pipeline.stages:
        source = stage.config.data.source
        assert isinstance(source, ManifestSource)
        data = stage.config.data
        rows[stage.name] = (source.clips, stage.config.steps, stage.config.batch_size, stage.devices, data.frames, data.height, data.width)
    assert rows == {
        "stage1": (366_000, 0, 8, 1, 1, 512, 512),
        "stage2": (366_000, 80_000, 8, 64, 16, 256, 256),
        "stage3a": (20_000, 24_000, 8, 64, 16, 256, 256),
        "stage3b": (20_000, 20_000, 2, 64, 16, 512, 512),
    }
    published = {
        stage.name: (stage.spec.published.gpu_hours, stage.spec.published.usd) for stage in pipeline.stages if stage.spec.published
    }
    assert published == {"stage1": (0, 0), "stage2": (2808, 7000), "stage3a": (1080, 2531.25), "stage3b": (840, 1968.75)}
    assert [stage.spec.parent for stage in pipeline.stages] == [None, "stage1", "stage2", "stage3a"]


@pytest.mark.parametrize(
    ("stage", "space_scale", "micro_batch", "every"),
    [("stage2", 0.5, 16, 1000), ("stage3a", 0.5, 16, 1000), ("stage3b", 1.0, 128, 500)],
)
def test_open_sora_1_0_trains_as_its_files_said(stage: str, space_scale: float, micro_batch: int, every: int) -> None:
    config = load(find("open-sora-1.0")).stage(stage).config
    assert (config.model.depth, config.model.width, config.model.heads, config.model.patch) == (28, 1152, 16, (1, 2, 2))
    assert (config.model.space_scale, config.model.time_scale, config.data.frame_interval) == (space_scale, 1.0, 3)
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.optimizer.decay) == (2e-5, 0, "constant")
    assert (config.optimizer.weight_decay, config.optimizer.grad_clip, config.ema_decay, config.seed) == (0.0, 1.0, 0.9999, 42)
    assert config.objective == IDDPM(kind="iddpm", steps=1000)
    assert isinstance(config.autoencoder, KLAutoencoder)
    assert (config.autoencoder.scale, config.autoencoder.micro_batch) == (0.18215, micro_batch)
    assert (config.sampling.steps, config.sampling.guidance, config.sampling.guidance_channels) == (100, 7.0, "first3")
    assert (config.activations.recompute, config.dtype, config.checkpoint.every_steps) == ("auto", "bf16", every)
    assert config.parent.weights == "ema"


def test_stage1_is_an_import_and_can_be_trained_by_one_override() -> None:
    imported = load(find("open-sora-1.0")).stage("stage1").config
    assert (imported.steps, imported.weights) == (0, "/weights/PixArt-XL-2-512x512.pth")
    trained = load(find("open-sora-1.0"), overrides={"stage1.config": "stage1-train.yaml"}).stage("stage1").config
    assert (trained.weights, trained.freeze, trained.data.frames) == (None, "temporal", 1)
    assert trained.steps > 0


# Finding


# Precedence


def test_the_experiment_is_the_pipelines_name_unless_it_has_its_own(recipe: Path) -> None:
    assert load(recipe).experiment == "small"
    assert load(recipe, overrides={"experiment": "other"}).experiment == "other"


def test_one_stage_file_can_serve_two_stages(recipe: Path) -> None:
    replaced("pipeline.yaml", "config: stage2.yaml", "config: stage1.yaml")
    assert [stage.config.steps for stage in load(recipe, overrides={"stage2.steps": "20"}).stages] == [10, 20]


def test_local_paths_of_a_stage_file_are_relative_to_it_and_those_of_a_flag_to_the_shell(recipe: Path) -> None:
    Path("sub").mkdir()
    Path("sub/stage.yaml").write_text(STAGE.replace("{kind: digits, clips: 100}", "{kind: folder, path: clips}"))
    replaced("pipeline.yaml", "config: stage1.yaml", "config: sub/stage.yaml")
    here = Path.cwd()

    def path_of(**overrides: str) -> str:
        source = load(recipe, overrides=overrides).stages[0].config.data.source
        assert isinstance(source, FolderSource)
        return source.path

    assert path_of() == str(here / "sub" / "clips")
    assert path_of(**{"stage1.data.source.path": "clips"}) == str(here / "clips")
    assert path_of(**{"stage1.data.source.path": "s3://bucket/clips"}) == "s3://bucket/clips"
    assert load(recipe, overrides={"stage1.weights": "w.safetensors"}).stages[0].config.weights == str(here / "w.safetensors")


# Order of stages


def test_parents_come_before_children_and_otherwise_the_files_order_holds(recipe: Path) -> None:
    Path("pipeline.yaml").write_text(
        "name: small\nstages:\n"
        + "".join(
            f"  - {{name: {name}, config: stage1.yaml{f', parent: {parent}' if parent else ''}}}\n"
            for name, parent in [("d", "b"), ("c", None), ("b", "a"), ("a", None)]
        )
    )
    assert [stage.name for stage in load(recipe).stages] == ["a", "b", "d", "c"]


# What a person gets wrong: (file, what to replace, by what, the whole message)

BAD = [
    ("pipeline.yaml", "name: small", "name: small\nstor: x", "pipeline.yaml:2: stor: unknown key 'stor'. Did you mean 'store'?"),
    (
        "pipeline.yaml",
        "    parent: stage1",
        "    parent: stage1\n    resources: {node: 2}",
        "pipeline.yaml:8: stages.stage2.resources.node: unknown key 'node'. Did you mean 'nodes'?",
    ),
    (
        "pipeline.yaml",
        "    parent: stage1",
        "    parent: stage1\n    resources: {nodes: -2}",
        "pipeline.yaml:8: stages.stage2.resources.nodes: must be above 0, found -2. See `osctl explain pipeline.stages.resources.nodes`",
    ),
    (
        "pipeline.yaml",
        "parent: stage1",
        "parent: stage0",
        "pipeline.yaml:7: stages.stage2.parent: no stage 'stage0' in this pipeline. Did you mean 'stage1'?",
    ),
    (
        "pipeline.yaml",
        "parent: stage1",
        "parent: stage2",
        "pipeline.yaml:7: stages.stage2.parent: stages start from each other: stage2 -> stage2. Let one have no parent",
    ),
    (
        "pipeline.yaml",
        "    config: stage1.yaml\n",
        "    config: stage1.yaml\n    parent: stage2\n",
        "pipeline.yaml:5: stages.stage1.parent: stages start from each other: stage1 -> stage2 -> stage1. Let one have no parent",
    ),
    (
        "pipeline.yaml",
        "name: stage2",
        "name: stage1",
        "pipeline.yaml:5: stages.stage1.name: 'stage1' names two stages, number 1 and number 2. Rename one",
    ),
    (
        "pipeline.yaml",
        "name: stage2",
        "name: Stage 2",
        "pipeline.yaml:5: stages.Stage 2.name: expected lower-case letters a-z, digits, '-' and '.', from a letter to a letter or digit, "
        "at most 40; found 'Stage 2'. "
        "See `osctl explain pipeline.stages.name`",
    ),
    (
        "pipeline.yaml",
        "config: stage2.yaml",
        "config: stage3.yaml",
        "pipeline.yaml:6: stages.stage2.config: no such file: stage3.yaml. The path is relative to the pipeline file; correct it",
    ),
    (
        "pipeline.yaml",
        "name: small",
        "name: small\nbackend: slurm",
        "pipeline.yaml:2: backend: expected 'local' or 'kubernetes', found 'slurm'. See `osctl explain pipeline.backend`",
    ),
    ("pipeline.yaml", "name: small\n", "", "pipeline.yaml: name: is missing, and has no default. See `osctl explain pipeline.name`"),
    (
        "pipeline.yaml",
        "name: small",
        "name: small\ntrainer: python",
        "pipeline.yaml:2: trainer: expected a list, found 'python'. See `osctl explain pipeline.trainer`",
    ),
    ("stage2.yaml", "steps: 10\nbatch", "stpes: 10\nbatch", "stage2.yaml:11: stpes: unknown key 'stpes'. Did you mean 'steps'?"),
    ("stage2.yaml", "clips: 100", "clip: 100", "stage2.yaml:4: data.source.clip: unknown key 'clip'. Did you mean 'clips'?"),
    (
        "stage2.yaml",
        "depth: 2",
        "depht: 2",
        "stage2.yaml:1: model.depht: unknown key 'depht'. Did you mean 'depth'?",
    ),
    (
        "stage2.yaml",
        "text: {kind: words}",
        "text: {kind: words, xyz: 1}",
        "stage2.yaml:9: text.xyz: unknown key 'xyz'. Known: kind",
    ),
    (
        "stage2.yaml",
        "steps: 10\nbatch",
        "steps: ten\nbatch",
        "stage2.yaml:11: steps: expected a whole number, found 'ten'. See `osctl explain stage.steps`",
    ),
    (
        "stage2.yaml",
        "steps: 10\nbatch",
        "steps: '10'\nbatch",
        "stage2.yaml:11: steps: expected a whole number, found '10'. See `osctl explain stage.steps`",
    ),
    (
        "stage2.yaml",
        "steps: 10\nbatch",
        "steps: 1.5\nbatch",
        "stage2.yaml:11: steps: expected a whole number, found 1.5. See `osctl explain stage.steps`",
    ),
    (
        "stage2.yaml",
        "steps: 10\nbatch",
        "steps: true\nbatch",
        "stage2.yaml:11: steps: expected a whole number, found true. See `osctl explain stage.steps`",
    ),
    (
        "stage2.yaml",
        "steps: 10\nbatch",
        "steps:\nbatch",
        "stage2.yaml:11: steps: expected a whole number, found nothing. See `osctl explain stage.steps`",
    ),
    (
        "stage2.yaml",
        "steps: 10\nbatch",
        "steps: -5\nbatch",
        "stage2.yaml:11: steps: must be at least 0, found -5. See `osctl explain stage.steps`",
    ),
    (
        "stage2.yaml",
        "batch_size: 4",
        "batch_size: 4\noptimizer: {lr: -1.0e-3}",
        "stage2.yaml:13: optimizer.lr: must be above 0, found -0.001. See `osctl explain stage.optimizer.lr`",
    ),
    (
        "stage2.yaml",
        "batch_size: 4",
        "batch_size: 4\noptimizer: {lr: .inf}",
        "stage2.yaml:13: optimizer.lr: expected a finite number, found inf. See `osctl explain stage.optimizer.lr`",
    ),
    (
        "stage2.yaml",
        "batch_size: 4",
        "batch_size: 4\nema_decay: 1.5",
        "stage2.yaml:13: ema_decay: must be at most 1, found 1.5. See `osctl explain stage.ema_decay`",
    ),
    (
        "stage2.yaml",
        "batch_size: 4",
        "batch_size: 4\noptimizer: fast",
        "stage2.yaml:13: optimizer: expected keys and values, found 'fast'. See `osctl explain stage.optimizer`",
    ),
    (
        "stage2.yaml",
        "batch_size: 4",
        "batch_size: 4\noptimizer: {betas: [0.9]}",
        "stage2.yaml:13: optimizer.betas.1: is missing, and has no default. See `osctl explain stage.optimizer.betas`",
    ),
    (
        "stage2.yaml",
        "{kind: flow}",
        "{kind: flaw}",
        "stage2.yaml:2: objective: kind: expected 'iddpm' or 'flow', found 'flaw'. See `osctl explain stage.objective`",
    ),
    (
        "stage2.yaml",
        "{kind: flow}",
        "flow",
        "stage2.yaml:2: objective: expected keys and values, found 'flow'. See `osctl explain stage.objective`",
    ),
    (
        "stage2.yaml",
        "method: euler",
        "method: ddim",
        "stage2.yaml: sampling method ddim does not belong to objective flow. Use euler or heun. See `osctl explain stage`",
    ),
    (
        "stage2.yaml",
        "  height: 16",
        "  height: 15",
        "stage2.yaml: data.height 15 is not a multiple of 8 (autoencoder factor 4 x patch 2). See `osctl explain stage`",
    ),
    (
        "stage2.yaml",
        "heads: 4",
        "heads: 5",
        "stage2.yaml:1: model: width 32 is not a multiple of heads 5. See `osctl explain stage.model`",
    ),
    ("stage2.yaml", "batch_size: 4", "batch_size: 4\nsteps: 3", "stage2.yaml:13: steps: given twice, first on line 11. Remove one"),
    ("stage2.yaml", STAGE, "- a\n", "stage2.yaml: expected keys and values, found a list of 1. See `osctl explain`"),
    (
        "stage2.yaml",
        "batch_size: 4",
        "batch_size: 4\nweights: /w",
        "stage2.yaml:13: weights: imports '/w', but the stage starts from its parent 'stage1'. Remove one of the two",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "message"), BAD, ids=[f"{number:02}" for number in range(len(BAD))])
def test_a_mistake_is_answered_by_one_line(recipe: Path, file: str, old: str, new: str, message: str) -> None:
    replaced(file, old, new)
    assert refusal(recipe) == message


@pytest.mark.parametrize(
    ("old", "new", "key", "own", "inherited"),
    [
        ("depth: 2", "depth: 3", "model.depth", "3", "2"),
        ("width: 32", "width: 64", "model.width", "64", "32"),
        ("heads: 4", "heads: 2", "model.heads", "2", "4"),
        ("latent_channels: 4", "latent_channels: 8", "model.latent_channels", "8", "4"),
        ("caption_width: 16", "caption_width: 8", "model.caption_width", "8", "16"),
        ("caption_tokens: 8", "caption_tokens: 9", "model.caption_tokens", "9", "8"),
        ("depth: 2", "depth: 2, patch: [2, 2, 2]", "model.patch", "[2, 2, 2]", "[1, 2, 2]"),
        ("{kind: patch}", "{kind: patch, factor: 2}", "autoencoder.factor", "2", "4"),
        ("{kind: words}", "{kind: t5, path: a/b}", "text.kind", "t5", "words"),
    ],
)
def test_a_stage_that_cannot_take_its_parents_weights_is_refused_before_anything_runs(
    recipe: Path, old: str, new: str, key: str, own: str, inherited: str
) -> None:
    replaced("stage2.yaml", old, new)
    message = refusal(recipe)
    assert message.endswith(
        f": {key}: is {own}, but its parent 'stage1' has {inherited}, and weights are carried over. Make them equal, or remove the parent"
    )
    assert message.startswith("stage2.yaml:")


def test_a_chain_from_flow_to_iddpm_is_refused(recipe: Path) -> None:
    replaced("stage2.yaml", "{kind: flow}", "{kind: iddpm}")
    replaced("stage2.yaml", "method: euler", "method: ddim")
    assert "objective.kind: is iddpm, but its parent 'stage1' has flow" in refusal(recipe)


def test_frames_and_size_may_change_between_stages(recipe: Path) -> None:
    replaced("stage2.yaml", "  height: 16", "  height: 32")
    replaced("stage2.yaml", "  frames: 8\n", "  frames: 16\n")
    assert load(recipe).stage("stage2").config.latent_shape == (4, 16, 8, 4)


BAD_NAMES = ["StageOne", "étape", "阶段", "stage 1", "..", "-q", "s@1", "s/1", "a" * 63, "1st", "a-", ""]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("what", ["pipeline", "stage", "parent"])
def test_a_name_that_is_none_is_shown_with_the_rule(recipe: Path, what: str, name: str) -> None:
    """`stages: expected at least 1 items, found 0` was the answer: the wrong stage had been left out before the others were counted."""
    content = yaml.safe_load(PIPELINE)
    if what == "pipeline":
        content["name"] = name
    else:
        content["stages"][1]["name" if what == "stage" else "parent"] = name
    for stages in ([*content["stages"]], content["stages"][1:]):
        Path("pipeline.yaml").write_text(yaml.safe_dump({**content, "stages": stages}, allow_unicode=True))
        said = refusal(recipe)
        assert "lower-case letters a-z, digits, '-' and '.', from a letter to a letter or digit, at most 40" in said
        assert f"found {name[:30]!r}"[:-1] in said
        assert (f"({len(name)} characters)" in said) == (len(name) > 40)
        assert "items" not in said and said.count("\n") == 0


@pytest.mark.parametrize(
    ("where", "value", "fact"),
    [
        ("stages", [], "expected at least 1 items, found 0"),
        ("stages", [7], "stages.0: expected keys and values, found 7"),
        ("stages", [{"name": "stage1", "config": "stage1.yaml", "max_attempts": 0}], "max_attempts: must be above 0, found 0"),
        ("trainer", ["train", 7], "trainer.1: expected text, found 7"),
    ],
)
def test_of_a_list_the_wrong_item_is_named(recipe: Path, where: str, value: object, fact: str) -> None:
    Path("pipeline.yaml").write_text(yaml.safe_dump({**yaml.safe_load(PIPELINE), where: value}))
    assert fact in refusal(recipe)


@pytest.mark.parametrize(
    ("buckets", "fact"),
    [
        ([{"frames": 1, "height": 16, "width": 16, "batch_size": 0}], "data.buckets.0.batch_size: must be above 0, found 0"),
        ([{"frames": 1, "height": 16, "width": 16}], "data.buckets.0.batch_size: is missing"),
    ],
)
def test_of_a_stages_lists_the_wrong_item_is_named(recipe: Path, buckets: object, fact: str) -> None:
    content = yaml.safe_load(STAGE)
    content["data"]["buckets"] = buckets
    Path("stage2.yaml").write_text(yaml.safe_dump(content))
    assert fact in refusal(recipe)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        ({"frame_interval": 3, "fps": 8}, "data: fps 8 takes frames by time, frame_interval 3 by counting. Keep one of the two"),
        ({"fps": 0}, "data.fps: must be above 0, found 0"),
    ],
)
def test_frames_are_taken_by_time_or_by_counting(recipe: Path, data: dict[str, object], fact: str) -> None:
    content = yaml.safe_load(STAGE)
    content["data"] = {**content["data"], "source": {"kind": "folder", "path": "clips"}, **data}
    Path("stage2.yaml").write_text(yaml.safe_dump(content))
    assert fact in refusal(recipe)


@pytest.mark.parametrize(
    ("patch", "fact"), [([1, 2], "model.patch"), ([1, 0, 2], "model.patch.1: must be above 0"), ([1, 2, 2, 2], "model.patch")]
)
def test_a_list_of_fixed_length_is_counted_as_it_was_given(recipe: Path, patch: object, fact: str) -> None:
    content = yaml.safe_load(STAGE)
    content["model"]["patch"] = patch
    Path("stage2.yaml").write_text(yaml.safe_dump(content))
    said = refusal(recipe)
    assert fact in said and ("found 0" not in said or patch == [1, 0, 2])


# A person's own data


# Whatever is written, the answer is a pipeline or one line

WORDS = st.sampled_from(["iddpm", "flow", "stage1", "stage2", "\ud800", "\n"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=4)
LAW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a file's content."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in paths(item, (*path, key)))]


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_value_anywhere_gives_a_pipeline_or_one_line(recipe: Path, data: st.DataObject) -> None:
    file, text = data.draw(st.sampled_from([("pipeline.yaml", PIPELINE), ("stage2.yaml", STAGE)]))
    content = yaml.safe_load(text)
    place = data.draw(st.sampled_from(paths(content)))
    value = data.draw(VALUES)
    if place:
        target = content
        for part in place[:-1]:
            target = target[part]
        target[place[-1]] = value
    else:
        content = value
    Path("pipeline.yaml").write_text(PIPELINE)
    Path("stage2.yaml").write_text(STAGE)
    Path(file).write_text(yaml.safe_dump(content))
    try:
        load(recipe)
    except UsageError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(("pipeline.yaml", "stage2.yaml"))


@pytest.mark.parametrize(
    ("file", "key"),
    [("pipeline.yaml", "store"), ("pipeline.yaml", "tracking"), ("pipeline.yaml", "experiment"), ("stage1.yaml", "weights")],
)
@pytest.mark.parametrize("empty", ["''", "'  '"])
def test_what_is_empty_is_refused_and_means_no_folder(recipe: Path, file: str, key: str, empty: str) -> None:
    place = recipe.with_name(file)
    place.write_text(f"{place.read_text()}\n{key}: {empty}\n")
    with pytest.raises(UsageError, match="is empty"):
        load(recipe)
