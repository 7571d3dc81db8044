"""Fused kernels for DiffiT: windowed time-dependent attention with a learned position bias."""

from diffit_kernels.checkpoint import from_pretrained, save_pretrained
from diffit_kernels.dispatch import use_backend
from diffit_kernels.image_model import ImageDiffiT, diffit_cifar10, diffit_ffhq64
from diffit_kernels.model import DiffiT, Diffit
from diffit_kernels.ops import adaln, mlp, time_projection, time_projections, window_attention
from diffit_kernels.patch import patch, unpatch
from diffit_kernels.pipeline import DiffiTPipeline
from diffit_kernels.version import __version__

__all__ = [
    "__version__",
    "DiffiT",
    "Diffit",
    "ImageDiffiT",
    "diffit_cifar10",
    "diffit_ffhq64",
    "from_pretrained",
    "save_pretrained",
    "DiffiTPipeline",
    "patch",
    "unpatch",
    "adaln",
    "time_projection",
    "time_projections",
    "window_attention",
    "mlp",
    "use_backend",
]
