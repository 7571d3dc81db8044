"""The reference agrees with the recordings, and every derivation of reference/README.md holds."""

import math

import pytest
import torch
import torch.nn.functional as F

import reference
from tests.golden_files import LATENT, recording
from tests.parity import assert_close

EXACT = 1e-12  # float64 against float64
WINDOW, HEADS, CHANNELS = (3, 4), 2, 16


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def tokens():
    """qkv (B, H, W, 3C) with two windows a side, time token (B, 3C) and table."""
    table = random((2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1), HEADS)
    return random(2, 6, 8, 3 * CHANNELS), random(2, 3 * CHANNELS), table


def scores_and_parts(qkv, table):
    """S (without a time token), and q, k, v per window: (B · windows, heads, L, d)."""
    windows = reference.partition_windows(qkv, WINDOW)
    q, k, v = windows.reshape(*windows.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + reference.position_bias(table, WINDOW)
    return scores, q, k, v


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 5e-6)])
def test_latent_model_agrees_with_the_recording(name, dtype, tolerance):
    golden = recording(name)
    state = {
        key: value.to(dtype, copy=True) if value.is_floating_point() else value
        for key, value in golden.under("state.").items()
    }
    for value in state.values():
        value.requires_grad_(value.is_floating_point())
    x = golden["input.x"].to(dtype, copy=True).requires_grad_()
    heads = golden.config["num_heads"]
    out = reference.latent_diffit(state, x, golden["input.t"], golden["input.y"], heads)
    assert_close(out, golden["output"], tolerance)
    (out * golden["loss_weight"]).sum().backward()
    assert_close(x.grad, golden["grad.input.x"], tolerance, "gradient of x")
    for key, expected in golden.under("grad.param.").items():
        assert_close(*without_key_third(key, state[key].grad, expected), tolerance, key)

    guided_input = golden["cfg.x"].to(dtype)[:2].repeat(2, 1, 1, 1)
    with torch.no_grad():
        out = reference.latent_diffit(state, guided_input, golden["cfg.t"], golden["cfg.y"], heads)
    out = reference.guided(out, golden["cfg.t"], 4.4, golden.config["input_size"])
    assert_close(out, golden["cfg.output_scale4.4"], tolerance, "guided")


def without_key_third(key, actual, expected):
    """A time projection's key third has gradient zero; recordings hold rounding noise there."""
    if "qkv_temb" not in key:
        return actual, expected
    (q, _, v), (expected_q, _, expected_v) = actual.chunk(3), expected.chunk(3)
    return torch.cat((q, v)), torch.cat((expected_q, expected_v))


def test_adaln_zero_block_agrees_with_the_recording():
    golden = recording("dit_adaln_block")
    state = golden.under("state.")
    for value in state.values():
        value.requires_grad_()
    block = {key.removeprefix("block."): v for key, v in state.items() if key.startswith("block.")}
    x, c = (golden[f"input.{name}"].clone().requires_grad_() for name in "xc")
    final = {key.removeprefix("final_layer."): v for key, v in state.items() if "final" in key}
    grid = x.unflatten(1, (8, 8))
    out = reference.block(grid, c, block, golden.config["num_heads"], (8, 8))
    out = reference.final_layer(out, c, final).flatten(1, 2)
    assert_close(out, golden["output"], 2e-5)
    (out * golden["loss_weight"]).sum().backward()
    assert_close(x.grad, golden["grad.input.x"], 2e-5, "gradient of x")
    assert_close(c.grad, golden["grad.input.c"], 2e-5, "gradient of c")
    for key, expected in golden.under("grad.param.").items():
        assert_close(state[key].grad, expected, 2e-5, key)


def test_1_key_time_token_and_key_bias_cancel(tokens):
    qkv, time, table = tokens
    out = reference.window_attention(qkv, time, table, HEADS, WINDOW)
    q, k, v = time.chunk(3, -1)
    other = torch.cat((q, k + random(2, CHANNELS), v), -1)
    assert_close(reference.window_attention(qkv, other, table, HEADS, WINDOW), out, EXACT)
    assert_close(
        reference.window_attention(
            qkv, torch.cat((q, torch.zeros_like(k), v), -1), table, HEADS, WINDOW
        ),
        out,
        EXACT,
    )
    (gradient,) = torch.autograd.grad(out.square().sum(), time)
    dq, dk, dv = gradient.chunk(3, -1)
    assert dk.abs().max() < EXACT * dq.abs().max()
    assert min(dq.abs().min(), dv.abs().min()) > 0


def test_2_and_3_value_time_token_leaves_the_attention(tokens):
    qkv, time, table = tokens
    q_time, _, v_time = time.chunk(3, -1)
    zero = torch.zeros_like(q_time)
    inside = torch.cat((q_time, zero, zero), -1)
    folded = reference.window_attention(qkv, inside, table, HEADS, WINDOW)
    folded = folded + v_time[:, None, None]
    assert_close(folded, reference.window_attention(qkv, time, table, HEADS, WINDOW), EXACT)


