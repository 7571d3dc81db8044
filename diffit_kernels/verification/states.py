"""The states that a published trajectory goes through, and a model's predictions at them.

The letters: B batch; S side and c channels of a sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffit_kernels.checkpoint_files import first_line
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.sampling import Denoiser, heun_sample, initial_noise
from diffit_kernels.sampling.edm import guided_denoised, preconditioning
from diffit_kernels.sampling.predict import Predictor, Savings
from diffit_kernels.sampling.step import made_step

NO_SAVINGS = Savings(False, False, False, False)


class LatentStates:
    """x_t before every step of the published sampler, by ``model``, which is called as it is.

    Ancestral steps, or DDIM's for a model without learned variances.

    Args:
        model: a latent model in eval mode.
        labels: (B,) int64 classes, on its device.
        generators: one per sample, of the noise.
        num_steps, cfg_scale, scale_pow: as of :func:`~diffit_kernels.sampling.denoise`.
        on_step: called after every evaluation of the network.

    Attributes:
        times: timesteps, in the order of sampling. latents: for each x_t, (B, c, S, S) float32.
    """

    prediction, time = "epsilon", "t"

    def __init__(
        self,
        model: DiffiT,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        num_steps: int,
        cfg_scale: float | None,
        scale_pow: float,
        on_step: Callable[[], None],
    ):
        self.labels, self.cfg_scale, self.scale_pow = labels, cfg_scale, scale_pow
        self.sampler = "ddpm" if model.learn_sigma else "ddim"
        run = Denoiser(
            model,
            num_steps=num_steps,
            cfg_scale=cfg_scale,
            scale_pow=scale_pow,
            sampler=self.sampler,
            savings=NO_SAVINGS,
        )
        after = []
        start = initial_noise(model, generators)
        run(start, labels, generators=generators, on_step=on_step, on_step_end=after.append)
        self.times, self.latents = run.timesteps[::-1].tolist(), [start, *after[:-1]]

    def evaluation(
        self, model: DiffiT, savings: Savings, guidance_eps: float
    ) -> "LatentEvaluation":
        return LatentEvaluation(self, model, savings, guidance_eps)


class LatentEvaluation:
    """The guided epsilon of ``model`` at such states, by the step that sampling takes.

    Attributes:
        note: why a step is no CUDA graph where it should be, or None.
    """

    def __init__(self, states: LatentStates, model: DiffiT, savings: Savings, guidance_eps: float):
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._latents = [latents.to(dtype) for latents in states.latents]
        self._labels, self._channels, self.note = states.labels, model.in_channels, None
        predictor = Predictor(
            model,
            states.times[::-1],
            states.cfg_scale,
            states.scale_pow,
            guidance_eps=guidance_eps,
            savings=savings,
        )
        last = len(states.times) - 1
        self._guided = [last - index in predictor.guided for index in range(last + 1)]
        self._step, error = made_step(predictor, self._latents[0], self._labels, None, False)
        if error is not None:
            self.note = f"without a step graph: {first_line(error)}"

    def warm_up(self) -> None:
        """One step of each kind, guided or not."""
        self.place(0)
        for guided in set(self._guided):
            self._step(guided)

    def place(self, index: int) -> None:
        """Take state ``index``; all must be, in their order, each followed by :meth:`run`."""
        if index == 0:
            self._step.begin(self._latents[0], self._labels)
        else:
            self._step.latents.copy_(self._latents[index])
        self._index = index

    def run(self) -> Tensor:
        """(B, c, S, S) float32, or float64 of such a model; the next call may write over it."""
        self._step(self._guided[self._index])
        return self._step.out[:, : self._channels]


class ImageStates:
    """(x, σ) at every evaluation of Heun's sampler by ``model``, which is called as it is.

    Arguments as of :class:`LatentStates`; ``labels`` None for a model without classes, and
    ``scale_pow`` without use. 2 num_steps - 1 evaluations.

    Attributes:
        times: noise levels σ, in the order of sampling.
        inputs: for each x, (B, c, S, S), and σ, (B,); float64, as the sampler keeps them.
    """

    prediction, time, sampler = "denoised image", "sigma", "heun"

    def __init__(
        self,
        model: ImageDiffiT,
        labels: Tensor | None,
        generators: Sequence[torch.Generator],
        num_steps: int,
        cfg_scale: float | None,
        scale_pow: float,
        on_step: Callable[[], None],
    ):
        self.labels, self.cfg_scale = labels, cfg_scale
        start, self.inputs = initial_noise(model, generators), []

        def network(scaled: Tensor, c_noise: Tensor, *given: Tensor) -> Tensor:
            """F, which is no module here, and so is given all in float64."""
            sigma = (4 * c_noise[: len(start)]).exp()
            c_in = preconditioning(sigma)[2].view(-1, 1, 1, 1)
            self.inputs.append((scaled[: len(start)] / c_in, sigma))
            on_step()
            return model(scaled.float(), c_noise, *given)

        network.null_class = model.null_class
        heun_sample(network, start, labels, num_steps=num_steps, cfg_scale=cfg_scale)
        self.times = [float(sigma[0]) for _, sigma in self.inputs]

    def evaluation(
        self, model: ImageDiffiT, savings: Savings, guidance_eps: float
    ) -> "ImageEvaluation":
        return ImageEvaluation(self, model)


class ImageEvaluation:
    """D(x; σ) of ``model`` at such states, guided as by Heun's sampler. Interface as above."""

    note = None

    def __init__(self, states: ImageStates, model: ImageDiffiT):
        self._states, self._model = states, model

    def warm_up(self) -> None:
        self.place(0)
        self.run()

    def place(self, index: int) -> None:
        self._input = self._states.inputs[index]

    def run(self) -> Tensor:
        """(B, c, S, S) float64."""
        states = self._states
        return guided_denoised(self._model, *self._input, states.labels, states.cfg_scale)
