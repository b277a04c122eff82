"""``demo --ops``: each op once, on small random data, with its error against FP32."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from sm120_ops._console import make_console, step

# Relative error allowed against the unquantised data. One rounding of normal data to e4m3 errs by
# 2.7 %, to e2m1 by 11 % to 14 % (by the place of the group's maximum in its binade); a product of
# two quantised operands adds both in quadrature.
FP8_ERROR, FP4_ERROR = 0.035, 0.16
FP8_PRODUCT, MIXED_PRODUCT, FP4_PRODUCT = 0.05, 0.165, 0.22
# FP32 rounding and summation order, where the operands of both sides are equal.
EXACT_PRODUCT = 1e-5
BF16_PRODUCT = 2.0**-8
TF32_PRODUCT = 2.0**-11  # one operand rounded to 10 mantissa bits


@dataclasses.dataclass(frozen=True)
class TourLine:
    op: str
    data: str
    against: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``want``, in FP64 on the CPU."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    return ((got - want).norm() / want.norm()).item()


def mismatch(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of the elements that differ; NaN where the shapes do."""
    if got.shape != want.shape:
        return float("nan")
    return (got.cpu() != want.cpu()).double().mean().item()


def op_tour(device: torch.device) -> Iterator[TourLine]:
    """Runs every op once. Random data is drawn on the CPU, so that all devices see the same."""
    import sm120_ops as ops

    generator = torch.Generator().manual_seed(120)
    M, N, K = 48, 96, 512

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device)

    x, w = normal(M, K), normal(N, K)
    product = x.double() @ w.double().T

    for fmt, gran_k, gran_mn, rule, what in (
        ("mxfp8", 32, 1, "ocp", "per token, OCP rule"),
        ("mxfp8", 128, 1, "deepgemm", "per token"),
        ("mxfp8", 128, 128, "deepgemm", "per 128x128 block"),
        ("mxfp4", 32, 1, "deepgemm", "per token"),
    ):
        data, scale = ops.quantize(x, fmt, gran_k, gran_mn, rule)
        restored = ops.dequantize(data, scale, gran_k, dtype=torch.float32)
        allowed = FP8_ERROR if fmt == "mxfp8" else FP4_ERROR
        yield TourLine(
            "quantize, dequantize",
            f"[{M}, {K}] bf16 -> {fmt}, gran_k {gran_k}, {what}",
            "input",
            relative_error(restored, x),
            allowed,
        )

    data, scale = ops.quantize(w.T.contiguous().T, "mxfp8", 32)
    yield TourLine(
        "quantize",
        f"[{N}, {K}] of a transposed view, per channel",
        "row-major",
        mismatch(data.view(torch.uint8), ops.quantize(w, "mxfp8", 32)[0].view(torch.uint8)),
        0.0,
    )

    as_float = ops.unpack_scales(scale, K // 32, torch.float32)
    yield TourLine(
        "pack_scales, unpack_scales",
        f"[{N}, {K // 32}] packed -> fp32 -> packed",
        "round trip",
        mismatch(ops.pack_scales(as_float), scale),
        0.0,
    )

    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8).to(device)
    packed = ops.pack_fp4(codes)
    yield TourLine(
        "pack_fp4, unpack_fp4",
        f"[{N}, {K}] codes",
        "round trip",
        mismatch(ops.unpack_fp4(packed), codes),
        0.0,
    )
    yield TourLine(
        "transpose_fp4",
        f"[{N}, {K}] packed -> [{K}, {N}]",
        "codes",
        mismatch(ops.unpack_fp4(ops.transpose_fp4(packed)), codes.T),
        0.0,
    )

    for a_format, b_format, gran_a, gran_b, allowed in (
        ("mxfp8", "mxfp8", 128, 128, FP8_PRODUCT),
        ("mxfp8", "mxfp8", 32, 32, FP8_PRODUCT),
        ("mxfp8", "mxfp4", 128, 32, MIXED_PRODUCT),
        ("mxfp4", "mxfp8", 32, 32, MIXED_PRODUCT),
        ("mxfp4", "mxfp4", 32, 32, FP4_PRODUCT),
    ):
        a, b = ops.quantize(x, a_format, gran_a), ops.quantize(w, b_format, gran_b)
        shape = f"{M}x{N}x{K} {a_format} gran {gran_a} x {b_format} gran {gran_b}"
        got = ops.gemm(a, b, gran_k_a=gran_a, gran_k_b=gran_b, out_dtype=torch.float32)
        yield TourLine("gemm", shape, "FP32 product", relative_error(got, product), allowed)
        restored_a = ops.dequantize(*a, gran_a, dtype=torch.float32).double()
        restored_b = ops.dequantize(*b, gran_b, dtype=torch.float32).double()
        exact = restored_a @ restored_b.T
        error = relative_error(got, exact)
        yield TourLine("gemm", shape, "dequantised", error, EXACT_PRODUCT)

    a, b = ops.quantize(x, "mxfp8", 32), ops.quantize(w, "mxfp8", 32)
    plain = ops.gemm(a, b, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32)
    c = normal(M, N)
    added = ops.gemm(a, b, gran_k_a=32, gran_k_b=32, c=c)
    yield TourLine(
        "gemm, C added", f"{M}x{N}x{K}, bf16", "sum", relative_error(added, plain + c), BF16_PRODUCT
    )
    left, mid, right = 16, 8, 16  # every head of 32 columns gets a gap of 8 after its first 16
    split = ops.gemm(
        a, b, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32, head_splits=[left, mid, right]
    )
    heads = plain.view(M, -1, left + right)
    gap = heads.new_zeros(M, heads.shape[1], mid)
    want = torch.cat([heads[..., :left], gap, heads[..., left:]], dim=-1).view(M, -1)
    yield TourLine(
        "gemm, head split",
        f"{M}x{N}x{K}, splits {left}/{mid}/{right}",
        "moved columns",
        relative_error(split, want),
        EXACT_PRODUCT,
    )
    for layout in ("nt", "nn"):
        weight = w if layout == "nt" else w.T.contiguous()
        got = ops.bf16_gemm(x, weight, layout=layout, out_dtype=torch.float32)
        error = relative_error(got, product)
        yield TourLine(
            "bf16_gemm", f"{M}x{N}x{K} bf16, {layout}", "FP64 product", error, EXACT_PRODUCT
        )
    yield from grouped_tour(x, w)
    yield from einsum_lines(normal)
    fn = torch.randn(24, K, generator=generator).to(device)
    d, sqr_sum = ops.hc_prenorm(x, fn, eps=1e-6)
    normed = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-6)
    yield TourLine(
        "hc_prenorm",
        f"{M}x24x{K}, scaled by the norm",
        "FP64 product",
        relative_error(d, normed @ fn.double().T),
        TF32_PRODUCT,
    )
    yield TourLine(
        "hc_prenorm",
        f"{M}x24x{K}, squares",
        "FP64 sum",
        relative_error(sqr_sum, x.double().square().sum(1)),
        EXACT_PRODUCT,
    )


