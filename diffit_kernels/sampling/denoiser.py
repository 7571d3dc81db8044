"""From noise to latents: the guided loop."""

import collections
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffit_kernels.model import DiffiT
from diffit_kernels.sampling import noise
from diffit_kernels.sampling.hooks import OnStepEnd, after_hook
from diffit_kernels.sampling.predict import ALL_SAVINGS, Predictor, Savings
from diffit_kernels.sampling.schedule import (
    PUBLISHED,
    default_spacing,
    make_solver,
    published_coefficients,
    respaced_timesteps,
    sampler_name,
)
from diffit_kernels.sampling.step import Step, made_step

AHEAD = 2  # steps that the host may be ahead of the device, which is never left without work


class Denoiser:
    """The guided loop of one model and one choice of steps, for any number of batches.

    What can be is kept from batch to batch: tables, buffers, and on CUDA the step's graphs, which
    are captured again where the shape of a batch changes, and whose memory
    (:attr:`graph_bytes`) is about what a step without them takes. The model must not change.

    Args:
        model: a latent DiffiT in eval mode, with learned variances if ``sampler`` is "ddpm".
        num_steps: network evaluations per sample, respaced from 1000.
        cfg_scale: strength of classifier-free guidance; None samples without.
        scale_pow: the power of the guidance schedule, see :meth:`DiffiT.forward_with_cfg`.
        sampler: "ddpm", ancestral as published; "ddim", eta 0, see
            :func:`~diffit_kernels.sampling.schedule.published_coefficients`; or "dpmsolver++",
            "unipc", see :func:`~diffit_kernels.sampling.schedule.make_solver`. "ddpm" alone adds
            noise.
        use_ddim: another name for ``sampler="ddim"``.
        spacing: of the timesteps, "even" as published, or "quadratic", with which the solvers need
            few steps and which is their default
            (:func:`~diffit_kernels.sampling.schedule.respaced_timesteps`).
        guidance_eps: no guidance where its weight differs from 1 by at most this: 0 is exact, see
            :func:`~diffit_kernels.sampling.predict.guidance_steps`.
        savings: what is computed once, see :class:`~diffit_kernels.sampling.predict.Savings`.
        compiled: take the steps through torch.compile: a minute or more at first, then 10 to 20 %
            less time for models of a few hundred channels, and little for the released ones.

    Raises:
        ValueError: an unknown ``sampler`` or ``spacing``, ``guidance_eps`` < 0, or ancestral
            sampling from a model without learned variances.
    """

    def __init__(
        self,
        model: DiffiT,
        *,
        num_steps: int = 250,
        cfg_scale: float | None = None,
        scale_pow: float = 4.0,
        sampler: str = "ddpm",
        use_ddim: bool = False,
        spacing: str | None = None,
        guidance_eps: float = 0.0,
        savings: Savings = ALL_SAVINGS,
        compiled: bool = False,
    ):
        self._compiled = compiled
        self.model, self.sampler = model, sampler_name(sampler, use_ddim)
        if self.sampler == "ddpm" and not model.learn_sigma:
            raise ValueError(
                "ancestral sampling needs a model with learn_sigma=True; the other samplers do not"
            )
        self._spacing = spacing or default_spacing(self.sampler)
        self.timesteps = respaced_timesteps(num_steps, self._spacing)
        self.predictor = Predictor(
            model,
            self.timesteps,
            cfg_scale,
            scale_pow,
            guidance_eps=guidance_eps,
            savings=savings,
        )
        self._step: Step | None = None

    @property
    def graph_bytes(self) -> int | None:
        """Device memory that the last batch's graphs keep; None where there are none."""
        return None if self._step is None else self._step.graph_bytes

    @torch.inference_mode()
    def __call__(
        self,
        latents: Tensor,
        labels: Tensor,
        *,
        generators: Sequence[torch.Generator] | None = None,
        on_step: Callable[[], None] = lambda: None,
        on_step_end: OnStepEnd | None = None,
    ) -> Tensor:
        """Denoise a batch.

        Args:
            latents: (B, in_channels, S, S), floating point, standard normal.
            labels: (B,) int64 classes.
            generators: one per sample for the noise of ancestral steps, or one for all; default
                the global one.
            on_step: called after every step.
            on_step_end: called after every step with a copy of the latents; what it returns, if
                not None, is gone on from.

        Returns:
            (B, in_channels, S, S) float32, or float64 for float64 ``latents``: the dtype of the
            state, whatever the model's. "dpmsolver++" computes its steps in float32 even then.

        Raises:
            ImportError: a solver without the ``sample`` extra.
            TypeError, ValueError: as of the model's forward; or a hook's tensor of another shape.
        """
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        step = self._prepared(latents, labels)
        step.begin(latents, labels)
        solver = None
        if self.sampler not in PUBLISHED:
            solver = make_solver(len(self.timesteps), self.sampler, self._spacing)
        pending = collections.deque()
        for i in reversed(range(len(self.timesteps))):
            if self.sampler == "ddpm" and i > 0:
                step.noise.copy_(noise.step_noise(step.latents, generators), non_blocking=True)
            step(i in self.predictor.guided)
            if solver is not None:  # it may keep what it is given
                epsilon, before = step.out[:, : self.model.in_channels], step.latents.clone()
                step.latents.copy_(solver.step(epsilon, i, before).prev_sample)
            if latents.device.type == "cuda":
                _wait_for_earlier(pending, latents.device)
            on_step()
            if on_step_end is not None:
                step.latents.copy_(after_hook(on_step_end, step.latents.clone()))
        return step.latents.clone()

    def _prepared(self, latents: Tensor, labels: Tensor) -> Step:
        """The step for batches like this one."""
        like = self._step.latents if self._step is not None else None
        if like is not None and (like.shape, like.dtype) == (latents.shape, latents.dtype):
            return self._step
        self._step = None  # its memory is free before the next is made
        coefficients = None
        if self.sampler in PUBLISHED:
            coefficients = published_coefficients(self.timesteps, self.sampler)
            coefficients = torch.from_numpy(coefficients).to(latents.device)
        noisy = self.sampler == "ddpm"
        arguments = (self.predictor, latents, labels, coefficients, noisy, self._compiled)
        self._step, error = made_step(*arguments)
        if error is not None:
            warnings.warn(
                f"sampling goes on kernel by kernel, a step cannot be captured: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
        return self._step


def denoise(
    model: DiffiT,
    latents: Tensor,
    labels: Tensor,
    *,
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_step_end: OnStepEnd | None = None,
    **settings,
) -> Tensor:
    """Denoise latents with the published sampler, or another of :data:`schedule.SAMPLERS`.

    Args:
        model, settings: of a :class:`Denoiser`, which for many batches keeps what they share.
        latents, labels, generators, on_step, on_step_end: of its call.

    Returns:
        (B, in_channels, S, S) float32, or float64 for float64 ``latents``.

    Raises:
        ImportError, TypeError, ValueError: as of :class:`Denoiser` and its call.
    """
    run = Denoiser(model, **settings)
    return run(latents, labels, generators=generators, on_step=on_step, on_step_end=on_step_end)


def _wait_for_earlier(pending: collections.deque, device: torch.device) -> None:
    """Wait for the step before the last :data:`AHEAD`, so that progress shown is progress made."""
    pending.append(torch.cuda.current_stream(device).record_event())
    if len(pending) > AHEAD:
        pending.popleft().synchronize()
