"""einsum() of two operands: products of matrices, and of batches of them, wherever the batch lies.

    bhr,hdr->bhd    bhd,hdr->bhr    bhd,bhr->hdr    a product for each h
    bmk,bnk->mn                                     one product, summed over b too (bfloat16)

and whatever differs from these in names and in the order of indices only. The equation just says
how the tensors are looked at; three ops do the work, on views as they lie:

    batched_gemm         D[g] = (C[g] +) A[g] @ B[g].T of FP8 and FP4 operands with packed scales
    bf16_batched_gemm    the same of bfloat16 operands
    bf16_batch_sum       D = (C +) sum over g of A[g] @ B[g].T, in a fixed order

A is [groups, M, K], B [groups, N, K], D [groups, M, N] or, with rows_first, [M, groups, N]. A group
stride may be less than the row stride (tokens of all heads beside one another). Limits are those of
gemm() and bf16_gemm(): K-major FP8 and FP4, bfloat16 with either of rows and K contiguous, lines
and groups at multiples of 16 bytes. D's last stride is 1, its rows and matrices lie anywhere apart.

The CPU kernels sum in float64 and round once to float32, and from there to bfloat16, as the CUDA
kernels do from their float32 accumulators.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, NoReturn

import torch

from .. import _check
from . import bf16
from .gemm import OUT_DTYPES, Operand, check_matrix, check_matrix_out, check_operand, check_same_k
from .groups import check_group_scales, k_major_groups, prepare_groups, rows_contiguous
from .layout import FP4_DTYPES, TAGS, as_bytes, ceil_div
from .library import Library
from .quantize import GRANS_K, decode, logical_k, scale_values

_SCALED = "Tensor a, Tensor sfa, Tensor b, Tensor sfb, int gran_k_a, int gran_k_b"
# {op: its inputs, its options}
OPS = {
    "batched_gemm": (_SCALED, ", bool rows_first=False"),
    "bf16_batched_gemm": ("Tensor a, Tensor b", ", bool rows_first=False"),
    "bf16_batch_sum": ("Tensor a, Tensor b", ""),
}

_lib = Library()
for _op, (_inputs, _options) in OPS.items():
    _tail = f"Tensor? c=None{_options}"
    _lib.define(f"{_op}({_inputs}, ScalarType out_dtype, {_tail}) -> Tensor", tags=TAGS)
    _lib.define(f"{_op}.out({_inputs}, {_tail}, *, Tensor(a!) out) -> ()", tags=TAGS)
# The kernel that would run, as JSON: pure host code in C++. format: "bf16", "mxfp8" or "mxfp4".
_lib.define(
    "_einsum_config(str format, int batch, int m, int n, int k, bool summed, int gran_k,"
    " int num_sms, bool native, int l2_bytes, int dram_gbps) -> str"
)
# `out` forms with a given tile (index into the compiled table), orientation and schedule: for tests
# of every configuration and for tuning. The second is bf16_batch_sum.out if `out` has 2 dimensions.
_forced = "Tensor? c, Tensor(a!) out, int tile, bool swapped, bool split"
_lib.define(f"_batched_gemm_forced({_SCALED}, {_forced}) -> ()")
_lib.define(f"_bf16_batched_forced(Tensor a, Tensor b, {_forced}) -> ()")


# ---- Checks --------------------------------------------------------------------------------------

Names = tuple[str, str]  # what the user calls A and B
Shape = tuple[int, ...]


def _check_inputs(
    op: str, kind: str, inputs: tuple[Any, ...], rows_first: bool, names: Names = ("a", "b")
) -> Shape:
    """Checks what is multiplied (inputs of the op `kind`); gives the shape of D."""
    if kind == "batched_gemm":
        a, sfa, b, sfb, *grans = inputs
        for name, x, gran_k in zip(names, (a, b), grans, strict=True):
            _check.require_choice(op, f"gran_k_{name}", gran_k, GRANS_K)
            check_operand(op, name, x, 3)
        k = check_same_k(op, a, b)
        for name, x, scale, gran_k in zip(names, (a, b), (sfa, sfb), grans, strict=True):
            check_group_scales(op, f"sf{name}", scale, x.shape[0], x.shape[1], ceil_div(k, gran_k))
        _check.require_same_device(op, "a", a=a, sfa=sfa, b=b, sfb=sfb)
    else:
        a, b = inputs
        for name, x in zip(names, (a, b), strict=True):
            bf16.check_operand(op, name, x, 3)
        if b.shape[2] != a.shape[2]:
            _check.fail(op, names[1], f"K={a.shape[2]} as in {names[0]}", f"K={b.shape[2]}")
        _check.require_same_device(op, "a", a=a, b=b)
    if b.shape[0] != a.shape[0]:
        _check.fail(op, names[1], f"{a.shape[0]} matrices as in {names[0]}", b.shape)
    groups, m, n = a.shape[0], a.shape[1], b.shape[1]
    if kind == "bf16_batch_sum":
        return m, n
    return (m, groups, n) if rows_first else (groups, m, n)


def _tensors(
    kind: str, inputs: tuple[Any, ...], names: Names = ("a", "b")
) -> dict[str, torch.Tensor]:
    """The tensors among the inputs of an op, by the user's names."""
    a, b = names
    keys = (a, f"sf{a}", b, f"sf{b}") if kind == "batched_gemm" else names
    return dict(zip(keys, inputs, strict=False))


