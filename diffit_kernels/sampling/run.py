"""A sampling run on disk: shards that survive an interruption, the evaluator's .npz, a picture.

A run is a folder: ``run.json`` says what decides its samples; ``shards/`` holds finished batches of
latents, labels and, with a decoder, images. Every file is written aside and renamed, so what is
there is whole. Started again, the run computes what is missing and nothing else, by any number of
processes.
"""

import contextlib
import functools
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from diffit_kernels.checkpoint_files import written_aside
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.sampling.background import Background
from diffit_kernels.sampling.decode import Decoder
from diffit_kernels.sampling.denoiser import Denoiser
from diffit_kernels.sampling.edm import heun_sample
from diffit_kernels.sampling.noise import initial_noise, sample_generator
from diffit_kernels.sampling.predict import ALL_SAVINGS, Savings
from diffit_kernels.sampling.schedule import respaced_timesteps, sampler_name

SHARD = re.compile(r"\d{8}-\d{8}\.npz")
GRID_SIDE = 8  # pictures in a row of the overview
GRID_PIXELS = 64  # pictures smaller than this are enlarged to about it
GRID_GAP = 4


@dataclass(frozen=True)
class Settings:
    """What decides the samples of a run; a folder holds samples of one such setting only.

    ``use_ddim`` is the published name of the sampler "ddim", and true if and only if it is this
    one. An image-space model has a sampler of its own, and no use for ``scale_pow`` either.
    """

    checkpoint: str  # sha256 of the file
    num_sampling_steps: int
    cfg_scale: float | None
    scale_pow: float
    use_ddim: bool
    seed: int
    dtype: str
    classes: tuple[int, ...]  # taken in turn; drawn for each sample if empty
    sampler: str = "ddpm"
    guidance_eps: float = 0.0  # no guidance where its weight is as near to 1

    def __post_init__(self):
        object.__setattr__(self, "sampler", sampler_name(self.sampler, self.use_ddim))
        object.__setattr__(self, "use_ddim", self.sampler == "ddim")


