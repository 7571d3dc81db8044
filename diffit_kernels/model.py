"""The latent DiffiT, with the names, shapes and state dict of the released ImageNet models.

Read top-down; the block is in :mod:`diffit_kernels.block`. One flag, ``use_fused_tmsa``, decides
whether a block computes the published equations literally or through the fused ops of
:mod:`diffit_kernels.ops`, on the same parameters.

The letters: B batch; N tokens (H · W of the grid); C hidden_size; p patch_size; S input_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_kernels import fused
from diffit_kernels.block import AdaLNModulation, DiffiTBlock, modulate
from diffit_kernels.positions import sincos_position_embedding
from diffit_kernels.switches import Switches


class DiffiT(Switches):
    """Latent DiffiT (arXiv 2312.02139): a transformer over patches, conditioned through attention.

    Or, for the paper's comparison, through its norms, or through both. With ``"adaln_zero"`` and no
    position bias it is DiT (arXiv 2212.09748), with the names and results of its checkpoints.

    Args:
        input_size: side S of the latent image; the image's side / 8 for the released models.
        patch_size: p, divides ``input_size``.
        in_channels: channels of the latent image.
        hidden_size: C, a multiple of ``num_heads`` and of 4.
        depth: blocks. The class defaults to 30; the released weights have 28 (:func:`Diffit`).
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP / C.
        mask_ratio, decode_layer: accepted as by the released class, and unused, as there.
        class_dropout_prob: share of labels replaced by the null class in training.
        num_classes: classes; label ``num_classes`` is the null class if ``class_dropout_prob`` > 0.
        learn_sigma: predict a variance beside the noise, doubling the output's channels.
        conditioning: "tmsa" (the released models), "adaln_zero" or "tmsa+adaln", see
            :class:`~diffit_kernels.block.DiffiTBlock`. With adaLN the final layer is DiT's.
        position_bias: whether the attention has a relative position bias.
        use_fused_tmsa: compute the blocks through the fused ops. Changes speed and memory, never
            results beyond rounding. Also a settable property of the model.
        backend: which implementation of the fused ops to use, see :mod:`diffit_kernels.dispatch`;
            None chooses by device. Also a settable property, as is ``gradient_checkpointing``
            (see :class:`~diffit_kernels.switches.Switches`).

    Raises:
        ValueError: sizes that do not fit together, or an unknown backend.
        TypeError: ``use_fused_tmsa`` is not a bool.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 30,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        mask_ratio: float | None = None,
        decode_layer: int | None = None,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        conditioning: str = "tmsa",
        position_bias: bool = True,
        use_fused_tmsa: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        sizes = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "the MLP's width": int(hidden_size * mlp_ratio),
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"DiffiT: {name} must be at least 1, got {value}")
        for rule, holds in (
            ("input_size must be a multiple of patch_size", input_size % patch_size == 0),
            ("hidden_size must be a multiple of num_heads", hidden_size % num_heads == 0),
            ("hidden_size must be a multiple of 4", hidden_size % 4 == 0),
            ("class_dropout_prob must be in [0, 1]", 0 <= class_dropout_prob <= 1),
        ):
            if not holds:
                raise ValueError(
                    f"DiffiT: {rule}, got input_size={input_size}, patch_size={patch_size}, "
                    f"hidden_size={hidden_size}, num_heads={num_heads}, "
                    f"class_dropout_prob={class_dropout_prob}"
                )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.conditioning = conditioning
        grid_size = input_size // patch_size

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, grid_size**2, hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            DiffiTBlock(
                hidden_size,
                num_heads,
                grid_size,
                mlp_ratio,
                conditioning=conditioning,
                position_bias=position_bias,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size, patch_size, self.out_channels, modulated=conditioning != "tmsa"
        )
        self.use_fused_tmsa = use_fused_tmsa
        self.backend = backend
        self.initialize_weights()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(in_channels, S, S) of what it denoises."""
        return self.in_channels, self.input_size, self.input_size

    def initialize_weights(self) -> None:
        """Xavier-uniform linear layers, N(0, 0.02) embeddings, zero output: the published start.

        Modulations start at zero, so that a block with gates starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            if (table := block.attn.relative_position_bias_table) is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLNModulation):
                nn.init.zeros_(module[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        with torch.no_grad():
            side = self.input_size // self.patch_size
            self.pos_embed.copy_(sincos_position_embedding(self.pos_embed.shape[-1], side)[None])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and, with ``learn_sigma``, the variance's interpolation) of latents.

        Args:
            x: (B, in_channels, S, S), noisy latents in the model's dtype.
            t: (B,) timesteps, integers or floats, in the units of training (0..999).
            y: (B,) integer labels, 0..num_classes (the last is the null class).

        Returns:
            (B, out_channels, S, S).

        Raises:
            TypeError, ValueError: an argument breaks one of the rules above. Labels on an
            accelerator are not looked at, for that would wait for the device.
        """
        self.check_inputs(x, t, y)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, C)
        temb = self.t_embedder(t) + self.y_embedder(y, self.training)  # (B, C)
        if self._recomputes():
            for block in self.blocks:
                x = self._call(block, x, temb)
        else:
            x = fused.blocks(self.blocks, DiffiTBlock, x, temb)  # (B, N, C)
        x = self.final_layer(x, temb)  # (B, N, p · p · out_channels)
        return self._unpatchify(x)  # (B, out_channels, S, S)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | None = None,
        diffusion_steps: int = 1000,
        scale_pow: float = 4.0,
    ) -> Tensor:
        """Classifier-free guidance: one pass over [conditional; null] with shared latents.

        ::

            eps  = eps_null + w(t) (eps_cond - eps_null)          for the first three channels
            w(t) = (s - 1) ½ (1 - cos(π (1 - t / diffusion_steps)^scale_pow)) + 1
            w(t) = s    where input_size > 32

        The fourth channel and the variance keep each half's own value, as published.

        Args:
            x: (2B, in_channels, S, S); the second half is ignored and replaced by the first.
            t: (2B,) timesteps. y: (2B,) labels, then the null class.
            cfg_scale: s; None is the plain :meth:`forward` of the batch as it is.
            diffusion_steps: timesteps of the training process.
            scale_pow: the power in w(t); 0 is the constant w(t) = s, as DiT has.

        Returns:
            (2B, out_channels, S, S), both halves guided alike.

        Raises:
            TypeError, ValueError: as :meth:`forward`; or a batch that is not even.
        """
        if cfg_scale is None:
            return self.forward(x, t, y)
        if diffusion_steps < 1:
            raise ValueError(
                f"forward_with_cfg: diffusion_steps must be >= 1, got {diffusion_steps}"
            )
        if len(x) % 2:
            raise ValueError(
                "forward_with_cfg: the batch must be even, [conditional; null], "
                f"got {len(x)} samples"
            )
        half = x[: len(x) // 2]
        out = self.forward(torch.cat((half, half)), t, y)
        weight = self.guidance_weight(t[: len(half)], cfg_scale, diffusion_steps, scale_pow)
        guided = guide(out, weight)
        return torch.cat((torch.cat((guided, guided)), out[:, 3:]), 1)

    def forward_with_time_parts(self, x: Tensor, time_parts: Tensor) -> Tensor:
        """:meth:`forward` with the time tokens' parts given, and k time tokens for every sample.

        For a model of conditioning "tmsa" with ``use_fused_tmsa``, its blocks bare. What does not
        depend on the time token is computed once: patches, and the first block's norm and qkv.

        Args:
            x: (B, in_channels, S, S), as of :meth:`forward`.
            time_parts: (depth, k · B, 2C), k runs of B: q and v parts of every block
                (:func:`~diffit_kernels.ops.time_projections`).

        Returns:
            (k · B, out_channels, S, S).

        Raises:
            ValueError: a block is not of that kind.
        """
        x = self.x_embedder(x) + self.pos_embed  # (B, N, C)
        x = fused.blocks(self.blocks, DiffiTBlock, x, None, time_parts)  # (k · B, N, C)
        return self._unpatchify(self.final_layer(x, None))

    def guidance_weight(
        self, t: Tensor, cfg_scale: float, diffusion_steps: int = 1000, scale_pow: float = 4.0
    ) -> Tensor:
        """w(t) of :meth:`forward_with_cfg`, (B,) float32."""
        if self.input_size > 32:
            return torch.full(t.shape, float(cfg_scale), device=t.device)
        progress = (1 - t.float() / diffusion_steps) ** scale_pow
        return (cfg_scale - 1) * 0.5 * (1 - torch.cos(math.pi * progress)) + 1

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p · p · c) -> (B, c, S, S)."""
        batch, p, side = x.shape[0], self.patch_size, self.input_size // self.patch_size
        x = x.view(batch, side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, side * p, side * p)

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raise TypeError or ValueError for what :meth:`forward` does not take."""
        for name, value in (("x", x), ("t", t), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"DiffiT: {name} must be a tensor, got {type(value).__name__}")
            if value.device != self.pos_embed.device:
                raise ValueError(
                    f"DiffiT: {name} is on {value.device}, the model on {self.pos_embed.device}"
                )
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ValueError(
                f"DiffiT: x must have shape (B, {self.in_channels}, {self.input_size}, "
                f"{self.input_size}), got {tuple(x.shape)}"
            )
        dtype = self.x_embedder.proj.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"DiffiT: x must be {dtype} like the model, got {x.dtype}")
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"DiffiT: {name} must have shape ({x.shape[0]},), one per sample of x, "
                    f"got {tuple(value.shape)}"
                )
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"DiffiT: t must be integer or floating point, got {t.dtype}")
        self.y_embedder.check("DiffiT", y)


def Diffit(**kwargs) -> DiffiT:
    """The released configuration of :class:`DiffiT`: depth 28, hidden 1152, patch 2, 16 heads.

    ``input_size`` is 32 for 256-pixel images (the default) and 64 for 512.
    """
    return DiffiT(**{"depth": 28, "hidden_size": 1152, "patch_size": 2, "num_heads": 16, **kwargs})


def guide(out: Tensor, weight: Tensor) -> Tensor:
    """eps_null + w (eps_cond - eps_null) of the first three channels, (B, 3, S, S).

    out: (2B, c, S, S), the model's of [conditional; null]; weight: (B,).
    """
    conditional, null = out[:, :3].chunk(2)
    return null + weight.to(out.dtype).view(-1, 1, 1, 1) * (conditional - null)


class PatchEmbed(nn.Module):
    """(B, c, S, S) -> (B, N, C): one linear map per p × p patch, tokens in row-major order."""

    use_fused_tmsa = False

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_fused_tmsa:
            return fused.patch_tokens(self.proj, x)
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(B,) timesteps -> (B, C): sinusoidal features, cosines first, through a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
        args = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
        features = torch.cat((args.cos(), args.sin()), 1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """(B,) labels -> (B, C); in training a share of them becomes the null class."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def check(self, model: str, labels: Tensor) -> None:
        """Raise TypeError or ValueError unless these are classes of the model.

        The values are looked at on a CPU alone: elsewhere that would wait for the device.
        """
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{model}: y must be int64 or int32 class labels, got {labels.dtype}")
        # not of fake, traced or remote tensors
        readable = type(labels) is Tensor and labels.device.type == "cpu"
        if readable and labels.numel() and not torch.compiler.is_compiling():
            last = self.embedding_table.num_embeddings - 1
            if labels.min() < 0 or labels.max() > last:
                found = f"{int(labels.min())}..{int(labels.max())}"
                raise ValueError(f"{model}: labels must be in 0..{last}, got {found}")

    def forward(self, labels: Tensor, training: bool) -> Tensor:
        if training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """(B, N, C), (B, C) -> (B, N, p · p · c): Linear(SiLU(LN(x))), without the time token.

    Where ``modulated`` it is DiT's, Linear(LN(x) (1 + scale) + shift), without SiLU.
    """

    use_fused_tmsa = False
    backend: str | None = None

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, modulated: bool = False
    ):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = AdaLNModulation(hidden_size, 2 * hidden_size) if modulated else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if self.adaLN_modulation is None:
            return self.linear(F.silu(self.norm_final(x)))
        shift, scale = self.adaLN_modulation(temb).chunk(2, -1)
        if self.use_fused_tmsa:
            _, x = fused.residual_norm(
                self.norm_final, x, shift=shift, scale=scale, backend=self.backend
            )
        else:
            x = modulate(self.norm_final(x), shift, scale)
        return self.linear(x)
