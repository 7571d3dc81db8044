"""The settings that papers and released code sample with."""

from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT


def published_process(model: DiffiT | ImageDiffiT) -> tuple[int, float | None, float]:
    """(steps, guidance scale, power of its schedule).

    DiffiT's at its two latent resolutions, DiT's constant guidance, or those of image space: Heun's
    18 steps, above 32 pixels 40, unguided.
    """
    if isinstance(model, ImageDiffiT):
        return (18 if model.image_size <= 32 else 40), None, 0.0
    if model.conditioning == "adaln_zero":
        return 250, 1.5, 0.0
    return 250, (4.4 if model.input_size <= 32 else 1.49), 4.0
