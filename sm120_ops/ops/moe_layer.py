"""A whole mixture-of-experts layer in five launches: route, gate_up, activation, down, combine.

The op is one for torch.compile as well, so that alignment and tiles may depend on the number of
tokens without tying a compiled graph to it. Its kernels are those of the five ops it calls, on CPU
and CUDA alike. See docs/moe.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _check
from .grouped import check_group_scales
from .layout import FP4_DTYPES, TAGS, align, as_bytes, ceil_div, check_out
from .library import Library
from .moe import ALIGNMENTS, MAX_EXPERTS, STEP_DTYPES, check_dense, check_ids, moe_capacity
from .quantize import FLOAT_DTYPES, FORMATS, GRANS_K, K_MULTIPLE, data_dtype, data_shape, logical_k

Operand = tuple[torch.Tensor, torch.Tensor]

_lib = Library()
_ARGS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor gate_up_scale,"
    " Tensor down, Tensor down_scale, str format, int gran_k, int weight_gran_k,"
    " Tensor? gate_up_bias=None, Tensor? down_bias=None, float alpha=1.0, float up_offset=0.0,"
    " float? limit=None, bool interleaved=False"
)
_lib.define(f"moe({_ARGS}, *, ScalarType? out_dtype=None) -> Tensor", tags=TAGS)
_lib.define(f"moe.out({_ARGS}, *, Tensor(a!) workspace, Tensor(b!) out) -> ()", tags=TAGS)

_PIECE = 256  # bytes that the pieces of a workspace are aligned to


# ---- Plan ----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What follows from the shapes alone. Sizes in bytes."""

    alignment: int
    capacity: int  # rows of all intermediate matrices
    expected_m: int  # a hint for the GEMMs: tokens an expert, were they spread evenly
    step_dtype: torch.dtype  # of the two products
    quantized: int  # of the larger of the two quantised matrices, scales included
    workspace: int


def choose_alignment(slots: int, num_experts: int) -> int:
    """Small groups want short tiles, and little padding; large ones whole tiles of 128 rows."""
    mean = ceil_div(slots, max(min(slots, num_experts), 1))
    return next((a for a in ALIGNMENTS if mean <= a), ALIGNMENTS[-1])


def _quantized_bytes(rows: int, k: int, format: str, gran_k: int) -> tuple[int, int]:
    """Of data and scales, each to a multiple of _PIECE."""
    data = data_shape(rows, k, format)
    words = ceil_div(k, 4 * gran_k)
    return align(data[0] * data[1], _PIECE), align(4 * words * align(rows, 4), _PIECE)


def make_plan(
    tokens: int,
    topk: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    format: str,
    gran_k: int,
    x_dtype: torch.dtype,
) -> Plan:
    slots = tokens * topk
    alignment = choose_alignment(slots, num_experts)
    capacity = moe_capacity(slots, num_experts, alignment)
    step_dtype = torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float32
    quantized = max(
        sum(_quantized_bytes(capacity, k, format, gran_k)) for k in (hidden, intermediate)
    )
    product = align(capacity * max(2 * intermediate, hidden) * step_dtype.itemsize, _PIECE)
    index = align(4 * num_experts, _PIECE) + align(4 * slots, _PIECE)
    expected_m = ceil_div(slots, num_experts)
    return Plan(alignment, capacity, expected_m, step_dtype, quantized, index + quantized + product)


class _Pieces:
    """A workspace cut up.

    Tokens and hidden activations, both quantised, share one area, as the former are dead when the
    latter are written; so do the two products.
    """

    def __init__(
        self, workspace: torch.Tensor, plan: Plan, shape: torch.Size, num_experts: int
    ) -> None:
        slots = shape[0] * shape[1]
        self._bytes, self._plan = workspace, plan
        rows_at = align(4 * num_experts, _PIECE)
        self._quantized_at = rows_at + align(4 * slots, _PIECE)
        self._product_at = self._quantized_at + plan.quantized
        self.group_ends = self._cut(0, 4 * num_experts).view(torch.int32)
        self.rows = self._cut(rows_at, 4 * slots).view(torch.int32).view(shape)

    def _cut(self, at: int, size: int) -> torch.Tensor:
        return self._bytes[at : at + size]

    def quantized(self, k: int, format: str, gran_k: int) -> Operand:
        rows = self._plan.capacity
        shape, words = data_shape(rows, k, format), ceil_div(k, 4 * gran_k)
        data = self._cut(self._quantized_at, shape[0] * shape[1]).view(data_dtype(format))
        scale_at = self._quantized_at + _quantized_bytes(rows, k, format, gran_k)[0]
        scale = self._cut(scale_at, 4 * words * rows).view(torch.int32).view(words, rows)
        return data.view(shape), scale.t()  # rows: a multiple of 16, so they need no padding

    def product(self, n: int) -> torch.Tensor:
        plan = self._plan
        size = plan.capacity * n * plan.step_dtype.itemsize
        return self._cut(self._product_at, size).view(plan.step_dtype).view(plan.capacity, n)


