"""The published diffusion process: its timesteps, its own two samplers, and diffusers' solvers.

The published samplers are ours because a step of theirs is part of a CUDA graph, where nothing may
be decided on the host; and in float64, where diffusers rounds the schedule to float32 (an error of
1e-4 of the result with two steps, 6e-6 with ten).
"""

import importlib.util

import numpy as np
import torch
from torch import Tensor

TRAINING_STEPS = 1000
PUBLISHED = ("ddpm", "ddim")
SAMPLERS = (*PUBLISHED, "dpmsolver++", "unipc")
SPACINGS = ("even", "quadratic")
EXTRA = ("diffusers", "tqdm", "PIL")
BETAS = np.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=np.float64)


def check_extra() -> None:
    """Raise ImportError with the command to run if a package of the ``sample`` extra is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"sampling needs {', '.join(missing)}: pip install 'diffit-kernels[sample]'"
        )


def respaced_timesteps(num_steps: int, spacing: str = "even") -> np.ndarray:
    """(num_steps,) int64, ascending: training timesteps, 0 and 999 included.

    ::

        t_i = round(999 i / (num_steps - 1))               "even", as published
        t_i = max(i, round(999 (i / (num_steps - 1))²))    "quadratic", denser where noise is low

    Raises:
        ValueError: ``num_steps`` is not in 1..1000, or an unknown ``spacing``.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
    if not 1 <= num_steps <= TRAINING_STEPS:
        raise ValueError(f"sampling steps must be in 1..{TRAINING_STEPS}, got {num_steps}")
    stride = (TRAINING_STEPS - 1) / max(num_steps - 1, 1)
    if spacing == "quadratic":
        stride /= max(num_steps - 1, 1)
        steps = [max(i, round(i * i * stride)) for i in range(num_steps)]
    else:
        steps = [round(i * stride) for i in range(num_steps)]
    return np.array(steps, dtype=np.int64)


def sampler_name(sampler: str = "ddpm", use_ddim: bool = False) -> str:
    """``sampler``, or "ddim" for the published flag ``use_ddim``.

    Raises:
        ValueError: none of :data:`SAMPLERS`; or ``use_ddim`` beside another than "ddim".
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {sampler!r}")
    if use_ddim and sampler not in PUBLISHED:
        raise ValueError(f"use_ddim=True is sampler='ddim', got sampler={sampler!r} beside it")
    return "ddim" if use_ddim else sampler


def default_spacing(sampler: str) -> str:
    """ "even", as published, for the published samplers, "quadratic" for the solvers."""
    return "even" if sampler in PUBLISHED else "quadratic"


def published_coefficients(timesteps: np.ndarray, sampler: str) -> np.ndarray:
    """(num_steps, 5) float64, for every step what :func:`published_step` takes.

    The chain is shortened by recomputing its betas, beta_i = 1 - abar(t_i) / abar(t_{i-1}), with
    abar(t_{-1}) = 1; x_0 is not clipped::

                  "ddpm"                               "ddim", eta 0
        of x      (1 - beta)^-½                        (abar_{i-1} / abar_i)^½
        of eps    -beta ((1 - abar) (1 - beta))^-½     (1 - abar_{i-1})^½
                                                       - (abar_{i-1} (1 - abar_i) / abar_i)^½
        low       ln(beta (1 - abar_{i-1}) / (1 - abar_i))                           0
        high      ln(beta)                                                           0
        noisy     1, at the last step, i = 0, 0                                      0

    At the last step low is high, in place of -inf.
    """
    abar = np.cumprod(1 - BETAS)[timesteps]
    before = np.concatenate(([1.0], abar[:-1]))
    beta, rest, zero = 1 - abar / before, 1 - abar, np.zeros_like(abar)
    if sampler == "ddim":
        of_epsilon = np.sqrt(1 - before) - np.sqrt(before * rest / abar)
        return np.stack((np.sqrt(before / abar), of_epsilon, zero, zero, zero), 1)
    smallest = beta * (1 - before) / rest
    smallest[0] = beta[0]
    noisy = zero + 1
    noisy[0] = 0
    of_epsilon = -beta / np.sqrt(rest * (1 - beta))
    return np.stack((1 / np.sqrt(1 - beta), of_epsilon, np.log(smallest), np.log(beta), noisy), 1)


def published_step(latents: Tensor, out: Tensor, noise: Tensor | None, row: Tensor) -> Tensor:
    """The latents one step further, all computed on their device in their dtype.

    ::

        a x + b eps + n exp(¼ ((1 + v) high + (1 - v) low)) noise

    Args:
        latents: x, (B, c, S, S), float32 or float64.
        out: (B, 2c, S, S), [eps | v], or (B, c, S, S) without ``noise``; of the dtype of x.
        noise: (B, c, S, S), standard normal; None adds none.
        row: (5,) a, b, low, high, n: of :func:`published_coefficients`, on the device.
    """
    of_latents, of_epsilon, low, high, noisy = row.unbind()
    channels = latents.shape[1]
    after = of_latents * latents + of_epsilon * out[:, :channels]
    if noise is None:
        return after
    v = out[:, channels:]
    deviation = torch.exp(0.25 * ((1 + v) * high + (1 - v) * low))
    return after + noisy * deviation * noise


def make_solver(num_steps: int, sampler: str, spacing: str | None = None):
    """A diffusers scheduler over the same shortened chain, for the samplers that are solvers.

    It counts num_steps-1..0, and the network is given t_i of :func:`respaced_timesteps`.

    - "dpmsolver++": the two-step solver DPM-Solver++(2M), arXiv 2211.01095;
    - "unipc": UniPC of order 2 (B(h) = e^h - 1), arXiv 2302.04867.

    Both end with x_0 as the last step predicts it. The solvers' own spacings repeat or leave out
    steps of a chain that is used whole: of theirs, "trailing" alone counts num_steps-1..0. Their
    second order wants steps of like size in log(abar / (1 - abar)), where the last of even ones is
    by far the largest: on the digits model, below 50 to 100 even steps, they are farther than DDIM
    from where all three tend to. With 25 quadratic ones they are as near as DDIM with 250 even, so
    those are their default (:func:`default_spacing`).

    Raises:
        ImportError: the ``sample`` extra is not installed.
        ValueError: as :func:`respaced_timesteps`.
    """
    check_extra()
    import diffusers

    timesteps = respaced_timesteps(num_steps, spacing or default_spacing(sampler))
    abar = np.cumprod(1 - BETAS)[timesteps]
    solver = {
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[sampler]
    scheduler = solver(
        num_train_timesteps=num_steps,
        trained_betas=1 - abar / np.concatenate(([1.0], abar[:-1])),
        solver_order=2,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(num_steps)
    return scheduler
