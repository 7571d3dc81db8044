"""``diffit-kernels sample``: guided samples from a checkpoint, as published; resumable.

Under torchrun its processes share the run; the first speaks for all and writes the results.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from diffit_kernels.checkpoint import from_pretrained, saved_config
from diffit_kernels.checkpoint_files import open_checkpoint, read_metadata, resolve
from diffit_kernels.checkpoint_image import is_image_diffit
from diffit_kernels.commands.arguments import (
    add_guidance,
    default_device,
    finite,
    labels,
    positive,
    split,
    switch,
)
from diffit_kernels.dispatch import BACKENDS
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.precision import PRECISIONS, apply_precision, dtype_of, products
from diffit_kernels.sampling import check_extra, decode
from diffit_kernels.sampling.predict import ALL_SAVINGS, guidance_steps
from diffit_kernels.sampling.processes import (
    Processes,
    is_started_by_torchrun,
    joined_processes,
    own_device,
)
from diffit_kernels.sampling.published import published_process
from diffit_kernels.sampling.run import SamplingRun, Settings
from diffit_kernels.sampling.schedule import SAMPLERS, default_spacing, respaced_timesteps

APPEARANCE = 120  # seconds that a network's file system may take to show other machines' files


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
    add_guidance(parser)
    switch(parser, "--use_ddim", False, "DDIM, eta 0")
    add("--sampler", choices=SAMPLERS, help="of latent models; default ddpm, as published")
    add(
        "--guidance_eps",
        type=finite,
        default=0.0,
        help="no guidance where its weight differs from 1 by at most this; default 0: exact",
    )
    add("--classes", type=labels, default=(), help="labels taken in turn, '207,360'; else drawn")
    add("--split", type=split, help="'0/4': the first of 4 processes' batches; without torchrun")
    switch(parser, "--overlap", True, "decode and write a batch while the next is sampled")
    switch(parser, "--compile", False, "through torch.compile, of latent models")
    switch(parser, "--cuda_graph", True, "on NVIDIA GPUs launch a step as one graph")
    add("--seed", type=int, default=0, help="every sample has its own numbers; default 0")
    add("--device", default=default_device(), help="default %(default)s here")
    add(
        "--dtype",
        choices=PRECISIONS,
        default="float32",
        help="of the network; tf32 and fp8 on NVIDIA GPUs; default float32",
    )
    switch(parser, "--use_fused_tmsa", True, "through the fused ops")
    add("--backend", choices=BACKENDS, help="of the fused ops; default by device")
    add("--vae", default=decode.VAE_ID, help="folder or hub id of the VAE, or 'none' for latents")


def run(arguments: argparse.Namespace) -> None:
    """Sample into ``--log_dir``, resuming what is there, and assemble the .npz and the picture."""
    with products(arguments.dtype):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    check_extra()
    if arguments.split is not None and is_started_by_torchrun():
        raise ValueError(
            "--split is for processes started by hand, and torchrun deals batches to its own: "
            f"leave it out, got {'/'.join(map(str, arguments.split))}"
        )
    arguments.device = own_device(arguments.device)
    processes = joined_processes()
    say = print if processes.rank == 0 else _be_silent
    path = resolve(arguments.model_path)
    model = from_pretrained(
        path,
        config=untold_config(arguments, path),
        use_fused_tmsa=arguments.use_fused_tmsa,
        device=arguments.device,
        dtype=dtype_of(arguments.dtype),
        backend=arguments.backend,
    )
    apply_precision(model, arguments.dtype)
    _check_labels(arguments.classes, model)
    decoder = _decoder(arguments, path, model, say)
    settings = _settings(arguments, path, model)
    sampling = SamplingRun(arguments.log_dir, settings)
    if (steps := _steps_without_guidance(model, settings)) > 0:
        say(
            f"{steps} of {settings.num_sampling_steps} steps need no unconditional half: their "
            f"guidance weight is 1, to {settings.guidance_eps:g}"
        )
    total = arguments.num_samples
    try:
        _sample(arguments, sampling, model, decoder, processes, say)
    except KeyboardInterrupt:
        if processes.rank == 0:
            kept = total - len(sampling.missing(total))
            print(
                f"\n{kept} of {total} samples are kept in {sampling.shards}; "
                "the same command goes on from there",
                file=sys.stderr,
            )
        raise
    if processes.rank > 0:
        return
    left = _left(sampling, total, processes)
    if left:
        print(f"{left} samples are left to the other splits; the last one writes the .npz")
        return
    if decoder is not None:
        sampling.decode_stored(decoder)  # of a process that found no decoder
    print(f"wrote {sampling.assemble(total, 'latents' if decoder is None else 'images')}")
    if decoder is None:
        print("these are latents; the same command with --vae FOLDER_OR_HUB_ID decodes them")
    else:
        print(f"wrote {sampling.grid(total)}")


def _sample(
    arguments: argparse.Namespace,
    sampling: SamplingRun,
    model: DiffiT | ImageDiffiT,
    decoder: decode.Decoder | None,
    processes: Processes,
    say: Callable[[str], None],
) -> None:
    """This process's part of the run; the first shows the whole, and stays until it is done."""
    from tqdm import tqdm

    total, batch_size = arguments.num_samples, arguments.batch_size
    split = arguments.split or (0, 1)
    done = total - len(sampling.missing(total))
    if done:
        say(f"{done} of {total} samples are in {sampling.shards} already")
    steps = sampling.settings.num_sampling_steps
    missing = len(sampling.missing(total, batch_size, split)) * steps
    first = processes.rank == 0
    if first:
        sampling.record_settings()
    processes.begin()
    with tqdm(total=missing, unit="sample", unit_scale=1 / steps, disable=not first) as bar:

        def show(steps_of_all: int) -> None:
            bar.update(steps_of_all - bar.n)

        graph_bytes = sampling.sample(
            model,
            total,
            batch_size,
            decoder,
            on_step=lambda samples: show(processes.advance(samples)),
            split=split,
            take=processes.take,
            overlap=arguments.overlap,
            savings=replace(ALL_SAVINGS, step_graph=arguments.cuda_graph),
            compiled=arguments.compile,
        )
        if decoder is not None:
            sampling.decode_stored(decoder, processes.take)
        processes.finish(show)
    if graph_bytes is not None:
        peak = torch.cuda.max_memory_reserved(arguments.device)
        say(
            f"each step was one CUDA graph; graphs kept {graph_bytes / 2**20:.0f} MiB, "
            f"of a device's {peak / 2**20:.0f} MiB at most"
        )


