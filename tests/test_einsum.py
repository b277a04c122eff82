"""einsum against float64: every equation, format and layout, drawn cases, every configuration."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import bf16_cases
import pytest
import reference
import torch
from einsum_cases import BATCHED, SUM, Case, Operand, build, check_case, check_product, draw, lay
from reference import FP4, FP8

from sm120_ops import bf16_gemm, einsum, gemm
from sm120_ops.ops.einsum import parse

OUT_DTYPES = (torch.bfloat16, torch.float32)
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))
CHUNKS = 10
DEFAULT_CASES = {"cpu": 100, "cuda": 1000}
FORMATS = (("bf16", "bf16"), (FP8, FP8), (FP4, FP4), (FP8, FP4), (FP4, FP8))


def dense(
    equation: str,
    formats: tuple[str, str],
    sizes: tuple[int, int, int, int],
    seed: int = 0,
    gran_k: int = 32,
) -> Case:
    """Contiguous operands with canonical packed scales."""
    ranks = [len(x) for x in equation.partition("->")[0].split(",")]
    memory = ["".join(map(str, range(rank))) for rank in ranks]
    return Case(seed, equation, formats, sizes, (memory[0], memory[1]), (0, 0), (gran_k, gran_k))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("equation", BATCHED)
def test_equations(device: torch.device, equation: str, formats: tuple[str, str]) -> None:
    """Contiguous operands, as the models have them."""
    for m, gran_k in itertools.product((1, 4, 70), (32, 128)):
        sizes = (3, m, 64, 96) if equation != "bhd,bhr->hdr" else (3, 64, 96, 32 * m)
        a, b, _ = build(dense(equation, formats, sizes, m, gran_k), device)
        for dtype in OUT_DTYPES:
            d = einsum(
                equation, a.given, b.given, out_dtype=dtype, gran_k_a=a.gran_k, gran_k_b=b.gran_k
            )
            check_product(parse(equation), d, a, b)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("kind", ["bf16", "scaled"])
def test_drawn_cases(device: torch.device, chunk: int, kind: str) -> None:
    """As many of each kind, each run twice and compared bit for bit."""
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type])) // 2
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = draw(seed, device.type == "cpu", (kind,))
        try:
            check_case(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(
    "sizes", [(129, 128, 384, 128), (5, 1, 1, 8), (3, 70, 40, 72), (64, 17, 200, 1), (1, 8, 8, 64)]
)
def test_sum(
    device: torch.device, sizes: tuple[int, int, int, int], out_dtype: torch.dtype
) -> None:
    batch, m, n, k = sizes
    generator = torch.Generator(device).manual_seed(k)
    x, y = (
        lay(
            torch.randn(batch, rows, k, generator=generator, device=device).bfloat16(),
            "012",
            padding=0,
        )
        for rows in (m, n)
    )
    c = torch.randn(m, n, generator=generator, device=device).to(out_dtype)
    d = einsum(SUM, x, y, c=c)
    left, right = (t.double().transpose(0, 1).flatten(1) for t in (x, y))
    bf16_cases.check(d, left, right, c)
    einsum(SUM, x, y, c=c, out=c)
    assert torch.equal(c, d)


def test_same_as_gemm(device: torch.device) -> None:
    """A batch of one, and an equation without a batch, are the plain product."""
    for formats in FORMATS:
        a, b, _ = build(dense("mk,nk->mn", formats, (1, 37, 48, 288)), device)
        d = einsum("mk,nk->mn", a.given, b.given, gran_k_a=a.gran_k, gran_k_b=b.gran_k)
        if formats[0] == "bf16":
            assert torch.equal(d, bf16_gemm(a.given, b.given))  # type: ignore[arg-type]
            one = einsum("bmk,bnk->bmn", a.given[None], b.given[None])  # type: ignore[call-overload]
            assert torch.equal(one[0], d)
        else:
            grans = {"gran_k_a": 32, "gran_k_b": 32}
            assert torch.equal(d, gemm(a.given, b.given, **grans))  # type: ignore[arg-type]


def test_shared_matrix(device: torch.device) -> None:
    """A batch stride of 0: one matrix for all."""
    x = torch.randn(5, 4, 64, device=device).bfloat16()
    w = torch.randn(24, 64, device=device).bfloat16()
    d = einsum("bhr,hdr->bhd", x, w.expand(4, -1, -1), out_dtype=torch.float32)
    assert torch.equal(d, einsum("bhr,hdr->bhd", x, w.repeat(4, 1, 1), out_dtype=torch.float32))
    s = einsum("bmk,bnk->mn", w.expand(5, -1, -1), x, out_dtype=torch.float32)
    assert torch.equal(s, einsum("bmk,bnk->mn", w.repeat(5, 1, 1), x, out_dtype=torch.float32))


def test_empty(device: torch.device) -> None:
    for b, h, d, r in [(0, 3, 16, 32), (4, 0, 16, 32), (4, 3, 0, 32), (4, 3, 16, 0)]:
        x = torch.randn(b, h, r, device=device).bfloat16()
        w = torch.randn(h, d, r, device=device).bfloat16()
        c = torch.randn(b, h, d, device=device)
        result = einsum("bhr,hdr->bhd", x, w, c=c)
        assert torch.equal(result, c)
        assert not einsum("bhr,hdr->bhd", x, w).any()
    for b, m, n, k in [(0, 8, 16, 32), (3, 8, 16, 0), (3, 0, 16, 32)]:
        x = torch.randn(b, m, k, device=device).bfloat16()
        y = torch.randn(b, n, k, device=device).bfloat16()
        c = torch.randn(m, n, device=device)
        assert torch.equal(einsum(SUM, x, y, c=c), c)


@pytest.mark.parametrize("form", ["packed", "scattered", "bytes", "e8m0", "float32"])
@pytest.mark.parametrize("formats", [(FP8, FP8), (FP4, FP4)])
def test_no_k(device: torch.device, formats: tuple[str, str], form: str) -> None:
    case = dense("bhr,hdr->bhd", formats, (3, 5, 13, 0))
    check_case(dataclasses.replace(case, forms=(form, form), memory_d="012"), device)


def test_values_of_other_groups_stay_away(device: torch.device) -> None:
    """A NaN reaches the products of its own matrix alone, and there its row."""
    x = torch.randn(9, 3, 40, device=device).bfloat16()
    w = torch.randn(3, 16, 40, device=device).bfloat16()
    clean = einsum("bhr,hdr->bhd", x, w)
    x[4, 1, 39] = torch.nan
    d = einsum("bhr,hdr->bhd", x, w)
    bad = torch.zeros_like(d, dtype=torch.bool)
    bad[4, 1] = True
    assert d[bad].isnan().all()
    assert torch.equal(d[~bad], clean[~bad])


def tensors_of(operand: Operand) -> tuple[torch.Tensor, ...]:
    return operand.given if isinstance(operand.given, tuple) else (operand.given,)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(device: torch.device, backend: str) -> None:
    w = torch.randn(3, 48, 64, device=device).bfloat16()
    scaled, weights, _ = build(dense("bhr,hdr->bhd", (FP8, FP4), (3, 200, 48, 64)), device)
    data, scale = scaled.given

    def function(x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        d = einsum("bhr,hdr->bhd", x, w, out_dtype=torch.float32)
        grad = einsum("bhd,bhr->hdr", d.bfloat16(), x, out_dtype=torch.float32)
        total = einsum("bmk,bnk->mn", w, w, out=torch.empty(48, 48, device=device))
        quantised = einsum(
            "bhr,hdr->bhd", (data, scale), weights.given, c=d, gran_k_a=32, gran_k_b=32
        )
        return [d, grad, total, quantised]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for b in (7, 20, 64, 2, 100):
            x = torch.randn(b, 3, 64, device=device).bfloat16()
            args = (x, data[:b], scale[:b])
            for got, wanted in zip(compiled(*args), function(*args), strict=True):
                assert torch.equal(got, wanted)


def test_opcheck(device: torch.device) -> None:
    x = torch.randn(9, 3, 64, device=device).bfloat16().transpose(0, 1)
    w = torch.randn(3, 64, 40, device=device).bfloat16().transpose(1, 2)
    c = torch.randn(9, 3, 40, device=device).transpose(0, 1)
    ops = torch.ops.sm120
    reference.opcheck(ops.bf16_batched_gemm.default, (x, w, torch.bfloat16))
    reference.opcheck(ops.bf16_batched_gemm.default, (x, w, torch.float32), {"c": c})
    reference.opcheck(ops.bf16_batched_gemm.out, (x, w), {"c": c, "out": c.clone()})
    total = torch.zeros(9, 40, device=device)
    reference.opcheck(ops.bf16_batch_sum.default, (x, w, torch.float32), {"c": total})
    reference.opcheck(ops.bf16_batch_sum.out, (x, w), {"out": total})


H200 = (132, False, 50 << 20, 4916)  # SMs, native, L2 bytes, GB/s


def test_configurations() -> None:
    """All products count: few of a batch's tiles are many of all."""

    def choose(fmt: str, *sizes: int, summed: bool = False) -> dict[str, Any]:
        text = torch.ops.sm120._einsum_config(fmt, *sizes, summed, 32, *H200)
        found: dict[str, Any] = json.loads(text)
        return found

    for b in (1, 4, 16):
        few = choose("bf16", 8, b, 1024, 4096)
        assert few["swapped"]
        assert few["grid"] >= 128
        assert choose("mxfp8", 8, b, 1024, 4096)["grid"] >= 128
    large = choose("bf16", 8, 8192, 1024, 4096)
    assert (large["tile_rows"], large["tile_cols"], large["split"]) == (128, 256, False)
    assert large["total_us"] == pytest.approx(
        8 * choose("bf16", 1, 8192, 1024, 4096)["total_us"], rel=0.1
    )
    assert choose("bf16", 2, 16, 128, 16384)["split"]  # a few tiles of a batch, long K
    long_sum = choose("bf16", 4096, 128, 384, 128, summed=True)
    assert long_sum["split"]
    assert long_sum["grid"] == 132
    assert not choose("bf16", 1, 4096, 4096, 32, summed=True)["split"]


