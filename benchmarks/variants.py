"""The ways to compute a block or a model: literal, by SDPA and fused, each also compiled.

Each variant is a module of its own, for compiled code depends on a module's flags; all variants of
a case share one set of parameters, so that the deepest model is in memory once.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.peers import compiled, sdpa
from benchmarks.race import DEVICE, Provider, backends
from diffit_kernels.block import TimeDependentAttention
from diffit_kernels.dispatch import PREFERENCE

MAX_AUTOTUNE = "max-autotune"  # with CUDA graphs: the host's time counts here


class SdpaAttention(TimeDependentAttention):
    """The published attention with its core through SDPA, the bias expanded: as one would write it.

    The bias is contiguous and has four dimensions for SDPA's sake: a CPU's kernel takes no mask of
    three, a GPU's none whose rows have gaps.
    """

    def forward(self, x: Tensor, temb: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N, C), (B, T) -> (B, N, C), tokens of ``grid`` row by row; default one window."""
        grid = self.window_size if grid is None else grid
        bias = self.position_bias()
        bias = None if bias is None else bias.contiguous()[None]
        return self.joined(sdpa(*self.heads(x, temb, grid), bias), grid)


def through_sdpa(module: nn.Module) -> None:
    """Every attention computes its core by SDPA."""
    for part in module.modules():
        if isinstance(part, TimeDependentAttention):
            part.__class__ = SdpaAttention  # which differs in its forward alone


def fused(module: nn.Module, backend: str | None) -> None:
    """Blocks run through the fused ops of a backend; None is the default choice."""
    for part in module.modules():
        if hasattr(type(part), "use_fused_tmsa"):
            part.use_fused_tmsa, part.backend = True, backend


def native_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On CUDA, ours with native kernels for the ops that have them; no default is one there."""

    def run(*inputs):
        with mock.patch.dict(PREFERENCE, cuda=("native", *PREFERENCE["cuda"])):
            return function(*inputs)

    return run


@dataclass(frozen=True)
class Variant:
    """One way to compute a literal module.

    Attributes:
        change: what is done to the module.
        mode: of torch.compile; None is not compiled.
        wrap: what is done to the function that is timed.
    """

    change: Callable[[nn.Module], None] = lambda module: None
    mode: str | None = None
    role: str = "peer"
    backend: str | None = None
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda function: function


def _ours(backend: str | None, mode: str | None = None) -> Variant:
    return Variant(functools.partial(fused, backend=backend), mode, "ours", backend)


BEST = next(name for name in PREFERENCE[DEVICE] if name in backends())  # a user's, by default
VARIANTS = {
    "literal": Variant(),
    "literal, torch.compile": Variant(mode="default"),
    "literal, max-autotune": Variant(mode=MAX_AUTOTUNE),
    "SDPA": Variant(through_sdpa),
    "SDPA, torch.compile": Variant(through_sdpa, "default"),
    "SDPA, max-autotune": Variant(through_sdpa, MAX_AUTOTUNE),
    **{f"fused, {name}": _ours(name) for name in backends()},
    f"fused, {BEST}, torch.compile": _ours(BEST, "default"),
}
DEFAULT = f"fused, {BEST}"
if DEVICE == "cuda":
    DEFAULT = "fused, default"  # which may differ from op to op
    VARIANTS[DEFAULT] = _ours(None)
    native = replace(VARIANTS[DEFAULT], backend="native", wrap=native_first)
    VARIANTS["fused, native attention and adaln"] = native


def providers(
    module: nn.Module,
    results: Callable[[Callable[..., Tensor]], Sequence[Tensor]],
    exact: Callable[[], Sequence[Tensor]],
    *,
    call: Callable[[nn.Module], Callable[..., Tensor]] = lambda module: module,
    step: Callable[[Callable[..., Tensor]], object] | None = None,
) -> dict[str, Provider]:
    """Every variant of a literal module as a provider.

    Args:
        results: what is verified of a variant's function: outputs and gradients.
        exact: the same in float64.
        call: a variant's function from its module: the module itself, or one of its methods.
        step: what is timed of a variant's function, if that is more than ``results``.
    """
    literal = call(twin(module))

    @functools.cache
    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        found = exact() if dtype == torch.float64 else results(literal)
        return tuple(result.detach() for result in found)

    def provider(variant: Variant) -> Provider:
        own = twin(module)
        variant.change(own)
        function = variant.wrap(call(own))
        if variant.mode is not None:
            function = compiled(function, mode=variant.mode)
        timed = step and functools.partial(step, function)
        verified = functools.partial(results, function)
        return Provider(verified, expected, variant.role, variant.backend, timed)

    return {name: provider(variant) for name, variant in VARIANTS.items()}


def twin(module: nn.Module) -> nn.Module:
    """The same module on the same parameters, with flags of its own."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