def _check_matrices(op: str, arg: str, x: torch.Tensor, shape: Shape) -> None:
    """D or C."""
    _check.require_tensor(op, arg, x, rank=len(shape))
    if len(shape) == 2:
        check_matrix(op, arg, x, (shape[0], shape[1]))
        return
    if x.shape[0] != shape[0] or x.shape[1] != shape[1] or x.shape[2] != shape[2]:
        _check.fail(op, arg, f"shape {list(shape)}", x.shape)
    if x.stride(2) != 1 and shape[2] > 1:
        _check.fail(op, arg, "last stride 1", f"strides {list(x.stride())}")


def _check_c(op: str, c: torch.Tensor | None, shape: Shape, dtype: torch.dtype) -> None:
    if c is not None:
        _check.require_tensor(op, "c", c)
        _check.require_dtype(op, "c", c, (dtype,))
        _check_matrices(op, "c", c, shape)


def _check_out(
    op: str, out: torch.Tensor, shape: Shape, c: torch.Tensor | None, **inputs: torch.Tensor
) -> None:
    """D. C may be exactly D: who writes an element has read it before."""
    _check.require_tensor(op, "out", out, rank=len(shape))
    if len(shape) == 2:
        check_matrix_out(op, out, (shape[0], shape[1]), c)
    else:
        _check_matrices(op, "out", out, shape)
        (outer, inner, n), (far, near, _) = shape, out.stride()
        apart = (far >= near * (inner - 1) + n or outer <= 1) and (near >= n or inner <= 1)
        swapped = (near >= far * (outer - 1) + n or inner <= 1) and (far >= n or outer <= 1)
        if not (apart or swapped) and out.numel() > 0:
            requirement = "rows and matrices that do not overlap"
            _check.fail(op, "out", requirement, f"strides {list(out.stride())}")
        if c is not None and _check.has_address(out) and _check.has_address(c):
            same = all(
                size <= 1 or x == y
                for size, x, y in zip(shape, c.stride(), out.stride(), strict=True)
            )
            if not (same and c.data_ptr() == out.data_ptr()):
                _check.require_no_overlap(op, "out", out, c=c)
    _check.require_same_device(op, "a", c=c, out=out, **inputs)
    _check.require_no_overlap(op, "out", out, **inputs)


# ---- Kernels -------------------------------------------------------------------------------------


def _values(data: torch.Tensor, scale: torch.Tensor, gran_k: int) -> torch.Tensor:
    """float64 [groups, rows, K], where 448 * 2^127 is finite."""
    k = logical_k(data)
    values = data.new_zeros((data.shape[0], data.shape[1], k), dtype=torch.float64)
    for group in range(data.shape[0]):
        scales = scale_values(scale[group], gran_k, k, torch.float64)
        values[group] = decode(data[group], torch.float64) * scales
    return values


