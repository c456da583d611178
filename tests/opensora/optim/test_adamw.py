from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from opensora.config import OptimizerConfig
from opensora.optim.adamw import AdamW, learning_rate


def parameters(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in (("a", (5, 3)), ("b", (7,)))}


def give_gradients(weights: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)


def gradients(weights: dict[str, nn.Parameter]) -> list[Tensor]:
    return [weight.grad for weight in weights.values() if weight.grad is not None]


def test_it_computes_what_torch_computes() -> None:
    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours, theirs = parameters(0), parameters(0)
    adamw = AdamW(ours, config)
    reference = torch.optim.AdamW(theirs.values(), config.lr, config.betas, config.eps, config.weight_decay, fused=False, foreach=False)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        adamw.step(gradients(ours), config.lr)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_loaded_state_continues_bitwise() -> None:
    weights = parameters(0)
    adamw = AdamW(weights, OptimizerConfig())
    give_gradients(weights, 1)
    adamw.step(gradients(weights), 1e-2)
    saved = {key: value.clone() for key, value in adamw.state().items()}
    copies = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    other = AdamW(copies, OptimizerConfig())
    other.load(saved)
    for pair, optimizer in ((weights, adamw), (copies, other)):
        give_gradients(pair, 2)
        optimizer.step(gradients(pair), 1e-2)
    assert all(torch.equal(weights[name], copies[name]) for name in weights)


def test_an_update_that_is_not_finite_is_not_made() -> None:
    weights = parameters(0)
    give_gradients(weights, 1)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    adamw = AdamW(weights, OptimizerConfig())
    adamw.step(gradients(weights), 1e-2, found_inf=torch.ones(1))
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    adamw.step(gradients(weights), 1e-2, found_inf=torch.zeros(1))
    assert not any(torch.equal(weights[name], value) for name, value in before.items())


def test_parameters_that_a_state_does_not_know_start_at_zero() -> None:
    weights = parameters(0)
    adamw = AdamW(weights, OptimizerConfig())
    adamw.load({"exp_avg/a": torch.ones(5, 3), "step/a": torch.tensor(9.0), "exp_avg/gone": torch.ones(1)})
    state = adamw.state()
    assert state["step/a"] == 9 and state["exp_avg/a"].eq(1).all()
    assert state["step/b"] == 0 and not state["exp_avg/b"].any()


def test_learning_rate_rises_to_its_value_and_ends_at_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay="linear")
    assert [learning_rate(config, step, 8) for step in range(9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = config.model_copy(update={"decay": "cosine"})
    assert [round(learning_rate(cosine, step, 8), 6) for step in (4, 6, 8)] == [1.0, 0.5, 0.0]
    constant = config.model_copy(update={"decay": "constant"})
    assert learning_rate(constant, 8, 8) == 1.0


@pytest.mark.long
def test_a_trainer_does_not_pay_for_the_compiler() -> None:
    code = "import sys, torch; from opensora import train; from opensora.config import OptimizerConfig\n"
    code += "from opensora.optim.adamw import AdamW\n"
    code += "weight = torch.nn.Parameter(torch.zeros(2)); AdamW({'w': weight}, OptimizerConfig()).step([torch.ones(2)], 1.0)\n"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
