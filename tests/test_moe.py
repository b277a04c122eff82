"""The MoE steps: exact where they say so, any routing, poisoned padding."""

from __future__ import annotations

import itertools
from typing import Any

import moe_cases
import pytest
import torch
from moe_cases import ACTIVATIONS, ROUTINGS, Activation, poisoned, poisoned_quantized, same_bits
from reference import FP4, FP8

import sm120_ops

OPS = torch.ops.sm120


# ---- moe_route -----------------------------------------------------------------------------------


def check_route(
    x: torch.Tensor, ids: torch.Tensor, experts: int, fmt: str, gran_k: int, alignment: int
) -> None:
    """Against a count one slot at a time, and quantize() for the bits; twice; padding untouched."""
    device, k = x.device, x.shape[1]
    want_ends, want_rows = moe_cases.rows_of(ids.cpu(), experts, alignment)
    capacity = sm120_ops.moe_capacity(ids.numel(), experts, alignment)
    assert max(want_ends) <= capacity
    assert capacity % alignment == 0
    data, scale = poisoned_quantized(capacity, k, fmt, gran_k, device)
    ends = poisoned((experts,), torch.int32, device)
    rows = poisoned(tuple(ids.shape), torch.int32, device)
    args = (x, ids, experts, fmt, gran_k, alignment)
    OPS.moe_route.out(*args, out=data, out_scale=scale, group_ends=ends, rows=rows)
    assert ends.tolist() == want_ends
    assert torch.equal(rows.cpu().long(), want_rows)
    flat = want_rows.flatten()
    slots = (flat >= 0).nonzero().flatten()
    live, tokens = flat[slots].to(device), (slots // ids.shape[1]).to(device)
    want, want_scale = sm120_ops.quantize(x, fmt, gran_k)
    assert torch.equal(data.view(torch.uint8)[live], want.view(torch.uint8)[tokens])
    assert torch.equal(scale[live], want_scale[tokens])
    rest = torch.ones(capacity, dtype=torch.bool, device=device)
    rest[live] = False
    assert (data.view(torch.uint8)[rest] == 0xFF).all(), "padding rows of data were written"
    assert (scale[rest] == -1).all(), "padding rows of the scales were written"

    again = sm120_ops.moe_route(x, ids, experts, fmt, gran_k, alignment)
    assert torch.equal(again[2], ends)
    assert torch.equal(again[3], rows)
    assert torch.equal(again[0].view(torch.uint8)[live], data.view(torch.uint8)[live])
    assert torch.equal(again[1][live], scale[live])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_route(device: torch.device, routing: str, fmt: str) -> None:
    generator = torch.Generator().manual_seed(len(routing))
    for number, (tokens, topk, experts, k) in enumerate(
        [(0, 2, 3, 32), (1, 1, 1, 32), (1, 8, 256, 4096), (7, 3, 5, 96), (33, 6, 64, 544),
         (150, 16, 20, 288), (300, 2, 512, 64), (40, 32, 1024, 2880)]
    ):  # fmt: skip
        ids = moe_cases.route(routing, tokens, topk, experts, generator)
        ids = ids.int() if number % 2 else ids
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        x = torch.randn(tokens, k, generator=generator).mul(3).to(dtype)
        gran_k, alignment = (32, 128)[number % 2], (16, 32, 64, 128)[number % 4]
        check_route(x.to(device), ids.to(device), experts, fmt, gran_k, alignment)


def test_route_special_values(device: torch.device) -> None:
    """NaN and Inf stay in the group they are in; zeros; K that ends inside a group of 128."""
    x = torch.randn(6, 176, device=device)
    x[1, 5], x[2, 100], x[3] = torch.nan, torch.inf, 0
    ids = torch.tensor([[0], [1], [0], [1], [2], [0]], device=device)
    for gran_k, dtype in itertools.product((32, 128), (torch.bfloat16, torch.float32)):
        check_route(x.to(dtype), ids, 3, FP8, gran_k, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [512, 8192])
def test_route_large(tokens: int) -> None:
    """Several tokens a block and several batches; against the CPU kernel."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 1024, generator=generator).bfloat16()
    for routing, topk, experts in [("uniform", 6, 256), ("zipf", 16, 512), ("one", 8, 64)]:
        ids = moe_cases.route(routing, tokens, topk, experts, generator)
        want = sm120_ops.moe_route(x, ids, experts, FP4, 32, 64)
        got = sm120_ops.moe_route(x.cuda(), ids.cuda(), experts, FP4, 32, 64)
        assert torch.equal(got[2].cpu(), want[2])
        assert torch.equal(got[3].cpu(), want[3])
        live = want[3].flatten().long()
        assert torch.equal(got[0].cpu()[live], want[0][live])
        assert torch.equal(got[1].cpu()[live], want[1][live])


def test_capacity_is_the_most_that_can_occur() -> None:
    for experts, slots, alignment in itertools.product((1, 2, 3), range(7), (16, 32)):
        most = 0
        for ids in itertools.product(range(-1, experts), repeat=slots):
            ends = moe_cases.rows_of(torch.tensor(ids).view(-1, 1), experts, alignment)[0]
            most = max(most, -(-max(ends) // alignment) * alignment)
        assert sm120_ops.moe_capacity(slots, experts, alignment) == most


# ---- moe_activation ------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activation(
    device: torch.device, fmt: str, gran_k: int, name: str, dtype: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(gran_k)
    options = ACTIVATIONS[name]
    for k, counts, alignment in [
        (32, [1], 16), (96, [3, 0, 17, 16, 0], 16), (288, [0, 0], 32), (544, [40, 1, 129], 128),
        (2880, [0, 2, 5], 64), (64, [2] * 300, 16),
    ]:  # fmt: skip
        ends, groups, start = [], [], 0
        for group, count in enumerate(counts):
            ends.append(start + count)
            groups += [(row, group) for row in range(start, start + count)]
            start = -(-ends[-1] // alignment) * alignment
        num_rows = start + 24
        live, group_of = (torch.tensor(t, dtype=torch.int64) for t in zip(*groups, strict=True)) \
            if groups else (torch.empty(0, dtype=torch.int64),) * 2  # fmt: skip
        gate_up = torch.full((num_rows, 2 * k), torch.nan)  # padding rows must not be read
        values = torch.randn(len(live), 2 * k, generator=generator) * 3
        gate_up[live] = values
        gate_up = gate_up.to(device, dtype)
        bias = torch.randn(len(counts), 2 * k, generator=generator).to(device, dtype)
        live, group_of = live.to(device), group_of.to(device)
        exact, slack = moe_cases.swiglu(
            gate_up[live].double(), bias[group_of].double() if with_bias else None, options
        )
        data, scale = poisoned_quantized(num_rows, k, fmt, gran_k, device)
        group_ends = torch.tensor(ends, dtype=torch.int32, device=device)
        args: tuple[Any, ...] = (
            gate_up,
            group_ends,
            fmt,
            gran_k,
            alignment,
            bias if with_bias else None,
        )
        args += (options.alpha, options.up_offset, options.limit, options.interleaved)
        OPS.moe_activation.out(*args, out=data, out_scale=scale)
        moe_cases.assert_quantized(
            data.view(torch.uint8)[live].view(data.dtype), scale[live], exact, slack, fmt, gran_k
        )
        rest = torch.ones(num_rows, dtype=torch.bool, device=device)
        rest[live] = False
        assert (data.view(torch.uint8)[rest] == 0xFF).all(), "padding rows of data were written"
        assert (scale[rest] == -1).all(), "padding rows of the scales were written"
        again = sm120_ops.moe_activation(*args)
        assert torch.equal(again[0].view(torch.uint8)[live], data.view(torch.uint8)[live])
        assert torch.equal(again[1][live], scale[live])


def test_activation_special_values(device: torch.device) -> None:
    """NaN through a limit, Inf, gates whose exponential overflows."""
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 3.0, -0.0, 0.5])
    gate_up = torch.zeros(8, 64, device=device)
    gate_up[:, :32] = 1
    gate_up[:, 3] = gate.to(device)
    gate_up[:, 32:] = 2
    ends = torch.tensor([8], dtype=torch.int32, device=device)
    for limit in (None, 7.0):
        data, scale = sm120_ops.moe_activation(gate_up, ends, FP8, 32, 16, limit=limit)
        exact, slack = moe_cases.swiglu(gate_up.double(), None, Activation(limit=limit))
        moe_cases.assert_quantized(data, scale, exact, slack, FP8, 32)


def test_activation_ends_beyond_the_matrix(device: torch.device) -> None:
    """Ends that are none give some rows, and never a write outside."""
    gate_up = torch.randn(20, 64, device=device)
    for bad in ([30, 40], [2**31 - 1, 5], [-5, 12], [16, 3]):
        data, scale = poisoned_quantized(24, 32, FP8, 32, device)
        ends = torch.tensor(bad, dtype=torch.int32, device=device)
        OPS.moe_activation.out(gate_up, ends, FP8, 32, 16, out=data[:20], out_scale=scale[:20])
        assert (data[20:].view(torch.uint8) == 0xFF).all()


# ---- moe_combine ---------------------------------------------------------------------------------


def combine_slot_by_slot(
    x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None,
    ids: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    y = torch.zeros(rows.shape[0], x.shape[1])
    for token, slot in itertools.product(*map(range, rows.shape)):
        if rows[token, slot] >= 0:
            value = x[rows[token, slot]].float()
            if bias is not None:
                value = value + bias[ids[token, slot]].float()
            y[token] = y[token] + weights[token, slot].float() * value
    return y


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_combine(
    device: torch.device, x_dtype: torch.dtype, out_dtype: torch.dtype, with_bias: bool
) -> None:
    """Bit for bit the float32 sum in the order of slots."""
    generator = torch.Generator().manual_seed(5)
    for tokens, topk, experts, n in [
        (1, 1, 1, 8),
        (3, 2, 4, 1048),
        (9, 8, 5, 72),
        (5, 19, 7, 2880),
    ]:
        ids = moe_cases.route("dropped", tokens, topk, experts, generator)
        _, rows = moe_cases.rows_of(ids, experts, 16)
        x = torch.full((int(rows.max()) + 18, n), torch.nan)
        x[rows[rows >= 0]] = torch.randn(int((rows >= 0).sum()), n, generator=generator)
        weights = torch.rand(tokens, topk, generator=generator)
        weights[rows < 0] = torch.nan  # not looked at
        bias = torch.randn(experts, n, generator=generator)
        weights_dtype = torch.bfloat16 if topk == 8 else torch.float32
        x, weights, bias = x.to(x_dtype), weights.to(weights_dtype), bias.to(x_dtype)
        want = combine_slot_by_slot(x, rows, weights, bias if with_bias else None, ids)
        x, rows, weights = x.to(device), rows.int().to(device), weights.to(device)
        options: dict[str, Any] = {}
        if with_bias:
            options = {"bias": bias.to(device), "topk_ids": ids.to(device)}
        got = sm120_ops.moe_combine(x, rows, weights, **options, out_dtype=out_dtype)
        assert got.dtype == out_dtype
        assert same_bits(got.cpu(), want.to(out_dtype))
        out = poisoned((tokens, n), out_dtype, device)
        assert sm120_ops.moe_combine(x, rows, weights, out=out, **options) is out
        assert same_bits(out, got)


def test_combine_of_nothing(device: torch.device) -> None:
    x = torch.full((16, 32), torch.nan, device=device)
    rows = torch.tensor(
        [[-1, -1], [16, 2**31 - 1], [-5, -(2**31)]], dtype=torch.int32, device=device
    )
    weights = torch.full((3, 2), torch.nan, device=device)
    assert (sm120_ops.moe_combine(x, rows, weights) == 0).all()
    assert sm120_ops.moe_combine(x, rows[:0], weights[:0]).shape == (0, 32)
    assert (sm120_ops.moe_combine(x[:0], rows, weights) == 0).all()