def einsum_lines(normal: Callable[..., torch.Tensor]) -> Iterator[TourLine]:
    """Heads beside one another in a token's row, as attention has them, and a sum over a batch."""
    import sm120_ops as ops

    B, H, R, D = 24, 4, 256, 64
    x, w = normal(B, H, R), normal(H, D, R)
    product = torch.einsum("bhr,hdr->bhd", x.double(), w.double())
    shape = f"bhr,hdr->bhd {B}x{H}x{R}, {H}x{D}x{R}"
    got = ops.einsum("bhr,hdr->bhd", x, w, out_dtype=torch.float32)
    error = relative_error(got, product)
    yield TourLine("einsum", f"{shape} bf16", "FP64 product", error, EXACT_PRODUCT)
    for fmt, allowed in (("mxfp8", FP8_PRODUCT), ("mxfp4", FP4_PRODUCT)):
        pairs = []
        for values in (x, w):
            data, scale = ops.quantize(values.flatten(0, 1), fmt, 32)
            lead = values.shape[:2]
            pairs.append((data.unflatten(0, lead), scale.unflatten(0, lead)))
        got = ops.einsum("bhr,hdr->bhd", *pairs, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32)
        error = relative_error(got, product)
        yield TourLine("einsum", f"{shape} {fmt} gran 32", "FP64 product", error, allowed)
    total = torch.einsum("bmk,bnk->mn", x.double(), x.double())
    got = ops.einsum("bmk,bnk->mn", x, x, out_dtype=torch.float32)
    error = relative_error(got, total)
    yield TourLine("einsum", f"bmk,bnk->mn {B}x{H}x{R} bf16", "FP64 sum", error, EXACT_PRODUCT)


