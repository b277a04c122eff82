"""MQA logits and the prenorm GEMM by DeepGEMM's names, both generations of their signatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat_cases import BF16, FP32

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm.testing import calc_diff

HEADS, DIM, BLOCK = 32, 128, 64
LIMIT = 5e-6  # against dequantised operands


def fp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data int8 [..., D / 2], one word of scales int32 [...], and the values."""
    data, sf = deep_gemm.per_token_cast_to_fp4(x.flatten(0, -2), True, 32, True)
    values = deep_gemm.cast_back_from_fp4(data, sf, 32, True)
    shape = x.shape[:-1]
    return data.view(*shape, -1), sf.view(shape), values.view(x.shape)


class Ragged:
    def __init__(
        self,
        device: torch.device,
        rows: int,
        keys: int,
        is_fp4: bool,
        heads: int = HEADS,
        dim: int = DIM,
    ) -> None:
        torch.manual_seed(rows)
        q = torch.randn(rows, heads, dim, device=device, dtype=BF16)
        k = torch.randn(keys, dim, device=device, dtype=BF16)
        # Rows further apart than they are long, as a slice of what a projection gives.
        self.weights = torch.randn(rows, 2 * heads, device=device)[:, :heads]
        self.starts = torch.randint(0, keys // 2, (rows,), device=device, dtype=torch.int32)
        self.ends = self.starts + torch.randint(
            0, keys // 2, (rows,), device=device, dtype=torch.int32
        )
        self.starts[0], self.ends[0] = 5, 5
        if is_fp4:
            q_data, q_scale, q_values = fp4(q)
            k_data, k_scale, k_values = fp4(k)
            self.q: Any = (q_data, q_scale)
            self.kv = (k_data, k_scale)
        else:
            q_data = q.to(torch.float8_e4m3fn)
            k_data, k_scale = deep_gemm.per_custom_dims_cast_to_fp8(k, (0,), False)
            self.q, self.kv = (q_data, None), (k_data, k_scale)
            q_values, k_values = q_data.float(), k_data.float() * k_scale[:, None]
        scores = torch.einsum("mhd,nd->mhn", q_values.double(), k_values.double()).relu()
        self.wanted = (scores * self.weights[..., None].double()).sum(1)
        columns = torch.arange(keys, device=device)
        self.window = (columns >= self.starts[:, None]) & (columns < self.ends[:, None])
        self.args = (self.q, self.kv, self.weights, self.starts, self.ends)

    def check(self, logits: torch.Tensor, limit: float = LIMIT) -> None:
        inside = self.window
        assert calc_diff(logits[inside], self.wanted[inside]) < limit

    def check_compressed(self, logits: torch.Tensor) -> None:
        for row, (start, end) in enumerate(
            zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        ):
            if end > start:
                assert calc_diff(logits[row, : end - start], self.wanted[row, start:end]) < LIMIT


@pytest.mark.parametrize("is_fp4", [False, True])
@pytest.mark.parametrize("logits_dtype", [FP32, BF16])
def test_mqa_logits(device: torch.device, is_fp4: bool, logits_dtype: torch.dtype) -> None:
    case = Ragged(device, 21, 300, is_fp4)
    run = deep_gemm.fp8_fp4_mqa_logits
    limit = LIMIT if logits_dtype == FP32 else 1e-4
    logits = run(*case.args, logits_dtype=logits_dtype)
    assert logits.shape == (21, 300)
    assert logits.dtype == logits_dtype
    case.check(logits, limit)
    assert (logits[~case.window] == -torch.inf).all()
    case.check(run(*case.args, False, logits_dtype=logits_dtype), limit)


@pytest.mark.parametrize("is_fp4", [False, True])
def test_mqa_logits_compressed(device: torch.device, is_fp4: bool) -> None:
    """As SGLang (2.5) and as vLLM (2.8) call it."""
    case = Ragged(device, 21, 300, is_fp4)
    run = deep_gemm.fp8_fp4_mqa_logits
    for logits in (
        run(*case.args, False, 160, logits_dtype=FP32),
        run(*case.args, clean_logits=False, max_seqlen_k=160),
        run(*case.args, 160),
        run(*case.args, 160, None),
        run(*case.args, max_seqlen_k=160, schedule_meta=None),
    ):
        assert logits.shape == (21, 160)
        case.check_compressed(logits)


def test_mqa_logits_legacy(device: torch.device) -> None:
    case = Ragged(device, 9, 200, False)
    (q, _), (k, k_scale) = case.q, case.kv
    rest = (case.weights, case.starts, case.ends)
    logits = deep_gemm.fp8_mqa_logits(q, (k, k_scale[:, None]), *rest)
    case.check(logits)
    assert (logits[~case.window] == -torch.inf).all()
    case.check(deep_gemm.fp8_mqa_logits(q, (k, k_scale), *rest, clean_logits=False))
    logits = deep_gemm.fp8_mqa_logits(q, (k, k_scale), *rest, clean_logits=False, max_seqlen_k=100)
    assert logits.shape == (9, 100)
    case.check_compressed(logits)


class Paged:
    def __init__(
        self,
        device: torch.device,
        lens: list[int],
        next_n: int,
        is_fp4: bool,
        heads: int = HEADS,
        dim: int = DIM,
        block: int = BLOCK,
    ) -> None:
        torch.manual_seed(next_n)
        batch, blocks = len(lens), sum(-(-n // block) for n in lens) + 3
        keys = torch.randn(blocks, block, dim, device=device, dtype=BF16)
        q = torch.randn(batch, next_n, heads, dim, device=device, dtype=BF16)
        if is_fp4:
            data, scale, values = fp4(keys)
            q_data, q_scale, q_values = fp4(q)
            self.q: Any = (q_data, q_scale)
        else:
            amax = keys.float().abs().amax(2).clamp(min=1e-4)
            scale = amax / 448
            data = (keys.float() / scale[..., None]).to(torch.float8_e4m3fn)
            values = data.float() * scale[..., None]
            self.q = (q.to(torch.float8_e4m3fn), None)
            q_values = self.q[0].float()
        width = data.shape[-1]
        pages = torch.empty(blocks, block * (width + 4) + 64, dtype=torch.uint8, device=device)
        pages = pages[:, :-64]  # pages may be further apart than they are long
        pages[:, : block * width] = data.view(torch.uint8).flatten(1)
        pages[:, block * width :] = scale.contiguous().view(torch.uint8).flatten(1)
        self.cache = pages.unflatten(1, (block, 1, width + 4))
        self.weights = torch.randn(batch * next_n, heads, device=device)
        self.columns = max(lens) + 10
        per_row = -(-self.columns // block)
        order = torch.randperm(blocks).tolist()
        table = torch.zeros(batch, per_row, dtype=torch.int32)
        for b, n in enumerate(lens):
            for i in range(-(-n // block)):
                table[b, i] = order.pop()
        self.table = table.to(device)
        self.lens = torch.tensor(
            [[max(n - next_n + 1 + i, 0) for i in range(next_n)] for n in lens],
            dtype=torch.int32, device=device,
        )  # fmt: skip
        flat_k = values[self.table.long()].flatten(1, 2)[:, : self.columns]
        scores = torch.einsum("bnhd,bkd->bnhk", q_values.double(), flat_k.double()).relu()
        weights = self.weights.view(batch, next_n, heads, 1).double()
        self.wanted = (scores * weights).sum(2).flatten(0, 1)
        positions = torch.arange(self.wanted.shape[1], device=device)
        self.inside = positions < self.lens.flatten()[:, None]

    def check(self, logits: torch.Tensor, limit: float = LIMIT) -> None:
        got = logits[:, : self.wanted.shape[1]]
        assert calc_diff(got[self.inside], self.wanted[self.inside]) < limit


@pytest.mark.parametrize("is_fp4", [False, True])
@pytest.mark.parametrize("next_n", [1, 2, 3, 5, 8, 9, 13])
def test_paged_mqa_logits(device: torch.device, is_fp4: bool, next_n: int) -> None:
    case = Paged(device, [1, 70, 200, 64], next_n, is_fp4)
    meta = deep_gemm.get_paged_mqa_logits_metadata(case.lens, BLOCK, 6)
    assert meta.shape == (7, 2)
    assert meta.dtype == torch.int32
    args = (case.q, case.cache, case.weights, case.lens, case.table, meta, case.columns)
    run = deep_gemm.fp8_fp4_paged_mqa_logits
    for logits in (
        run(*args),
        run(*args, False, logits_dtype=FP32),
        run(*args, clean_logits=True),
        run(*args, None),  # 2.8: indices
    ):
        assert logits.shape == (4 * next_n, case.columns)
        case.check(logits)
    clean = run(*args, clean_logits=True)
    assert (clean[:, : case.inside.shape[1]][~case.inside] == -torch.inf).all()
    if not is_fp4:
        legacy = deep_gemm.fp8_paged_mqa_logits
        case.check(legacy(case.q[0], *args[1:]))
        case.check(legacy(case.q[0], *args[1:], clean_logits=False))


@pytest.mark.parametrize("is_fp4", [False, True])
def test_paged_mqa_logits_varlen(device: torch.device, is_fp4: bool) -> None:
    """Then with two neighbouring tokens of one sequence, whose block table is the same."""
    case = Paged(device, [100, 101, 60], 1, is_fp4)
    indices = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    meta = deep_gemm.get_paged_mqa_logits_metadata(case.lens, BLOCK, 4, indices=indices)
    args = (case.q, case.cache, case.weights, case.lens, case.table, meta, case.columns)
    case.check(deep_gemm.fp8_fp4_paged_mqa_logits(*args, indices=indices))
    case.check(deep_gemm.fp8_fp4_paged_mqa_logits(*args, indices))
    pair = Paged(device, [64, 65], 1, is_fp4)
    apart = deep_gemm.fp8_fp4_paged_mqa_logits(
        pair.q, pair.cache, pair.weights, pair.lens, pair.table[[1, 1]], None, 65
    )
    indices = torch.tensor([4, 4], dtype=torch.int32, device=device)
    meta = deep_gemm.get_paged_mqa_logits_metadata(pair.lens, BLOCK, 4, indices=indices)
    joint = deep_gemm.fp8_fp4_paged_mqa_logits(
        pair.q, pair.cache, pair.weights, pair.lens, pair.table[[1, 1]], meta, 65, indices=indices
    )
    assert torch.equal(joint[0, :64], apart[0, :64])
    assert torch.equal(joint[1], apart[1])


HEAD_COUNTS, DIMS, BLOCKS = (8, 16, 32, 64, 128), (32, 64, 128), (16, 32, 64, 128)


@pytest.mark.parametrize("is_fp4", [False, True])
@pytest.mark.parametrize("heads", HEAD_COUNTS)
@pytest.mark.parametrize("dim", DIMS)
def test_heads_and_dimensions(device: torch.device, is_fp4: bool, heads: int, dim: int) -> None:
    """Every page size with each; DeepGEMM has heads 16 .. 64, dimension 128, pages of 32 and 64."""
    ragged = Ragged(device, 13, 150, is_fp4, heads, dim)
    ragged.check(deep_gemm.fp8_fp4_mqa_logits(*ragged.args))
    for block in BLOCKS:
        paged = Paged(device, [1, 70, 130], 3, is_fp4, heads, dim, block)
        meta = deep_gemm.get_paged_mqa_logits_metadata(paged.lens, block, 5)
        args = (paged.q, paged.cache, paged.weights, paged.lens, paged.table, meta, paged.columns)
        paged.check(deep_gemm.fp8_fp4_paged_mqa_logits(*args))
        half = deep_gemm.fp8_fp4_paged_mqa_logits(*args, logits_dtype=BF16)
        assert half.dtype == BF16
        paged.check(half, 1e-4)


@pytest.mark.parametrize("next_n", [4, 11])
def test_one_length_for_all_rows_of_a_sequence(device: torch.device, next_n: int) -> None:
    """context_lens [B], that of the last row; each row before it sees a key less."""
    case = Paged(device, [100, 30], next_n, False)
    meta = deep_gemm.get_paged_mqa_logits_metadata(case.lens, BLOCK, 5)
    last = case.lens[:, -1].contiguous()
    args = (case.q, case.cache, case.weights, last, case.table, meta, case.columns)
    case.check(deep_gemm.fp8_fp4_paged_mqa_logits(*args))


@pytest.mark.parametrize("n", [8, 24, 128])
def test_hc_prenorm_widths(device: torch.device, n: int) -> None:
    x = torch.randn(70, 512, device=device, dtype=BF16)
    fn = torch.randn(n, 512, device=device)
    d, sums = torch.empty(3, 70, n, device=device), torch.empty(3, 70, device=device)
    deep_gemm.tf32_hc_prenorm_gemm(x, fn, d, sums, 3)
    assert calc_diff(d.sum(0), x.double() @ fn.double().t()) < 1e-6
    assert calc_diff(sums.sum(0), x.double().square().sum(1)) < 1e-8


@pytest.mark.parametrize("splits", [None, 1, 5, 16])
@pytest.mark.parametrize("rows", [0, 1, 13, 130])
def test_hc_prenorm(device: torch.device, splits: int | None, rows: int) -> None:
    k = 1024
    x = torch.randn(rows, k, device=device, dtype=BF16)
    fn = torch.randn(24, k, device=device)
    lead = () if splits is None else (splits,)
    d = torch.empty(*lead, rows, 24, device=device)
    sums = torch.empty(*lead, rows, device=device)
    deep_gemm.tf32_hc_prenorm_gemm(x, fn, d, sums, num_splits=splits)
    total, squares = (d, sums) if splits is None else (d.sum(0), sums.sum(0))
    assert calc_diff(total, x.double() @ fn.double().t()) < 1e-6
    assert calc_diff(squares, x.double().square().sum(1)) < 1e-8
    if splits is not None:  # vLLM passes it by position
        deep_gemm.tf32_hc_prenorm_gemm(x, fn, d, sums, splits)
