"""EDM (arXiv 2206.00364) for the image-space DiffiT: preconditioning, loss, and Heun's sampler.

The network is any F(x, c_noise) or F(x, c_noise, labels): an
:class:`~diffit_kernels.image_model.ImageDiffiT`, bare or wrapped (compiled, distributed). What is
around it is computed in float32 at least, whatever the network's dtype.

The letters: B batch; c channels and S side of an image; σ noise level; σ_d the data's deviation.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffit_kernels.sampling.hooks import OnStepEnd, after_hook

SIGMA_DATA = 0.5
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
LN_SIGMA_MEAN, LN_SIGMA_DEVIATION = -1.2, 1.2


def preconditioning(
    sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise), each of the shape and dtype of ``sigma`` (EDM, table 1).

    ::

        c_skip = σ_d² / (σ² + σ_d²)         c_out   = σ σ_d / √(σ² + σ_d²)
        c_in   = 1 / √(σ² + σ_d²)           c_noise = ln(σ) / 4
    """
    total = sigma.square() + sigma_data**2
    c_in = total.rsqrt()
    return sigma_data**2 / total, sigma * sigma_data * c_in, c_in, sigma.log() / 4


def denoised(
    network: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    *,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise): the image without its noise, as expected.

    Args:
        network: F; a module is given c_in x in the dtype of its first parameter, and c_noise in
            that of the result.
        x: (B, c, S, S), floating point, images with noise of deviation σ.
        sigma: (B,), > 0.
        labels: (B,) classes, passed on if given.
        sigma_data: σ_d.

    Returns:
        (B, c, S, S) float32, or float64 for float64 ``x``, as is all that is computed around F.
        Differentiable as F is.

    Raises:
        TypeError, ValueError: ``x`` or ``sigma`` breaks one of the rules above.
    """
    _check("denoised", "x", x)
    _check("denoised", "sigma", sigma, shape=x.shape[:1])
    wide = torch.promote_types(x.dtype, torch.float32)
    x, sigma = x.to(wide), sigma.to(x.device, wide)
    per_sample = (-1, *(1,) * (x.dim() - 1))
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, sigma_data)
    c_skip, c_out, c_in = (factor.view(per_sample) for factor in (c_skip, c_out, c_in))
    scaled = (c_in * x).to(_dtype(network, default=wide))
    given = () if labels is None else (labels,)
    return c_skip * x + c_out * network(scaled, c_noise, *given).to(wide)


def guided_denoised(
    network: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    cfg_scale: float | None = None,
) -> Tensor:
    """D_null + w (D_labels - D_null), both from one pass over a doubled batch.

    Args:
        network: F, as of :func:`denoised`, with a ``null_class``.
        x, sigma, labels: as of :func:`denoised`.
        cfg_scale: w; None is :func:`denoised` alone, with ``labels`` as they are.

    Returns:
        (B, c, S, S), as of :func:`denoised`.
    """
    if cfg_scale is None:
        return denoised(network, x, sigma, labels)
    both = torch.cat((labels, torch.full_like(labels, network.null_class)))
    pair = denoised(network, torch.cat((x, x)), torch.cat((sigma, sigma)), both)
    conditional, null = pair.chunk(2)
    return null + cfg_scale * (conditional - null)


def edm_loss(
    network: Callable[..., Tensor],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """The mean of λ(σ) (D(x + σ n; σ) - x)² over all numbers of ``images`` (EDM, table 1).

    ::

        λ(σ) = (σ² + σ_d²) / (σ σ_d)²        ln σ ~ N(-1.2, 1.2²)

    so that the network's own target has weight one at every σ.

    Args:
        network, labels, sigma_data: as of :func:`denoised`.
        images: x, (B, c, S, S), floating point, of deviation about ``sigma_data``.
        sigma: (B,), > 0; drawn if not given.
        noise: n, of the shape of ``images``, standard normal; drawn if not given.
        generator: of what is drawn, σ before n; default the global one of the images' device.

    Returns:
        A float32 scalar, or float64 for float64 ``images``.

    Raises:
        TypeError, ValueError: a tensor breaks one of the rules above.
    """
    _check("edm_loss", "images", images)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    drawn = {"generator": generator, "device": images.device, "dtype": images.dtype}
    if sigma is None:
        sigma = (LN_SIGMA_MEAN + LN_SIGMA_DEVIATION * torch.randn(len(images), **drawn)).exp()
    if noise is None:
        noise = torch.randn(images.shape, **drawn)
    _check("edm_loss", "sigma", sigma, shape=images.shape[:1])
    _check("edm_loss", "noise", noise, shape=images.shape)
    sigma, noise = sigma.to(images), noise.to(images)
    per_sample = sigma.view(-1, *(1,) * (images.dim() - 1))
    error = denoised(network, images + per_sample * noise, sigma, labels, sigma_data=sigma_data)
    weight = (per_sample.square() + sigma_data**2) / (per_sample * sigma_data).square()
    return (weight * (error - images).square()).mean()


def sigma_schedule(
    num_steps: int = 18,
    *,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """(num_steps + 1,) float64: noise levels from ``sigma_max`` to ``sigma_min``, and zero.

    ::

        σ_i = (σ_max^(1/ρ) + i / (num_steps - 1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ

    Raises:
        ValueError: ``num_steps`` < 1, or not 0 < ``sigma_min`` < ``sigma_max``, or ``rho`` <= 0.
    """
    if num_steps < 1:
        raise ValueError(f"sigma_schedule: num_steps must be at least 1, got {num_steps}")
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            "sigma_schedule: 0 < sigma_min < sigma_max and rho > 0 must hold, "
            f"got sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    progress = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    levels = (first + progress * (last - first)) ** rho
    return torch.cat((levels, torch.zeros(1, dtype=torch.float64)))


@torch.inference_mode()
def heun_sample(
    network: Callable[..., Tensor],
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    num_steps: int = 18,
    cfg_scale: float | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_step_end: OnStepEnd | None = None,
) -> Tensor:
    """Images from noise by the deterministic sampler of EDM (algorithm 1), of second order.

    ::

        d  = (x - D(x; σ_i)) / σ_i               x' = x + (σ_{i+1} - σ_i) d
        d' = (x' - D(x'; σ_{i+1})) / σ_{i+1}     x  = x + (σ_{i+1} - σ_i) (d + d') / 2

    from x = σ_0 ``noise``; the last step, to σ = 0, ends with x'.

    Args:
        network: F, as of :func:`denoised`, in eval mode.
        noise: (B, c, S, S), floating point, standard normal. Nothing else is random.
        labels: (B,) classes of a network that has some.
        num_steps: steps; 2 num_steps - 1 evaluations of the network. DiffiT samples CIFAR-10 in 18,
            FFHQ-64 in 40.
        cfg_scale: w of classifier-free guidance (:func:`guided_denoised`); None samples without.
        on_step: called after every step.
        on_step_end: called after every step with x; what it returns, if not None, is gone on from.

    Returns:
        (B, c, S, S) float64. The state is float64, as in EDM: beside the network that costs
        nothing, and the steps' sums, with x of size 80 at first, add no roundings of their own.

    Raises:
        TypeError, ValueError: ``noise`` is not floating point; no step; or ``cfg_scale`` without
            labels, or for a network without a null class.
    """
    _check("heun_sample", "noise", noise)
    null = getattr(network, "null_class", None)
    if cfg_scale is not None and (labels is None or null is None):
        raise ValueError(
            "heun_sample: cfg_scale needs labels, and a network with a null class, got "
            f"labels={'None' if labels is None else 'a tensor'}, null_class={null}"
        )

    def slope(x: Tensor, level: float) -> Tensor:
        """dx/dσ = (x - D(x; σ)) / σ."""
        return (
            x - guided_denoised(network, x, x.new_full((len(x),), level), labels, cfg_scale)
        ) / level

    levels = sigma_schedule(num_steps).tolist()
    x = noise.double() * levels[0]
    for now, after in itertools.pairwise(levels):
        start = slope(x, now)
        ahead = x + (after - now) * start
        if after > 0:
            ahead = x + (after - now) * (start + slope(ahead, after)) / 2
        x = ahead
        on_step()
        if on_step_end is not None:
            x = after_hook(on_step_end, x)
    return x


def _dtype(network: Callable[..., Tensor], default: torch.dtype) -> torch.dtype:
    """The dtype in which the network takes images."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return default if parameter is None else parameter.dtype


def _check(function: str, name: str, value: object, shape: torch.Size | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{function}: {name} must be floating point, got {value.dtype}")
    if shape is not None and value.shape != shape:
        raise ValueError(
            f"{function}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}"
        )
