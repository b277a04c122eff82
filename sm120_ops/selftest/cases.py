"""The self-test's cases: small and medium shapes that reach every format, layout and edge.

On a GPU a case's results are compared with those on the CPU, and everywhere with the FP64 formulas.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import torch

from sm120_ops.selftest import formulas
from sm120_ops.selftest.bounds import ExactCase, Parts, SumCase, same_bits

FORMAT_PAIRS = (("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp8"))
POISON = -77.0  # in outputs before the op runs; no product has it in every element


def align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def move_scale(scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A packed scale on ``device``. Tensor.to() would drop the rows' padding to 4."""
    rows, words = scale.shape
    moved = torch.zeros(words, align(rows, 4), dtype=torch.int32, device=device).T[:rows]
    moved.copy_(scale)
    return moved


def random_matrix(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values; the rows' magnitudes spread over 2^-3 to 2^3, so that scales differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    power = torch.randint(-3, 4, (rows, 1), generator=generator)
    return torch.ldexp(x, power).to(dtype)


@dataclasses.dataclass(frozen=True)
class QuantizeCase(ExactCase):
    M: int
    K: int
    format: str
    gran_k: int = 32
    gran_mn: int = 1
    rule: str = "deepgemm"
    dtype: torch.dtype = torch.bfloat16
    layout: str = "rows"  # or "columns" (a transposed view), "strided" (rows with a gap)

    def input(self) -> torch.Tensor:
        x = random_matrix(self.M, self.K, self.M * 13 + self.K, self.dtype)
        if x.numel():
            x[0] = 0  # a zero row
            x[-1, :2] = torch.tensor([3.0e4, -1.0e-7])
        return x

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        x = self.input().to(device)
        if self.layout == "columns":
            x = x.T.contiguous().T
        elif self.layout == "strided":
            wide = torch.full((self.M, self.K + 8), POISON, dtype=self.dtype, device=device)
            wide[:, : self.K] = x
            x = wide[:, : self.K]
        data, scale = torch.ops.sm120.quantize(x, self.format, self.gran_k, self.gran_mn, self.rule)
        restored = torch.ops.sm120.dequantize(data, scale, self.gran_k, torch.float32)
        return {
            "data": data.view(torch.uint8).cpu(),
            "scale": scale.cpu().contiguous(),
            "dequantized": restored.cpu(),
        }

    def differences(self, got: Parts) -> dict[str, float]:
        values, byte = formulas.quantize(
            self.input(), self.format, self.gran_k, self.gran_mn, self.rule
        )
        data = got["data"] if self.format == "mxfp4" else got["data"].view(torch.float8_e4m3fn)
        codes = formulas.code_values(self.format)[formulas.codes_of(data)]
        packed_byte = formulas.scale_bytes(got["scale"], byte.shape[1])
        restored = formulas.dequantize(data, got["scale"], self.gran_k)
        # `!=` counts differing elements: 0 and -0 are equal, as they should be here.
        return {
            "data": float((codes != values).sum()),
            "scale": float((packed_byte != byte).sum()),
            "dequantized": float((got["dequantized"] != restored.float()).sum()),
        }


def quantize_cases(quick: bool) -> Iterator[QuantizeCase]:
    shapes = ((1, 32), (5, 96), (33, 288), (130, 2880), (257, 1024))
    for M, K in shapes[:3] if quick else shapes:
        for fmt in ("mxfp8", "mxfp4"):
            for rule in ("deepgemm", "ocp"):
                for gran_k, gran_mn in ((32, 1), (128, 1), (32, 32), (128, 128)):
                    yield QuantizeCase(M, K, fmt, gran_k, gran_mn, rule)
    for dtype in (torch.float16, torch.float32):
        for layout in ("rows", "columns", "strided"):
            yield QuantizeCase(66, 384, "mxfp8", 32, 1, "deepgemm", dtype, layout)
            yield QuantizeCase(66, 384, "mxfp4", 32, 1, "ocp", dtype, layout)
    yield QuantizeCase(7, 144, "mxfp8", 128, layout="columns")  # K is a multiple of 16 only
    yield QuantizeCase(0, 128, "mxfp8", 128)


@dataclasses.dataclass(frozen=True)
class LayoutCase(ExactCase):
    rows: int
    groups: int
    gran_mn: int = 1

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        ops = torch.ops.sm120
        generator = torch.Generator().manual_seed(self.rows * 7 + self.groups)
        blocks = -(-self.rows // self.gran_mn)
        byte = torch.randint(0, 256, (blocks, self.groups), generator=generator, dtype=torch.uint8)
        power = torch.randint(1, 255, (blocks, self.groups), generator=generator)
        as_float = torch.ldexp(torch.ones(blocks, self.groups), power - 127)
        codes = torch.randint(
            0, 16, (2 * self.rows, 2 * self.groups), generator=generator, dtype=torch.uint8
        )
        packed = ops.pack_scales(byte.to(device), self.rows, self.gran_mn)
        packed_float = ops.pack_scales(as_float.to(device), self.rows, self.gran_mn)
        fp4 = ops.pack_fp4(codes.to(device))
        return {
            "pack_scales(uint8)": packed.cpu().contiguous(),
            "pack_scales(float32)": packed_float.cpu().contiguous(),
            "unpack_scales(uint8)": ops.unpack_scales(packed, self.groups, torch.uint8).cpu(),
            # NaN as a number: its payload is nobody's business
            "unpack_scales(float32)": ops.unpack_scales(packed, self.groups, torch.float32)
            .nan_to_num(-1)
            .cpu(),
            "pack_fp4": fp4.cpu(),
            "unpack_fp4": ops.unpack_fp4(fp4).cpu(),
            "transpose_fp4": ops.transpose_fp4(fp4).cpu(),
        }

    def differences(self, got: Parts) -> dict[str, float]:
        codes = got["unpack_fp4"]
        byte = got["unpack_scales(uint8)"]
        return {
            "pack_scales": float(
                (formulas.scale_bytes(got["pack_scales(uint8)"], byte.shape[1]) != byte).sum()
            ),
            "unpack_scales": same_bits(
                got["unpack_scales(float32)"].nan_to_num(-1),
                formulas.scale_values(byte).float().nan_to_num(-1),
            ),
            "pack_fp4": float((formulas.codes_of(got["pack_fp4"]) != codes).sum()),
            "transpose_fp4": float(
                (
                    formulas.codes_of(got["transpose_fp4"]) != formulas.codes_of(got["pack_fp4"]).T
                ).sum()
            ),
        }


def layout_cases(quick: bool) -> Iterator[LayoutCase]:
    for rows, groups in ((1, 1), (6, 5), (130, 23), *(() if quick else ((1031, 56),))):
        for gran_mn in (1, 32, 128):
            yield LayoutCase(rows, groups, gran_mn)


@dataclasses.dataclass(frozen=True)
class GemmCase(SumCase):
    M: int
    N: int
    K: int
    formats: tuple[str, str]
    grans: tuple[int, int] = (32, 32)
    out_dtype: torch.dtype = torch.bfloat16
    accumulate: bool = False  # C = the output's own memory
    splits: tuple[int, int, int] | None = None
    pad: int = 0  # extra elements in the rows of D, 16 bytes times this in those of A and B
    seed: int = 0

    @property
    def columns(self) -> int:
        """Columns of D: a head split adds its middle ones."""
        if self.splits is None:
            return self.N
        left, mid, right = self.splits
        return self.N + self.N // (left + right) * mid

    def operands(self) -> tuple[torch.Tensor, ...]:
        """(a, sfa, b, sfb) on the CPU."""
        parts: list[torch.Tensor] = []
        for rows, fmt, gran, seed in zip(
            (self.M, self.N), self.formats, self.grans, (1, 2), strict=True
        ):
            x = random_matrix(rows, self.K, self.seed * 2 + seed, torch.bfloat16)
            parts += torch.ops.sm120.quantize(x, fmt, gran)
        return tuple(parts)

    def initial_output(self) -> torch.Tensor:
        """What D's whole buffer, gap included, holds before the op: poison, or the values of C."""
        buffer = torch.full((self.M, self.columns + self.pad), POISON, dtype=self.out_dtype)
        if self.accumulate:
            values = random_matrix(self.M, self.columns, self.seed, self.out_dtype)
            buffer[:, : self.columns] = values
        return buffer

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        a, sfa, b, sfb = self.operands()
        a, b = self._strided(a.to(device)), self._strided(b.to(device))
        sfa, sfb = move_scale(sfa, device), move_scale(sfb, device)
        buffer = self.initial_output().to(device)
        out = buffer[:, : self.columns]
        torch.ops.sm120.gemm.out(
            a,
            sfa,
            b,
            sfb,
            *self.grans,
            out if self.accumulate else None,
            list(self.splits or ()),
            out=out,
        )
        return {"out": buffer.cpu()}

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        """D's whole buffer, what the op leaves alone included; |A| |B|^T + |C| in D's columns."""
        a, sfa, b, sfb = self.operands()
        left = formulas.dequantize(a, sfa, self.grans[0])
        right = formulas.dequantize(b, sfb, self.grans[1])
        product, magnitude = left @ right.T, left.abs() @ right.abs().T
        written = self._spread(torch.ones(self.M, self.N, dtype=torch.float64)) > 0
        initial = self.initial_output().double()
        added = initial if self.accumulate else torch.zeros_like(initial)
        values = torch.where(written, self._spread(product) + added, initial)
        return values, self._spread(magnitude) + added.abs()

    def _spread(self, product: torch.Tensor) -> torch.Tensor:
        """A product [M, N] in D's whole buffer: head-split middle columns and row gaps are zero."""
        full = product.new_zeros(self.M, self.columns + self.pad)
        column = torch.arange(self.N)
        if self.splits is not None:
            left, mid, right = self.splits
            head, rest = column // (left + right), column % (left + right)
            column = head * (left + mid + right) + torch.where(rest < left, rest, rest + mid)
        full[:, column] = product
        return full

    def _strided(self, data: torch.Tensor) -> torch.Tensor:
        if self.pad == 0:
            return data
        raw = data.view(torch.uint8)
        rows, width = raw.shape
        wide = torch.full((rows, width + 16), 0xFF, dtype=torch.uint8, device=raw.device)
        wide[:, :width] = raw
        return wide[:, :width].view(data.dtype)


def gemm_cases(quick: bool) -> Iterator[GemmCase]:
    """Edges for every format pair, then drawn shapes; the same ones on every machine."""
    edges = (
        (1, 8, 128), (1, 2112, 768), (16, 136, 2880), (17, 1, 64), (64, 96, 4096), (130, 257, 512),
        (0, 64, 128), (5, 0, 128), (5, 24, 0),
    )  # fmt: skip
    for formats in FORMAT_PAIRS:
        fp4 = "mxfp4" in formats
        for M, N, K in edges:
            for grans in ((32, 32), (128, 128)):
                yield GemmCase(M, N, K, formats, grans, torch.float32)
        yield GemmCase(33, 192, 384, formats, splits=(16, 8, 16), pad=8)
        yield GemmCase(3, 128, 1024, formats, (128, 32), splits=(32, 64, 0), accumulate=True)
        draw = random.Random(120 + FORMAT_PAIRS.index(formats))
        for index in range(12 if quick else 60):
            K = draw.choice((32, 96, 128, 320, 1024, 2048, 2880, 4096))
            yield GemmCase(
                M=draw.choice((1, 2, 3, 8, 15, 16, 24, 32, 48, 64, 100, 128, 200, 257)),
                N=draw.choice((8, 24, 64, 100, 128, 250, 384, 512, 1000)),
                K=K if fp4 else K + draw.choice((0, 16)),
                formats=formats,
                grans=(draw.choice((32, 128)), draw.choice((32, 128))),
                out_dtype=draw.choice((torch.bfloat16, torch.float32)),
                accumulate=draw.random() < 0.3,
                pad=draw.choice((0, 0, 8)),
                seed=index,
            )
