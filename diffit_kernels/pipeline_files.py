"""Where a whole pipeline's files are: those of ``save_pretrained``, in a folder or on the hub."""

import json
import os
from pathlib import Path

from torch import nn

from diffit_kernels.checkpoint_files import PACKAGED, from_hub, is_hub_id

CLASS = "DiffiTPipeline"
INDEX = "model_index.json"
WEIGHTS = Path("transformer", "diffit.safetensors")
VAE_FOLDER = "vae"


def whole_pipeline(path_or_hub_id: str | os.PathLike, filename: str | None) -> Path | None:
    """The folder with a ``model_index.json`` that is meant, fetched from the hub if it is there.

    None where a checkpoint alone is meant: a packaged one, a file, or any place without an index.

    Raises:
        ImportError: there is no such path, and the ``hub`` extra is not installed.
        OSError: nor did the hub give it.
    """
    if path_or_hub_id in PACKAGED or filename is not None:
        return None
    if not is_hub_id(path_or_hub_id):
        folder = Path(path_or_hub_id)
        return folder if (folder / INDEX).is_file() else None
    with from_hub(path_or_hub_id, "its files") as hub:
        if INDEX not in hub.list_repo_files(path_or_hub_id):
            return None
        wanted = [INDEX, WEIGHTS.as_posix(), f"{VAE_FOLDER}/*.json", f"{VAE_FOLDER}/*.safetensors"]
        return Path(hub.snapshot_download(path_or_hub_id, allow_patterns=wanted))


def read_index(path: Path) -> dict:
    try:
        index = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    if index.get("_class_name") != CLASS:
        raise ValueError(f"{path}: _class_name must be {CLASS!r}, got {index.get('_class_name')!r}")
    return index


def read_vae(name_or_path: str | os.PathLike) -> nn.Module:
    """diffusers' AutoencoderKL, from safetensors alone."""
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(
            name_or_path, low_cpu_mem_usage=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"no VAE weights from {str(name_or_path)!r}: {reason}. Give a folder or hub id that "
            "has them with vae=, or vae=None for latents"
        ) from error
    return vae.eval()
