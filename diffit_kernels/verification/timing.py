"""A model's predictions at given states, with the time and memory that they take."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffit_kernels.precision import products


class Models:
    """One model at a time, loaded anew for another precision.

    Args:
        load: the model in a precision; it has ``use_fused_tmsa``.
    """

    def __init__(self, load: Callable[[str], nn.Module]):
        self._load, self._precision, self._model = load, None, None

    def get(self, precision: str, fused: bool) -> nn.Module:
        """The model, literal or fused; what was given before must be let go of."""
        if precision != self._precision:
            if self._model is not None:
                self._model = self._precision = None
                _free()
            self._model, self._precision = self._load(precision), precision
        self._model.use_fused_tmsa = fused
        return self._model


@dataclass(frozen=True)
class Measured:
    """What :func:`measured` found at every state, in their order.

    Attributes:
        predictions: (B, c, S, S), on the host.
        milliseconds: the median of the repetitions.
        peak_mib: device memory at most, with the model; None but on CUDA.
        note: on how it was measured.
    """

    predictions: list[Tensor]
    milliseconds: list[float]
    peak_mib: float | None
    note: str | None


def measured(models: Models, states, option, repeat: int, on_evaluation: Callable) -> Measured:
    """Evaluate ``option`` at all ``states``, ``repeat`` times over, in the order of sampling.

    After a warm-up, each evaluation by itself: the device has nothing else to do before and after.

    Args:
        states: :class:`~diffit_kernels.verification.states.LatentStates`, or those of images.
        option: :class:`~diffit_kernels.verification.Option`.
        on_evaluation: called after each.
    """
    model = models.get(option.precision, option.fused)
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    if on_cuda:
        _free()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [[] for _ in states.times]
    precision = "float32" if option.precision == "float64" else option.precision
    with torch.inference_mode(), products(precision):
        evaluation = states.evaluation(model, option.savings, option.guidance_eps)
        evaluation.warm_up()
        for _ in range(repeat):
            predictions = []
            for index, taken in enumerate(seconds):
                evaluation.place(index)
                _wait_for(device)
                start = time.perf_counter()
                prediction = evaluation.run()
                _wait_for(device)
                taken.append(time.perf_counter() - start)
                predictions.append(prediction.cpu().clone())
                on_evaluation()
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else None
    milliseconds = [1e3 * statistics.median(taken) for taken in seconds]
    return Measured(predictions, milliseconds, peak, evaluation.note)


def _free() -> None:
    """Give back what nobody refers to, be it in a circle."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
