"""m-grouped BF16 GEMM, the expert products of a MoE layer: D = A @ B[expert].T, row by row.

A has the tokens sorted by expert, B [G, N, K] one weight matrix an expert; both may be K-major or
MN-major and are loaded as they lie. Which rows belong to which expert is said in one of three
layouts (group_layouts.py):

    bf16_grouped_gemm          contiguous: A [M, K], m_indices int32 [M]
    bf16_grouped_gemm_psum     psum: A [M, K], group_ends int32 [G]
    bf16_grouped_gemm_masked   masked: A [G, Mmax, K], masked_m int32 [G]

Sums and rounding are bf16_gemm()'s (bf16.py), and so are the limits of operands. (DeepGEMM's
`m_grouped_bf16_gemm_nt_contiguous`, `_nn_contiguous` and `_nt_masked`, which compute padding rows
with some expert's weights; here they are left alone.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import _check
from .bf16 import check_operand
from .gemm import OUT_DTYPES
from .group_layouts import (
    CONTIGUOUS,
    LAYOUTS,
    MASKED,
    PSUM,
    check_grouped_out,
    check_index,
    check_options,
    check_same_groups,
    require_layout,
    runs,
)
from .layout import TAGS
from .library import Library

# The layout of each op.
OPS = {
    "bf16_grouped_gemm": CONTIGUOUS,
    "bf16_grouped_gemm_psum": PSUM,
    "bf16_grouped_gemm_masked": MASKED,
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a, b, index

_lib = Library()
for _op, _kind in OPS.items():
    _index, _options = LAYOUTS[_kind]
    _inputs = f"Tensor a, Tensor b, Tensor {_index}"
    _tail = "".join(f", int {name}={default}" for name, default in _options.items())
    _lib.define(f"{_op}({_inputs}, ScalarType out_dtype{_tail}) -> Tensor", tags=TAGS)
    _lib.define(f"{_op}.out({_inputs}{_tail}, *, Tensor(a!) out) -> ()", tags=TAGS)
# The kernel that an op would run, as JSON: pure host code in C++. m: rows of A, or of one group.
_lib.define(
    "_bf16_grouped_config(str op, int m, int n, int k, int groups, int alignment, int expected_m,"
    " int num_sms, bool native, int l2_bytes, int dram_gbps) -> str"
)
# An op's `out` form with a given tile (index into the compiled table) and orientation: for tests of
# every configuration and for tuning.
_lib.define(
    "_bf16_grouped_forced(str op, Tensor a, Tensor b, Tensor index, int alignment, Tensor(a!) out,"
    " int tile, bool swapped) -> ()"
)


# ---- Checks --------------------------------------------------------------------------------------


def _named(op: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    return dict(zip(("a", "b", LAYOUTS[OPS[op]][0]), inputs, strict=True))


def _check_grouped(
    op: str, inputs: Inputs, out_dtype: torch.dtype, options: Mapping[str, int]
) -> tuple[int, ...]:
    """Checks everything but `out`; gives the shape of D."""
    a, b, index = inputs
    kind = OPS[op]
    _check.require_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
    check_options(op, options)
    check_operand(op, "a", a, 3 if kind == MASKED else 2)
    check_operand(op, "b", b, 3)
    if b.shape[2] != a.shape[-1]:
        _check.fail(op, "b", f"K={a.shape[-1]} as in a", f"K={b.shape[2]}")
    if kind == MASKED:
        check_same_groups(op, a, b.shape[0])
    check_index(op, kind, index, a.shape[0], b.shape[0])
    _check.require_same_device(op, "a", **_named(op, inputs))
    return (*a.shape[:-1], b.shape[1])


# ---- Kernels -------------------------------------------------------------------------------------


def _grouped_into(op: str, out: torch.Tensor, inputs: Inputs, options: Mapping[str, int]) -> None:
    """Plain PyTorch on any device; leaves rows of no group alone."""
    a, b, index = inputs
    last, weight = -1, a.new_empty(0, dtype=torch.float64)
    alignment = options.get("alignment", 1)
    for expert, begin, end in runs(OPS[op], index, b.shape[0], a.shape[-2], alignment):
        if expert != last:
            last, weight = expert, b[expert].double().t()
        tokens, target = (t[expert] if a.dim() == 3 else t for t in (a, out))
        product = tokens[begin:end].double() @ weight
        target[begin:end] = product.float().to(out.dtype)


def _register(op: str) -> None:
    """CPU and fake kernels of one op: which of its arguments are what."""
    index, defaults = LAYOUTS[OPS[op]]

    def parts(call: dict[str, Any]) -> tuple[Inputs, dict[str, int]]:
        return (call["a"], call["b"], call[index]), {name: call[name] for name in defaults}

    def check(**call: Any) -> tuple[int, ...]:
        inputs, options = parts(call)
        return _check_grouped(op, inputs, call["out_dtype"], options)

    def check_out(**call: Any) -> None:
        check_grouped_out(op, call["out"], call["shape"], _named(op, parts(call)[0]))

    def into(**call: Any) -> None:
        _grouped_into(op, call["out"], *parts(call))

    _lib.reference(op, check=check, check_out=check_out, into=into, dtypes=OUT_DTYPES, clear=True)


for _op in OPS:
    _register(_op)


# ---- Wrappers ------------------------------------------------------------------------------------


def _run(
    op: str,
    inputs: Inputs,
    options: dict[str, int],
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None,
    validate: bool,
) -> torch.Tensor:
    a, b, index = inputs
    _check.require_tensor(op, "a", a, rank=3 if OPS[op] == MASKED else 2)
    _check.require_tensor(op, "b", b, rank=3)
    _check.require_no_grad(op, a=a, b=b)
    dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES)
    if not torch.compiler.is_compiling():
        shape = _check_grouped(op, inputs, dtype, options)
        if out is not None:
            check_grouped_out(op, out, shape, _named(op, inputs))
        if validate and _check.has_address(index):
            alignment = options.get("alignment", 1)
            require_layout(op, OPS[op], index, b.shape[0], a.shape[-2], alignment)
    packet = getattr(torch.ops.sm120, op)
    if out is None:
        result: torch.Tensor = packet.default(*inputs, dtype, *options.values())
        return result
    packet.out(*inputs, *options.values(), out=out)
    return out


def bf16_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    alignment: int = 128,
    expected_m: int = 0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
) -> torch.Tensor:
    """D[m] = A[m] @ B[m_indices[m]].T, the contiguous layout (DeepGEMM's m-grouped contiguous).

    Args:
        a: bfloat16 [M, K], the tokens; b: bfloat16 [G, N, K], the experts' weights. Of the last two
            strides either may be the 1; the others are multiples of 8 (16 bytes). Weights [G, K, N]
            are given as b.transpose(1, 2), without a copy.
        m_indices: int32 [M], the expert of each row, or -1. Rows come in segments of `alignment`:
            in each the valid rows first, all of one expert, then -1 rows. Segments that are all -1
            cost nothing.
        alignment: rows of a segment: 16, 32, 64 or 128. Few rows an expert want a small one.
        expected_m: rows an expert that has any is expected to have; only steers the choice of
            tiles. 0: unknown, guessed from M, G and the alignment.
        out_dtype: bfloat16 (default) or float32.
        out: D to write, last stride 1, any row stride. Rows of no expert keep what they hold.
        validate: check m_indices on the device (one sync) and raise ValueError that names the first
            bad row. Without it rows that break the layout are computed with the expert that their
            index names, or left untouched; an index outside of [0, G) means padding. Not possible
            while a CUDA graph is captured; skipped under torch.compile.

    Returns:
        D [M, N]; without `out`, rows of no expert are 0.
    """
    options = {"alignment": alignment, "expected_m": expected_m}
    return _run("bf16_grouped_gemm", (a, b, m_indices), options, out_dtype, out, validate)


def bf16_grouped_gemm_psum(
    a: torch.Tensor,
    b: torch.Tensor,
    group_ends: torch.Tensor,
    *,
    alignment: int = 128,
    expected_m: int = 0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
) -> torch.Tensor:
    """As bf16_grouped_gemm(), with the groups given by where they end (DeepGEMM's psum layout).

    Args:
        group_ends: int32 [G]; group g has rows s .. group_ends[g] - 1, where s is the end of the
            group before it, rounded up to a multiple of `alignment` (0 for the first). Ends must
            not decrease; they are clamped to 0 .. M, and a group begins behind all before it.

    The other arguments and the result are bf16_grouped_gemm()'s.
    """
    options = {"alignment": alignment, "expected_m": expected_m}
    return _run("bf16_grouped_gemm_psum", (a, b, group_ends), options, out_dtype, out, validate)


def bf16_grouped_gemm_masked(
    a: torch.Tensor,
    b: torch.Tensor,
    masked_m: torch.Tensor,
    *,
    expected_m: int = 0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
) -> torch.Tensor:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T (DeepGEMM's m-grouped masked).

    Args:
        a: bfloat16 [G, Mmax, K], strides as b's. Mmax may be any number.
        b: bfloat16 [G, N, K], as in bf16_grouped_gemm().
        masked_m: int32 [G], rows of each group; clamped to 0 .. Mmax.
        out: D to write, [G, Mmax, N], last stride 1.

    The other arguments are bf16_grouped_gemm()'s. Returns D [G, Mmax, N].
    """
    options = {"expected_m": expected_m}
    return _run("bf16_grouped_gemm_masked", (a, b, masked_m), options, out_dtype, out, validate)
