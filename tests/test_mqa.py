"""MQA logits, ragged and paged, FP8 and FP4, against float64, with everything unread poisoned.

SM120_OPS_TEST_CASES and SM120_OPS_TEST_SEED choose the drawn cases, as in test_gemm_random.py.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from mqa_cases import POISON, assert_logits, make_paged, make_ragged
from reference import FP4, FP8, opcheck

import sm120_ops

ops = torch.ops.sm120
HEADS, DIMS, BLOCKS = (8, 16, 32, 64, 128), (32, 64, 128), (16, 32, 64, 128)
CHUNKS = 20
DEFAULT_CASES = {"cpu": 60, "cuda": 1500}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))


def check_ragged(
    seed: int, device: torch.device, *shape: Any, out: str = "full", bf16: bool = False,
    margin: int = 0, **options: Any,
) -> None:  # fmt: skip
    """`out`: "full" (untouched outside the windows), "clean" or "compressed"."""
    case = make_ragged(seed, device, *shape, **options)
    rows, keys = case.exact.shape
    width = keys if out != "compressed" else 1 + (seed * 37) % (keys + 40)
    dtype = torch.bfloat16 if bf16 else torch.float32
    buffer = torch.full((rows, width + margin), POISON, dtype=dtype, device=device)
    result = buffer[:, :width]
    ops.mqa_logits.out(*case.args, out == "compressed", out != "full", out=result)
    exact, seen = (case.exact, case.seen()) if out != "compressed" else case.compressed(width)
    assert_logits(result, exact, seen, POISON if out == "full" else -torch.inf)
    assert (buffer[:, width:] == POISON).all()
    again = torch.full_like(buffer, POISON)[:, :width]
    ops.mqa_logits.out(*case.args, out == "compressed", out != "full", out=again)
    assert torch.equal(result, again)


def check_paged(
    seed: int, device: torch.device, *shape: Any, clean: bool = False, bf16: bool = False,
    margin: int = 0, ctas: int = 0, **options: Any,
) -> None:  # fmt: skip
    case = make_paged(seed, device, *shape, **options)
    rows, columns = case.exact.shape
    metadata = None
    if ctas:
        metadata = ops.paged_mqa_metadata(case.context_lens, ctas, case.indices)
    dtype = torch.bfloat16 if bf16 else torch.float32
    buffer = torch.full((rows, columns + margin), POISON, dtype=dtype, device=device)
    result = buffer[:, :columns]
    ops.paged_mqa_logits.out(*case.args, metadata, case.indices, clean, out=result)
    assert_logits(result, case.exact, case.seen(), -torch.inf if clean else POISON)
    assert (buffer[:, columns:] == POISON).all()
    again = torch.full_like(buffer, POISON)[:, :columns]
    ops.paged_mqa_logits.out(*case.args, metadata, case.indices, clean, out=again)
    assert torch.equal(result, again)


def draw_ragged(seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    small = device.type == "cpu"
    rows = rng.choice([0, 1, 2, 3, 7, 8, 9, 33, rng.randint(1, 40 if small else 200)])
    keys = rng.choice([0, 1, 15, 16, 127, 128, 129, rng.randint(1, 300 if small else 3000)])
    check_ragged(
        seed, device, rows, rng.choice(HEADS), rng.choice(DIMS), keys, rng.choice((FP8, FP4)),
        out=rng.choice(("full", "clean", "compressed")), bf16=rng.random() < 0.3,
        margin=rng.choice((0, 0, 5, 8)), padding=rng.choice((0, 0, 16, 48)),
        scales=rng.choice(((120, 134), (120, 134), (110, 140), (64, 180))),
    )  # fmt: skip


def draw_paged(seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    small = device.type == "cpu"
    batch = rng.choice([0, 1, 2, 5, rng.randint(1, 8 if small else 40)])
    columns = rng.choice([1, 64, 100, 257, rng.randint(1, 300 if small else 2500)])
    varlen = rng.random() < 0.25
    next_n = 1 if varlen else rng.randint(1, 8)
    kinds = ("any", "any", "short", "wild")
    kind = rng.choice(kinds)

    def length() -> int:
        if kind == "short":
            return rng.randint(0, min(columns, 20))
        if kind == "wild":
            return rng.choice([-5, 0, 1, columns, columns + 77, -(1 << 31), (1 << 31) - 300])
        return rng.randint(0, columns)

    lengths = [[length() for _ in range(next_n)] for _ in range(batch)]
    indices = None
    if varlen:
        indices, name = [], 0
        for _ in range(batch):
            name += rng.random() < 0.4
            indices.append(name)
    check_paged(
        seed, device, lengths, rng.choice(HEADS), rng.choice(DIMS), rng.choice(BLOCKS),
        rng.choice((FP8, FP4)), columns, clean=rng.random() < 0.5, bf16=rng.random() < 0.3,
        margin=rng.choice((0, 0, 5, 8)), ctas=rng.choice((0, 0, 1, 7, 132)),
        one_length=not varlen and rng.random() < 0.4, page_padding=rng.choice((0, 0, 16, 208)),
        unknown=rng.choice((0, 0, 0.2)), indices=indices,
        scales=rng.choice(((120, 134), (120, 134), (110, 140), (64, 180))),
    )  # fmt: skip


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases(device: torch.device, chunk: int) -> None:
    default = DEFAULT_CASES[device.type]
    count = int(os.environ.get("SM120_OPS_TEST_CASES", default)) // CHUNKS
    for index in range(chunk * count, (chunk + 1) * count):
        seed = SEED + index
        draw = draw_ragged if seed % 2 else draw_paged
        try:
            draw(seed, device)
        except Exception as error:
            text = " ".join(str(error).split())
            raise AssertionError(f"{draw.__name__}({seed}): {text}") from error


@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_every_shape(device: torch.device, heads: int, dim: int, fmt: str) -> None:
    rows, keys = (5, 150) if device.type == "cpu" else (70, 700)
    check_ragged(1, device, rows, heads, dim, keys, fmt)
    check_ragged(2, device, 1, heads, dim, keys, fmt, out="clean")
    for block_kv in BLOCKS:
        for next_n in (1, 2, 3, 5, 8):
            lengths = [[keys - 40 * b - i for i in range(next_n)] for b in range(3)]
            check_paged(block_kv + next_n, device, lengths, heads, dim, block_kv, fmt, keys + 9)


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_extreme_fp4_scales(device: torch.device, heads: int) -> None:
    """Scales far apart within a row, and at both ends of UE8M0's range."""
    pairs = [((1, 60), (190, 250)), ((90, 160), (90, 160)), ((60, 70), (120, 134))]
    pairs += [((120, 134), (60, 70)), ((185, 200), (0, 60)), ((0, 9), (245, 254))]
    for seed, (scales, k_scales) in enumerate(pairs):
        for rows, dim, keys in ((9, 128, 200), (3, 64, 77), (3, 32, 77)):
            check_ragged(
                seed, device, rows, heads, dim, keys, FP4, scales=scales, k_scales=k_scales
            )


