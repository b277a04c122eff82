"""k-grouped GEMM: drawn cases against float64, group sizes out of rule, graphs, bad input."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
from k_grouped_cases import (
    FORMS,
    check_case,
    draw,
    poison_allocator,
    random_groups,
    simple,
    source,
)
from reference import FP4, FP8, Operand, ceil_div, random_operand

import sm120_ops

CHUNKS = 10
DEFAULT_CASES = {"cpu": 60, "cuda": 1500}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = draw(seed, small=device.type == "cpu")
        try:
            check_case(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


# ---- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tn", [False, True])
@pytest.mark.parametrize("with_c", [False, True])
def test_no_k_at_all(device: torch.device, tn: bool, with_c: bool) -> None:
    """D is C or 0, whatever was there."""
    for total, ks in ((512, [0, 0, 0]), (0, [0, 0]), (0, [])):
        a, b = simple(device, tn, total=total)
        sizes = torch.tensor(ks, dtype=torch.int32, device=device)
        c = torch.randn(len(ks), 40, 24, device=device) if with_c else None
        out = torch.full((len(ks), 40, 24), torch.nan, device=device)
        poison_allocator(device)
        sm120_ops.k_grouped_gemm(a, b, sizes, gran_k_a=32, gran_k_b=32, c=c, out=out)
        assert torch.equal(out, torch.zeros_like(out) if c is None else c)


@pytest.mark.parametrize("rows", [(0, 24), (40, 0), (0, 0)])
@pytest.mark.parametrize("tn", [False, True])
def test_no_rows(device: torch.device, tn: bool, rows: tuple[int, int]) -> None:
    generator = torch.Generator(device).manual_seed(5)
    a, b = (
        source([random_operand(count, 64, FP8, 32, generator)], count, tn, "bytes")
        for count in rows
    )
    ks = torch.tensor([32, 32], dtype=torch.int32, device=device)
    assert sm120_ops.k_grouped_gemm(a, b, ks, gran_k_a=32, gran_k_b=32).shape == (2, *rows)


def test_many_empty_groups(device: torch.device) -> None:
    """Each CTA has tiles with K, then more without than it looks ahead, then one with K."""
    used, empty = (300, 3000) if device.type == "cuda" else (3, 30)
    sizes = [16] * used + [0] * empty + [48] * used
    generator = torch.Generator(device).manual_seed(5)
    whole = random_operand(24, sum(sizes), FP8, 32, generator)
    data = whole.codes.t().contiguous().view(torch.float8_e4m3fn)
    scale = torch.full((4 * len(sizes), 24), 127, dtype=torch.uint8, device=device)
    ks = torch.tensor(sizes, dtype=torch.int32, device=device)
    d = sm120_ops.k_grouped_gemm(
        (data, scale), (data, scale), ks, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32
    )
    values = reference.E4M3.to(device)[whole.codes.long()]
    for group in (0, used - 1, used + empty, len(sizes) - 1):
        begin = sum(sizes[:group])
        part = values[:, begin : begin + sizes[group]]
        reference.assert_gemm_close(d[group], part, part)
    assert not d[used : used + empty].any()


def effective(ks: Sequence[int], total: int, step: int) -> list[int]:
    sizes, left = [], total
    for k in ks:
        sizes.append(min(max(k, 0) // step * step, left))
        left -= sizes[-1]
    return sizes


OUT_OF_RULE = [
    [100, 17, 3, 200],
    [-5, 64, -(2**31), 64],
    [600, 16, 16],
    [2**31 - 1] * 40,
    [256, 300, 2**31 - 16],
    [15] * 70,
]


@pytest.mark.parametrize("ks", OUT_OF_RULE)
@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("tn", [False, True])
def test_sizes_out_of_rule(device: torch.device, tn: bool, fmt: str, ks: list[int]) -> None:
    """Rounded down and cut off; what remains gives the bits that the right sizes give."""
    a, b = simple(device, tn, fmt)
    step = 16 if fmt == FP8 else 32
    run = [
        sm120_ops.k_grouped_gemm(
            a,
            b,
            torch.tensor(sizes, dtype=torch.int32, device=device),
            gran_k_a=32,
            gran_k_b=32,
            out_dtype=torch.float32,
        )
        for sizes in (ks, effective(ks, 512, step))
    ]
    assert torch.equal(run[0].view(torch.int32), run[1].view(torch.int32))
    wrong = torch.tensor(ks, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"at group|up to group"):
        sm120_ops.k_grouped_gemm(a, b, wrong, gran_k_a=32, gran_k_b=32, validate=True)


@pytest.mark.parametrize("form", FORMS)
def test_scales_that_are_missing_are_nan(device: torch.device, form: str) -> None:
    generator = torch.Generator(device).manual_seed(5)
    parts = [random_operand(40, 128, FP8, 32, generator) for _ in range(2)]
    data, scale = source(parts, 40, True, form)
    b = source(parts, 40, True, "bytes")
    short = scale[: scale.shape[0] // 2]
    ks = torch.tensor([128, 128], dtype=torch.int32, device=device)
    d = sm120_ops.k_grouped_gemm((data, short), b, ks, gran_k_a=32, gran_k_b=32)
    assert not d[0].isnan().any()
    assert d[1].isnan().all()
    with pytest.raises(ValueError, match=r"sfa: expected at least \d rows for groups 0 .. 1"):
        sm120_ops.k_grouped_gemm((data, short), b, ks, gran_k_a=32, gran_k_b=32, validate=True)


def test_nan_stays_in_its_group(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(5)
    parts = [random_operand(8, 96, FP8, 32, generator) for _ in range(3)]
    data, scale = source(parts, 8, True, "bytes")
    scale[3 + 1, 2] = 0xFF
    ks = torch.tensor([96, 96, 96], dtype=torch.int32, device=device)
    d = sm120_ops.k_grouped_gemm(
        (data, scale), source(parts, 8, True, "bytes"), ks, gran_k_a=32, gran_k_b=32
    )
    expected = torch.zeros_like(d, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(d.isnan(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tn", [False, True])
@pytest.mark.parametrize("fmts", [(FP8, FP8), (FP8, FP4), (FP4, FP4)])
def test_graph_with_other_sizes(tn: bool, fmts: tuple[str, str]) -> None:
    """Captured once; each replay has other sizes, data and scales in the same memory."""
    m, n, groups, total = 144, 200, 9, 2048
    generator = torch.Generator("cuda").manual_seed(7)
    step = 16 if fmts == (FP8, FP8) else 32
    rng = random.Random(3)

    def draw_groups() -> tuple[list[Operand], list[Operand], list[int]]:
        cuts = sorted(step * rng.randint(0, total // step) for _ in range(groups - 1))
        ks = [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]
        rng.shuffle(ks)
        a, b = (
            random_groups(rows, ks, fmt, 32, generator)
            for rows, fmt in zip((m, n), fmts, strict=True)
        )
        return a, b, ks

    scale_rows = total // 32 + groups
    sources, scales = [], []
    for rows, fmt in zip((m, n), fmts, strict=True):
        shape = (total, rows) if tn else (total * rows,)
        if fmt == FP4:
            shape = (*shape[:-1], shape[-1] // 2)
        sources.append(torch.zeros(shape, dtype=torch.uint8, device="cuda"))
        scales.append(torch.zeros(scale_rows, rows, dtype=torch.uint8, device="cuda"))
    ks = torch.zeros(groups, dtype=torch.int32, device="cuda")
    out = torch.empty(groups, m, n, device="cuda")
    pairs = [
        (data.view(torch.float8_e4m3fn) if fmt == FP8 else data, scale)
        for data, scale, fmt in zip(sources, scales, fmts, strict=True)
    ]

    def call() -> None:
        sm120_ops.k_grouped_gemm(pairs[0], pairs[1], ks, gran_k_a=32, gran_k_b=32, out=out)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(50):
        a, b, sizes = draw_groups()
        for parts, rows, data, scale in zip((a, b), (m, n), sources, scales, strict=True):
            new_data, new_scale = source(parts, rows, tn, "bytes")
            data.copy_(new_data.view(torch.uint8))
            scale.fill_(0xFF)
            scale[: new_scale.shape[0]] = new_scale
        ks.copy_(torch.tensor(sizes))
        out.fill_(torch.nan)
        graph.replay()
        for group in range(groups):
            reference.assert_gemm_close(out[group], a[group].values, b[group].values)


@pytest.mark.gpu
def test_capture_with_validation_is_refused() -> None:
    device = torch.device("cuda")
    a, b = simple(device, True)
    ks = torch.tensor([512], dtype=torch.int32, device=device)
    with (
        pytest.raises(ValueError, match="False under graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        sm120_ops.k_grouped_gemm(a, b, ks, gran_k_a=32, gran_k_b=32, validate=True)


# ---- Interface -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tn", [False, True])
@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_opcheck(device: torch.device, tn: bool, fmt: str) -> None:
    (a, sfa), (b, sfb) = simple(device, tn, fmt)
    ks = torch.tensor([320, 192], dtype=torch.int32, device=device)
    c = torch.randn(2, 40, 24, device=device)
    args = (a, sfa, b, sfb, ks, 32, 32)
    reference.opcheck(torch.ops.sm120.k_grouped_gemm.default, (*args, torch.float32, c))
    reference.opcheck(torch.ops.sm120.k_grouped_gemm.out, (*args, c), {"out": torch.empty_like(c)})


def test_default_dtypes(device: torch.device) -> None:
    a, b = simple(device, True, gran_k=128)
    ks = torch.tensor([512], dtype=torch.int32, device=device)
    c = torch.zeros(1, 40, 24, device=device)
    assert sm120_ops.k_grouped_gemm(a, b, ks).dtype == torch.bfloat16
    assert sm120_ops.k_grouped_gemm(a, b, ks, c=c).dtype == torch.float32
    assert sm120_ops.k_grouped_gemm(a, b, ks, out_dtype=torch.float32).dtype == torch.float32


Arguments = dict[str, Any]


def _bad(**changes: Callable[[Arguments], Any]) -> dict[str, Callable[[Arguments], Any]]:
    return changes


BAD = {
    "data rank": (_bad(a=lambda v: v["a"][None]), "a: expected 1 dimension"),
    "other layout": (_bad(b=lambda v: v["b"].flatten()), "b: expected 2 dimensions"),
    "data dtype": (_bad(a=lambda v: v["a"].float()), "a: expected dtype"),
    "scale dtype": (_bad(sfb=lambda v: v["sfb"].double()), "sfb: expected dtype"),
    "scale rank": (_bad(sfa=lambda v: v["sfa"][0]), "sfa: expected 2 dim"),
    "scale columns": (_bad(sfa=lambda v: v["sfa"][:, 1:]), "a: expected 39 columns"),
    "scale strides": (_bad(sfa=lambda v: v["sfa"].t().contiguous().t()), "sfa: expected contig"),
    "data strides": (_bad(b=lambda v: v["b"].t().contiguous().t()), "b: expected contiguous rows"),
    "sum of k": (_bad(b=lambda v: v["b"][:-16]), "b: expected a sum of k of 512"),
    "ks dtype": (_bad(ks=lambda v: v["ks"].long()), "ks: expected dtype"),
    "ks rank": (_bad(ks=lambda v: v["ks"][None]), "ks: expected 1 dim"),
    "ks strides": (_bad(ks=lambda v: v["ks"].repeat_interleave(2)[::2]), "ks: expected a contig"),
    "gran": (_bad(gran_k_a=lambda v: 64), "gran_k_a: expected 32 or 128"),
    "out shape": (_bad(out=lambda v: v["out"][:1]), r"out: expected shape \[2, 40, 24\]"),
    "out dtype": (_bad(out=lambda v: v["out"].half()), "out: expected dtype"),
    "out strides": (_bad(out=lambda v: v["out"].mT.contiguous().mT), "out: expected contig"),
    "out overlaps": (_bad(out=lambda v: v["out"][:1].expand(2, -1, -1)), "out: expected a group"),
    "c shape": (_bad(c=lambda v: v["out"][:, 1:]), "c: expected shape"),
    "c dtype": (_bad(c=lambda v: v["out"].bfloat16()), "c: expected dtype"),
    "c device": (_bad(c=lambda v: v["out"].to("meta")), "c: expected a tensor on"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(device: torch.device, name: str) -> None:
    """The wrapper and the raw op both refuse it, with the argument's name."""
    changes, text = BAD[name]
    (a, sfa), (b, sfb) = simple(device, True)
    ks = torch.tensor([320, 192], dtype=torch.int32, device=device)
    out = torch.full((2, 40, 24), 7.0, device=device)
    values: Arguments = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "ks": ks, "out": out}
    values |= {"gran_k_a": 32, "gran_k_b": 32, "c": None}
    values |= {key: change(values) for key, change in changes.items()}
    pattern = rf"sm120_ops\.k_grouped_gemm: {text}"
    with pytest.raises((ValueError, TypeError), match=pattern):
        sm120_ops.k_grouped_gemm(
            (values["a"], values["sfa"]),
            (values["b"], values["sfb"]),
            values["ks"],
            gran_k_a=values["gran_k_a"],
            gran_k_b=values["gran_k_b"],
            c=values["c"],
            out=values["out"],
        )
    with pytest.raises((ValueError, TypeError), match=rf"sm120_ops\.k_grouped_gemm: {text[:4]}"):
        torch.ops.sm120.k_grouped_gemm.out(
            *(values[key] for key in ("a", "sfa", "b", "sfb", "ks", "gran_k_a", "gran_k_b", "c")),
            out=values["out"],
        )
    assert bool((out == 7).all())


