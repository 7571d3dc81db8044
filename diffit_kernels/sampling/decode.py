"""To uint8 images: by the Stable Diffusion VAE, by pixel shuffling, or as they are."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_kernels.sampling.schedule import check_extra

VAE_ID = "stabilityai/sd-vae-ft-ema"
VAE_SCALE = 0.18215
VAE_FACTOR = 8
SHUFFLE_FACTOR = 2

Decoder = Callable[[Tensor], np.ndarray]


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8: (x + 1) · 127.5, clamped, truncated."""
    images = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def shuffle_decoder() -> Decoder:
    """Latents that are 2 × 2 blocks of grey pixels, (B, 4, S, S) -> (B, 2S, 2S, 3)."""

    def decode(latents: Tensor) -> np.ndarray:
        return to_uint8(F.pixel_shuffle(latents, SHUFFLE_FACTOR).expand(-1, 3, -1, -1))

    return decode


def image_decoder() -> Decoder:
    """Images as they are, (B, 3, S, S) or grey (B, 1, S, S) in [-1, 1] -> (B, S, S, 3)."""

    def decode(images: Tensor) -> np.ndarray:
        return to_uint8(images.expand(-1, 3, -1, -1))

    return decode


def vae_decoder(name_or_path: str, device: torch.device, batch_size: int = 8) -> Decoder:
    """diffusers' AutoencoderKL from a folder or the hub, decoding latents / 0.18215 in float32.

    Raises:
        ImportError: the ``sample`` extra is not installed.
        OSError: there are no such weights here, and the hub did not give them.
    """
    check_extra()
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(name_or_path, low_cpu_mem_usage=False)
        vae = vae.to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"no VAE weights from {name_or_path!r}: {reason}") from error

    @torch.inference_mode()
    def decode(latents: Tensor) -> np.ndarray:
        parts = (latents.to(device) / VAE_SCALE).split(batch_size)
        return np.concatenate([to_uint8(vae.decode(part).sample) for part in parts])

    return decode
