"""What a pod is asked to prepare: only what pods see, the same order once, and no secret."""

from __future__ import annotations

from typing import Any

import pytest
from prepare_bench import Bench

from opensora.dataset.prepare_config import PrepareConfig
from orchestrator.errors import Refused, UsageError
from orchestrator.prepare import order
from orchestrator.prepare.records import Order
from orchestrator.prepare.watching import look


def config(path: str = "s3://bucket/films", **more: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"name": "mine", "sources": [{"path": path}], **more})


def an_order(**more: Any) -> Order:
    content = {
        "name": "mine", "config": config().model_dump(mode="json"), "stages": {}, "parents": {}, "imports": {},
        "price": None, "gpu": "local-gpu", "gpu_price": None, "replace": True, "retry": False,
    }  # fmt: skip
    return Order.model_validate(content | more)


@pytest.mark.parametrize("path", ["s3://bucket/films", "https://host/a.mp4", "http://host/list.csv", "/data/films"])
def test_what_pods_see_may_be_asked_for(path: str) -> None:
    order.check_seen_by_pods(config(path), ["/data"])


@pytest.mark.parametrize("path", ["/home/me/films", "films", "file:///data/films", "/data2/films"])
def test_what_lies_on_this_machine_is_refused_in_one_line_with_both_ways_out(path: str) -> None:
    with pytest.raises(UsageError, match=r"no pod sees. Give an address .*or prepare it here") as told:
        order.check_seen_by_pods(config(path), ["/data"])
    assert "\n" not in str(told.value) and "sources[0]" in str(told.value)


def test_a_model_on_this_machine_is_refused_and_one_on_a_claim_is_not() -> None:
    llava = {"caption": {"kind": "llava", "path": "/models/llava"}}
    order.check_seen_by_pods(config(**llava), ["/models"])
    with pytest.raises(UsageError, match=r"caption.path.*no pod sees"):
        order.check_seen_by_pods(config(**llava), [])


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    for wrong in (
        config("https://me:hunter2@host/a.mp4"),
        config(caption={"kind": "server", "url": "http://me:hunter2@h/v1", "model": "m"}),
    ):
        with pytest.raises(UsageError, match="holds credentials") as told:
            order.check_seen_by_pods(wrong, [])
        assert "hunter2" not in str(told.value)


def test_the_same_order_is_one_object_and_is_read_back_whole(bench: Bench) -> None:
    digest = order.write(bench.store, an_order())
    assert order.write(bench.store, an_order()) == digest and order.read(bench.store, "mine", digest) == an_order()
    assert order.write(bench.store, an_order(retry=True)) != digest
    with pytest.raises(Refused, match="is not in"):
        order.read(bench.store, "mine", "0" * 16)


def test_what_was_asked_for_and_has_not_begun_is_told(bench: Bench) -> None:
    with pytest.raises(Refused, match="nobody has prepared it"):
        look(bench.store, "mine", bench.folder / "nowhere")
    order.write(bench.store, an_order())
    assert look(bench.store, "mine", bench.folder / "nowhere").word == "asked"
