"""The image-space DiffiT: a U of residual cells whose attention is windowed (eqs. 9 and 10).

No code and no weights of it were released. What the paper leaves open is an argument here, and the
docstring says what the paper says. Read top-down; the cell is in :mod:`diffit_kernels.cell`, and
:mod:`diffit_kernels.sampling.edm` trains and samples.

The letters: B batch; S image_size; H, W a stage's pixels, which are its tokens; C its channels;
T temb_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffit_kernels.block import check_choice
from diffit_kernels.cell import ResidualCell
from diffit_kernels.model import LabelEmbedder
from diffit_kernels.sampling.edm import denoised
from diffit_kernels.switches import Switches

SKIPS = ("concatenate", "add")


class ImageDiffiT(Switches):
    """Image-space DiffiT (arXiv 2312.02139): the network F of EDM's denoiser, see :meth:`denoise`.

    ::

        tokenizer  Conv3x3
        encoder    per stage: cells; then a convolution of stride 2 to the next stage's channels
        decoder    from the last stage up: the skip of the encoder's stage, cells; then a transposed
                   convolution of stride 2 to the channels of the stage above
        head       GroupNorm, Conv3x3

    The encoder's last stage and the decoder's first one follow each other without a skip.

    Args:
        image_size: S; stage i has pixels S / 2^i a side, which must be whole.
        in_channels: channels of the images, and of the output.
        channels: C of each stage, from full size down. Paper: 128, 256, 256 for CIFAR-10 and 128,
            256, 256, 256 for FFHQ-64.
        num_cells: L, cells of a stage in the encoder, and again in the decoder; one number or one
            per stage. Paper: contradictory, 4 in one table and 1 or 2 in the text.
        window_size: side of the attention's windows, which must divide the stage's; one number or
            one per stage. Paper: 4 for CIFAR-10, 8 for FFHQ-64.
        num_heads: heads, one number or one per stage. Paper: not stated.
        num_groups: groups of each GroupNorm. Paper: not stated.
        mlp_ratio: hidden width of the MLP / C. Paper: not stated; 4 in the released latent models.
        temb_size: T, even, the time token's width. Paper: 512.
        temb_bias: whether the time token's projection to q, k and v has a bias. Paper: the
            equations have none; the released latent models have one.
        norm_affine: whether LayerNorms have weight and bias. Paper: not stated.
        norm_eps: of LayerNorms and GroupNorms. Paper: not stated.
        gelu: "tanh", as in the released latent models, or "none" for the exact one. Paper: not
            stated.
        skip: "concatenate" or "add" what an encoder stage leaves to the decoder. Paper: not stated.
            Concatenated, the first cell of the decoder's stage maps 2C channels to C, and its
            input reaches the sum through a 1x1 convolution without bias.
        head_norm: whether the head has its GroupNorm. Paper: it does.
        num_classes: classes; None for a model without (the paper's are unconditional).
        class_dropout_prob: share of labels replaced by the null class in training; label
            ``num_classes`` is the null class if it is > 0.
        use_fused_tmsa: compute the cells through the fused ops, on feature maps that stay channels
            last: windows are never copied. Changes speed and memory, never results beyond
            rounding. Also a settable property of the model.
        backend: which implementation of the fused ops to use, see :mod:`diffit_kernels.dispatch`;
            None chooses by device. Also a settable property, as is ``gradient_checkpointing``
            (see :class:`~diffit_kernels.switches.Switches`).

    Attributes:
        config: the arguments that make such a model, but for ``use_fused_tmsa`` and ``backend``.

    Raises:
        TypeError: a size is not an int, or ``use_fused_tmsa`` not a bool.
        ValueError: sizes that do not fit together, or an unknown choice or backend.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        channels: Sequence[int] = (128, 256, 256),
        num_cells: int | Sequence[int] = 2,
        window_size: int | Sequence[int] = 4,
        num_heads: int | Sequence[int] = 4,
        num_groups: int = 8,
        mlp_ratio: float = 4.0,
        temb_size: int = 512,
        temb_bias: bool = True,
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
        gelu: str = "tanh",
        skip: str = "concatenate",
        head_norm: bool = True,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        use_fused_tmsa: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        stages = len(channels) if isinstance(channels, Sequence) else 1
        channels, num_cells, window_size, num_heads = (
            _per_stage(name, value, stages)
            for name, value in (
                ("channels", channels),
                ("num_cells", num_cells),
                ("window_size", window_size),
                ("num_heads", num_heads),
            )
        )
        for name, value in (
            ("image_size", image_size),
            ("in_channels", in_channels),
            ("num_groups", num_groups),
            ("temb_size", temb_size),
            ("num_classes", 1 if num_classes is None else num_classes),
            ("the MLP's width", int(min(channels) * mlp_ratio)),
        ):
            _check_size(name, value)
        for rule, value, holds in (
            ("temb_size must be even", temb_size, temb_size % 2 == 0),
            ("norm_eps must be >= 0", norm_eps, norm_eps >= 0),
            (
                "class_dropout_prob must be in [0, 1]",
                class_dropout_prob,
                0 <= class_dropout_prob <= 1,
            ),
        ):
            if not holds:
                raise ValueError(f"ImageDiffiT: {rule}, got {value}")
        check_choice("skip", skip, SKIPS)
        _check_stages(image_size, channels, window_size, num_heads, num_groups)
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.skip = skip
        of_cells = {
            "num_groups": num_groups,
            "mlp_ratio": mlp_ratio,
            "temb_size": temb_size,
            "temb_bias": temb_bias,
            "norm_affine": norm_affine,
            "norm_eps": norm_eps,
            "gelu": gelu,
        }
        self.config = {
            "image_size": image_size,
            "in_channels": in_channels,
            "channels": channels,
            "num_cells": num_cells,
            "window_size": window_size,
            "num_heads": num_heads,
            **of_cells,
            "skip": skip,
            "head_norm": head_norm,
            "num_classes": num_classes,
            "class_dropout_prob": class_dropout_prob,
        }

        def cells(stage: int, first_width: int) -> nn.ModuleList:
            width, heads, window = channels[stage], num_heads[stage], window_size[stage]
            widths = [first_width, *[width] * (num_cells[stage] - 1)]
            return nn.ModuleList(
                ResidualCell(before, width, num_heads=heads, window_size=window, **of_cells)
                for before in widths
            )

        last = stages - 1
        joined = 2 if skip == "concatenate" else 1
        self.t_embedder = NoiseEmbedder(temb_size)
        self.y_embedder = (
            None
            if num_classes is None
            else LabelEmbedder(num_classes, temb_size, class_dropout_prob)
        )
        self.tokenizer = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(cells(stage, channels[stage]) for stage in range(stages))
        self.downsamples = nn.ModuleList(
            nn.Conv2d(channels[stage], channels[stage + 1], 3, stride=2, padding=1)
            for stage in range(last)
        )
        self.decoder = nn.ModuleList(
            cells(stage, channels[stage] * (1 if stage == last else joined))
            for stage in reversed(range(stages))
        )
        self.upsamples = nn.ModuleList(
            nn.ConvTranspose2d(channels[stage + 1], channels[stage], 4, stride=2, padding=1)
            for stage in reversed(range(last))
        )
        self.head_norm = nn.GroupNorm(num_groups, channels[0], norm_eps) if head_norm else None
        self.head = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        self.use_fused_tmsa = use_fused_tmsa
        self.backend = backend
        self.initialize_weights()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(in_channels, S, S) of what it denoises."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def null_class(self) -> int | None:
        """The label of samples without a class, for guidance; None if there is none."""
        has_one = self.y_embedder is not None and self.y_embedder.dropout_prob > 0
        return self.num_classes if has_one else None

    def _cells(self) -> list[ResidualCell]:
        return [cell for cells in (*self.encoder, *self.decoder) for cell in cells]

    def initialize_weights(self) -> None:
        """As the released latent models: xavier-uniform linear layers, N(0, 0.02) embeddings, zero
        output, so that D starts as c_skip x. Convolutions start as PyTorch has them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embeddings = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        if self.y_embedder is not None:
            embeddings.append(self.y_embedder.embedding_table)
        for module in embeddings:
            nn.init.normal_(module.weight, std=0.02)
        for cell in self._cells():
            nn.init.trunc_normal_(cell.block.attn.relative_position_bias_table, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """F(x; c_noise, y), the network inside EDM's preconditioning.

        Args:
            x: (B, in_channels, S, S), scaled noisy images in the model's dtype.
            c_noise: (B,) floating point, ln(σ) / 4.
            y: (B,) integer labels, 0..num_classes (the last is the null class), for a model that
                has classes, and for no other.

        Returns:
            (B, in_channels, S, S).

        Raises:
            TypeError, ValueError: an argument breaks one of the rules above. Labels on an
            accelerator are not looked at, for that would wait for the device.
        """
        self._check_inputs(x, c_noise, y)
        temb = self.t_embedder(c_noise)  # (B, T)
        if y is not None:
            temb = temb + self.y_embedder(y, self.training)
        if self.use_fused_tmsa:
            # All that follows keeps this order in memory. contiguous() would leave one channel as
            # it is, in which the two orders are the same, and convolutions would choose the other.
            x = x.clone(memory_format=torch.channels_last)
        h = self.tokenizer(x)  # (B, C, H, W)
        skips = []
        for stage, cells in enumerate(self.encoder):
            if stage > 0:
                skips.append(h)
                h = self.downsamples[stage - 1](h)
            for cell in cells:
                h = self._call(cell, h, temb)
        for stage, cells in enumerate(self.decoder):
            if stage > 0:
                h, left = self.upsamples[stage - 1](h), skips.pop()
                h = torch.cat((h, left), 1) if self.skip == "concatenate" else h + left
            for cell in cells:
                h = self._call(cell, h, temb)
        return self.head(h if self.head_norm is None else self.head_norm(h))

    def denoise(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        """D(x; σ, y) = c_skip x + c_out F(c_in x; ln(σ) / 4, y), in float32 at least.

        x: (B, in_channels, S, S), images with noise of deviation σ; sigma: (B,), > 0. Of a wrapped
        model: :func:`diffit_kernels.sampling.edm.denoised`, which this calls.
        """
        return denoised(self, x, sigma, y)

    def _check_inputs(self, x: Tensor, c_noise: Tensor, y: Tensor | None) -> None:
        if (y is None) != (self.num_classes is None):
            rule = "must not be given" if y is not None else "must be given"
            raise ValueError(f"ImageDiffiT: y {rule}, num_classes is {self.num_classes}")
        per_sample = {"c_noise": c_noise} if y is None else {"c_noise": c_noise, "y": y}
        weight = self.tokenizer.weight
        for name, value in {"x": x, **per_sample}.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"ImageDiffiT: {name} must be a tensor, got {type(value).__name__}")
            if value.device != weight.device:
                raise ValueError(
                    f"ImageDiffiT: {name} is on {value.device}, the model on {weight.device}"
                )
        side = self.image_size
        if x.shape[1:] != (self.in_channels, side, side):
            raise ValueError(
                f"ImageDiffiT: x must have shape (B, {self.in_channels}, {side}, {side}), "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"ImageDiffiT: x must be {weight.dtype} like the model, got {x.dtype}")
        for name, value in per_sample.items():
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"ImageDiffiT: {name} must have shape ({x.shape[0]},), one per sample of x, "
                    f"got {tuple(value.shape)}"
                )
        if not c_noise.is_floating_point():
            raise TypeError(f"ImageDiffiT: c_noise must be floating point, got {c_noise.dtype}")
        if y is not None:
            self.y_embedder.check("ImageDiffiT", y)


def diffit_cifar10(**kwargs) -> ImageDiffiT:
    """The paper's :class:`ImageDiffiT` for CIFAR-10, as far as it is stated; 18 steps of Heun."""
    return ImageDiffiT(
        **{"image_size": 32, "channels": (128, 256, 256), "window_size": 4, **kwargs}
    )


def diffit_ffhq64(**kwargs) -> ImageDiffiT:
    """The paper's :class:`ImageDiffiT` for FFHQ-64, as far as it is stated; 40 steps of Heun."""
    return ImageDiffiT(
        **{"image_size": 64, "channels": (128, 256, 256, 256), "window_size": 8, **kwargs}
    )


class NoiseEmbedder(nn.Module):
    """(B,) noise levels c -> (B, T): [sin(c ω) | cos(c ω)], Linear-SiLU-Linear.

    Angles are in float32, or float64 for float64 noise levels.
    """

    def __init__(self, temb_size: int):
        super().__init__()
        self.temb_size = temb_size
        self.mlp = nn.Sequential(
            nn.Linear(temb_size, temb_size), nn.SiLU(), nn.Linear(temb_size, temb_size)
        )

    def forward(self, c_noise: Tensor) -> Tensor:
        c_noise = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32))
        angles = c_noise[:, None] * noise_frequencies(self.temb_size, c_noise)
        features = torch.cat((angles.sin(), angles.cos()), 1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def noise_frequencies(temb_size: int, like: Tensor) -> Tensor:
    """(T/2,): ω_i = 10000^(-i / (T/2)), with the dtype and device of ``like``."""
    half = temb_size // 2
    return 10000 ** -(torch.arange(half, dtype=like.dtype, device=like.device) / half)


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"ImageDiffiT: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"ImageDiffiT: {name} must be at least 1, got {value}")


def _per_stage(name: str, value: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """One number for every stage."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(values) != stages or not values:
        raise ValueError(
            f"ImageDiffiT: {name} must be one number, or one for each of {stages} stages, "
            f"got {value!r}"
        )
    for number in values:
        _check_size(name, number)
    return values


def _check_stages(image_size, channels, window_size, num_heads, num_groups) -> None:
    """Raise ValueError unless each stage's sizes divide each other."""
    step = 2 ** (len(channels) - 1)
    if image_size % step:
        raise ValueError(
            f"ImageDiffiT: image_size must be a multiple of {step} for {len(channels)} stages, "
            f"got {image_size}"
        )
    for stage, (width, window, heads) in enumerate(
        zip(channels, window_size, num_heads, strict=True)
    ):
        side = image_size // 2**stage
        for rule, whole, part in (
            ("window_size must divide the side", side, window),
            ("num_heads must divide the channels", width, heads),
            ("num_groups must divide the channels", width, num_groups),
        ):
            if whole % part:
                raise ValueError(
                    f"ImageDiffiT: {rule} of every stage, got {part} for {whole} in stage {stage}"
                )
