"""A step of sampling on buffers of its own, which on CUDA is one launch: a graph of all kernels.

What a step does to the buffers is written once, in ``Step._run``. A CPU runs it; on CUDA it is
captured, and replayed at every step of every batch of the same shape.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from diffit_kernels.sampling.predict import Condition, Predictor, is_own
from diffit_kernels.sampling.schedule import published_step

Replay = Callable[[], None]
Capture = Callable[[list[Replay]], tuple[list[Replay], int | None]]


class Step:
    """The step of batches of one shape: prediction, guidance, and with a table the update.

    Args:
        predictor: of the run.
        latents: (B, c, S, S) float32 or float64, of the shape, dtype and device of the batches.
        labels: (B,) int64, of the first batch.
        coefficients: (num_steps, 5) float64 of
            :func:`~diffit_kernels.sampling.schedule.published_coefficients`, on the device; None
            leaves the update to the caller, who changes :attr:`latents`.
        noisy: whether the update adds noise.
        capture: makes replays of several functions, and says how much memory they keep
            (:func:`capture_for`); None calls the functions.

    Attributes:
        latents, noise: (B, c, S, S), the state, and what the next step adds to it.
        out: (B, out_channels, S, S) in the dtype of the state, the last prediction.
        graph_bytes: of device memory that the graphs keep; None without.
    """

    def __init__(
        self,
        predictor: Predictor,
        latents: Tensor,
        labels: Tensor,
        coefficients: Tensor | None,
        noisy: bool,
        capture: Capture | None = None,
    ):
        self._predictor, self._coefficients, self._noisy = predictor, coefficients, noisy
        self._dtype = predictor.model.x_embedder.proj.weight.dtype
        self.latents, self.noise = torch.zeros_like(latents), torch.zeros_like(latents)
        self.out = latents.new_zeros(len(latents), predictor.model.out_channels, *latents.shape[2:])
        self._condition = Condition(labels.clone(), predictor.condition(labels).parts)
        self._last = len(predictor.timesteps) - 1
        self._step = torch.full((1,), self._last, device=latents.device)
        self._replays: dict[bool, Replay] = {}
        self.graph_bytes = None
        if capture is not None:
            kinds = sorted({i in predictor.guided for i in range(self._last + 1)}, reverse=True)
            runs = [functools.partial(self._run, guided) for guided in kinds]  # the largest first
            replays, self.graph_bytes = capture(runs)
            self._replays = dict(zip(kinds, replays, strict=True))

    def begin(self, latents: Tensor, labels: Tensor) -> None:
        """Start another batch of the same shape at the first step, which has the last number."""
        for buffer, value in zip(self._condition, self._predictor.condition(labels), strict=True):
            if buffer is not None:
                buffer.copy_(value)
        self.latents.copy_(latents)
        self._step.fill_(self._last)

    def __call__(self, guided: bool) -> None:
        """Take the next step; ``guided`` as its number says."""
        if self._replays:
            self._replays[guided]()
        else:
            self._run(guided)

    def _run(self, guided: bool) -> None:
        out = self._predictor(self.latents.to(self._dtype), self._condition, self._step, guided)
        self.out.copy_(out)
        if self._coefficients is not None:
            row = self._coefficients.index_select(0, self._step)[0]
            noise = self.noise if self._noisy else None
            self.latents.copy_(published_step(self.latents, self.out, noise, row))
        self._step.sub_(1)


def made_step(
    predictor: Predictor,
    latents: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    noisy: bool,
    compiled: bool = False,
) -> tuple[Step, RuntimeError | None]:
    """A step, captured where it can be; and what failed where it should have been.

    Args: as of :class:`Step` and :func:`capture_for`.
    """
    arguments, error = (predictor, latents, labels, coefficients, noisy), None
    if (capture := capture_for(predictor, latents, compiled)) is not None:
        try:
            return Step(*arguments, capture), None
        except RuntimeError as failure:
            error = failure.with_traceback(None)  # which would keep the failed step's memory
    return Step(*arguments), error


def capture_for(predictor: Predictor, latents: Tensor, compiled: bool = False) -> Capture | None:
    """What captures the steps of such a batch, or None.

    On CUDA graphs, of a model that is only ours: other parts and hooks may do on the host what a
    replay would leave out. And ``compiled``, what torch.compile makes of the step.
    """
    on_cuda = latents.device.type == "cuda" and len(latents) > 0
    graphs = on_cuda and predictor.savings.step_graph and is_own(predictor.model)

    def capture(runs: list[Replay]) -> tuple[list[Replay], int | None]:
        if compiled:
            runs = [torch.compile(run, dynamic=False) for run in runs]
        return cuda_graphs(runs, latents.device) if graphs else (runs, None)

    return capture if graphs or compiled else None


def cuda_graphs(runs: list[Replay], device: torch.device) -> tuple[list[Replay], int]:
    """Each function as a CUDA graph: (their replays, bytes of device memory that they keep).

    Every function runs once before, so that all kernels are compiled and loaded. The graphs share
    one pool of memory, so that they must not run at the same time; what the largest needs, which
    is best given first, is then what all need. What ran before gave its own memory back by then:
    the peak is about that of a step without a graph.

    Raises:
        RuntimeError: a function does what cannot be captured, such as waiting for the device.
    """
    for run in runs:
        run()
    graphs = []
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            # A thread may be decoding the batch before: what it does must not break this capture.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                run()
            graphs.append(graph)
    segments = torch.cuda.memory_snapshot()
    kept = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))
    return [graph.replay for graph in graphs], kept