def _into(
    op: str, out: torch.Tensor, inputs: tuple[Any, ...], c: torch.Tensor | None, rows_first: bool
) -> None:
    """Plain PyTorch on any device."""
    if op == "batched_gemm":
        a, sfa, b, sfb, gran_k_a, gran_k_b = inputs
        a, b = _values(a, sfa, gran_k_a), _values(b, sfb, gran_k_b)
    else:
        a, b = (x.double() for x in inputs)
    product = a @ b.transpose(1, 2)
    if op == "bf16_batch_sum":
        product = product.sum(0)
    elif rows_first:
        product = product.transpose(0, 1)
    out.copy_((product if c is None else product + c.double()).float())


def _register(op: str) -> None:
    """CPU and fake kernels of one op: which of its arguments are what."""
    scaled = ("a", "sfa", "b", "sfb", "gran_k_a", "gran_k_b")
    names = scaled if op == "batched_gemm" else ("a", "b")

    def inputs(call: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(call[name] for name in names)

    def check(out_dtype: torch.dtype, rows_first: bool = False, **call: Any) -> Shape:
        _check.require_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
        shape = _check_inputs(op, op, inputs(call), rows_first)
        _check_c(op, call["c"], shape, out_dtype)
        _check.require_same_device(op, "a", c=call["c"], **_tensors(op, inputs(call)))
        return shape

    def check_out(**call: Any) -> None:
        _check_out(op, call["out"], call["shape"], call["c"], **_tensors(op, inputs(call)))

    def into(rows_first: bool = False, **call: Any) -> None:
        _into(op, call["out"], inputs(call), call["c"], rows_first)

    _lib.reference(op, check=check, check_out=check_out, into=into, dtypes=OUT_DTYPES)


for _op in OPS:
    _register(_op)


# ---- Equations -----------------------------------------------------------------------------------

ACCEPTED = (
    "'bhr,hdr->bhd', 'bhd,hdr->bhr', 'bhd,bhr->hdr', 'bmk,bnk->mn' or, in other letters and order, "
    "two matrices or batches of them: an index of D's rows, one of its columns (either may be D's "
    "last), one that is summed over, and at most one more, in all three (not D's last) or summed "
    "over too"
)


class Plan(NamedTuple):
    """An equation, understood."""

    a: str
    b: str
    d: str
    exchanged: bool  # B has D's rows, A its columns, which are last
    # Dimensions of the operand with D's rows, and of the other: groups if there are any, rows, K.
    left: tuple[int, ...]
    right: tuple[int, ...]
    rows_first: bool  # D is [M, groups, N]
    summed: bool


def _reject(equation: object, reason: str) -> NoReturn:
    _check.fail("einsum", "equation", ACCEPTED, f"{equation!r} ({reason})")


def parse(equation: str) -> Plan:
    if not isinstance(equation, str):
        _check.fail_type("einsum", "equation", "a string", type(equation).__name__)
    inputs, _, d = equation.replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    for operand in (a, b, d):
        if not (operand.isalpha() and operand.isascii()):
            _reject(equation, "not of the form 'letters,letters->letters'")
        if len(set(operand)) != len(operand):
            _reject(equation, f"an index twice in {operand!r}")
    for index in a + b + d:
        if (index in a) + (index in b) + (index in d) == 1:
            _reject(equation, f"index {index!r} in one place only")
    batch = [i for i in d if i in a and i in b]
    rows = [i for i in a if i in d and i not in b]
    columns = [i for i in b if i in d and i not in a]
    inner = [i for i in a if i in b and i not in d]
    if len(rows) != 1 or len(columns) != 1:
        _reject(equation, f"{len(rows)} indices of A and {len(columns)} of B alone are D's")
    if len(inner) not in (1, 2) or len(batch) + len(inner) > 2:
        _reject(equation, f"{len(batch)} in all three, {len(inner)} summed over")
    if d[-1] in batch:
        _reject(equation, f"{d[-1]!r}, which is in all three, is D's last")
    exchanged = d[-1] in rows
    left, right = (b, a) if exchanged else (a, b)
    row, column = (columns[0], rows[0]) if exchanged else (rows[0], columns[0])
    # Of two summed indices K is the one that is contiguous, as far as the equation tells.
    k = next((x[-1] for x in (left, right) if x[-1] in inner), inner[-1])
    outer = [*batch, *(i for i in inner if i != k)]
    return Plan(
        a, b, d, exchanged,
        tuple(left.index(i) for i in (*outer, row, k)),
        tuple(right.index(i) for i in (*outer, column, k)),
        len(batch) == 1 and d[0] == row,
        len(inner) == 2,
    )  # fmt: skip


_parsed = functools.lru_cache(maxsize=256)(parse)


# ---- Wrapper -------------------------------------------------------------------------------------


def _sizes(plan: Plan, a: torch.Tensor, b: torch.Tensor) -> Shape:
    """Checks the sizes of the data against the equation; gives D's."""
    sizes: dict[str, int] = {}
    for arg, indices, data in (("a", plan.a, a), ("b", plan.b, b)):
        _check.require_tensor("einsum", arg, data, rank=len(indices))
        for index, size in zip(indices, (*data.shape[:-1], _last_size(data)), strict=True):
            if sizes.setdefault(index, size) != size:
                _check.fail("einsum", arg, f"{index}={sizes[index]} as in a", f"{index}={size}")
    return tuple(sizes[index] for index in plan.d)


def _last_size(data: torch.Tensor) -> int:
    return logical_k(data) if data.dtype in FP4_DTYPES else data.shape[-1]


def _grouped(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """In the op's order, with one group where the equation has none."""
    view = x.permute(order)
    return view if len(order) == 3 else view.unsqueeze(0)


def _prepared(
    arg: str, operand: Operand, order: tuple[int, ...], gran_k: int | None, validate: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(K-major data, packed scales, gran_k) for batched_gemm."""
    data, scale = operand
    _check.require_dtype("einsum", arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    _check.require_tensor("einsum", f"sf{arg}", scale, rank=data.dim())
    if data.dtype != torch.float8_e4m3fn:
        data = as_bytes(data)
    packed_along = data.dtype == torch.uint8 and order[-1] != data.dim() - 1
    if packed_along and data.shape[order[-1]] % 32 != 0:
        got = f"K={data.shape[order[-1]]}"
        _check.fail("einsum", arg, "K to be a multiple of 32 for FP4", got)
    if packed_along and order[-2] != data.dim() - 1:
        requirement = "FP4 packed along the index summed over, or along D's"
        _check.fail("einsum", arg, requirement, "packed along the batch")
    data = k_major_groups(_grouped(data, order), packed_along)
    data, scale, gran_k = prepare_groups(
        "einsum", arg, (data, _grouped(scale, order)), gran_k, validate
    )
    return data, rows_contiguous(scale), gran_k


def _pair(arg: str, operand: object) -> Operand:
    if not isinstance(operand, tuple | list) or len(operand) != 2:
        requirement = "a bfloat16 tensor, as the other operand, or both to be (data, scale)"
        _check.fail_type("einsum", arg, requirement, type(operand).__name__)
    _check.require_tensor("einsum", arg, operand[0])
    return operand[0], operand[1]


def einsum(
    equation: str,
    a: torch.Tensor | Operand,
    b: torch.Tensor | Operand,
    *,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gran_k_a: int | None = None,
    gran_k_b: int | None = None,
    validate: bool = True,
) -> torch.Tensor:
    """D = (C +) the einsum of two operands, with float32 accumulation and one rounding.

    Args:
        equation: as torch.einsum has it, with "->": 'bhr,hdr->bhd', 'bhd,hdr->bhr',
            'bhd,bhr->hdr', the sum 'bmk,bnk->mn' (bfloat16 alone), or the like in other letters and
            another order of indices. Each operand has an index of its own, which D has too, and
            they share one that D has not. They may share one more: in D as well, but not last (a
            batch), or summed over too.
        a, b: both bfloat16 tensors of the shapes that the equation names, or both pairs
            (data, scale) of FP8 and FP4 in any pairing. Views are read as they lie:

            bfloat16: the summed index or the operand's own has stride 1, the other strides are
            multiples of 8; data 16-byte aligned. A batch may have any such stride, 0 included.

            data: float8_e4m3fn, or FP4 packed along the last dimension (uint8, int8 or
            float4_e2m1fn_x2). Where the summed index has stride 1 and the others multiples of 16
            bytes it is used as it is. Where it has not (as in 'bhd,bhr->hdr' of contiguous
            operands), one more pass in each call transposes it, so prepare weights once.

            scale: the data's indices in the data's order, with groups of gran_k in place of the
            summed one: UE8M0 bytes or float32 powers of two, also one a block of 32 or 128 of the
            operand's own index; or packed int32, four groups a word. Packed ones are used as they
            are if the operand's own index has stride 1 and the others multiples of 4, else
            rearranged by a copy.
        c: added in float32 before the rounding: D's shape and dtype, last stride 1, other strides
            any, 0 included. May be `out` itself.
        out: D to write, last stride 1, other strides any. Must not overlap the operands.
        out_dtype: bfloat16 or float32; default that of `out`, else of `c`, else bfloat16.
        gran_k_a, gran_k_b: as in gemm(), needed only where the scale's shape leaves it open.
        validate: check that float32 scales are powers of two (see pack_scales()).

    Returns:
        D, contiguous unless it is `out`.
    """
    op = "einsum"
    compiling = torch.compiler.is_compiling()
    plan = _parsed(equation) if isinstance(equation, str) and not compiling else parse(equation)
    out_dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES, c=c)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        kind = "bf16_batch_sum" if plan.summed else "bf16_batched_gemm"
        data_a, data_b = a, b
    else:
        kind, pairs = "batched_gemm", (_pair("a", a), _pair("b", b))
        data_a, data_b = pairs[0][0], pairs[1][0]
        if plan.summed:
            _reject(equation, "two indices summed over, of FP8 or FP4 operands")
    shape = _sizes(plan, data_a, data_b)
    _check.require_no_grad(op, a=data_a, b=data_b, c=c)
    inputs: tuple[Any, ...]
    order_a, order_b = (plan.right, plan.left) if plan.exchanged else (plan.left, plan.right)
    if kind == "batched_gemm":
        a_data, sfa, gran_a = _prepared("a", pairs[0], order_a, gran_k_a, validate)
        b_data, sfb, gran_b = _prepared("b", pairs[1], order_b, gran_k_b, validate)
        inputs = (a_data, sfa, b_data, sfb, gran_a, gran_b)
        if plan.exchanged:
            inputs = (b_data, sfb, a_data, sfa, gran_b, gran_a)
    else:
        inputs = (_grouped(data_a, order_a), _grouped(data_b, order_b))
        inputs = inputs[::-1] if plan.exchanged else inputs
    for arg, x in (("c", c), ("out", out)):
        if x is not None:
            _check.require_tensor(op, arg, x, rank=len(shape))
            _check.require_dtype(op, arg, x, (out_dtype,))
            if any(got != wanted for got, wanted in zip(x.shape, shape, strict=True)):
                _check.fail(op, arg, f"shape {list(shape)}", x.shape)
    # An equation without a batch is a batch of one.
    alone = len(shape) == 2 and not plan.summed
    addend = c[None] if c is not None and alone else c
    result = out[None] if out is not None and alone else out
    if not compiling:
        names = ("b", "a") if plan.exchanged else ("a", "b")
        wanted = _check_inputs(op, kind, inputs, plan.rows_first, names)
        _check_c(op, addend, wanted, out_dtype)
        if result is not None:
            _check_out(op, result, wanted, addend, **_tensors(kind, inputs, names))
    options = () if plan.summed else (plan.rows_first,)
    packet = getattr(torch.ops.sm120, kind)
    if out is None:
        d: torch.Tensor = packet.default(*inputs, out_dtype, addend, *options)
        return d[0] if alone else d
    packet.out(*inputs, addend, *options, out=result)
    return out
