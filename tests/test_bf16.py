"""bf16_gemm against float64: layouts, strides, C, edges, drawn cases, every configuration."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import reference
import torch
from reference import assert_bf16_close as check

import sm120_ops
from sm120_ops import bf16_gemm

LAYOUTS = ("nt", "nn", "tn", "tt")
OUT_DTYPES = (torch.bfloat16, torch.float32)
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))
CHUNKS = 10
DEFAULT_CASES = {"cpu": 60, "cuda": 1500}


def matrix(
    rows: int, k: int, generator: torch.Generator, *, mn_major: bool = False, padding: int = 0
) -> torch.Tensor:
    """[rows, K] of either layout; between lines lie NaNs, `padding` and what 16 bytes need."""
    lines, length = (k, rows) if mn_major else (rows, k)
    stride = -(-length // 8) * 8 + padding
    device = generator.device
    buffer = torch.full((lines, stride), torch.nan, device=device, dtype=torch.bfloat16)
    buffer[:, :length] = torch.randn(lines, length, generator=generator, device=device)
    values = buffer[:, :length]
    return values.t() if mn_major else values


def operands(
    device: torch.device, m: int, n: int, k: int, layout: str = "nt", padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [M, K] and B [N, K], lying as `layout` says."""
    generator = torch.Generator(device).manual_seed(m + n + k)
    return (
        matrix(m, k, generator, mn_major=layout[0] == "t", padding=padding),
        matrix(n, k, generator, mn_major=layout[1] == "n", padding=padding),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_layouts(device: torch.device, layout: str, out_dtype: torch.dtype) -> None:
    for m, n, k in [(1, 1, 8), (5, 40, 96), (64, 130, 544), (150, 65, 288), (40, 200, 72)]:
        a, b = operands(device, m, n, k, layout)
        check(bf16_gemm(a, b, out_dtype=out_dtype), a, b)
        given_a = a.t() if layout[0] == "t" else a
        given_b = b.t() if layout[1] == "n" else b
        d = bf16_gemm(given_a, given_b, layout=layout, out_dtype=out_dtype)
        check(d, a, b)
        if layout != "nt":
            named = getattr(sm120_ops, f"bf16_gemm_{layout}")
            assert torch.equal(named(given_a, given_b, out_dtype=out_dtype), d)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow(device: torch.device, n: int, layout: str) -> None:
    for m, k in [(1, 64), (33, 136), (130, 1000)]:
        a, b = operands(device, m, n, k, layout)
        check(bf16_gemm(a, b, out_dtype=torch.float32), a, b)
        a, b = operands(device, n, m, k, layout)
        check(bf16_gemm(a, b, out_dtype=torch.float32), a, b)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 15, 24, 33, 56, 63, 65, 100, 127])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_k(device: torch.device, k: int, layout: str) -> None:
    """Lines start at multiples of 16 bytes; K itself may be anything."""
    a, b = operands(device, 20, 24, k, layout)
    check(bf16_gemm(a, b, out_dtype=torch.float32), a, b)


@pytest.mark.parametrize("padding", [0, 8, 24, 2048])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operand_strides(device: torch.device, padding: int, layout: str) -> None:
    for m, n, k in [(1, 40, 64), (33, 70, 320)]:
        a, b = operands(device, m, n, k, layout, padding)
        check(bf16_gemm(a, b, out_dtype=torch.float32), a, b)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 70, 128), (70, 33, 96), (130, 260, 2048)])
def test_c(device: torch.device, out_dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b = operands(device, m, n, k)
    wide = (torch.randn(m, n + 11, device=device) * k**0.5).to(out_dtype)
    row = wide[:1, :n].clone()
    for c in (wide[:, :n].contiguous(), wide[:, 3 : n + 3], row.expand(m, n)):
        d = bf16_gemm(a, b, c=c)
        assert d.dtype == out_dtype
        check(d, a, b, c)
        out = torch.full((m, n), torch.nan, dtype=out_dtype, device=device)
        assert torch.equal(bf16_gemm(a, b, c=c, out=out), d)
    in_place = wide[:, :n].clone()
    expected = bf16_gemm(a, b, c=in_place)
    assert torch.equal(bf16_gemm(a, b, c=in_place, out=in_place), expected)
    sliced = wide.clone()
    bf16_gemm(a, b, c=sliced[:, 5 : n + 5], out=sliced[:, 5 : n + 5])
    assert torch.equal(sliced[:, 5 : n + 5], bf16_gemm(a, b, c=wide[:, 5 : n + 5]))
    assert torch.equal(sliced[:, :5], wide[:, :5])
    assert torch.equal(sliced[:, n + 5 :], wide[:, n + 5 :])


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 3), (5, 0), (8, 8)])
def test_strided_out(device: torch.device, out_dtype: torch.dtype, left: int, right: int) -> None:
    for m, n, k in [(1, 1, 32), (4, 37, 64), (66, 129, 512)]:
        a, b = operands(device, m, n, k)
        buffer = torch.full((m + 2, left + n + right), 77.0, dtype=out_dtype, device=device)
        out = buffer[1:-1, left : left + n]
        out.fill_(torch.nan)
        assert bf16_gemm(a, b, out=out) is out
        check(out, a, b)
        buffer[1:-1, left : left + n] = 77.0
        assert (buffer == 77.0).all()


