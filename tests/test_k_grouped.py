"""k-grouped GEMM: drawn cases against float64, group sizes out of rule, graphs, bad input."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import reference
import torch
from reference import FP4, FP8, Operand, ceil_div, random_operand

import sm120_ops

CHUNKS = 10
DEFAULT_CASES = {"cpu": 60, "cuda": 400}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))
FORMS = ("words", "bytes", "e8m0", "floats")


@dataclass(frozen=True)
class Case:
    seed: int
    m: int
    n: int
    ks: tuple[int, ...]
    tn: bool
    fmt_a: str
    fmt_b: str
    gran_k_a: int
    gran_k_b: int
    form_a: str
    form_b: str
    spare_k: int  # that the data holds, and no group uses
    padding: int  # bytes between the rows of tn data, values between those of scales
    fp32: bool
    c: str  # "none", "separate", "out" (in place)
    margin: tuple[int, int]  # columns left and right of D in its buffer


def draw(seed: int, small: bool) -> Case:
    rng = random.Random(seed)
    fmt_a, fmt_b = rng.choice((FP8, FP4)), rng.choice((FP8, FP4))
    step = 16 if fmt_a == fmt_b == FP8 else 32
    limit = 96 if small else 400
    m, n = (
        min(rng.choice([rng.randint(1, 40), rng.randint(1, 400), 128, 129, 256]), limit)
        for _ in range(2)
    )
    groups = rng.choice([1, 2, 3, 5, 8, 8] if small else [1, 2, 3, 5, 8, 31, 33, 64, 128])
    longest = rng.choice([2 * step, 160, 512, 1024 if groups < 10 else 256])
    ks = [step * rng.randint(0, longest // step) for _ in range(groups)]
    ks = [0 if rng.random() < 0.15 else k for k in ks]
    if rng.random() < 0.3:
        ks = [k // 128 * 128 for k in ks]
    return Case(
        seed=seed,
        m=m + m % 2,
        n=n + n % 2 if FP4 in (fmt_a, fmt_b) else n,
        ks=tuple(ks),
        tn=rng.random() < 0.5,
        fmt_a=fmt_a,
        fmt_b=fmt_b,
        gran_k_a=rng.choice((32, 128)),
        gran_k_b=rng.choice((32, 128)),
        form_a=rng.choice(FORMS),
        form_b=rng.choice(FORMS),
        spare_k=step * rng.choice((0, 0, 1, 9)),
        padding=rng.choice((0, 0, 16, 5)),
        fp32=rng.random() < 0.5,
        c=rng.choice(("none", "none", "separate", "out")),
        margin=rng.choice([(0, 0), (0, 0), (8, 8), (0, 3), (1, 0)]),
    )


def padded_rows(t: torch.Tensor, padding: int, value: int) -> torch.Tensor:
    """The same matrix with `padding` elements behind each row."""
    shape = (t.shape[0], t.shape[1] + padding)
    raw = torch.full(shape, value, dtype=t.dtype, device=t.device)
    raw[:, : t.shape[1]] = t
    return raw[:, : t.shape[1]]


def source(
    parts: Sequence[Operand], rows: int, tn: bool, form: str, spare_k: int = 0, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups as the op takes them: their matrices side by side, and NaN where no group is."""
    fmt, device = parts[0].fmt, parts[0].codes.device
    if tn:
        spare = torch.full((spare_k, rows), 0x7F, dtype=torch.uint8, device=device)
        codes = torch.cat([part.codes.t() for part in parts] + [spare])
        if fmt == FP4:
            codes = codes & 15
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        data = padded_rows(codes, padding, 0x7F)
    else:
        per_byte = 2 if fmt == FP4 else 1
        spare = torch.full((rows * spare_k // per_byte,), 0x7F, dtype=torch.uint8, device=device)
        flat = [part.data.contiguous().view(torch.uint8).flatten() for part in parts]
        data = torch.cat([*flat, spare])
    if fmt == FP8:
        data = data.view(torch.float8_e4m3fn)
    if form == "words":
        words = [reference.pack_scale_bytes(part.bytes).t() for part in parts]
        return data, padded_rows(torch.cat(words), padding, -1)
    scales = torch.cat([part.bytes.t() for part in parts])
    if form == "floats":
        return data, padded_rows(reference.UE8M0.to(device)[scales.long()].float(), padding, 1)
    scales = padded_rows(scales, padding, 0xFF)
    return data, scales.view(torch.float8_e8m0fnu) if form == "e8m0" else scales


def random_groups(
    rows: int, ks: Sequence[int], fmt: str, gran_k: int, generator: torch.Generator
) -> list[Operand]:
    return [random_operand(rows, k, fmt, gran_k, generator) for k in ks]


def poison_allocator(device: torch.device) -> None:
    """What the op allocates next holds 0xFF, a NaN in every format, wherever it does not write."""
    if device.type == "cuda":
        sizes = [32 << 20, 1 << 20, 1 << 20, 1 << 16, 1 << 16]
        blocks = [torch.full((s,), 0xFF, dtype=torch.uint8, device=device) for s in sizes]
        del blocks


def check_case(case: Case, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(case.seed)
    a = random_groups(case.m, case.ks, case.fmt_a, case.gran_k_a, generator)
    b = random_groups(case.n, case.ks, case.fmt_b, case.gran_k_b, generator)
    source_a = source(a, case.m, case.tn, case.form_a, case.spare_k, case.padding)
    source_b = source(b, case.n, case.tn, case.form_b, case.spare_k, case.padding)
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    bits = torch.int32 if case.fp32 else torch.int16
    left, right = case.margin
    shape = (len(case.ks), case.m, left + case.n + right)

    def middle(t: torch.Tensor) -> torch.Tensor:
        return t[..., left : left + case.n]

    before = torch.full(shape, torch.nan, dtype=dtype, device=device)
    c = None
    if case.c != "none":
        values = torch.randn(shape, generator=generator, device=device)
        c = (values * (1000 if case.fmt_a == FP8 else 30)).to(dtype)
        if case.c == "out":
            before = c
    ks = torch.tensor(case.ks, dtype=torch.int32, device=device)
    results = []
    for _ in range(2):
        buffer = before.clone()
        out = middle(buffer)
        poison_allocator(device)
        sm120_ops.k_grouped_gemm(
            source_a,
            source_b,
            ks,
            gran_k_a=case.gran_k_a,
            gran_k_b=case.gran_k_b,
            c=None if c is None else out if case.c == "out" else middle(c),
            out=out,
            validate=True,
        )
        results.append(buffer)
    assert torch.equal(results[0].view(bits), results[1].view(bits)), "two runs differ"
    got = middle(results[0])
    for group in range(len(case.ks)):
        addend = None if c is None else middle(c)[group]
        reference.assert_gemm_close(got[group], a[group].values, b[group].values, addend)
    outside = torch.ones(shape[2], dtype=torch.bool, device=device)
    outside[left : left + case.n] = False
    kept = results[0][..., outside].view(bits)
    assert torch.equal(kept, before[..., outside].view(bits)), "wrote outside of D"


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


def simple(
    device: torch.device, tn: bool, fmt: str = FP8, total: int = 512, gran_k: int = 32
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Operands of 40 and 24 rows with one scale row a K-group, all of one group at first."""
    generator = torch.Generator(device).manual_seed(5)
    a = random_operand(40, total, fmt, gran_k, generator)
    b = random_operand(24, total, fmt, gran_k, generator)
    return source([a], 40, tn, "bytes"), source([b], 24, tn, "bytes")


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
        sm120_ops.k_grouped_gemm(*pairs, ks, gran_k_a=32, gran_k_b=32, out=out)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(20):
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


Arguments = dict[str, object]


def _bad(**changes: Callable[[Arguments], object]) -> dict[str, Callable[[Arguments], object]]:
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
        changes = {"tn": tn, "fmt_a": fmt_a, "fmt_b": fmt_b, "form_a": form_a, "form_b": form_b}
        changes |= {"ks": (160, 0, 32, 288), "m": 70, "n": 34, "spare_k": 0, "padding": 0}
        check_case(dataclasses.replace(case, **changes), device)
        a, b = simple(device, tn, fmt_a)
        ks = torch.tensor([96, 17, -1, 600, 5], dtype=torch.int32, device=device)
        sm120_ops.k_grouped_gemm(a, b, ks, gran_k_a=32, gran_k_b=32)
