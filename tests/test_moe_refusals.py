"""What the MoE ops and MXExperts refuse: the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_cases import TOPK, E, H, I, T, floats, inputs
from reference import FP4, FP8

import sm120_ops
from sm120_ops.nn import MXExperts

OPS = torch.ops.sm120


def test_refusals(device: torch.device) -> None:
    """The op, the argument, what was expected and what came, from wrappers and raw ops alike."""
    x, ids, weights = inputs(device)
    module = MXExperts.from_float(**floats(device))
    gate_up, down = module.weights("gate_up"), module.weights("down")
    int_ends = torch.zeros(2, dtype=torch.int32, device=device)
    product = torch.zeros(16, 64, device=device)
    rows = torch.zeros(T, TOPK, dtype=torch.int32, device=device)
    needs_grad = x.clone().requires_grad_()

    def raw_moe(*args: Any, **kwargs: Any) -> Callable[[], object]:
        full = [x, ids, weights, *gate_up, *down, FP8, 32, 32]
        full[: len(args)] = args
        return lambda: OPS.moe(*full, **kwargs)

    def wide(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return gate_up[0][:, :n], gate_up[1][:, :n]

    kinds = (ValueError, TypeError, RuntimeError)
    for text, call in [
        ("moe_route: topk_ids: expected shape", lambda: sm120_ops.moe_route(x, ids[1:], E)),
        ("moe_route: topk_ids: expected dtype", lambda: sm120_ops.moe_route(x, ids.float(), E)),
        (
            "moe_route: topk_ids: expected 1 to 32",
            lambda: OPS.moe_route(x, ids.tile(1, 11), E, FP8, 32, 16),
        ),
        (
            "moe_route: num_experts: expected 1 to 1024, got 0",
            lambda: sm120_ops.moe_route(x, ids, 0),
        ),
        (
            "moe_route: num_experts: expected 1 to 1024",
            lambda: OPS.moe_route(x, ids, 2000, FP8, 32, 16),
        ),
        (
            "moe_route: alignment: expected 16, 32, 64 or 128, got 8",
            lambda: OPS.moe_route(x, ids, E, FP8, 32, 8),
        ),
        (
            "moe_route: x: expected K to be a multiple of 32",
            lambda: OPS.moe_route(x[:, :48].contiguous(), ids, E, FP4, 32, 16),
        ),
        ("moe_route: x: expected a contiguous", lambda: sm120_ops.moe_route(x[:, :64], ids, E)),
        ("moe_route: x: expected dtype", lambda: sm120_ops.moe_route(x.long(), ids, E)),
        (
            "moe_route: format: expected 'mxfp8' or 'mxfp4', got 'fp8'",
            lambda: OPS.moe_route(x, ids, E, "fp8", 32, 16),
        ),
        (
            "moe_route: gran_k: expected 32 or 128, got 64",
            lambda: OPS.moe_route(x, ids, E, FP8, 64, 16),
        ),
        (
            "moe_activation: gate_up: expected dtype",
            lambda: sm120_ops.moe_activation(product.half(), int_ends),
        ),
        (
            "moe_activation: gate_up: expected K to be",
            lambda: OPS.moe_activation(product[:, :40].contiguous(), int_ends, FP8, 32, 16),
        ),
        (
            "moe_activation: gate_up: expected an even",
            lambda: OPS.moe_activation(product[:, :3].contiguous(), int_ends, FP8, 32, 16),
        ),
        (
            "moe_activation: group_ends: expected dtype",
            lambda: sm120_ops.moe_activation(product, int_ends.long()),
        ),
        (
            "moe_activation: bias: expected shape",
            lambda: sm120_ops.moe_activation(product, int_ends, bias=product[:3]),
        ),
        (
            "moe_activation: limit: expected a positive",
            lambda: OPS.moe_activation(product, int_ends, FP8, 32, 16, None, 1.0, 0.0, -1.0),
        ),
        (
            "moe_activation: alignment: expected",
            lambda: OPS.moe_activation(product, int_ends, FP8, 32, 1),
        ),
        (
            "moe_combine: rows: expected dtype",
            lambda: sm120_ops.moe_combine(product, rows.long(), weights),
        ),
        (
            "moe_combine: topk_weights: expected shape",
            lambda: sm120_ops.moe_combine(product, rows, weights[:3]),
        ),
        (
            "moe_combine: topk_weights: expected dtype",
            lambda: OPS.moe_combine(product, rows, weights.half(), None, None, x.dtype),
        ),
        (
            "moe_combine: x: expected a multiple of 8",
            lambda: OPS.moe_combine(
                product[:, :20].contiguous(), rows, weights, None, None, x.dtype
            ),
        ),
        (
            "moe_combine: topk_ids: expected",
            lambda: OPS.moe_combine(product, rows, weights, product[:E], None, x.dtype),
        ),
        (
            "moe_combine: out_dtype: expected",
            lambda: OPS.moe_combine(product, rows, weights, None, None, torch.int8),
        ),
        (
            "moe_combine: out: expected shape",
            lambda: sm120_ops.moe_combine(product, rows, weights, out=product),
        ),
        (
            "moe_combine: out: expected memory apart from x",
            lambda: sm120_ops.moe_combine(product, rows, weights, out=product[:T]),
        ),
        ("moe: topk_weights: expected shape", raw_moe(x, ids, weights[:, :2].contiguous())),
        ("moe: topk_ids: expected shape", raw_moe(x, ids[:4])),
        ("moe: gate_up: expected a contiguous", raw_moe(x, ids, weights, *wide(64))),
        (
            "moe: gate_up_scale: expected packed",
            raw_moe(x, ids, weights, gate_up[0], gate_up[1][:, 1:]),
        ),
        (
            "moe: gate_up_scale: expected strides",
            raw_moe(x, ids, weights, gate_up[0], gate_up[1].repeat_interleave(2, 1)[:, ::2]),
        ),
        ("moe: down: expected", raw_moe(x, ids, weights, *gate_up, down[0][:4], down[1][:4])),
        ("moe: gate_up: expected", raw_moe(x[:, :32].contiguous(), ids, weights)),
        ("moe: gate_up_bias: expected shape", raw_moe(gate_up_bias=product)),
        ("moe: limit: expected", raw_moe(limit=0.0)),
        ("moe: format: expected", raw_moe(x, ids, weights, *gate_up, *down, "w4a8")),
        (
            "moe: workspace: expected at least",
            lambda: module(x, ids, weights, torch.zeros(9, dtype=torch.uint8, device=device)),
        ),
        (
            "moe: workspace: expected dtype",
            lambda: module(x, ids, weights, torch.zeros(9, device=device)),
        ),
        ("nn.MXExperts: x: expected shape", lambda: module(x[:, :7], ids, weights)),
        ("nn.MXExperts: topk_ids: expected shape", lambda: module(x, ids[None], weights)),
        (
            "nn.MXExperts: x: expected a tensor that needs no",
            lambda: module(needs_grad, ids, weights),
        ),
        (
            "nn.MXExperts: hidden: expected a positive multiple of 32",
            lambda: MXExperts(E, 48, I, format="w4a8"),
        ),
        ("nn.MXExperts: format: expected", lambda: MXExperts(E, H, I, format="fp8")),
        ("nn.MXExperts: activation: expected", lambda: MXExperts(E, H, I, activation="gelu")),
        ("nn.MXExperts: num_experts: expected", lambda: MXExperts(0, H, I)),
        (
            "nn.MXExperts: gate_up: expected shape",
            lambda: MXExperts.from_float(floats()["gate_up"][:, 1:], floats()["down"]),
        ),
        (
            "nn.MXExperts: down_bias: expected",
            lambda: MXExperts.from_float(**floats(), gate_up_bias=product),
        ),
    ]:
        with pytest.raises(kinds, match=f"^sm120_ops.{text}"):
            call()


@pytest.mark.gpu
def test_cuda_checks_of_raw_ops() -> None:
    """The C++ side, reached past the wrappers."""
    x, ids, weights = inputs("cuda")
    capacity = sm120_ops.moe_capacity(T * TOPK, E, 16)
    data = torch.zeros(capacity, H, dtype=torch.float8_e4m3fn, device="cuda")
    scale = torch.zeros(1, capacity, dtype=torch.int32, device="cuda").t()
    ends = torch.zeros(E, dtype=torch.int32, device="cuda")
    rows = torch.zeros(T, TOPK, dtype=torch.int32, device="cuda")
    good = {"out": data, "out_scale": scale, "group_ends": ends, "rows": rows}
    product = torch.zeros(16, 64, device="cuda")

    def route(**changes: torch.Tensor) -> None:
        OPS.moe_route.out(x, ids, E, FP8, 32, 16, **(good | changes))

    route()
    for text, call in [
        ("moe_route: out: expected shape", lambda: route(out=data[1:])),
        ("moe_route: out_scale: expected packed", lambda: route(out_scale=scale[1:])),
        ("moe_route: group_ends: expected shape", lambda: route(group_ends=ends[1:])),
        ("moe_route: group_ends: expected dtype", lambda: route(group_ends=ends.long())),
        ("moe_route: rows: expected memory apart", lambda: route(rows=scale[:30].view(T, TOPK))),
        ("moe_route: rows: expected a tensor on cuda:0", lambda: route(rows=rows.cpu())),
        (
            "moe_route: topk_ids: expected a tensor on",
            lambda: OPS.moe_route(x, ids.cpu(), E, FP8, 32, 16),
        ),
        (
            "moe_activation: group_ends: expected a tensor on",
            lambda: OPS.moe_activation(product, ends.cpu(), FP8, 32, 16),
        ),
        (
            "moe_combine: rows: expected a tensor on",
            lambda: OPS.moe_combine(product, rows.cpu(), weights, None, None, x.dtype),
        ),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=f"^sm120_ops.{text}"):
            call()
    torch.cuda.synchronize()
