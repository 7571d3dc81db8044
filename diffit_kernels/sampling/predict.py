"""What a run of guided sampling asks of the model, without what can be known before a step.

The letters: B batch; S side and c channels of a latent; C width of the model.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffit_kernels import fused
from diffit_kernels.block import DiffiTBlock, Mlp, TimeDependentAttention
from diffit_kernels.model import (
    DiffiT,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    guide,
)
from diffit_kernels.ops import time_projections

BLOCKS_A_CALL = 128  # the most that every backend's time_projections takes
OWN_PARTS = (
    DiffiT,
    PatchEmbed,
    TimestepEmbedder,
    LabelEmbedder,
    FinalLayer,
    DiffiTBlock,
    TimeDependentAttention,
    Mlp,
    nn.ModuleList,
    nn.Sequential,
    nn.Linear,
    nn.Conv2d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GELU,
    nn.SiLU,
)


@dataclass(frozen=True)
class Savings:
    """What a :class:`Predictor` saves. None changes results beyond rounding; tests switch them off.

    Attributes:
        time_tables: the time token's projections are sums of rows of two tables, made once.
        shared_halves: what the two halves of guidance have in common is computed once.
        skipped_guidance: no null half where its weight in the result is zero.
    """

    time_tables: bool = True
    shared_halves: bool = True
    skipped_guidance: bool = True


ALL_SAVINGS = Savings()


def guidance_steps(
    model: DiffiT,
    timesteps: Sequence[int],
    cfg_scale: float,
    scale_pow: float = 4.0,
    guidance_eps: float = 0.0,
) -> list[int]:
    """The steps whose guidance needs the null half: indices i with |w(t_i) - 1| > guidance_eps.

    ``eps_null + w (eps_cond - eps_null)`` is eps_cond where w = 1. With ``guidance_eps`` 0 only
    steps whose w, in float32, is exactly 1 are left out: 24 of the 250 published ones at 256 pixels
    (t > 903), none at 512, where w is constant. More is an approximation, by at most
    ``guidance_eps`` (eps_cond - eps_null): 1e-4 leaves out 61, 1e-3 81, 1e-2 108.

    Args:
        model: whose :meth:`DiffiT.guidance_weight` is w. cfg_scale, scale_pow: of that.
        timesteps: t_i, in the units of training.
        guidance_eps: at least 0.

    Raises:
        ValueError: ``guidance_eps`` < 0.
    """
    if not guidance_eps >= 0:
        raise ValueError(f"guidance_steps: guidance_eps must be at least 0, got {guidance_eps}")
    t = torch.tensor([int(t) for t in timesteps])
    weight = model.guidance_weight(t, cfg_scale, scale_pow=scale_pow)
    return ((weight - 1).abs() > guidance_eps).nonzero().flatten().tolist()


class Predictor:
    """The prediction for a batch of labels at the steps of a run, guided as published.

    ::

        forward_with_cfg([x; x], [t; t], [labels; null])[:B]

    for every t of the run; without ``cfg_scale`` forward(x, t, labels). Of a fused model whose
    blocks are conditioned by TMSA alone, with no hook, adapter or wrapper anywhere, it computes

    - time projections from tables: c = t_emb(t) + y_emb(y) has no activation, so that every
      block's W c + b is W t_emb(t) + (W y_emb(y) + b), one row of a table over the timesteps and
      one of a table over the labels' classes. Both are made at the first call, in the model's
      dtype with float32 sums, and take (timesteps + classes present + 1) · depth · 2C numbers: for
      the released models 258 KB of float32 each, 65 MB for 250 timesteps. A step makes 2B more;
    - for one half what has no time token in it: patches, and the first block's norm and qkv.

    Any other model is called as it is. The null half is left out at the steps that
    :func:`guidance_steps` does not name, for every :class:`DiffiT` but subclasses.

    Args:
        model: a :class:`DiffiT` in eval mode, or what has its methods. It must not change between
            calls.
        labels: (B,) int64 classes.
        timesteps: those of the run, in the units of training.
        cfg_scale, scale_pow: of :meth:`DiffiT.forward_with_cfg`; None does not guide.
        guidance_eps: of :func:`guidance_steps`.
        savings: which of these to use.

    Raises:
        ValueError: ``guidance_eps`` < 0.
    """

    def __init__(
        self,
        model: DiffiT,
        labels: Tensor,
        timesteps: Sequence[int],
        cfg_scale: float | None = None,
        scale_pow: float = 4.0,
        *,
        guidance_eps: float = 0.0,
        savings: Savings = ALL_SAVINGS,
    ):
        self.model, self.labels, self.savings = model, labels, savings
        self.timesteps = [int(t) for t in timesteps]
        self.cfg_scale, self.scale_pow = cfg_scale, scale_pow
        guided = range(len(self.timesteps)) if cfg_scale is not None else ()
        if cfg_scale is not None and savings.skipped_guidance and type(model) is DiffiT:
            guided = guidance_steps(model, timesteps, cfg_scale, scale_pow, guidance_eps)
        self._guided = frozenset(guided)
        saves = savings.time_tables or (savings.shared_halves and cfg_scale is not None)
        self._splits = saves and len(labels) > 0 and takes_time_parts(model)
        if self._guided and self._splits:  # without a null class the model says what is wrong
            self._splits = model.y_embedder.embedding_table.num_embeddings > model.num_classes

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The prediction for latents (B, c, S, S), in the model's dtype, at ``timesteps[step]``.

        Returns:
            (B, out_channels, S, S); of a guided one the conditional half.

        Raises:
            TypeError, ValueError: as :meth:`DiffiT.forward`.
        """
        t = torch.full_like(self.labels, self.timesteps[step])
        guided = step in self._guided
        if self._splits:
            self.model.check_inputs(latents, t, self.labels)
            out = self._from_time_parts(latents, step, guided)
        elif self.cfg_scale is None:
            return self.model(latents, t, self.labels)
        else:
            return self._by_model(latents, t, guided)
        if not guided:
            return out
        weight = self.model.guidance_weight(t, self.cfg_scale, scale_pow=self.scale_pow)
        conditional = out[: len(latents)]
        return torch.cat((guide(out, weight), conditional[:, 3:]), 1)

    def _by_model(self, latents: Tensor, t: Tensor, guided: bool) -> Tensor:
        if not guided:
            return self.model.forward_with_cfg(latents, t, self.labels)
        null = torch.full_like(self.labels, self.model.num_classes)
        pair = (torch.cat(halves) for halves in ((latents, latents), (t, t), (self.labels, null)))
        out = self.model.forward_with_cfg(*pair, cfg_scale=self.cfg_scale, scale_pow=self.scale_pow)
        return out[: len(latents)]

    def _from_time_parts(self, latents: Tensor, step: int, guided: bool) -> Tensor:
        """(B, ...), or of both halves (2B, ...) where ``guided``."""
        classes, rows = self._classes
        rows = rows if guided else rows[: len(latents)]
        if self.savings.time_tables:
            of_timesteps, of_classes = self._tables
            parts = of_classes[:, rows] + of_timesteps[:, step, None]
        else:
            t = torch.full_like(rows, self.timesteps[step])
            temb = self.model.t_embedder(t) + self.model.y_embedder(classes[rows], False)
            parts = time_parts(self.model, temb)
        if guided and not self.savings.shared_halves:
            latents = torch.cat((latents, latents))
        return self.model.forward_with_time_parts(latents, parts)

    @functools.cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """The classes present, then null if any is guided; and the places there of [labels; null].

        Without guidance the places are those of the labels alone.
        """
        present, rows = self.labels.unique(return_inverse=True)
        if not self._guided:
            return present, rows
        classes = torch.cat((present, present.new_tensor([self.model.num_classes])))
        return classes, torch.cat((rows, torch.full_like(rows, len(present))))

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """(depth, timesteps, 2C) and (depth, classes + 1, 2C), the second with the biases."""
        t = torch.tensor(self.timesteps, device=self.labels.device)
        classes = self._classes[0]
        of_timesteps = time_parts(self.model, self.model.t_embedder(t), bias=False)
        return of_timesteps, time_parts(self.model, self.model.y_embedder(classes, False))


