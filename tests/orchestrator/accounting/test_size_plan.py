"""What clips of one size need of so many devices."""

from __future__ import annotations

import pytest

from opensora.config import Activations
from orchestrator.accounting.size_plan import size_plan
from orchestrator.errors import UsageError
from orchestrator.recipe.files import find
from orchestrator.recipe.prices import load_prices
from orchestrator.recipe.resolve import load

OPEN_SORA = load(find("open-sora-1.0"))
PRICES = load_prices()


def test_a_minute_of_1080p_is_planned_as_computed_by_hand() -> None:
    """11.75M tokens; 91.4 PFLOP useful; two all-to-alls a block in three passes, 200 GB/s; boundaries of 94.8 GB a device on the host."""
    found = size_plan(OPEN_SORA.stage("stage3b").config, PRICES, "h800", frames=1440, height=1088, width=1920, devices=8)
    assert (found.frames, found.tokens, found.clip_tokens) == (1440, 8160, 11_750_400)
    assert found.flops == pytest.approx(91.4e15, rel=1e-3)
    assert found.stage.parallel.sequence == 8
    assert found.chosen is not None
    assert found.chosen.activations == Activations(recompute="full", offload=True, mlp_chunks=16)
    stream = 11_750_400 / 8 * 1152 * 2
    assert found.chosen.memory.host > 28 * stream
    assert found.exchanged == pytest.approx(2 * 28 * 3 * stream * 7 / 8)
    forward = found.flops / 3
    computing = (found.flops + forward) / (8 * 989.5e12 * 0.40)
    assert found.options[1].step_s == pytest.approx(computing + found.exchanged / 200e9)
    assert found.step_s == pytest.approx(43, abs=1)
    assert [option.fits for option in found.options].count(True) == 1


@pytest.mark.long
def test_a_short_clip_needs_nobody_to_share_it() -> None:
    found = size_plan(OPEN_SORA.stage("stage3b").config, PRICES, "h800", frames=16, height=256, width=448, devices=8)
    assert found.stage.parallel.sequence == 1
    assert found.exchanged == 0
    assert found.chosen == found.options[0]


def test_a_size_that_does_not_divide_is_refused_with_the_next_one() -> None:
    with pytest.raises(UsageError, match=r"^--shape: height 1080 is not a multiple of 16\. Use 1088$"):
        size_plan(OPEN_SORA.stage("stage3b").config, PRICES, "h800", frames=1440, height=1080, width=1920, devices=8)
