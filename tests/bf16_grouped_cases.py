"""Problems for the grouped BF16 GEMMs: operands, groups, and what a result must be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bf16_cases import matrix, sum_error
from grouped_cases import CONTIGUOUS, MASKED, OPS, PSUM, UNTOUCHED, bits, draw_index, runs_of
from grouped_cases import Case as Routing
from reference import assert_gemm_close

import sm120_ops

__all__ = ["CONTIGUOUS", "MASKED", "OPS", "PSUM", "UNTOUCHED", "KCase", "Problem", "Routing",
           "bits", "check_k_case", "draw_index", "draw_k_case", "draw_routing"]  # fmt: skip


def matrices(
    groups: int, rows: int, k: int, generator: torch.Generator, mn_major: bool, padding: int
) -> torch.Tensor:
    """[groups, rows, K], one matrix behind the other."""
    flat = matrix(groups * k, rows, generator, padding=padding) if mn_major else None
    if flat is not None:
        return flat.unflatten(0, (groups, k)).transpose(1, 2)
    return matrix(groups * rows, k, generator, padding=padding).unflatten(0, (groups, rows))


class Problem:
    """m-grouped. Rows of no group hold NaN."""

    def __init__(
        self,
        case: Routing,
        device: torch.device,
        index: list[int] | None = None,
        layout: str = "nt",
        padding: int = 0,
    ) -> None:
        self.case, self.device = case, device
        self.rng = random.Random(case.seed)
        generator = torch.Generator(device).manual_seed(case.seed)
        mn_a, mn_b = layout[0] == "t", layout[1] == "n"
        if case.op == MASKED:
            self.a = matrices(case.groups, case.rows, case.k, generator, mn_a, padding)
        else:
            self.a = matrix(case.rows, case.k, generator, mn_major=mn_a, padding=padding)
        self.b = matrices(case.groups, case.n, case.k, generator, mn_b, padding)
        self.values = self.a.clone()
        self.index = torch.empty(0, dtype=torch.int32, device=device)
        self.set_index(draw_index(case, self.rng) if index is None else index)

    @property
    def op(self) -> str:
        return f"bf16_{self.case.op}"

    def set_index(self, index: list[int]) -> None:
        """Another routing of the same operands, in the same memory."""
        case = self.case
        self.runs = [run for run in runs_of(case, index) if run[1] < run[2]]
        given = torch.tensor(index, dtype=torch.int32, device=self.device)
        total = case.rows * (case.groups if case.op == MASKED else 1)
        self.valid = torch.zeros(total, dtype=torch.bool, device=self.device)
        for _, begin, end in self.runs:
            self.valid[begin:end] = True
        # In one pass over a mask of A's own shape: A may have any strides.
        mask = self.valid.view(self.a.shape[:-1])[..., None]
        self.a.copy_(torch.where(mask, self.values, torch.nan))
        if self.index.numel() == given.numel():
            self.index.copy_(given)
        else:
            self.index = given

    def new_out(self) -> torch.Tensor:
        """Filled with UNTOUCHED; D is its first n columns."""
        shape = (*self.a.shape[:-1], self.case.n + self.case.margin)
        dtype = torch.float32 if self.case.fp32 else torch.bfloat16
        return torch.full(shape, UNTOUCHED, dtype=dtype, device=self.device)

    def run(self, buffer: torch.Tensor | None = None, validate: bool = False) -> torch.Tensor:
        """The public wrapper; the whole buffer, D and margin."""
        buffer = self.new_out() if buffer is None else buffer
        options = {} if self.case.op == MASKED else {"alignment": self.case.alignment}
        getattr(sm120_ops, self.op)(
            self.a, self.b, self.index, expected_m=self.case.expected_m, validate=validate,
            out=buffer[..., : self.case.n], **options,
        )  # fmt: skip
        return buffer

    def run_forced(self, tile: int, swapped: bool) -> torch.Tensor:
        buffer = self.new_out()
        torch.ops.sm120._bf16_grouped_forced(
            self.op, self.a, self.b, self.index, self.case.alignment, buffer[..., : self.case.n],
            tile, swapped,
        )  # fmt: skip
        return buffer

    def check(self, buffer: torch.Tensor) -> None:
        """D is right in the rows of the groups, and nothing else was written."""
        n = self.case.n
        whole = buffer.reshape(len(self.valid), buffer.shape[-1])
        written = (whole != UNTOUCHED).any(1) & ~self.valid
        assert not written.any(), f"row {int(written.nonzero()[0])} belongs to no group"
        assert (whole[:, n:] == UNTOUCHED).all(), "wrote beside D"
        values = self.values.reshape(len(self.valid), self.case.k)
        for expert, begin, end in self.runs:
            assert_gemm_close(
                whole[begin:end, :n],
                values[begin:end].double(),
                self.b[expert].double(),
                relative=sum_error(self.case.k),
            )


def draw_routing(seed: int, small: bool) -> tuple[Routing, str, int]:
    """A case, the layout of its operands, and the padding of their lines."""
    rng = random.Random(seed)
    groups = rng.choice([0, 1, 2, rng.randint(1, 16), rng.randint(1, 64), rng.randint(64, 256)])
    rows = rng.choice([rng.randint(0, 40), rng.randint(1, 400), rng.randint(1, 3000)])
    n = rng.choice([rng.randint(1, 300), 8 * rng.randint(1, 40), 128])
    k = rng.choice([rng.randint(0, 200), 8 * rng.randint(1, 128)])
    op = rng.choice(OPS)
    if small:
        groups, rows, n, k = groups % 20, min(rows, 300), min(n, 50), min(k, 288)
    if op == MASKED:
        rows = min(rows, 2000 // max(groups, 1) + 5 if small else 20000 // max(groups, 1) + 5)
    while groups * n * k > 1 << 24:
        n, k = n // 2 + 1, k // 2
    case = Routing(
        op, groups, rows, n, k,
        alignment=rng.choice((16, 32, 64, 128)),
        fp32=rng.random() < 0.5,
        seed=seed,
        expected_m=rng.choice((0, 0, 1, 20, 100, 1000)),
        margin=rng.choice((0, 0, 8, 3)),
        routing=rng.choice(("mixed", "mixed", "few", "full", "one", "none")),
    )  # fmt: skip
    return case, rng.choice(("nt", "nn", "tn", "tt")), rng.choice((0, 0, 8, 56))


# ---- k-grouped -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class KCase:
    seed: int
    m: int
    n: int
    ks: tuple[int, ...]
    spare_k: int = 0  # rows behind the last group's
    padding: int = 0
    fp32: bool = True
    c: str = "none"  # or "separate", "out" (in place)
    margin: tuple[int, int] = (0, 0)  # columns left and right of D in its buffer
    broken: bool = False  # some sizes negative, or more than there is


def draw_k_case(seed: int, small: bool) -> KCase:
    rng = random.Random(seed)
    limit = 96 if small else 400
    m, n = (
        min(rng.choice([rng.randint(1, 40), rng.randint(1, 400), 128, 129, 256]), limit)
        for _ in range(2)
    )
    groups = rng.choice([0, 1, 2, 3, 5, 8] if small else [0, 1, 2, 3, 5, 8, 31, 33, 64, 130])
    longest = rng.choice([3, 40, 160, 600 if groups < 10 else 200])
    ks = [0 if rng.random() < 0.15 else rng.randint(0, longest) for _ in range(groups)]
    if rng.random() < 0.2:
        ks = [k // 32 * 32 for k in ks]
    return KCase(
        seed=seed,
        m=m,
        n=n,
        ks=tuple(ks),
        spare_k=rng.choice((0, 0, 1, 77)),
        padding=rng.choice((0, 0, 8, 56)),
        fp32=rng.random() < 0.5,
        c=rng.choice(("none", "none", "separate", "out")),
        margin=rng.choice([(0, 0), (0, 0), (8, 8), (0, 3), (1, 0)]),
        broken=rng.random() < 0.1,
    )


def spans(ks: Sequence[int], total: int) -> list[tuple[int, int]]:
    """Where groups begin and end, written apart from the package's own."""
    ends = [0]
    for k in ks:
        ends.append(min(total, ends[-1] + max(k, 0)))
    return list(itertools.pairwise(ends))


