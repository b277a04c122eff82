"""The calls that vLLM 0.33.0 and SGLang 0.5.23 make of deep_gemm, with the argument forms and the
layouts they make them with: vllm/utils/deep_gemm.py and its callers, and
sglang/srt/layers/deep_gemm_wrapper/ and its callers. Shapes are DeepSeek-V4-Flash in small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compat_cases import BF16, FP32
from test_compat_attention import Paged, Ragged

from sm120_ops import compat
from sm120_ops.compat.deep_gemm import runtime
from sm120_ops.compat.deep_gemm.testing import calc_diff

HIDDEN, OUT, EXPERTS = 512, 384, 4


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As an engine gets it, with settings of its own."""
    monkeypatch.setattr(runtime, "_settings", runtime._Settings())
    yield compat.install()
    compat.uninstall()


def column_major_packed(rows: int, groups: int, exponents: torch.Tensor) -> torch.Tensor:
    """vLLM's activation scales: int32 [rows, words], strides (1, rows rounded up to 4)."""
    words, padded = -(-groups // 4), -(-rows // 4) * 4
    out = torch.zeros(words, padded, 4, dtype=torch.uint8, device=exponents.device)
    for group in range(groups):
        out[group // 4, :rows, group % 4] = exponents[:, group]
    return out.view(torch.int32).squeeze(2).t()[:rows]


def activations(
    deep_gemm: Any, x: torch.Tensor, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised by token, scales packed by the engine itself."""
    data, sf = deep_gemm.per_token_cast_to_fp8(x, True, gran_k)
    exponents = (sf.view(torch.int32) >> 23).to(torch.uint8)
    return data, column_major_packed(x.shape[0], sf.shape[1], exponents)


def block_weights(deep_gemm: Any, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, N, K] loaded with 128 x 128 blocks, scales packed once by the engine."""
    casts = [deep_gemm.per_block_cast_to_fp8(part, True) for part in w]
    data = torch.stack([cast[0] for cast in casts])
    scales = torch.stack([cast[1] for cast in casts])
    packed = deep_gemm.transform_sf_into_required_layout(
        sf=scales, mn=w.shape[1], k=w.shape[2], recipe=(1, 128, 128), num_groups=len(w),
        is_sfa=False, disable_ue8m0_cast=False,
    )  # fmt: skip
    return data, packed


def mxfp4_weights(deep_gemm: Any, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, N, K / 2] uint8 with UE8M0 bytes of 32 values, as in the checkpoint, then packed."""
    casts = [deep_gemm.per_token_cast_to_fp4(part, True, 32) for part in w]
    data = torch.stack([cast[0].view(torch.uint8) for cast in casts])
    scales = torch.stack([cast[1] for cast in casts])
    packed = deep_gemm.transform_sf_into_required_layout(
        scales, mn=w.shape[1], k=w.shape[2], recipe=(1, 32), num_groups=len(w),
        disable_ue8m0_cast=False,
    )  # fmt: skip
    return data, packed


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(37, HIDDEN, device=device, dtype=BF16)


@pytest.fixture
def w(device: torch.device) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(EXPERTS, OUT, HIDDEN, device=device, dtype=BF16)


# ---- vLLM ----------------------------------------------------------------------------------------


def test_vllm_linear(deep_gemm: Any, x: torch.Tensor, w: torch.Tensor) -> None:
    """fp8_gemm_nt_op: output preallocated, disable_ue8m0_cast by keyword; scales squeezed."""
    data, packed = block_weights(deep_gemm, w[:1])
    out = torch.empty(len(x), OUT, dtype=BF16, device=x.device)
    weight = (data.squeeze(0), packed.squeeze(0))
    assert deep_gemm.fp8_gemm_nt(
        activations(deep_gemm, x), weight, out, disable_ue8m0_cast=False
    ) is None  # fmt: skip
    assert calc_diff(out, x.float() @ w[0].float().t()) < 1e-3


@contextlib.contextmanager
def alignment_scope(deep_gemm: Any, value: int) -> Iterator[None]:
    """vLLM's mk_alignment_scope()."""
    before = deep_gemm.get_mk_alignment_for_contiguous_layout()
    deep_gemm.set_mk_alignment_for_contiguous_layout(value)
    try:
        yield
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(before)


def routed(
    x: torch.Tensor, w: torch.Tensor, alignment: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens sorted by expert and padded with zeros; the expert of each row; the product."""
    sizes = [5, 0, alignment, 17]
    indices = [
        e for g, n in enumerate(sizes) for e in [g] * n + [-1] * (-n % alignment)
    ]  # fmt: skip
    layout = torch.tensor(indices, dtype=torch.int32, device=x.device)
    rows = x[torch.arange(len(indices), device=x.device) % len(x)].clone()
    rows[layout < 0] = 0
    wanted = torch.einsum("mk,mnk->mn", rows.float(), w[layout.clamp(min=0).long()].float())
    return rows, layout, wanted


@pytest.mark.parametrize("fp4", [False, True])
def test_vllm_contiguous_experts(
    deep_gemm: Any, x: torch.Tensor, w: torch.Tensor, fp4: bool
) -> None:
    alignment = deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(40, EXPERTS)
    rows, layout, wanted = routed(x, w, alignment)
    out = torch.empty(len(rows), OUT, dtype=BF16, device=x.device)
    a = activations(deep_gemm, rows)
    with alignment_scope(deep_gemm, alignment):
        if fp4:
            data, packed = mxfp4_weights(deep_gemm, w)
            deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(
                a, (data.view(torch.int8), packed), out, layout, use_psum_layout=False,
                recipe_a=(1, 128), recipe_b=(1, 32), disable_ue8m0_cast=False,
            )  # fmt: skip
        else:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                a, block_weights(deep_gemm, w), out, layout, disable_ue8m0_cast=False
            )
    live = layout >= 0
    assert calc_diff(out[live], wanted[live]) < (0.01 if fp4 else 1e-3)


def test_vllm_batched_experts(deep_gemm: Any, x: torch.Tensor, w: torch.Tensor) -> None:
    """Scales int32 [E, T, words] with strides (words * T', 1, T'), T' = T rounded up to 4."""
    tokens = 10
    batch = torch.stack([x[i : i + tokens] for i in range(EXPERTS)])
    casts = [activations(deep_gemm, part) for part in batch]
    words, padded = HIDDEN // 512, 12
    scale = torch.zeros(EXPERTS, words, padded, dtype=torch.int32, device=x.device)
    for expert, cast in enumerate(casts):
        scale[expert, :, :tokens] = cast[1].t()
    a = (torch.stack([cast[0] for cast in casts]), scale.transpose(1, 2)[:, :tokens])
    counts = torch.tensor([3, 0, tokens, 1], dtype=torch.int32, device=x.device)
    out = torch.empty(EXPERTS, tokens, OUT, dtype=BF16, device=x.device)
    masked = getattr(deep_gemm, "m_grouped_fp8_gemm_nt_masked", None)
    assert masked is not None
    masked(a, block_weights(deep_gemm, w), out, counts, 8, disable_ue8m0_cast=False)
    wanted = torch.einsum("gmk,gnk->gmn", batch.float(), w.float())
    for expert, count in enumerate(counts.tolist()):
        if count > 0:
            assert calc_diff(out[expert, :count], wanted[expert, :count]) < 1e-3


@pytest.mark.parametrize("is_fp4", [False, True])
def test_vllm_indexer(deep_gemm: Any, device: torch.device, is_fp4: bool) -> None:
    """Prefill with the sixth positional argument max_seqlen_k; decode with `indices`."""
    ragged = Ragged(device, 17, 200, is_fp4)
    ragged.check_compressed(deep_gemm.fp8_fp4_mqa_logits(*ragged.args, 100))
    paged = Paged(device, [130, 40, 65], 2, is_fp4)
    meta = deep_gemm.get_paged_mqa_logits_metadata(paged.lens, 64, deep_gemm.get_num_sms())
    assert meta.shape == (deep_gemm.get_num_sms() + 1, 2)
    args = (paged.q, paged.cache, paged.weights, paged.lens, paged.table)
    paged.check(deep_gemm.fp8_fp4_paged_mqa_logits(*args, meta, paged.columns))
    varlen = Paged(device, [130, 40, 65], 1, is_fp4)
    indices = torch.arange(3, dtype=torch.int32, device=device)
    meta = deep_gemm.get_paged_mqa_logits_metadata(varlen.lens, 64, 6, indices=indices)
    args = (varlen.q, varlen.cache, varlen.weights, varlen.lens, varlen.table)
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(*args, meta, varlen.columns, indices=indices)
    varlen.check(logits)


def test_vllm_prenorm(deep_gemm: Any, device: torch.device) -> None:
    """Split count as vLLM chooses it; the output has the dimension of splits always."""
    tokens, k = 70, 1024
    x = torch.randn(tokens, k, device=device, dtype=BF16)
    fn = torch.randn(24, k, device=device)
    for sms in (1, 170):
        splits = max(min(sms // -(-tokens // 64), k // 64 // 4), 1)
        out = torch.empty(splits, tokens, 24, device=device)
        squares = torch.empty(splits, tokens, device=device)
        deep_gemm.tf32_hc_prenorm_gemm(x, fn, out, squares, splits)
        assert calc_diff(out.sum(0), x.double() @ fn.double().t()) < 1e-6
        assert calc_diff(squares.sum(0), x.double().square().sum(1)) < 1e-8


def output_projection(
    deep_gemm: Any, device: torch.device, gran_k: int, recipe: tuple[int, int, int]
) -> None:
    """wo_a of DeepSeek-V4: activations with scales packed by head, weights packed when loaded."""
    tokens, groups, rank, k = 9, 2, 256, 512
    o = torch.randn(tokens, groups, k, device=device, dtype=BF16)
    w = torch.randn(groups, rank, k, device=device, dtype=BF16)
    casts = [activations(deep_gemm, o[:, g].contiguous(), gran_k) for g in range(groups)]
    words = casts[0][1].shape[1]
    scale = torch.zeros(groups, words, 12, dtype=torch.int32, device=device)
    for g, cast in enumerate(casts):
        scale[g, :, :tokens] = cast[1].t()
    data = torch.stack([cast[0] for cast in casts], 1)
    a = (data, scale.permute(2, 0, 1)[:tokens])
    if gran_k == 128:
        b = block_weights(deep_gemm, w)
    else:
        parts = [deep_gemm.per_token_cast_to_fp8(part, True, gran_k) for part in w]
        sf = torch.stack([part[1] for part in parts])
        packed = deep_gemm.transform_sf_into_required_layout(
            sf=sf, mn=rank, k=k, recipe=(1, 1, gran_k), num_groups=groups, is_sfa=False
        )
        b = (torch.stack([part[0] for part in parts]), packed)
    z = torch.empty(tokens, groups, rank, dtype=BF16, device=device)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", a, b, z, recipe=recipe)
    assert calc_diff(z, torch.einsum("bhr,hdr->bhd", o.float(), w.float())) < 1e-3


@pytest.mark.parametrize("gran_k", [32, 128])
def test_vllm_output_projection(deep_gemm: Any, device: torch.device, gran_k: int) -> None:
    output_projection(deep_gemm, device, gran_k, (1, 1, gran_k))


# ---- SGLang --------------------------------------------------------------------------------------


def test_sglang_probe(deep_gemm: Any) -> None:
    """What configurer.py asks for before it lets the wrapper on for SM120."""
    for name in (
        "fp8_einsum",
        "m_grouped_fp8_fp4_gemm_nt_contiguous",
        "transform_sf_into_required_layout",
    ):
        assert callable(getattr(deep_gemm, name, None))
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor  # noqa: F401


def test_sglang_linear(deep_gemm: Any, x: torch.Tensor, w: torch.Tensor) -> None:
    """fp8_gemm_nt with float32 scales, with recipe (1, 32, 32), and MXFP8 with packed scales."""
    out = torch.empty(len(x), OUT, dtype=BF16, device=x.device)
    wanted = x.float() @ w[0].float().t()
    for block, options in ((128, {}), (32, {"recipe": (1, 32, 32)})):
        a = deep_gemm.per_token_cast_to_fp8(x, True, block)
        scale = deep_gemm.transform_sf_into_required_layout(
            a[1], num_groups=None, mn=len(x), k=HIDDEN, recipe=(1, block, block), is_sfa=True
        )
        data, sf = deep_gemm.per_block_cast_to_fp8(w[0], True, block)
        spread = sf.index_select(-2, torch.arange(OUT, device=x.device) // block)
        packed = deep_gemm.utils.layout.get_mn_major_tma_aligned_packed_ue8m0_tensor(spread)
        for sfa, sfb in ((a[1], sf), (scale, packed)):
            deep_gemm.fp8_gemm_nt((a[0], sfa), (data, sfb), out, **options)
            assert calc_diff(out, wanted) < 1e-3
    a = activations(deep_gemm, x, 32)
    b = activations(deep_gemm, w[0], 32)
    deep_gemm.fp8_fp4_gemm_nt(
        a, b, out, recipe_a=(1, 32), recipe_b=(1, 32), disable_ue8m0_cast=True
    )
    assert calc_diff(out, wanted) < 1e-3


def test_sglang_output_projection(deep_gemm: Any, device: torch.device) -> None:
    """The recipe of the blocks with scales that are packed by row."""
    output_projection(deep_gemm, device, 128, (1, 128, 128))


def test_sglang_bf16(deep_gemm: Any, x: torch.Tensor, w: torch.Tensor) -> None:
    out = torch.empty(len(x), OUT, dtype=FP32, device=x.device)
    deep_gemm.bf16_gemm_nt(x, w[0], out)
    assert calc_diff(out, x.double() @ w[0].double().t()) < 1e-5


def test_sglang_experts(deep_gemm: Any, x: torch.Tensor, w: torch.Tensor) -> None:
    """Contiguous by the wrapper's alignment; masked by its old name, with FP4 weights."""
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    rows, layout, wanted = routed(x, w, alignment)
    out = torch.empty(len(rows), OUT, dtype=BF16, device=x.device)
    data, packed = mxfp4_weights(deep_gemm, w)
    b = (data.view(torch.int8), packed)
    recipes = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        activations(deep_gemm, rows), b, out, layout, **recipes
    )
    live = layout >= 0
    assert calc_diff(out[live], wanted[live]) < 0.01
    batch = torch.stack([x[:12]] * EXPERTS)
    casts = [deep_gemm.per_token_cast_to_fp8(part, True) for part in batch]
    scale = torch.stack([cast[1] for cast in casts])
    a = (torch.stack([cast[0] for cast in casts]), scale)
    counts = torch.tensor([12, 0, 5, 1], dtype=torch.int32, device=x.device)
    d = torch.empty(EXPERTS, 12, OUT, dtype=BF16, device=x.device)
    deep_gemm.fp8_m_grouped_gemm_nt_masked(a, b, d, counts, 6, **recipes)
    products = torch.einsum("gmk,gnk->gmn", batch.float(), w.float())
    for expert, count in enumerate(counts.tolist()):
        if count > 0:
            assert calc_diff(d[expert, :count], products[expert, :count]) < 0.01


def test_sglang_warm_up_launches_nothing(deep_gemm: Any, x: torch.Tensor) -> None:
    """compile_utils.py: thousands of calls to have kernels compiled, on uninitialised data."""
    before = deep_gemm.get_compile_mode()
    deep_gemm.set_compile_mode(1)
    lhs = torch.empty(64, HIDDEN, device=x.device, dtype=torch.float8_e4m3fn)
    rhs = torch.empty(OUT, HIDDEN, device=x.device, dtype=torch.float8_e4m3fn)
    lhs_s = torch.ones(64, HIDDEN // 128, device=x.device)
    rhs_s = torch.ones(OUT // 128, HIDDEN // 128, device=x.device)
    out = torch.full((64, OUT), 7.0, device=x.device, dtype=BF16)
    for m in range(1, 65):
        deep_gemm.fp8_gemm_nt((lhs[:m], lhs_s[:m]), (rhs, rhs_s), out[:m], recipe=(1, 128, 128))
    deep_gemm.set_compile_mode(before)
    assert (out == 7).all()


@pytest.mark.parametrize("is_fp4", [False, True])
def test_sglang_indexer(deep_gemm: Any, device: torch.device, is_fp4: bool) -> None:
    ragged = Ragged(device, 17, 200, is_fp4)
    q, kv, *rest = ragged.args
    if not is_fp4:
        logits = deep_gemm.fp8_mqa_logits(q[0], kv, *rest, clean_logits=False, max_seqlen_k=100)
        ragged.check_compressed(logits)
    logits = deep_gemm.fp8_fp4_mqa_logits(q, kv, *rest, False, 100, logits_dtype=FP32)
    ragged.check_compressed(logits)
    paged = Paged(device, [130, 40, 65], 1, is_fp4)
    meta = deep_gemm.get_paged_mqa_logits_metadata(
        paged.lens.view(-1, 1), 64, deep_gemm.get_num_sms()
    )
    args = (paged.cache, paged.weights, paged.lens, paged.table, meta, paged.columns)
    if not is_fp4:
        paged.check(deep_gemm.fp8_paged_mqa_logits(paged.q[0], *args, clean_logits=False))
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(paged.q, *args, False, logits_dtype=FP32)
    paged.check(logits)


def test_sglang_prenorm_and_settings(deep_gemm: Any, device: torch.device) -> None:
    x = torch.randn(5, 512, device=device, dtype=BF16)
    fn = torch.randn(24, 512, device=device)
    out, squares = torch.empty(5, 24, device=device), torch.empty(5, device=device)
    deep_gemm.tf32_hc_prenorm_gemm(x, fn, out, squares, num_splits=None)
    assert calc_diff(out, x.double() @ fn.double().t()) < 1e-6
    original = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(original)
    deep_gemm.set_pdl(True)
