"""What may look into a sampling loop, and change its course."""

from collections.abc import Callable

from torch import Tensor

OnStepEnd = Callable[[Tensor], Tensor | None]


def after_hook(on_step_end: OnStepEnd, state: Tensor) -> Tensor:
    """The state as a hook leaves it: what it returns, or ``state``, which it may have changed.

    Raises:
        ValueError: it returned a tensor of another shape.
    """
    changed = on_step_end(state)
    if changed is None:
        return state
    if changed.shape != state.shape:
        raise ValueError(
            f"on_step_end must return None or a tensor of shape {tuple(state.shape)}, got "
            f"{tuple(changed.shape)}"
        )
    return changed.to(state)
