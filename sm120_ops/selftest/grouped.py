"""Grouped products of the self-test: experts' tokens in each layout, and groups along K."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from sm120_ops.selftest import formulas
from sm120_ops.selftest.bounds import SumCase
from sm120_ops.selftest.cases import FORMAT_PAIRS, POISON, align, move_scale, random_matrix

MASKED_SPARE = 3  # rows of each group's matrix past the largest count


def stacked(scales: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Packed scales of groups of one shape, [groups, rows, words], rows contiguous."""
    rows, words = scales[0].shape
    whole = torch.zeros(len(scales), words, align(rows, 4), dtype=torch.int32, device=device)
    for group, scale in enumerate(scales):
        whole[group, :, :rows] = scale.t()
    return whole.transpose(1, 2)[:, :rows]


@dataclasses.dataclass(frozen=True)
class GroupedCase(SumCase):
    layout: str  # "contiguous", "psum" or "masked"
    counts: tuple[int, ...]  # rows of each group
    N: int
    K: int
    formats: tuple[str, str]
    grans: tuple[int, int] = (32, 32)
    alignment: int = 16
    out_dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        """Of A, or of each of its matrices."""
        if self.layout == "masked":
            return max(self.counts) + MASKED_SPARE
        return sum(align(count, self.alignment) for count in self.counts) + self.alignment

    def places(self) -> list[tuple[int, int]]:
        """First row and end of each group, counted over all matrices of A."""
        if self.layout == "masked":
            return [(g * self.rows, g * self.rows + count) for g, count in enumerate(self.counts)]
        places, start = [], 0
        for count in self.counts:
            places.append((start, start + count))
            start += align(count, self.alignment)
        return places

    def index(self) -> list[int]:
        if self.layout == "masked":
            return list(self.counts)
        if self.layout == "psum":
            return [end for _, end in self.places()]
        index = [-1] * self.rows
        for group, (begin, end) in enumerate(self.places()):
            index[begin:end] = [group] * (end - begin)
        return index

    def quantised(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """(data, packed scales): the matrices of A, then of B."""
        groups = len(self.counts)
        matrices = groups if self.layout == "masked" else 1
        return [
            [
                torch.ops.sm120.quantize(
                    random_matrix(rows, self.K, 97 * i + seed, torch.bfloat16), fmt, gran
                )
                for i in range(count)
            ]
            for rows, count, fmt, gran, seed in zip(
                (self.rows, self.N), (matrices, groups), self.formats, self.grans, (5, 6),
                strict=True,
            )
        ]  # fmt: skip

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        a, b = self.quantised()
        index = torch.tensor(self.index(), dtype=torch.int32, device=device)
        weights = torch.stack([data.view(torch.uint8) for data, _ in b]).view(b[0][0].dtype)
        sfb = stacked([scale for _, scale in b], device)
        if self.layout == "masked":
            tokens = torch.stack([data.view(torch.uint8) for data, _ in a]).view(a[0][0].dtype)
            sfa = stacked([scale for _, scale in a], device)
        else:
            tokens, sfa = a[0][0], move_scale(a[0][1], device)
        shape = (*tokens.shape[:-1], self.N)
        out = torch.full(shape, POISON, dtype=self.out_dtype, device=device)
        inputs = (tokens.to(device), sfa, weights.to(device), sfb, index, *self.grans)
        ops = torch.ops.sm120
        if self.layout == "masked":
            ops.grouped_gemm_masked.out(*inputs, out=out)
        else:
            op = ops.grouped_gemm if self.layout == "contiguous" else ops.grouped_gemm_psum
            op.out(*inputs, self.alignment, out=out)
        return {"out": out.cpu()}

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.quantised()
        tokens = torch.cat([formulas.dequantize(*pair, self.grans[0]) for pair in a])
        values = torch.full((len(tokens), self.N), POISON, dtype=torch.float64)
        magnitude = torch.zeros_like(values)
        for (begin, end), pair in zip(self.places(), b, strict=True):
            weight = formulas.dequantize(*pair, self.grans[1]).T
            values[begin:end] = tokens[begin:end] @ weight
            magnitude[begin:end] = tokens[begin:end].abs() @ weight.abs()
        shape = (len(a), self.rows, self.N) if self.layout == "masked" else values.shape
        return values.view(shape), magnitude.view(shape)


def grouped_cases(quick: bool) -> Iterator[GroupedCase]:
    decoding, prompt = (2, 0, 1, 8, 0, 0, 3, 17, 0, 1), (130, 0, 64, 1)
    for formats in FORMAT_PAIRS:
        for layout in ("contiguous", "psum", "masked"):
            yield GroupedCase(layout, decoding, 200, 384, formats, alignment=32)
            yield GroupedCase(layout, prompt, 136, 256, formats, (128, 128), 64, torch.float32)
            yield GroupedCase(layout, (0, 0, 0), 64, 128, formats)
            if not quick:
                yield GroupedCase(layout, decoding * 4, 1000, 2880, formats, (128, 32))
                yield GroupedCase(layout, prompt, 264, 2048, formats, (32, 128), 128)


@dataclasses.dataclass(frozen=True)
class KGroupedCase(SumCase):
    layout: str  # "nt" or "tn"
    ks: tuple[int, ...]
    M: int
    N: int
    formats: tuple[str, str]
    gran_k: int = 128
    accumulate: bool = False
    out_dtype: torch.dtype = torch.float32

    def quantised(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        return [
            [
                torch.ops.sm120.quantize(
                    random_matrix(rows, k, 89 * i + rows, torch.bfloat16), fmt, self.gran_k
                )
                for i, k in enumerate(self.ks)
            ]
            for rows, fmt in zip((self.M, self.N), self.formats, strict=True)
        ]

    def source(
        self, groups: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The operand as the op takes it, with a byte a scale."""
        ops, parts, scales = torch.ops.sm120, [], []
        for k, (data, scale) in zip(self.ks, groups, strict=True):
            raw = data.view(torch.uint8)
            if self.layout == "tn":
                raw = raw.T if data.dtype == torch.float8_e4m3fn else ops.transpose_fp4(raw)
            parts.append(raw.contiguous())
            scales.append(ops.unpack_scales(scale, -(-k // self.gran_k), torch.uint8).T)
        whole = torch.cat([part.flatten() if self.layout == "nt" else part for part in parts])
        return (
            whole.view(groups[0][0].dtype).to(device),
            torch.cat(scales).contiguous().to(device),
        )

    def initial_output(self) -> torch.Tensor:
        rows = len(self.ks) * self.M
        return random_matrix(rows, self.N, 3, self.out_dtype).view(-1, self.M, self.N)

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        a, b = (self.source(groups, device) for groups in self.quantised())
        out = self.initial_output().to(device)
        torch.ops.sm120.k_grouped_gemm.out(
            *a, *b, torch.tensor(self.ks, dtype=torch.int32, device=device), self.gran_k,
            self.gran_k, out if self.accumulate else None, out=out,
        )  # fmt: skip
        return {"out": out.cpu()}

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.initial_output().double() if self.accumulate else 0
        values = values + torch.zeros(len(self.ks), self.M, self.N, dtype=torch.float64)
        magnitude = values.abs()
        for group, pairs in enumerate(zip(*self.quantised(), strict=True)):
            left, right = (formulas.dequantize(data, scale, self.gran_k) for data, scale in pairs)
            values[group] += left @ right.T
            magnitude[group] += left.abs() @ right.abs().T
        return values, magnitude


def k_grouped_cases(quick: bool) -> Iterator[KGroupedCase]:
    for formats in FORMAT_PAIRS:
        for layout in ("nt", "tn"):
            yield KGroupedCase(layout, (128, 0, 96, 512), 72, 136, formats)
            yield KGroupedCase(layout, (64, 288), 130, 40, formats, 32, True, torch.bfloat16)
            if not quick:
                yield KGroupedCase(layout, (1024, 32, 0, 640) * 3, 256, 264, formats, 32)
