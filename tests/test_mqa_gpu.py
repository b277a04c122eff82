"""Full-size MQA logits on a GPU: the same bits each time, CUDA graphs, sanitizer cases, 64 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mqa_cases import POISON, assert_logits, make_paged, make_ragged
from reference import FP4, FP8

import sm120_ops
from sm120_ops.bench.mqa import Paged, PagedCase, Ragged, RaggedCase

ops = torch.ops.sm120
pytestmark = pytest.mark.gpu
REPEATS = 40


@pytest.mark.determinism
@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("heads", [8, 32, 64, 128])
def test_ragged_gives_the_same_bits(fmt: str, heads: int) -> None:
    """A stage given back too early shows as a few other logits in some runs, at full size only."""
    for rows, keys in ((4096, 8192), (128, 8192)):
        inputs = Ragged(RaggedCase(rows, keys, heads, fmt), torch.device("cuda"))
        inputs.run(True)
        first = inputs.out.clone()
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(REPEATS):
            inputs.out.fill_(torch.nan)
            inputs.run(True)
            different += (inputs.out.view(torch.int32) != first.view(torch.int32)).sum()
        assert different.item() == 0, f"{different.item()} logits in {REPEATS} runs differ"


@pytest.mark.determinism
@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("next_n", [1, 2, 3, 6])
def test_paged_gives_the_same_bits(fmt: str, next_n: int) -> None:
    for batch, context in ((256, 8192), (4, 65536)):
        inputs = Paged(PagedCase(batch, context, next_n, 64, fmt), torch.device("cuda"))
        metadata = ops.paged_mqa_metadata(inputs.args[4], 132)
        inputs.out.fill_(POISON)
        inputs.run(metadata)
        first = inputs.out.clone()
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(REPEATS):
            inputs.out.fill_(POISON)
            inputs.run(metadata if i % 2 else None)  # the split changes no bit
            different += (inputs.out.view(torch.int32) != first.view(torch.int32)).sum()
        assert different.item() == 0, f"{different.item()} logits in {REPEATS} runs differ"


@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_graph_replay_with_other_lengths_tables_and_windows(fmt: str) -> None:
    device = torch.device("cuda")
    ragged = [make_ragged(seed, device, 37, 64, 128, 700, fmt) for seed in range(4)]
    shapes = ([[700, 650], [3, 400]], [[0, 1], [701, 30]], [[90, 500], [128, 129]])
    paged = [
        make_paged(seed, device, shape, 64, 128, 64, fmt, 768) for seed, shape in enumerate(shapes)
    ]
    blocks = max(len(case.kv_cache) for case in paged)
    width = max(case.block_table.shape[1] for case in paged)
    cache = paged[0].kv_cache.new_full((blocks, *paged[0].kv_cache.shape[1:]), 0xFF)
    table = torch.full((2, width), -1, dtype=torch.int32, device=device)
    ragged_args = [t if t is None else t.clone() for t in ragged[0].args]
    paged_args: list[Any] = [t if t is None else t.clone() for t in paged[0].args]
    paged_args[2], paged_args[5] = cache, table
    out = torch.full((37, 700), POISON, device=device)
    paged_out = torch.full((4, 768), POISON, device=device)
    metadata = torch.zeros(133, 2, dtype=torch.int32, device=device)
    chosen = torch.zeros(4, 64, dtype=torch.int32, device=device)
    lengths = paged_args[4]

    def step() -> None:
        ops.mqa_logits.out(*ragged_args, False, True, out=out)
        ops.paged_mqa_metadata.out(lengths, out=metadata)
        ops.paged_mqa_logits.out(*paged_args, metadata, None, True, out=paged_out)
        ops.indexer_topk.out(paged_out, None, lengths.view(-1), 64, out=chosen)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(12):
        one, two = ragged[seed % 4], paged[seed % 3]
        for target, source in zip(ragged_args, one.args, strict=True):
            if target is not None:
                target.copy_(source)
        cache.fill_(0xFF)
        cache[: len(two.kv_cache)].copy_(two.kv_cache)
        table.fill_(-1)
        table[:, : two.block_table.shape[1]].copy_(two.block_table)
        for i in (0, 1, 3, 4):
            if paged_args[i] is not None:
                paged_args[i].copy_(two.args[i])
        out.fill_(POISON)
        paged_out.fill_(POISON)
        graph.replay()
        assert_logits(out, one.exact, one.seen(), -torch.inf)
        assert_logits(paged_out, two.exact, two.seen(), -torch.inf)
        want = sm120_ops.indexer_topk(paged_out.cpu(), lengths.view(-1).cpu(), 64)
        assert torch.equal(chosen.cpu(), want)


@pytest.mark.sanitizer
@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_sanitizer_ragged(fmt: str, heads: int) -> None:
    device = torch.device("cuda")
    for seed, compressed in ((1, False), (2, True)):
        case = make_ragged(seed, device, 9, heads, 128, 300, fmt, padding=16)
        out = torch.full((9, 300), POISON, device=device)
        ops.mqa_logits.out(*case.args, compressed, True, out=out)
        exact, seen = case.compressed(300) if compressed else (case.exact, case.seen())
        assert_logits(out, exact, seen, -torch.inf)


@pytest.mark.sanitizer
@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("block_kv", [16, 64])
def test_sanitizer_paged(fmt: str, block_kv: int) -> None:
    device = torch.device("cuda")
    lengths = [[300, 1, 40], [0, -3, 77], [129, 128, 5000]]
    for seed, heads in ((1, 64), (2, 128), (3, 16)):
        case = make_paged(seed, device, lengths, heads, 64, block_kv, fmt, 310, unknown=0.2)
        out = torch.full((9, 310), POISON, device=device)
        metadata = ops.paged_mqa_metadata(case.context_lens, 5)
        ops.paged_mqa_logits.out(*case.args, metadata, None, True, out=out)
        assert_logits(out, case.exact, case.seen(), -torch.inf)
        again = torch.full((9, 310), POISON, device=device)
        ops.paged_mqa_logits.out(*case.args, None, None, True, out=again)
        assert torch.equal(out, again)


@pytest.mark.sanitizer
def test_sanitizer_topk() -> None:
    for columns in (9000, 160_000):  # the latter in parts
        logits = torch.randn(3, columns, device="cuda")
        ends = torch.tensor([columns, 17, columns - 4001], dtype=torch.int32, device="cuda")
        got = sm120_ops.indexer_topk(logits, ends, 512, starts=ends // 8)
        want = sm120_ops.indexer_topk(logits.cpu(), ends.cpu(), 512, starts=ends.cpu() // 8)
        assert torch.equal(got.cpu(), want)


def test_one_long_sequence_beside_a_thousand_short_ones() -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    lengths = torch.full((1001,), 100, dtype=torch.int32, device=device)
    lengths[500] = 1 << 20
    pages = (1 << 20) // 64
    blocks = pages + 2000
    cache = torch.randint(0, 0x60, (blocks, 64, 1, 132), generator=generator, device=device)
    cache = cache.to(torch.uint8)
    scales = cache.view(blocks, -1)[:, 64 * 128 :]
    scales.copy_(torch.ones(64, device=device).view(torch.uint8))
    table = torch.full((1001, pages), -1, dtype=torch.int32, device=device)
    order = torch.randperm(blocks, generator=generator, device=device).to(torch.int32)
    table[:, :2] = order[: 2 * 1001].view(1001, 2)
    table[500] = order[-pages:]
    table[499, :2] = table[500, :2]
    q = torch.randint(0, 0x60, (1001, 1, 64, 128), generator=generator, device=device)
    q = q.to(torch.uint8).view(torch.float8_e4m3fn)
    q.view(torch.uint8)[499] = q.view(torch.uint8)[500]
    weights = torch.randn(1001, 64, generator=generator, device=device)
    weights[499] = weights[500]
    out = torch.full((1001, 1 << 20), POISON, device=device)
    ops.paged_mqa_logits.out(q, None, cache, weights, lengths, table, None, None, False, out=out)
    assert torch.equal(out[499, :100], out[500, :100])
    assert (out[:, 100:][torch.arange(1001, device=device) != 500] == POISON).all()
    keys = cache.view(blocks, -1)[table[500].long(), : 64 * 128].reshape(-1, 128)
    for part in (slice(0, 4096), slice((1 << 20) - 4096, 1 << 20)):
        values = keys[part].view(torch.float8_e4m3fn).double()
        exact = weights[500].double() @ torch.relu(q[500, 0].double() @ values.t())
        assert_logits(out[500:501, part], exact[None], torch.ones_like(exact[None]).bool(), None)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 << 30, reason="needs 24 GiB"
)
def test_more_than_2_31_logits() -> None:
    device = torch.device("cuda")
    batch, columns = 40_000, 65_536
    case = make_paged(0, device, [[300]] * 4, 8, 32, 64, FP8, 512)
    repeat = batch // 4
    out = torch.full((batch, columns), POISON, dtype=torch.bfloat16, device=device)
    ops.paged_mqa_logits.out(
        case.q.repeat(repeat, 1, 1, 1), None, case.kv_cache, case.weights.repeat(repeat, 1),
        case.context_lens.repeat(repeat, 1), case.block_table.repeat(repeat, 1), None, None, False,
        out=out,
    )  # fmt: skip
    for row in (0, 20_001, 32_767, 32_768, batch - 4):
        first = row // 4 * 4
        got = out[first : first + 4, :512]
        assert_logits(got, case.exact, case.seen(), POISON)