def test_4_backward_of_the_time_token(tokens):
    qkv, time, table = tokens
    out = reference.window_attention(qkv, time, table, HEADS, WINDOW)
    dout = torch.randn_like(out)
    dqkv, dtime = torch.autograd.grad(out, (qkv, time), dout)
    dq_time, dk_time, dv_time = dtime.chunk(3, -1)
    assert_close(dq_time, dqkv.chunk(3, -1)[0].sum((1, 2)), EXACT, "dq_t")
    assert_close(dv_time, dout.sum((1, 2)), EXACT, "dv_t")
    assert dk_time.abs().max() < EXACT * dq_time.abs().max()


def test_5_backward_of_the_scores_in_both_forms(tokens):
    qkv, time, table = tokens
    scores, _, _, v = scores_and_parts(qkv, table)
    v_time = time.chunk(3, -1)[2].repeat_interleave(4, 0).reshape(8, HEADS, 1, -1)
    probs = scores.softmax(-1)
    out = probs @ v + v_time
    dout = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, scores, dout, retain_graph=True)
    with_time = probs * (dout @ (v + v_time).mT - (dout * out).sum(-1, keepdim=True))
    without = probs * (dout @ v.mT - (dout * (out - v_time)).sum(-1, keepdim=True))
    mixed = probs * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    assert_close(with_time, expected, EXACT, "v_t in both")
    assert_close(without, expected, EXACT, "v_t in neither")
    assert (mixed - expected).abs().max() > 1e-3, "mixing the two forms must be wrong"
    assert expected.sum(-1).abs().max() < EXACT


def test_6_probabilities_from_the_log_sum_exp(tokens):
    scores = scores_and_parts(tokens[0], tokens[2])[0]
    lse = scores.exp().sum(-1).log()
    assert_close((scores - lse[..., None]).exp(), scores.softmax(-1), EXACT)


@pytest.mark.parametrize("window", [(3, 4), (1, 5), (4, 4), (7, 2)])
def test_7_and_8_the_bias_is_block_toeplitz_and_its_gradient_a_sum_over_diagonals(window):
    h, w = window
    table = random((2 * h - 1) * (2 * w - 1), HEADS)
    bias = reference.position_bias(table, window)
    boxes = table.T.reshape(HEADS, 2 * h - 1, 2 * w - 1).flip(1, 2)
    for i, (y, x) in enumerate((y, x) for y in range(h) for x in range(w)):
        box = boxes[:, h - 1 - y : 2 * h - 1 - y, w - 1 - x : 2 * w - 1 - x]
        assert torch.equal(bias[:, i], box.reshape(HEADS, h * w))

    dbias = torch.randn_like(bias)
    (dtable,) = torch.autograd.grad(bias, table, dbias)
    pairs = dbias.reshape(HEADS, h, w, h, w)
    for dy in range(1 - h, h):
        rows = pairs.diagonal(-dy, 1, 3).sum(-1)  # y_i - y_j = dy: (heads, w, w)
        for dx in range(1 - w, w):
            row = (dy + h - 1) * (2 * w - 1) + dx + w - 1
            assert_close(rows.diagonal(-dx, 1, 2).sum(-1), dtable[row], EXACT, f"({dy}, {dx})")


def test_9_windows_are_independent_and_share_the_time_token(tokens):
    qkv, time, table = tokens
    out = reference.window_attention(qkv, time, table, HEADS, WINDOW)
    for sample in range(2):
        for top in (0, 3):
            for left in (0, 4):
                box = (slice(sample, sample + 1), slice(top, top + 3), slice(left, left + 4))
                alone = reference.window_attention(
                    qkv[box], time[sample : sample + 1], table, HEADS, WINDOW
                )
                assert_close(alone, out[box], EXACT)


def test_10_the_time_projection_is_linear(tokens):
    weight, bias, by_time, by_class = random(12, 8), random(12), random(5, 8), random(3, 8)
    t, y = torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0])
    whole = F.linear(by_time[t] + by_class[y], weight, bias)
    tables = by_time @ weight.T, by_class @ weight.T + bias
    assert_close(tables[0][t] + tables[1][y], whole, EXACT)


def test_11_dropout_keeps_the_value_time_token_inside(tokens):
    qkv, time, table = tokens
    scores, q, _, v = scores_and_parts(qkv, table)
    v_time = time.chunk(3, -1)[2].repeat_interleave(4, 0).reshape(8, HEADS, 1, -1)
    dropped = F.dropout(scores.softmax(-1), 0.5, training=True)
    assert (dropped @ (v + v_time) - (dropped @ v + v_time)).abs().max() > 1e-2
    mask = (dropped > 0) * 2.0
    k_time = random(1, HEADS, 1, q.shape[-1])
    with_key = (scores + (q @ k_time.mT) / math.sqrt(q.shape[-1])).softmax(-1)
    assert_close(with_key, scores.softmax(-1), EXACT, "the key's part cancels before dropout")
    (dk_time,) = torch.autograd.grad(((with_key * mask) @ v).square().sum(), k_time)
    assert dk_time.abs().max() < EXACT


