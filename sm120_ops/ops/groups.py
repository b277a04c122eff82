"""Operands with a group dimension, [groups, rows, K], as the grouped ops take them.

Their packed scales are int32 [groups, rows, words] with the rows contiguous. Two layouts are usual:
one canonical matrix a group (DeepGEMM's; strides words * align(rows, 4), 1, align(rows, 4)), and a
view of one canonical matrix of all groups * rows rows (strides rows, 1, align(groups * rows, 4)).
Any multiples of 4 will do for the first and last stride.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .. import _check
from .gemm import Operand, infer_gran_k
from .layout import (
    BYTE_SCALE_DTYPES,
    FP4_DTYPES,
    GRANS_MN,
    align,
    as_bytes,
    ceil_div,
    fresh,
    pack_scales_of,
)
from .quantize import logical_k


def check_group_scales(
    op: str, arg: str, scale: torch.Tensor, groups: int, rows: int, k_groups: int
) -> None:
    """Packed scales of [groups, rows, K]: rows contiguous, words and groups 16 bytes apart."""
    _check.require_tensor(op, arg, scale, rank=3)
    if scale.dtype != torch.int32:
        _check.fail_type(op, arg, "dtype torch.int32 (packed UE8M0)", scale.dtype)
    shape = (groups, rows, ceil_div(k_groups, 4))
    if scale.shape[0] != shape[0] or scale.shape[1] != shape[1] or scale.shape[2] != shape[2]:
        _check.fail(op, arg, f"packed scales of shape {list(shape)}", scale.shape)
    empty = rows == 0 or groups == 0 or shape[2] == 0
    unit = scale.stride(1) == 1 or rows <= 1
    words = scale.stride(2) % 4 == 0 and scale.stride(2) > 0
    apart = scale.stride(0) % 4 == 0 and scale.stride(0) > 0
    if not empty and not (unit and (words or shape[2] <= 1) and (apart or groups <= 1)):
        requirement = "strides [a multiple of 4, 1, a multiple of 4], none 0"
        _check.fail(op, arg, requirement, f"strides {list(scale.stride())}")
    _check.require_aligned(op, arg, scale)


def rows_contiguous(scale: torch.Tensor) -> torch.Tensor:
    """Packed scales [groups, rows, words] of any strides as check_group_scales() wants them."""
    groups, rows, words = scale.shape

    def apart(dim: int) -> bool:
        return (scale.stride(dim) % 4 == 0 and scale.stride(dim) > 0) or scale.shape[dim] <= 1

    if (scale.stride(1) == 1 or rows <= 1) and apart(0) and apart(2):
        return scale
    padded = align(rows, 4)
    strides = (words * padded, 1, padded)
    return scale.new_empty_strided((groups, rows, words), strides).copy_(scale)


def k_major_groups(data: torch.Tensor, packed_rows: bool = False) -> torch.Tensor:
    """FP8 or FP4 [groups, rows, K] with K along its rows: itself, or one pass over it.

    FP4 packed along the rows (`packed_rows`) comes as [groups, rows / 2, K] and is always repacked.
    """
    if packed_rows:
        groups, k = data.shape[0], data.shape[2]
        matrix = data.transpose(1, 2).contiguous().flatten(0, 1)  # [groups * K, rows / 2]
        columns = torch.ops.sm120.transpose_fp4.default(as_bytes(matrix)).view(data.dtype)
        return columns.unflatten(1, (groups, k // 2)).transpose(0, 1)
    if data.stride(-1) == 1:
        return data
    return fresh(data.view(torch.uint8)).view(data.dtype)


def prepare_groups(
    op: str, arg: str, operand: Operand, gran_k: int | None, validate: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(data, packed scales, gran_k) of a [groups, rows, K] operand as the user gave it."""
    if not isinstance(operand, tuple | list) or len(operand) != 2:
        _check.fail_type(op, arg, "a pair (data, scale)", type(operand).__name__)
    data, scale = operand
    _check.require_tensor(op, arg, data, rank=3)
    _check.require_dtype(op, arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    sf = f"sf{arg}"
    _check.require_tensor(op, sf, scale, rank=3)
    _check.require_dtype(op, sf, scale, (torch.int32, torch.float32, *BYTE_SCALE_DTYPES))
    _check.require_same_device(op, arg, **{arg: data, sf: scale})
    _check.require_no_grad(op, **{arg: data, sf: scale})
    if data.dtype != torch.float8_e4m3fn:
        data = as_bytes(data)
    k = logical_k(data)
    if scale.dtype == torch.int32:
        return data, scale, infer_gran_k(op, sf, scale, k, 4, gran_k)
    gran_k = infer_gran_k(op, sf, scale, k, 1, gran_k)
    groups, rows, k_groups = data.shape[0], data.shape[1], ceil_div(k, gran_k)
    grans_mn = [g for g in GRANS_MN if ceil_div(rows, g) == scale.shape[1]]
    if not grans_mn or scale.shape[0] != groups or scale.shape[2] != k_groups:
        counts = " or ".join(f"{ceil_div(rows, g)} (gran_mn {g})" for g in GRANS_MN)
        requirement = f"[{groups}, rows, {k_groups}] with {counts} rows (gran_k {gran_k})"
        _check.fail(op, sf, requirement, scale.shape)
    return data, pack_group_scales(op, sf, scale, rows, grans_mn[0], validate), gran_k


def pack_group_scales(
    op: str, arg: str, scale: torch.Tensor, rows: int, gran_mn: int, validate: bool
) -> torch.Tensor:
    """float32 or byte scales [G, ceil(rows / gran_mn), columns] -> packed int32 [G, rows, words].

    One matrix of all groups is packed; each group must begin at a multiple of 4 rows in it.
    """
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    groups, padded = scale.shape[0], align(rows, 4)
    if padded != rows or rows % gran_mn != 0:
        scale = scale.repeat_interleave(gran_mn, 1)[:, :rows]
        scale, gran_mn = functional.pad(scale, (0, 0, 0, padded - rows), value=1), 1
    flat = scale.flatten(0, 1)
    words = pack_scales_of(op, arg, flat, groups * padded, gran_mn, validate).t()
    return words.unflatten(1, (groups, padded))[:, :, :rows].permute(1, 2, 0)
