"""The indexer's cache writer and top-k."""

from __future__ import annotations

import random

import pytest
import reference
import torch
from reference import FP4, FP8, opcheck

import sm120_ops

ops = torch.ops.sm120


# ---- mqa_cache_write -----------------------------------------------------------------------------


def expected_rows(k: torch.Tensor, fmt: str) -> torch.Tensor:
    """Data bytes and scale bytes of each row, uint8 [T, W + 4]."""
    codes, scales = reference.quantize(k, fmt, 128 if fmt == FP8 else 32, 1, "deepgemm")
    if fmt == FP8:
        value = reference.UE8M0[scales[:, 0].long()].float()
        return torch.cat((codes, value[:, None].view(torch.uint8)), 1)
    words = torch.zeros(len(k), 4, dtype=torch.uint8)
    words[:, : scales.shape[1]] = scales
    return torch.cat((codes[:, ::2] | codes[:, 1::2] << 4, words), 1)


@pytest.mark.sanitizer
@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_cache_write(fmt: str, dim: int) -> None:
    check_cache_write(torch.device("cuda"), fmt, dim, 64, 40)


@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("block_kv", [16, 32, 64, 128])
def test_cache_write_everywhere(device: torch.device, fmt: str, dim: int, block_kv: int) -> None:
    for rows in (0, 1, 7, 300):
        check_cache_write(device, fmt, dim, block_kv, rows)


