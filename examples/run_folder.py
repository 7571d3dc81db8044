"""A training run on disk: a checkpoint, averaged weights and losses, whole whenever it is killed.

A file is written aside, synced, renamed, and its folder synced: after a crash there is the old file
or the new one, never a part of either.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from diffit_kernels import DiffiT, save_pretrained
from diffit_kernels.checkpoint_files import written_aside

LINE = re.compile(r"^(?P<step>\d+),[^,\n]+,[^,\n]+\n", re.MULTILINE)  # of losses.csv


class RunFolder:
    """The files of one run: ``checkpoint.pt``, ``weights.safetensors``, ``losses.csv``.

    The checkpoint is a dict of ``step``, the number of steps made, ``settings``, and what
    :meth:`save` is given. Losses are lines of ``step,noise,variance``.

    Args:
        folder: made if it is not there.
        settings: what decides the run's results, by name: strings and numbers.
    """

    def __init__(self, folder: Path, settings: dict[str, str | int | float]):
        self.settings = settings
        self.checkpoint = folder / "checkpoint.pt"
        self.weights = folder / "weights.safetensors"
        self.losses = folder / "losses.csv"
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> dict[str, Any] | None:
        """The checkpoint, read with ``weights_only``, or None if there is none.

        Raises:
            ValueError: it is damaged, is no checkpoint of this example, or was made with other
                settings; the message says which.
        """
        if not self.checkpoint.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:
                if (part := archive.testzip()) is not None:  # torch.load compares no checksums
                    raise zipfile.BadZipFile(f"{part} has not the checksum it was written with")
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            step, settings = state["step"], dict(state["settings"])
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"{self.checkpoint} is damaged: {error}. Put back a copy of it, or remove it to "
                "start over."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint} is no checkpoint of this example") from error
        names = sorted(settings.keys() | self.settings.keys())
        changed = [
            f"{name} was {settings.get(name)}, is now {self.settings.get(name)}"
            for name in names
            if settings.get(name) != self.settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.checkpoint} is of step {step} of another run: {'; '.join(changed)}. "
                "Take another --out, or the old settings to resume."
            )
        return state

    def clean(self, step: int) -> None:
        """Remove what a killed process left half-written, and losses of steps beyond ``step``."""
        for path in (self.checkpoint, self.weights, self.losses):
            for aside in path.parent.glob(f".{path.name}.*"):
                aside.unlink()
        text = self.losses.read_text() if self.losses.exists() else ""
        kept = [line[0] for line in LINE.finditer(text) if int(line["step"]) <= step]
        content = "".join(["step,noise,variance\n", *kept]).encode()
        write_whole(self.losses, lambda file: file.write(content))

    def record(self, step: int, noise: float, variance: float) -> None:
        """Append a step's losses; digits enough to tell any two numbers apart."""
        with self.losses.open("a") as file:
            file.write(f"{step},{noise!r},{variance!r}\n")

    def save(self, step: int, state: dict[str, Any], ema: DiffiT) -> None:
        """Write the weights of ``ema``, then the checkpoint that goes on from ``state``."""
        _sync(self.losses)
        save_pretrained(ema, self.weights)
        state = {"step": step, "settings": self.settings, **state}
        write_whole(self.checkpoint, lambda file: torch.save(state, file))


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace the file at ``path`` by what ``write`` writes, on disk when this returns."""
    with written_aside(path) as file:
        write(file)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
