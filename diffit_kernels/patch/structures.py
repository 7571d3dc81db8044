"""What is recognised: attentions, blocks and final layers, by the names of their parts.

A structure says where a module keeps what the fused forward needs, and on what inputs the two
forwards are tried against each other. No class name and no import is looked at.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffit_kernels import fused, shifted_windows
from diffit_kernels.block import TimeDependentAttention
from diffit_kernels.positions import relative_position_index


@dataclass(frozen=True)
class Table:
    """Where an attention keeps its relative position bias: paths of attributes."""

    table: str
    index: str
    window_size: str


def _table_in(holder: str) -> Table:
    names = ("relative_position_bias_table", "relative_position_index", "window_size")
    return Table(*(holder + name for name in names))


PARTS = ("qkv", "proj", "num_heads")
TIME_PROJECTIONS = ("qkv_temb", "qkv_t")  # of DiffiT as released; of an image-space DiffiT
TABLES = (
    _table_in(""),  # DiffiT, Swin
    Table("rpb.table", "rpb.index", "window_size"),  # an image-space DiffiT
    _table_in("rel_pos_bias."),  # MDT
    _table_in("rel_pos."),  # ViT with relative positions
)
BLOCK_PARTS = ("norm1", "norm2", "mlp")
ATTENTIONS = ("attn", "tmsa")  # the names of a block's attention
MODULATION = "adaLN_modulation"
FINAL_PARTS = ("norm_final", "linear", MODULATION)
SEPARATE = (("to_q", "to_k", "to_v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
TOKENS = (5, 272)  # to try where any number will do: a prime, and more than a small window holds

LOOKED_FOR = (
    f"modules with {', '.join(PARTS)}; beside them, if they have any, a time projection "
    f"({', '.join(TIME_PROJECTIONS)}) and a position bias "
    f"({', '.join(entry.table for entry in TABLES)}) with its index and window_size"
)


@dataclass(frozen=True)
class Examples:
    """Inputs of a trial.

    Attributes:
        inputs: the two forwards must agree on each of these.
        masked: tokens and a mask; they need not agree, but then calls with masks are not served.
    """

    inputs: list[tuple[Tensor, ...]]
    masked: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Attention:
    """proj(attention(qkv(x))): forward(x), or forward(x, temb) if there is a time projection.

    x: (rows, L, C), one window a row, or any number of tokens without a table; temb: (rows, T).
    """

    time: str | None
    table: Table | None

    @property
    def called(self) -> tuple[str, ...]:
        """The children that the fused forward calls, or reads as a call would."""
        return "qkv", "proj", "proj_drop", *((self.time,) if self.time else ())

    @property
    def takes_time(self) -> bool:
        return self.time is not None

    def parts(self, module: nn.Module) -> fused.AttentionParts:
        table, window = None, self.window(module)
        if window is not None:
            table = part(module, self.table.table)
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            table = table if len(table) == rows else table[:rows]
        return fused.AttentionParts(
            module.qkv,
            getattr(module, self.time) if self.time else None,
            module.proj,
            table,
            module.num_heads,
            window,
            getattr(module, "scale", None),
        )

    def examples(self, module: nn.Module, random: Callable[..., Tensor]) -> Examples:
        channels, window = width(module.qkv), self.window(module)
        inputs = [(random(2, n, channels),) for n in _numbers_of_tokens(window)]
        if self.time:
            size = width(getattr(module, self.time))
            return Examples([(*x, random(2, size)) for x in inputs])
        names, masked = argument_names(type(module)), None
        if window is not None and len(names) > 1 and "mask" in names[1]:
            h, w = window
            first = (h + 1) // 2, (w + 1) // 2
            cuts = torch.tensor([(h, w), (first[0], w), (h, first[1]), first])
            mask = shifted_windows.mask_of(cuts, window).to(inputs[0][0].device)
            masked = random(2 * len(cuts), h * w, channels), mask
        return Examples(inputs, masked)

    def window(self, module: nn.Module) -> tuple[int, int] | None:
        return self.table and _window(part(module, self.table.window_size))


@dataclass(frozen=True)
class Block:
    """x̂ = x + g₁ · attn(m₁(norm1(x)), c);  x̂ + g₂ · mlp(m₂(norm2(x̂))), with m, g from c or not.

    forward(x, c), or forward(x) where nothing needs a time token; x (B, N, C), c (B, T). With a
    table all tokens are one window: on more, a block may do anything.
    """

    attention: str
    of_attention: Attention
    window: tuple[int, int] | None
    modulation: str | None

    @property
    def called(self) -> tuple[str, ...]:
        modulation = (self.modulation,) if self.modulation else ()
        return *BLOCK_PARTS, self.attention, *modulation

    @property
    def takes_time(self) -> bool:
        return self.modulation is not None or self.of_attention.takes_time

    def examples(self, module: nn.Module, random: Callable[..., Tensor]) -> Examples:
        attention, time = getattr(module, self.attention), ()
        if self.takes_time:
            name = self.of_attention.time
            holder = getattr(module, self.modulation) if name is None else getattr(attention, name)
            time = (random(2, width(holder)),)
        channels = width(attention.qkv)
        numbers = _numbers_of_tokens(self.window)
        return Examples([(random(2, n, channels), *time) for n in numbers])


@dataclass(frozen=True)
class FinalLayer:
    """linear(norm_final(x) (1 + scale) + shift), (shift, scale) = adaLN_modulation(c)."""

    called = FINAL_PARTS
    takes_time = True

    def examples(self, module: nn.Module, random: Callable[..., Tensor]) -> Examples:
        channels, size = width(module.linear), width(getattr(module, MODULATION))
        return Examples([(random(2, 5, channels), random(2, size))])


Structure = Attention | Block | FinalLayer


def attention_of(module: nn.Module) -> Attention | str | None:
    """Its structure; for a near miss the reason; None for anything else."""
    if isinstance(module, TimeDependentAttention):
        return "it is diffit_kernels' own: set model.use_fused_tmsa = True instead"
    if not isinstance(getattr(module, "qkv", None), nn.Module):
        for names in SEPARATE:
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                return f"q, k and v have layers of their own ({', '.join(names)}), not one qkv"
        return None
    if lacking := [name for name in PARTS if not hasattr(module, name)]:
        return f"lacks {', '.join(lacking)}"
    if (reason := _out_of_reach(module)) is not None:
        return reason
    try:
        structure = Attention(
            next((name for name in TIME_PROJECTIONS if _has(module, [name])), None),
            next((entry for entry in TABLES if _has(module, vars(entry).values())), None),
        )
        return _misfit(module, structure) or structure
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"its parts do not fit together: {error}"


def _misfit(module: nn.Module, structure: Attention) -> str | None:
    names = argument_names(type(module))
    if structure.takes_time and len(names) < 2:
        return f"its forward takes ({', '.join(names)}), not tokens and a time token"
    if structure.table is None:
        window = getattr(module, "window_size", None)
        return f"it has a window_size {window}, but no bias table that is known" if window else None
    h, w = _window(part(module, structure.table.window_size))
    table, index = part(module, structure.table.table), part(module, structure.table.index)
    rows, heads = (2 * h - 1) * (2 * w - 1), module.num_heads
    if table.dim() != 2 or len(table) < rows or table.shape[1] != heads:
        return f"its bias table has shape {tuple(table.shape)}, not {(rows, heads)}"
    if index.numel() != (h * w) ** 2:
        return (
            f"its relative_position_index has {index.numel()} entries, not {(h * w) ** 2} for "
            f"{h} x {w} tokens: tokens without a place, such as a class token, are not served"
        )
    expected = relative_position_index((h, w), index.device)
    if not index.is_meta and not torch.equal(index.reshape(h * w, -1).long(), expected):
        return "its relative_position_index is not the row-major one"
    return None


def block_of(module: nn.Module, attentions: dict[nn.Module, Attention]) -> Block | None:
    """Its structure, if beside an attention of these, two norms and an MLP nothing in it works."""
    working = working_parts(module)
    name = next((name for name in ATTENTIONS if name in working), None)
    attention = attentions.get(getattr(module, name)) if name else None
    if attention is None or _out_of_reach(module) is not None:
        return None
    window = attention.window(getattr(module, name))
    structure = Block(name, attention, window, MODULATION if MODULATION in working else None)
    enough = len(argument_names(type(module))) > structure.takes_time
    return structure if enough and working == set(structure.called) else None


def final_layer_of(module: nn.Module) -> FinalLayer | None:
    """Its structure, if it is made of a norm, a linear layer and a modulation."""
    if working_parts(module) != set(FINAL_PARTS) or _out_of_reach(module) is not None:
        return None
    return FinalLayer() if len(argument_names(type(module))) > 1 else None


def working_parts(module: nn.Module) -> set[str]:
    """The names of the children that may compute something."""
    return {name for name, child in module.named_children() if type(child) is not nn.Identity}


def part(module: nn.Module, path: str) -> object:
    """The attribute at a path such as ``rpb.table``."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def width(module: nn.Module) -> int:
    """C of what a projection takes, whatever the projection is wrapped in."""
    for layer in module.modules():
        if hasattr(layer, "in_features"):
            return layer.in_features
    raise ValueError(f"there is no linear layer in its {type(module).__name__}")


def arguments(original: type) -> list[inspect.Parameter]:
    """What the forward of a class takes, but for ``self``, ``*args`` and ``**kwargs``."""
    given = list(inspect.signature(original.forward).parameters.values())[1:]
    return [p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def argument_names(original: type) -> list[str]:
    return [parameter.name for parameter in arguments(original)]


def _out_of_reach(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return "its own parameters are parametrized: remove that before patching"
    return None


def _has(module: nn.Module, paths: Iterable[str]) -> bool:
    try:
        return all(part(module, path) is not None for path in paths)
    except AttributeError:
        return False


def _window(size: int | Iterable[int]) -> tuple[int, int]:
    h, w = (size, size) if isinstance(size, int) else size
    return h, w


def _numbers_of_tokens(window: tuple[int, int] | None) -> tuple[int, ...]:
    return TOKENS if window is None else (window[0] * window[1],)
