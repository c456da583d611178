"""What a profile says of a pool, what a stage may ask for, and what is refused in words; docs/pools.md says nothing else."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from orchestrator.accounting.plan import check_budget, plan
from orchestrator.errors import Refused, UsageError
from orchestrator.recipe import adapt, files, resolve
from orchestrator.recipe.cluster_profile import ClusterProfile
from orchestrator.recipe.pipeline import Pipeline
from orchestrator.recipe.prices import load_prices, with_named_price

SHOWN = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/pools.md").read_text(), re.DOTALL)]
SITE, RECIPE, FEWER = SHOWN
H800 = yaml.safe_load((files.shipped_folder() / "clusters/h800-64.yaml").read_text())


def load(folder: Path, *, profile: dict[str, Any] | None = None, **settings: Any) -> Pipeline:
    (folder / "site.yaml").write_text(yaml.safe_dump(H800 | SITE | (profile or {})))
    typed = {name.replace("__", "."): value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    overrides = {"cluster": str(folder / "site.yaml"), **typed}
    return resolve.load(files.find("open-sora-1.0"), overrides=overrides)


def test_the_page_shows_what_loads(tmp_path: Path) -> None:
    (stage,) = RECIPE["stages"]
    pipeline = load(tmp_path, stage2__pools=stage["pools"], stage2__resources=stage["resources"] | FEWER["resources"])
    loaded = pipeline.stage("stage2")
    assert pipeline.pools_of(loaded) == ("reserved", "on-demand", "spot") == tuple(stage["pools"])
    assert (loaded.spec.resources.min_nodes, loaded.spec.resources.shrink_after_minutes) == (4, 15)


def test_a_profile_in_a_pool_is_an_ordinary_one(tmp_path: Path) -> None:
    cluster = load(tmp_path).cluster
    assert cluster is not None
    spot = cluster.in_pool("spot")
    assert spot.pools == () and spot.node_selector == {"nvidia.com/gpu.product": "NVIDIA-H800", "node-pool": "spot"}
    assert [one.key for one in spot.tolerations] == ["nvidia.com/gpu", "spot"]
    assert spot.price is not None and spot.price.usd_per_hour == Decimal("1.10")
    assert ClusterProfile.model_validate(spot.model_dump(mode="json")) == spot
    alone = cluster.in_pool(None)
    assert alone == cluster.model_copy(update={"pools": ()}) and "pools" not in alone.model_dump(mode="json")
    with pytest.raises(KeyError):
        cluster.in_pool("spto")


def test_a_pool_with_a_device_of_its_own_has_not_the_profiles_price(tmp_path: Path) -> None:
    price = {"usd_per_hour": "9.00", "source": "us", "date": "2026-11-01"}
    cluster = load(tmp_path, profile={"price": price, "pools": [{"name": "other", "device": "cpu-core"}, {"name": "same"}]}).cluster
    assert cluster is not None
    prices = load_prices()
    assert cluster.in_pool("other").price is None and cluster.in_pool("other").device == "cpu-core"
    assert prices.at(cluster.in_pool("other")).device("cpu-core") == prices.device("cpu-core")
    assert prices.at(cluster.in_pool("same")).device("h800").usd_per_hour == Decimal("9.00")


def test_a_named_price_list_counts_for_pools_without_a_price_of_their_own(tmp_path: Path) -> None:
    content = yaml.safe_load((files.shipped_folder() / "prices.yaml").read_text())
    content["devices"]["h800"] |= {"usd_per_hour": "5.00"}
    content["devices"]["cpu-core"] |= {"usd_per_hour": "0.50"}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(content))
    pools = [
        {"name": "own", "price": {"usd_per_hour": "1.00", "source": "us", "date": "2026-11-01"}},
        {"name": "other", "device": "cpu-core"},
        {"name": "plain"},
    ]
    cluster = load(tmp_path, profile={"pools": pools}).cluster
    assert cluster is not None
    priced = with_named_price(cluster, {"OSCTL_PRICES": str(tmp_path / "prices.yaml")})
    found = [priced.in_pool(name).price for name in ("own", "other", "plain")]
    assert [one.usd_per_hour for one in found if one is not None] == [Decimal("1.00"), Decimal("0.50"), Decimal("5.00")]


@pytest.mark.parametrize(
    ("profile", "settings", "message"),
    [
        (
            {}, {"stage2__pools": ["reserved", "sport"]},
            "no pool 'sport' in the cluster profile h800-64, which has reserved, on-demand, spot. Did you mean 'spot'?",
        ),
        (
            {"pools": []}, {"stage2__pools": ["spot"]},
            "no pool 'spot' in the cluster profile h800-64, which has none. Describe it there under `pools`",
        ),
        ({}, {"stage2__pools": ["spot", "reserved", "spot"]}, "'spot' is there 2 times; an attempt waits in each pool once"),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, {}, "pools: 'a' names 2 pools, and attempts are billed by that name; rename one"),
        ({"pools": [{"name": "a", "kueue_queue": "q"}]}, {}, "queue gang with kueue_queue of pool a q; only Kueue has queues"),
        (
            {"queue": "kueue", "pools": [{"name": "a", "kueue_queue": "q"}, {"name": "b"}]}, {},
            "queue kueue with kueue_queue None, nor has the pool b; Kueue needs",
        ),
        ({"pools": [{"name": "a", "wait_minutes": 0}]}, {}, "pools.a.wait_minutes: must be above 0, found 0"),
        ({"pools": [{"name": "a", "node_selector": {"a b": "c"}}]}, {}, "pools.a.node_selector: expected a label's key"),
        ({}, {"stage2__resources__min_nodes": 9}, "min_nodes 9 is above nodes 8; lower min_nodes"),
        ({}, {"stage2__resources__shrink_after_minutes": 5}, "shrink_after_minutes 5 without min_nodes; write with how few nodes"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_words(profile: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, profile=profile, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_with_kueue_each_pool_has_its_queue_or_the_profiles(tmp_path: Path) -> None:
    pools = [{"name": "a", "kueue_queue": "one"}, {"name": "b"}]
    cluster = load(tmp_path, profile={"queue": "kueue", "kueue_queue": "train", "pools": pools}).cluster
    assert cluster is not None
    assert [cluster.in_pool(name).kueue_queue for name in ("a", "b")] == ["one", "train"]
    only = load(tmp_path, profile={"queue": "kueue", "pools": pools[:1]}).cluster
    assert only is not None and only.in_pool("a").kueue_queue == "one"


def test_what_nobody_wrote_is_not_in_a_revision(tmp_path: Path) -> None:
    """So that it is the revision of an older release, which reads it."""
    text = json.dumps(resolve.load(files.find("open-sora-1.0")).model_dump(mode="json"))
    assert not re.findall(r"pools|min_nodes|shrink_after", text)
    pipeline = load(tmp_path, stage2__pools=["spot"], stage2__resources__min_nodes=4)
    assert Pipeline.model_validate(pipeline.model_dump(mode="json")) == pipeline


def test_pools_are_no_part_of_a_results_identity(tmp_path: Path) -> None:
    from opensora import identity

    plain, pooled = resolve.load(files.find("open-sora-1.0")), load(tmp_path, stage2__pools=["spot"], stage2__resources__min_nodes=2)
    for before, after in zip(plain.stages, pooled.stages, strict=True):
        assert identity.identity(before.config, before.devices) == identity.identity(after.config, after.devices)


def test_a_laptop_passes_over_both_and_says_so(tmp_path: Path) -> None:
    here = load(tmp_path, stage2__pools=["spot"], stage2__resources__min_nodes=2, backend="local")
    (said,) = adapt.ignored(here)
    assert said == "stage2: pools spot and min_nodes 2 count in a cluster alone; on this machine they change nothing"
    assert here.pools_of(here.stage("stage2")) == ()


def test_a_plan_is_of_the_first_pool_with_a_range_over_all(tmp_path: Path) -> None:
    pipeline = adapt.on_devices(load(tmp_path), 0)
    assert pipeline.cluster is not None
    row = plan(pipeline, load_prices().at(pipeline.cluster), mfu=0.4).rows[1]
    assert row.offers == (("reserved", Decimal("1.90")), ("on-demand", Decimal("3.20")), ("spot", Decimal("1.10")))
    hours = Decimal(repr(row.expected.device_hours))
    assert row.expected.usd == pytest.approx(hours * Decimal("1.90")) and row.low.usd == pytest.approx(hours * Decimal("1.10"))
    assert row.high.usd == pytest.approx(hours * Decimal("3.20"))


def test_the_budget_goes_by_the_dearest_pool_until_it_is_known_which_one_it_is(tmp_path: Path) -> None:
    pipeline = load(tmp_path, stage2__pools=["reserved", "on-demand", "spot"], stage3a__pools=["spot"], stage3b__pools=["spot"])

    def planned(**pools: str) -> Any:
        return plan(pipeline, load_prices().at(pipeline.cluster), mfu=0.4, pools=pools)

    unknown, first = planned(), planned(stage2="reserved")
    assert first.at_most == first.expected == unknown.expected and unknown.expected.usd < unknown.at_most.usd
    assert planned(stage2="on-demand").at_most == unknown.at_most
    assert planned(stage2="spot").at_most.usd < first.at_most.usd
    hours = Decimal(repr(unknown.rows[1].expected.device_hours))
    assert unknown.at_most.usd - unknown.expected.usd == pytest.approx(hours * (Decimal("3.20") - Decimal("1.90")))
    between = float(unknown.expected.usd + 1)
    check_budget(first, between)
    with pytest.raises(Refused, match=r"^budget_usd: the plan costs \$.* in the most expensive pools that it may come into, the budget is"):
        check_budget(unknown, between)
