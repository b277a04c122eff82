"""Problems for the m-grouped GEMM: operands, index tensors, and what a result must be."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import torch
from reference import FP8, Operand, ceil_div, pack_scale_bytes, random_operand

import sm120_ops

CONTIGUOUS, PSUM, MASKED = "grouped_gemm", "grouped_gemm_psum", "grouped_gemm_masked"
OPS = (CONTIGUOUS, PSUM, MASKED)
INDEX_NAMES = {CONTIGUOUS: "m_indices", PSUM: "group_ends", MASKED: "masked_m"}
UNTOUCHED = 77.0


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    groups: int
    rows: int  # of A, or of each of its matrices
    n: int
    k: int
    fmt_a: str = FP8
    fmt_b: str = FP8
    gran_k_a: int = 32
    gran_k_b: int = 32
    alignment: int = 64
    fp32: bool = False
    seed: int = 0
    expected_m: int = 0
    margin: int = 0  # columns of `out` beside D
    routing: str = "mixed"  # or "few", "full", "one", "none"
    scale_view: bool = False  # B's scales: one canonical matrix of all groups (N % 4 == 0)


def group_scale(operand: Operand, groups: int, rows: int, one_matrix: bool) -> torch.Tensor:
    """Packed scales [groups, rows, words] of an operand of groups * rows rows."""
    if one_matrix and rows % 4 == 0:
        return operand.scale.t().unflatten(1, (groups, rows)).permute(1, 2, 0)
    k_groups = operand.bytes.shape[1]
    words, padded = ceil_div(k_groups, 4), ceil_div(rows, 4) * 4
    device = operand.bytes.device
    storage = torch.zeros(groups, words, padded, dtype=torch.int32, device=device)
    by_group = operand.bytes.view(groups, rows, k_groups)
    for group in range(groups):
        storage[group, :, :rows] = pack_scale_bytes(by_group[group]).t()
    return storage.permute(0, 2, 1)[:, :rows]


def move_scale(scale: torch.Tensor, device: str) -> torch.Tensor:
    """Tensor.to() would drop the rows' padding to 4."""
    words, rows = scale.transpose(-1, -2), scale.shape[-2]
    padded = torch.zeros(*words.shape[:-1], ceil_div(rows, 4) * 4, dtype=torch.int32)
    padded[..., :rows] = words
    return padded.to(device).transpose(-1, -2)[..., :rows, :]


def draw_count(rng: random.Random, most: int, routing: str) -> int:
    if routing == "none":
        return 0
    if routing == "full":
        return most
    if routing == "few":
        return rng.choice((0, 0, 1, 2, 5)) if most >= 5 else rng.randint(0, most)
    return rng.choice((0, most, rng.randint(0, most), min(most, rng.randint(0, 20))))


