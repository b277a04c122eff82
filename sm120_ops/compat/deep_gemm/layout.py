"""Scales in DeepGEMM's conventions, and their packed form.

`sf` of an operand with `mn` rows and K values a row, with or without a leading group dimension G:

    float32, or UE8M0 bytes (float8_e8m0fnu, uint8)    [(G,) ceil(mn / gran_mn), ceil(K / gran_k)]
    int32, packed                                      [(G,) mn, ceil(K / (4 * gran_k))]

A recipe is (gran_mn, gran_k) of one operand, or (gran_mn of A, gran_mn of B, gran_k) of both.
float32 must be powers of two, which DeepGEMM does not check: see pack_scales() for when it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from ... import _check
from ...ops import layout
from ...ops.groups import pack_group_scales
from ...ops.layout import BYTE_SCALE_DTYPES, GRANS_MN, align, ceil_div
from ...ops.quantize import GRANS_K

SCALE_DTYPES = (torch.float32, torch.int32, *BYTE_SCALE_DTYPES)
Recipe = Sequence[int]


def name_of(op: str) -> str:
    return f"deep_gemm.{op}"


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x elements rounded up to whole 16 bytes."""
    return align(x, 16 // element_size)


# ---- Recipes -------------------------------------------------------------------------------------


def recipes(
    op: str,
    sfb: torch.Tensor,
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(gran_mn, gran_k) of A and of B, by default by the dtype of B's scales, as DeepGEMM."""
    if recipe_a is not None or recipe_b is not None:
        if recipe is not None or recipe_a is None or recipe_b is None:
            got = f"recipe={recipe}, recipe_a={recipe_a}, recipe_b={recipe_b}"
            _check.fail(name_of(op), "recipe", "recipe, or recipe_a and recipe_b", got)
        return _pair(op, "recipe_a", recipe_a), _pair(op, "recipe_b", recipe_b)
    if recipe is None:
        return (1, 128), (1 if sfb.dtype == torch.int32 else 128, 128)
    if len(recipe) != 3:
        _check.fail(name_of(op), "recipe", "(gran_mn of A, gran_mn of B, gran_k)", tuple(recipe))
    gran_a, gran_b, gran_k = recipe
    if gran_a < 1 or gran_b < 1 or gran_k not in GRANS_K:
        requirement = f"positive gran_mn and gran_k of {list(GRANS_K)}"
        _check.fail(name_of(op), "recipe", requirement, tuple(recipe))
    return (gran_a, gran_k), (gran_b, gran_k)


def _pair(op: str, arg: str, recipe: Recipe) -> tuple[int, int]:
    if len(recipe) != 2 or recipe[0] < 1 or recipe[1] not in GRANS_K:
        requirement = f"a positive gran_mn and gran_k of {list(GRANS_K)}"
        _check.fail(name_of(op), arg, requirement, tuple(recipe))
    return recipe[0], recipe[1]


# ---- Packing -------------------------------------------------------------------------------------


def pack(op: str, arg: str, sf: torch.Tensor, mn: int, gran_mn: int) -> torch.Tensor:
    """float32 or byte scales, 2-D or 3-D -> packed, in any layout that the ops take."""
    if sf.dtype == torch.float8_e8m0fnu:
        sf = sf.view(torch.uint8)
    if gran_mn not in GRANS_MN:
        sf, gran_mn = sf.repeat_interleave(gran_mn, -2)[..., :mn, :], 1
    if sf.dim() == 2:
        return layout.pack_scales_of(op, arg, sf, mn, gran_mn, validate=True)
    return pack_group_scales(op, arg, sf, mn, gran_mn, validate=True)


def _as_deep_gemm(sf: torch.Tensor) -> torch.Tensor:
    """`sf`, or a copy with DeepGEMM's strides: one MN-major matrix a group, rows padded to 4."""
    *lead, mn, columns = sf.shape
    aligned = align(mn, 4)
    strides = (columns * aligned, 1, aligned)[-sf.dim() :]
    if sf.stride() == strides:
        return sf
    return sf.new_empty_strided((*lead, mn, columns), strides).copy_(sf)


def required(
    op: str,
    arg: str,
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, int],
    num_groups: int | None = None,
) -> torch.Tensor:
    """Scales in any accepted form -> packed int32 [(num_groups,) mn, words].

    What is packed already comes back as it is; the op that takes it checks its strides.
    """
    gran_mn, gran_k = recipe
    _check.require_tensor(op, arg, sf, rank=2 if num_groups is None else 3)
    _check.require_dtype(op, arg, sf, SCALE_DTYPES)
    packed = sf.dtype == torch.int32
    columns = ceil_div(k, 4 * gran_k if packed else gran_k)
    shape: tuple[int, ...] = (mn if packed else ceil_div(mn, gran_mn), columns)
    if num_groups is not None:
        shape = (num_groups, *shape)
    if tuple(sf.shape) != shape:
        what = "packed" if packed else f"gran_mn {gran_mn}, gran_k {gran_k}"
        _check.fail(op, arg, f"shape {list(shape)} ({what})", sf.shape)
    if not packed:
        return pack(op, arg, sf, mn, gran_mn)
    return sf


def transform_sf_into_required_layout(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: Recipe,
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
) -> torch.Tensor:
    """Scales of an operand -> the packed form that every GEMM takes as it is.

    Args:
        sf: float32, byte or packed scales; see the head of the file.
        mn, k: rows and K of the operand (of each group).
        recipe: (gran_mn, gran_k), or (gran_mn of A, gran_mn of B, gran_k) with is_sfa.
        num_groups: G where sf has a group dimension.
        is_sfa: with a recipe of three, whether sf belongs to A.
        disable_ue8m0_cast: without effect: there is no other kind of scale on these GPUs.

    Returns:
        int32 [(G,) mn, ceil(k / (4 * gran_k))], stride(-2) == 1, stride(-1) == align(mn, 4).
    """
    op = "transform_sf_into_required_layout"
    if len(recipe) == 3:
        if is_sfa is None:
            _check.fail(name_of(op), "is_sfa", "True or False with a recipe of three", None)
        pair: Recipe = (recipe[0] if is_sfa else recipe[1], recipe[2])
    else:
        _check.require(is_sfa is None, name_of(op), "is_sfa", "None with a recipe of two", is_sfa)
        pair = recipe
    recipe = _pair(op, "recipe", pair)
    return _as_deep_gemm(required(name_of(op), "sf", sf, mn, k, recipe, num_groups))


# ---- Layout helpers ------------------------------------------------------------------------------


def _check_scale(op: str, sf: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check.require_tensor(name_of(op), "sf", sf)
    _check.require_dtype(name_of(op), "sf", sf, dtypes)
    if sf.dim() not in (2, 3):
        _check.fail(name_of(op), "sf", "2 or 3 dimensions", sf.shape)


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """float32 [(G,) mn, groups] -> the same values, stride(-2) == 1, stride(-1) == align(mn, 4).

    Gives back `sf` itself where it is so already.
    """
    _check_scale("get_mn_major_tma_aligned_tensor", sf, (torch.float32,))
    return _as_deep_gemm(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: torch.Tensor) -> torch.Tensor:
    """float32 (or byte) scales [(G,) mn, groups] -> packed int32 [(G,) mn, ceil(groups / 4)]."""
    op = "get_mn_major_tma_aligned_packed_ue8m0_tensor"
    _check_scale(op, sf, (torch.float32, *BYTE_SCALE_DTYPES))
    return _as_deep_gemm(pack(name_of(op), "sf", sf, sf.shape[-2], 1))


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: torch.Tensor, ks_tensor: torch.Tensor, ks: Sequence[int], gran_k: int
) -> torch.Tensor:
    """Scales of a k-grouped operand, packed so that each group starts a new word.

    Args:
        sf: float32 or bytes, [sum of ceil(k_g / gran_k), mn].
        ks_tensor: int32 [G] on the device; what it says must be what `ks` says.
        ks: K of each group, on the host.
        gran_k: values of K that share a scale.

    Returns:
        int32 [sum of ceil(k_g / (4 * gran_k)), mn], contiguous, mn being fastest.
    """
    op = name_of("get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor")
    _check.require_tensor(op, "sf", sf, rank=2)
    _check.require_dtype(op, "sf", sf, (torch.float32, *BYTE_SCALE_DTYPES))
    counts = [ceil_div(k, gran_k) for k in ks]
    if sf.shape[0] != sum(counts):
        _check.fail(op, "sf", f"{sum(counts)} rows for ks={list(ks)}", sf.shape)
    if sf.dtype == torch.float32:
        layout.check_powers_of_two(op, "sf", sf)
    parts = layout.exponents_of(sf).split(counts)
    padded = torch.cat([functional.pad(part, (0, 0, 0, -len(part) % 4)) for part in parts])
    return padded.view(-1, 4, sf.shape[1]).transpose(1, 2).contiguous().view(torch.int32).squeeze(2)
