"""``diffit-kernels sample``: guided samples from a checkpoint, as published; resumable."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from diffit_kernels.checkpoint import from_pretrained, saved_config
from diffit_kernels.checkpoint_files import open_checkpoint, read_metadata, resolve
from diffit_kernels.checkpoint_image import is_image_diffit
from diffit_kernels.commands.arguments import (
    DTYPES,
    boolean,
    default_device,
    finite,
    labels,
    positive,
    split,
)
from diffit_kernels.dispatch import BACKENDS
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.sampling import check_extra, decode
from diffit_kernels.sampling.run import SamplingRun, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_path", required=True, help="file, folder, hub id, or 'digits'")
    add("--log_dir", type=Path, default=Path("samples"), help="the run's folder; default ./samples")
    add("--model", choices=["Diffit"], default="Diffit", help="the checkpoint's shapes decide")
    add("--image_size", type=int, help="side of the images; must fit the checkpoint, if it tells")
    add("--num_samples", type=positive, default=50_000, help="default %(default)s")
    add(
        "--num_sampling_steps",
        type=positive,
        help="of 1000, default 250; of Heun for image-space models: 18, above 32 pixels 40",
    )
    add("--batch_size", type=positive, default=50, help="default 50")
    add("--cfg_cond", type=boolean, nargs="?", const=True, default=True, help="guide; default True")
    add("--cfg_scale", type=finite, help="default as published: 4.4, 1.49 at 512 pixels, DiT 1.5")
    add("--scale_pow", type=finite, help="of the guidance schedule; default 4, DiT 0: constant")
    add(
        "--use_ddim",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="DDIM, eta 0; default False",
    )
    add("--classes", type=labels, default=(), help="labels taken in turn, '207,360'; else drawn")
    add("--split", type=split, default=(0, 1), help="'0/4': the first of 4 processes' batches")
    add("--seed", type=int, default=0, help="every sample has its own numbers; default 0")
    add("--device", default=default_device(), help="default %(default)s here")
    add("--dtype", choices=DTYPES, default="float32", help="of the network; default float32")
    add("--use_fused_tmsa", type=boolean, nargs="?", const=True, default=True, help="default True")
    add("--backend", choices=BACKENDS, help="of the fused ops; default by device")
    add("--vae", default=decode.VAE_ID, help="folder or hub id of the VAE, or 'none' for latents")


def run(arguments: argparse.Namespace) -> None:
    """Sample into ``--log_dir``, resuming what is there, and assemble the .npz and the picture."""
    check_extra()
    from tqdm import tqdm

    path = resolve(arguments.model_path)
    model = from_pretrained(
        path,
        config=_config(arguments, path),
        use_fused_tmsa=arguments.use_fused_tmsa,
        device=arguments.device,
        dtype=DTYPES[arguments.dtype],
        backend=arguments.backend,
    )
    _check_labels(arguments.classes, model)
    decoder = _decoder(arguments, path, model)
    settings = _settings(arguments, path, model)
    sampling = SamplingRun(arguments.log_dir, settings)
    total = arguments.num_samples
    done = total - len(sampling.missing(total))
    if done:
        print(f"{done} of {total} samples are in {sampling.shards} already")
    split = arguments.split
    missing = len(sampling.missing(total, arguments.batch_size, split))
    try:
        steps = settings.num_sampling_steps
        with tqdm(total=missing * steps, unit="sample", unit_scale=1 / steps) as bar:
            sampling.sample(model, total, arguments.batch_size, decoder, bar.update, split)
        if decoder is not None:
            sampling.decode_stored(decoder)
    except KeyboardInterrupt:
        kept = total - len(sampling.missing(total))
        print(
            f"\n{kept} of {total} samples are kept in {sampling.shards}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise
    left = len(sampling.missing(total))
    if left:
        print(f"{left} samples are left to the other splits; the last one writes the .npz")
        return
    print(f"wrote {sampling.assemble(total, 'latents' if decoder is None else 'images')}")
    if decoder is None:
        print("these are latents; the same command with --vae FOLDER_OR_HUB_ID decodes them")
    else:
        print(f"wrote {sampling.grid(total)}")


def _config(arguments: argparse.Namespace, path: Path) -> dict:
    """What the command says of an image-space model whose file does not."""
    with open_checkpoint(path) as tensors:
        in_image_space = is_image_diffit(tensors.shapes)
    untold = in_image_space and "image_size" not in saved_config(path)
    given = arguments.image_size is not None
    return {"image_size": arguments.image_size} if untold and given else {}


def _settings(arguments: argparse.Namespace, path: Path, model: DiffiT | ImageDiffiT) -> Settings:
    steps, scale, power = _published(model)
    if isinstance(model, ImageDiffiT):
        for flag, given in (
            ("--use_ddim", arguments.use_ddim),
            ("--scale_pow", arguments.scale_pow),
        ):
            if given:
                raise ValueError(f"{flag} is for latent models, and this one is in image space")
    given = arguments.cfg_scale, arguments.scale_pow, arguments.num_sampling_steps
    scale, power, steps = (
        default if value is None else value
        for value, default in zip(given, (scale, power, steps), strict=True)
    )
    return Settings(
        checkpoint=_sha256(path),
        num_sampling_steps=steps,
        cfg_scale=scale if arguments.cfg_cond else None,
        scale_pow=power,
        use_ddim=arguments.use_ddim,
        seed=arguments.seed,
        dtype=arguments.dtype,
        classes=arguments.classes,
    )


def _published(model: DiffiT | ImageDiffiT) -> tuple[int, float | None, float]:
    """(steps, guidance scale, power of its schedule) of DiffiT in latent or image space, or DiT."""
    if isinstance(model, ImageDiffiT):
        return (18 if model.image_size <= 32 else 40), None, 0.0
    if model.conditioning == "adaln_zero":
        return 250, 1.5, 0.0
    return 250, (4.4 if model.input_size <= 32 else 1.49), 4.0


def _decoder(
    arguments: argparse.Namespace, path: Path, model: DiffiT | ImageDiffiT
) -> decode.Decoder | None:
    """What turns this checkpoint's latents into images, or None, said aloud."""
    if isinstance(model, ImageDiffiT):
        if arguments.image_size not in (None, model.image_size):
            raise ValueError(
                f"--image_size {arguments.image_size} does not fit the checkpoint, whose images "
                f"have {model.image_size}"
            )
        return decode.image_decoder()
    shuffled = read_metadata(path).get("decoder") == "pixel_shuffle"
    factor = decode.SHUFFLE_FACTOR if shuffled else decode.VAE_FACTOR
    side = model.input_size * factor
    if arguments.image_size not in (None, side):
        raise ValueError(
            f"--image_size {arguments.image_size} does not fit the checkpoint, whose "
            f"{model.input_size} x {model.input_size} latents make images of {side}"
        )
    if shuffled:
        return decode.shuffle_decoder()
    if arguments.vae == "none":
        return None
    try:
        return decode.vae_decoder(arguments.vae, torch.device(arguments.device))
    except OSError as error:
        if arguments.vae != decode.VAE_ID:
            raise
        print(f"{error}\ngoing on without: latents will be written")
        return None


def _check_labels(classes: Sequence[int], model: DiffiT | ImageDiffiT) -> None:
    if classes and model.num_classes is None:
        raise ValueError(f"--classes: the checkpoint has none, got {list(classes)}")
    outside = [label for label in classes if not 0 <= label < model.num_classes]
    if outside:
        raise ValueError(f"--classes must be in 0..{model.num_classes - 1}, got {outside}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