# ---- Checks --------------------------------------------------------------------------------------


def _check_weight(op: str, arg: str, data: torch.Tensor, scale: torch.Tensor, gran_k: int) -> None:
    """[E, N, K] with packed scales [E, N, W]."""
    check_dense(op, arg, data, 3)
    _check.require_dtype(op, arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    experts, n = data.shape[:2]
    groups = ceil_div(logical_k(data[0]), gran_k)
    check_group_scales(op, f"{arg}_scale", scale, experts, n, groups)


class _Call(NamedTuple):
    """The arguments of the op, as in its schema."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor
    format: str
    gran_k: int
    weight_gran_k: int
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    alpha: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None
    interleaved: bool = False

    @property
    def plan(self) -> Plan:
        experts, hidden, intermediate = self.down.shape[0], self.x.shape[1], logical_k(self.down[0])
        tokens, topk = self.topk_ids.shape
        shape = (tokens, topk, experts, hidden, intermediate)
        return make_plan(*shape, self.format, self.gran_k, self.x.dtype)


def _check_moe(call: _Call, out_dtype: torch.dtype) -> None:
    op = "moe"
    x, topk_ids, topk_weights = call.x, call.topk_ids, call.topk_weights
    gate_up, down = call.gate_up, call.down
    _check.require_choice(op, "format", call.format, FORMATS)
    _check.require_choice(op, "gran_k", call.gran_k, GRANS_K)
    _check.require_choice(op, "weight_gran_k", call.weight_gran_k, GRANS_K)
    check_dense(op, "x", x, 2)
    _check.require_dtype(op, "x", x, FLOAT_DTYPES)
    _check.require_choice(op, "out_dtype", out_dtype, FLOAT_DTYPES)
    check_ids(op, topk_ids)
    _check.require_tensor(op, "topk_weights", topk_weights, rank=2)
    _check.require_dtype(op, "topk_weights", topk_weights, STEP_DTYPES)
    slots = {"topk_ids": topk_ids, "topk_weights": topk_weights}
    for arg, tensor in slots.items():
        if tensor.shape[0] != x.shape[0] or tensor.shape[1] != topk_ids.shape[1]:
            _check.fail(op, arg, f"shape [{x.shape[0]}, topk], as x and topk_ids", tensor.shape)
    if not topk_weights.is_contiguous():
        strides = f"strides {list(topk_weights.stride())}"
        _check.fail(op, "topk_weights", "a contiguous tensor", strides)
    _check_weight(op, "gate_up", gate_up, call.gate_up_scale, call.weight_gran_k)
    _check_weight(op, "down", down, call.down_scale, call.weight_gran_k)
    experts, hidden = gate_up.shape[0], x.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        _check.fail(op, "gate_up", f"1 to {MAX_EXPERTS} experts", gate_up.shape)
    if gate_up.dtype != down.dtype:
        _check.fail_type(op, "down", f"dtype {gate_up.dtype}, as gate_up", down.dtype)
    k, intermediate = logical_k(gate_up[0]), logical_k(down[0])
    if k != hidden or gate_up.shape[1] != 2 * intermediate:
        requirement = f"[experts, 2 * {intermediate}, {hidden}] for x {list(x.shape)} and down"
        _check.fail(op, "gate_up", requirement, [experts, gate_up.shape[1], k])
    if down.shape[0] != experts or down.shape[1] != hidden:
        _check.fail(op, "down", f"[{experts}, {hidden}, I]", down.shape)
    multiple = K_MULTIPLE["mxfp4" if gate_up.dtype in FP4_DTYPES else call.format]
    for arg, size in (("x", hidden), ("down", intermediate)):
        if size % multiple != 0:
            _check.fail(op, arg, f"K to be a multiple of {multiple}", f"K={size}")
    for arg, bias, n in (
        ("gate_up_bias", call.gate_up_bias, 2 * intermediate),
        ("down_bias", call.down_bias, hidden),
    ):
        if bias is not None:
            check_dense(op, arg, bias, 2)
            _check.require_dtype(op, arg, bias, STEP_DTYPES)
            if bias.shape[0] != experts or bias.shape[1] != n:
                _check.fail(op, arg, f"shape [{experts}, {n}]", bias.shape)
    if call.limit is not None and not call.limit > 0:
        _check.fail(op, "limit", "a positive number or None", call.limit)
    tensors = {name: t for name, t in call._asdict().items() if isinstance(t, torch.Tensor)}
    _check.require_same_device(op, "x", **tensors)


def _check_moe_out(call: _Call, workspace: torch.Tensor, out: torch.Tensor) -> None:
    op = "moe"
    _check.require_dtype(op, "out", out, FLOAT_DTYPES)
    _check_moe(call, out.dtype)
    check_out(op, "out", out, (call.x.shape[0], call.x.shape[1]), (out.dtype,))
    _check.require_aligned(op, "out", out)
    _check.require_tensor(op, "workspace", workspace, rank=1)
    _check.require_dtype(op, "workspace", workspace, (torch.uint8,))
    # A symbolic number of tokens must not be tied to an alignment.
    size = call.plan.workspace if isinstance(call.x.shape[0], int) else 0
    if workspace.shape[0] < size or not workspace.is_contiguous():
        _check.fail(op, "workspace", f"at least {size} contiguous bytes", workspace)
    _check.require_aligned(op, "workspace", workspace)
    _check.require_same_device(op, "x", x=call.x, workspace=workspace, out=out)
    inputs = {name: t for name, t in call._asdict().items() if isinstance(t, torch.Tensor)}
    _check.require_no_overlap(op, "out", out, workspace=workspace, **inputs)
    _check.require_no_overlap(op, "workspace", workspace, **inputs)


# ---- Kernels -------------------------------------------------------------------------------------


def _run(call: _Call, workspace: torch.Tensor, out: torch.Tensor) -> None:
    if call.x.shape[0] == 0:
        return
    ops, plan = torch.ops.sm120, call.plan
    experts, hidden, intermediate = call.down.shape[0], call.x.shape[1], logical_k(call.down[0])
    pieces = _Pieces(workspace, plan, call.topk_ids.shape, experts)
    tokens, tokens_scale = pieces.quantized(hidden, call.format, call.gran_k)
    hiddens, hiddens_scale = pieces.quantized(intermediate, call.format, call.gran_k)
    gate_up, result = pieces.product(2 * intermediate), pieces.product(hidden)
    quantized = (call.format, call.gran_k, plan.alignment)
    grouped = (pieces.group_ends, call.gran_k, call.weight_gran_k, plan.alignment, plan.expected_m)
    ops.moe_route.out(
        call.x,
        call.topk_ids,
        experts,
        *quantized,
        out=tokens,
        out_scale=tokens_scale,
        group_ends=pieces.group_ends,
        rows=pieces.rows,
    )
    ops.grouped_gemm_psum.out(
        tokens, tokens_scale, call.gate_up, call.gate_up_scale, *grouped, out=gate_up
    )
    ops.moe_activation.out(
        gate_up,
        pieces.group_ends,
        *quantized,
        call.gate_up_bias,
        call.alpha,
        call.up_offset,
        call.limit,
        call.interleaved,
        out=hiddens,
        out_scale=hiddens_scale,
    )
    ops.grouped_gemm_psum.out(
        hiddens, hiddens_scale, call.down, call.down_scale, *grouped, out=result
    )
    ids = None if call.down_bias is None else call.topk_ids
    ops.moe_combine.out(result, pieces.rows, call.topk_weights, call.down_bias, ids, out=out)


# One Python kernel for both devices: it only calls other ops.
@torch.library.impl(_lib, "moe", "CUDA")
@torch.library.impl(_lib, "moe", "CPU")
def _moe(*args: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    call = _Call(*args)
    out = _moe_fake(*args, out_dtype=out_dtype)
    _run(call, call.x.new_empty(call.plan.workspace, dtype=torch.uint8), out)
    return out


@torch.library.impl(_lib, "moe.out", "CUDA")
@torch.library.impl(_lib, "moe.out", "CPU")
def _moe_out(*args: Any, workspace: torch.Tensor, out: torch.Tensor) -> None:
    call = _Call(*args)
    _check_moe_out(call, workspace, out)
    _run(call, workspace, out)


@torch.library.register_fake("sm120::moe", lib=_lib)
def _moe_fake(*args: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    call = _Call(*args)
    dtype = call.x.dtype if out_dtype is None else out_dtype
    _check_moe(call, dtype)
    return call.x.new_empty(call.x.shape, dtype=dtype)


@torch.library.register_fake("sm120::moe.out", lib=_lib)
def _moe_out_fake(*args: Any, workspace: torch.Tensor, out: torch.Tensor) -> None:
    _check_moe_out(_Call(*args), workspace, out)


# ---- Wrappers ------------------------------------------------------------------------------------


def moe_workspace_size(
    tokens: int,
    topk: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    format: str = "mxfp8",
    gran_k: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of workspace that moe() needs for `tokens` tokens of `dtype`, whatever the routing.

    `hidden` and `intermediate` are H and I of the layer, `format` that of the activations. Never
    less for more tokens, so a workspace for the largest batch serves all.
    """
    shape = (tokens, topk, num_experts, hidden, intermediate)
    return make_plan(*shape, format, gran_k, dtype).workspace


def moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: Operand,
    down: Operand,
    *,
    format: str = "mxfp8",
    gran_k: int = 32,
    weight_gran_k: int = 32,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    interleaved: bool = False,
    out_dtype: torch.dtype | None = None,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A mixture-of-experts layer: y[t] = sum over s of w[t, s] * expert(topk_ids[t, s])(x[t]).

    Each expert is down @ swiglu(gate_up @ x + gate_up_bias) + down_bias; both products take
    quantised activations and weights. The products themselves are kept in bfloat16 where x is, else
    in float32.

    Args:
        x: [T, H], bfloat16, float16 or float32, contiguous.
        topk_ids, topk_weights: [T, topk] as in moe_route() and moe_combine(). Slots with an id that
            is no expert are dropped.
        gate_up: (data, scale) of [E, 2 * I, H]: float8_e4m3fn, or packed FP4 [E, 2 * I, H / 2],
            contiguous; packed scales int32 [E, 2 * I, W] as in grouped_gemm_psum(): for one,
            scale.unflatten(0, (E, 2 * I)) of what quantize() gives for the [E * 2 * I, H] matrix.
        down: (data, scale) of [E, H, I], likewise, of the same dtype.
        format, gran_k: of the activations, as in quantize().
        weight_gran_k: values along K that share a weight's scale.
        gate_up_bias: [E, 2 * I]; down_bias: [E, H]; bfloat16 or float32.
        alpha, up_offset, limit, interleaved: as in moe_activation().
        out_dtype: bfloat16, float16 or float32; default that of `out`, else of x.
        workspace: uint8, at least moe_workspace_size() bytes, 16-byte aligned; its contents before
            do not matter, and are lost. It must not serve two calls at once. Default: a new one.
        out: contiguous [T, H] to write.

    Returns:
        y [T, H].
    """
    op = "moe"
    for arg, pair in (("gate_up", gate_up), ("down", down)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            _check.fail_type(op, arg, "a pair (data, scale)", type(pair).__name__)
        _check.require_tensor(op, arg, pair[0], rank=3)
    data = [t if t.dtype == torch.float8_e4m3fn else as_bytes(t) for t in (gate_up[0], down[0])]
    call = _Call(
        x,
        topk_ids,
        topk_weights,
        data[0],
        gate_up[1],
        data[1],
        down[1],
        format,
        gran_k,
        weight_gran_k,
        gate_up_bias,
        down_bias,
        alpha,
        up_offset,
        limit,
        interleaved,
    )
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    _check.require_no_grad(op, x=x, topk_weights=topk_weights, **biases)
    if out is None and workspace is None:
        return torch.ops.sm120.moe.default(*call, out_dtype=out_dtype)
    dtype = _check.output_dtype(op, out_dtype, out, FLOAT_DTYPES, default=x.dtype)
    if out is None:
        out = x.new_empty(x.shape, dtype=dtype)
    if workspace is None:
        workspace = x.new_empty(call.plan.workspace, dtype=torch.uint8)
    torch.ops.sm120.moe.out(*call, workspace=workspace, out=out)
    return out
