"""The recorded outputs of independent implementations, in tests/golden/."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Recording:
    """Tensors and configuration of one recording; keys as in the file."""

    tensors: dict[str, torch.Tensor]
    config: dict

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def renamed(self, prefix: str, rename) -> dict[str, torch.Tensor]:
        """What is under the prefix by other names, without what ``rename`` gives None for."""
        tensors = self.under(prefix)
        return {new: value for key, value in tensors.items() if (new := rename(key)) is not None}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


@cache
def recording(name: str) -> Recording:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Recording(tensors, json.loads(metadata.get("config", "{}")))


LATENT = ("latent_small", "latent_grid20_linear_cfg")
