"""Dense GEMMs by DeepGEMM's names, in its conventions and within its tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat_cases import (
    BF16,
    CONFIGS,
    FP32,
    SCALE_FORMS,
    Operand,
    Problem,
    as_form,
    quantised,
    refused,
)

import sm120_ops
from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm.testing import calc_diff


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", ["float32", "packed"])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_dense(
    device: torch.device,
    config: tuple[int, int, bool, bool],
    form: str,
    out_dtype: torch.dtype,
    accumulate: bool,
) -> None:
    for m, n, k in [(1, 256, 512), (96, 128, 384), (130, 264, 256)]:
        problem = Problem(device, m, n, k, config, form, out_dtype, accumulate)
        deep_gemm.fp8_fp4_gemm_nt(problem.a, problem.b, problem.d, problem.c, **problem.options)
        problem.check()
        if problem.c is not None:  # in place, as D is C
            out = problem.c.clone()
            deep_gemm.fp8_fp4_gemm_nt(problem.a, problem.b, out, out, **problem.options)
            assert torch.equal(out, problem.d)


def transposed(operand: Operand) -> Operand:
    data, sf = operand
    if data.dtype == torch.int8:
        return deep_gemm.transpose_packed_fp4(data), sf.t()
    return data.t().contiguous(), sf.t()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("form", ["float32", "packed"])
def test_dense_layouts(
    device: torch.device, config: tuple[int, int, bool, bool], layout: str, form: str
) -> None:
    """Both names, D strided, in both dtypes, with C and without."""
    for out_dtype, accumulate in ((BF16, False), (FP32, True)):
        problem = Problem(device, 48, 80, 256, config, form, out_dtype, accumulate)
        a = transposed(problem.a) if layout[0] == "t" else problem.a
        b = transposed(problem.b) if layout[1] == "n" else problem.b
        for name in (f"fp8_fp4_gemm_{layout}", f"fp8_gemm_{layout}"):
            wide = torch.full((48, 85), 7.0, device=device, dtype=out_dtype)
            problem.d = wide[:, 3:83]
            getattr(deep_gemm, name)(a, b, problem.d, problem.c, **problem.options)
            problem.check()
            assert (wide[:, :3] == 7).all()
            assert (wide[:, 83:] == 7).all()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form_a", SCALE_FORMS)
@pytest.mark.parametrize("form_b", SCALE_FORMS)
def test_scale_forms_of_both_operands(
    device: torch.device, config: tuple[int, int, bool, bool], form_a: str, form_b: str
) -> None:
    """Any two: the engines have packed weights, and activations as they come."""
    for accumulate in (False, True):
        problem = Problem(device, 33, 72, 384, config, form_a, BF16, accumulate, form_b)
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, problem.c, **problem.options)
        problem.check()


@pytest.mark.parametrize("config", CONFIGS)
def test_dense_mn_major_operands(device: torch.device, config: tuple[int, int, bool, bool]) -> None:
    """`nt` with data that is contiguous along the rows."""
    problem = Problem(device, 96, 160, 256, config)
    (a, sfa), (b, sfb) = problem.a, problem.b
    a, b = (transposed((data, data))[0].t() for data in (a, b))
    deep_gemm.fp8_gemm_nt((a, sfa), (b, sfb), problem.d, **problem.options)
    problem.check()


def test_dense_what_deep_gemm_gets_wrong(device: torch.device) -> None:
    """C with few tiles, narrow N, a strided D, empty sizes, scales that are no powers of two."""
    config = (128, 128, False, False)
    for m, n, k in [(8, 8, 4096), (3, 24, 1024), (64, 16, 256), (1, 1, 128), (5, 33, 128)]:
        problem = Problem(device, m, n, k, config, accumulate=True)
        wide = torch.full((m, n + 13), 7.0, device=device, dtype=BF16)
        deep_gemm.fp8_gemm_nt(
            problem.a, problem.b, wide[:, 5 : 5 + n], problem.c, **problem.options
        )
        problem.d = wide[:, 5 : 5 + n]
        problem.check_exactly()
        assert (wide[:, :5] == 7).all()
        assert (wide[:, 5 + n :] == 7).all()
    for m, n in [(0, 128), (128, 0)]:
        problem = Problem(device, m, n, 128, config)
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d)
    nothing = Problem(device, 8, 64, 0, config, accumulate=True)
    deep_gemm.fp8_gemm_nt(nothing.a, nothing.b, nothing.d, nothing.c, **nothing.options)
    assert nothing.c is not None
    assert torch.equal(nothing.d, nothing.c)
    deep_gemm.fp8_gemm_nt(nothing.a, nothing.b, nothing.d, **nothing.options)
    assert (nothing.d == 0).all()
    problem = Problem(device, 8, 128, 128, config)
    bad = problem.a[0], problem.a[1] * 1.5
    with refused("sm120_ops.deep_gemm.fp8_fp4_gemm_nt: sfa: expected float32 scales that are pow"):
        deep_gemm.fp8_gemm_nt(bad, problem.b, problem.d)
    c = problem.d
    calls: list[Any] = [
        lambda a: deep_gemm.fp8_gemm_nt(a, problem.b, problem.d),
        lambda a: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, problem.b, problem.d, problem.d),
        lambda a: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, problem.b, c, [], c),
    ]
    for call in calls:
        for operand, text in (
            (problem.a[0], "a: expected a pair .data, scale., got Tensor"),
            ((problem.a[0], None), "sfa: expected a torch.Tensor, got NoneType"),
        ):
            with refused(text, TypeError):
                call(operand)
    with refused("sm120_ops.deep_gemm.fp8_fp4_gemm_nt: alpha: expected None"):
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, alpha=2.0)
    with refused("expected recipe, or recipe_a and recipe_b"):
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, recipe_a=(1, 128))
    with refused("expected recipe, or recipe_a and recipe_b"):
        both: dict[str, Any] = {"recipe_a": (1, 128), "recipe_b": (128, 128)}
        deep_gemm.fp8_gemm_nt(problem.a, problem.b, problem.d, recipe=(1, 128, 128), **both)
    a = quantised(torch.randn(8, 128, device=device), 32, False)
    with refused(r"sfb: expected shape \[4, 4\] \(gran_mn 32, gran_k 32\), got \[1, 1\]"):
        deep_gemm.fp8_gemm_nt(a, problem.b, problem.d, recipe=(1, 32, 32))


def test_dense_recipe_of_three(device: torch.device) -> None:
    """(1, 32, 32) as SGLang has it for 32 x 32 blocks, and (1, 1, 128)."""
    x, w = (torch.randn(s, 256, device=device) for s in (40, 96))
    d = torch.empty(40, 96, device=device, dtype=BF16)
    for recipe, b in (
        ((1, 32, 32), deep_gemm.per_block_cast_to_fp8(w, True, 32)),
        ((1, 1, 128), deep_gemm.per_token_cast_to_fp8(w, True, 128)),
        ((1, 1, 32), deep_gemm.per_token_cast_to_fp8(w, True, 32)),
    ):
        a = deep_gemm.per_token_cast_to_fp8(x, True, recipe[2])
        for form in SCALE_FORMS:
            for_a, for_b = (1, recipe[2]), (recipe[1], recipe[2])
            deep_gemm.fp8_gemm_nt(
                (a[0], as_form(a[1], form, 40, for_a)),
                (b[0], as_form(b[1], form, 96, for_b)),
                d,
                recipe=recipe,
                compiled_dims="",
                disable_ue8m0_cast=form == "packed",
            )
            assert calc_diff(d, x @ w.t()) < 1e-3


@pytest.mark.parametrize("splits", [(128, 64, 128), (64, 32, 0), (0, 8, 16), (3, 5, 1)])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("form", SCALE_FORMS)
def test_skip_head_mid(
    device: torch.device, splits: tuple[int, int, int], out_dtype: torch.dtype, form: str
) -> None:
    """With the default recipe, and with others by (gran_mn of A, gran_mn of B, gran_k)."""
    left, mid, right = splits
    heads, k = 4, 2048
    for config, recipe in (
        ((128, 128, False, False), None),
        ((32, 32, False, False), (1, 32, 32)),
        ((32, 32, True, True), (1, 1, 32)),
    ):
        problem = Problem(device, 24, heads * (left + right), k, config, form)
        d = torch.full((24, heads * sum(splits)), 7.0, device=device, dtype=out_dtype)
        deep_gemm.fp8_gemm_nt_skip_head_mid(problem.a, problem.b, d, splits, recipe)
        by_head = d.view(24, heads, sum(splits))
        assert (by_head[..., left : left + mid] == 7).all()
        problem.d = torch.cat((by_head[..., :left], by_head[..., left + mid :]), 2).flatten(1)
        problem.check()


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_cublaslt(
    device: torch.device, layout: str, out_dtype: torch.dtype, accumulate: bool
) -> None:
    x, w = (
        torch.randn(40, 256, device=device).to(BF16),
        torch.randn(64, 256, device=device).to(BF16),
    )
    a = x.t().contiguous() if layout[0] == "t" else x
    b = w.t().contiguous() if layout[1] == "n" else w
    c = torch.randn(40, 64, device=device).to(out_dtype) if accumulate else None
    d = torch.empty(40, 64, device=device, dtype=out_dtype)
    getattr(deep_gemm, f"cublaslt_gemm_{layout}")(a, b, d, c)
    assert calc_diff(d, x.float() @ w.float().t() + (0 if c is None else c.float())) < 1e-5


# ---- Under torch.compile ------------------------------------------------------


def test_compiles_without_recompiling(device: torch.device) -> None:
    w = Problem(device, 1, 96, 256, (128, 128, False, False), "packed").b

    def step(x: torch.Tensor) -> torch.Tensor:
        data, sf = sm120_ops.quantize(x, "mxfp8", 128)
        d = torch.empty(x.shape[0], 96, device=x.device, dtype=BF16)
        deep_gemm.fp8_gemm_nt((data, sf), w, d)
        return d * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 3, 64, 17):
            x = torch.randn(rows, 256, device=device)
            assert torch.equal(compiled(x), step(x))


# ---- BF16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bf16(device: torch.device, layout: str, out_dtype: torch.dtype, accumulate: bool) -> None:
    for m, n, k in [(1, 256, 512), (96, 16, 384), (128, 264, 256)]:
        x, w = (torch.randn(rows, k, device=device).to(BF16) for rows in (m, n))
        a = x.t().contiguous() if layout[0] == "t" and m % 8 == 0 else x
        a = x.t() if layout[0] == "t" and m % 8 != 0 else a
        b = w.t().contiguous() if layout[1] == "n" else w
        c = torch.randn(m, n, device=device).to(out_dtype) if accumulate else None
        wide = torch.full((m, n + 8), 7.0, device=device, dtype=out_dtype)
        d = wide[:, :n]
        getattr(deep_gemm, f"bf16_gemm_{layout}")(a, b, d, c)
        wanted = x.double() @ w.double().t() + (0 if c is None else c.double())
        assert calc_diff(d, wanted) < 1e-5
        assert (wide[:, n:] == 7).all()
        if c is not None:
            getattr(deep_gemm, f"bf16_gemm_{layout}")(a, b, c, c)
            assert torch.equal(c, d)
    with refused(f"bf16_gemm_{layout}: epilogue: expected None"):
        getattr(deep_gemm, f"bf16_gemm_{layout}")(a, b, d, epilogue=1)