@pytest.mark.parametrize("per_token", [False, True])
def test_12_adaln_backward(per_token):
    batch, n, channels = 2, 5, 8
    modulation = (batch, n, channels) if per_token else (batch, channels)
    r, y, w, b = random(batch, n, channels), random(batch, n, channels), random(8), random(8)
    shift, scale, gate = random(*modulation), random(*modulation), random(*modulation)
    x, out = reference.adaln(r, shift, scale, y=y, gate=gate, weight=w, bias=b)
    dx_direct, dout = torch.randn_like(x), torch.randn_like(out)
    inputs = (r, y, gate, shift, scale, w, b)
    expected = torch.autograd.grad((x, out), inputs, (dx_direct, dout), retain_graph=True)

    wide = [t if per_token else t[:, None] for t in (shift, scale, gate)]
    _, scale3, gate3 = wide
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    normed = (x - x.mean(-1, keepdim=True)) / sigma
    g = dout * (1 + scale3) * w
    mean = lambda value: value.mean(-1, keepdim=True)  # noqa: E731
    dr = (g - mean(g) - normed * mean(g * normed)) / sigma + dx_direct
    shared = (lambda value: value) if per_token else (lambda value: value.sum(1))
    actual = (
        dr,
        gate3 * dr,
        shared(y * dr),
        shared(dout),
        shared(dout * (normed * w + b)),
        (dout * (1 + scale3) * normed).sum((0, 1)),
        (dout * (1 + scale3)).sum((0, 1)),
    )
    names = ("dr", "dy", "dgate", "dshift", "dscale", "dweight", "dbias")
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        assert_close(ours, theirs, EXACT, name)


def test_13_gelu_derivative_from_the_pre_activation():
    h = random(1000)
    gelu = reference.mlp(
        h[:, None],
        {
            "fc1.weight": torch.ones(1, 1).double(),
            "fc1.bias": torch.zeros(1).double(),
            "fc2.weight": torch.ones(1, 1).double(),
            "fc2.bias": torch.zeros(1).double(),
        },
    )
    (expected,) = torch.autograd.grad(gelu.sum(), h)
    k = math.sqrt(2 / math.pi)
    tanh = torch.tanh(k * (h + 0.044715 * h**3))
    actual = 0.5 * (1 + tanh) + 0.5 * h * (1 - tanh**2) * k * (1 + 0.134145 * h**2)
    assert_close(actual, expected, EXACT)


def test_14_group_norm_from_parts_and_its_backward():
    batch, groups, channels = 2, 3, 12
    x, w, b = random(batch, 4, 5, channels), random(channels), random(channels)
    out = reference.group_norm_silu(x, w, b, num_groups=groups)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, w, b), dout)

    parts = x.detach().reshape(batch, 20, groups, -1).split((7, 13), 1)
    n_k = [part.shape[1] * part.shape[3] for part in parts]
    m_k = [part.mean((1, 3), keepdim=True) for part in parts]
    squares = [
        ((part - m) ** 2).sum((1, 3), keepdim=True) for part, m in zip(parts, m_k, strict=True)
    ]
    n = sum(n_k)
    mean = sum(count * m for count, m in zip(n_k, m_k, strict=True)) / n
    var = (
        sum(s + count * (m - mean) ** 2 for s, count, m in zip(squares, n_k, m_k, strict=True)) / n
    )
    grouped = x.detach().reshape(batch, 20, groups, -1)
    assert_close(mean, grouped.mean((1, 3), keepdim=True), EXACT, "mean")
    assert_close(var, grouped.var((1, 3), correction=0, keepdim=True), EXACT, "variance")

    sigma = (var + 1e-5).sqrt()
    normed = (grouped - mean) / sigma
    weight, bias = (t.detach().view(groups, -1) for t in (w, b))
    z = weight * normed + bias
    s = torch.sigmoid(z)
    dz = dout.reshape(grouped.shape) * s * (1 + z * (1 - s))
    by_channel = dz.sum(1), (dz * normed).sum(1)  # (batch, groups, channels of a group)
    mean_g, mean_gx = ((weight * sums).sum(-1)[:, None, :, None] / n for sums in by_channel)
    dx = (weight * dz - mean_g - normed * mean_gx) / sigma
    actual = dx.reshape(x.shape), by_channel[1].sum(0).view(-1), by_channel[0].sum(0).view(-1)
    for name, ours, theirs in zip(("dx", "dweight", "dbias"), actual, expected, strict=True):
        assert_close(ours, theirs, EXACT, name)
