"""The self-test's einsum cases: equations and formats, heads in the middle, sums over a batch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import torch

from sm120_ops.selftest import formulas
from sm120_ops.selftest.bounds import SumCase
from sm120_ops.selftest.cases import POISON, random_matrix

# Scaled operands are quantised along their last index, which is then the one summed over.
SCALED = ("bhr,hdr->bhd", "hdr,bhr->bhd", "hbr,hdr->hbd")
EQUATIONS = {
    "bf16": (*SCALED, "bhd,hdr->bhr", "bhd,bhr->hdr"), "mxfp8": SCALED, "mxfp4": SCALED
}  # fmt: skip
SUM = "bmk,bnk->mn"


@dataclasses.dataclass(frozen=True)
class EinsumCase(SumCase):
    equation: str
    sizes: tuple[tuple[str, int], ...]
    format: str = "bf16"
    gran_k: int = 32
    out_dtype: torch.dtype = torch.bfloat16
    accumulate: bool = False  # C = the output's own memory
    pad: int = 0  # extra elements in D's rows, 16 bytes times this in those of BF16 operands
    seed: int = 0

    def shapes(self) -> list[tuple[int, ...]]:
        """Of A, B and D."""
        sizes = dict(self.sizes)
        parts = self.equation.replace("->", ",").split(",")
        return [tuple(sizes[index] for index in part) for part in parts]

    def operands(self) -> list[tuple[torch.Tensor, ...]]:
        """(BF16 tensor,) or (data, scale) of A and of B, on the CPU; scales packed row by row."""
        found: list[tuple[torch.Tensor, ...]] = []
        for shape, seed in zip(self.shapes(), (1, 2), strict=False):
            rows = shape[0] * shape[1]
            x = random_matrix(rows, shape[2], self.seed * 2 + seed, torch.bfloat16)
            if self.format == "bf16":
                found.append((x.view(shape),))
                continue
            data, scale = torch.ops.sm120.quantize(x, self.format, self.gran_k)
            scale = scale.contiguous().view(*shape[:2], -1)
            found.append((data.view(*shape[:2], -1), scale))
        return found

    def values(self) -> list[torch.Tensor]:
        """FP64 values of A and B."""
        found = []
        for shape, parts in zip(self.shapes(), self.operands(), strict=False):
            if len(parts) == 1:
                found.append(parts[0].double())
                continue
            data, scale = (part.flatten(0, 1) for part in parts)
            found.append(formulas.dequantize(data, scale, self.gran_k).view(shape))
        return found

    def initial_output(self) -> torch.Tensor:
        """D's whole buffer before the op: poison, or the values of C."""
        shape = self.shapes()[2]
        buffer = torch.full((*shape[:-1], shape[-1] + self.pad), POISON, dtype=self.out_dtype)
        if self.accumulate:
            rows = buffer.shape[:-1].numel()
            values = random_matrix(rows, shape[-1], self.seed, self.out_dtype)
            buffer[..., : shape[-1]] = values.view(shape)
        return buffer

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        from sm120_ops import einsum

        given: list[Any] = []
        for parts in self.operands():
            moved = tuple(self._strided(part.to(device)) for part in parts)
            given.append(moved[0] if len(moved) == 1 else moved)
        buffer = self.initial_output().to(device)
        out = buffer[..., : self.shapes()[2][-1]]
        einsum(
            self.equation,
            given[0],
            given[1],
            c=out if self.accumulate else None,
            out=out,
            gran_k_a=self.gran_k,
            gran_k_b=self.gran_k,
        )
        return {"out": buffer.cpu()}

    def _strided(self, x: torch.Tensor) -> torch.Tensor:
        if self.pad == 0 or x.dtype != torch.bfloat16:
            return x
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), POISON, dtype=x.dtype, device=x.device)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]

    def _spread(self, absolute: bool) -> torch.Tensor:
        """The product, or that of magnitudes, and C, in D's whole buffer in FP64."""
        a, b = (x.abs() if absolute else x for x in self.values())
        initial = self.initial_output().double()
        initial = initial.abs() if absolute else initial
        product = torch.einsum(self.equation, a, b)
        columns = product.shape[-1]
        if self.accumulate:
            product = product + initial[..., :columns]
        return torch.cat((product, initial[..., columns:]), -1)

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._spread(absolute=False), self._spread(absolute=True)


def einsum_cases(quick: bool) -> Iterator[EinsumCase]:
    for fmt, equations in EQUATIONS.items():
        draw = random.Random(120 + len(equations))
        unit = 8 if fmt == "bf16" else 32
        for equation in equations:
            for index in range(4 if quick else 16):
                sizes = (
                    ("b", draw.choice((1, 2, 7, 16, 33, 64, 130))),
                    ("h", draw.choice((1, 2, 3, 8))),
                    ("r", unit * draw.choice((1, 3, 8, 20))),
                    ("d", unit * draw.choice((1, 2, 5, 16))),
                )
                yield EinsumCase(
                    equation,
                    sizes,
                    fmt,
                    gran_k=draw.choice((32, 128)),
                    out_dtype=draw.choice((torch.bfloat16, torch.float32)),
                    accumulate=draw.random() < 0.3,
                    pad=draw.choice((0, 8)),
                    seed=index,
                )
    for m, n, k in ((16, 24, 64), (130, 257, 72)):
        for b in (1, 5, 40):
            sum_sizes = (("b", b), ("m", m), ("n", n), ("k", k))
            yield EinsumCase(SUM, sum_sizes, out_dtype=torch.float32, accumulate=b == 5)
            yield EinsumCase(SUM, sum_sizes, pad=8, seed=b)