@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_nan_stays_in_its_row_and_column(device: torch.device, fmt: str) -> None:
    case = make_ragged(5, device, 12, 64, 128, 300, fmt, windows=([0] * 12, [300] * 12))
    q, q_scale, k, k_scale = case.args[:4]
    if fmt == FP8:
        k.view(torch.uint8)[77, 5] = 0x7F
        q.view(torch.uint8)[3, 9, 100] = 0xFF
    else:
        k_scale[77] = 0x7F7FFF7F
        q_scale[3, 9] = 0x7F7F7FFF
    got = ops.mqa_logits(*case.args, 0, True, torch.float32)
    nan = torch.zeros_like(case.seen())
    nan[3], nan[:, 77] = True, True
    assert torch.equal(got.isnan(), nan)
    assert_logits(torch.where(nan, 0.0, got), torch.where(nan, 0.0, case.exact), ~nan, None)


def test_lengths_of_a_sequence_count_back_from_its_last_row(device: torch.device) -> None:
    case = make_paged(3, device, [[0, 0, 50], [0, 0, 2]], 64, 128, 64, FP8, 70, one_length=True)
    assert case.context_lens.tolist() == [50, 2]
    got = sm120_ops.paged_mqa_logits(
        case.q, case.kv_cache, case.weights, case.context_lens, case.block_table, 70, clean=True
    )
    assert got.isfinite().sum(1).tolist() == [48, 49, 50, 0, 1, 2]


