"""Images from a checkpoint in one call, by the conventions of diffusers' pipelines.

It is a class of its own, not a ``DiffusionPipeline``: that one asks its parts for what only
diffusers' models have (``dtype``, ``device``, ``from_pretrained``), so that all but its progress
bar would be replaced here. Importing this module needs none of the ``sample`` extra.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_kernels.checkpoint import from_pretrained, save_pretrained
from diffit_kernels.checkpoint_files import read_metadata, resolve, written_aside
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.pipeline_files import (
    INDEX,
    VAE_FOLDER,
    WEIGHTS,
    read_index,
    read_vae,
    whole_pipeline,
)
from diffit_kernels.sampling import (
    check_extra,
    denoise,
    heun_sample,
    respaced_timesteps,
    sigma_schedule,
)
from diffit_kernels.sampling.decode import SHUFFLE_FACTOR, VAE_ID, to_uint8
from diffit_kernels.sampling.published import published_process
from diffit_kernels.sampling.schedule import default_spacing

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODE_BATCH = 8  # images that the VAE decodes at once


class DiffiTPipeline:
    """A DiffiT and what decodes its latents: ``pipeline(class_labels=[207, 360]).images``.

    Args:
        transformer: a :class:`~diffit_kernels.model.DiffiT`, or an
            :class:`~diffit_kernels.image_model.ImageDiffiT`, which needs neither of the others.
        vae: diffusers' AutoencoderKL; without it, and without ``decoder``, there are latents only.
        decoder: "pixel_shuffle" for latents that are 2 x 2 blocks of grey pixels, as those of the
            packaged digits; None for the VAE's.

    Raises:
        ImportError: the ``sample`` extra is not installed.
        TypeError: ``transformer`` is neither of the two.
        ValueError: an unknown ``decoder``, or more than one way to images.
    """

    _callback_tensor_inputs = ("latents",)  # the name that diffusers' callbacks look for

    def __init__(
        self,
        transformer: DiffiT | ImageDiffiT,
        vae: nn.Module | None = None,
        decoder: str | None = None,
    ):
        check_extra()
        if not isinstance(transformer, DiffiT | ImageDiffiT):
            raise TypeError(
                "DiffiTPipeline: transformer must be a DiffiT or an ImageDiffiT, got "
                f"{type(transformer).__name__}"
            )
        if decoder not in (None, "pixel_shuffle"):
            raise ValueError(
                f"DiffiTPipeline: decoder must be 'pixel_shuffle' or None, got {decoder!r}"
            )
        ways = [isinstance(transformer, ImageDiffiT), vae is not None, decoder is not None]
        if sum(ways) > 1:
            raise ValueError(
                "DiffiTPipeline: images come from an ImageDiffiT, a vae or a decoder, one of them, "
                f"got transformer={type(transformer).__name__}, vae={type(vae).__name__}, "
                f"decoder={decoder!r}"
            )
        self.transformer, self.vae, self.decoder = transformer, vae, decoder
        self._progress_bar_config: dict[str, Any] = {}
        self._interrupt = False  # set by callbacks

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        filename: str | None = None,
        *,
        vae: nn.Module | str | os.PathLike | None = "auto",
        config: Mapping | None = None,
        torch_dtype: torch.dtype | None = None,
        use_fused_tmsa: bool = True,
        backend: str | None = None,
    ) -> "DiffiTPipeline":
        """A pipeline from what :meth:`save_pretrained` wrote, or from a checkpoint alone.

        Args:
            path_or_hub_id, filename, config, use_fused_tmsa, backend: as of
                :func:`~diffit_kernels.checkpoint.from_pretrained`; or a folder, or hub id of a
                repository, with a ``model_index.json``.
            vae: an AutoencoderKL, a folder or hub id of one, or None for latents only. "auto" is
                the folder's own, else the published one where the model needs it. Read from
                safetensors alone.
            torch_dtype: of all parts; default each file's own.

        Raises:
            OSError: there are no weights of the VAE here, and the hub did not give them.
            ImportError, FileNotFoundError, TypeError, ValueError: as of ``from_pretrained``; or
                ``model_index.json`` is not of this class.
        """
        check_extra()
        folder = whole_pipeline(path_or_hub_id, filename)
        index = {} if folder is None else read_index(folder / INDEX)
        path = resolve(path_or_hub_id, filename) if folder is None else folder / WEIGHTS
        transformer = from_pretrained(
            path, config=config, use_fused_tmsa=use_fused_tmsa, dtype=torch_dtype, backend=backend
        )
        decoder = read_metadata(path).get("decoder")
        if isinstance(vae, str) and vae == "auto":
            needed = isinstance(transformer, DiffiT) and decoder is None
            own = folder / VAE_FOLDER if any(index.get("vae") or ()) else None
            vae = own if folder is not None else VAE_ID if needed else None
        if isinstance(vae, str | os.PathLike):
            vae = read_vae(vae).to(dtype=torch_dtype)
        return cls(transformer, vae, decoder)

    def save_pretrained(self, folder: str | os.PathLike, safe_serialization: bool = True) -> None:
        """Write what :meth:`from_pretrained` reads: safetensors, and ``model_index.json`` last.

        ``transformer/diffit.safetensors`` is a file of
        :func:`~diffit_kernels.checkpoint.save_pretrained`, and ``vae`` a folder of diffusers'.

        Raises:
            ValueError: ``safe_serialization`` is not True; nothing is ever pickled.
        """
        if safe_serialization is not True:
            raise ValueError(
                "save_pretrained: safe_serialization must be True, nothing is pickled, got "
                f"{safe_serialization!r}"
            )
        import diffusers

        folder = Path(folder)
        (folder / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        metadata = {} if self.decoder is None else {"decoder": self.decoder}
        save_pretrained(self.transformer, folder / WEIGHTS, metadata)
        if self.vae is not None:
            self.vae.save_pretrained(folder / VAE_FOLDER, safe_serialization=True)
        index = {
            "_class_name": type(self).__name__,
            "_diffusers_version": diffusers.__version__,
            "transformer": ["diffit_kernels", type(self.transformer).__name__],
            "vae": [None, None] if self.vae is None else ["diffusers", type(self.vae).__name__],
        }
        with written_aside(folder / INDEX) as file:
            file.write(json.dumps(index, indent=2).encode())

    @property
    def components(self) -> dict[str, nn.Module | None]:
        """The parts by their names, as another pipeline's constructor takes them."""
        return {"transformer": self.transformer, "vae": self.vae}

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's floating-point type. The state of sampling has its own, float32."""
        return next(self.transformer.parameters()).dtype

    def to(self, *args, **kwargs) -> "DiffiTPipeline":
        """Move all parts, as ``torch.nn.Module.to``: ``.to("cuda", torch.bfloat16)``."""
        for part in self.components.values():
            if part is not None:
                part.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs) -> None:
        """Arguments of tqdm, such as ``disable=True``."""
        self._progress_bar_config = kwargs

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DiffiTPipeline", int, float, dict], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        batch_size: int | None = None,
        latents: Tensor | None = None,
        scale_pow: float | None = None,
        sampler: str = "ddpm",
    ):
        """Sample one image for each label, as published: ancestral steps, or EDM's Heun.

        Args:
            class_labels: classes, one per image; None for a model without classes.
            guidance_scale: of classifier-free guidance, which is on above 1. Default as published:
                4.4, at 512 pixels 1.49, DiT 1.5; in image space none.
            generator: of all images, or one for each: then an image does not depend on the others
                of its batch, beyond the rounding of products of another shape.
            num_inference_steps: default 250; of Heun 18, above 32 pixels 40.
            output_type: "pil" for pictures, bytes truncated as published; "np" for a float32
                (B, H, W, 3) array in [0, 1]; "pt" for such a (B, 3, H, W) tensor; "latent" for
                what the sampler gives, float32.
            return_dict: an ``ImagePipelineOutput`` with ``images``, or a tuple of these alone.
            callback_on_step_end: called after every step as (pipeline, step, timestep, tensors); of
                Heun with the noise level for timestep. It may return {"latents": …} to go on from;
                and after ``pipeline._interrupt = True`` the latents as they are become images.
            callback_on_step_end_tensor_inputs: what ``tensors`` has: "latents", float32, of Heun
                float64, (B, channels, S, S); or nothing. diffusers' callback objects say it.
            batch_size: images of a model without classes, default 1.
            latents: the noise to start from, (B, channels, S, S), standard normal; default drawn.
            scale_pow: power of the guidance schedule, see
                :meth:`~diffit_kernels.model.DiffiT.forward_with_cfg`; default 4, DiT 0: constant.
            sampler: of latent models, see :func:`~diffit_kernels.sampling.denoiser.denoise`;
                default ancestral steps.

        Raises:
            TypeError, ValueError: an argument breaks one of the rules above, or the callback
                returns other tensors; or the transformer is in training mode.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if output_type != "latent" and not self._makes_images():
            raise ValueError(
                f"there is no vae and no decoder: output_type must be 'latent', got {output_type!r}"
            )
        if self.transformer.training:
            raise ValueError("the transformer must be in eval mode, got training mode")
        labels, count = self._labels(class_labels, batch_size)
        noise = self._noise(count, generator, latents)
        steps, scale, power = published_process(self.transformer)
        given = num_inference_steps, guidance_scale, scale_pow
        steps, scale, power = (
            default if value is None else value
            for value, default in zip(given, (steps, scale, power), strict=True)
        )
        guided = scale is not None and scale > 1
        settings = {"num_steps": steps, "cfg_scale": scale if guided else None}
        if isinstance(self.transformer, ImageDiffiT):
            if sampler != "ddpm" or scale_pow is not None:
                raise ValueError(
                    "sampler and scale_pow are for latent models, and this one is in image space, "
                    f"got sampler={sampler!r}, scale_pow={scale_pow}"
                )
            run, times = heun_sample, sigma_schedule(steps)[:-1].tolist()
        else:
            times = respaced_timesteps(steps, default_spacing(sampler))[::-1].tolist()
            run = denoise
            generators = (generator,) if isinstance(generator, torch.Generator) else generator
            settings |= {"scale_pow": power, "sampler": sampler, "generators": generators}
        hook = self._hook(callback_on_step_end, callback_on_step_end_tensor_inputs, times)
        self._interrupt = False
        with self._progress_bar(steps) as bar:
            hooks = {"on_step": bar.update, "on_step_end": hook}
            try:
                result = run(self.transformer, noise, labels, **hooks, **settings)
            except _Interrupted as interrupted:
                result = interrupted.latents
        images = self._output(result.float().clone(), output_type)  # a clone that autograd takes
        if not return_dict:
            return (images,)
        from diffusers import ImagePipelineOutput

        return ImagePipelineOutput(images=images)

    def _progress_bar(self, total: int):
        from tqdm import tqdm

        return tqdm(total=total, **self._progress_bar_config)

    def _hook(
        self, callback: Callable | None, names: Sequence[str], times: Sequence[float]
    ) -> Callable[[Tensor], Tensor | None] | None:
        """What the sampler calls with the latents after every step."""
        names = getattr(callback, "tensor_inputs", names)
        if unknown := [name for name in names if name not in self._callback_tensor_inputs]:
            raise ValueError(
                "callback_on_step_end_tensor_inputs must be of "
                f"{list(self._callback_tensor_inputs)}, got {unknown}"
            )
        if callback is None:
            return None
        remaining = iter(enumerate(times))

        def on_step_end(latents: Tensor) -> Tensor | None:
            step, time = next(remaining)
            given = {name: latents for name in names}
            changed = callback(self, step, time, given) or {}
            if unknown := sorted(changed.keys() - set(self._callback_tensor_inputs)):
                raise ValueError(
                    "callback_on_step_end must return None or a dictionary of "
                    f"{list(self._callback_tensor_inputs)}, got {unknown}"
                )
            latents = changed.get("latents", latents)
            if self._interrupt:
                raise _Interrupted(latents)
            return latents

        return on_step_end

    def _makes_images(self) -> bool:
        in_image_space = isinstance(self.transformer, ImageDiffiT)
        return in_image_space or self.vae is not None or self.decoder is not None

    def _labels(
        self, class_labels: Sequence[int] | Tensor | None, batch_size: int | None
    ) -> tuple[Tensor | None, int]:
        """(labels, their number)."""
        classes = self.transformer.num_classes
        if classes is None:
            if class_labels is not None:
                raise ValueError(
                    f"class_labels must be None for a model without classes, got {class_labels!r}"
                )
            count = 1 if batch_size is None else batch_size
            if count < 1:
                raise ValueError(f"batch_size must be at least 1, got {count}")
            return None, count
        if batch_size is not None:
            raise ValueError(
                "batch_size is for models without classes, others make an image for each of "
                f"class_labels, got {batch_size}"
            )
        try:
            labels = torch.as_tensor(class_labels, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            labels = None
        whole = labels is not None and labels.dtype in (torch.int64, torch.int32)
        if not whole or labels.dim() != 1 or not len(labels):
            raise TypeError(f"class_labels must be a list of whole numbers, got {class_labels!r}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels must be in 0..{classes - 1}, got {labels.tolist()}")
        return labels.long(), len(labels)

    def _noise(
        self,
        count: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """(B, channels, S, S) float32: as given, or drawn on the generators' own devices."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = (count, *self.transformer.sample_shape)
        if not isinstance(generator, torch.Generator | None):
            generator = list(generator)
            if len(generator) != count:
                raise ValueError(
                    f"generator must be one, or one for each of {count} images, got "
                    f"{len(generator)}"
                )
        if latents is None:
            return randn_tensor(shape, generator, device=self.device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(self.device, torch.float32)

    def _output(self, latents: Tensor, output_type: str):
        if output_type == "latent":
            return latents
        images = self._decode(latents)
        if output_type == "pil":
            from PIL import Image

            return [Image.fromarray(image) for image in to_uint8(images)]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) float32, about [-1, 1]."""
        if self.vae is not None:
            scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            parts = [self.vae.decode(part).sample for part in scaled.split(DECODE_BATCH)]
            return torch.cat(parts).float()
        if self.decoder is not None:
            latents = F.pixel_shuffle(latents, SHUFFLE_FACTOR)
        return latents.expand(-1, 3, -1, -1)


class _Interrupted(Exception):
    """A callback asked to stop at these latents."""

    def __init__(self, latents: Tensor):
        super().__init__()
        self.latents = latents