def test_empty(device: torch.device) -> None:
    for m, n, k in [(0, 40, 64), (7, 0, 64), (0, 0, 64)]:
        a, b = operands(device, m, n, k)
        assert bf16_gemm(a, b).shape == (m, n)
    a, b = operands(device, 7, 40, 0)
    assert torch.equal(bf16_gemm(a, b), torch.zeros(7, 40, dtype=torch.bfloat16, device=device))
    c = torch.randn(7, 40, device=device)
    assert torch.equal(bf16_gemm(a, b, c=c), c)


def test_special_values(device: torch.device) -> None:
    a, b = operands(device, 20, 24, 64)
    clean = bf16_gemm(a, b, out_dtype=torch.float32)
    a = a.clone()
    a[3, 5], a[7, 9] = torch.nan, torch.inf
    d = bf16_gemm(a, b, out_dtype=torch.float32)
    assert d[3].isnan().all()
    assert (d[7].isinf() | d[7].isnan()).all()
    keep = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(d[keep], clean[keep])


# ---- Drawn cases ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    seed: int
    m: int
    n: int
    k: int
    layout: str
    padding_a: int
    padding_b: int
    fp32: bool
    c: str  # "none", "separate", "row" (one row for all), "out" (in place)
    margin_d: tuple[int, int]  # columns left and right of D in its buffer
    margin_c: tuple[int, int]


def draw(seed: int, small: bool) -> Case:
    rng = random.Random(seed)
    m = rng.choice([rng.randint(0, 4), rng.randint(1, 64), rng.randint(1, 300)])
    m = rng.choice([m, m, 16, 17, 32, 64, 65, 128, 129])
    n = rng.choice([rng.randint(1, 40), rng.randint(1, 600), 8 * rng.randint(1, 75), 128, 256])
    k = rng.choice([rng.randint(0, 200), 8 * rng.randint(1, 256)])
    if small:
        m, n, k = min(m, 96), min(n, 160), min(k, 512)
    margins = [(0, 0), (0, 0), (8, 8), (0, 3), (1, 0), (7, 5)]
    return Case(
        seed=seed,
        m=m,
        n=n,
        k=k,
        layout=rng.choice(LAYOUTS),
        padding_a=rng.choice((0, 0, 8, 56)),
        padding_b=rng.choice((0, 0, 8, 56)),
        fp32=rng.random() < 0.5,
        c=rng.choice(("none", "none", "separate", "row", "out")),
        margin_d=rng.choice(margins),
        margin_c=rng.choice(margins),
    )


