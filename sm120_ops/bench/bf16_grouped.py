"""Grouped BF16 GEMM, lines of the family bf16: expert products, and weight gradients along K.

The experts are those of one GPU of eight, whose weights fit any card. Their rows come from a
uniform routing of a batch over all experts. Each batch runs in the three layouts of the op; the
peers get the rows of the contiguous one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sm120_ops.bench import grouped, k_grouped
from sm120_ops.bench.gemm import calc_diff
from sm120_ops.bench.record import Line, data_bytes, gemm_bytes, gemm_flops
from sm120_ops.ops.moe_layer import choose_alignment

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

GPUS = 8  # that share the experts
MODELS = {
    "quick": ("DeepSeek-V4-Flash",),
    "standard": ("DeepSeek-V4-Flash", "DeepSeek-V3"),
    "full": ("DeepSeek-V4-Flash", "DeepSeek-V3"),
}
# Tokens of the whole batch: of decoding and of a prompt.
TOKENS = {
    "quick": (256, 8192),
    "standard": (256, 8192),
    "full": (8, 32, 64, 128, 256, 512, 2048, 8192),
}


class Weights(NamedTuple):
    name: str
    N: int
    K: int


class Batch(NamedTuple):
    """Rows of each local expert, and where they lie in the contiguous and the psum layout."""

    counts: tuple[int, ...]
    alignment: int

    @property
    def starts(self) -> list[int]:
        starts, at = [], 0
        for count in self.counts:
            starts.append(at)
            at += -(-count // self.alignment) * self.alignment
        return [*starts, at]

    @property
    def ends(self) -> list[int]:
        return [start + count for start, count in zip(self.starts, self.counts, strict=False)]

    @property
    def m_indices(self) -> list[int]:
        index = [-1] * self.starts[-1]
        for expert, (start, end) in enumerate(zip(self.starts, self.ends, strict=False)):
            index[start:end] = [expert] * (end - start)
        return index

    @property
    def hit(self) -> list[int]:
        return [expert for expert, count in enumerate(self.counts) if count > 0]


def weights_of(mode: str) -> Iterator[tuple[grouped.Model, Weights]]:
    for name in MODELS[mode]:
        model = grouped.MODELS[name]
        yield model, Weights(f"{name} gate_up", 2 * model.intermediate, model.hidden)
        yield model, Weights(f"{name} down", model.hidden, model.intermediate)


def batch_of(model: grouped.Model, tokens: int) -> Batch:
    routed = grouped.routing("uniform", tokens, model.top_k, model.experts)
    counts = routed[: model.experts // GPUS]
    return Batch(counts, choose_alignment(sum(counts), len(counts)))


def lines(context: Context) -> Iterator[Line]:
    yield from expert_lines(context)
    yield from gradient_lines(context)


# ---- Expert products -----------------------------------------------------------------------------


def expert_lines(context: Context) -> Iterator[Line]:
    for model, weights in weights_of(context.mode):
        generator = torch.Generator(context.device).manual_seed(weights.N + weights.K)
        shape = (model.experts // GPUS, weights.N, weights.K)
        b = torch.randn(
            shape, generator=generator, device=context.device, dtype=torch.bfloat16
        )  # of all experts, shared by the peers
        for tokens in TOKENS[context.mode]:
            batch = batch_of(model, tokens)
            rows = batch.starts[-1] or batch.alignment
            x = torch.randn(
                rows, weights.K, generator=generator, device=context.device, dtype=torch.bfloat16
            )
            yield from layout_lines(context, weights, tokens, batch, x, b)
        del b  # frees the last ones before the next are made


def layout_lines(
    context: Context, weights: Weights, tokens: int, batch: Batch, x: torch.Tensor, b: torch.Tensor
) -> Iterator[Line]:
    rows, N, K = sum(batch.counts), weights.N, weights.K
    int32 = functools.partial(torch.tensor, dtype=torch.int32, device=context.device)
    fields: dict[str, Any] = {
        "family": "bf16",
        "shape": f"{rows} on {len(batch.hit)}/{len(batch.counts)} {N}x{K}",
        "flops": gemm_flops(rows, N, K),
        "bytes": data_bytes(len(batch.hit) * N + rows, K, "bf16") + data_bytes(rows, N, "bf16"),
        "weight_bytes": data_bytes(len(batch.hit) * N, K, "bf16"),
    }
    title = f"{weights.name}, {tokens} tokens"
    most = max(*batch.counts, 1)
    masked = x.new_zeros(len(batch.counts), most, K)
    for expert, start in enumerate(batch.starts[:-1]):
        count = batch.counts[expert]
        masked[expert, :count] = x[start : start + count]
    ops = torch.ops.sm120
    flat = (x.shape[0], N)
    m_indices = [*batch.m_indices, *[-1] * (x.shape[0] - batch.starts[-1])]
    mean = -(-rows // max(len(batch.hit), 1))
    layouts: tuple[tuple[str, Any, torch.Tensor, Any, tuple[int, ...], tuple[int, ...]], ...] = (
        ("contiguous", ops.bf16_grouped_gemm, x, m_indices, (batch.alignment, mean), flat),
        ("psum", ops.bf16_grouped_gemm_psum, x, batch.ends, (batch.alignment, mean), flat),
        ("masked", ops.bf16_grouped_gemm_masked, masked, batch.counts, (mean,), (len(b), most, N)),
    )
    for layout, op, a, index, options, shape in layouts:
        d = torch.zeros(shape, device=context.device, dtype=torch.bfloat16)
        line = context.time(
            functools.partial(op.out, a, b, int32(index), *options, out=d),
            name=f"{title}, {layout}",
            provider="sm120_ops",
            atom="bf16",
            **fields,
        )
        checked = batch.hit[:2]
        if checked:
            spans = [slice(batch.starts[e], batch.ends[e]) for e in checked]
            got = [
                d[e, : batch.counts[e]] if d.dim() == 3 else d[span]
                for e, span in zip(checked, spans, strict=True)
            ]
            want = [x[span] @ b[e].t() for e, span in zip(checked, spans, strict=True)]
            line.diff = calc_diff(torch.cat(got), torch.cat(want))
        yield line
    if context.with_peers:
        ends = int32(batch.starts[1:])
        for provider, call in expert_peers(batch, x, b, ends):
            yield context.time_peer(call, name=title, provider=provider, **fields)


def expert_peers(
    batch: Batch, x: torch.Tensor, b: torch.Tensor, ends: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    out = x.new_empty(x.shape[0], b.shape[1])

    def loop() -> None:
        for e in batch.hit:
            rows = slice(batch.starts[e], batch.ends[e])
            torch.matmul(x[rows], b[e].t(), out=out[rows])

    yield "torch.matmul an expert", loop
    if hasattr(torch, "_grouped_mm"):
        yield "torch._grouped_mm", lambda: torch._grouped_mm(x, b.transpose(1, 2), offs=ends)


# ---- Weight gradients ----------------------------------------------------------------------------


def gradient_lines(context: Context) -> Iterator[Line]:
    """The shapes of k_grouped.py: a row of both operands for each token, the groups along K."""
    device = context.device
    for shape in k_grouped.SHAPES[context.mode]:
        generator = torch.Generator(device).manual_seed(shape.M)
        total = sum(shape.ks)
        a, b = (
            torch.randn(total, columns, device=device, generator=generator, dtype=torch.bfloat16)
            for columns in (shape.M, shape.N)
        )
        ks = torch.tensor(shape.ks, dtype=torch.int32, device=device)
        d = torch.empty(shape.groups, shape.M, shape.N, dtype=torch.bfloat16, device=device)
        size = gemm_bytes(shape.M, shape.N, total, ("bf16", "bf16"), (0, 0))
        fields: dict[str, Any] = {
            "family": "bf16",
            "name": "k-grouped tn",
            "shape": shape.label,
            "flops": gemm_flops(shape.M, shape.N, total),
            "bytes": size + (shape.groups - 1) * data_bytes(shape.M, shape.N, "bf16"),
        }
        line = context.time(
            functools.partial(torch.ops.sm120.bf16_k_grouped_gemm.out, a, b, ks, None, out=d),
            provider="sm120_ops",
            atom="bf16",
            **fields,
        )
        line.diff = calc_diff(d[0], a[: shape.ks[0]].t() @ b[: shape.ks[0]])
        yield line
        if context.with_peers:
            for provider, call in gradient_peers(a, b, shape.ks, torch.empty_like(d)):
                yield context.time_peer(call, provider=provider, **fields)


def gradient_peers(
    a: torch.Tensor, b: torch.Tensor, sizes: list[int], out: torch.Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    def loop() -> None:
        parts = zip(a.split(sizes), b.split(sizes), out, strict=True)
        for left, right, product in parts:
            torch.matmul(left.t(), right, out=product)

    yield "torch.matmul a group", loop
    if hasattr(torch, "_grouped_mm"):
        ends = torch.tensor(sizes, device=a.device).cumsum(0).to(torch.int32)
        yield "torch._grouped_mm", lambda: torch._grouped_mm(a.t(), b, offs=ends)
