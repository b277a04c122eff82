"""Grouped GEMM: padded decoding, prompts, and the expert products of whole MoE models.

A routing is a number of rows for each expert. Lines of the contiguous layout have each expert's
rows in segments of `alignment`, those of the psum layout in aligned groups behind one another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from sm120_ops.bench.ceilings import atom_of
from sm120_ops.bench.gemm import FP8_128, W4A8, W4A8_128, calc_diff
from sm120_ops.bench.record import Line, Mark, data_bytes, gemm_flops, scale_bytes

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

Operands = tuple[str, int, str, int]  # format and gran_k of the tokens, then of the weights

EMPTY_COST = Mark("relative", ">=", 1 / 1.03, "% of alone")
DENSE_SHARE = Mark("relative", ">=", 0.90, "% of dense")
HIT_WEIGHTS = Mark("weight_tbps", ">=", 2.4, "TB/s weights", gpu="H200")


def _at_most(us: float) -> Mark:
    return Mark("us", "<=", us, "us", gpu="H200")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    counts: tuple[int, ...]  # rows of each expert
    N: int
    K: int
    operands: Operands
    alignment: int
    contiguous: bool = False  # else psum
    empty_segments: int = 0  # contiguous: segments of padding between the others
    expected_m: int = 0
    mark: Mark | None = None
    compare: str = ""  # "alone": without the empty segments; "dense": one GEMM of as many rows

    @property
    def formats(self) -> tuple[str, str]:
        return self.operands[0], self.operands[2]

    @property
    def grans(self) -> tuple[int, int]:
        return self.operands[1], self.operands[3]

    @property
    def hit(self) -> list[int]:
        return [expert for expert, count in enumerate(self.counts) if count > 0]

    @property
    def label(self) -> str:
        rows, experts = sum(self.counts), len(self.counts)
        return f"{rows} on {len(self.hit)}/{experts} {self.N}x{self.K}"

    @property
    def title(self) -> str:
        a, gran_a, b, gran_b = self.operands
        return f"{self.name}, {a}/{gran_a} x {b}/{gran_b}"


# ---- Routings ------------------------------------------------------------------------------------


def routing(kind: str, tokens: int, top_k: int, experts: int) -> tuple[int, ...]:
    """Rows of each expert: every token goes to top_k different ones."""
    if kind == "none":
        return (0,) * experts
    if kind == "one":
        return (tokens, *(0,) * (experts - 1))
    weights = torch.ones(experts, dtype=torch.float64)
    if kind == "zipf":
        weights = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    elif kind == "few":  # 20 of 64
        weights[max(top_k, experts * 20 // 64) :] = 0
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.multinomial(weights.expand(tokens, experts), top_k, generator=generator)
    return tuple(torch.bincount(chosen.flatten(), minlength=experts).tolist())


def _twenty(experts: int, rows: int) -> tuple[int, ...]:
    """`rows` rows for each of 20 experts, evenly spread."""
    return tuple(
        rows if i * 20 // experts != (i - 1) * 20 // experts else 0 for i in range(experts)
    )


_PADDED = Case("20 blocks of 64, 2 tokens each", _twenty(64, 2), 4096, 4096, FP8_128, 64, True)
_BATCH_32 = routing("uniform", 32, 6, 128)

TABLE = (
    dataclasses.replace(_PADDED, mark=_at_most(120)),
    dataclasses.replace(
        _PADDED,
        name="the same and 45 empty blocks",
        empty_segments=45,
        mark=EMPTY_COST,
        compare="alone",
    ),
    dataclasses.replace(_PADDED, operands=W4A8, mark=_at_most(75)),
    Case("8 experts x 1024", (1024,) * 8, 4096, 7168, FP8_128, 128, True, mark=DENSE_SHARE,
         compare="dense"),
    Case("8 experts x 1024", (1024,) * 8, 4096, 7168, W4A8, 128, True, mark=DENSE_SHARE,
         compare="dense"),
    Case("batch 32 top 6 of 128", _BATCH_32, 4096, 4096, W4A8, 16, expected_m=2, mark=HIT_WEIGHTS),
    Case("batch 32 top 6 of 128", _BATCH_32, 4096, 4096, FP8_128, 16, expected_m=2,
         mark=HIT_WEIGHTS),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    operands: Operands


MODELS = {
    "DeepSeek-V4-Flash": Model(4096, 256, 6, 2048, W4A8_128),
    "DeepSeek-V3": Model(7168, 256, 8, 2048, FP8_128),
    "gpt-oss-120b": Model(2880, 128, 4, 2880, W4A8),
}
TOKENS = {"standard": (1, 32, 256), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)}
ROUTINGS = {"standard": ("uniform",), "full": ("uniform", "zipf", "few", "one", "none")}


def model_cases(mode: str) -> Iterator[Case]:
    for name, model in MODELS.items():
        for half, N, K in (
            ("gate_up", 2 * model.intermediate, model.hidden),
            ("down", model.hidden, model.intermediate),
        ):
            for tokens in TOKENS.get(mode, ()):
                for kind in ROUTINGS[mode]:
                    counts = routing(kind, tokens, model.top_k, model.experts)
                    hit = sum(count > 0 for count in counts)
                    expected = -(-sum(counts) // max(hit, 1))
                    title = f"{name} {half}, {tokens} tokens, {kind}"
                    yield Case(title, counts, N, K, model.operands, 16, expected_m=expected)


# ---- Operands ------------------------------------------------------------------------------------


class Weights:
    """Quantised weights of all experts; the BF16 ones of two that are hit, to check the result."""

    def __init__(self, case: Case, device: torch.device):
        fmt, gran_k = case.operands[2:]
        experts, N, K = len(case.counts), case.N, case.K
        generator = torch.Generator(device).manual_seed(N + K)
        width = K if fmt == "mxfp8" else K // 2
        dtype = torch.float8_e4m3fn if fmt == "mxfp8" else torch.uint8
        self.data = torch.empty(experts, N, width, dtype=dtype, device=device)
        words = torch.zeros(experts, -(-K // (4 * gran_k)), N, dtype=torch.int32, device=device)
        self.kept: dict[int, torch.Tensor] = {}
        for expert in range(experts):
            w = torch.randn(N, K, generator=generator, device=device, dtype=torch.bfloat16)
            data, scale = torch.ops.sm120.quantize(w, fmt, gran_k)
            self.data[expert].copy_(data)
            words[expert].copy_(scale.t())
            if expert in case.hit[:2]:
                self.kept[expert] = w
        self.scale = words.transpose(1, 2)


@dataclasses.dataclass
class Tokens:
    x: torch.Tensor  # BF16 [M, K]
    data: torch.Tensor
    scale: torch.Tensor
    index: torch.Tensor  # m_indices or group_ends
    first: dict[int, int]  # expert -> its first row
    m_indices: torch.Tensor


def make_tokens(case: Case, device: torch.device) -> Tokens:
    step = case.alignment
    blocks = [-(-count // step) for count in case.counts]
    gaps = case.empty_segments
    indices: list[int] = []
    ends: list[int] = []
    first: dict[int, int] = {}
    for expert, count in enumerate(case.counts):
        # the empty segments are spread evenly over the experts
        done, total = sum(blocks[:expert]), max(sum(blocks), 1)
        empty = gaps * done // total - (len(indices) // step - done)
        indices += [-1] * (step * max(empty, 0))
        first[expert] = len(indices)
        indices += [expert] * count + [-1] * (blocks[expert] * step - count)
        ends.append(first[expert] + count if count else (ends[-1] if ends else 0))
    missing = gaps - (len(indices) // step - sum(blocks))
    indices += [-1] * (step * missing)
    rows = max(len(indices), step)
    indices += [-1] * (rows - len(indices))
    x = torch.randn(rows, case.K, device=device, dtype=torch.bfloat16)
    data, scale = torch.ops.sm120.quantize(x, *case.operands[:2])
    m_indices = torch.tensor(indices, dtype=torch.int32, device=device)
    index = m_indices
    if not case.contiguous:
        index = torch.tensor(ends, dtype=torch.int32, device=device)
    return Tokens(x, data, scale, index, first, m_indices)


def grouped_bytes(case: Case) -> int:
    """Weights and scales of the experts that are hit, and the rows that have an expert."""
    rows, N, K = sum(case.counts), case.N, case.K
    weights = data_bytes(N, K, case.formats[1]) + scale_bytes(N, K, case.grans[1])
    tokens = data_bytes(rows, K, case.formats[0]) + scale_bytes(rows, K, case.grans[0])
    return len(case.hit) * weights + tokens + data_bytes(rows, N, "bf16")


def launcher(case: Case, tokens: Tokens, weights: Weights, d: torch.Tensor) -> Callable[[], None]:
    op = torch.ops.sm120.grouped_gemm if case.contiguous else torch.ops.sm120.grouped_gemm_psum
    return functools.partial(
        op.out, tokens.data, tokens.scale, weights.data, weights.scale, tokens.index,
        *case.grans, case.alignment, case.expected_m, out=d,
    )  # fmt: skip


def dense_us(context: Context, case: Case, weights: Weights) -> float:
    """Time of one product with as many rows and the same weights for all of them."""
    rows = sum(case.counts)
    x = torch.randn(rows, case.K, device=context.device, dtype=torch.bfloat16)
    a, sfa = torch.ops.sm120.quantize(x, *case.operands[:2])
    d = torch.empty(rows, case.N, device=context.device, dtype=torch.bfloat16)
    b, sfb = weights.data[0], weights.scale[0]
    call = functools.partial(torch.ops.sm120.gemm.out, a, sfa, b, sfb, *case.grans, None, [], out=d)
    return context.timer.measure(call).us


def run(context: Context) -> Iterator[Line]:
    from sm120_ops.bench import grouped_peers

    weights: Weights | None = None
    of: tuple[int, int, int, str, int] | None = None
    alone_us = math.nan
    for case in (*TABLE, *model_cases(context.mode)):
        key = (len(case.counts), case.N, case.K, *case.operands[2:])
        missing = weights is None or any(e not in weights.kept for e in case.hit[:2])
        if weights is None or key != of or missing:
            weights = None  # frees the last ones before the next are made
            weights, of = Weights(case, context.device), key
        tokens = make_tokens(case, context.device)
        shape = (len(tokens.x), case.N)
        d = torch.zeros(shape, device=context.device, dtype=torch.bfloat16)
        line = context.time(
            launcher(case, tokens, weights, d),
            family="grouped",
            name=case.title,
            shape=case.label,
            provider="sm120_ops",
            flops=gemm_flops(sum(case.counts), case.N, case.K),
            bytes=grouped_bytes(case),
            weight_bytes=len(case.hit) * weights.data[0].nbytes,
            atom=atom_of(case.formats, case.grans),
            mark=case.mark,
        )
        if case.compare == "alone":
            line.relative = alone_us / (line.us or math.inf)
        elif case.compare == "dense":
            line.relative = dense_us(context, case, weights) / (line.us or math.inf)
        else:
            alone_us = line.us or math.nan
        parts = [
            (rows := slice(tokens.first[e], tokens.first[e] + case.counts[e]), d[rows], w)
            for e, w in weights.kept.items()
            if case.counts[e]
        ]
        if parts:
            got = torch.cat([part for _, part, _ in parts])
            want = torch.cat([tokens.x[rows] @ w.t() for rows, _, w in parts])
            line.diff = calc_diff(got, want)
        yield context.judge(line)
        if context.with_peers and case in TABLE:
            yield from grouped_peers.run(context, case, tokens, weights)
