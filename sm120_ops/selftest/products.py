"""BF16 GEMMs, dense and in groups, and the hyper-connection prenorm, of the self-test.

`formula` gives a case's results in FP64, and `error` the distance of one of them from another.
"""

from __future__ import annotations

import abc
import dataclasses
import random
from collections.abc import Iterator

import torch

from sm120_ops.selftest.bounds import Case, Parts, relative_error
from sm120_ops.selftest.cases import POISON, random_matrix

# Relative norms. An MMA cuts off what does not fit the sum's 24 bits: K * 2^-29 on average.
SUM_ERROR, SUM_ERROR_OF_K = 1e-6, 2.0**-29
BF16_ERROR = 2.0**-8  # of one rounding, or of two by chance on two sides of a midpoint
SQUARES_ERROR = 1e-6


class NormCase(Case):
    """A case whose results are judged as a whole."""

    @abc.abstractmethod
    def formula(self) -> Parts:
        """FP64 values of the results."""

    @abc.abstractmethod
    def error(self, part: str, got: torch.Tensor, want: torch.Tensor) -> float:
        """In units of what is allowed."""

    def errors(self, got: Parts, want: Parts | None = None) -> dict[str, float]:
        want = self.formula() if want is None else want
        return {part: self.error(part, value, want[part]) for part, value in got.items()}


