"""bf16_gemm against float64: layouts, strides, C, edges, special values, bad input, compile."""

from __future__ import annotations

import pytest
import reference
import torch
from bf16_cases import LAYOUTS, OUT_DTYPES, check, operands

import sm120_ops
from sm120_ops import bf16_gemm


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
    with refused("out", "a torch.Tensor", "list", TypeError):
        bf16_gemm(a, b, out=[c])  # type: ignore[arg-type]
    with refused("c", "a torch.Tensor", "float", TypeError):
        bf16_gemm(a, b, c=1.0)  # type: ignore[arg-type]
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
