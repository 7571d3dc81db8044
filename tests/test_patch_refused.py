"""patch: what is not served is refused, with a reason that says so; or its calls are left alone."""

import pytest
import torch
from torch import nn

import diffit_kernels
from diffit_kernels import patch
from diffit_kernels.patch import patched
from tests import lookalike
from tests.lookalike import dit, image_unet, mdt, swin
from tests.parity import assert_close
from tests.test_patch import BLOCK_CALLS, fused_calls


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(patched, "_warned", set())


def damaged(attention, **attributes):
    """An attention with other attributes; without those that are None."""
    for name, value in attributes.items():
        delattr(attention, name) if value is None else setattr(attention, name, value)
    return attention


def diffit(**attributes):
    return damaged(lookalike.Attention(16, 2, 4), **attributes)


def with_class_token():
    """17 tokens for a window of 16, as in BEiT."""
    index = torch.zeros(17, 17, dtype=torch.long)
    return damaged(mdt.Attention(16, 2, 4).rel_pos_bias, relative_position_index=index)


class NoTimeArgument(lookalike.Attention):
    def forward(self, x):
        return super().forward(x)


class Keeping(dit.Attention):
    """For who looks at its tokens later."""

    def forward(self, x, attn_mask=None):
        self.seen = x
        return super().forward(x, attn_mask)


class SeparateLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))


