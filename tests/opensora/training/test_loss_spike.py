"""What counts as a spike: the laws of the window alone. tests/opensora/test_ends.py ends whole stages by them."""

from __future__ import annotations

import pytest

from opensora.training.loss_spike import FEWEST, SPIKES, WINDOW, LossWindow


def filled(factor: float | None = 10.0, count: int = FEWEST) -> LossWindow:
    window = LossWindow(factor)
    for _ in range(count):
        assert not window.spiked(1.0)
    return window


def test_the_third_high_loss_in_a_row_is_a_spike_and_one_in_range_begins_anew() -> None:
    window = filled()
    assert [window.spiked(loss) for loss in (11.0, 11.0, 9.0, 11.0, 11.0, 11.0)] == [False] * 5 + [True]
    assert SPIKES == 3


def test_high_losses_do_not_move_the_range() -> None:
    window = filled()
    for _ in range(SPIKES - 1):
        window.spiked(1e6)
    assert window.median == 1.0


@pytest.mark.parametrize("window", [filled(None), filled(count=FEWEST - 1)], ids=["no factor", "too few losses"])
def test_nothing_is_a_spike_without_a_factor_or_without_a_range(window: LossWindow) -> None:
    assert not window.spiked(1e9)


def test_the_range_follows_the_last_steps_alone() -> None:
    window = filled(count=WINDOW)
    for _ in range(WINDOW):
        window.spiked(5.0)
    assert window.median == 5.0
