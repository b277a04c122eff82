"""The indexer: MQA logits (ragged and paged), their schedule, top-k and the cache writer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sm120_ops.bench.record import Line, Mark

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

DIM = 128
BLOCK_KV = 64


def _mark(metric: str, relation: str, value: float, unit: str) -> Mark:
    return Mark(metric, relation, value, unit, gpu="H200")


@dataclasses.dataclass(frozen=True)
class RaggedCase:
    rows: int
    keys: int
    heads: int = 64
    fmt: str = "mxfp8"
    mark: Mark | None = None

    @property
    def label(self) -> str:
        return f"S={self.rows} SKV={self.keys} H={self.heads}"

    @property
    def pairs(self) -> int:
        """(query, key) pairs of causal windows: the last query sees all keys."""
        return self.rows * self.keys - self.rows * (self.rows - 1) // 2


@dataclasses.dataclass(frozen=True)
class PagedCase:
    batch: int
    context: int  # about; the sequences differ by up to a tenth
    next_n: int = 1
    heads: int = 64
    fmt: str = "mxfp8"
    mark: Mark | None = None

    @property
    def label(self) -> str:
        return f"{self.batch} x ~{self.context} next_n={self.next_n} H={self.heads}"


RAGGED = (
    RaggedCase(4096, 8192, mark=_mark("tflops", ">=", 350, "TFLOP/s")),
    RaggedCase(128, 8192, mark=_mark("us", "<=", 52, "us")),
    RaggedCase(4096, 8192, fmt="mxfp4"),
    RaggedCase(128, 8192, fmt="mxfp4"),
    RaggedCase(4096, 8192, heads=32),
)
PAGED = (
    PagedCase(256, 8192, 1, mark=_mark("tbps", ">=", 2.7, "TB/s")),
    PagedCase(256, 8192, 2, mark=_mark("tbps", ">=", 1.4, "TB/s")),
    PagedCase(4, 65536, 1, mark=_mark("us", "<=", 19, "us")),
    PagedCase(256, 8192, 1, fmt="mxfp4"),
    PagedCase(256, 8192, 2, fmt="mxfp4"),
    PagedCase(4, 65536, 1, fmt="mxfp4"),
    PagedCase(256, 8192, 1, heads=32),
    PagedCase(1, 4096, 1),
)


def cases(mode: str) -> tuple[tuple[RaggedCase, ...], tuple[PagedCase, ...]]:
    if mode != "full":
        return RAGGED, PAGED
    ragged = [
        RaggedCase(rows, keys, heads, fmt)
        for heads in (64, 32)
        for fmt in ("mxfp8", "mxfp4")
        for rows in (128, 1024, 8192)
        for keys in (4096, 32768, 131072)
        if rows <= keys
    ]
    paged = [
        PagedCase(batch, context, next_n, heads, fmt)
        for heads in (64, 32)
        for fmt in ("mxfp8", "mxfp4")
        for next_n in (1, 2, 4, 6)
        for batch, context in ((1, 262144), (8, 65536), (64, 16384), (256, 4096))
    ]
    return (*RAGGED, *ragged), (*PAGED, *paged)


def random_bytes(shape: tuple[int, ...], fmt: str, generator: torch.Generator) -> torch.Tensor:
    """Codes of either format, none of them NaN."""
    raw = torch.randint(0, 256, shape, generator=generator, device=generator.device)
    if fmt == "mxfp8":
        raw = (raw & 0x80) | (raw & 0x7F).clamp(max=0x60)
    return raw.to(torch.uint8)


def random_words(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Four UE8M0 bytes a word."""
    size = (*shape, 4)
    raw = torch.randint(120, 134, size, generator=generator, device=generator.device)
    return raw.to(torch.uint8).view(torch.int32).squeeze(-1)


