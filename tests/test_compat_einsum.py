"""Batched and k-grouped products by DeepGEMM's names, in its conventions and tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat_cases import BF16, FP32, Operand, as_form, quantised, refused

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm.testing import calc_diff

HEADS, R, D = 3, 384, 256
LIMIT = {False: 1e-3, True: 0.02}


def rows_cast(x: torch.Tensor, gran_k: int, fp4: bool, packed: bool) -> Operand:
    """[b, h, K] by token, scales [b, h, K / gran_k]; packed: int32 [b, h, words] as vLLM has it."""
    b, h, k = x.shape
    data, sf = quantised(x.reshape(b * h, k), gran_k, fp4)
    sf = sf.view(b, h, -1)
    if packed:
        by_head = sf.transpose(0, 1).contiguous()
        sf = as_form(by_head, "packed", b, (1, gran_k)).transpose(0, 1)
    return data.view(b, h, -1), sf


def stacked_cast(x: torch.Tensor, gran_k: int, fp4: bool, block: bool) -> Operand:
    casts = [quantised(part, gran_k, fp4, block) for part in x]
    data = torch.stack([cast[0].view(torch.uint8) for cast in casts]).view(casts[0][0].dtype)
    return data, torch.stack([cast[1] for cast in casts])


@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("form", ["float32", "bytes", "packed"])
@pytest.mark.parametrize("b", [0, 1, 4, 70])
def test_fp8_bhr_hdr_bhd(device: torch.device, gran_k: int, fp4: bool, form: str, b: int) -> None:
    """With weights by block (recipe (1, g, g), the default at 128) and by row (1, 1, g)."""
    torch.manual_seed(b)
    x = torch.randn(b, HEADS, R, device=device, dtype=BF16)
    y = torch.randn(HEADS, D, R, device=device, dtype=BF16)
    wanted = torch.einsum("bhr,hdr->bhd", x.float(), y.float())
    a = rows_cast(x, gran_k, fp4, form == "packed") if b else (
        torch.empty(0, HEADS, R // (1 + fp4), device=device,
                    dtype=torch.int8 if fp4 else torch.float8_e4m3fn),
        torch.empty(0, HEADS, R // gran_k, device=device),
    )  # fmt: skip
    for block in (True, False):
        if fp4 and block:
            continue
        data, sf = stacked_cast(y, gran_k, fp4, block)
        recipe = (1, gran_k if block else 1, gran_k)
        weights = (data, as_form(sf, form, D, (recipe[1], gran_k)))
        tokens = (a[0], as_form(a[1], "bytes", b, (1, gran_k)) if form == "bytes" else a[1])
        for dtype in (BF16, FP32):
            z = torch.empty(b, HEADS, D, device=device, dtype=dtype)
            options: dict[str, Any] = {} if recipe == (1, 128, 128) else {"recipe": recipe}
            deep_gemm.fp8_einsum("bhr,hdr->bhd", tokens, weights, z, **options)
            assert b == 0 or calc_diff(z, wanted) < LIMIT[fp4]
        if b and form == "float32":
            c = torch.randn(b, HEADS, D, device=device)
            z = c.clone()
            deep_gemm.fp8_einsum("bhr, hdr -> bhd", tokens, weights, z, c=z, recipe=recipe)
            assert calc_diff(z, wanted + c) < LIMIT[fp4]


@pytest.mark.parametrize("b", [4, 70])
def test_fp8_bhd_hdr_bhr(device: torch.device, b: int) -> None:
    x = torch.randn(b, HEADS, D, device=device, dtype=BF16)
    y = torch.randn(HEADS, D, R, device=device, dtype=BF16)
    z = torch.empty(b, HEADS, R, device=device, dtype=BF16)
    deep_gemm.fp8_einsum(
        "bhd,hdr->bhr", rows_cast(x, 128, False, False), stacked_cast(y, 128, False, True), z
    )
    assert calc_diff(z, torch.einsum("bhd,hdr->bhr", x.float(), y.float())) < 1e-3


def test_fp8_bhd_bhr_hdr(device: torch.device) -> None:
    """Weight gradients: scales by channel, accumulated in place."""
    b = 256
    x = torch.randn(b, HEADS, D, device=device, dtype=BF16)
    y = torch.randn(b, HEADS, R, device=device, dtype=BF16)
    (a, sfa), (w, sfb) = (deep_gemm.per_channel_cast_to_fp8(t.flatten(1), True) for t in (x, y))
    z = torch.randn(HEADS, D, R, device=device) * 10
    wanted = z + torch.einsum("bhd,bhr->hdr", x.float(), y.float())
    deep_gemm.fp8_einsum(
        "bhd,bhr->hdr",
        (a.view(b, HEADS, D), sfa.view(-1, HEADS, D)),
        (w.view(b, HEADS, R), sfb.view(-1, HEADS, R)),
        z,
        c=z,
        recipe=(1, 1, 128),
    )
    assert calc_diff(z, wanted) < 1e-3


@pytest.mark.parametrize("expr", ["bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr"])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("use_cublaslt", [False, True])
def test_bf16_einsum(
    device: torch.device, expr: str, out_dtype: torch.dtype, use_cublaslt: bool
) -> None:
    sizes = {"b": 40, "h": HEADS, "r": R, "d": D}
    inputs, output = expr.split("->")
    x, wide = (
        torch.randn([sizes[i] for i in indices], device=device, dtype=BF16)
        for indices in inputs.split(",")
    )
    y = torch.nn.functional.pad(wide, (0, 128))[..., : wide.shape[-1]]  # a strided slice
    wanted = torch.einsum(expr, x.double(), y.double())
    z = torch.empty([sizes[i] for i in output], device=device, dtype=out_dtype)
    deep_gemm.einsum(expr, x, y, z, use_cublaslt=use_cublaslt)
    assert calc_diff(z, wanted) < 1e-5
    c = torch.randn_like(z)
    total = wanted + c.double()
    deep_gemm.einsum(expr, x, y, c, c, use_cublaslt=use_cublaslt)
    assert calc_diff(c, total) < 1e-5


@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", [(5, 128, 384, 128), (129, 16, 24, 64), (1, 8, 8, 64)])
def test_bmk_bnk_mn(
    device: torch.device, out_dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    b, m, n, k = shape
    x, y = (torch.randn(b, rows, k, device=device, dtype=BF16) for rows in (m, n))
    d = torch.randn(m, n, device=device).to(out_dtype)
    c = d if out_dtype == FP32 else None
    wanted = torch.einsum("bmk,bnk->mn", x.double(), y.double()) + (0 if c is None else c.double())
    deep_gemm.einsum("bmk,bnk->mn", x, y, d, c=c)
    assert calc_diff(d, wanted) < 1e-5


def test_einsum_refusals(device: torch.device) -> None:
    x = torch.randn(4, HEADS, R, device=device, dtype=BF16)
    y = torch.randn(HEADS, D, R, device=device, dtype=BF16)
    z = torch.empty(4, HEADS, D, device=device, dtype=BF16)
    a, b = rows_cast(x, 128, False, False), stacked_cast(y, 128, False, True)
    with refused("fp8_einsum: expr: expected 'bhr,hdr->bhd' or .*, got 'bhr,hrd->bhd'"):
        deep_gemm.fp8_einsum("bhr,hrd->bhd", a, b, z)
    with refused("einsum: expr: expected .* or 'bmk,bnk->mn', got 'ij,jk->ik'"):
        deep_gemm.einsum("ij,jk->ik", x, y, z)
    with refused("fp8_einsum: d: expected a bfloat16 or float32 tensor", TypeError):
        deep_gemm.fp8_einsum("bhr,hdr->bhd", a, b, (z, z))  # type: ignore[arg-type]
    with refused("fp8_einsum: d: expected batch 3, as A"):
        deep_gemm.fp8_einsum("bhr,hdr->bhd", a, b, z[:, :2])
    with refused("fp8_einsum: sfa: expected float32 scales that are powers of two"):
        deep_gemm.fp8_einsum("bhr,hdr->bhd", (a[0], a[1] * 3), b, z)


# ---- k-grouped -----------------------------------------------------------------------------------

M, N = 48, 96
SIZES = [[128, 256, 384], [0, 128, 0], [640]]


def by_channel(x: torch.Tensor, ks: list[int], layout: str, gran_k: int, fp4: bool) -> Operand:
    """[sum_k, rows] with groups of K down the columns -> what k_grouped_* takes."""
    parts = [quantised(part.t(), gran_k, fp4) for part in x.split(ks)]
    sf = torch.cat([part[1].t() for part in parts])
    data = [part[0] for part in parts]
    if layout == "nt":
        flat = torch.cat([part.flatten().view(torch.uint8) for part in data])
        return flat.view(data[0].dtype), sf
    if not fp4:
        turned = torch.cat([part.t().view(torch.uint8) for part in data])
        return turned.view(torch.float8_e4m3fn), sf
    return torch.cat([deep_gemm.transpose_packed_fp4(part) for part in data if part.numel()]), sf


def k_packed(sf: torch.Tensor, ks: list[int], gran_k: int) -> torch.Tensor:
    pack = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    return pack(sf, torch.tensor(ks, dtype=torch.int32, device=sf.device), ks, gran_k)


@pytest.mark.parametrize("ks", SIZES)
@pytest.mark.parametrize("layout", ["nt", "tn"])
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("fp4", [(False, False), (True, True), (False, True)])
def test_k_grouped(
    device: torch.device, ks: list[int], layout: str, gran_k: int, fp4: tuple[bool, bool]
) -> None:
    """Scales in every form, and transposed; with C, in place too, and without; D in both dtypes."""
    torch.manual_seed(0)
    x, y = (torch.randn(sum(ks), rows, device=device, dtype=BF16) for rows in (M, N))
    (a, sfa), (b, sfb) = (
        by_channel(t, ks, layout, gran_k, packed) for t, packed in zip((x, y), fp4, strict=True)
    )
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=device)
    products = [u.float().t() @ v.float() for u, v in zip(x.split(ks), y.split(ks), strict=True)]
    c = torch.randn(len(ks), M, N, device=device) * 10
    run = getattr(deep_gemm, f"k_grouped_fp8_gemm_{layout}_contiguous")
    limit = 1e-3 if not any(fp4) else 0.02
    for form in ("float32", "turned", "packed", "bytes", "e8m0"):
        if form == "turned":
            scales = [sf.t() for sf in (sfa, sfb)]
        elif form == "packed":
            scales = [k_packed(sf, ks, gran_k) for sf in (sfa, sfb)]
        else:
            scales = [as_form(sf, form, 0, (1, gran_k)) for sf in (sfa, sfb)]
        for accumulate, in_place, dtype in (
            (True, False, FP32), (True, True, FP32), (False, False, FP32), (False, False, BF16)
        ):  # fmt: skip
            wanted = torch.stack(products) + (c if accumulate else 0)
            d = torch.empty(len(ks), M, N, device=device, dtype=dtype)
            added = (d.copy_(c) if in_place else c.clone()) if accumulate else None
            run((a, scales[0]), (b, scales[1]), d, ks, ks_tensor, added, recipe=(1, 1, gran_k))
            for group, k in enumerate(ks):
                assert calc_diff(d[group], wanted[group]) < (limit if k else 1e-12)


@pytest.mark.parametrize("ks", SIZES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_k_grouped_bf16(device: torch.device, ks: list[int], accumulate: bool) -> None:
    x, y = (torch.randn(sum(ks), rows, device=device, dtype=BF16) for rows in (M, N))
    ks_tensor = torch.tensor(ks, dtype=torch.int32, device=device)
    d = torch.randn(len(ks), M, N, device=device)
    c = d if accumulate else None
    products = [a.double().t() @ b.double() for a, b in zip(x.split(ks), y.split(ks), strict=True)]
    wanted = torch.stack(products) + (d.double() if accumulate else 0)
    deep_gemm.k_grouped_bf16_gemm_tn_contiguous(x, y, d, ks, ks_tensor, c)
    assert calc_diff(d, wanted) < 1e-5


def test_k_grouped_refusals(device: torch.device) -> None:
    x = torch.randn(256, M, device=device, dtype=BF16)
    d = torch.empty(2, M, M, device=device)
    ks_tensor = torch.tensor([128, 128], dtype=torch.int32, device=device)
    run = deep_gemm.k_grouped_bf16_gemm_tn_contiguous
    with refused("ks: expected 2 group sizes, as d has groups, got .256."):
        run(x, x, d, [256], ks_tensor)
    with refused("ks: expected sizes >= 0 with the sum 256"):
        run(x, x, d, [128, 64], ks_tensor)
    with refused("use_psum_layout: expected False"):
        run(x, x, d, [128, 128], ks_tensor, use_psum_layout=True)
    a = by_channel(x, [128, 128], "tn", 128, False)
    scaled = deep_gemm.k_grouped_fp8_gemm_tn_contiguous
    with refused("tn_contiguous: ks: expected multiples of 16, none negative, got .120, 136."):
        scaled(a, a, d, [120, 136], ks_tensor)
    with refused("tn_contiguous: sfa: expected float32 scales that are powers of two"):
        scaled((a[0], a[1] * 3), a, d, [128, 128], ks_tensor)
    with refused(r"tn_contiguous: sfb: expected shape \[2, 48\], or its transpose, got \[1, 48\]"):
        scaled(a, (a[0], a[1][:1]), d, [128, 128], ks_tensor)
    with refused("tn_contiguous: recipe: expected .1, 1, 32. or .1, 1, 128."):
        scaled(a, a, d, [128, 128], ks_tensor, recipe=(1, 128, 128))
    with refused("nt_contiguous: a: expected a and b of 1 dimensions, d of 3"):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, a, d, [128, 128], ks_tensor)
