"""What a run of guided sampling asks of the model, without what can be known before a step.

The letters: B batch; S side and c channels of a latent; C width of the model; k 1, or 2 if guided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffit_kernels import fused
from diffit_kernels.block import DiffiTBlock, Mlp, TimeDependentAttention
from diffit_kernels.fp8_linear import Fp8Linear
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
    Fp8Linear,
    nn.Conv2d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GELU,
    nn.SiLU,
)


@dataclass(frozen=True)
class Savings:
    """What sampling saves. None changes results beyond rounding; tests switch them off.

    Attributes:
        time_tables: the time token's projections are sums of what was computed once.
        shared_halves: what the two halves of guidance have in common is computed once.
        skipped_guidance: no null half where its weight in the result is zero.
        step_graph: on CUDA a step is one launch, of a graph.
    """

    time_tables: bool = True
    shared_halves: bool = True
    skipped_guidance: bool = True
    step_graph: bool = True


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


class Condition(NamedTuple):
    """What the labels of a batch come to, at all steps.

    Attributes:
        labels: (B,) int64 classes.
        parts: (depth, k · B, 2C) the labels' share of every block's time parts, biases included;
            k = 2, [labels; null], if any step is guided. None where none is computed ahead.
    """

    labels: Tensor
    parts: Tensor | None


class Predictor:
    """The predictions of a run's steps for any batch of labels, guided as published.

    ::

        forward_with_cfg([x; x], [t; t], [labels; null])[:B]

    for every t of the run; without ``cfg_scale`` forward(x, t, labels). Of a fused model whose
    blocks are conditioned by TMSA alone, with no hook, adapter or wrapper anywhere, it computes

    - time projections from tables: c = t_emb(t) + y_emb(y) has no activation, so that every
      block's W c + b is W t_emb(t) + (W y_emb(y) + b), a row of a table over the timesteps, made
      once, and what is made of a batch's classes at its start. In the model's dtype with float32
      sums the table takes timesteps · depth · 2C numbers: for the released models 258 KB of float32
      each, 65 MB for 250 timesteps;
    - for one half what has no time token in it: patches, and the first block's norm and qkv.

    Any other model is called as it is. The null half is left out at the steps that
    :func:`guidance_steps` does not name, for every :class:`DiffiT` but subclasses.

    A step is given as a tensor and read on the device alone, so that one CUDA graph serves all
    steps that are guided alike.

    Args:
        model: a :class:`DiffiT` in eval mode, or what has its methods. It must not change between
            calls.
        timesteps: those of the run, in the units of training.
        cfg_scale, scale_pow: of :meth:`DiffiT.forward_with_cfg`; None does not guide.
        guidance_eps: of :func:`guidance_steps`.
        savings: which of these to use.

    Attributes:
        guided: the steps that need the null half.

    Raises:
        ValueError: ``guidance_eps`` < 0.
    """

    def __init__(
        self,
        model: DiffiT,
        timesteps: Sequence[int],
        cfg_scale: float | None = None,
        scale_pow: float = 4.0,
        *,
        guidance_eps: float = 0.0,
        savings: Savings = ALL_SAVINGS,
    ):
        self.model, self.savings = model, savings
        self.timesteps = torch.tensor([int(t) for t in timesteps])
        self.cfg_scale, self.scale_pow = cfg_scale, scale_pow
        guided = range(len(self.timesteps)) if cfg_scale is not None else ()
        if cfg_scale is not None and savings.skipped_guidance and type(model) is DiffiT:
            guided = guidance_steps(model, timesteps, cfg_scale, scale_pow, guidance_eps)
        self.guided = frozenset(guided)
        saves = savings.time_tables or (savings.shared_halves and cfg_scale is not None)
        self._splits = saves and takes_time_parts(model)
        if self.guided and self._splits:  # without a null class the model says what is wrong
            self._splits = model.y_embedder.embedding_table.num_embeddings > model.num_classes
        self._timesteps = self.timesteps.to(next(model.parameters()).device)
        self._time_table = None  # (depth, timesteps, 2C), without biases
        if self._splits and savings.time_tables:
            with torch.inference_mode():
                temb = model.t_embedder(self._timesteps)
                self._time_table = time_parts(model, temb, bias=False)

    def condition(self, labels: Tensor) -> Condition:
        """What :meth:`__call__` takes for a batch of labels, (B,) int64 on the model's device."""
        if self._time_table is None or not len(labels):
            return Condition(labels, None)
        self.model.y_embedder.check("DiffiT", labels)
        present, rows = labels.unique(return_inverse=True)
        if self.guided:
            rows = torch.cat((rows, torch.full_like(rows, len(present))))
            present = torch.cat((present, present.new_tensor([self.model.num_classes])))
        return Condition(labels, time_parts(self.model, self._embedded(present))[:, rows])

    def __call__(self, latents: Tensor, condition: Condition, step: Tensor, guided: bool) -> Tensor:
        """The prediction for latents (B, c, S, S), in the model's dtype, at ``timesteps[step]``.

        Args:
            latents: of the batch that ``condition`` was made for.
            step: (1,) int64 on the model's device.
            guided: with the null half; whether ``step`` is in :attr:`guided`.

        Returns:
            (B, out_channels, S, S); of a guided one the conditional half.

        Raises:
            TypeError, ValueError: as :meth:`DiffiT.forward`.
        """
        t = self._timesteps.index_select(0, step).expand(len(latents))
        if self._splits and len(latents):
            self.model.check_inputs(latents, t, condition.labels)
            out = self._from_time_parts(latents, condition, t, step, guided)
        elif self.cfg_scale is None:
            return self.model(latents, t, condition.labels)
        else:
            return self._by_model(latents, t, condition.labels, guided)
        if not guided:
            return out
        weight = self.model.guidance_weight(t, self.cfg_scale, scale_pow=self.scale_pow)
        conditional = out[: len(latents)]
        return torch.cat((guide(out, weight), conditional[:, 3:]), 1)

    def _by_model(self, latents: Tensor, t: Tensor, labels: Tensor, guided: bool) -> Tensor:
        if not guided:
            return self.model.forward_with_cfg(latents, t, labels)
        null = torch.full_like(labels, self.model.num_classes)
        pair = (torch.cat(halves) for halves in ((latents, latents), (t, t), (labels, null)))
        out = self.model.forward_with_cfg(*pair, cfg_scale=self.cfg_scale, scale_pow=self.scale_pow)
        return out[: len(latents)]

    def _from_time_parts(
        self, latents: Tensor, condition: Condition, t: Tensor, step: Tensor, guided: bool
    ) -> Tensor:
        """(B, ...), or of both halves (2B, ...) where ``guided``."""
        labels, parts = condition
        if parts is None:
            temb = self.model.t_embedder(t)
            halves = [self._embedded(labels) + temb]
            if guided:
                halves.append(
                    self._embedded(torch.full_like(labels, self.model.num_classes)) + temb
                )
            parts = time_parts(self.model, torch.cat(halves))
        else:
            rows = (1 + guided) * len(latents)
            parts = parts[:, :rows] + self._time_table.index_select(1, step)
        if guided and not self.savings.shared_halves:
            latents = torch.cat((latents, latents))
        return self.model.forward_with_time_parts(latents, parts)

    def _embedded(self, classes: Tensor) -> Tensor:
        return self.model.y_embedder(classes, False)


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


def is_own(model: nn.Module) -> bool:
    """Whether calling the model is no more than its parameters and our classes say.

    A :class:`DiffiT` in eval mode without autocast, of whose parts each has a class of ours or
    PyTorch's, and nothing hangs on it.
    """
    return (
        type(model) is DiffiT
        and not model.training
        and not torch.is_autocast_enabled(model.pos_embed.device.type)
        and all(type(part) in OWN_PARTS and not fused.is_touched(part) for part in model.modules())
    )


def takes_time_parts(model: nn.Module) -> bool:
    """Whether the blocks' time parts may be given: :func:`is_own`, TMSA alone, and fused all over.

    The projections must be plain layers with biases.
    """
    return (
        is_own(model)
        and model.conditioning == "tmsa"
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