def _matrix(rows: int, columns: int, seed: int, mn_major: bool) -> torch.Tensor:
    """bfloat16 [rows, columns] whose lines, in either direction, are 16-byte aligned."""
    lines, length = (columns, rows) if mn_major else (rows, columns)
    wide = torch.full((lines, -(-length // 8) * 8), torch.nan, dtype=torch.bfloat16)
    values = random_matrix(rows, columns, seed, torch.bfloat16)
    wide[:, :length] = values.T if mn_major else values
    return wide[:, :length].T if mn_major else wide[:, :length]


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same strides on another device."""
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.to(device).as_strided(x.shape, x.stride())


@dataclasses.dataclass(frozen=True)
class Bf16Case(NormCase):
    M: int
    N: int
    K: int
    layout: str = "nt"
    fp32: bool = True
    accumulate: bool = False  # C = the output's own memory

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.fp32 else torch.bfloat16

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        a = _matrix(self.M, self.K, 1, self.layout[0] == "t")
        return a, _matrix(self.N, self.K, 2, self.layout[1] == "n")

    def initial(self) -> torch.Tensor:
        if self.accumulate:
            return random_matrix(self.M, self.N, 3, self.dtype)
        return torch.full((self.M, self.N), POISON, dtype=self.dtype)

    def run(self, device: torch.device) -> Parts:
        a, b = (_moved(x, device) for x in self.operands())
        out = self.initial().to(device)
        torch.ops.sm120.bf16_gemm.out(a, b, out if self.accumulate else None, out=out)
        return {"out": out.cpu()}

    def formula(self) -> Parts:
        a, b = self.operands()
        product = a.double() @ b.double().T
        return {"out": product + self.initial().double() if self.accumulate else product}

    def error(self, part: str, got: torch.Tensor, want: torch.Tensor) -> float:
        allowed = max(SUM_ERROR, SUM_ERROR_OF_K * self.K) if self.fp32 else BF16_ERROR
        return relative_error(got, want, allowed)


@dataclasses.dataclass(frozen=True)
class GroupedCase(NormCase):
    """Tokens of some experts, in segments with padding; and the gradients of their weights."""

    experts: int
    rows: int  # at most, of an expert
    N: int
    K: int
    alignment: int = 16
    layout: str = "nt"
    seed: int = 0

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """a, b, m_indices, rows of each expert."""
        draw = random.Random(self.seed)
        sizes = [draw.choice((0, draw.randint(0, self.rows))) for _ in range(self.experts)]
        indices: list[int] = []
        for expert, size in enumerate(sizes):
            indices += [expert] * size + [-1] * (-size % self.alignment)
        indices += [-1] * self.alignment
        b = torch.stack([random_matrix(self.N, self.K, e, torch.bfloat16)
                         for e in range(self.experts)])  # fmt: skip
        b = b.mT.contiguous().mT if self.layout == "nn" else b
        index = torch.tensor(indices, dtype=torch.int32)
        a = random_matrix(len(indices), self.K, 77, torch.bfloat16)
        a[index < 0] = torch.nan
        return a, b, index, torch.tensor(sizes, dtype=torch.int32)

    def run(self, device: torch.device) -> Parts:
        a, b, index, sizes = self.parts()
        ops = torch.ops.sm120
        weights = _moved(b, device)
        d = ops.bf16_grouped_gemm(
            a.to(device), weights, index.to(device), torch.float32, self.alignment
        )
        starts = torch.cumsum(-(-sizes // self.alignment) * self.alignment, 0)
        ends = torch.cat((sizes.new_zeros(1), starts[:-1])).int() + sizes
        psum = ops.bf16_grouped_gemm_psum(
            a.to(device), weights, ends.to(device), torch.float32, self.alignment
        )
        padded = a.new_full((self.experts, self.rows, self.K), torch.nan)
        for expert in range(self.experts):
            padded[expert, : sizes[expert]] = a[index == expert]
        masked = ops.bf16_grouped_gemm_masked(
            padded.to(device), weights, sizes.to(device), torch.float32
        )
        tokens = a[index >= 0].to(device)
        return {
            "out": d.cpu(),
            "psum": psum.cpu(),
            "masked": masked.cpu(),
            "gradients": ops.bf16_k_grouped_gemm(
                tokens, tokens[:, : self.N], sizes.to(device), torch.float32
            ).cpu(),
        }

    def formula(self) -> Parts:
        a, b, index, _ = self.parts()
        d = torch.zeros(len(index), self.N, dtype=torch.float64)
        gradients = torch.zeros(self.experts, self.K, min(self.N, self.K), dtype=torch.float64)
        masked = torch.zeros(self.experts, self.rows, self.N, dtype=torch.float64)
        for expert in range(self.experts):
            x = a[index == expert].double()
            d[index == expert] = x @ b[expert].double().T
            masked[expert, : len(x)] = d[index == expert]
            gradients[expert] = x.T @ x[:, : self.N]
        return {"out": d, "psum": d, "masked": masked, "gradients": gradients}

    def error(self, part: str, got: torch.Tensor, want: torch.Tensor) -> float:
        return relative_error(got, want, max(SUM_ERROR, SUM_ERROR_OF_K * max(self.K, self.rows)))


@dataclasses.dataclass(frozen=True)
class PrenormCase(NormCase):
    M: int
    N: int
    K: int
    splits: int | None = None
    eps: float | None = None

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = random_matrix(self.M, self.K, 1, torch.bfloat16)
        fn = random_matrix(self.N, self.K, 2, torch.float32)
        # TF32 values, so that the formula needs no rounding.
        return x, (fn.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def run(self, device: torch.device) -> Parts:
        x, fn = (t.to(device) for t in self.inputs())
        d, squares = torch.ops.sm120.hc_prenorm(x, fn, self.splits, self.eps)
        if self.splits is not None:
            d, squares = d.sum(0), squares.sum(0)
        return {"d": d.cpu(), "squares": squares.cpu()}

    def formula(self) -> Parts:
        x, fn = (t.double() for t in self.inputs())
        d, squares = x @ fn.T, x.square().sum(1)
        if self.eps is not None:
            d = d * torch.rsqrt(squares / self.K + self.eps)[:, None]
        return {"d": d, "squares": squares}

    def error(self, part: str, got: torch.Tensor, want: torch.Tensor) -> float:
        allowed = max(SUM_ERROR, SUM_ERROR_OF_K * self.K) if part == "d" else SQUARES_ERROR
        return relative_error(got, want, allowed)


def bf16_cases(quick: bool) -> Iterator[NormCase]:
    edges = ((1, 1, 8), (1, 2112, 768), (16, 136, 2880), (64, 96, 4096), (130, 257, 512),
             (5, 24, 0))  # fmt: skip
    for layout in ("nt", "nn", "tn", "tt"):
        for M, N, K in edges:
            yield Bf16Case(M, N, K, layout)
        yield Bf16Case(70, 384, 1056, layout, fp32=False, accumulate=True)
    for layout in ("nt", "nn"):
        for alignment in (16, 64, 128):
            yield GroupedCase(5, 70, 72, 264, alignment, layout, alignment)
            if not quick:
                yield GroupedCase(24, 200, 200, 512, alignment, layout, alignment)
    if not quick:
        yield Bf16Case(64, 128, 16384)


def prenorm_cases(quick: bool) -> Iterator[PrenormCase]:
    for M in (1, 13, 130) if quick else (1, 13, 130, 1000):
        yield PrenormCase(M, 24, 4096)
        yield PrenormCase(M, 24, 1024, splits=4)
        yield PrenormCase(M, 64, 1024, eps=1e-6)
