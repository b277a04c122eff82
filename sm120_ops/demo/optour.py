"""``demo --ops``: each op, with its error against a float reference.

The data is one layer of the demo's model on its sentences, or random where there is no model
(tourdata.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from sm120_ops._console import make_console, step
from sm120_ops.demo.tourdata import EXPERTS, TourData

# Relative error allowed against the unquantised data. One rounding to e4m3 errs by
# 2.7 %, to e2m1 by 11 % to 15 % (by the place of the group's maximum in its binade); a product of
# two quantised operands adds both in quadrature.
FP8_ERROR, FP4_ERROR = 0.035, 0.17
FP8_PRODUCT, MIXED_PRODUCT, FP4_PRODUCT = 0.05, 0.165, 0.22
FP8_LAYER = 0.1  # two products and the activation between them
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


def op_tour(data: TourData) -> Iterator[TourLine]:
    """Runs every op."""
    yield from quantize_tour(data)
    yield from gemm_tour(data)
    yield from grouped_tour(data)
    yield from einsum_tour(data)
    yield from prenorm_tour(data)
    yield from moe_tour(data)
    yield from indexer_tour(data)


def quantize_tour(tour: TourData) -> Iterator[TourLine]:
    import sm120_ops as ops

    x, w = tour.x, tour.up
    (M, K), N = x.shape, w.shape[0]

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

    packed, _ = ops.quantize(w, "mxfp4", 32)
    codes = ops.unpack_fp4(packed)
    yield TourLine(
        "pack_fp4, unpack_fp4",
        f"[{N}, {K}] codes",
        "round trip",
        mismatch(ops.pack_fp4(codes), packed),
        0.0,
    )
    yield TourLine(
        "transpose_fp4",
        f"[{N}, {K}] packed -> [{K}, {N}]",
        "codes",
        mismatch(ops.unpack_fp4(ops.transpose_fp4(packed)), codes.T),
        0.0,
    )


def gemm_tour(tour: TourData) -> Iterator[TourLine]:
    """The FFN's first product."""
    import sm120_ops as ops

    x, w = tour.x, tour.up
    (M, K), N = x.shape, w.shape[0]
    product = x.double() @ w.double().T
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
    bias = tour.up_bias.expand(M, N)
    added = ops.gemm(a, b, gran_k_a=32, gran_k_b=32, c=bias)
    error = relative_error(added, plain + bias)
    yield TourLine("gemm, C added", f"{M}x{N}x{K}, a bias, bf16", "sum", error, BF16_PRODUCT)
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