def draw_index(case: Case, rng: random.Random) -> list[int]:
    """An index tensor that keeps to its layout."""
    if case.op == MASKED:
        one = rng.randrange(case.groups) if case.groups else 0
        return [
            draw_count(rng, case.rows, case.routing if case.routing != "one" else "none")
            if case.routing != "one" or group != one
            else case.rows
            for group in range(case.groups)
        ]
    if case.op == PSUM:
        ends, end = [], 0
        for group in range(case.groups):
            start = ceil_div(end, case.alignment) * case.alignment
            left = max(case.rows - start, 0)
            share = left if rng.random() < 0.02 else min(left, 2 * case.rows // case.groups + 1)
            routing = case.routing if case.routing != "one" else "none"
            count = left if case.routing == "one" and group == case.groups // 2 else 0
            count = count or draw_count(rng, share, routing)
            end = start + count if count else end
            ends.append(end)
        return ends
    index = [-1] * case.rows
    expert = rng.randrange(case.groups) if case.groups else -1
    for begin in range(0, case.rows, case.alignment):
        if case.routing == "mixed" and rng.random() < 0.5 and case.groups:
            expert = rng.randrange(case.groups)
        elif case.routing in ("few", "full") and case.groups:
            expert = (expert + rng.randint(0, 2)) % case.groups
        length = min(case.alignment, case.rows - begin)
        routing = "full" if case.routing == "one" else case.routing
        count = draw_count(rng, length, routing)
        index[begin : begin + count] = [expert] * count
    return index


def runs_of(case: Case, index: list[int]) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and end of the rows to be computed, written apart from the package's own.

    Rows of the masked layout count from the first matrix of A on.
    """
    if case.op == MASKED:
        for group, count in enumerate(index):
            first = group * case.rows
            yield group, first, first + min(max(count, 0), case.rows)
    elif case.op == PSUM:
        start = 0
        for group, raw in enumerate(index):
            end = min(max(raw, 0), case.rows)
            yield group, start, max(end, start)
            start = max(start, ceil_div(end, case.alignment) * case.alignment)
    else:
        for begin in range(0, case.rows, case.alignment):
            expert = index[begin]
            end = begin
            while end < min(begin + case.alignment, case.rows) and index[end] == expert:
                end += 1
            if 0 <= expert < case.groups:
                yield expert, begin, end


class Problem:
    """Operands of a case; rows of no group hold NaN scales and, in FP8, NaN codes."""

    def __init__(self, case: Case, device: torch.device, index: list[int] | None = None):
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(case.seed)
        self.rng = random.Random(case.seed)
        total = case.rows * (case.groups if case.op == MASKED else 1)
        self.a = random_operand(total, case.k, case.fmt_a, case.gran_k_a, generator)
        self.b = random_operand(case.groups * case.n, case.k, case.fmt_b, case.gran_k_b, generator)
        self.weights = self.b.values.view(case.groups, case.n, case.k)
        self.b_data = self.b.data.unflatten(0, (case.groups, case.n))
        self.sfb = group_scale(self.b, case.groups, case.n, case.scale_view)
        self.a_data, self.sfa = self.a.data, self.a.scale
        self.raw_a, self.bytes_a = self.a.data.view(torch.uint8).clone(), self.a.bytes
        self.index = torch.empty(0, dtype=torch.int32, device=device)
        self.set_index(draw_index(case, self.rng) if index is None else index)

    def set_index(self, index: list[int]) -> None:
        """Another routing of the same operands, in the same memory."""
        case = self.case
        self.runs = [run for run in runs_of(case, index) if run[1] < run[2]]
        given = torch.tensor(index, dtype=torch.int32, device=self.device)
        valid = torch.zeros(len(self.a.values), dtype=torch.bool, device=self.device)
        for _, begin, end in self.runs:
            valid[begin:end] = True
        self.valid = valid
        raw = self.raw_a.clone()
        raw[~valid] = 0x7F
        scales = self.bytes_a.clone()
        scales[~valid] = 0xFF
        packed = Operand(self.a.data, pack_scale_bytes(scales), self.a.codes, scales,
                         self.a.values, case.fmt_a, case.gran_k_a)  # fmt: skip
        sfa = packed.scale
        if case.op == MASKED:
            sfa = group_scale(packed, case.groups, case.rows, False)
        if self.index.numel() == given.numel() and given.numel():
            self.index.copy_(given)
            self.a.data.view(torch.uint8).copy_(raw)
            self.sfa.copy_(sfa)
            return
        self.index, self.sfa = given, sfa
        self.a.data.view(torch.uint8).copy_(raw)
        groups = (case.groups, case.rows)
        self.a_data = self.a.data.unflatten(0, groups) if case.op == MASKED else self.a.data

    def to(self, device: str) -> Problem:
        """A copy of the inputs; for running only."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        moved.a_data, moved.b_data, moved.index = (
            x.contiguous().to(device) for x in (self.a_data, self.b_data, self.index)
        )
        moved.sfa, moved.sfb = move_scale(self.sfa, device), move_scale(self.sfb, device)
        return moved

    @property
    def shape(self) -> tuple[int, ...]:
        case = self.case
        rows = (case.groups, case.rows) if case.op == MASKED else (case.rows,)
        return (*rows, case.n)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.a_data, self.sfa, self.b_data, self.sfb, self.index

    @property
    def options(self) -> dict[str, Any]:
        case = self.case
        options: dict[str, Any] = {"gran_k_a": case.gran_k_a, "gran_k_b": case.gran_k_b}
        if case.op != MASKED:
            options["alignment"] = case.alignment
        return {**options, "expected_m": case.expected_m}

    def new_out(self) -> torch.Tensor:
        """Filled with UNTOUCHED; D is its first n columns."""
        shape = (*self.shape[:-1], self.case.n + self.case.margin)
        dtype = torch.float32 if self.case.fp32 else torch.bfloat16
        return torch.full(shape, UNTOUCHED, dtype=dtype, device=self.device)

    def run(self, buffer: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """The public wrapper; the whole buffer, D and margin."""
        buffer = self.new_out() if buffer is None else buffer
        function = getattr(sm120_ops, self.case.op)
        a, b = (self.a_data, self.sfa), (self.b_data, self.sfb)
        function(a, b, self.index, out=buffer[..., : self.case.n], **{**self.options, **options})
        return buffer

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [all rows, N]: the product, and the product of magnitudes; 0 in other rows."""
        shape = (len(self.a.values), self.case.n)
        exact = torch.zeros(shape, dtype=torch.float64, device=self.device)
        magnitude = torch.zeros_like(exact)
        for expert, begin, end in self.runs:
            x, w = self.a.values[begin:end], self.weights[expert].t()
            exact[begin:end] = x @ w
            magnitude[begin:end] = x.abs() @ w.abs()
        return exact, magnitude

    def check(self, buffer: torch.Tensor) -> None:
        """D is right in the rows of the groups, and nothing else was written."""
        whole = buffer.reshape(len(self.valid), buffer.shape[-1])
        d, n = whole[:, : self.case.n], self.case.n
        written = (whole != UNTOUCHED).any(1) & ~self.valid
        assert not written.any(), f"row {int(written.nonzero()[0])} belongs to no group"
        assert (whole[:, n:] == UNTOUCHED).all(), "wrote beside D"
        exact, magnitude = self.exact()
        error = (d.double() - exact).abs()
        error[~self.valid] = 0
        if error.numel() == 0:
            return
        assert not error.isnan().any(), f"NaN at {error.isnan().nonzero()[0].tolist()}"
        if self.case.fp32:
            yardstick = exact.norm() if d.numel() >= 256 else magnitude.norm()
            assert error.norm() <= 1e-6 * yardstick, f"error {error.norm() / yardstick:.3g}"
        rounding = 0 if self.case.fp32 else 2.0**-8 * exact.abs()
        excess = error - rounding - 2.0**-18 * magnitude
        worst = divmod(int(excess.argmax()), n)
        assert excess.max() <= 0, f"D{list(worst)} = {d[worst]}, not {exact[worst]}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