def queries(rows: tuple[int, ...], heads: int, fmt: str, generator: torch.Generator) -> Any:
    width = DIM if fmt == "mxfp8" else DIM // 2
    data = random_bytes((*rows, heads, width), fmt, generator)
    if fmt == "mxfp8":
        return data.view(torch.float8_e4m3fn), None
    return data, random_words((*rows, heads), generator)


class Ragged:
    """Random inputs of a ragged case, and the call that is timed."""

    def __init__(self, case: RaggedCase, device: torch.device):
        generator = torch.Generator(device).manual_seed(case.rows + case.keys)
        q, q_scale = queries((case.rows,), case.heads, case.fmt, generator)
        width = DIM if case.fmt == "mxfp8" else DIM // 2
        k = random_bytes((case.keys, width), case.fmt, generator)
        if case.fmt == "mxfp8":
            k, k_scale = k.view(torch.float8_e4m3fn), torch.rand(case.keys, device=device) + 0.5
        else:
            k_scale = random_words((case.keys,), generator)
        weights = torch.randn(case.rows, case.heads, generator=generator, device=device)
        starts = torch.zeros(case.rows, dtype=torch.int32, device=device)
        ends = torch.arange(
            case.keys - case.rows + 1, case.keys + 1, dtype=torch.int32, device=device
        )
        self.args = (q, q_scale, k, k_scale, weights, starts, ends)
        self.out = torch.empty(case.rows, case.keys, device=device)
        self.bytes = sum(t.nbytes for t in self.args if t is not None) + 4 * case.pairs

    def run(self, clean: bool = False) -> None:
        torch.ops.sm120.mqa_logits.out(*self.args, False, clean, out=self.out)