def prenorm_tour(tour: TourData) -> Iterator[TourLine]:
    """Outputs of the FFN's second product, as many as the op has columns for."""
    import sm120_ops as ops

    x, fn = tour.neurons, tour.down[: min(tour.down.shape[0], 128) // 8 * 8]
    shape = f"{x.shape[0]}x{fn.shape[0]}x{x.shape[1]}"
    squares = x.double().square()
    normed = x.double() * torch.rsqrt(squares.mean(1, keepdim=True) + 1e-6)
    for what, eps, values in (("", None, x.double()), (", scaled by the norm", 1e-6, normed)):
        d, sqr_sum = ops.hc_prenorm(x, fn, eps=eps)
        error = relative_error(d, values @ fn.double().T)
        yield TourLine("hc_prenorm", shape + what, "FP64 product", error, TF32_PRODUCT)
    error = relative_error(sqr_sum, squares.sum(1))
    yield TourLine("hc_prenorm", f"{shape}, squares", "FP64 sum", error, EXACT_PRODUCT)


def einsum_tour(tour: TourData) -> Iterator[TourLine]:
    """The attention's output projection: a product for each head, and their sum."""
    import sm120_ops as ops

    x, w = tour.heads, tour.out
    (B, H, R), D = x.shape, w.shape[1]
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
    # All heads at once; the tokens' rows lie as attention left them.
    got = ops.einsum("hbr,hdr->bd", x.transpose(0, 1), w, out_dtype=torch.float32)
    error = relative_error(got, product.sum(1))
    yield TourLine("einsum", f"hbr,hdr->bd {B}x{H}x{R} bf16", "FP64 sum", error, EXACT_PRODUCT)


def _pairs(values: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised matrices [groups, rows, K]."""
    import sm120_ops as ops

    data, scale = ops.quantize(values.flatten(0, 1), fmt, 32)
    return data.unflatten(0, values.shape[:2]), scale.unflatten(0, values.shape[:2])


def grouped_tour(tour: TourData) -> Iterator[TourLine]:
    """Thirds of the FFN's neurons as experts of their own, one of them without tokens."""
    import sm120_ops as ops

    x = tour.x
    experts = tour.up[: tour.up.shape[0] // (8 * EXPERTS) * 8 * EXPERTS].unflatten(0, (EXPERTS, -1))
    third = x.shape[0] // 3
    sizes = [third, 0, x.shape[0] - third]
    parts = x.split(sizes)
    alignment = 16
    indices = torch.cat(
        [
            functional.pad(torch.full((size,), g), (0, -size % alignment), value=-1)
            for g, size in enumerate(sizes)
        ]
    ).to(x.device, torch.int32)
    padded = [functional.pad(p, (0, 0, 0, -p.shape[0] % alignment)) for p in parts]
    tokens = torch.cat(padded)
    starts = [0, *itertools.accumulate(-(-size // alignment) * alignment for size in sizes)]
    ends = [start + size for start, size in zip(starts, sizes, strict=False)]
    most = -(-max(sizes) // 4) * 4  # scales of a group are at multiples of 16 bytes
    masked = torch.stack([functional.pad(p, (0, 0, 0, most - p.shape[0])) for p in parts])
    on_device = torch.tensor(sizes, dtype=torch.int32, device=x.device)
    group_ends = torch.tensor(ends, dtype=torch.int32, device=x.device)
    want = torch.cat([p.double() @ e.double().T for p, e in zip(parts, experts, strict=True)])
    shape = f"{x.shape[0]}x{experts.shape[1]}x{x.shape[1]}, {EXPERTS} experts"

    for fmt, allowed in (
        ("bf16", EXACT_PRODUCT), ("mxfp8", FP8_PRODUCT), ("mxfp4", FP4_PRODUCT)
    ):  # fmt: skip
        name = "bf16_grouped_gemm" if fmt == "bf16" else "grouped_gemm"
        a, b, per_group = (
            (tokens, experts, masked)
            if fmt == "bf16"
            else (ops.quantize(tokens, fmt, 32), _pairs(experts, fmt), _pairs(masked, fmt))
        )
        grans = {} if fmt == "bf16" else {"gran_k_a": 32, "gran_k_b": 32}
        options: dict[str, Any] = {"out_dtype": torch.float32, "validate": True, **grans}
        for suffix, index in (("", indices), ("_psum", group_ends)):
            op = getattr(ops, name + suffix)
            got = op(a, b, index, alignment=alignment, **options)
            error = relative_error(got[indices >= 0], want)
            yield TourLine(name + suffix, f"{shape}, {fmt}", "FP64 product", error, allowed)
        got = getattr(ops, f"{name}_masked")(per_group, b, on_device, **options)
        got = torch.cat([d[:size] for d, size in zip(got, sizes, strict=True)])
        error = relative_error(got, want)
        yield TourLine(f"{name}_masked", f"{shape}, {fmt}", "FP64 product", error, allowed)

    # Gradients of the experts' weights, were the products their own gradients. The block-scaled
    # op wants whole groups of 16 tokens: zeros, which add nothing, fill them up.
    y = want.bfloat16()
    y_parts = y.split(sizes)
    gradients = torch.stack(
        [p.double().T @ q.double() for p, q in zip(y_parts, parts, strict=True)]
    )
    got = ops.bf16_k_grouped_gemm(y, x, on_device, out_dtype=torch.float32)
    error = relative_error(got, gradients)
    yield TourLine("bf16_k_grouped_gemm", f"{shape}, bf16", "FP64 product", error, EXACT_PRODUCT)
    operands = []
    for groups in (y_parts, parts):
        whole = [functional.pad(p, (0, 0, 0, -p.shape[0] % alignment)).T for p in groups]
        pairs = [ops.quantize(p.contiguous(), "mxfp8", 32) for p in whole]
        data = torch.cat([data.view(torch.uint8).flatten() for data, _ in pairs])
        scales = [ops.unpack_scales(s, -(-p.shape[1] // 32)).T for p, (_, s) in
                  zip(whole, pairs, strict=True)]  # fmt: skip
        operands.append((data.view(torch.float8_e4m3fn), torch.cat(scales).contiguous()))
    ks = torch.tensor([p.shape[0] for p in padded], dtype=torch.int32, device=x.device)
    got = ops.k_grouped_gemm(
        operands[0], operands[1], ks, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32
    )
    error = relative_error(got, gradients)
    yield TourLine("k_grouped_gemm", f"{shape}, mxfp8", "FP64 product", error, FP8_PRODUCT)


def moe_tour(tour: TourData) -> Iterator[TourLine]:
    """Of each third of the FFN's neurons one half gates the other; two experts a token."""
    import sm120_ops as ops
    from sm120_ops.ops.moe_activation import swiglu

    x = tour.x
    inter = tour.up.shape[0] // (2 * EXPERTS) // 16 * 16
    gate_up = tour.up[: EXPERTS * 2 * inter].unflatten(0, (EXPERTS, -1))
    down = tour.down[:, : EXPERTS * inter].unflatten(1, (EXPERTS, -1)).transpose(0, 1).bfloat16()
    first = torch.arange(x.shape[0], device=x.device) % EXPERTS
    ids = torch.stack((first, (first + 1) % EXPERTS), 1)
    weights = torch.tensor([0.75, 0.25], device=x.device).expand(x.shape[0], 2).contiguous()
    want = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for slot in range(2):
        for expert in range(EXPERTS):
            rows = ids[:, slot] == expert
            h = swiglu(x[rows].double() @ gate_up[expert].double().T)
            want[rows] += weights[rows, slot, None].double() * (h @ down[expert].double().T)
    got = ops.moe(x, ids, weights, _pairs(gate_up, "mxfp8"), _pairs(down, "mxfp8"))
    shape = f"{x.shape[0]} tokens, 2 of {EXPERTS} experts {inter}x{x.shape[1]}, mxfp8"
    error = relative_error(got, want)
    yield TourLine("moe", shape, "FP64 layer", error, FP8_LAYER)


def indexer_tour(tour: TourData) -> Iterator[TourLine]:
    """Eight heads' queries against the keys of one head, each token seeing those up to itself."""
    import sm120_ops as ops

    q, k = tour.queries[:, :8].contiguous(), tour.keys
    tokens, heads, width = q.shape
    block = 16
    blocks = -(-tokens // block)
    weights = q.new_ones((tokens, heads), dtype=torch.float32)
    starts = torch.zeros(tokens, dtype=torch.int32, device=q.device)
    ends = starts + torch.arange(1, tokens + 1, dtype=torch.int32, device=q.device)
    sums = torch.einsum("ihd,jd->ijh", q.double(), k.double()).relu().sum(-1)
    seen = torch.arange(tokens, device=q.device) < ends[:, None]
    data, scale = ops.quantize(k, "mxfp8", 128)
    key_scale = ops.unpack_scales(scale, 1, torch.float32).flatten()
    shape = f"{tokens} queries of {heads} heads x {width}, {tokens} keys, fp8"
    q8 = q.to(torch.float8_e4m3fn)
    logits = ops.mqa_logits(q8, (data, key_scale), weights, starts, ends)
    error = relative_error(logits[seen], sums[seen])
    yield TourLine("mqa_logits", shape, "FP64 logits", error, FP8_PRODUCT)

    cache = torch.zeros(blocks, block, 1, width + 4, dtype=torch.uint8, device=q.device)
    slots = torch.arange(tokens, device=q.device).flip(0)  # the table is in order, the rows are not
    ops.mqa_cache_write(k.flip(0), slots, cache)
    table = torch.arange(blocks, dtype=torch.int32, device=q.device)[None]
    # One sequence a token: each has the same pages, and its own length.
    metadata = ops.paged_mqa_metadata(ends, 4)
    paged = ops.paged_mqa_logits(
        q8[:, None].contiguous(), cache, weights, ends, table.expand(tokens, -1).contiguous(),
        tokens, metadata=metadata, clean=True,
    )  # fmt: skip
    error = relative_error(paged[seen], logits[seen])
    names = "mqa_cache_write, paged_mqa_metadata, paged_mqa_logits"
    yield TourLine(names, shape, "mqa_logits", error, EXACT_PRODUCT)
    top = ops.indexer_topk(logits, ends, 8)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :8]
    kept = torch.where(torch.arange(8, device=q.device) < ends[:, None], order, tokens)
    kept = kept.sort(dim=1).values
    want = torch.where(kept == tokens, -1, kept).int()
    yield TourLine("indexer_topk", f"8 of {tokens} keys", "sort", mismatch(top, want), 0.0)


@torch.no_grad()
def print_op_tour(data: TourData) -> int:
    from rich.table import Table

    table = Table(title=f"op tour on {data.x.device}: {data.source}")
    for heading in ("op", "data", "against"):
        table.add_column(heading)
    for heading in ("relative error", "allowed", ""):
        table.add_column(heading, justify="right")
    with step("running each op"):
        lines = list(op_tour(data))
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