def check_cache_write(device: torch.device, fmt: str, dim: int, block_kv: int, rows: int) -> None:
    rng = random.Random(rows + dim)
    generator = torch.Generator().manual_seed(rows + dim)
    power = torch.randint(-30, 30, (rows, 1), generator=generator)
    k = torch.ldexp(torch.randn(rows, dim, generator=generator), power).bfloat16()
    if rows > 5:
        k[0], k[1, 3], k[2, 5], k[3] = 0, torch.inf, torch.nan, -0.0
    width = dim if fmt == FP8 else dim // 2
    blocks = rows // block_kv + 3
    buffer = torch.full((blocks, block_kv * (width + 4) + 32), 0xAB, dtype=torch.uint8)
    slots = rng.sample(range(blocks * block_kv), rows)
    skipped = set(rng.sample(range(rows), rows // 4))
    wrong = [-1, -2, blocks * block_kv, -(1 << 31), (1 << 31) - 1]
    given = [rng.choice(wrong) if i in skipped else slot for i, slot in enumerate(slots)]
    want = buffer.clone()
    expected = expected_rows(k, fmt) if rows else want
    for i, slot in enumerate(slots):
        if i not in skipped:
            page, row = want[slot // block_kv], slot % block_kv
            page[row * width : (row + 1) * width] = expected[i, :width]
            at = block_kv * width + 4 * row
            page[at : at + 4] = expected[i, width:]
    for dtype in (torch.int32, torch.int64):
        got = buffer.clone().to(device)
        cache = got[:, :-32].view(blocks, block_kv, 1, width + 4)
        padded = torch.zeros(rows, dim + 8, dtype=torch.bfloat16, device=device)
        padded[:, :dim] = k.to(device)
        slot_tensor = torch.tensor(given, dtype=dtype, device=device)
        sm120_ops.mqa_cache_write(padded[:, :dim], slot_tensor, cache, fmt)
        # NaN as a float32 scale may have any payload.
        different = got.cpu() != want
        if fmt == FP8 and rows > 5:
            for i in (1, 2):
                if i not in skipped:
                    block, row = slots[i] // block_kv, slots[i] % block_kv
                    at = block_kv * width + 4 * row
                    assert got[block, at : at + 4].cpu().view(torch.float32).isnan()
                    different[block, at : at + 4] = False
        assert not different.any(), different.nonzero()[:4].tolist()


def test_written_rows_give_their_logits(device: torch.device) -> None:
    """Writer, logits and float64 agree on what a page means."""
    torch.manual_seed(0)
    k = torch.randn(100, 128).bfloat16().to(device)
    q, q_scale = sm120_ops.quantize(torch.randn(64, 128, device=device), FP4)
    weights = torch.rand(1, 64, device=device)
    cache = torch.zeros(4, 64, 1, 68, dtype=torch.uint8, device=device)
    sm120_ops.mqa_cache_write(k, torch.arange(100, device=device) + 64, cache, FP4)
    table = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    lengths = torch.tensor([100], dtype=torch.int32, device=device)
    pair = (q.view(1, 1, 64, 64), q_scale[:, 0].contiguous().view(1, 1, 64))
    got = sm120_ops.paged_mqa_logits(pair, cache, weights, lengths, table, 100)
    q_values = sm120_ops.dequantize(q, q_scale).double()
    k_values = sm120_ops.dequantize(*sm120_ops.quantize(k, FP4)).double()
    exact = weights.double() @ torch.relu(q_values @ k_values.t())
    assert reference.calc_diff(got, exact) < 1e-10


# ---- indexer_topk --------------------------------------------------------------------------------


def expected_topk(row: torch.Tensor, start: int, end: int, k: int) -> list[int]:
    start = max(start, 0)
    end = max(min(end, len(row)), start)
    values = row[start:end].double().nan_to_num(nan=1e300, posinf=1e299, neginf=-1e299).tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return sorted(start + i for i in order)


def draw_logits(rng: random.Random, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    x = torch.randn(rows, columns, generator=generator)
    kind = rng.choice(("normal", "ties", "constant", "special", "narrow"))
    if kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "constant":
        x = torch.full_like(x, rng.choice((0.0, -torch.inf, -3.0)))
    elif kind == "special":
        pool = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1e-40, 1e-40])
        picked = torch.randint(len(pool), x.shape, generator=generator)
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, pool[picked], x)
    elif kind == "narrow":  # one bin of the first histogram, more than fit shared memory
        x = 1 + x.sigmoid() / 16
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_topk(device: torch.device, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    long = (20_000, 140_003) if device.type == "cuda" else (5000,)  # of which a GPU makes parts
    for columns in (1, 3, 64, 1000, 4096, 4097, *long):
        for k in (1, 64, 512, 1152, 2048):
            rows = rng.randint(1, 5)
            logits = draw_logits(rng, rows, columns, dtype)
            buffer = torch.full((rows, columns + rng.choice((0, 3, 8))), torch.nan, dtype=dtype)
            buffer[:, :columns] = logits
            starts = [rng.choice((0, 0, rng.randint(-5, columns))) for _ in range(rows)]
            ends = [rng.choice((columns, columns + 9, rng.randint(-2, columns))) for _ in starts]
            args = (
                buffer.to(device)[:, :columns],
                torch.tensor(starts, dtype=torch.int32, device=device),
                torch.tensor(ends, dtype=torch.int32, device=device),
                k,
            )
            got = ops.indexer_topk(*args, False)
            relative = ops.indexer_topk(*args, True)
            assert torch.equal(got, ops.indexer_topk(*args, False))
            for i in range(rows):
                want = expected_topk(logits[i], starts[i], ends[i], k)
                assert got[i].tolist() == want + [-1] * (k - len(want)), (columns, k, i)
                first = max(starts[i], 0)
                assert relative[i].tolist()[: len(want)] == [x - first for x in want]


def test_topk_against_torch(device: torch.device) -> None:
    torch.manual_seed(0)
    rows, columns = (64, 65_536) if device.type == "cuda" else (4, 9000)
    logits = torch.randn(rows, columns, device=device)
    ends = torch.full((rows,), columns, dtype=torch.int32, device=device)
    for k in (512, 1152, 2048):
        want = logits.topk(k).values.sort().values
        got = logits.gather(1, sm120_ops.indexer_topk(logits, ends, k).long()).sort().values
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_topk_of_a_long_row() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1 << 20, device="cuda")
    logits[1] = logits[1].round()
    ends = torch.tensor([1 << 20, (1 << 20) - 5], dtype=torch.int32, device="cuda")
    got = sm120_ops.indexer_topk(logits, ends, 2048).cpu()
    for i in range(2):
        assert got[i].tolist() == expected_topk(logits[i].cpu(), 0, int(ends[i]), 2048)


def test_topk_through_the_block_table(device: torch.device) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 200, device=device)
    ends = torch.tensor([200, 130, 64, 0], dtype=torch.int32, device=device)
    table = torch.tensor([[7, 3, -1], [5, 0, 2]], dtype=torch.int32, device=device)
    got = sm120_ops.indexer_topk(logits, ends, 100, block_table=table, block_kv=64)
    plain = sm120_ops.indexer_topk(logits, ends, 100)
    for i in range(4):
        for slot, column in zip(got[i].tolist(), plain[i].tolist(), strict=True):
            page = column // 64
            block = -1 if column < 0 or page >= 3 else int(table[i // 2, page])
            assert slot == (-1 if block < 0 else block * 64 + column % 64)


def test_opcheck(device: torch.device) -> None:
    logits = torch.randn(4, 50, device=device)
    ends = torch.tensor([50, 3, 0, 20], dtype=torch.int32, device=device)
    out = torch.zeros(4, 8, dtype=torch.int32, device=device)
    opcheck(ops.indexer_topk.default, (logits, None, ends, 8))
    opcheck(ops.indexer_topk.out, (logits, ends // 2, ends, 8, True), {"out": out})
    k = torch.randn(5, 64, device=device).bfloat16()
    cache = torch.zeros(3, 16, 1, 68, dtype=torch.uint8, device=device)
    opcheck(ops.mqa_cache_write.default, (k, torch.arange(5, device=device), cache, FP8))
