"""m-grouped block-scaled GEMM, the expert products of a MoE layer: D = A @ B[expert].T, row by row.

A has the tokens sorted by expert, B [G, N, K] one weight matrix an expert. Which rows belong to
which expert is said in one of three layouts (group_layouts.py):

    grouped_gemm          contiguous: A [M, K], m_indices int32 [M]
    grouped_gemm_psum     psum: A [M, K], group_ends int32 [G]
    grouped_gemm_masked   masked: A [G, Mmax, K], masked_m int32 [G]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import _check
from .gemm import OUT_DTYPES, Operand, check_operand, check_same_k, prepare
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
from .groups import check_group_scales, prepare_groups
from .layout import TAGS, ceil_div, check_packed_scales
from .library import Library
from .quantize import GRANS_K, decode, logical_k, scale_values

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# The layout of each op.
OPS = {"grouped_gemm": CONTIGUOUS, "grouped_gemm_psum": PSUM, "grouped_gemm_masked": MASKED}

_lib = Library()
for _op, _kind in OPS.items():
    _index, _options = LAYOUTS[_kind]
    _inputs = (
        f"Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor {_index}, int gran_k_a, int gran_k_b"
    )
    _tail = "".join(f", int {name}={default}" for name, default in _options.items())
    _lib.define(f"{_op}({_inputs}, ScalarType out_dtype{_tail}) -> Tensor", tags=TAGS)
    _lib.define(f"{_op}.out({_inputs}{_tail}, *, Tensor(a!) out) -> ()", tags=TAGS)
# The kernel that an op would run, as JSON: pure host code in C++. m: rows of A, or of one group.
_lib.define(
    "_grouped_config(str op, int m, int n, int k, int groups, int alignment, int expected_m,"
    " str format_a, str format_b, int gran_k_a, int gran_k_b, int num_sms, bool native,"
    " int l2_bytes, int dram_gbps) -> str"
)
# An op's `out` form with a given tile (index into the compiled table) and orientation: for tests of
# every configuration and for tuning.
_lib.define(
    "_grouped_forced(str op, Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor index,"
    " int gran_k_a, int gran_k_b, int alignment, Tensor(a!) out, int tile, bool swapped) -> ()"
)


# ---- Checks --------------------------------------------------------------------------------------


def _check_grouped(
    op: str,
    inputs: Inputs,
    grans: tuple[int, int],
    out_dtype: torch.dtype,
    options: Mapping[str, int],
) -> tuple[int, ...]:
    """Checks everything but `out`; gives the shape of D."""
    (a, sfa, b, sfb, index), (gran_k_a, gran_k_b) = inputs, grans
    _check.require_choice(op, "gran_k_a", gran_k_a, GRANS_K)
    _check.require_choice(op, "gran_k_b", gran_k_b, GRANS_K)
    _check.require_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
    check_options(op, options)
    kind = OPS[op]
    check_operand(op, "a", a, 3 if kind == MASKED else 2)
    check_operand(op, "b", b, 3)
    k = check_same_k(op, a, b)
    groups, n = b.shape[0], b.shape[1]
    if kind == MASKED:
        check_same_groups(op, a, groups)
        check_group_scales(op, "sfa", sfa, groups, a.shape[1], ceil_div(k, gran_k_a))
    else:
        check_packed_scales(op, "sfa", sfa, a.shape[0], ceil_div(k, gran_k_a))
    check_group_scales(op, "sfb", sfb, groups, n, ceil_div(k, gran_k_b))
    check_index(op, kind, index, a.shape[0], groups)
    _check.require_same_device(op, "a", **_named(op, inputs))
    return (*a.shape[:-1], n)


def _named(op: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    return dict(zip(("a", "sfa", "b", "sfb", LAYOUTS[OPS[op]][0]), inputs, strict=True))


# ---- Kernels -------------------------------------------------------------------------------------


def _grouped_into(
    op: str,
    out: torch.Tensor,
    inputs: Inputs,
    grans: tuple[int, int],
    options: Mapping[str, int],
) -> None:
    """Plain PyTorch on any device; leaves rows of no group alone."""
    (a, sfa, b, sfb, index), (gran_k_a, gran_k_b) = inputs, grans

    def values(data: torch.Tensor, scale: torch.Tensor, gran_k: int) -> torch.Tensor:
        # in float64, where 448 * 2^127 is finite
        return decode(data, torch.float64) * scale_values(
            scale, gran_k, logical_k(data), torch.float64
        )

    last, weight = -1, a.new_empty(0, dtype=torch.float64)
    alignment = options.get("alignment", 1)
    for expert, begin, end in runs(OPS[op], index, b.shape[0], a.shape[-2], alignment):
        if expert != last:
            last, weight = expert, values(b[expert], sfb[expert], gran_k_b).t()
        tokens, scale, target = (t[expert] if a.dim() == 3 else t for t in (a, sfa, out))
        product = values(tokens[begin:end], scale[begin:end], gran_k_a) @ weight
        target[begin:end] = product.float().to(out.dtype)


def _register(op: str) -> None:
    """CPU and fake kernels of one op: which of its arguments are what."""
    index, defaults = LAYOUTS[OPS[op]]

    def parts(call: dict[str, Any]) -> tuple[Inputs, tuple[int, int], dict[str, int]]:
        inputs = (call["a"], call["sfa"], call["b"], call["sfb"], call[index])
        options = {name: call[name] for name in defaults}
        return inputs, (call["gran_k_a"], call["gran_k_b"]), options

    def check(**call: Any) -> tuple[int, ...]:
        inputs, grans, options = parts(call)
        return _check_grouped(op, inputs, grans, call["out_dtype"], options)

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
    a: Operand,
    b: Operand,
    index: torch.Tensor,
    options: dict[str, int],
    gran_k_a: int | None,
    gran_k_b: int | None,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None,
    validate: bool,
    validate_scales: bool,
) -> torch.Tensor:
    if OPS[op] == MASKED:
        a_data, sfa, gran_k_a = prepare_groups(op, "a", a, gran_k_a, validate_scales)
    else:
        a_data, sfa, gran_k_a = prepare(op, "a", a, False, gran_k_a, validate_scales)
    b_data, sfb, gran_k_b = prepare_groups(op, "b", b, gran_k_b, validate_scales)
    dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES)
    inputs = (a_data, sfa, b_data, sfb, index)
    if not torch.compiler.is_compiling():
        shape = _check_grouped(op, inputs, (gran_k_a, gran_k_b), dtype, options)
        if out is not None:
            check_grouped_out(op, out, shape, _named(op, inputs))
        if validate and _check.has_address(index):
            alignment = options.get("alignment", 1)
            require_layout(op, OPS[op], index, b_data.shape[0], a_data.shape[-2], alignment)
    packet = getattr(torch.ops.sm120, op)
    if out is None:
        result: torch.Tensor = packet.default(*inputs, gran_k_a, gran_k_b, dtype, *options.values())
        return result
    packet.out(*inputs, gran_k_a, gran_k_b, *options.values(), out=out)
    return out


def grouped_gemm(
    a: Operand,
    b: Operand,
    m_indices: torch.Tensor,
    *,
    alignment: int = 128,
    expected_m: int = 0,
    gran_k_a: int | None = None,
    gran_k_b: int | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
    validate_scales: bool = True,
) -> torch.Tensor:
    """D[m] = A[m] @ B[m_indices[m]].T, the contiguous layout (DeepGEMM's m-grouped contiguous).

    Args:
        a: (data, scale) of the tokens. data: float8_e4m3fn [M, K] or packed FP4 [M, K / 2],
            K-major. scale: packed int32, bytes or float32, as gemm() takes them.
        b: (data, scale) of the experts' weights. data: [G, N, K] (FP4: [G, N, K / 2]), K-major.
            scale: packed int32 [G, N, ceil(groups / 4)] with rows contiguous and the other strides
            multiples of 4, or bytes or float32 powers of two [G, N, groups], also one a block of 32
            or 128 rows.
        m_indices: int32 [M], the expert of each row, or -1. Rows come in segments of `alignment`:
            in each the valid rows first, all of one expert, then -1 rows. Segments that are all -1
            cost nothing.
        alignment: rows of a segment: 16, 32, 64 or 128. Few rows an expert want a small one.
        expected_m: rows an expert that has any is expected to have; only steers the choice of
            tiles. 0: unknown, guessed from M, G and the alignment.
        gran_k_a, gran_k_b: as in gemm().
        out_dtype: bfloat16 (default) or float32.
        out: D to write, last stride 1, any row stride. Rows of no expert keep what they hold.
        validate: check m_indices on the device (one sync) and raise ValueError that names the first
            bad row. Without it rows that break the layout are computed with the expert that their
            index names, or left untouched; an index outside of [0, G) means padding. Not possible
            while a CUDA graph is captured; skipped under torch.compile.
        validate_scales: check that float32 scales are powers of two (see pack_scales()).

    Returns:
        D [M, N]; without `out`, rows of no expert are 0.
    """
    options = {"alignment": alignment, "expected_m": expected_m}
    return _run(
        "grouped_gemm", a, b, m_indices, options, gran_k_a, gran_k_b, out_dtype, out, validate,
        validate_scales,
    )  # fmt: skip


def grouped_gemm_psum(
    a: Operand,
    b: Operand,
    group_ends: torch.Tensor,
    *,
    alignment: int = 128,
    expected_m: int = 0,
    gran_k_a: int | None = None,
    gran_k_b: int | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
    validate_scales: bool = True,
) -> torch.Tensor:
    """As grouped_gemm(), with the groups given by where they end (DeepGEMM's psum layout).

    Args:
        group_ends: int32 [G]; group g has rows s .. group_ends[g] - 1, where s is the end of the
            group before it, rounded up to a multiple of `alignment` (0 for the first). Ends must
            not decrease; they are clamped to 0 .. M, and a group begins behind all before it.

    The other arguments and the result are grouped_gemm()'s.
    """
    options = {"alignment": alignment, "expected_m": expected_m}
    return _run(
        "grouped_gemm_psum", a, b, group_ends, options, gran_k_a, gran_k_b, out_dtype, out,
        validate, validate_scales,
    )  # fmt: skip


def grouped_gemm_masked(
    a: Operand,
    b: Operand,
    masked_m: torch.Tensor,
    *,
    expected_m: int = 0,
    gran_k_a: int | None = None,
    gran_k_b: int | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
    validate_scales: bool = True,
) -> torch.Tensor:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T (DeepGEMM's m-grouped masked).

    Args:
        a: (data, scale); data [G, Mmax, K], scale as for b: packed int32 [G, Mmax, words], bytes or
            float32 [G, Mmax, groups]. Mmax may be any number.
        b: (data, scale) as in grouped_gemm().
        masked_m: int32 [G], rows of each group; clamped to 0 .. Mmax.
        out: D to write, [G, Mmax, N], last stride 1.

    The other arguments are grouped_gemm()'s. Returns D [G, Mmax, N].
    """
    options = {"expected_m": expected_m}
    return _run(
        "grouped_gemm_masked", a, b, masked_m, options, gran_k_a, gran_k_b, out_dtype, out,
        validate, validate_scales,
    )  # fmt: skip