# ---- GPU -----------------------------------------------------------------------------------------

Run = Callable[[int, bool, bool], None]


def forced(
    case: Case, out: torch.Tensor, c: torch.Tensor | None = None
) -> tuple[Run, tuple[Operand, Operand]]:
    """Runs one configuration, (tile, swapped, split), on contiguous 'gmk,gnk->gmn' or its sum."""
    a, b, _ = build(case, torch.device("cuda"))
    ops = torch.ops.sm120
    if case.formats[0] == "bf16":
        return functools.partial(ops._bf16_batched_forced, a.given, b.given, c, out), (a, b)
    (a_data, sfa), (b_data, sfb) = a.given, b.given
    grans = (a.gran_k, b.gran_k)
    run = functools.partial(ops._batched_gemm_forced, a_data, sfa, b_data, sfb, *grans, c, out)
    return run, (a, b)


def legal_configs(run: Run) -> Iterator[tuple[int, bool, bool]]:
    """The op itself refuses what is not compiled; the first tile past the table ends the list."""
    for tile in itertools.count():
        legal, past_end = [], True
        for swapped, split in itertools.product((False, True), (False, True)):
            try:
                run(tile, swapped, split)
            except ValueError as error:
                if "a compiled tile" not in str(error):
                    raise
                continue
            legal.append((tile, swapped, split))
            past_end = False
        if past_end:
            assert tile > 0
            return
        yield from legal


