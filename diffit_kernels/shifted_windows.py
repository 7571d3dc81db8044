"""Attention over shifted windows, by an attention that knows no mask.

An image that was rolled before it was cut into windows has some whose tokens come from two or four
places; a mask of 0 and -100 lets each token see those of its own place (Swin, arXiv 2103.14030).
What such a mask leaves of an h × w window are rectangles h' × w', each an attention of its own::

    softmax(q kᵀ · scale + B + mask) v = softmax(q kᵀ · scale + B') v    within every rectangle

B' is the bias of a window of h' × w' tokens, whose table is the middle of the whole one, where
|y_i - y_j| < h' and |x_i - x_j| < w'. The weights that the mask suppresses, by e^-100 or more,
count as zeros, which they are once rounded unless scores are tens apart.
"""

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diffit_kernels.fused import AttentionParts, project
from diffit_kernels.ops import window_attention

SUPPRESSED = -100.0  # a mask's entry that leaves no weight, or anything below


class Rectangles:
    """What the windows of an image are cut into.

    Attributes:
        windows: how many an image has.
        shapes: ((h', w'), how many rectangles of this shape an image has), for each shape.
    """

    def __init__(self, windows: int, places: dict[tuple[int, int], Tensor]):
        """places: for each shape its rectangles' tokens, as numbers in [0, windows · L)."""
        self.windows = windows
        self.shapes = [(shape, len(i) // (shape[0] * shape[1])) for shape, i in places.items()]
        self._places = list(places.values())
        self._last = None

    @torch.inference_mode(False)  # what is kept may be of use in training
    def order(self, images: int) -> tuple[Tensor, Tensor]:
        """(the tokens of a batch by shape, each rectangle's in a row; the inverse permutation)."""
        last = self._last
        if last is None or last[0] != images:
            tokens = sum(map(len, self._places))
            device = self._places[0].device
            starts = torch.arange(images, device=device)[:, None] * tokens
            order = torch.cat([(starts + places).flatten() for places in self._places])
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(images * tokens, device=device)
            last = self._last = images, order, inverse
        return last[1:]


def attention(
    parts: AttentionParts, x: Tensor, rectangles: Rectangles, *, backend: str | None
) -> Tensor:
    """The attention of :func:`diffit_kernels.fused.attention` within rectangles alone.

    x: (B · windows, L, C), an image's windows in a row; no time token. Returns the same shape.
    """
    rows, tokens, _ = x.shape
    images = rows // rectangles.windows
    order, inverse = rectangles.order(images)
    qkv = project(parts.qkv, x, backend=backend)
    channels3 = qkv.shape[-1]
    sizes = [images * count * h * w for (h, w), count in rectangles.shapes]
    of_shapes = _Permute.apply(qkv.reshape(rows * tokens, channels3), order, inverse).split(sizes)
    results = []
    for ((h, w), count), qkv in zip(rectangles.shapes, of_shapes, strict=True):
        out = window_attention(
            qkv.view(images * count, h, w, channels3),
            None if parts.table is None else middle(parts.table, parts.window_size, (h, w)),
            num_heads=parts.num_heads,
            window_size=(h, w),
            scale=parts.scale,
            backend=backend,
        )
        results.append(out.flatten(0, 2))
    out = _Permute.apply(torch.cat(results), inverse, order)
    return project(parts.proj, out.view(rows, tokens, channels3 // 3), backend=backend)


def middle(table: Tensor, window_size: tuple[int, int], part: tuple[int, int]) -> Tensor:
    """The bias table of an h' × w' window that is ``part`` of an h × w one: a slice of its own.

    table: ((2h-1)(2w-1), nH). Returns ((2h'-1)(2w'-1), nH).
    """
    (h, w), (rows, columns) = window_size, part
    table = table.reshape(2 * h - 1, 2 * w - 1, -1)
    return table[h - rows : h + rows - 1, w - columns : w + columns - 1].flatten(0, 1)


class _Permute(torch.autograd.Function):
    """x[order] along the first dimension; its gradient is a permutation too, where indexing's adds
    up row by row."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


# mask -> (its version, where it lies, the window, what was found): a mask is read once, and again
# when it changed. Weak, so that nobody's mask lives longer for it.
_found = WeakTensorKeyDictionary()


def find(mask: Tensor, window_size: tuple[int, int]) -> Rectangles | None:
    """What ``mask`` cuts the windows of an image into; None if it is not of shifted windows.

    mask: (windows, L, L), to be added to the scores: 0 where a token sees another, -100 or less
    where it does not. Served are windows that are whole, or cut in two along the rows, the columns
    or both. None too where values cannot be read: while a graph is captured.
    """
    if torch.compiler.is_compiling() or type(mask) not in (Tensor, nn.Parameter):
        return None
    h, w = window_size
    if mask.requires_grad or mask.is_meta or not mask.is_floating_point():
        return None
    if mask.shape[1:] != (h * w, h * w):
        return None
    if mask.is_inference():  # it does not count its versions
        return _find(mask, h, w)
    state = mask._version, mask.data_ptr(), h, w
    if mask not in _found or _found[mask][0] != state:
        _found[mask] = state, _find(mask, h, w)
    return _found[mask][1]


@torch.inference_mode(False)
def _find(mask: Tensor, h: int, w: int) -> Rectangles | None:
    windows, tokens, _ = mask.shape
    seen = (mask[:, 0] == 0).view(windows, h, w)  # by a window's first token
    cuts = torch.stack((seen[:, :, 0].sum(1), seen[:, 0].sum(1)), 1)  # (windows, 2)
    piece = pieces(cuts, (h, w))
    together = piece[:, :, None] == piece[:, None]
    if windows == 0 or not torch.where(together, mask == 0, mask <= SUPPRESSED).all():
        return None
    places: dict[tuple[int, int], list[Tensor]] = {}
    for rows, columns in sorted(set(map(tuple, cuts.tolist())), reverse=True):
        same = (cuts == cuts.new_tensor((rows, columns))).all(1).nonzero()  # (windows like this, 1)
        numbers = torch.arange(tokens, device=mask.device).view(h, w)
        for band in numbers.split((rows, h - rows)):
            for rectangle in band.split((columns, w - columns), 1):
                if rectangle.numel():
                    found = (same * tokens + rectangle.flatten()).flatten()
                    places.setdefault(tuple(rectangle.shape), []).append(found)
    return Rectangles(windows, {shape: torch.cat(found) for shape, found in places.items()})


def pieces(cuts: Tensor, window_size: tuple[int, int]) -> Tensor:
    """(windows, L): which of up to four rectangles a token is in, if windows are cut at ``cuts``.

    cuts: (windows, 2), the rows and columns of a window's first rectangle; h and w if it is whole.
    """
    h, w = window_size
    below = torch.arange(h, device=cuts.device) >= cuts[:, :1]
    right = torch.arange(w, device=cuts.device) >= cuts[:, 1:]
    return (2 * below[:, :, None] + right[:, None]).flatten(1)


def mask_of(cuts: Tensor, window_size: tuple[int, int]) -> Tensor:
    """(windows, L, L) float64: the mask, 0 or -100, of windows cut at ``cuts``."""
    piece = pieces(cuts, window_size)
    return torch.where(piece[:, :, None] == piece[:, None], 0.0, SUPPRESSED).double()
