from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from opensora import identity
from opensora.config import (
    ADDED,
    ADDED_TO_DATA,
    ADDED_TO_IDDPM,
    ADDED_TO_OPTIMIZER,
    IDDPM,
    Activations,
    Bucket,
    CheckpointConfig,
    DataConfig,
    DigitsSource,
    Flow,
    FolderSource,
    Frozen,
    KLAutoencoder,
    OptimizerConfig,
    Parallel,
    PatchAutoencoder,
    RoutingConfig,
    SamplingConfig,
    StageConfig,
    WordEncoder,
)
from opensora.identity import Contents


def stage(**changes: Any) -> StageConfig:
    content: dict[str, Any] = {
        "objective": Flow(kind="flow"),
        "data": DataConfig(source=DigitsSource(kind="digits", clips=100), frames=4, height=16, width=16),
        "autoencoder": PatchAutoencoder(kind="patch", factor=2),
        "text": WordEncoder(kind="words"),
        "steps": 300,
        "batch_size": 4,
        "checkpoint": CheckpointConfig(every_steps=100),
        "sampling": SamplingConfig(method="euler"),
    }
    return StageConfig(**(content | changes))


IDDPM_STAGE: dict[str, Any] = {"objective": IDDPM(kind="iddpm"), "sampling": SamplingConfig()}


def leaves(kind: type[Frozen], prefix: str = "") -> Iterator[str]:
    """Path of every field that holds a value."""
    for name, info in kind.model_fields.items():
        members = identity.models_of(info.annotation)
        for member in members:
            yield from leaves(member, f"{prefix}{name}.")
        if not members:
            yield f"{prefix}{name}"


def test_every_field_is_in_one_list() -> None:
    for path in leaves(StageConfig):
        lists = [
            names for names in (identity.IDENTITY, identity.EXECUTION) if any(path == name or path.startswith(f"{name}.") for name in names)
        ]
        assert len(lists) == 1, f"{path} is in {len(lists)} of the two lists"


def test_no_list_names_a_field_that_is_not_there() -> None:
    there = set(leaves(StageConfig))
    for name in (*identity.IDENTITY, *identity.EXECUTION, *identity.FITS_PARENT):
        assert any(path == name or path.startswith(f"{name}.") for path in there), name
    with pytest.raises(KeyError):
        identity.is_identity("optimiser.lr")


