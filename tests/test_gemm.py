"""gemm against float64 over dequantised operands: formats, scale forms, layouts, C, head splits."""

from __future__ import annotations

import itertools
from typing import Any

import gemm_configs
import pytest
import reference
import torch
from reference import FP4, FP8, Operand, assert_gemm_close, random_operand

import sm120_ops

PAIRS = list(itertools.product((FP8, FP4), (FP8, FP4)))
GRANS = list(itertools.product((32, 128), (32, 128)))
OUT_DTYPES = (torch.bfloat16, torch.float32)


def generator_for(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def operands(
    device: torch.device,
    m: int,
    n: int,
    k: int,
    fmt_a: str = FP8,
    fmt_b: str = FP8,
    gran_k_a: int = 32,
    gran_k_b: int = 32,
) -> tuple[Operand, Operand]:
    generator = generator_for(device, m + n + k)
    return (
        random_operand(m, k, fmt_a, gran_k_a, generator),
        random_operand(n, k, fmt_b, gran_k_b, generator),
    )


def run(a: Operand, b: Operand, **options: Any) -> torch.Tensor:
    return sm120_ops.gemm(
        a.pair,
        b.pair,
        gran_k_a=a.gran_k,
        gran_k_b=b.gran_k,
        **options,
    )


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize(("gran_k_a", "gran_k_b"), GRANS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_formats_and_granularities(
    device: torch.device,
    fmt_a: str,
    fmt_b: str,
    gran_k_a: int,
    gran_k_b: int,
    out_dtype: torch.dtype,
) -> None:
    for m, n, k in [(1, 1, 32), (5, 40, 96), (64, 130, 544), (150, 65, 288)]:
        a, b = operands(device, m, n, k, fmt_a, fmt_b, gran_k_a, gran_k_b)
        assert_gemm_close(run(a, b, out_dtype=out_dtype), a.values, b.values)


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize("gran_k", [32, 128])
def test_gpt_oss_k(device: torch.device, fmt_a: str, fmt_b: str, gran_k: int) -> None:
    """K = 2880 ends inside a group of 128 and inside every larger tile."""
    for m in (3, 100):
        a, b = operands(device, m, 72, 2880, fmt_a, fmt_b, gran_k, gran_k)
        assert_gemm_close(run(a, b, out_dtype=torch.float32), a.values, b.values)


@pytest.mark.parametrize("k", [16, 48, 80, 112, 144, 1040])
@pytest.mark.parametrize(("gran_k_a", "gran_k_b"), GRANS)
def test_fp8_k_by_16(device: torch.device, k: int, gran_k_a: int, gran_k_b: int) -> None:
    a, b = operands(device, 20, 24, k, FP8, FP8, gran_k_a, gran_k_b)
    assert_gemm_close(run(a, b, out_dtype=torch.float32), a.values, b.values)


def products(codes_a: torch.Tensor, codes_b: torch.Tensor) -> torch.Tensor:
    return codes_a[:, None] * codes_b[None, :]


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_product_of_every_pair_of_codes(device: torch.device, fmt_a: str, fmt_b: str) -> None:
    """One value a row, at each k in turn of a 64-block: D is the table of all products, exact."""

    def one_hot(fmt: str, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = 256 if fmt == FP8 else 16
        codes = torch.zeros(count, 64, dtype=torch.uint8)
        codes[:, position] = torch.arange(count)
        table = reference.E4M3 if fmt == FP8 else reference.E2M1
        if fmt == FP8:
            return codes.view(torch.float8_e4m3fn).to(device), table
        return (codes[:, ::2] | codes[:, 1::2] << 4).to(device), table

    for position in range(64):
        data_a, table_a = one_hot(fmt_a, position)
        data_b, table_b = one_hot(fmt_b, position)
        ones_a = torch.full((len(data_a), 2), 127, dtype=torch.uint8, device=device)
        ones_b = torch.full((len(data_b), 2), 127, dtype=torch.uint8, device=device)
        d = sm120_ops.gemm((data_a, ones_a), (data_b, ones_b), out_dtype=torch.float32)
        expected = products(table_a, table_b).float().to(device)
        torch.testing.assert_close(d, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize(("gran_k_a", "gran_k_b"), GRANS)
def test_every_pair_of_scales(
    device: torch.device, fmt_a: str, fmt_b: str, gran_k_a: int, gran_k_b: int
) -> None:
    """D[i, j] = 2^(i - 127) 2^(j - 127), exact wherever float32 has it as a normal number."""

    def ones(fmt: str, gran_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.zeros(256, 128, dtype=torch.uint8)
        codes[:, 100] = 0x38 if fmt == FP8 else 2  # 1.0
        data = (
            codes.view(torch.float8_e4m3fn) if fmt == FP8 else codes[:, ::2] | codes[:, 1::2] << 4
        )
        scales = torch.full((256, 128 // gran_k), 127, dtype=torch.uint8)
        scales[:, 100 // gran_k] = torch.arange(256)
        return data.to(device), scales.to(device)

    d = sm120_ops.gemm(ones(fmt_a, gran_k_a), ones(fmt_b, gran_k_b), out_dtype=torch.float32).cpu()
    expected = products(reference.UE8M0, reference.UE8M0)
    normal = (expected >= 2.0**-126) & (expected <= 2.0**127)
    assert torch.equal(d[normal].double(), expected[normal])
    assert d[255].isnan().all()
    assert d[:, 255].isnan().all()
    assert not d[:255, :255].isnan().any()


def test_a_nan_scale_poisons_its_row_only(device: torch.device) -> None:
    a, b = operands(device, 40, 50, 256)
    scales = a.bytes.clone()
    scales[7, 3] = 255
    d = sm120_ops.gemm((a.data, scales), b.pair, out_dtype=torch.float32)
    assert d[7].isnan().all()
    clean = run(a, b, out_dtype=torch.float32)
    keep = torch.arange(40, device=device) != 7
    assert torch.equal(d[keep], clean[keep])


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_scale_forms_give_the_same(device: torch.device, fmt_a: str, fmt_b: str) -> None:
    for gran_k_a, gran_k_b in GRANS:
        a, b = operands(device, 37, 50, 288, fmt_a, fmt_b, gran_k_a, gran_k_b)
        d = run(a, b)
        forms_a = [
            a.bytes,
            a.bytes.view(torch.float8_e8m0fnu),
            reference.UE8M0.to(device)[a.bytes.long()].float(),
        ]
        forms_b = [
            b.bytes,
            b.bytes.view(torch.float8_e8m0fnu),
            reference.UE8M0.to(device)[b.bytes.long()].float(),
        ]
        for scale_a, scale_b in zip(forms_a, forms_b, strict=True):
            # the granularities follow from the shapes
            assert torch.equal(sm120_ops.gemm((a.data, scale_a), (b.data, scale_b)), d)
        assert torch.equal(sm120_ops.gemm(a.pair, (b.data, forms_b[2]), gran_k_a=gran_k_a), d)
        for storage in (torch.int8, torch.float4_e2m1fn_x2):
            data_a = a.data.view(storage) if fmt_a == FP4 else a.data
            data_b = b.data.view(storage) if fmt_b == FP4 else b.data
            assert torch.equal(sm120_ops.gemm((data_a, a.bytes), (data_b, b.bytes)), d)


@pytest.mark.parametrize("gran", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_block_scales(device: torch.device, gran: int, dtype: torch.dtype) -> None:
    a, b = operands(device, 70, 300, 416, FP8, FP8, gran, gran)
    blocks = b.bytes[::gran].contiguous()  # one scale for `gran` rows
    per_row = blocks.repeat_interleave(gran, 0)[:300]
    exact = reference.values_of(b.codes, per_row, FP8, gran)
    scale = blocks if dtype == torch.uint8 else reference.UE8M0.to(device)[blocks.long()].float()
    d = sm120_ops.gemm(a.pair, (b.data, scale), gran_k_a=gran, out_dtype=torch.float32)
    assert_gemm_close(d, a.values, exact)
    transposed = (b.data.t().contiguous(), scale.t().contiguous())
    assert torch.equal(
        sm120_ops.gemm_nn(a.pair, transposed, gran_k_a=gran, out_dtype=torch.float32), d
    )


def transpose(operand: Operand, packed_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The operand as [K, rows], FP4 packed along the rows."""
    if operand.fmt == FP8:
        data = operand.data.t().contiguous()
    else:
        codes = operand.codes.t()
        data = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
    return data, operand.scale if packed_scale else operand.bytes.t().contiguous()


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize("packed", [True, False])
def test_layouts(device: torch.device, fmt_a: str, fmt_b: str, packed: bool) -> None:
    a, b = operands(device, 38, 52, 288, fmt_a, fmt_b, 32, 128)
    d = run(a, b)
    grans: dict[str, Any] = {"gran_k_a": 32, "gran_k_b": 128}
    at, bt = transpose(a, packed), transpose(b, packed)
    assert torch.equal(sm120_ops.gemm_nn(a.pair, bt, **grans), d)
    assert torch.equal(sm120_ops.gemm_tn(at, bt, **grans), d)
    assert torch.equal(sm120_ops.gemm_tt(at, b.pair, **grans), d)
    assert torch.equal(sm120_ops.gemm(at, b.pair, layout="tt", **grans), d)
    if fmt_b == FP8:  # a [K, N] view of K-major data needs no pass
        assert torch.equal(sm120_ops.gemm_nn(a.pair, (b.data.t(), b.scale), **grans), d)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 70, 128), (70, 33, 96), (130, 260, 2048)])
def test_c(device: torch.device, out_dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b = operands(device, m, n, k)
    size = a.values.abs().mean() * b.values.abs().mean() * k**0.5
    wide = torch.randn(m, n + 11, generator=generator_for(device), device=device) * size
    wide = wide.to(out_dtype)
    row = wide[:1, :n].clone()
    for c in (wide[:, :n].contiguous(), wide[:, 3 : n + 3], row.expand(m, n)):
        d = run(a, b, c=c)
        assert d.dtype == out_dtype
        assert_gemm_close(d, a.values, b.values, c)
        out = torch.full((m, n), torch.nan, dtype=out_dtype, device=device)
        assert torch.equal(run(a, b, c=c, out=out), d)
    in_place = wide[:, :n].clone()
    expected = run(a, b, c=in_place)
    assert torch.equal(run(a, b, c=in_place, out=in_place), expected)
    sliced = wide.clone()
    run(a, b, c=sliced[:, 5 : n + 5], out=sliced[:, 5 : n + 5])
    assert torch.equal(sliced[:, 5 : n + 5], run(a, b, c=wide[:, 5 : n + 5]))
    assert torch.equal(sliced[:, :5], wide[:, :5])
    assert torch.equal(sliced[:, n + 5 :], wide[:, n + 5 :])


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("left", [0, 1, 5, 8])
@pytest.mark.parametrize("right", [0, 3, 8])
def test_strided_out(device: torch.device, out_dtype: torch.dtype, left: int, right: int) -> None:
    for m, n, k in [(1, 1, 32), (4, 37, 64), (66, 129, 512)]:
        a, b = operands(device, m, n, k)
        buffer = torch.full((m + 2, left + n + right), 77.0, dtype=out_dtype, device=device)
        out = buffer[1:-1, left : left + n]
        out.fill_(torch.nan)
        assert run(a, b, out=out) is out
        assert_gemm_close(out, a.values, b.values)
        buffer[1:-1, left : left + n] = 77.0
        assert (buffer == 77.0).all()


def split_columns(n: int, splits: tuple[int, int, int]) -> tuple[list[int], int]:
    """Where each product column goes, and the columns of D; the slow, plain way."""
    left, mid, right = splits
    columns = []
    for column in range(n):
        head, rest = divmod(column, left + right)
        columns.append(head * (left + mid + right) + (rest if rest < left else rest + mid))
    return columns, n // (left + right) * (left + mid + right)


SPLITS = [(128, 64, 64), (8, 4, 8), (1, 1, 0), (0, 3, 5), (24, 0, 8), (5, 7, 2), (7, 2, 0)]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(("gran_k_a", "gran_k_b"), [(32, 32), (128, 128), (128, 32)])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_head_splits(
    device: torch.device,
    splits: tuple[int, int, int],
    gran_k_a: int,
    gran_k_b: int,
    out_dtype: torch.dtype,
) -> None:
    for m, heads, k, fmt in [(3, 2, 128, FP8), (65, 3, 288, FP4), (20, 1, 2048, FP8)]:
        n = heads * (splits[0] + splits[2])
        a, b = operands(device, m, n, k, FP8, fmt, gran_k_a, gran_k_b)
        columns, width = split_columns(n, splits)
        d = run(a, b, head_splits=splits, out_dtype=out_dtype)
        assert d.shape == (m, width)
        assert_gemm_close(d[:, columns], a.values, b.values)
        middle = [column for column in range(width) if column not in set(columns)]
        assert (d[:, middle] == 0).all()
        buffer = torch.full((m, width + 3), 77.0, dtype=out_dtype, device=device)
        run(a, b, head_splits=splits, out=buffer[:, :width])
        assert torch.equal(buffer[:, columns], d[:, columns])
        assert (buffer[:, [*middle, width, width + 1, width + 2]] == 77.0).all()
        c = torch.randn(m, width, device=device).to(out_dtype)
        with_c = run(a, b, head_splits=splits, c=c)
        assert_gemm_close(with_c[:, columns], a.values, b.values, c[:, columns])
        in_place = c.clone()
        run(a, b, head_splits=splits, c=in_place, out=in_place)
        assert torch.equal(in_place[:, columns], with_c[:, columns])
        assert torch.equal(in_place[:, middle], c[:, middle])


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_empty(device: torch.device, fmt_a: str, fmt_b: str) -> None:
    for m, n, k in [(0, 40, 64), (7, 0, 64), (0, 0, 64)]:
        a, b = operands(device, m, n, k, fmt_a, fmt_b)
        assert run(a, b).shape == (m, n)
        assert run(a, b, head_splits=(4, 2, 4)).shape == (m, n // 8 * 10)
    a, b = operands(device, 7, 40, 0, fmt_a, fmt_b)
    assert torch.equal(run(a, b), torch.zeros(7, 40, dtype=torch.bfloat16, device=device))
    c = torch.randn(7, 40, device=device)
    assert torch.equal(run(a, b, c=c), c)
    out = torch.full((7, 50), 77.0, device=device)
    run(a, b, head_splits=(4, 2, 4), out=out)
    columns, _ = split_columns(40, (4, 2, 4))
    assert (out[:, columns] == 0).all()
    assert (out.sum() == 7 * 10 * 77).all()


@pytest.mark.parametrize("padding", [16, 48, 4096])
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_operand_row_strides(device: torch.device, padding: int, fmt_a: str, fmt_b: str) -> None:
    for m, n, k in [(1, 40, 64), (33, 70, 320)]:
        generator = generator_for(device)
        a = random_operand(m, k, fmt_a, 32, generator, row_padding=padding)
        b = random_operand(n, k, fmt_b, 32, generator, row_padding=padding)
        assert_gemm_close(run(a, b, out_dtype=torch.float32), a.values, b.values)


@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_stride_of_a_single_row_is_free(device: torch.device, fmt: str) -> None:
    generator = generator_for(device)
    a = random_operand(1, 320, fmt, 32, generator, row_padding=5)
    b = random_operand(40, 320, fmt, 32, generator)
    assert_gemm_close(run(a, b, out_dtype=torch.float32), a.values, b.values)
    assert_gemm_close(run(b, a, out_dtype=torch.float32), b.values, a.values)


@pytest.mark.parametrize(
    ("fmt_a", "fmt_b", "bound"),
    [(FP8, FP8, 1e-3), (FP8, FP4, 1e-2), (FP4, FP8, 1e-2), (FP4, FP4, 2e-2)],
)
def test_against_the_unquantised_product(
    device: torch.device, fmt_a: str, fmt_b: str, bound: float
) -> None:
    generator = generator_for(device)
    x = torch.randn(128, 1024, generator=generator, device=device).bfloat16()
    w = torch.randn(256, 1024, generator=generator, device=device).bfloat16()
    for gran_k, gran_mn in [(32, 1), (128, 1), (128, 128)]:
        if FP4 in (fmt_a, fmt_b) and gran_k == 128:
            continue  # FP4 with coarse scales is less exact than the bound
        a = sm120_ops.quantize(x, fmt_a, gran_k)
        b = sm120_ops.quantize(w, fmt_b, gran_k, gran_mn)
        d = sm120_ops.gemm(a, b)
        assert reference.calc_diff(d, x.double() @ w.double().t()) <= bound


def test_opcheck(device: torch.device) -> None:
    for fmt_a, fmt_b in PAIRS:
        a, b = operands(device, 36, 40, 288, fmt_a, fmt_b)
        args = (a.data, a.scale, b.data, b.scale, 32, 32)
        reference.opcheck(torch.ops.sm120.gemm.default, (*args, torch.bfloat16))
        c = torch.randn(36, 60, device=device)
        options = {"c": c, "head_splits": [4, 4, 4]}
        reference.opcheck(torch.ops.sm120.gemm.default, (*args, torch.float32), options)
        reference.opcheck(torch.ops.sm120.gemm.out, args, {"out": c[:, :40].contiguous()})
        reference.opcheck(torch.ops.sm120.gemm.out, args, {**options, "out": torch.zeros_like(c)})


# Each tile, orientation and schedule at sizes that compute-sanitizer gets through: ragged in every
# dimension, and with more tiles or K-blocks than one.
@pytest.mark.sanitizer
@pytest.mark.usefixtures("filled_allocations")
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize("gran_k", [32, 128])
def test_sanitizer_gemm(fmt_a: str, fmt_b: str, gran_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for m, n, k in [(133, 140, 544), (5, 24, 96)]:
        a = random_operand(m, k, fmt_a, gran_k, generator)
        b = random_operand(n, k, fmt_b, gran_k, generator)
        on_gpu = a.to("cuda"), b.to("cuda")
        for config in gemm_configs.legal_configs(fmt_a, fmt_b, k):
            out = torch.zeros(m, n, device="cuda")
            gemm_configs.run_forced(*on_gpu, out, config, c=out)
            assert_gemm_close(out.cpu(), a.values, b.values)
    out = torch.zeros(5, 30, dtype=torch.bfloat16, device="cuda")
    run(*on_gpu, out=out, head_splits=(6, 2, 2))
    torch.cuda.synchronize()
