"""The residual cell of the image-space DiffiT, around the transformer block.

The letters: B batch; H × W pixels, which are the block's tokens; C channels; T width of the time
token.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from diffit_kernels import fused
from diffit_kernels.block import DiffiTBlock
from diffit_kernels.ops import group_norm_silu


class ResidualCell(nn.Module):
    """x̂ = Conv3x3(SiLU(GroupNorm(x)));  x = Block(x̂, temb) + x  (eqs. 9 and 10).

    Where the cell changes the number of channels, the last x is taken through a 1x1 convolution.

    Args:
        in_channels, channels: of x, and of the result.
        num_groups, norm_eps: of the GroupNorm; ``norm_eps`` of the block's LayerNorms too.
        block: the other arguments of :class:`~diffit_kernels.block.DiffiTBlock`.
    """

    use_fused_tmsa = False
    backend: str | None = None

    def __init__(
        self, in_channels: int, channels: int, *, num_groups: int, norm_eps: float, **block
    ):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, in_channels, norm_eps)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.block = DiffiTBlock(channels, norm_eps=norm_eps, **block)
        self.shortcut = (
            None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, bias=False)
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """(B, C, H, W), (B, T) -> (B, C', H, W)."""
        h = self.conv(self._normed(x)).permute(0, 2, 3, 1)  # (B, H, W, C'), in order if fused
        batch, height, width, channels = h.shape
        h = h.reshape(batch, height * width, channels)
        h = self.block(h, temb, (height, width)).unflatten(1, (height, width))
        return h.permute(0, 3, 1, 2) + (x if self.shortcut is None else self.shortcut(x))

    def _normed(self, x: Tensor) -> Tensor:
        """SiLU(GroupNorm(x)), in one op where the norm is a plain GroupNorm."""
        norm = self.norm
        if not self.use_fused_tmsa or type(norm) is not nn.GroupNorm or fused.is_touched(norm):
            return F.silu(norm(x))
        h = group_norm_silu(
            x.permute(0, 2, 3, 1),
            norm.weight,
            norm.bias,
            num_groups=norm.num_groups,
            eps=norm.eps,
            backend=self.backend,
        )
        return h.permute(0, 3, 1, 2)
