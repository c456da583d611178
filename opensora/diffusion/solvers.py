"""Solvers of higher order for models that predict noise: DPM-Solver++ (2M) and UniPC, by diffusers' schedulers.

Owns how they are set up for this project's noise schedule. Refuses models of flow, and to know guidance.

References: DPM-Solver++ (Lu et al., arXiv:2211.01095) · UniPC (Zhao et al., arXiv:2302.04867).
"""

# mypy: disable-error-code="no-untyped-call"
# (diffusers declares itself typed, but half of it is not)

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from opensora.errors import ConfigError

Network = Callable[[Tensor, Tensor], Tensor]

ORDER = 2
"""Order 3 is unstable under guidance (Lu et al. §4).

Steps are equal in the logarithm of the noise-to-signal ratio (`use_exponential_sigmas`). Mean error after 10 steps on data whose solution
is known (tests/opensora/diffusion/test_solvers.py): DPM-Solver++ 0.014, UniPC 0.021; with equal steps in time 0.076 and 0.073, with
Karras's 0.042 and 0.055; DDIM 0.109, and 0.028 after 40.
"""


def solve(kind: Literal["dpm-solver++", "unipc"], betas: Tensor, network: Network, noise: Tensor, steps: int) -> Tensor:
    """Clean latents (B, C, …) from noise, in `steps` evaluations. Deterministic.

    Args:
        betas: (N,) variances of the forward steps.
        network: predicts (B, 2C, …), noise and variance. Only the noise is used, and split off here: the schedulers' own split cuts a
            learned variance off behind the third channel, as images in RGB have it.

    Raises:
        ConfigError: more steps than the process has.
    """
    if not 1 <= steps <= len(betas):
        raise ConfigError(f"sampling: steps {steps} do not fit a process of {len(betas)}. Use 1 to {len(betas)}")
    scheduler = _scheduler(kind, betas)
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise
    for time in scheduler.timesteps:
        predicted, _ = network(x, time.expand(len(x))).chunk(2, dim=1)
        x = scheduler.step(predicted, time, x, return_dict=False)[0]
    return x


def _scheduler(kind: Literal["dpm-solver++", "unipc"], betas: Tensor) -> Any:
    told: dict[str, Any] = {
        "num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "solver_order": ORDER, "prediction_type": "epsilon",
        "use_exponential_sigmas": True, "lower_order_final": True, "final_sigmas_type": "zero",
    }  # fmt: skip
    if kind == "unipc":
        return UniPCMultistepScheduler(**told, solver_type="bh2", predict_x0=True)
    return DPMSolverMultistepScheduler(**told, algorithm_type="dpmsolver++", solver_type="midpoint")
