"""DeepGEMM's quantisation helpers, in plain PyTorch on any device: for tests and for loading.

The casts give (data, sf) with sf in float32, amax / 448 (FP8) or amax / 6 (FP4) and amax at least
1e-4, rounded up to a power of two with `use_ue8m0`. FP4 is int8, two values a byte, the even one in
the low nibble; ties go to the smaller magnitude, and -0 becomes +0. The GEMMs take power-of-two
scales only, so pass use_ue8m0=True for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from .... import _check
from ....ops import layout
from ....ops.layout import (
    BYTE_SCALE_DTYPES,
    FP4_DTYPES,
    as_bytes,
    check_powers_of_two,
    exponents_of,
    pack_nibbles,
)
from ....ops.quantize import E2M1_MAX, E4M3_MAX, MIN_AMAX, decode
from ..layout import name_of

__all__ = [
    "align",
    "cast_back_from_fp4",
    "cast_back_from_fp8",
    "ceil_div",
    "ceil_to_ue8m0",
    "pack_ue8m0_to_int",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp4",
    "per_token_cast_to_fp8",
    "transpose_packed_fp4",
    "unpack_ue8m0_from_int",
]

_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

Cast = tuple[torch.Tensor, torch.Tensor]


def ceil_div(x: int, y: int) -> int:
    return layout.ceil_div(x, y)


def align(x: int, y: int) -> int:
    return layout.align(x, y)


def ceil_to_ue8m0(x: torch.Tensor) -> torch.Tensor:
    """Magnitudes rounded up to powers of two, from 2^-126 to 2^127."""
    bits = x.abs().float().view(torch.int32)
    exponents = (bits >> 23) + (bits & 0x7FFFFF != 0)
    return (exponents.clamp(1, 254) << 23).view(torch.float32)


def pack_ue8m0_to_int(x: torch.Tensor) -> torch.Tensor:
    """float32 powers of two (or UE8M0 bytes) [..., 4 n] -> int32 [..., n], row-major.

    The check of the values reads the device; it is left out while a CUDA graph is captured.
    """
    op = name_of("utils.math.pack_ue8m0_to_int")
    _check.require_tensor(op, "x", x)
    _check.require_dtype(op, "x", x, (torch.float32, *BYTE_SCALE_DTYPES))
    if x.dim() == 0 or x.shape[-1] % 4 != 0:
        _check.fail(op, "x", "a last dimension that is a multiple of 4", x.shape)
    if x.dtype == torch.float32:
        check_powers_of_two(op, "x", x.reshape(-1, x.shape[-1]))
    return exponents_of(x).contiguous().view(torch.int32)


def unpack_ue8m0_from_int(packed_sf: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> float32 [..., 4 n]."""
    return layout.fresh(packed_sf).view(torch.float8_e8m0fnu).to(torch.float32)


def _scales(amax: torch.Tensor, limit: float, use_ue8m0: bool) -> torch.Tensor:
    sf = amax.float().clamp(min=MIN_AMAX) / amax.new_full((), limit, dtype=torch.float32)
    return ceil_to_ue8m0(sf) if use_ue8m0 else sf


def _to_fp8(x: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    return (x.float() * (1.0 / sf)).to(torch.float8_e4m3fn)


def _packed(sf: torch.Tensor, use_packed_ue8m0: bool) -> torch.Tensor:
    """Row-major words, the last one filled up with scales of 1."""
    if not use_packed_ue8m0:
        return sf
    return pack_ue8m0_to_int(functional.pad(sf, (0, -sf.shape[-1] % 4), value=1.0))


def _check_cast(op: str, x: torch.Tensor, use_ue8m0: bool, use_packed_ue8m0: bool = False) -> None:
    _check.require_tensor(name_of(f"utils.math.{op}"), "x", x, rank=2)
    if use_packed_ue8m0 and not use_ue8m0:
        arg, requirement = "use_packed_ue8m0", "use_ue8m0=True with it"
        _check.fail(name_of(f"utils.math.{op}"), arg, requirement, "use_ue8m0=False")


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Cast:
    """[M, K] -> FP8 [M, K], sf [M, ceil(K / gran_k)] (packed: int32 row-major words)."""
    _check_cast("per_token_cast_to_fp8", x, use_ue8m0, use_packed_ue8m0)
    k = x.shape[1]
    groups = functional.pad(x, (0, -k % gran_k)).unflatten(1, (-1, gran_k))
    sf = _scales(groups.abs().amax(2), E4M3_MAX, use_ue8m0)
    data = _to_fp8(groups, sf[..., None]).flatten(1)[:, :k].contiguous()
    return data, _packed(sf, use_packed_ue8m0)


def per_channel_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128) -> Cast:
    """[K, N] with groups down the columns -> FP8 [K, N], sf [K / gran_k, N]."""
    op = "per_channel_cast_to_fp8"
    _check_cast(op, x, use_ue8m0)
    if x.shape[0] % gran_k != 0:
        requirement = f"a first dimension that is a multiple of {gran_k}"
        _check.fail(name_of(f"utils.math.{op}"), "x", requirement, x.shape)
    groups = x.unflatten(0, (-1, gran_k))
    sf = _scales(groups.abs().amax(1), E4M3_MAX, use_ue8m0)
    return _to_fp8(groups, sf[:, None]).view(x.shape), sf