def test_overlaps_are_refused(device: torch.device) -> None:
    a, b = simple(device, True)
    ks = torch.tensor([320, 192], dtype=torch.int32, device=device)
    buffer = torch.zeros(3, 40, 24, device=device)
    with pytest.raises(ValueError, match=r"memory apart from c|out itself"):
        sm120_ops.k_grouped_gemm(a, b, ks, gran_k_a=32, gran_k_b=32, c=buffer[1:], out=buffer[:2])
    inside = a[0].view(torch.uint8).flatten()[: 2 * 40 * 24 * 4].view(torch.float32)
    with pytest.raises(ValueError, match="out: expected memory apart"):
        sm120_ops.k_grouped_gemm(a, b, ks, gran_k_a=32, gran_k_b=32, out=inside.view(2, 40, 24))


def test_scales_that_are_no_powers_of_two(device: torch.device) -> None:
    a, b = simple(device, True)
    scale = torch.ones(ceil_div(512, 32), 40, device=device)
    scale[3, 5] = 3
    ks = torch.tensor([512], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"sfa: expected float32 scales .* at row 5, group 3"):
        sm120_ops.k_grouped_gemm((a[0], scale), b, ks, gran_k_a=32, gran_k_b=32)
    d = sm120_ops.k_grouped_gemm(
        (a[0], scale), b, ks, gran_k_a=32, gran_k_b=32, validate_scales=False
    )
    assert d[0, 5].isnan().all()
    assert not d[0, :5].isnan().any()


@pytest.mark.sanitizer
@pytest.mark.parametrize("tn", [False, True])
def test_small_cases(tn: bool) -> None:
    """Both layouts at sizes that compute-sanitizer gets through, with sizes out of rule too."""
    device = torch.device("cuda")
    forms = {True: ("words", "floats"), False: ("bytes", "words")}
    for seed, (fmt_a, fmt_b) in enumerate([(FP8, FP8), (FP4, FP8), (FP4, FP4)]):
        case = draw(seed, small=True)
        form_a, form_b = forms[seed % 2 == 0]
        case = dataclasses.replace(
            case, tn=tn, fmt_a=fmt_a, fmt_b=fmt_b, form_a=form_a, form_b=form_b
        )
        ks = (160, 0, 32, 288)
        case = dataclasses.replace(case, ks=ks, m=70, n=34, spare_k=0, padding=0)
        check_case(case, device)
        a, b = simple(device, tn, fmt_a)
        wrong = torch.tensor([96, 17, -1, 600, 5], dtype=torch.int32, device=device)
        sm120_ops.k_grouped_gemm(a, b, wrong, gran_k_a=32, gran_k_b=32)