class Paged:
    def __init__(self, case: PagedCase, device: torch.device):
        generator = torch.Generator(device).manual_seed(case.batch + case.context)
        q, q_scale = queries((case.batch, case.next_n), case.heads, case.fmt, generator)
        width = DIM if case.fmt == "mxfp8" else DIM // 2
        spread = case.context // 10
        lengths = case.context - torch.randint(
            0, spread + 1, (case.batch,), generator=generator, device=device
        )
        pages = -(-case.context // BLOCK_KV)
        blocks = pages * case.batch
        cache = random_bytes((blocks, BLOCK_KV * (width + 4)), case.fmt, generator)
        scales = cache[:, BLOCK_KV * width :]
        if case.fmt == "mxfp8":
            scales.copy_(torch.ones(BLOCK_KV, device=device).view(torch.uint8))
        else:
            scales.fill_(127)
        order = torch.randperm(blocks, generator=generator, device=device).to(torch.int32)
        rows = case.batch * case.next_n
        weights = torch.randn(rows, case.heads, generator=generator, device=device)
        self.args = (
            q,
            q_scale,
            cache.view(blocks, BLOCK_KV, 1, width + 4),
            weights,
            lengths.to(torch.int32),
            order.view(case.batch, pages),
        )
        self.keys = int(lengths.sum())
        self.out = torch.empty(rows, case.context, device=device)
        logits = 4 * self.keys * case.next_n
        self.bytes = q.nbytes + weights.nbytes + self.keys * (width + 4) + logits

    def run(self, metadata: torch.Tensor | None) -> None:
        torch.ops.sm120.paged_mqa_logits.out(*self.args, metadata, None, False, out=self.out)


def _ragged_lines(context: Context, case: RaggedCase) -> Iterator[Line]:
    inputs = Ragged(case, context.device)
    common: dict[str, Any] = {
        "family": "mqa",
        "shape": case.label,
        "flops": 2 * case.heads * DIM * case.pairs,
        "bytes": inputs.bytes,
    }
    name = f"ragged {case.fmt}"
    yield context.time(inputs.run, name=name, provider="sm120_ops", mark=case.mark, **common)
    if case == RAGGED[0]:
        clean = functools.partial(inputs.run, True)
        yield context.time(clean, name=f"{name} clean", provider="sm120_ops", **common)
    if context.with_peers and case.fmt == "mxfp8" and context.mode != "full":
        from sm120_ops.bench import mqa_peers

        yield from mqa_peers.of_ragged(context, name, inputs, common)


def _paged_lines(context: Context, case: PagedCase) -> Iterator[Line]:
    inputs = Paged(case, context.device)
    common: dict[str, Any] = {
        "family": "mqa",
        "shape": case.label,
        "flops": 2 * case.heads * DIM * inputs.keys * case.next_n,
        "bytes": inputs.bytes,
    }
    name = f"paged {case.fmt}"
    call = functools.partial(inputs.run, None)
    yield context.time(call, name=name, provider="sm120_ops", mark=case.mark, **common)
    sms = torch.cuda.get_device_properties(context.device).multi_processor_count
    metadata = torch.ops.sm120.paged_mqa_metadata(inputs.args[4], sms)
    call = functools.partial(inputs.run, metadata)
    yield context.time(call, name=f"{name} metadata", provider="sm120_ops", **common)
    if context.with_peers and case.fmt == "mxfp8" and context.mode != "full":
        from sm120_ops.bench import mqa_peers

        yield from mqa_peers.of_paged(context, name, inputs, common)


def _other_lines(context: Context) -> Iterator[Line]:
    device = context.device
    for rows in (4096, 65536):
        lengths = torch.randint(1, 65536, (rows,), dtype=torch.int32, device=device)
        out = torch.empty(133, 2, dtype=torch.int32, device=device)
        call = functools.partial(torch.ops.sm120.paged_mqa_metadata.out, lengths, out=out)
        mark = _mark("us", "<=", 8, "us") if rows == 4096 else None
        yield context.time(
            call, family="mqa", name="metadata", shape=f"{rows} rows", provider="sm120_ops",
            mark=mark,
        )  # fmt: skip
    for rows, columns, k in ((4096, 65536, 2048), (64, 131072, 2048), (4, 1 << 20, 512)):
        logits = torch.randn(rows, columns, device=device)
        ends = torch.full((rows,), columns, dtype=torch.int32, device=device)
        chosen = torch.empty(rows, k, dtype=torch.int32, device=device)
        call = functools.partial(
            torch.ops.sm120.indexer_topk.out, logits, None, ends, k, out=chosen
        )
        common: dict[str, Any] = {
            "family": "mqa",
            "name": f"top-{k}",
            "shape": f"{rows} x {columns}",
            "bytes": logits.nbytes + chosen.nbytes,
        }
        line = context.time(call, provider="sm120_ops", **common)
        if context.with_peers:
            peer = context.time_peer(
                functools.partial(torch.topk, logits, k, sorted=False),
                provider="torch.topk",
                **common,
            )
            if line.us and peer.us:
                line.note = f"{peer.us / line.us:.1f} x torch.topk"
                line.relative = peer.us / line.us
                if rows == 4096:
                    line.mark = _mark("relative", ">=", 5, "x torch.topk")
                    context.judge(line)
            yield line
            yield peer
        else:
            yield line
    source = torch.randn(8192, DIM, device=device, dtype=torch.bfloat16)
    cache = torch.zeros(256, BLOCK_KV, 1, DIM + 4, dtype=torch.uint8, device=device)
    slots = torch.randperm(256 * BLOCK_KV, device=device)[:8192]
    call = functools.partial(torch.ops.sm120.mqa_cache_write, source, slots, cache, "mxfp8")
    yield context.time(
        call, family="mqa", name="cache write mxfp8", shape="8192 rows", provider="sm120_ops",
        bytes=source.nbytes + slots.nbytes + 8192 * (DIM + 4),
    )  # fmt: skip


def run(context: Context) -> Iterator[Line]:
    ragged, paged = cases(context.mode)
    for ragged_case in ragged:
        yield from _ragged_lines(context, ragged_case)
    for paged_case in paged:
        yield from _paged_lines(context, paged_case)
    yield from _other_lines(context)
