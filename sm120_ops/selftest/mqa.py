"""MQA logits of the self-test: ragged windows, and paged caches whose pages are in disorder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from sm120_ops.selftest import formulas
from sm120_ops.selftest.bounds import ExactCase, Parts, SumCase
from sm120_ops.selftest.cases import random_matrix


def codes(rows: int, dim: int, fmt: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows: FP8 with a float32 scale each, or FP4 with a word of scales each."""
    x = random_matrix(rows, dim, seed, torch.bfloat16)
    if fmt == "mxfp4":
        data, scale = torch.ops.sm120.quantize(x, fmt, 32)
        return data, scale[:, 0].contiguous()
    generator = torch.Generator().manual_seed(seed)
    return x.to(torch.float8_e4m3fn), torch.rand(rows, generator=generator) + 0.5


def values(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP64 [rows, D]; an FP8 row's scale is not in it."""
    if data.dtype == torch.float8_e4m3fn:
        return formulas.code_values("mxfp8")[formulas.codes_of(data)]
    return formulas.dequantize(data, scale[:, None], 32)


def row_logits(
    q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [H, D], keys [n, D], weights [H] in FP64 -> logits [n], and the sums of magnitudes."""
    return weights @ torch.relu(q @ keys.T), weights.abs() @ (q.abs() @ keys.abs().T)


@dataclasses.dataclass(frozen=True)
class RaggedCase(SumCase):
    rows: int
    heads: int
    dim: int
    keys: int
    format: str
    out_dtype: torch.dtype = torch.float32

    def parts(self) -> tuple[torch.Tensor, ...]:
        """q, its scales, k, its scales, weights, starts, ends."""
        generator = torch.Generator().manual_seed(self.rows + self.keys)
        starts = torch.randint(-4, self.keys + 4, (self.rows,), generator=generator)
        lengths = torch.randint(0, self.keys + 8, (self.rows,), generator=generator)
        windows = (starts.int(), (starts + lengths).int())
        q, k = (
            codes(count, self.dim, self.format, count)
            for count in (self.rows * self.heads, self.keys)
        )
        return (*q, *k, torch.randn(self.rows, self.heads, generator=generator), *windows)

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        q, q_scale, k, k_scale, *rest = (t.to(device) for t in self.parts())
        shape = (self.rows, self.heads)
        out = torch.ops.sm120.mqa_logits(
            q.view(*shape, -1), q_scale.view(shape) if self.format == "mxfp4" else None, k, k_scale,
            *rest, 0, True, self.out_dtype,
        )  # fmt: skip
        return {"out": out.cpu()}

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, q_scale, k, k_scale, weights, starts, ends = self.parts()
        queries, keys = values(q, q_scale).view(self.rows, self.heads, -1), values(k, k_scale)
        want = torch.full((self.rows, self.keys), -torch.inf, dtype=torch.float64)
        magnitude = torch.zeros_like(want)
        factor = k_scale.double() if self.format == "mxfp8" else torch.ones(self.keys).double()
        for i in range(self.rows):
            seen = slice(max(int(starts[i]), 0), max(int(ends[i]), 0))
            sums = row_logits(queries[i], keys[seen], weights[i].double())
            want[i, seen], magnitude[i, seen] = (s * factor[seen] for s in sums)
        return want, magnitude


@dataclasses.dataclass(frozen=True)
class PagedCase(SumCase):
    lengths: tuple[int, ...]  # of the sequences' last rows
    next_n: int
    heads: int
    dim: int
    block_kv: int
    format: str
    out_dtype: torch.dtype = torch.float32

    @property
    def columns(self) -> int:
        return max(self.lengths) + 5

    def parts(self) -> tuple[torch.Tensor, ...]:
        """q, its scales, the keys of all sequences, their scales, weights."""
        rows = len(self.lengths) * self.next_n
        q, k = (
            codes(count, self.dim, self.format, count + 1)
            for count in (rows * self.heads, sum(self.lengths))
        )
        generator = torch.Generator().manual_seed(rows)
        return (*q, *k, torch.randn(rows, self.heads, generator=generator))

    def cache(self, data: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages in a drawn order, and the table that finds them."""
        raw, marks = data.view(torch.uint8), scale.view(torch.uint8).view(-1, 4)
        width, block = raw.shape[1], self.block_kv
        pages = [-(-length // block) for length in self.lengths]
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(block)).tolist()
        cache = torch.full((len(order), block * (width + 4)), 0xFF, dtype=torch.uint8)
        table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32)
        begin = 0
        for sequence, length in enumerate(self.lengths):
            for page in range(pages[sequence]):
                at = order.pop()
                table[sequence, page] = at
                rows = slice(begin + page * block, begin + min((page + 1) * block, length))
                count = rows.stop - rows.start
                cache[at, : count * width] = raw[rows].flatten()
                cache[at, block * width : block * width + 4 * count] = marks[rows].flatten()
            begin += length
        return cache.view(-1, block, 1, width + 4), table

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        q, q_scale, k, k_scale, weights = self.parts()
        cache, table = self.cache(k, k_scale)
        shape = (len(self.lengths), self.next_n, self.heads)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        inputs = (
            q.view(*shape, -1), q_scale.view(shape) if self.format == "mxfp4" else None, cache,
            weights, lengths, table,
        )  # fmt: skip
        out = torch.ops.sm120.paged_mqa_logits(
            *(None if t is None else t.to(device) for t in inputs), self.columns, None, None, True,
            self.out_dtype,
        )  # fmt: skip
        return {"out": out.cpu()}

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, q_scale, k, k_scale, weights = self.parts()
        rows = len(self.lengths) * self.next_n
        queries, keys = values(q, q_scale).view(rows, self.heads, -1), values(k, k_scale)
        want = torch.full((rows, self.columns), -torch.inf, dtype=torch.float64)
        magnitude = torch.zeros_like(want)
        begin = 0
        for sequence, length in enumerate(self.lengths):
            for i in range(self.next_n):
                row, seen = sequence * self.next_n + i, max(length - (self.next_n - 1 - i), 0)
                sums = row_logits(queries[row], keys[begin : begin + seen], weights[row].double())
                factor = k_scale[begin : begin + seen].double() if self.format == "mxfp8" else 1
                want[row, :seen], magnitude[row, :seen] = (s * factor for s in sums)
            begin += length
        return want, magnitude


@dataclasses.dataclass(frozen=True)
class IndexerCase(ExactCase):
    """What stands around the logits: the cache's writer, the schedule and top-k."""

    rows: int
    dim: int
    block_kv: int
    format: str
    k: int

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Keys, their slots, logits with ties, ends of the windows."""
        generator = torch.Generator().manual_seed(self.rows)
        slots = torch.randperm(self.rows + 9, generator=generator)[: self.rows]
        slots[::7] = -1
        logits = torch.randint(-20, 20, (self.rows, 3 * self.k), generator=generator).float()
        ends = torch.randint(0, 3 * self.k, (self.rows,), generator=generator)
        return random_matrix(self.rows, self.dim, 1, torch.bfloat16), slots, logits, ends.int()

    def run(self, device: torch.device) -> Parts:
        keys, slots, logits, ends = (t.to(device) for t in self.inputs())
        ops, blocks = torch.ops.sm120, -(-(self.rows + 9) // self.block_kv)
        width = self.dim if self.format == "mxfp8" else self.dim // 2
        shape = (blocks, self.block_kv, 1, width + 4)
        cache = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
        ops.mqa_cache_write(keys, slots, cache, self.format)
        return {
            "cache": cache.cpu(),
            "schedule": ops.paged_mqa_metadata(ends, 5).cpu(),
            "top-k": ops.indexer_topk(logits, None, ends, self.k).cpu(),
        }

    def differences(self, got: Parts) -> dict[str, float]:
        keys, slots, logits, ends = self.inputs()
        gran_k = 128 if self.format == "mxfp8" else 32
        values, byte = formulas.quantize(keys, self.format, gran_k, 1, "deepgemm")
        pages = got["cache"].flatten(1)
        width = got["cache"].shape[3] - 4
        wrong = 0
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            page, at = pages[slot // self.block_kv], slot % self.block_kv
            data = page[at * width : (at + 1) * width][None]
            if self.format == "mxfp8":
                data = data.view(torch.float8_e4m3fn)
            codes = formulas.code_values(self.format)[formulas.codes_of(data)]
            wrong += int((codes[0] != values[row]).sum())
            scale = page[self.block_kv * width + 4 * at :][:4]
            if self.format == "mxfp8":
                want = formulas.scale_values(byte[row]).float().view(torch.uint8)
            else:
                want = torch.cat((byte[row], byte.new_zeros(4)))[:4]
            wrong += int((scale != want.to(torch.uint8)).sum())
        chosen = torch.full((self.rows, self.k), -1, dtype=torch.int32)
        for row, end in enumerate(ends.tolist()):
            ranked = sorted(range(end), key=lambda column: (-logits[row, column].item(), column))
            best = sorted(ranked[: self.k])
            chosen[row, : len(best)] = torch.tensor(best, dtype=torch.int32)
        # The schedule's cut is checked by the logits of the paged cases.
        return {"cache": float(wrong), "top-k": float((got["top-k"] != chosen).sum())}


def mqa_cases(quick: bool) -> Iterator[RaggedCase | PagedCase | IndexerCase]:
    for fmt in ("mxfp8", "mxfp4"):
        for heads, dim in ((64, 128), (32, 64), (8, 32)):
            yield RaggedCase(7, heads, dim, 300, fmt)
            yield PagedCase((1, 130, 257, 64), 1, heads, dim, 64, fmt)
        yield RaggedCase(65, 64, 128, 129, fmt, torch.bfloat16)
        yield PagedCase((40, 300), 2, 64, 128, 16, fmt, torch.bfloat16)
        if not quick:
            yield RaggedCase(260, 128, 128, 700, fmt)
            yield PagedCase((1000, 3, 512, 77, 200), 3, 32, 128, 128, fmt)
        yield IndexerCase(37, 128, 64, fmt, 40)
        yield IndexerCase(90, 64, 16, fmt, 7)
