"""The trial of a candidate: its own forward against the fused one, in float64, before it is used.

A copy without hooks is tried, with random parameters, so nobody notices. What names and shapes do
not show, a gate in a block or another function in an attention, this does.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffit_kernels.patch import patched
from diffit_kernels.patch.patched import Findings, Patched
from diffit_kernels.patch.structures import Attention, Structure, working_parts

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
AGREEMENT = 1e-9  # of the largest output, in float64
MODULE_VARS = frozenset(vars(nn.Module())) - {"training"} | {"_diffit_backend"}
IDLE = (nn.Identity, nn.Dropout, nn.Softmax)


class Trials:
    """Trials of a model's modules. Modules of one class whose attributes, buffers and parts are
    equal behave alike, and are tried once."""

    def __init__(self):
        self._done: dict[tuple, Findings | str] = {}

    def of(self, module: nn.Module, structure: Structure) -> Findings | str:
        """What was found of a module that may be patched; or why it may not."""
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            return "it is on the meta device: load its weights before patching"
        key = structure, _likeness(module)
        if key not in self._done:
            self._done[key] = _trial(module, structure)
        return self._done[key]


def _trial(module: nn.Module, structure: Structure) -> Findings | str:
    try:
        own, ours, examples = _twins(module, structure)
        twins = own.eval(), ours.eval()
        before = [_attributes(twin) for twin in twins]
        difference = _difference(own, ours, examples.inputs)
        after = [_attributes(twin) for twin in twins]
        masks = examples.masked is not None and _masks_agree(own, ours, examples.masked)
        in_training = _difference(own.train(), ours.train(), examples.inputs)
    except Exception as error:  # a foreign module may raise anything
        return f"trying it raised {type(error).__name__}: {error}{_besides(module, structure)}"
    if not difference <= AGREEMENT:
        other = f"its forward computes something else, by {difference:.1e} of the largest output"
        return other + _besides(module, structure)
    by_own, by_ours = (
        {path for path, _ in new - old} for old, new in zip(before, after, strict=True)
    )
    if missing := by_own - by_ours:
        return f"its forward sets {', '.join(sorted(missing))}, and the fused one would not"
    return Findings(random_training=not in_training <= AGREEMENT, masks=masks)


@torch.no_grad()
def _twins(module: nn.Module, structure: Structure):
    """A copy of the module with random parameters, its patched twin, and what to try them on."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    own = copy.deepcopy(module).double()
    for part in own.modules():
        for hooks in HOOKS:
            getattr(part, hooks).clear()
    for parameter in own.parameters():  # a fresh model's zeros would hide a difference
        parameter.copy_(0.1 * random(*parameter.shape))
    ours = copy.deepcopy(own)
    for part in own.modules():
        if isinstance(part, Patched):
            patched.give_back(part)
    for part in ours.modules():
        if isinstance(part, Patched):
            part._diffit_backend = "eager"
    examples = structure.examples(own, random)
    findings = Findings(masks=examples.masked is not None)
    patched.swap_class(ours, structure, findings, "eager")
    return own, ours, examples


@torch.no_grad()
def _difference(own: Callable, ours: Callable, inputs: list[tuple[Tensor, ...]]) -> float:
    """Largest difference over the largest output, with the same random numbers; NaN if any is."""
    differences = []
    for arguments in inputs:
        results = []
        for twin in (own, ours):
            with torch.random.fork_rng(), patched.quiet():
                torch.manual_seed(0)
                results.append(twin(*arguments))
        expected, actual = results
        if expected.shape != actual.shape:
            return float("inf")
        differences.append((expected - actual).abs().max() / expected.abs().max())
    return float(torch.stack(differences).max())


def _attributes(module: nn.Module) -> set[tuple[str, int]]:
    """What a module and its parts hold, by path and identity."""
    return {
        (f"{name}.{key}".lstrip("."), id(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if key not in MODULE_VARS
    }


def _masks_agree(own: nn.Module, ours: nn.Module, masked: tuple[Tensor, Tensor]) -> bool:
    try:
        return _difference(own, ours, [masked]) <= AGREEMENT
    except Exception:  # what comes second is no mask
        return False


def _besides(module: nn.Module, structure: Structure) -> str:
    """Words on the parts and parameters that the structure does not account for, if any."""
    expected = set(structure.called)
    if isinstance(structure, Attention) and structure.table is not None:
        expected.add(structure.table.table.partition(".")[0])
    idle = {name for name, child in module.named_children() if isinstance(child, IDLE)}
    working = working_parts(module) | {name for name, _ in module.named_parameters(recurse=False)}
    names = ", ".join(sorted(working - expected - idle))
    return f"; beside the parts looked for it has {names}" if names else ""


def _likeness(module: nn.Module) -> tuple:
    """What two modules must share to behave alike, parameters' values aside."""
    return tuple(
        (
            name,
            type(part),
            tuple((k, _identity(v)) for k, v in sorted(vars(part).items()) if k not in MODULE_VARS),
            tuple((k, tuple(v.shape)) for k, v in part.named_parameters(recurse=False)),
            tuple((k, _identity(v)) for k, v in part.named_buffers(recurse=False)),
        )
        for name, part in module.named_modules()
    )


def _identity(value: object) -> object:
    """Equal for equal plain values and tensors; for anything else, the object's own."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), repr(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(_identity(item) for item in value)
    if isinstance(value, Tensor):
        values = value.detach().cpu().reshape(-1).view(torch.uint8)
        return value.dtype, tuple(value.shape), hash(values.numpy().tobytes())
    return id(value)
