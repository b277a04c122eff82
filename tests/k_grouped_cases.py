"""Drawn k-grouped GEMM cases, and operands in both layouts and every form of scales."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import reference
import torch
from reference import FP4, FP8, Operand, random_operand

import sm120_ops

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


def simple(
    device: torch.device, tn: bool, fmt: str = FP8, total: int = 512, gran_k: int = 32
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Operands of 40 and 24 rows with one scale row a K-group, all of one group at first."""
    generator = torch.Generator(device).manual_seed(5)
    a = random_operand(40, total, fmt, gran_k, generator)
    b = random_operand(24, total, fmt, gran_k, generator)
    return source([a], 40, tn, "bytes"), source([b], 24, tn, "bytes")