@pytest.mark.determinism
@pytest.mark.parametrize(
    ("equation", "formats"),
    [
        *(("gmk,gnk->gmn", formats) for formats in FORMATS),
        *(("gmk,gnk->mn", formats) for formats in FORMATS if formats[0] == "bf16"),
    ],
)
def test_every_configuration(equation: str, formats: tuple[str, str]) -> None:
    """Whole and split over the batch, against float64, and ten times the same bits."""
    summed = equation.endswith(">mn")
    sizes = [(5, 130, 264, 544), (8, 16, 1024, 2048), (3, 300, 72, 96)]
    if formats[0] == "bf16":  # sums that are put away on the way
        sizes += [(80, 40, 136, 1024)] if summed else [(2, 40, 136, 40960)]
    for batch, m, n, k in sizes:
        case = dense(equation, formats, (batch, m, n, k), m)
        shape = (m, n) if summed else (batch, m, n)
        for dtype in OUT_DTYPES:
            out = torch.empty(shape, device="cuda", dtype=dtype)
            run, operands = forced(case, out)
            for config in legal_configs(run):
                out.fill_(torch.nan)
                run(*config)
                first = out.clone()
                try:
                    check_product(parse(equation), first, *operands)
                except AssertionError as error:
                    raise AssertionError(f"{config} at {shape}, K {k}: {error}") from error
                different = torch.zeros((), dtype=torch.int64, device="cuda")
                for _ in range(10):
                    out.fill_(torch.nan)
                    run(*config)
                    different += (bits(out) != bits(first)).sum()
                assert different.item() == 0, f"{config}: {different.item()} bytes differ"