def _left(sampling: SamplingRun, total: int, processes: Processes) -> int:
    """The number of samples that are not there.

    Raises:
        OSError: other processes of this run are done, and their files do not appear.
    """
    deadline = time.monotonic() + APPEARANCE
    while left := len(sampling.missing(total)):
        if processes.count == 1:
            break
        if time.monotonic() > deadline:
            raise OSError(
                f"{left} of {total} samples are not in {sampling.shards}, though all "
                f"{processes.count} processes are done; --log_dir must be one folder for all"
            )
        time.sleep(1)
    return left


def _be_silent(text: str) -> None:
    """What processes but the first say, who would only repeat it."""


def untold_config(arguments: argparse.Namespace, path: Path) -> dict:
    """What the command says of an image-space model whose file does not."""
    with open_checkpoint(path) as tensors:
        in_image_space = is_image_diffit(tensors.shapes)
    untold = in_image_space and "image_size" not in saved_config(path)
    given = arguments.image_size is not None
    return {"image_size": arguments.image_size} if untold and given else {}


def _settings(arguments: argparse.Namespace, path: Path, model: DiffiT | ImageDiffiT) -> Settings:
    steps, scale, power = published_process(model)
    if isinstance(model, ImageDiffiT):
        for flag, given in (
            ("--use_ddim", arguments.use_ddim),
            ("--scale_pow", arguments.scale_pow),
            ("--sampler", arguments.sampler),
            ("--guidance_eps", arguments.guidance_eps),
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
        sampler=arguments.sampler or "ddpm",
        guidance_eps=arguments.guidance_eps,
    )


def _steps_without_guidance(model: DiffiT | ImageDiffiT, settings: Settings) -> int:
    if isinstance(model, ImageDiffiT) or settings.cfg_scale is None:
        return 0
    timesteps = respaced_timesteps(
        settings.num_sampling_steps, default_spacing(settings.sampler)
    ).tolist()
    guided = guidance_steps(
        model, timesteps, settings.cfg_scale, settings.scale_pow, settings.guidance_eps
    )
    return len(timesteps) - len(guided)


def _decoder(
    arguments: argparse.Namespace,
    path: Path,
    model: DiffiT | ImageDiffiT,
    say: Callable[[str], None],
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
        say(f"{error}\ngoing on without: latents will be written")
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
