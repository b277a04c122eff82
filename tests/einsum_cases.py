"""Operands of einsum() that lie in memory in any order, and drawn cases of all of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from reference import (
    FP4,
    FP8,
    assert_bf16_close,
    assert_gemm_close,
    ceil_div,
    pack_scale_bytes,
    values_of,
)

from sm120_ops import einsum
from sm120_ops.ops.einsum import Plan, parse

BATCHED = ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr")
SUM = "bmk,bnk->mn"
# Relabelled, reordered, and without a batch.
OTHERS = (
    "bhr,hrd->bhd", "hbr,hdr->hbd", "hdr,bhr->bhd", "bhr,hdr->dhb", "xqi,qyi->qxy", "irh,rjh->rij",
    "gmk,gnk->gmn", "gkm,gkn->gnm", "mk,nk->mn", "mk,kn->mn", "km,nk->nm",
)  # fmt: skip
SUMS = (SUM, "bkm,bkn->mn", "bmk,bnk->nm", "mbk,bnk->mn", "kbm,nbk->mn")

Pair = tuple[torch.Tensor, torch.Tensor]


def lay(values: torch.Tensor, order: str, padding: int = 0, margin: int = 0) -> torch.Tensor:
    """`values` so that its dimensions lie in memory in `order` (its digits, outermost first).

    The innermost has `margin` elements before it and `padding` after it, rounded up to 16 bytes.
    All that is not `values` is 0x7F in every byte: a NaN, or large.
    """
    dims = [int(digit) for digit in order]
    unit = 16 // values.element_size()
    shape = [values.shape[dim] for dim in dims]
    inner = ceil_div(margin + shape[-1] + padding, unit) * unit
    count = torch.Size((*shape[:-1], inner)).numel()
    raw = torch.full(
        (count * values.element_size(),), 0x7F, dtype=torch.uint8, device=values.device
    )
    buffer = raw.view(values.dtype).view(*shape[:-1], inner)
    view = buffer[..., margin : margin + shape[-1]]
    result = view.permute([dims.index(dim) for dim in range(len(dims))])
    source, target = values, result
    if values.dtype == torch.float8_e4m3fn:
        source, target = values.view(torch.uint8), result.view(torch.uint8)
    target.copy_(source)
    return result


@dataclass
class Operand:
    given: torch.Tensor | Pair
    values: torch.Tensor  # float64 [groups, rows, K]
    gran_k: int | None = None


def inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def sized(plan: Plan, sizes: tuple[int, int, int, int]) -> dict[str, int]:
    """{index: size} for (batch, m, n, k), m and n being rows of A and of B as the user has them."""
    batch, m, n, k = sizes
    orders = (plan.right, plan.left) if plan.exchanged else (plan.left, plan.right)
    found: dict[str, int] = {}
    for indices, order, rows in ((plan.a, orders[0], m), (plan.b, orders[1], n)):
        found.update(
            zip((indices[dim] for dim in order[-3:]), (batch, rows, k)[-len(order) :], strict=True)
        )
    return found


def bf16_operand(
    order: tuple[int, ...],
    shape: tuple[int, ...],
    memory: str,
    padding: int,
    generator: torch.Generator,
) -> Operand:
    """`order`: dimensions of groups, rows and K; `shape` of the tensor as given."""
    x = torch.randn(shape, generator=generator, device=generator.device).to(torch.bfloat16)
    canonical = x.permute(order).double()
    values = canonical if len(order) == 3 else canonical[None]
    return Operand(lay(x, memory, padding), values)


def scaled_operand(
    order: tuple[int, ...],
    shape: tuple[int, ...],
    fmt: str,
    gran_k: int,
    memory: str,
    padding: int,
    form: str,
    gran_mn: int,
    generator: torch.Generator,
) -> Operand:
    """FP8 or FP4 with scales in `form`: packed, scattered (packed, rows apart), bytes, float32."""
    device = generator.device
    fp4 = fmt == FP4
    codes = torch.randint(
        16 if fp4 else 256, shape, generator=generator, device=device, dtype=torch.uint8
    )
    if fp4:
        data = lay(codes[..., ::2] | codes[..., 1::2] << 4, memory, padding)
    else:
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes)
        data = lay(codes.view(torch.float8_e4m3fn), memory, padding)
    canonical = codes.permute(order)
    canonical = canonical if len(order) == 3 else canonical[None]
    groups, rows, k = canonical.shape
    k_groups = ceil_div(k, gran_k)
    blocks = torch.randint(
        120, 134, (groups, ceil_div(rows, gran_mn), k_groups), generator=generator, device=device
    ).to(torch.uint8)
    each = blocks.repeat_interleave(gran_mn, 1)[:, :rows]
    values = torch.zeros(groups, rows, k, dtype=torch.float64, device=device)
    for g in range(groups):
        values[g] = values_of(canonical[g], each[g], fmt, gran_k)
    if form in ("packed", "scattered"):
        words = ceil_div(k_groups, 4)
        padded = torch.zeros(groups, words, ceil_div(rows, 4) * 4, dtype=torch.int32, device=device)
        for g in range(groups):
            padded[g, :, :rows] = pack_scale_bytes(each[g]).t()
        scale = padded[:, :, :rows].transpose(1, 2)
        scale = scale.contiguous() if form == "scattered" else scale
    elif form == "float32":
        scale = (blocks.float() - 127).exp2()
    else:
        scale = blocks.view(torch.float8_e8m0fnu) if form == "e8m0" else blocks
    if len(order) == 2:
        scale = scale[0]
    return Operand((data, scale.permute(inverse(order))), values, gran_k)


@dataclass(frozen=True)
class Case:
    seed: int
    equation: str
    formats: tuple[str, str]  # "bf16", "mxfp8", "mxfp4"
    sizes: tuple[int, int, int, int]  # batch, rows of A, rows of B, K
    memory: tuple[str, str]
    padding: tuple[int, int]
    grans: tuple[int, int] = (32, 32)
    forms: tuple[str, str] = ("packed", "packed")
    grans_mn: tuple[int, int] = (1, 1)
    fp32: bool = True
    memory_d: str = ""
    margin: int = 0
    padding_d: int = 0
    c: str = "none"  # "separate", "row" (one for all), "out" (in place)
    plan: Plan = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", parse(self.equation))


def draw(seed: int, small: bool, kinds: tuple[str, ...] = ("bf16", "scaled")) -> Case:
    rng = random.Random(seed)
    scaled = rng.choice(kinds) == "scaled"
    pool = rng.choice((BATCHED, BATCHED, OTHERS) if scaled else (BATCHED, BATCHED, OTHERS, SUMS))
    equation = rng.choice(pool)
    plan = parse(equation)
    formats = (
        rng.choice(((FP8, FP8), (FP8, FP8), (FP4, FP4), (FP4, FP4), (FP8, FP4), (FP4, FP8)))
        if scaled
        else ("bf16", "bf16")
    )
    batch = rng.choice((0, 1, 1, 2, 3, 4, 5, 8)) if rng.random() < 0.9 else rng.randint(9, 40)
    m = rng.choice((rng.randint(0, 4), rng.randint(1, 64), rng.randint(1, 300), 16, 64, 129))
    n = rng.choice((rng.randint(1, 40), rng.randint(1, 500), 8 * rng.randint(1, 50), 128))
    k = rng.choice((rng.randint(0, 20), rng.randint(1, 100), rng.choice((64, 128, 512))))
    unit = (16 if formats == (FP8, FP8) else 32) if scaled else rng.choice((1, 8, 8))
    k = k * unit if k < 64 or not scaled else k // 4 * unit
    if small:
        batch, m, n, k = min(batch, 4), min(m, 70), min(n, 96), min(k, 512)
    if batch > 8:
        m, n, k = min(m, 40), min(n, 64), min(k, 256)
    orders = (plan.right, plan.left) if plan.exchanged else (plan.left, plan.right)
    sizes = [m, n]
    memory, padding = [], []
    for i, order in enumerate(orders):
        dims, last = len(order), len(order) - 1
        free = [str(dim) for dim in range(dims)]
        rng.shuffle(free)
        own, inner = str(order[-2]), str(order[-1])
        if formats[i] == FP4 and int(inner) != last:
            # Packed along the last dimension, which must be the operand's own index.
            sizes[i] += sizes[i] % 2
            end = str(last) if rng.random() < 0.5 else free[-1]
        elif formats[i] == "bf16":
            end = rng.choice((own, inner))
        else:
            end = inner if formats[i] == FP4 or rng.random() < 0.6 else free[-1]
        memory.append("".join([dim for dim in free if dim != end] + [end]))
        padding.append(rng.choice((0, 0, 16, 48)))
    result = [str(dim) for dim in range(len(plan.d) - 1)]
    rng.shuffle(result)
    return Case(
        seed=seed,
        equation=equation,
        formats=formats,
        sizes=(batch, sizes[0], sizes[1], k),
        memory=(memory[0], memory[1]),
        padding=(padding[0], padding[1]),
        grans=(rng.choice((32, 128)), rng.choice((32, 128))),
        forms=(form(rng), form(rng)),
        grans_mn=(rng.choice((1, 1, 32, 128)), rng.choice((1, 32, 128))),
        fp32=rng.random() < 0.5,
        memory_d="".join([*result, str(len(plan.d) - 1)]),
        margin=rng.choice((0, 0, 8, 3)),
        padding_d=rng.choice((0, 0, 8, 5)),
        c=rng.choice(("none", "none", "separate", "row", "out")),
    )


def form(rng: random.Random) -> str:
    return rng.choice(("packed", "packed", "scattered", "bytes", "e8m0", "float32"))


def build(case: Case, device: torch.device) -> tuple[Operand, Operand, tuple[int, ...]]:
    """A, B and the shape of D."""
    plan = case.plan
    generator = torch.Generator(device).manual_seed(case.seed)
    orders = (plan.right, plan.left) if plan.exchanged else (plan.left, plan.right)
    sizes = sized(plan, case.sizes)
    operands = []
    for i, (indices, order) in enumerate(zip((plan.a, plan.b), orders, strict=True)):
        shape = tuple(sizes[index] for index in indices)
        if case.formats[i] == "bf16":
            operands.append(bf16_operand(order, shape, case.memory[i], case.padding[i], generator))
            continue
        packed = case.forms[i] in ("packed", "scattered")
        gran_mn = 1 if packed else case.grans_mn[i]
        scales = (case.grans[i], case.memory[i], case.padding[i], case.forms[i], gran_mn)
        operands.append(scaled_operand(order, shape, case.formats[i], *scales, generator))
    return operands[0], operands[1], tuple(sizes[index] for index in plan.d)


def canonical(plan: Plan, x: torch.Tensor) -> torch.Tensor:
    """D or C as [groups, M, N], of a sum [M, N]."""
    if plan.summed:
        return x
    if x.dim() == 2:
        return x[None]
    return x.transpose(0, 1) if plan.rows_first else x


def check_product(
    plan: Plan, d: torch.Tensor, a: Operand, b: Operand, c: torch.Tensor | None = None
) -> None:
    left, right = (b, a) if plan.exchanged else (a, b)
    result = canonical(plan, d)
    addend = None if c is None else canonical(plan, c)
    close = assert_gemm_close if isinstance(a.given, tuple) else assert_bf16_close
    if plan.summed:
        flat = [x.values.transpose(0, 1).flatten(1) for x in (left, right)]
        close(result, flat[0], flat[1], addend)
        return
    for g in range(result.shape[0]):
        close(result[g], left.values[g], right.values[g], None if addend is None else addend[g])


def whole_buffer(view: torch.Tensor) -> torch.Tensor:
    """The bytes of all that lay() allocated."""
    count = view.untyped_storage().nbytes() // view.element_size()
    return view.as_strided((count,), (1,), 0).view(torch.uint8)


def check_case(case: Case, device: torch.device) -> None:
    plan = case.plan
    a, b, shape = build(case, device)
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    scale = 1.0
    if a.values.numel() and b.values.numel():
        scale = float(a.values.abs().mean() * b.values.abs().mean())
    size = (1,) * (len(shape) - 1) + shape[-1:] if case.c == "row" else shape
    values = torch.randn(size, generator=generator, device=device) * scale
    values = (values * case.sizes[3] ** 0.5).to(dtype)
    c: torch.Tensor | None = None
    if case.c == "row":
        c = values.expand(shape)
    elif case.c == "separate":
        c = lay(values, case.memory_d, padding=3, margin=1)
    results = []
    for _ in range(2):
        out = lay(values.expand(shape), case.memory_d, case.padding_d, case.margin)
        if case.c != "out":
            out.fill_(torch.nan)
        einsum(
            case.equation, a.given, b.given, c=out if case.c == "out" else c, out=out,
            gran_k_a=a.gran_k, gran_k_b=b.gran_k,
        )  # fmt: skip
        results.append(out)
    whole = [whole_buffer(result) for result in results]
    assert torch.equal(*whole), "two runs differ"
    check_product(plan, results[0], a, b, values if case.c == "out" else c)
    zeros = torch.zeros(shape, device=device, dtype=dtype)
    outside = whole_buffer(lay(zeros, case.memory_d, case.padding_d, case.margin)) == 0x7F
    assert (whole[0][outside] == 0x7F).all(), "wrote outside of D"
    if case.c in ("none", "row") and results[0].numel() > 0:
        fresh = einsum(
            case.equation, a.given, b.given, c=c, out_dtype=dtype,
            gran_k_a=a.gran_k, gran_k_b=b.gran_k,
        )  # fmt: skip
        assert fresh.is_contiguous()
        assert torch.equal(fresh, results[0])
