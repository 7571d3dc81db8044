"""What is set for a whole model, and obeyed by its parts."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffit_kernels.dispatch import check_backend


class Switches(nn.Module):
    """A model with ``use_fused_tmsa``, ``backend`` and ``gradient_checkpointing``.

    Each may be set at any time. Parts that have the first two as class attributes follow.
    """

    @property
    def use_fused_tmsa(self) -> bool:
        """Whether the model computes through the fused ops, or the published equations."""
        return self._use_fused_tmsa

    @use_fused_tmsa.setter
    def use_fused_tmsa(self, value: bool) -> None:
        self._use_fused_tmsa = _bool("use_fused_tmsa", value)
        for part in self._followers():
            part.use_fused_tmsa = value

    @property
    def backend(self) -> str | None:
        """The fused ops' backend, None for the device's default."""
        return self._backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        self._backend = check_backend(value)
        for part in self._followers():
            part.backend = value

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps of each block or cell its input, and computes the rest again.

        A third more arithmetic, for memory that grows with depth by one activation a block.
        """
        return getattr(self, "_gradient_checkpointing", False)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._gradient_checkpointing = _bool("gradient_checkpointing", value)

    def _followers(self) -> list[nn.Module]:
        parts = (part for part in self.modules() if part is not self)
        return [part for part in parts if hasattr(type(part), "use_fused_tmsa")]

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def _call(self, part: nn.Module, *args):
        """part(*args), with gradient checkpointing if that is on."""
        if self._recomputes():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)


def _bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value