def per_block_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128) -> Cast:
    """[M, K] -> FP8 [M, K], sf [ceil(M / gran_k), ceil(K / gran_k)] of square blocks."""
    _check_cast("per_block_cast_to_fp8", x, use_ue8m0)
    m, k = x.shape
    padded = functional.pad(x, (0, -k % gran_k, 0, -m % gran_k))
    blocks = padded.unflatten(1, (-1, gran_k)).unflatten(0, (-1, gran_k))
    sf = _scales(blocks.abs().amax((1, 3)), E4M3_MAX, use_ue8m0)
    data = _to_fp8(blocks, sf[:, None, :, None]).view(padded.shape)
    return data[:m, :k].contiguous(), sf


def per_custom_dims_cast_to_fp8(x: torch.Tensor, dims: Sequence[int], use_ue8m0: bool) -> Cast:
    """Any shape; one scale for each index of `dims`, sf without the other dimensions."""
    others = tuple(i for i in range(x.dim()) if i not in set(dims))
    sf = _scales(x.abs().amax(others, keepdim=True), E4M3_MAX, use_ue8m0)
    return _to_fp8(x, sf), sf.squeeze()


def per_token_cast_to_fp4(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Cast:
    """[M, K] with K even -> FP4, int8 [M, K / 2], sf [M, ceil(K / gran_k)] (packed: int32)."""
    op = "per_token_cast_to_fp4"
    _check_cast(op, x, use_ue8m0, use_packed_ue8m0)
    k = x.shape[1]
    if k % 2 != 0:
        _check.fail(name_of(f"utils.math.{op}"), "x", "an even K", f"K={k}")
    groups = functional.pad(x, (0, -k % gran_k)).unflatten(1, (-1, gran_k))
    sf = _scales(groups.abs().amax(2), E2M1_MAX, use_ue8m0)
    values = groups.float() * (1.0 / sf[..., None])
    codes = (values < -_FP4_MIDPOINTS[0]).to(torch.uint8) << 3
    for midpoint in _FP4_MIDPOINTS:
        codes += values.abs() > midpoint
    data = pack_nibbles(codes.flatten(1))[:, : k // 2].contiguous()
    return data.view(torch.int8), _packed(sf, use_packed_ue8m0)


def transpose_packed_fp4(a: torch.Tensor) -> torch.Tensor:
    """FP4 [R, C / 2], R even -> [C, R / 2], of the same dtype."""
    _check.require_tensor(name_of("utils.math.transpose_packed_fp4"), "a", a, rank=2)
    return torch.ops.sm120.transpose_fp4.default(as_bytes(a.contiguous())).view(a.dtype)


def _cast_back(data: torch.Tensor, sf: torch.Tensor, gran_k: int, packed: bool) -> torch.Tensor:
    values = decode(data, torch.float32)
    scales = unpack_ue8m0_from_int(sf) if packed else sf
    return values * scales.repeat_interleave(gran_k, 1)[:, : values.shape[1]]


def cast_back_from_fp4(
    packed: torch.Tensor, sf: torch.Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> torch.Tensor:
    """per_token_cast_to_fp4()'s data and scales -> float32 [M, K]."""
    op = name_of("utils.math.cast_back_from_fp4")
    _check.require_tensor(op, "packed", packed, rank=2)
    _check.require_dtype(op, "packed", packed, FP4_DTYPES)
    return _cast_back(packed, sf, gran_k, use_packed_ue8m0)


def cast_back_from_fp8(
    x_fp8: torch.Tensor, sf: torch.Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> torch.Tensor:
    """per_token_cast_to_fp8()'s data and scales -> float32 [M, K]."""
    op = name_of("utils.math.cast_back_from_fp8")
    _check.require_tensor(op, "x_fp8", x_fp8, rank=2)
    _check.require_dtype(op, "x_fp8", x_fp8, (torch.float8_e4m3fn,))
    return _cast_back(x_fp8, sf, gran_k, use_packed_ue8m0)
