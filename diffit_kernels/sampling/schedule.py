"""The published diffusion process, expressed through diffusers' schedulers."""

import importlib.util

import numpy as np

TRAINING_STEPS = 1000
SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "unipc")
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
    if use_ddim and sampler not in ("ddpm", "ddim"):
        raise ValueError(f"use_ddim=True is sampler='ddim', got sampler={sampler!r} beside it")
    return "ddim" if use_ddim else sampler


def default_spacing(sampler: str) -> str:
    """ "even", as published, for the published samplers, "quadratic" for the solvers."""
    return "even" if sampler in ("ddpm", "ddim") else "quadratic"


def make_scheduler(
    num_steps: int, sampler: str = "ddpm", *, use_ddim: bool = False, spacing: str | None = None
):
    """A diffusers scheduler over ``num_steps`` respaced steps, and the network's timestep for each.

    The chain is shortened by recomputing its betas, beta_i = 1 - abar(t_i) / abar(t_{i-1}), so the
    scheduler counts num_steps-1..0 and the network is given t_i. x_0 is not clipped.

    - "ddpm": ancestral sampling with the learned range of variances, as published;
    - "ddim": eta 0;
    - "dpmsolver++": the two-step solver DPM-Solver++(2M), arXiv 2211.01095;
    - "unipc": UniPC of order 2 (B(h) = e^h - 1), arXiv 2302.04867.

    All end with x_0 as the last step predicts it. The solvers' own spacings repeat or leave out
    steps of a chain that is used whole: of theirs, "trailing" alone counts num_steps-1..0. Their
    second order wants steps of like size in log(abar / (1 - abar)), where the last of even ones is
    by far the largest: on the digits model, below 50 to 100 even steps, they are farther than DDIM
    from where all three tend to. With 25 quadratic ones they are as near as DDIM with 250 even, so
    those are their default (:func:`default_spacing`).

    Returns:
        (the scheduler with its timesteps set, (num_steps,) int64 array of t_i).

    Raises:
        ImportError: the ``sample`` extra is not installed.
        ValueError: as :func:`respaced_timesteps` and :func:`sampler_name`.
    """
    sampler = sampler_name(sampler, use_ddim)
    check_extra()
    import diffusers

    timesteps = respaced_timesteps(num_steps, spacing or default_spacing(sampler))
    abar = np.cumprod(1 - BETAS)[timesteps]
    betas = 1 - abar / np.concatenate(([1.0], abar[:-1]))
    chain = {"num_train_timesteps": num_steps, "trained_betas": betas}
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(
            **chain, clip_sample=False, variance_type="learned_range"
        )
    elif sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**chain, clip_sample=False)
    else:
        solvers = {
            "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
            "unipc": diffusers.UniPCMultistepScheduler,
        }
        scheduler = solvers[sampler](**chain, solver_order=2, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    return scheduler, timesteps