class SamplingRun:
    """Samples 0 .. num_samples-1 of ``settings`` in ``folder``.

    Sample i depends on the settings and i alone, not on the batch or process it was computed in,
    up to the rounding of products of another shape.

    Raises:
        ValueError: the folder holds samples of other settings; the message names the differences.
    """

    def __init__(self, folder: Path, settings: Settings):
        if settings.seed < 0:
            raise ValueError(f"seed must be >= 0, got {settings.seed}")
        if not settings.guidance_eps >= 0:
            raise ValueError(f"guidance_eps must be >= 0, got {settings.guidance_eps}")
        respaced_timesteps(settings.num_sampling_steps)  # raises for a number it cannot make
        self.folder, self.settings = Path(folder), settings
        self.shards, self.record = self.folder / "shards", self.folder / "run.json"
        self._wanted = json.loads(json.dumps(asdict(settings)))
        self._check_record()

    def _check_record(self) -> bool:
        """Whether samples are there; raise ValueError if they were made by other settings."""
        if not self._listed():
            return False  # whatever was asked for here before left nothing
        try:
            found = dict(json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.record} does not say what made the samples beside it: {error}. "
                "Take another --log_dir."
            ) from error
        # Older records have no sampler and no guidance_eps.
        found.setdefault("sampler", "ddim" if found.get("use_ddim") else "ddpm")
        found.setdefault("guidance_eps", 0.0)
        if found != self._wanted:
            keys = [key for key in self._wanted if found.get(key) != self._wanted[key]]
            listing = "; ".join(f"{k} was {found.get(k)}, is now {self._wanted[k]}" for k in keys)
            raise ValueError(
                f"{self.folder} holds samples of another run: {listing}. "
                "Take another --log_dir, or the old settings to resume."
            )
        return True

    def record_settings(self) -> None:
        """Make the folder say what its samples are; of several processes best one, and before all.

        Raises:
            ValueError: it has samples of other settings by now.
        """
        self.shards.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self._wanted, indent=1).encode()
        recorded = self.record.exists() and self.record.read_bytes() == content
        if not (self._check_record() or recorded):
            with written_aside(self.record) as file:
                file.write(content)

    def label_and_generator(
        self, index: int, num_classes: int | None
    ) -> tuple[int, torch.Generator]:
        """The class of a sample and its random numbers; 0 where there are no classes."""
        generator = sample_generator(self.settings.seed, index)
        if num_classes is None:
            return 0, generator
        drawn = int(torch.randint(num_classes, (1,), generator=generator))
        classes = self.settings.classes
        return (classes[index % len(classes)] if classes else drawn), generator

    def missing(
        self, num_samples: int, batch_size: int = 1, split: tuple[int, int] = (0, 1)
    ) -> list[int]:
        """Indices below ``num_samples`` that no shard holds, of one process's batches."""
        done = {index for path in self._paths() for index in _span(path)}
        part, parts = split
        mine = (index for index in range(num_samples) if index // batch_size % parts == part)
        return [index for index in mine if index not in done]

    def sample(
        self,
        model: DiffiT | ImageDiffiT,
        num_samples: int,
        batch_size: int,
        decoder: Decoder | None,
        on_step: Callable[[int], None] = lambda samples: None,
        split: tuple[int, int] = (0, 1),
        take: Callable[[str], bool] = lambda name: True,
        overlap: bool = True,
        savings: Savings = ALL_SAVINGS,
        compiled: bool = False,
    ) -> int | None:
        """Compute and store what is missing.

        Batch k is what is missing of samples k·batch_size .. (k+1)·batch_size - 1, whoever computes
        it, so that the same products are made by any number of processes.

        Args:
            model: a latent or image-space model in eval mode.
            num_samples, batch_size: samples in all, and in a batch at most.
            decoder: from latents to images; None stores latents alone.
            on_step: called after every step with the number of samples in the batch.
            split: (k, n) computes every n-th batch from the k-th on, as one of n processes.
            take: asked with a shard's name before it is computed; False leaves it to another.
            overlap: decode and write a batch while the next is sampled, in a thread of its own.
            savings, compiled: as of :func:`~diffit_kernels.sampling.denoise`, of latent models.

        Returns:
            Bytes of device memory that the steps' CUDA graphs kept at most; None without graphs.
        """
        device = next(model.parameters()).device
        missing = self.missing(num_samples, batch_size, split)
        denoiser = self._denoiser(model, savings, compiled)
        graph_bytes = None
        with Background() as background:

            def checked_step(samples: int) -> None:
                background.check()
                on_step(samples)

            for indices in _batches(missing, batch_size):
                if not take(_name(indices)):
                    continue
                pairs = [self.label_and_generator(index, model.num_classes) for index in indices]
                labels, generators = zip(*pairs, strict=True)
                labels = torch.tensor(labels)
                step = functools.partial(checked_step, len(indices))
                latents = denoiser(
                    initial_noise(model, generators),
                    labels.to(device),
                    generators=generators,
                    on_step=step,
                )
                if (kept := getattr(denoiser, "graph_bytes", None)) is not None:
                    graph_bytes = max(graph_bytes or 0, kept)
                # From the host's memory the thread reads what no stream is still writing.
                background.call(self._store, indices, latents.cpu(), labels, decoder)
                if not overlap:
                    background.wait()
        return graph_bytes

    def _denoiser(self, model: DiffiT | ImageDiffiT, savings: Savings, compiled: bool) -> Callable:
        """The model's own sampler: for latents the published one or another by name, or Heun's."""
        settings = self.settings
        if isinstance(model, ImageDiffiT):
            return lambda noise, labels, *, generators, on_step: heun_sample(
                model,
                noise,
                None if model.num_classes is None else labels,
                num_steps=settings.num_sampling_steps,
                cfg_scale=settings.cfg_scale,
                on_step=on_step,
            )
        return Denoiser(
            model,
            num_steps=settings.num_sampling_steps,
            cfg_scale=settings.cfg_scale,
            scale_pow=settings.scale_pow,
            sampler=settings.sampler,
            guidance_eps=settings.guidance_eps,
            savings=savings,
            compiled=compiled,
        )

    def decode_stored(
        self, decoder: Decoder, take: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Give images to the shards that were stored without a decoder, as ``take`` allows."""
        for path in self._paths():
            if "images" not in _keys(path) and take(f"decoding {path.name}"):
                shard = _read(path)
                latents = torch.from_numpy(shard["latents"])
                self._store(_span(path), latents, torch.from_numpy(shard["labels"]), decoder)

    def assemble(self, num_samples: int, key: str) -> Path:
        """Write ``samples_NxHxWx3.npz`` (or ``latents_…``): arr_0 the data, arr_1 the labels.

        The file is what the guided-diffusion evaluator reads. One shard is in memory at a time.
        """
        shape, dtype = self._layout(key)
        stem = "samples" if key == "images" else "latents"
        path = self.folder / f"{stem}_{'x'.join(map(str, (num_samples, *shape)))}.npz"
        with written_aside(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                _write_header(entry, (num_samples, *shape), dtype)
                labels = []
                for shard in self._in_order(num_samples):
                    entry.write(np.ascontiguousarray(shard[key]))
                    labels.append(shard["labels"])
                    del shard  # before the next is read
            with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                np.save(entry, np.concatenate(labels))
        return path

    def grid(self, num_samples: int) -> Path:
        """Write ``grid.png``, the first samples in rows of :data:`GRID_SIDE`."""
        count = min(num_samples, GRID_SIDE * GRID_SIDE)
        images = np.concatenate([shard["images"] for shard in self._in_order(count)])
        path = self.folder / "grid.png"
        with written_aside(path) as file:
            picture_grid(images, GRID_SIDE).save(file, "PNG")
        return path

    def _store(self, indices: Sequence[int], latents, labels, decoder: Decoder | None) -> None:
        arrays = {"latents": latents.float().cpu().numpy(), "labels": labels.cpu().numpy()}
        if decoder is not None:
            arrays["images"] = decoder(latents)
        self.record_settings()
        with written_aside(self.shards / _name(indices)) as file:
            np.savez(file, **arrays)

    def _listed(self) -> list[Path]:
        """Shards in order, whole or not."""
        return sorted(p for p in self.shards.glob("*.npz") if SHARD.fullmatch(p.name))

    def _paths(self) -> list[Path]:
        """Shards in order; those cut short are removed, so that they count as missing."""
        paths = self._listed()
        for path in list(paths):
            if not zipfile.is_zipfile(path):
                path.unlink(missing_ok=True)  # another process may have been faster
                paths.remove(path)
        return paths

    def _in_order(self, num_samples: int) -> Iterator[dict[str, np.ndarray]]:
        """The samples' arrays shard by shard; overlapping shards give each sample once."""
        next_index = 0
        for path in self._paths():
            span = _span(path)
            if next_index in span and next_index < num_samples:
                part = slice(next_index - span.start, min(span.stop, num_samples) - span.start)
                yield {key: array[part] for key, array in _read(path).items()}
                next_index = span.start + part.stop
        if next_index < num_samples:
            raise AssertionError(f"sample {next_index} is in no shard")

    def _layout(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        array = _read(self._paths()[0])[key]
        return array.shape[1:], array.dtype


def picture_grid(images: np.ndarray, columns: int):
    """(N, H, W, 3) uint8 -> a PIL image of them in rows, small ones enlarged by whole pixels."""
    from PIL import Image

    factor = max(1, GRID_PIXELS // images.shape[1])
    images = images.repeat(factor, 1).repeat(factor, 2)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    step_y, step_x = height + GRID_GAP, width + GRID_GAP
    sheet = np.full((rows * step_y + GRID_GAP, columns * step_x + GRID_GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (
            GRID_GAP + j * step
            for j, step in zip(divmod(i, columns), (step_y, step_x), strict=True)
        )
        sheet[y : y + height, x : x + width] = image
    return Image.fromarray(sheet)


def _batches(indices: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Consecutive stretches of ``indices``, cut at multiples of ``batch_size``."""
    batch: list[int] = []
    for index in indices:
        if batch and (index % batch_size == 0 or index != batch[-1] + 1):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _name(indices: Sequence[int]) -> str:
    return f"{indices[0]:08d}-{indices[-1] + 1:08d}.npz"


def _span(path: Path) -> range:
    start, stop = path.stem.split("-")
    return range(int(start), int(stop))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """A shard's file; a damaged one is removed, and a ValueError says so."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        path.unlink()
        raise ValueError(
            f"{path} was damaged ({error}) and is removed; the same command computes it again"
        ) from error


def _read(path: Path) -> dict[str, np.ndarray]:
    with _opened(path) as file:
        return dict(file)


def _keys(path: Path) -> list[str]:
    with _opened(path) as file:
        return file.files


def _write_header(entry, shape: tuple[int, ...], dtype: np.dtype) -> None:
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(entry, header)
