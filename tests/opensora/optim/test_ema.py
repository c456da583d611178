from __future__ import annotations

import torch
from torch import nn

from opensora.optim.ema import EMA


def test_it_follows_the_weights_with_a_warm_decay() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    ema = EMA(dict(model.named_parameters()), 0.5)
    expected = 0.0
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5)):
        with torch.no_grad():
            model.weight.fill_(float(step))  # in place, as an optimizer does
        ema.update(step)
        expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(ema.shadow["weight"], torch.full((1, 2), expected))


def test_it_is_fp32_and_apart_from_the_weights() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(dict(model.named_parameters()), 0.9)
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(ema.shadow["weight"], before)
    assert all(value.dtype == torch.float32 for value in EMA(dict(model.to(torch.bfloat16).named_parameters()), 0.9).shadow.values())


def test_it_continues_from_what_was_saved() -> None:
    model = nn.Linear(2, 2)
    saved = {"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2), "a buffer": torch.ones(1)}
    ema = EMA(dict(model.named_parameters()), 0.9)
    ema.load(saved)
    assert ema.shadow.keys() == {"weight", "bias"}
    assert torch.equal(ema.shadow["weight"], saved["weight"])