def check_k_case(case: KCase, device: torch.device, config: tuple[int, bool] | None = None) -> None:
    """Runs it twice, through the wrapper or with a given configuration."""
    generator = torch.Generator(device).manual_seed(case.seed)
    total = sum(case.ks) + case.spare_k
    a = matrix(total, case.m, generator, padding=case.padding)
    b = matrix(total, case.n, generator, padding=case.padding)
    ks = list(case.ks)
    if case.broken and ks:
        ks[case.seed % len(ks)] = -5
        ks[-1] += 1000
    places = spans(ks, total)
    used = places[-1][1] if places else 0
    a[used:], b[used:] = torch.nan, torch.nan
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    left, right = case.margin
    shape = (len(ks), case.m, left + case.n + right)

    def middle(t: torch.Tensor) -> torch.Tensor:
        return t[..., left : left + case.n]

    before = torch.full(shape, torch.nan, dtype=dtype, device=device)
    c = None
    if case.c != "none":
        c = (torch.randn(shape, generator=generator, device=device) * 10).to(dtype)
        before = c if case.c == "out" else before
    index = torch.tensor(ks, dtype=torch.int32, device=device)
    results = []
    for _ in range(2):
        buffer = before.clone()
        out = middle(buffer)
        addend = None if c is None else out if case.c == "out" else middle(c)
        if config is None:
            sm120_ops.bf16_k_grouped_gemm(a, b, index, c=addend, out=out)
        else:
            torch.ops.sm120._bf16_k_grouped_forced(a, b, index, addend, out, *config)
        results.append(buffer)
    assert torch.equal(bits(results[0]), bits(results[1])), "two runs differ"
    got = middle(results[0])
    for group, (begin, end) in enumerate(places):
        addend = None if c is None else middle(c)[group]
        x, y = a[begin:end].double().t(), b[begin:end].double().t()
        assert_gemm_close(got[group], x, y, addend, relative=sum_error(end - begin))
    outside = torch.ones(shape[2], dtype=torch.bool, device=device)
    outside[left : left + case.n] = False
    kept = bits(results[0][..., outside].contiguous())
    assert torch.equal(kept, bits(before[..., outside].contiguous())), "wrote outside of D"
