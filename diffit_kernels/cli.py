"""The command line: ``diffit-kernels sample | demo | info``."""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import diffit_kernels
from diffit_kernels.checkpoint import from_pretrained, saved_config
from diffit_kernels.checkpoint_files import open_checkpoint, read_metadata, resolve
from diffit_kernels.checkpoint_image import is_image_diffit
from diffit_kernels.demo import demo
from diffit_kernels.dispatch import BACKENDS
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.info import info
from diffit_kernels.model import DiffiT
from diffit_kernels.sampling import check_extra, decode
from diffit_kernels.sampling.run import SamplingRun, Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERRUPTED = 130  # the shell's status for a process ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a bad request, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"diffit-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffit-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffit-kernels", description=diffit_kernels.__doc__)
    parser.add_argument("--version", action="version", version=diffit_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("info", help="versions, devices, and which backend runs each op")
    command.set_defaults(command=lambda arguments: print(info()))

    command = commands.add_parser("demo", help="digits from the small model in the package")
    command.add_argument("--out", type=Path, default=Path("diffit_digits.png"), help="the picture")
    command.add_argument("--device", default=_default_device())
    command.add_argument("--backend", choices=BACKENDS)
    command.add_argument("--model", choices=["digits", "image_digits"], default="digits")
    command.set_defaults(command=lambda a: print(demo(a.out, a.device, a.backend, a.model)))

    command = commands.add_parser(
        "sample",
        help="guided samples from a checkpoint, as published",
    )
    _add_sample_arguments(command)
    command.set_defaults(command=sample)
    return parser


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_path", required=True, help="file, folder, hub id, or 'digits'")
    add("--log_dir", type=Path, default=Path("samples"), help="the run's folder; default ./samples")
    add("--model", choices=["Diffit"], default="Diffit", help="the checkpoint's shapes decide")
    add("--image_size", type=int, help="side of the images; must fit the checkpoint, if it tells")
    add("--num_samples", type=_positive, default=50_000, help="default %(default)s")
    add(
        "--num_sampling_steps",
        type=_positive,
        help="of 1000, default 250; of Heun for image-space models: 18, above 32 pixels 40",
    )
    add("--batch_size", type=_positive, default=50, help="default 50")
    add(
        "--cfg_cond", type=_boolean, nargs="?", const=True, default=True, help="guide; default True"
    )
    add("--cfg_scale", type=_finite, help="default as published: 4.4, 1.49 at 512 pixels, DiT 1.5")
    add("--scale_pow", type=_finite, help="of the guidance schedule; default 4, DiT 0: constant")
    add(
        "--use_ddim",
        type=_boolean,
        nargs="?",
        const=True,
        default=False,
        help="DDIM, eta 0; default False",
    )
    add("--classes", type=_classes, default=(), help="labels taken in turn, '207,360'; else drawn")
    add("--split", type=_split, default=(0, 1), help="'0/4': the first of 4 processes' batches")
    add("--seed", type=int, default=0, help="every sample has its own numbers; default 0")
    add("--device", default=_default_device(), help="default %(default)s here")
    add("--dtype", choices=DTYPES, default="float32", help="of the network; default float32")
    add("--use_fused_tmsa", type=_boolean, nargs="?", const=True, default=True, help="default True")
    add("--backend", choices=BACKENDS, help="of the fused ops; default by device")
    add("--vae", default=decode.VAE_ID, help="folder or hub id of the VAE, or 'none' for latents")


def sample(arguments: argparse.Namespace) -> None:
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
    run = SamplingRun(arguments.log_dir, settings)
    total = arguments.num_samples
    done = total - len(run.missing(total))
    if done:
        print(f"{done} of {total} samples are in {run.shards} already")
    split = arguments.split
    missing = len(run.missing(total, arguments.batch_size, split))
    try:
        steps = settings.num_sampling_steps
        with tqdm(total=missing * steps, unit="sample", unit_scale=1 / steps) as bar:
            run.sample(model, total, arguments.batch_size, decoder, bar.update, split)
        if decoder is not None:
            run.decode_stored(decoder)
    except KeyboardInterrupt:
        kept = total - len(run.missing(total))
        print(
            f"\n{kept} of {total} samples are kept in {run.shards}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise
    left = len(run.missing(total))
    if left:
        print(f"{left} samples are left to the other splits; the last one writes the .npz")
        return
    print(f"wrote {run.assemble(total, 'latents' if decoder is None else 'images')}")
    if decoder is None:
        print("these are latents; the same command with --vae FOLDER_OR_HUB_ID decodes them")
    else:
        print(f"wrote {run.grid(total)}")


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


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _split(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be k/n with k < n, as '0/4', got {text!r}")
    return int(part), int(parts)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return values[text.lower()]


def _classes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"must be numbers with commas between, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