def time_parts(model: DiffiT, temb: Tensor, bias: bool = True) -> Tensor:
    """(B, C) time tokens -> (depth, B, 2C): every block's q and v parts, with or without biases."""
    layers = [block.attn.qkv_temb for block in model.blocks]
    parts = []
    for start in range(0, len(layers), BLOCKS_A_CALL):
        called = layers[start : start + BLOCKS_A_CALL]
        biases = [layer.bias for layer in called] if bias else ()
        weights = [layer.weight for layer in called]
        parts.append(time_projections(temb, weights, biases, backend=model.backend))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def takes_time_parts(model: nn.Module) -> bool:
    """Whether calling the model is no more than its parameters and the fused blocks say.

    A :class:`DiffiT` in eval mode, conditioned by TMSA alone, ``use_fused_tmsa`` throughout, no
    autocast, and of every part its class is ours and nothing hangs on it.
    """
    return (
        type(model) is DiffiT
        and model.conditioning == "tmsa"
        and not model.training
        and not torch.is_autocast_enabled(model.pos_embed.device.type)
        and all(type(part) in OWN_PARTS and not fused.is_touched(part) for part in model.modules())
        and all(_is_expected(block) for block in model.blocks)
    )


def _is_expected(block: nn.Module) -> bool:
    return (
        type(block) is DiffiTBlock
        and type(block.attn) is TimeDependentAttention
        and block.use_fused_tmsa
        and block.attn.use_fused_tmsa
        and type(block.attn.qkv_temb) is nn.Linear
        and block.attn.qkv_temb.bias is not None
    )