def grouped_tour(x: torch.Tensor, w: torch.Tensor) -> Iterator[TourLine]:
    """Thirds of a projection's rows as experts of their own, one of them without tokens."""
    import sm120_ops as ops

    experts = w.unflatten(0, (3, -1))
    sizes = torch.tensor([x.shape[0] // 3, 0, x.shape[0] - x.shape[0] // 3], dtype=torch.int32)
    ends = sizes.tolist()
    parts = x.split(ends)
    alignment = 16
    indices = torch.cat(
        [
            functional.pad(torch.full((size,), g), (0, -size % alignment), value=-1)
            for g, size in enumerate(ends)
        ]
    ).to(x.device, torch.int32)
    tokens = torch.cat([functional.pad(p, (0, 0, 0, -p.shape[0] % alignment)) for p in parts])
    products = [p.double() @ e.double().T for p, e in zip(parts, experts, strict=True)]
    shape = f"{x.shape[0]}x{experts.shape[1]}x{x.shape[1]} bf16, 3 experts"
    got = ops.bf16_grouped_gemm(
        tokens, experts, indices, alignment=alignment, out_dtype=torch.float32, validate=True
    )
    want = torch.cat(products)
    error = relative_error(got[indices >= 0], want)
    yield TourLine("bf16_grouped_gemm", shape, "FP64 product", error, EXACT_PRODUCT)
    starts = [0, *itertools.accumulate(-(-size // alignment) * alignment for size in ends)]
    group_ends = torch.tensor(
        [start + size for start, size in zip(starts, ends, strict=False)], dtype=torch.int32
    ).to(x.device)
    got = ops.bf16_grouped_gemm_psum(
        tokens, experts, group_ends, alignment=alignment, out_dtype=torch.float32, validate=True
    )
    error = relative_error(got[indices >= 0], want)
    yield TourLine("bf16_grouped_gemm_psum", shape, "FP64 product", error, EXACT_PRODUCT)
    most = max(ends)
    masked = torch.stack([functional.pad(p, (0, 0, 0, most - p.shape[0])) for p in parts])
    on_device = sizes.to(x.device)
    got = ops.bf16_grouped_gemm_masked(masked, experts, on_device, out_dtype=torch.float32)
    error = relative_error(torch.cat([d[:n] for d, n in zip(got, ends, strict=True)]), want)
    yield TourLine("bf16_grouped_gemm_masked", shape, "FP64 product", error, EXACT_PRODUCT)
    # Gradients of the experts' weights, were the products their own gradients.
    y = want.bfloat16()
    got = ops.bf16_k_grouped_gemm(y, x, on_device, out_dtype=torch.float32)
    gradients = torch.stack(
        [p.double().T @ q.double() for p, q in zip(y.split(ends), parts, strict=True)]
    )
    error = relative_error(got, gradients)
    yield TourLine("bf16_k_grouped_gemm", shape, "FP64 product", error, EXACT_PRODUCT)


@torch.no_grad()
def print_op_tour(device: torch.device) -> int:
    from rich.table import Table

    table = Table(title=f"op tour on {device}")
    for heading in ("op", "data", "against"):
        table.add_column(heading)
    for heading in ("relative error", "allowed", ""):
        table.add_column(heading, justify="right")
    with step("running each op once"):
        lines = list(op_tour(device))
    for line in lines:
        table.add_row(
            line.op,
            line.data,
            line.against,
            "exact" if line.error == 0 else f"{line.error:.2e}",
            "exact" if line.allowed == 0 else f"{line.allowed:.2e}",
            "ok" if line.ok else "FAIL",
        )
    make_console().print(table)
    return 0 if all(line.ok for line in lines) else 1
