"""The permutation of a mixture-of-experts layer: tokens to rows of their experts, and back.

    moe_route        tokens -> their rows in the groups, quantised       (one row a token and slot)
    moe_combine      rows of the down product -> weighted sum of each token's rows

Between them stand grouped_gemm_psum() (grouped.py), moe_activation() (moe_activation.py) and
grouped_gemm_psum() again; moe() (moe_layer.py) is all five. See docs/moe.md.

Groups lie as grouped_gemm_psum() takes them: group g has the rows from align(group_ends[g - 1],
alignment) on, up to and without group_ends[g]. The rows between groups, and those after the last
one, are neither read nor written: they may hold anything, NaN included, before and after.

How many rows there are follows from shapes alone, never from the routing (`moe_capacity`).
"""

from __future__ import annotations

import torch

from .. import _check
from .layout import (
    FP4_DTYPES,
    TAGS,
    ceil_div,
    check_out,
    check_packed_scales,
    fake_packed_scales,
)
from .library import Library
from .quantize import FLOAT_DTYPES, FORMATS, GRANS_K, K_MULTIPLE, data_dtype, data_shape

ALIGNMENTS = (16, 32, 64, 128)
MAX_EXPERTS = 1024
MAX_TOPK = 32
ID_DTYPES = (torch.int32, torch.int64)
STEP_DTYPES = (torch.bfloat16, torch.float32)  # of products, biases and weights

_lib = Library()
_ROUTE = "Tensor x, Tensor topk_ids, int num_experts, str format, int gran_k, int alignment"
_lib.define(f"moe_route({_ROUTE}) -> (Tensor, Tensor, Tensor, Tensor)", tags=TAGS)
_lib.define(
    f"moe_route.out({_ROUTE}, *, Tensor(a!) out, Tensor(b!) out_scale, Tensor(c!) group_ends,"
    " Tensor(d!) rows) -> ()",
    tags=TAGS,
)
_COMBINE = "Tensor x, Tensor rows, Tensor topk_weights, Tensor? bias, Tensor? topk_ids"
_lib.define(f"moe_combine({_COMBINE}, ScalarType out_dtype) -> Tensor", tags=TAGS)
_lib.define(f"moe_combine.out({_COMBINE}, *, Tensor(a!) out) -> ()", tags=TAGS)