class Images(nn.Module):
    """An attention over (B, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.proj(self.qkv(x)[:, :16])


class Two(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.one, self.other = module(), module()


REFUSED = {
    "other function": (
        lambda: lookalike.SineAttention(16, 2, 4),
        r"the model itself: its forward computes something else, by \d\.\de.* of the largest",
    ),
    "only near tokens": (lambda: dit.NearAttention(16, 2), "its forward computes something else"),
    "normalised queries": (
        lambda: damaged(dit.Attention(16, 2), q_norm=nn.LayerNorm(8)),
        "something else, by .*; beside the parts looked for it has q_norm",
    ),
    "table that is not read": (
        lambda: damaged(swin.Attention(16, 2, (4, 4)), relative_position_index=None, window_size=0),
        "trying it raised AttributeError: .*; beside .* has relative_position_bias_table",
    ),
    "state": (
        lambda: Keeping(16, 2),
        "its forward sets seen, and the fused one would not",
    ),
    "window without a table": (
        lambda: damaged(dit.Attention(16, 2), window_size=7),
        "it has a window_size 7, but no bias table that is known",
    ),
    "class token": (
        lambda: damaged(mdt.Attention(16, 2, 4), rel_pos_bias=with_class_token()),
        "has 289 entries, not 256 for 4 x 4 tokens: tokens without a place, such as a class token",
    ),
    "more rows, other index": (
        lambda: damaged(
            mdt.Attention(16, 2, 4),
            rel_pos_bias=damaged(
                mdt.Bias(4, 2, 3), relative_position_index=torch.arange(256).view(16, 16) % 52
            ),
        ),
        "its relative_position_index is not the row-major one",
    ),
    "columns before rows": (
        lambda: diffit(relative_position_index=diffit().relative_position_index.T.contiguous()),
        "its relative_position_index is not the row-major one",
    ),
    "too few rows": (
        lambda: diffit(relative_position_bias_table=nn.Parameter(torch.zeros(48, 2))),
        r"bias table has shape \(48, 2\), not \(49, 2\)",
    ),
    "other heads": (lambda: diffit(num_heads=4), r"bias table has shape \(49, 2\), not \(49, 4\)"),
    "three sides": (lambda: diffit(window_size=(1, 4, 4)), "its parts do not fit together: too"),
    "no time argument": (
        lambda: NoTimeArgument(16, 2, 4),
        r"its forward takes \(x\), not tokens and a time token",
    ),
    "no projection": (lambda: diffit(proj=None), "the model itself: lacks proj"),
    "layers of their own": (
        SeparateLayers,
        r"q, k and v have layers of their own \(to_q, to_k, to_v\), not one qkv",
    ),
    "images": (Images, "trying it raised ValueError: there is no linear layer in its Conv2d"),
    "forward set": (
        lambda: diffit(forward=lambda x, temb: x),
        "its forward was replaced on the instance",
    ),
    "ours": (
        lambda: diffit_kernels.DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2),
        r"set model\.use_fused_tmsa = True instead",
    ),
    "meta": (lambda: diffit().to("meta"), "it is on the meta device: load its weights"),
    "twice": (lambda: Two(SeparateLayers), r"near misses: one and 1 more: q, k and v have"),
    "final layer alone": (lambda: dit.FinalLayer(16, 8), "near misses: none"),
    "nothing": (
        lambda: nn.Linear(2, 2),
        r"no attention to patch. Looked for modules with qkv.*qkv_temb.*near misses: none\.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case):
    make, reason = REFUSED[case]
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=reason):
        patch(model)
    assert [type(module) for module in model.modules()] == classes


def test_errors():
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, got dict"):
        patch({})
    with pytest.raises(ValueError, match="backend must be one of"):
        patch(diffit(), backend="cuda")


def test_strange_neighbours_do_not_stop_the_patching():
    model, inputs = lookalike.Transformer(), (torch.randn(3, 16, 16), torch.randn(3, 16))
    model.odd = nn.Module()
    model.odd.attn = {}
    model.near_miss = diffit(relative_position_bias_table=None)
    assert fused_calls(patch(model), *inputs) == 2 * BLOCK_CALLS


BLOCKS_LEFT_ALONE = {
    "gates first": (lambda: dit.OtherOrder(16, 2), 1),
    "joined before": (lambda: mdt.Block(16, 2, 4, skip=True), 1),
    "shifted windows": (lambda: swin.Block(16, 2, (8, 8), 4, 2), 4),
}


@pytest.mark.parametrize("case", BLOCKS_LEFT_ALONE)
def test_of_a_block_that_computes_something_else_the_attention_is_patched(case):
    make, calls = BLOCKS_LEFT_ALONE[case]
    block = make().double()
    x = torch.randn(2, 16, 16) if case != "shifted windows" else torch.randn(2, 8, 8, 16)
    inputs = [x.double()]
    if case != "shifted windows":
        inputs.append(torch.randn(2, 16).double())
    expected = block(*inputs)
    assert fused_calls(patch(block), *inputs) == calls * ["window_attention"]
    assert_close(block(*inputs), expected, 1e-12)


class WholeImage(swin.Block):
    """Tokens (B, N, C): on a single window it computes what any block does, on more it does not."""

    def forward(self, x):
        side = int(x.shape[1] ** 0.5)
        return super().forward(x.unflatten(1, (side, side))).flatten(1, 2)


CALLS_LEFT_ALONE = {
    "a mask of scores": (
        lambda: dit.Attention(16, 2),
        lambda x, c: ((x,), {"attn_mask": torch.randn(16, 16)}),
        "it was called with further arguments",
    ),
    "causal": (
        lambda: dit.Attention(16, 2),
        lambda x, c: ((x, None, True), {}),
        "it was called with further arguments",
    ),
    "some tokens": (
        lambda: mdt.Attention(16, 2, 4),
        lambda x, c: ((x[:, :3], torch.tensor(2 * [[0, 5, 7]])), {}),
        "it was called with further arguments",
    ),
    "some tokens of a block": (
        lambda: mdt.Block(16, 2, 4),
        lambda x, c: ((x[:, :3], c), {"ids_keep": torch.tensor(2 * [[0, 5, 7]])}),
        "it was called with further arguments",
    ),
    "one time token for all": (
        lambda: dit.Block(16, 2),
        lambda x, c: ((x, c[:1]), {}),
        r"a time token of shape \(1, 16\) is not one per sample",
    ),
    "one time token for all windows": (
        lambda: image_unet.Attention(16, 2, 4, 12),
        lambda x, c: ((x, c[:1, :12]), {}),
        r"a time token of shape \(1, 12\) is not one per sample",
    ),
    "several windows": (
        lambda: WholeImage(16, 2, (4, 4), 4, 0),
        lambda x, c: ((x.reshape(1, 32, 16).repeat(1, 2, 1),), {}),
        "its 64 tokens are not a window of 4 x 4",
    ),
}


@pytest.mark.parametrize("case", CALLS_LEFT_ALONE)
def test_a_call_that_is_not_served_runs_the_own_forward(case):
    make, arguments, reason = CALLS_LEFT_ALONE[case]
    module = make()
    args, kwargs = arguments(torch.randn(2, 16, 16), torch.randn(2, 16))
    expected = module(*args, **kwargs)
    patch(module)
    with pytest.warns(RuntimeWarning, match=f"runs its own forward.*: {reason}"):
        assert_close(module(*args, **kwargs), expected, 2e-5)


def test_a_large_image_without_a_bias_keeps_its_attention_on_other_devices_than_the_cpu():
    """Which have no kernels for it, while the module's own may call one that needs no bias."""
    attention = patch(dit.Attention(16, 2)).to("meta")
    parts = attention._diffit.structure.parts(attention)
    assert patched._size_reason(attention, torch.empty(1, 1024, 16, device="meta"), parts) is None
    with pytest.warns(RuntimeWarning, match="64 x 64 tokens are more than a window of the kernels"):
        assert fused_calls(attention, torch.empty(1, 4096, 16, device="meta")) == []