@pytest.mark.parametrize(
    "changes",
    [
        {"activations": Activations(recompute="full")},
        {"compile": False},
        {"loss_spike": None},
        {"data": DataConfig(source=DigitsSource(kind="digits", clips=100), frames=4, height=16, width=16, max_left_out=0.9)},
        {"checkpoint": CheckpointConfig(every_steps=7)},
        {"prompts": ("a digit 3 moving left",)},
        {"sampling": SamplingConfig(method="euler", steps=3)},
        {"parallel": Parallel(strategy="fsdp")},
        {"batch_size": 2, "accumulate": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_execution_changes_no_digest(changes: dict[str, Any]) -> None:
    assert identity.name(stage(**changes), 8, None) == identity.name(stage(), 8, None)
    assert {one.kind for one in identity.differences(stage(), stage(**changes), 8, 8)} == {"execution"}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"steps": 301}, "steps"),
        ({"routing": RoutingConfig(rate=0.5)}, "routing.rate"),
        ({"seed": 7}, "seed"),
        ({"optimizer": OptimizerConfig(matrices="muon")}, "optimizer.matrices"),
        ({"optimizer": OptimizerConfig(lr=1.0)}, "optimizer.lr"),
        ({"batch_size": 5}, "global batch"),
        ({"freeze": "temporal", "data": stage().data.model_copy(update={"frames": 1})}, "freeze"),
        ({"data": stage().data.model_copy(update={"source": DigitsSource(kind="digits", clips=101)})}, "data.source.clips"),
        ({"weights": "elsewhere.safetensors"}, "weights"),
        (IDDPM_STAGE | {"objective": IDDPM(kind="iddpm", min_snr=5.0)}, "objective.min_snr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_identity_changes_the_digest_and_is_named(changes: dict[str, Any], path: str) -> None:
    assert identity.name(stage(**changes), 8, None) != identity.name(stage(), 8, None)
    found = identity.differences(stage(), stage(**changes), 8, 8)
    assert path in [one.path for one in found if one.kind == "identity"]


def test_fewer_devices_with_more_parts_of_a_step_are_the_same_result() -> None:
    assert identity.name(stage(accumulate=2), 4, None) == identity.name(stage(), 8, None)
    assert identity.name(stage(), 4, None) != identity.name(stage(), 8, None)
    halves = Parallel(sequence=2)
    assert identity.name(stage(parallel=halves, accumulate=2), 8, None) == identity.name(stage(), 8, None)
    (batch,) = identity.differences(stage(), stage(), 8, 4)
    assert (batch.path, batch.old, batch.new, batch.kind) == ("global batch", [32], [16], "identity")


def test_each_bucket_has_its_batch() -> None:
    sizes = [Bucket(frames=4, height=16, width=16, batch_size=2), Bucket(frames=4, height=32, width=16, batch_size=3)]
    data = stage().data.model_copy(update={"buckets": tuple(sizes)})
    assert identity.global_batches(stage(data=data, accumulate=2), 4) == (16, 24)
    other = data.model_copy(update={"buckets": (sizes[0], sizes[1].model_copy(update={"batch_size": 4}))})
    assert [one.path for one in identity.differences(stage(data=data), stage(data=other), 4, 4)] == ["global batch", "data.buckets"]


def test_a_field_at_its_default_is_not_counted() -> None:
    """So that a field which a later release adds changes no digest of before."""
    counted = identity.identity(stage(), 8)
    defaults = identity.flat_defaults()
    assert not [path for path, value in counted.items() if path in defaults and value == defaults[path]]
    stated = stage(ema_decay=0.9999, seed=42, optimizer=OptimizerConfig())
    assert identity.identity(stated, 8) == counted


def test_a_digest_of_this_release_stays_what_it_is() -> None:
    """Whoever changes this value makes every stage of every user train anew: raise identity.VERSION, and read the older ones."""
    assert identity.name(stage(), 8, "0" * 64) == "2c74bfa319a9"


def test_known_content_counts_in_place_of_where_it_lies() -> None:
    def of(path: str, digest: str | None) -> str:
        data = stage().data.model_copy(update={"source": FolderSource(kind="folder", path=path)})
        return identity.name(stage(data=data), 8, None, Contents(data=digest))

    assert of("/a", "1" * 64) == of("/b", "1" * 64)
    assert of("/a", "1" * 64) != of("/a", "2" * 64)
    assert of("/a", None) != of("/b", None)
    one, two = (KLAutoencoder(kind="kl", path=path, factor=2) for path in ("/a", "/b"))
    known = Contents(autoencoder="3" * 64)
    assert identity.name(stage(autoencoder=one), 8, None, known) == identity.name(stage(autoencoder=two), 8, None, known)
    halves = KLAutoencoder(kind="kl", path="/a", factor=2, dtype="bf16")
    assert identity.name(stage(autoencoder=halves), 8, None, known) != identity.name(stage(autoencoder=one), 8, None, known)


def test_a_field_of_a_later_release_is_not_written_at_its_default() -> None:
    assert not set(ADDED) & set(stage().model_dump())
    assert not set(ADDED_TO_DATA) & set(stage().model_dump()["data"])
    assert not set(ADDED_TO_OPTIMIZER) & set(stage().model_dump()["optimizer"])
    assert not set(ADDED_TO_IDDPM) & set(stage(**IDDPM_STAGE).model_dump()["objective"])
    assert stage(accumulate=2).model_dump()["accumulate"] == 2
    assert StageConfig.model_validate(stage(accumulate=2).model_dump()) == stage(accumulate=2)


def test_what_does_not_fit_a_parent_is_named_with_both_values() -> None:
    parent = stage(model=stage().model.model_copy(update={"temporal_position": "residual"}))
    (misfit,) = identity.misfits(stage(), parent)
    assert (misfit.path, misfit.old, misfit.new) == ("model.temporal_position", "residual", "attention")
    kl = KLAutoencoder(kind="kl", path="/a", factor=2)
    assert [one.path for one in identity.misfits(stage(), stage(autoencoder=kl))] == ["autoencoder.kind", "autoencoder.path"]
    assert not list(identity.misfits(stage(seed=1, batch_size=9), stage(autoencoder=PatchAutoencoder(kind="patch", factor=2))))