def moe_capacity(slots: int, num_experts: int, alignment: int) -> int:
    """Most rows that `slots` = tokens * topk can take up with any routing.

    As many groups as possible with one row each, and the other slots in whole pieces of
    `alignment` rows. A multiple of `alignment`.
    """
    groups = torch.sym_min(slots, num_experts)
    return alignment * (groups + (slots - groups) // alignment)


# ---- Checks --------------------------------------------------------------------------------------


def check_dense(op: str, arg: str, tensor: torch.Tensor, rank: int) -> None:
    _check.require_tensor(op, arg, tensor, rank=rank)
    if not tensor.is_contiguous():
        _check.fail(op, arg, "a contiguous tensor", f"strides {list(tensor.stride())}")
    _check.require_aligned(op, arg, tensor)


def check_ids(op: str, topk_ids: torch.Tensor) -> None:
    _check.require_tensor(op, "topk_ids", topk_ids, rank=2)
    _check.require_dtype(op, "topk_ids", topk_ids, ID_DTYPES)
    if not topk_ids.is_contiguous():
        _check.fail(op, "topk_ids", "a contiguous tensor", f"strides {list(topk_ids.stride())}")
    if not 1 <= topk_ids.shape[1] <= MAX_TOPK:
        _check.fail(op, "topk_ids", f"1 to {MAX_TOPK} slots a token", topk_ids.shape)


def check_format(op: str, arg: str, format: str, gran_k: int, k: int) -> None:
    _check.require_choice(op, "format", format, FORMATS)
    _check.require_choice(op, "gran_k", gran_k, GRANS_K)
    if k % K_MULTIPLE[format] != 0:
        requirement = f"K to be a multiple of {K_MULTIPLE[format]} for {format}"
        _check.fail(op, arg, requirement, f"K={k}")


def check_quantized(
    op: str, rows: int, k: int, format: str, gran_k: int, out: torch.Tensor, out_scale: torch.Tensor
) -> None:
    dtypes = (torch.float8_e4m3fn,) if format == "mxfp8" else FP4_DTYPES
    check_out(op, "out", out, data_shape(rows, k, format), dtypes)
    _check.require_aligned(op, "out", out)
    check_packed_scales(op, "out_scale", out_scale, rows, ceil_div(k, gran_k))
    _check.require_no_overlap(op, "out", out, out_scale=out_scale)


def empty_quantized(
    like: torch.Tensor, rows: int, k: int, format: str, gran_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    data = like.new_empty(data_shape(rows, k, format), dtype=data_dtype(format))
    return data, fake_packed_scales(like, rows, ceil_div(k, gran_k))


def _check_route(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    format: str,
    gran_k: int,
    alignment: int,
) -> tuple[int, int]:
    """Gives the shape of the rows."""
    op = "moe_route"
    check_dense(op, "x", x, 2)
    _check.require_dtype(op, "x", x, FLOAT_DTYPES)
    check_format(op, "x", format, gran_k, x.shape[1])
    check_ids(op, topk_ids)
    if topk_ids.shape[0] != x.shape[0]:
        _check.fail(op, "topk_ids", f"shape [{x.shape[0]}, topk], as x", topk_ids.shape)
    _check.require_number(op, "num_experts", num_experts, integer=True)
    if not 1 <= num_experts <= MAX_EXPERTS:
        _check.fail(op, "num_experts", f"1 to {MAX_EXPERTS}", num_experts)
    _check.require_choice(op, "alignment", alignment, ALIGNMENTS)
    _check.require_same_device(op, "x", x=x, topk_ids=topk_ids)
    slots = topk_ids.shape[0] * topk_ids.shape[1]
    return moe_capacity(slots, num_experts, alignment), x.shape[1]


def _check_route_out(
    out: torch.Tensor,
    out_scale: torch.Tensor,
    group_ends: torch.Tensor,
    rows: torch.Tensor,
    shape: tuple[int, int],
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    format: str,
    gran_k: int,
) -> None:
    op = "moe_route"
    check_quantized(op, *shape, format, gran_k, out, out_scale)
    check_out(op, "group_ends", group_ends, (num_experts,), (torch.int32,))
    check_out(op, "rows", rows, tuple(topk_ids.shape), (torch.int32,))
    outputs = {"out": out, "out_scale": out_scale, "group_ends": group_ends, "rows": rows}
    _check.require_same_device(op, "x", x=x, **outputs)
    others = {"x": x, "topk_ids": topk_ids, **outputs}
    for name, output in outputs.items():
        del others[name]
        _check.require_no_overlap(op, name, output, **others)


def _check_combine(
    x: torch.Tensor,
    rows: torch.Tensor,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[int, int]:
    """Gives the shape of the result."""
    op = "moe_combine"
    check_dense(op, "x", x, 2)
    _check.require_dtype(op, "x", x, STEP_DTYPES)
    if x.shape[1] % 8 != 0:
        _check.fail(op, "x", "a multiple of 8 columns", x.shape)
    _check.require_choice(op, "out_dtype", out_dtype, FLOAT_DTYPES)
    shapes = {"rows": rows, "topk_weights": topk_weights}
    dtypes = {"rows": (torch.int32,), "topk_weights": STEP_DTYPES}
    if bias is not None:
        check_dense(op, "bias", bias, 2)
        _check.require_dtype(op, "bias", bias, STEP_DTYPES)
        if bias.shape[1] != x.shape[1]:
            _check.fail(op, "bias", f"shape [experts, {x.shape[1]}]", bias.shape)
        if topk_ids is None:
            _check.fail(op, "topk_ids", "the experts of the slots, with a bias", None)
        shapes["topk_ids"], dtypes["topk_ids"] = topk_ids, ID_DTYPES
    for arg, tensor in shapes.items():
        _check.require_tensor(op, arg, tensor, rank=2)
        _check.require_dtype(op, arg, tensor, dtypes[arg])
        if tensor.shape[0] != rows.shape[0] or tensor.shape[1] != rows.shape[1]:
            _check.fail(op, arg, f"shape {list(rows.shape)}, as rows", tensor.shape)
        if not tensor.is_contiguous():
            _check.fail(op, arg, "a contiguous tensor", f"strides {list(tensor.stride())}")
    _check.require_same_device(op, "x", x=x, bias=bias, **shapes)
    return rows.shape[0], x.shape[1]


def _check_combine_out(
    out: torch.Tensor,
    shape: tuple[int, int],
    x: torch.Tensor,
    rows: torch.Tensor,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
) -> None:
    op = "moe_combine"
    check_out(op, "out", out, shape, (out.dtype,))
    _check.require_aligned(op, "out", out)
    inputs = {"rows": rows, "topk_weights": topk_weights, "bias": bias, "topk_ids": topk_ids}
    _check.require_same_device(op, "x", x=x, out=out, **inputs)
    _check.require_no_overlap(op, "out", out, x=x, **inputs)


# ---- moe_route -----------------------------------------------------------------------------------


def _route_into(
    out: torch.Tensor,
    out_scale: torch.Tensor,
    group_ends: torch.Tensor,
    rows: torch.Tensor,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    format: str,
    gran_k: int,
    alignment: int,
) -> None:
    experts = topk_ids.flatten().long()
    valid = (experts >= 0) & (experts < num_experts)
    counts = torch.bincount(experts[valid], minlength=num_experts)
    sizes = (counts + alignment - 1) // alignment * alignment
    starts = sizes.cumsum(0) - sizes
    slots = valid.nonzero().flatten()
    slots = slots[experts[slots].argsort(stable=True)]  # by expert, then by token and slot
    rank = torch.arange(len(slots)) - (counts.cumsum(0) - counts)[experts[slots]]
    where = starts[experts[slots]] + rank
    group_ends.copy_(starts + counts)
    rows.fill_(-1).view(-1)[slots] = where.int()
    data, scale = torch.ops.sm120.quantize(x, format, gran_k)
    tokens = slots // topk_ids.shape[1]
    out.view(torch.uint8)[where] = data.view(torch.uint8)[tokens]
    out_scale[where] = scale[tokens]


def _new_route(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    format: str,
    gran_k: int,
    shape: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    data, scale = empty_quantized(x, *shape, format, gran_k)
    group_ends = x.new_empty(num_experts, dtype=torch.int32)
    return data, scale, group_ends, topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)


_lib.reference(
    "moe_route",
    check=_check_route,
    check_out=_check_route_out,
    new=_new_route,
    into=_route_into,
    clear=True,
)


def moe_route(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    format: str = "mxfp8",
    gran_k: int = 32,
    alignment: int = 16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives each (token, slot) a row in its expert's group, and quantises the token into it.

    Args:
        x: tokens [T, K], bfloat16, float16 or float32, contiguous. K % 16 == 0 for "mxfp8", 32 for
            "mxfp4".
        topk_ids: int32 or int64 [T, topk], the expert of each slot, topk <= 32. A slot whose id is
            not in 0 .. num_experts - 1, such as -1, is dropped: it gets no row. Nothing is said
            about it, as that would take a look at the device.
        num_experts: groups, at most 1024.
        format, gran_k: as in quantize(), whose bits (gran_mn 1, rule "deepgemm") each row has.
        alignment: groups start at multiples of it: 16, 32, 64 or 128.

    Returns:
        data [M, K] (FP4: [M, K / 2]) and packed scales int32 [M, W], M = moe_capacity(T * topk,
        num_experts, alignment); rows outside groups are uninitialised.
        group_ends int32 [num_experts]; within a group rows are in order of (token, slot).
        rows int32 [T, topk], the row of each slot, -1 where it was dropped.
    """
    if not torch.compiler.is_compiling():
        _check_route(x, topk_ids, num_experts, format, gran_k, alignment)
    _check.require_no_grad("moe_route", x=x)
    return torch.ops.sm120.moe_route.default(x, topk_ids, num_experts, format, gran_k, alignment)


# ---- moe_combine ---------------------------------------------------------------------------------


def _combine_into(
    out: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
) -> None:
    live = (rows >= 0) & (rows < x.shape[0])
    if bias is not None and topk_ids is not None:
        live &= (topk_ids >= 0) & (topk_ids < bias.shape[0])
    sums = torch.zeros(out.shape)
    for slot in range(rows.shape[1]):  # product and sum are rounded apart, as in the kernel
        tokens = live[:, slot].nonzero().flatten()
        values = x[rows[tokens, slot].long()].float()
        if bias is not None and topk_ids is not None:
            values += bias[topk_ids[tokens, slot].long()].float()
        values *= topk_weights[tokens, slot, None].float()
        sums[tokens] += values
    out.copy_(sums)


_lib.reference(
    "moe_combine",
    check=_check_combine,
    check_out=_check_combine_out,
    into=_combine_into,
    dtypes=FLOAT_DTYPES,
)


def moe_combine(
    x: torch.Tensor,
    rows: torch.Tensor,
    topk_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's rows: y[t] = sum over slots s of w[t, s] * (row + bias).

    In float32, in the order of the slots, every sum and product rounded on its own (so the CPU and
    CUDA kernels agree bit for bit), then rounded once to the result's dtype.

    Args:
        x: rows [M, N], bfloat16 or float32, contiguous, N % 8 == 0.
        rows: int32 [T, topk], as moe_route() gives them. A slot whose row is not in 0 .. M - 1
            contributes nothing, and its weight is not looked at.
        topk_weights: [T, topk], float32 or bfloat16.
        bias: [experts, N], bfloat16 or float32, added to a row before it is weighted.
        topk_ids: int32 or int64 [T, topk], whose bias that is; only with a bias. A slot with an id
            that is no expert contributes nothing.
        out_dtype: bfloat16, float16 or float32; default that of `out`, else of x.
        out: contiguous [T, N] to write.

    Returns:
        y [T, N]; zero for a token without slots.
    """
    op = "moe_combine"
    _check.require_tensor(op, "x", x)
    out_dtype = _check.output_dtype(op, out_dtype, out, FLOAT_DTYPES, default=x.dtype)
    ids = None if bias is None else topk_ids
    _check.require_no_grad(op, x=x, topk_weights=topk_weights, bias=bias)
    if not torch.compiler.is_compiling():
        shape = _check_combine(x, rows, topk_weights, bias, ids, out_dtype)
        if out is not None:
            _check_combine_out(out, shape, x, rows, topk_weights, bias, ids)
    if out is None:
        return torch.ops.sm120.moe_combine.default(x, rows, topk_weights, bias, ids, out_dtype)
    torch.ops.sm120.moe_combine.out(x, rows, topk_weights, bias, ids, out=out)
    return out