@pytest.mark.determinism
def test_full_size() -> None:
    """Every element of every repeat of large products: the batch in the middle, and a long sum."""
    x = torch.randn(4096, 8, 1024, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(8, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(4096, 256, 128, device="cuda", dtype=torch.bfloat16)
    runs: list[Callable[[], torch.Tensor]] = [
        lambda: einsum("bhr,hdr->bhd", x, w),
        lambda: einsum("bhd,hdr->bhr", x, w),
        lambda: einsum("bhd,bhr->hdr", x, x),
        lambda: einsum("bmk,bnk->mn", y, y, out_dtype=torch.float32),
    ]
    for run in runs:
        first = run()
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(20):
            different += (bits(run()) != bits(first)).sum()
        assert different.item() == 0
    wanted = torch.einsum("bhr,hdr->bhd", x.float(), w.float())
    assert reference.calc_diff(runs[0](), wanted) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("b", [1, 37, 300])
def test_graph_replay(formats: tuple[str, str], b: int) -> None:
    case = dense("bhr,hdr->bhd", formats, (4, b, 480, 1024))
    a, w, _ = build(case, torch.device("cuda"))
    run = functools.partial(
        einsum, case.equation, a.given, w.given, out_dtype=torch.float32, gran_k_a=a.gran_k,
        gran_k_b=w.gran_k,
    )  # fmt: skip
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(1, 4):
        other, weights, _ = build(dataclasses.replace(case, seed=seed), torch.device("cuda"))
        for static, source in ((a, other), (w, weights)):
            for x, y in zip(tensors_of(static), tensors_of(source), strict=True):
                x.copy_(y)
        graph.replay()
        assert torch.equal(captured, run())


@pytest.mark.sanitizer
@pytest.mark.usefixtures("filled_allocations")
@pytest.mark.parametrize("formats", [("bf16", "bf16"), (FP8, FP8), (FP4, FP4)])
def test_sanitizer(formats: tuple[str, str]) -> None:
    """Built on the CPU, for racecheck and initcheck are slow with the tests' own kernels."""
    equations = ("gmk,gnk->gmn", "gmk,gnk->mn") if formats[0] == "bf16" else ("gmk,gnk->gmn",)
    for equation, sizes in itertools.product(equations, [(3, 70, 136, 288), (5, 3, 24, 96)]):
        a, b, shape = build(dense(equation, formats, sizes), torch.device("cpu"))
        on_gpu = [_moved(t) for t in (*tensors_of(a), *tensors_of(b))]
        out = torch.zeros(shape, device="cuda")
        if formats[0] == "bf16":
            run = functools.partial(torch.ops.sm120._bf16_batched_forced, *on_gpu, out, out)
        else:
            run = functools.partial(torch.ops.sm120._batched_gemm_forced, *on_gpu, 32, 32, out, out)
        for config in legal_configs(run):
            out.zero_()
            run(*config)
            check_product(parse(equation), out.cpu(), a, b)


def _moved(x: torch.Tensor) -> torch.Tensor:
    """To the GPU with its strides."""
    base = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())
