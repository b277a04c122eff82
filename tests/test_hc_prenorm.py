"""hc_prenorm against float64 over x and fn rounded to TF32: splits, scaling, strides, bad input."""

from __future__ import annotations

import os
import random

import pytest
import reference
import torch
from reference import calc_diff

import sm120_ops
from sm120_ops import hc_prenorm

SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))
CASES = {"cpu": 40, "cuda": 300}
CHUNKS = 10


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Nearest value with 10 mantissa bits, ties away from zero, by float64 arithmetic."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2**11
    rounded = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
    return torch.ldexp(rounded, exponent - 11)


def inputs(
    device: torch.device, m: int, n: int, k: int, seed: int = 0, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed + m + n + k)
    x = torch.full((m, k + 2 * padding), torch.nan, device=device, dtype=torch.bfloat16)
    fn = torch.full((n, k + padding), torch.nan, device=device)
    x[:, :k] = torch.randn(m, k, generator=generator, device=device)
    fn[:, :k] = torch.randn(n, k, generator=generator, device=device)
    return x[:, :k], fn[:, :k]


def ranges(k: int, splits: int) -> list[range]:
    """Blocks of 64 dealt out in order, by counting."""
    sizes = [0] * splits
    for block in range(k // 64):
        sizes[block % splits] += 64
    begins = [sum(sizes[:s]) for s in range(splits)]
    return [range(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]


def check(
    x: torch.Tensor,
    fn: torch.Tensor,
    d: torch.Tensor,
    sqr_sum: torch.Tensor,
    splits: int | None = None,
    eps: float | None = None,
) -> None:
    k = x.shape[1]
    parts = [range(k)] if splits is None else ranges(k, splits)
    d, sqr_sum = d.reshape(len(parts), *d.shape[-2:]), sqr_sum.reshape(len(parts), -1)
    for part, got, got_squares in zip(parts, d, sqr_sum, strict=True):
        values, weights = x.double()[:, part], tf32(fn)[:, part]
        exact, squares = values @ weights.t(), values.square().sum(1)
        magnitude = values.abs() @ weights.abs().t()
        if eps is not None:
            factor = (squares / k + eps).rsqrt()[:, None]
            exact, magnitude = exact * factor, magnitude * factor
        assert calc_diff(got, exact) <= 1e-8
        assert ((got_squares.double() - squares).abs() <= 1e-6 * squares).all()
        # Single elements: the MMA cuts its float32 sums off rather than round them.
        excess = (got.double() - exact).abs() - 2.0**-15 * magnitude
        assert excess.max() <= 0


@pytest.mark.parametrize("n", [8, 16, 24, 32, 40, 64, 72, 128])
@pytest.mark.parametrize("m", [1, 13, 64, 129, 300])
def test_against_float64(device: torch.device, m: int, n: int) -> None:
    for k in (64, 192, 1024):
        x, fn = inputs(device, m, n, k)
        d, sqr_sum = hc_prenorm(x, fn)
        assert d.shape == (m, n)
        assert sqr_sum.shape == (m,)
        check(x, fn, d, sqr_sum)
        again = hc_prenorm(x, fn)
        assert torch.equal(again[0], d)
        assert torch.equal(again[1], sqr_sum)


@pytest.mark.parametrize(("m", "k"), [(1, 64), (5, 320), (70, 1024), (300, 4096)])
def test_splits(device: torch.device, m: int, k: int) -> None:
    x, fn = inputs(device, m, 24, k)
    for splits in sorted({1, 2, 3, min(7, k // 64), k // 64} & set(range(1, k // 64 + 1))):
        d, sqr_sum = hc_prenorm(x, fn, num_splits=splits)
        assert d.shape == (splits, m, 24)
        assert sqr_sum.shape == (splits, m)
        check(x, fn, d, sqr_sum, splits)


@pytest.mark.parametrize("m", [1, 13, 200, 700])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_scaled_by_the_norm(device: torch.device, m: int, eps: float) -> None:
    x, fn = inputs(device, m, 24, 1536)
    d, sqr_sum = hc_prenorm(x, fn, eps=eps)
    check(x, fn, d, sqr_sum, eps=eps)
    assert torch.equal(sqr_sum, hc_prenorm(x, fn)[1])


def test_rounding_of_fn(device: torch.device) -> None:
    """Ties go away from zero; Inf and NaN stay what they are."""
    bits = torch.tensor([0x3F800000, 0x3F801000, 0x3F800FFF, 0x3F803000, 0x7F7FFFFF, 0x00001000])
    expected = torch.tensor([0x3F800000, 0x3F802000, 0x3F800000, 0x3F804000, 0x7F800000, 0x2000])
    fn = torch.zeros(8, 64, device=device)
    fn[0, :6] = bits.to(torch.int32).view(torch.float32).to(device)
    fn[1] = -fn[0]
    fn[2, 0], fn[3, 0] = torch.inf, torch.nan
    x = torch.eye(64, device=device).bfloat16()[:6]
    d, _ = hc_prenorm(x, fn)
    wanted = expected.to(torch.int32).view(torch.float32).to(device)
    # The overflow in column 4 meets zeros of x elsewhere: only row 4 has it as a product alone.
    finite = [0, 1, 2, 3, 5]
    clean = fn.clone()
    clean[:2, 4], clean[2:4] = 0, 0
    assert torch.equal(hc_prenorm(x, clean)[0][finite, 0], wanted[finite])
    assert torch.equal(hc_prenorm(x, clean)[0][finite, 1], -wanted[finite])
    assert d[4, 0].isinf() or d[4, 0].isnan()
    assert d[0, 2].isinf()
    assert d[:, 3].isnan().all()


def test_infinite_rows(device: torch.device) -> None:
    x, fn = inputs(device, 70, 24, 1024)
    x[3, 500], x[64, 7] = torch.inf, torch.nan
    sqr_sum = hc_prenorm(x, fn)[1]
    assert sqr_sum[3].item() == torch.inf
    assert sqr_sum[64].isnan()
    sqr_sum[3], sqr_sum[64] = 0, 0
    assert sqr_sum.isfinite().all()


@pytest.mark.parametrize("padding", [0, 4, 64])
def test_strides_and_out(device: torch.device, padding: int) -> None:
    for m, n, k in [(1, 24, 128), (37, 24, 512), (260, 8, 1024)]:
        x, fn = inputs(device, m, n, k, padding=padding)
        d = torch.full((m, n), torch.nan, device=device)
        sqr_sum = torch.full((m,), torch.nan, device=device)
        results = hc_prenorm(x, fn, out=(d, sqr_sum))
        assert results[0] is d
        assert results[1] is sqr_sum
        check(x, fn, d, sqr_sum)


def test_no_rows(device: torch.device) -> None:
    x, fn = inputs(device, 0, 24, 128)
    assert hc_prenorm(x, fn)[0].shape == (0, 24)
    d, sqr_sum = hc_prenorm(x, fn, num_splits=2)
    assert d.shape == (2, 0, 24)
    assert sqr_sum.shape == (2, 0)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases(device: torch.device, chunk: int) -> None:
    for seed in range(SEED + chunk, SEED + CASES[device.type], CHUNKS):
        rng = random.Random(seed)
        small = device.type == "cpu"
        m = rng.choice([rng.randint(1, 20), rng.randint(1, 300), rng.randint(1, 2000)])
        n, k = 8 * rng.randint(1, 16), 64 * rng.randint(1, rng.choice([4, 40, 256]))
        if small:
            m, k = min(m, 100), min(k, 1024)
        splits = rng.choice([None, None, rng.randint(1, k // 64)])
        eps = rng.choice([None, 1e-6, 1.0]) if splits is None else None
        x, fn = inputs(device, m, n, k, seed, rng.choice([0, 0, 4, 8, 60]))
        lead = () if splits is None else (splits,)
        case = f"seed {seed}: m {m} n {n} k {k} splits {splits} eps {eps}"
        results = []
        for _ in range(2):
            d = torch.full((*lead, m, n), torch.nan, device=device)
            sqr_sum = torch.full((*lead, m), torch.nan, device=device)
            hc_prenorm(x, fn, num_splits=splits, eps=eps, out=(d, sqr_sum))
            results.append((d, sqr_sum))
        assert torch.equal(results[0][0], results[1][0]), f"{case}: two runs differ"
        assert torch.equal(results[0][1], results[1][1]), f"{case}: two runs differ"
        try:
            check(x, fn, *results[0], splits, eps)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def refused(
    arg: str, requirement: str, got: str, kind: type[Exception] = ValueError
) -> pytest.RaisesExc:
    return pytest.raises(
        kind, match=rf"^sm120_ops.hc_prenorm: {arg}: expected {requirement}, got {got}"
    )


def test_bad_input(device: torch.device) -> None:
    x, fn = inputs(device, 8, 24, 256)
    with refused("x", "dtype torch.bfloat16", "torch.float16", TypeError):
        hc_prenorm(x.half(), fn)
    with refused("fn", "dtype torch.float32", "torch.bfloat16", TypeError):
        hc_prenorm(x, fn.bfloat16())
    with refused("x", "2 dimensions", r"\[1, 8, 256\]"):
        hc_prenorm(x[None], fn)
    with refused("fn", "K=256 as in x", "K=192"):
        hc_prenorm(x, fn[:, :192])
    for k in (0, 32, 200):
        with refused("x", "K to be a multiple of 64, 64 or more", f"K={k}"):
            hc_prenorm(x[:, :k], fn[:, :k])
    wide = torch.zeros(136, 256, device=device)
    for n in (0, 4, 12, 136):
        with refused("fn", "N to be a multiple of 8, 8 to 128", f"N={n}"):
            hc_prenorm(x, wide[:n])
    for splits in (0, -1, 5):
        with refused("num_splits", "None or 1 to K / 64 = 4", str(splits)):
            hc_prenorm(x, fn, num_splits=splits)
    with refused("eps", r"None with num_splits \(a part of K has no norm\)", "1e-06"):
        hc_prenorm(x, fn, num_splits=2, eps=1e-6)
    for eps in (-1.0, float("nan"), float("inf")):
        with refused("eps", "None or a finite number >= 0", str(eps)):
            hc_prenorm(x, fn, eps=eps)
    with refused("x", r"stride\(1\) == 1", "strides"):
        hc_prenorm(x.t().contiguous().t(), fn)
    odd = torch.zeros(8 * 260 + 1, dtype=torch.bfloat16, device=device)
    with refused("x", "a row stride that is a multiple of 8 and >= 256", "strides"):
        hc_prenorm(odd[: 8 * 260].view(8, 260)[:, :256], fn)
    with refused("x", "a 16-byte aligned data pointer", "0x"):
        hc_prenorm(odd[1:].view(8, 260)[:1, :256], fn)
    with refused("x", "a tensor that needs no gradient .*", "requires", RuntimeError):
        hc_prenorm(x.clone().requires_grad_(), fn)


def test_bad_out(device: torch.device) -> None:
    x, fn = inputs(device, 8, 24, 256)
    d, sqr_sum = hc_prenorm(x, fn)
    with refused("out", r"a pair \(d, sqr_sum\)", "Tensor", TypeError):
        hc_prenorm(x, fn, out=d)  # type: ignore[arg-type]
    with refused("d", r"shape \[2, 8, 24\]", r"\[8, 24\]"):
        hc_prenorm(x, fn, num_splits=2, out=(d, sqr_sum))
    with refused("sqr_sum", r"shape \[8\]", r"\[2, 8\]"):
        hc_prenorm(x, fn, out=(d, torch.zeros(2, 8, device=device)))
    with refused("d", "a contiguous tensor", "strides"):
        hc_prenorm(x, fn, out=(torch.zeros(24, 8, device=device).t(), sqr_sum))
    with refused("d", "dtype torch.float32", "torch.float64", TypeError):
        hc_prenorm(x, fn, out=(d.double(), sqr_sum))
    with refused("sqr_sum", "memory apart from x", "overlapping memory"):
        hc_prenorm(x, fn, out=(d, x.view(torch.float32).view(-1)[:8]))
    with refused("d", "memory apart from fn", "overlapping memory"):
        hc_prenorm(x, fn, out=(fn.view(-1)[:192].view(8, 24), sqr_sum))
    match = r"sm120_ops.hc_prenorm: num_splits: expected .*, got 9"
    with pytest.raises((ValueError, RuntimeError), match=match):
        torch.ops.sm120.hc_prenorm(x, fn, 9)


def test_opcheck(device: torch.device) -> None:
    x, fn = inputs(device, 36, 24, 256)
    for args in [(x, fn), (x, fn, 3), (x, fn, None, 1e-6)]:
        reference.opcheck(torch.ops.sm120.hc_prenorm.default, args)
        outs = torch.ops.sm120.hc_prenorm(*args)
        reference.opcheck(
            torch.ops.sm120.hc_prenorm.out, args, {"d": outs[0].clone(), "sqr_sum": outs[1].clone()}
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(device: torch.device, backend: str) -> None:
    fn = inputs(device, 8, 24, 256)[1]

    def function(x: torch.Tensor) -> torch.Tensor:
        d, sqr_sum = hc_prenorm(x, fn, eps=1e-6)
        parts, squares = hc_prenorm(x, fn, num_splits=2)
        return d + parts.sum(0) + (sqr_sum - squares.sum(0))[:, None]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for m in (7, 3, 64, 2, 100):
            x = inputs(device, m, 24, 256)[0]
            torch.testing.assert_close(compiled(x), function(x))


# ---- Full size, graphs, sanitizer ----------------------------------------------------------------


@pytest.mark.determinism
@pytest.mark.parametrize("m", [1, 13, 100, 1000, 4096, 8192])
@pytest.mark.parametrize("k", [16384, 28672])
def test_full_size(m: int, k: int) -> None:
    x, fn = inputs(torch.device("cuda"), m, 24, k)
    for splits, eps in ((None, None), (None, 1e-6), (16, None)):
        d, sqr_sum = hc_prenorm(x, fn, num_splits=splits, eps=eps)
        check(x, fn, d, sqr_sum, splits, eps)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(20):
            again = hc_prenorm(x, fn, num_splits=splits, eps=eps)
            different += (again[0] != d).sum() + (again[1] != sqr_sum).sum()
        assert different.item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 13, 600])
def test_graph_replay(m: int) -> None:
    x, fn = inputs(torch.device("cuda"), m, 24, 2048)
    hc_prenorm(x, fn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*hc_prenorm(x, fn, eps=1e-6), *hc_prenorm(x, fn, num_splits=4)]
    for _ in range(3):
        x.normal_()
        fn.normal_()
        graph.replay()
        expected = [*hc_prenorm(x, fn, eps=1e-6), *hc_prenorm(x, fn, num_splits=4)]
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k"), [(5000, 640), (17000, 1024), (40000, 320)])
def test_many_tiles(m: int, k: int) -> None:
    """More tiles of 256 rows than SMs, or nearly: K in few parts, several of them a CTA."""
    for n in (24, 128):
        x, fn = inputs(torch.device("cuda"), m, n, k)
        d, sqr_sum = hc_prenorm(x, fn, eps=1e-6)
        check(x, fn, d, sqr_sum, eps=1e-6)
        again = hc_prenorm(x, fn, eps=1e-6)
        assert torch.equal(again[0], d)
        assert torch.equal(again[1], sqr_sum)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [13, 700])
def test_concurrent_streams(m: int) -> None:
    """Launches that overlap, directly and from graphs, each with a workspace of its own."""
    x, fn = inputs(torch.device("cuda"), m, 24, 4096)
    expected = hc_prenorm(x, fn)
    streams = [torch.cuda.Stream() for _ in range(3)]
    graphs, captured = [], []
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(hc_prenorm(x, fn))
        graphs.append(graph)
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                results.append(hc_prenorm(x, fn))
    torch.cuda.synchronize()
    for d, sqr_sum in results + captured:
        assert torch.equal(d, expected[0])
        assert torch.equal(sqr_sum, expected[1])


@pytest.mark.sanitizer
@pytest.mark.usefixtures("filled_allocations")
@pytest.mark.parametrize("n", [8, 24, 128])
def test_sanitizer(n: int) -> None:
    for m, k, splits in [(1, 64, None), (300, 512, None), (13, 1024, None), (260, 320, 3)]:
        x, fn = inputs(torch.device("cpu"), m, n, k)
        d, sqr_sum = sm120_ops.hc_prenorm(x.cuda(), fn.cuda(), num_splits=splits)
        check(x, fn, d.cpu(), sqr_sum.cpu(), splits)
