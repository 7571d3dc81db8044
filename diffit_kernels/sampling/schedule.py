"""The published diffusion process, expressed through diffusers' schedulers."""

import importlib.util

import numpy as np

TRAINING_STEPS = 1000
EXTRA = ("diffusers", "tqdm", "PIL")
BETAS = np.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=np.float64)


def check_extra() -> None:
    """Raise ImportError with the command to run if a package of the ``sample`` extra is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"sampling needs {', '.join(missing)}: pip install 'diffit-kernels[sample]'"
        )


def respaced_timesteps(num_steps: int) -> np.ndarray:
    """(num_steps,) int64, ascending: training timesteps at an even stride, 0 and 999 included.

    t_i = round(i · 999 / (num_steps - 1)).
    """
    if not 1 <= num_steps <= TRAINING_STEPS:
        raise ValueError(f"sampling steps must be in 1..{TRAINING_STEPS}, got {num_steps}")
    stride = (TRAINING_STEPS - 1) / max(num_steps - 1, 1)
    return np.array([round(i * stride) for i in range(num_steps)], dtype=np.int64)


def make_scheduler(num_steps: int, use_ddim: bool = False):
    """A diffusers scheduler over ``num_steps`` respaced steps, and the network's timestep for each.

    The chain is shortened by recomputing its betas, beta_i = 1 - abar(t_i) / abar(t_{i-1}), so the
    scheduler counts 0..num_steps-1 and the network is given t_i. Ancestral sampling uses the
    learned range of variances; DDIM has eta 0. x_0 is not clipped.

    Returns:
        (DDPMScheduler or DDIMScheduler with its timesteps set, (num_steps,) int64 array of t_i).

    Raises:
        ImportError: the ``sample`` extra is not installed.
    """
    check_extra()
    from diffusers import DDIMScheduler, DDPMScheduler

    timesteps = respaced_timesteps(num_steps)
    abar = np.cumprod(1 - BETAS)[timesteps]
    betas = 1 - abar / np.concatenate(([1.0], abar[:-1]))
    shared = {"num_train_timesteps": num_steps, "trained_betas": betas, "clip_sample": False}
    if use_ddim:
        scheduler = DDIMScheduler(**shared)
    else:
        scheduler = DDPMScheduler(**shared, variance_type="learned_range")
    scheduler.set_timesteps(num_steps)
    return scheduler, timesteps
