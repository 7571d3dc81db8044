"""What the benchmarks compare with: each peer computes the same, or says why it is missing."""

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, models, peers, race, variants
from benchmarks.measure import DEVICE
from diffit_kernels.positions import relative_position_index
from tests.parity import assert_close

SIDE, HEADS, HEAD_DIM = 4, 2, 8
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="reasons that a CPU gives")


@pytest.fixture
def split():
    """q, k, v by head, and a table."""
    shape = (3, HEADS, SIDE**2, HEAD_DIM)
    return *torch.randn(3, *shape, device=DEVICE), torch.randn((2 * SIDE - 1) ** 2, HEADS).to(
        DEVICE
    )


def expanded(table):
    index = relative_position_index((SIDE, SIDE), table.device)
    return table[index].permute(2, 0, 1)[None]


def test_flex_attention_looks_the_same_bias_up(split, monkeypatch):
    """Uncompiled, which is the same function."""
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    *qkv, table = split
    flex = peers.flex(SIDE, train=False)(*qkv, table)
    assert_close(flex, peers.literal(*qkv, expanded(table)), 1e-6)


def test_sdpa_agrees_with_the_literal_equations(split):
    *qkv, table = split
    bias = expanded(table).contiguous()
    assert_close(peers.sdpa(*qkv, bias), peers.literal(*qkv, bias), 1e-6)
    assert_close(peers.sdpa_by("math")(*qkv, bias), peers.literal(*qkv, bias), 1e-6)


@on_cpu
def test_reasons_that_a_cpu_gives():
    assert peers.sdpa_by("efficient") == peers.sdpa_by("cuDNN") == "a CUDA kernel"
    assert peers.flex(SIDE, train=True) == "FlexAttention has no backward on a CPU"


@pytest.mark.parametrize("name", [*peers.FLASH_ATTENTION, *peers.LAYER_NORMS])
def test_a_package_that_is_not_there_is_named_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    if name in peers.FLASH_ATTENTION:
        reason = peers.flash_attention(name, torch.bfloat16)
        _, source = peers.FLASH_ATTENTION[name]
    else:
        reason = peers.layer_norm(name, 1e-6, train=False)
        _, source = peers.LAYER_NORMS[name]
    assert reason == f"{name} is not installed: {source}"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", peers.FLASH_ATTENTION)
def test_flash_attention_takes_tokens_before_heads(name, wrapped, split, monkeypatch):
    """A stand-in of its interface; some versions return the log-sum-exp as well."""

    def stand_in(q, k, v):
        out = peers.sdpa(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        return (out, None) if wrapped else out

    monkeypatch.setattr(peers, "missing", lambda *package: None)
    monkeypatch.setattr(peers, "imported", lambda module, name: stand_in)
    attention = peers.flash_attention(name, torch.bfloat16)
    q, k, v = (t.transpose(1, 2) for t in split[:3])
    assert_close(attention(q, k, v).transpose(1, 2), peers.sdpa(*split[:3]), 1e-6)
    assert peers.flash_attention(name, torch.float32) == f"{name} takes half precision"


def test_a_package_that_breaks_on_import_fails_its_entry_alone(monkeypatch):
    monkeypatch.setattr(race, "_races", {})
    monkeypatch.setattr(peers, "missing", lambda *package: None)
    x = torch.randn(2, 3, 8)
    norm = peers.layer_norm("Liger", 1e-6, train=False)
    weight, bias = torch.ones(8), torch.zeros(8)
    entry = race.provider(norm, (x, weight, bias), None, lambda dtype: [x])
    result = race._enlist("Liger", entry)
    assert result.status == "failed" and result.reason.startswith("ModuleNotFoundError: No module")


@pytest.mark.parametrize("name", [n for n, v in variants.VARIANTS.items() if v.mode is None])
def test_every_variant_of_a_block_computes_the_same_on_the_same_parameters(name):
    block = models.new_block(4, "float32")
    own = variants.twin(block)
    variants.VARIANTS[name].change(own)
    assert [*map(id, own.parameters())] == [*map(id, block.parameters())]
    assert type(own.attn) is type(block.attn) or "SDPA" in name
    x, temb = torch.randn(2, 16, 1152, device=DEVICE), torch.randn(2, 1152, device=DEVICE)
    assert own.use_fused_tmsa == name.startswith("fused") and not block.use_fused_tmsa
    with torch.no_grad():
        assert_close(own(x, temb), block(x, temb), 1e-5)


def test_useful_operations_are_those_of_the_literal_block_but_the_time_tokens():
    about = models.sizes(batch=2, resolution=64)
    block = models.new_block(4, "float32")
    x = torch.randn(2, about["tokens"], 1152, device=DEVICE, requires_grad=True)
    temb = torch.randn(2, 1152, device=DEVICE, requires_grad=True)
    time_projection = 2 * 2 * 3 * 1152**2
    with FlopCounterMode(display=False) as forward:
        out = block(x, temb)
    assert forward.get_total_flops() == models.flops(about) + time_projection
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == models.flops(about, train=True) + 3 * time_projection


def test_fewest_bytes():
    x, out = torch.empty(10, dtype=torch.float32), torch.empty(3, dtype=torch.bfloat16)
    assert race.moved_bytes([x, None], [out], train=False) == 40 + 6
    assert race.moved_bytes([x], [out], train=True) == 3 * 40 + 2 * 6
    about = models.sizes(batch=2, resolution=64, depth=3)
    block = sum(p.numel() for p in models.new_block(4, "float32").parameters())
    tokens = 2 * about["tokens"] * 1152
    assert models.moved(about, "bfloat16") == 2 * (3 * block + 2 * tokens + 2 * 1152)


def test_the_floor_runs_the_four_products_of_every_block():
    block = models.new_block(4, "float32")
    with FlopCounterMode(display=False) as counter:
        models.products_alone(block, rows=7).results()
    runs = counter.get_total_flops() / (2 * 7 * 12 * 1152**2)
    assert runs == int(runs) > 1  # it first finds the fastest library


def test_ceilings_are_of_this_machine():
    assert 1e9 < measure.arithmetic("float32") < 1e16
    assert 1e8 < measure.bandwidth() < 1e14