def check_case(case: Case, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(case.seed)
    m, n, k = case.m, case.n, case.k
    a = matrix(m, k, generator, mn_major=case.layout[0] == "t", padding=case.padding_a)
    b = matrix(n, k, generator, mn_major=case.layout[1] == "n", padding=case.padding_b)
    dtype = torch.float32 if case.fp32 else torch.bfloat16

    def random_matrix(rows: int, margin: tuple[int, int]) -> torch.Tensor:
        shape = (rows, n + sum(margin))
        return (torch.randn(shape, generator=generator, device=device) * k**0.5).to(dtype)

    def middle(buffer: torch.Tensor, margin: tuple[int, int]) -> torch.Tensor:
        return buffer[:, margin[0] : margin[0] + n]

    buffer = torch.full((m, n + sum(case.margin_d)), torch.nan, dtype=dtype, device=device)
    c = None
    if case.c == "out":
        buffer = random_matrix(m, case.margin_d)
        c = middle(buffer, case.margin_d)
    elif case.c == "separate":
        c = middle(random_matrix(m, case.margin_c), case.margin_c)
    elif case.c == "row":
        c = middle(random_matrix(1, case.margin_c), case.margin_c).expand(m, -1)
    results = []
    for _ in range(2):
        target = buffer.clone()
        out = middle(target, case.margin_d)
        bf16_gemm(a, b, c=out if case.c == "out" else c, out=out)
        results.append(target)
    bits = torch.int32 if case.fp32 else torch.int16
    assert torch.equal(results[0].view(bits), results[1].view(bits)), "two runs differ"
    check(middle(results[0], case.margin_d), a, b, c)
    outside = torch.ones(buffer.shape[1], dtype=torch.bool, device=device)
    outside[case.margin_d[0] : case.margin_d[0] + n] = False
    kept, before = results[0][:, outside], buffer[:, outside]
    assert torch.equal(kept.view(bits), before.view(bits)), "wrote outside of D"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = draw(seed, small=device.type == "cpu")
        try:
            check_case(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


# ---- Bad input -----------------------------------------------------------------------------------


def refused(
    arg: str, requirement: str, got: str, kind: type[Exception] = ValueError
) -> pytest.RaisesExc:
    return pytest.raises(
        kind, match=rf"^sm120_ops.bf16_gemm: {arg}: expected {requirement}, got {got}"
    )


def test_bad_operands(device: torch.device) -> None:
    a, b = operands(device, 8, 12, 128)
    with refused("a", "dtype torch.bfloat16", "torch.float16", TypeError):
        bf16_gemm(a.half(), b)
    with refused("b", "dtype torch.bfloat16", "torch.float32", TypeError):
        bf16_gemm(a, b.float())
    with refused("a", "2 dimensions", r"\[1, 8, 128\]"):
        bf16_gemm(a[None], b)
    with refused("a", "a torch.Tensor", "list", TypeError):
        bf16_gemm([1.0], b)  # type: ignore[arg-type]
    with refused("b", "K=128 as in a", "K=120"):
        bf16_gemm(a, b[:, :120])
    with refused("layout", "'nt', 'nn', 'tn' or 'tt'", "'NT'"):
        bf16_gemm(a, b, layout="NT")
    with refused("out_dtype", "torch.bfloat16 or torch.float32", "torch.float16"):
        bf16_gemm(a, b, out_dtype=torch.float16)
    lines = "one stride to be 1 and the other a multiple of 8 .*"
    odd = torch.zeros(8 * 132 + 1, dtype=torch.bfloat16, device=device)
    for bad in (
        odd[: 8 * 132].view(8, 132)[:, :128],
        a[:1].expand(8, -1),
        torch.zeros(8, 256, dtype=torch.bfloat16, device=device)[:, ::2],
        torch.zeros(128, 12, dtype=torch.bfloat16, device=device).t()[:8],
    ):
        with refused("a", lines, "strides"):
            bf16_gemm(bad, b)
    with refused("a", "a 16-byte aligned data pointer", "0x"):
        bf16_gemm(odd[1:129].view(1, 128), b)
    with refused("b", "a tensor that needs no gradient .*", "requires", RuntimeError):
        bf16_gemm(a, b.clone().requires_grad_())


def test_bad_c_and_out(device: torch.device) -> None:
    a, b = operands(device, 8, 12, 128)
    c = torch.zeros(8, 12, device=device)
    with refused("c", "dtype torch.bfloat16", "torch.float32", TypeError):
        bf16_gemm(a, b, c=c, out_dtype=torch.bfloat16)
    with refused("c", r"shape \[8, 12\]", r"\[12, 8\]"):
        bf16_gemm(a, b, c=c.t())
    with refused("c", r"stride\(1\) == 1", r"strides \[1, 8\]"):
        bf16_gemm(a, b, c=torch.zeros(12, 8, device=device).t())
    with refused("out", r"shape \[8, 12\]", r"\[8, 16\]"):
        bf16_gemm(a, b, out=torch.zeros(8, 16, device=device))
    with refused("out", "dtype torch.bfloat16 or torch.float32", "torch.float16", TypeError):
        bf16_gemm(a, b, out=c.half())
    with refused("out", r"dtype torch.bfloat16 \(out_dtype\)", "torch.float32", TypeError):
        bf16_gemm(a, b, out=c, out_dtype=torch.bfloat16)
    with refused("out", "a row stride >= 12", r"strides \[0, 1\]"):
        bf16_gemm(a, b, out=c[:1].expand(8, -1))
    buffer = torch.zeros(16, 12, device=device)
    with refused("out", "memory apart from c", "overlapping memory"):
        bf16_gemm(a, b, c=buffer[1:9], out=buffer[:8])
    with refused("out", "memory apart from a", "overlapping memory"):
        bf16_gemm(a, b, out=a[:, :24].view(torch.float32)[:, :12])
    kinds = (ValueError, RuntimeError)
    with pytest.raises(kinds, match=r"sm120_ops.bf16_gemm: b: expected K=128 as in a, got K=64"):
        torch.ops.sm120.bf16_gemm(a, b[:, :64], torch.float32)


def test_opcheck(device: torch.device) -> None:
    for layout in LAYOUTS:
        a, b = operands(device, 48, 40, 96, layout)
        c = torch.randn(48, 40, device=device)
        reference.opcheck(torch.ops.sm120.bf16_gemm.default, (a, b, torch.bfloat16))
        reference.opcheck(torch.ops.sm120.bf16_gemm.default, (a, b, torch.float32), {"c": c})
        out = torch.zeros(48, 40, device=device)
        reference.opcheck(torch.ops.sm120.bf16_gemm.out, (a, b), {"c": c, "out": out})


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(device: torch.device, backend: str) -> None:
    w = operands(device, 1, 48, 64)[1]
    w_nn = w.t().contiguous()

    def function(x: torch.Tensor) -> torch.Tensor:
        d = bf16_gemm(x, w, out_dtype=torch.float32)
        return bf16_gemm(x, w_nn, layout="nn", c=d)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for m in (7, 3, 64, 2, 100):
            x = operands(device, m, 1, 64)[0].contiguous()
            assert torch.equal(compiled(x), function(x))


# ---- Every configuration -------------------------------------------------------------------------


def run_forced(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    config: tuple[int, bool, bool],
    c: torch.Tensor | None = None,
) -> torch.Tensor:
    """`config` is (tile, swapped, split)."""
    torch.ops.sm120._bf16_gemm_forced(a, b, c, out, *config)
    return out


def legal_configs(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, bool, bool]]:
    """The op itself refuses what is not compiled; the first tile past the table ends the list."""
    out = torch.empty(a.shape[0], b.shape[0], device=a.device)
    for tile in itertools.count():
        legal = []
        for swapped, split in itertools.product((False, True), (False, True)):
            try:
                run_forced(a, b, out, (tile, swapped, split))
            except ValueError as error:
                if "a compiled tile" not in str(error):
                    raise
                continue
            legal.append((tile, swapped, split))
        if not legal:
            assert tile > 0
            return
        yield from legal


def assert_same_each_time(
    a: torch.Tensor,
    b: torch.Tensor,
    config: tuple[int, bool, bool],
    first: torch.Tensor,
    times: int,
) -> None:
    different = torch.zeros((), dtype=torch.int64, device=a.device)
    for _ in range(times):
        out = torch.full_like(first, torch.nan)
        run_forced(a, b, out, config)
        different += (out.view(torch.uint8) != first.view(torch.uint8)).sum()
    assert different.item() == 0, f"{config}: {different.item()} bytes in {times} runs differ"


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration(layout: str) -> None:
    for m, n, k in [(1024, 2048, 2048), (300, 1000, 2880), (40, 4000, 4096), (130, 70, 40)]:
        a, b = operands(torch.device("cuda"), m, n, k, layout)
        for config in legal_configs(a, b):
            for dtype in OUT_DTYPES:
                first = torch.full((m, n), torch.nan, device="cuda", dtype=dtype)
                run_forced(a, b, first, config)
                try:
                    check(first, a, b)
                except AssertionError as error:
                    raise AssertionError(f"{config} at {m}x{n}x{k} {layout}: {error}") from error
                assert_same_each_time(a, b, config, first, 10)


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration_with_c(layout: str) -> None:
    m, n, k = 70, 384, 1056
    a, b = operands(torch.device("cuda"), m, n, k, layout)
    for config in legal_configs(a, b):
        for dtype in OUT_DTYPES:
            c = (torch.randn(m, n, device="cuda") * 1e2).to(dtype)
            out = torch.full_like(c, torch.nan)
            run_forced(a, b, out, config, c)
            check(out, a, b, c)
            run_forced(a, b, c, config, c)
            assert torch.equal(c, out)


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration_at_full_size(layout: str) -> None:
    """Every element of every repeat: a stage given back too early shows only so."""
    for m, n, k in [(4096, 7168, 2048), (4096, 2112, 7168), (128, 7168, 16384), (16, 7168, 16384)]:
        a, b = operands(torch.device("cuda"), m, n, k, layout)
        for config in legal_configs(a, b):
            out = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
            first = run_forced(a, b, out, config)
            assert not first.isnan().any()
            assert_same_each_time(a, b, config, first, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 37, 300])
def test_graph_replay(m: int) -> None:
    a, b = operands(torch.device("cuda"), m, 480, 2048)
    run = functools.partial(bf16_gemm, a, b, out_dtype=torch.float32)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        a.normal_()
        b.normal_()
        graph.replay()
        assert torch.equal(captured, run())


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizer(layout: str) -> None:
    for m, n, k in [(133, 140, 544), (5, 24, 96)]:
        a, b = operands(torch.device("cpu"), m, n, k, layout)
        on_gpu = [x.t().cuda().t() if x.stride(1) != 1 else x.contiguous().cuda() for x in (a, b)]
        on_gpu = [x if x.stride(0) % 8 == 0 or x.stride(0) == 1 else x.clone() for x in on_gpu]
        left, right = on_gpu
        for config in legal_configs(left, right):
            out = torch.zeros(m, n, device="cuda")
            run_forced(left, right, out, config, c=out)
            check(out.cpu(), a, b)
