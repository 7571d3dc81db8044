"""What each option of sampling costs in accuracy and gains in time, on one checkpoint and device.

The published computation in float32 makes a trajectory; every option then predicts at the same
states. Those that promise the published results are held against float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffit_kernels.checkpoint_files import first_line
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.precision import PRECISIONS, products, refusal
from diffit_kernels.sampling import Savings, sample_generator
from diffit_kernels.sampling.predict import ALL_SAVINGS
from diffit_kernels.sampling.published import published_process
from diffit_kernels.verification.states import NO_SAVINGS, ImageStates, LatentStates
from diffit_kernels.verification.timing import Measured, Models, measured

TIMES = 2  # the literal model's own rounding is what an exact option may err by,
FLOOR = 4 * torch.finfo(torch.float32).eps  # and this


@dataclass(frozen=True)
class Option:
    """A way to compute the predictions.

    Attributes:
        name, column: for people; the second is short.
        precision: of :data:`~diffit_kernels.precision.PRECISIONS`, or "float64" for the truth.
        exact: whether it promises the published results, but for rounding.
    """

    name: str
    column: str
    precision: str = "float32"
    fused: bool = True
    savings: Savings = ALL_SAVINGS
    guidance_eps: float = 0.0
    exact: bool = False


LITERAL = Option("literal, float32", "literal", fused=False, savings=NO_SAVINGS)
TRUTH = replace(LITERAL, name="literal, float64", column="float64", precision="float64")


def options(device: torch.device, guided_latents: bool) -> list[Option]:
    """What is compared with :data:`LITERAL`; some of it the device may refuse."""
    fused = Option("fused, float32", "float32", exact=True)
    found = [fused]
    if guided_latents:
        if device.type == "cuda":
            bare = replace(ALL_SAVINGS, step_graph=False)
            name = "fused, float32, no step graph"
            found.append(replace(fused, name=name, column="no graph", savings=bare))
        found.append(Option("fused, float32, guidance_eps 1e-3", "eps 1e-3", guidance_eps=1e-3))
    others = (name for name in PRECISIONS if name != "float32")
    return [*found, *(Option(f"fused, {name}", name, name) for name in others)]


@dataclass(frozen=True)
class Settings:
    """What is measured; ``cfg_scale`` and ``scale_pow`` None are the published ones."""

    num_steps: int = 10
    batch_size: int = 4
    guide: bool = True
    cfg_scale: float | None = None
    scale_pow: float | None = None
    seed: int = 0
    repeat: int = 3
    check: bool = True


@dataclass(frozen=True)
class Row:
    """An option measured, or the reason why it was not. Lists are by step, as sampled.

    Attributes:
        errors: rms(p - literal) / rms(literal) of the batch's predictions p.
        largest: max |p - literal|.
        milliseconds: of a step, the median of its repetitions.
        errors_of_float64: rms(p - truth) / rms(truth), of the literal and of exact options.
        peak_mib: device memory at most, with the model; None but on CUDA.
        note: on how it was measured.
    """

    option: Option
    refused: str | None = None
    errors: list[float] | None = None
    largest: list[float] | None = None
    milliseconds: list[float] | None = None
    errors_of_float64: list[float] | None = None
    peak_mib: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Verification:
    """All that was measured.

    Attributes:
        prediction, time, sampler: their names.
        times: of the steps, in the order of sampling.
        cfg_scale, scale_pow: of the guidance, None without.
        checked: whether exact options were held against float64.
        rows: the first is the literal model's.
    """

    prediction: str
    time: str
    sampler: str
    times: list[float]
    cfg_scale: float | None
    scale_pow: float | None
    checked: bool
    rows: list[Row]

    @property
    def bounds(self) -> list[float]:
        """What an exact option may err by against float64, by step: 2 literal + 4 eps."""
        return [TIMES * error + FLOOR for error in self.rows[0].errors_of_float64]

    def is_exact(self, row: Row) -> bool:
        """Whether a row errs by no more than :attr:`bounds` at any step; NaN is more."""
        if row.errors_of_float64 is None:
            return False
        pairs = zip(row.errors_of_float64, self.bounds, strict=True)
        return all(error <= bound for error, bound in pairs)

    @property
    def passed(self) -> bool:
        """Whether every exact option is; true where nothing was to be checked."""
        return not self.checked or all(self.is_exact(row) for row in self.rows if row.option.exact)


def verify(
    load: Callable[[str], DiffiT | ImageDiffiT],
    settings: Settings,
    on_evaluation: Callable[[str, int], None] = lambda name, total: None,
) -> Verification:
    """Measure every option of sampling at the states of the literal model's trajectory.

    One model is in memory at a time.

    Args:
        load: gives the checkpoint in eval mode, in one of
            :data:`~diffit_kernels.precision.PRECISIONS`, or in "float64".
        on_evaluation: called after every evaluation of a step with what it was for, and the number
            of all that will be.

    Raises:
        ValueError: ``settings`` that the model cannot be sampled with; no memory for the check; or
            all predictions are zero, as of a model that was never trained.
    """
    models = Models(load)
    model = models.get("float32", fused=False)
    device, latent = next(model.parameters()).device, isinstance(model, DiffiT)
    scale, power = _guidance(model, settings)
    rest = options(device, guided_latents=latent and scale is not None)
    reasons = [refusal(option.precision, device) for option in rest]
    count = settings.num_steps if latent else 2 * settings.num_steps - 1
    total = count * (1 + settings.check + settings.repeat * (1 + reasons.count(None)))

    def advance(name: str) -> Callable[[], None]:
        return lambda: on_evaluation(name, total)

    generators = [sample_generator(settings.seed, index) for index in range(settings.batch_size)]
    labels = _labels(model, generators)
    kind = LatentStates if latent else ImageStates
    with torch.inference_mode(), products("float32"):
        process = settings.num_steps, scale, power
        states = kind(model, labels, generators, *process, advance("the trajectory"))
    del model

    def run(option: Option, repeat: int = settings.repeat) -> Measured:
        return measured(models, states, option, repeat, advance(option.name))

    literal = run(LITERAL)
    if not any(prediction.any() for prediction in literal.predictions):
        raise ValueError(
            f"every {states.prediction} of the checkpoint is zero, as of a model that was never "
            "trained: there is nothing to compare"
        )
    truth = _truth(run) if settings.check else None
    rows = [_row(LITERAL, literal, literal, truth)]
    for option, reason in zip(rest, reasons, strict=True):
        if reason is None:
            try:
                rows.append(_row(option, run(option), literal, truth if option.exact else None))
                continue
            except (RuntimeError, ValueError) as error:  # no kernel, no memory, nothing for fp8
                reason = first_line(error)
        rows.append(Row(option, refused=reason))
    names = states.prediction, states.time, states.sampler
    scale_pow = power if latent and scale is not None else None
    return Verification(*names, states.times, scale, scale_pow, settings.check, rows)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """rms(found - expected) / rms(expected) in float64; of two that are all zero, zero."""
    difference = (found.double() - expected.double()).square().mean().sqrt()
    if difference == 0:
        return 0.0
    return float(difference / expected.double().square().mean().sqrt())


def _row(option: Option, found: Measured, literal: Measured, truth: list[Tensor] | None) -> Row:
    pairs = list(zip(found.predictions, literal.predictions, strict=True))
    of_float64 = None
    if truth is not None:
        of_float64 = [relative_error(*pair) for pair in zip(found.predictions, truth, strict=True)]
    return Row(
        option,
        errors=[relative_error(*pair) for pair in pairs],
        largest=[float((ours.double() - theirs.double()).abs().max()) for ours, theirs in pairs],
        milliseconds=found.milliseconds,
        errors_of_float64=of_float64,
        peak_mib=found.peak_mib,
        note=found.note,
    )


def _truth(run: Callable[[Option, int], Measured]) -> list[Tensor]:
    try:
        return run(TRUTH, 1).predictions
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "there is no memory for the literal model in float64, which --check False does without"
        ) from error


def _guidance(model: DiffiT | ImageDiffiT, settings: Settings) -> tuple[float | None, float]:
    """The guidance's scale, None without, and the power of its schedule."""
    _, scale, power = published_process(model)
    if isinstance(model, ImageDiffiT) and settings.scale_pow is not None:
        raise ValueError("--scale_pow is for latent models, and this one is in image space")
    scale = scale if settings.cfg_scale is None else settings.cfg_scale
    power = power if settings.scale_pow is None else settings.scale_pow
    return scale if settings.guide else None, power


def _labels(model: DiffiT | ImageDiffiT, generators: list[torch.Generator]) -> Tensor | None:
    """A class for each sample from its generator, as the command ``sample`` draws them."""
    classes = model.num_classes
    if classes is None:
        return None
    drawn = [int(torch.randint(classes, (1,), generator=one)) for one in generators]
    return torch.tensor(drawn, device=next(model.parameters()).device)