def test_metadata_is_a_balanced_partition(device: torch.device) -> None:
    rng = random.Random(0)
    for batch in (0, 1, 5, 33, 1000, 5000 if device.type == "cuda" else 700):
        for indices in (None, [rng.randint(0, 3) for _ in range(batch)]):
            lens = [rng.choice([0, 1, -3, 128, 129, rng.randint(0, 9000)]) for _ in range(batch)]
            if batch == 33:
                lens[7] = 1 << 20
            context = torch.tensor(lens, dtype=torch.int32)
            names = None if indices is None else torch.tensor(indices, dtype=torch.int32)
            for ctas in (1, 3, 132, 188):
                want = ops.paged_mqa_metadata(context, ctas, names)
                got = ops.paged_mqa_metadata(
                    context.to(device), ctas, None if names is None else names.to(device)
                )
                assert torch.equal(got.cpu(), want), (batch, ctas, indices is None)
                if names is None:
                    tiles = torch.tensor([-(-max(n, 0) // 128) for n in lens] + [0])
                    before = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
                    units = before[want[:, 0].long()] + want[:, 1]
                    assert units[0] == 0 or tiles.sum() == 0
                    assert units[-1] == tiles.sum()
                    share = units.diff()
                    assert share.max() - share.min() <= 1


def test_metadata_that_does_not_belong_is_harmless(device: torch.device) -> None:
    """Any integers: wrong logits at worst, and nothing written outside the rows' windows."""
    case = make_paged(9, device, [[300, 200], [10, 500]], 64, 128, 32, FP8, 512)
    for values in ([-1, 1 << 30], [0, -5], [1, 3], [1 << 30, 0], [-(1 << 31), -(1 << 31)]):
        metadata = torch.tensor([values, [0, 1], [1, 1 << 30], [7, 7]], dtype=torch.int32)
        out = torch.full((4, 512), POISON, device=device)
        ops.paged_mqa_logits.out(*case.args, metadata.to(device), None, False, out=out)
        assert (out[~case.seen()] == POISON).all()


def test_out_of_place_and_wrapper_agree(device: torch.device) -> None:
    case = make_ragged(4, device, 6, 32, 64, 90, FP4)
    q, q_scale, k, k_scale, weights, starts, ends = case.args
    got = sm120_ops.mqa_logits((q, q_scale), (k, k_scale), weights, starts, ends)
    out = torch.full((6, 90), POISON, device=device)
    same = sm120_ops.mqa_logits((q, q_scale), (k, k_scale), weights, starts, ends, out=out)
    assert same is out
    assert torch.equal(got, out)
    half = sm120_ops.mqa_logits(
        (q.view(torch.int8), q_scale), (k.view(torch.int8), k_scale), weights, starts, ends,
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(half, got.bfloat16())


@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_opcheck(device: torch.device, fmt: str) -> None:
    ragged = make_ragged(1, device, 5, 16, 64, 40, fmt).args
    out = torch.zeros(5, 40, device=device)
    opcheck(ops.mqa_logits.default, (*ragged, 0, True, torch.float32))
    opcheck(ops.mqa_logits.default, (*ragged, 13, False, torch.bfloat16))
    opcheck(ops.mqa_logits.out, (*ragged, False, True), {"out": out})
    paged = make_paged(2, device, [[20, 30], [5, 1]], 16, 64, 16, fmt, 40)
    metadata = ops.paged_mqa_metadata(paged.context_lens, 4)
    opcheck(ops.paged_mqa_logits.default, (*paged.args, 40, metadata, None, True, torch.float32))
    out = torch.zeros(4, 40, device=device)
    opcheck(ops.paged_mqa_logits.out, (*paged.args, None, None, False), {"out": out})
    opcheck(ops.paged_mqa_metadata.default, (paged.context_lens, 4))
    opcheck(ops.paged_mqa_metadata.out, (paged.context_lens,), {"out": metadata})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device: torch.device, backend: str) -> None:
    """One graph for every number of rows and keys."""
    torch._dynamo.reset()

    def step(*args: torch.Tensor) -> torch.Tensor:
        q, q_scale, k, k_scale, weights, starts, ends = args
        return sm120_ops.mqa_logits((q, q_scale), (k, k_scale), weights, starts, ends) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed, (rows, keys) in enumerate([(7, 50), (3, 90), (20, 33)]):
            args = make_ragged(seed, device, rows, 16, 64, keys, FP4).args
            assert torch.equal(compiled(*args), step(*args))
