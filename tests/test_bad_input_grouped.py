"""Refusals of the m-grouped GEMM: op, argument, requirement and what it got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bad_input import nothing_left_behind, refused  # noqa: F401  a fixture

import sm120_ops
from sm120_ops import grouped_gemm, grouped_gemm_masked, grouped_gemm_psum, quantize

G, M, N, K = 3, 64, 12, 128
GRANS: dict[str, Any] = {"gran_k_a": 32, "gran_k_b": 32}


class Inputs:
    def __init__(self, device: torch.device):
        self.a = quantize(torch.randn(M, K, device=device))
        data, scale = quantize(torch.randn(G * N, K, device=device))
        words = scale.t().unflatten(1, (G, N))
        self.b = (data.view(G, N, K), words.permute(1, 2, 0))
        masked, masked_scale = quantize(torch.randn(G * 8, K, device=device))
        words = masked_scale.t().unflatten(1, (G, 8))
        self.tokens = (masked.view(G, 8, K), words.permute(1, 2, 0))
        self.indices = torch.zeros(M, dtype=torch.int32, device=device)
        self.counts = torch.zeros(G, dtype=torch.int32, device=device)


@pytest.fixture
def x(device: torch.device) -> Inputs:
    return Inputs(device)


def test_index_tensors(x: Inputs) -> None:
    int32 = "dtype torch.int32"
    with refused("grouped_gemm", "m_indices", int32, "torch.int64", TypeError):
        grouped_gemm(x.a, x.b, x.indices.long(), **GRANS)
    with refused("grouped_gemm", "m_indices", "shape [64]", "[63]"):
        grouped_gemm(x.a, x.b, x.indices[:-1], **GRANS)
    with refused("grouped_gemm", "m_indices", "1 dimensions", "[8, 8]"):
        grouped_gemm(x.a, x.b, x.indices.view(8, 8), **GRANS)
    strided = torch.zeros(2 * M, dtype=torch.int32, device=x.indices.device)[::2]
    with refused("grouped_gemm", "m_indices", "a contiguous tensor", "strides [2]"):
        grouped_gemm(x.a, x.b, strided, **GRANS)
    with refused("grouped_gemm_psum", "group_ends", "shape [3]", "[64]"):
        grouped_gemm_psum(x.a, x.b, x.indices, **GRANS)
    with refused("grouped_gemm_psum", "group_ends", int32, "torch.float32", TypeError):
        grouped_gemm_psum(x.a, x.b, x.counts.float(), **GRANS)
    with refused("grouped_gemm_masked", "masked_m", "shape [3]", "[2]"):
        grouped_gemm_masked(x.tokens, x.b, x.counts[:2], **GRANS)
    with refused("grouped_gemm_masked", "masked_m", "a torch.Tensor", "list", TypeError):
        grouped_gemm_masked(x.tokens, x.b, [0, 0, 0], **GRANS)  # type: ignore[arg-type]


def test_options(x: Inputs) -> None:
    with refused("grouped_gemm", "alignment", "16, 32, 64 or 128", "48"):
        grouped_gemm(x.a, x.b, x.indices, alignment=48, **GRANS)
    with refused("grouped_gemm_psum", "alignment", "16, 32, 64 or 128", "0"):
        grouped_gemm_psum(x.a, x.b, x.counts, alignment=0, **GRANS)
    with refused("grouped_gemm_masked", "expected_m", "a row count, or 0 for unknown", "-1"):
        grouped_gemm_masked(x.tokens, x.b, x.counts, expected_m=-1, **GRANS)
    with refused("grouped_gemm", "gran_k_a", "32 or 128", "64"):
        grouped_gemm(x.a, x.b, x.indices, gran_k_a=64, gran_k_b=32)
    with refused("grouped_gemm", "out_dtype", "torch.bfloat16 or torch.float32", "torch.float16"):
        grouped_gemm(x.a, x.b, x.indices, out_dtype=torch.float16, **GRANS)


def test_operands(x: Inputs) -> None:
    (a, sfa), (b, sfb) = x.a, x.b
    with refused("grouped_gemm", "b", "3 dimensions", "[36, 128]"):
        grouped_gemm(x.a, (b.flatten(0, 1), sfb), x.indices, **GRANS)
    with refused("grouped_gemm", "a", "2 dimensions", "[3, 8, 128]"):
        grouped_gemm(x.tokens, x.b, x.indices, **GRANS)
    with refused("grouped_gemm_masked", "a", "3 dimensions", "[64, 128]"):
        grouped_gemm_masked(x.a, x.b, x.counts, **GRANS)
    with refused("grouped_gemm_masked", "a", "3 groups as in b", "shape [2, 8, 128]"):
        tokens = (x.tokens[0][:2], x.tokens[1][:2])
        grouped_gemm_masked(tokens, x.b, x.counts, **GRANS)
    with refused("grouped_gemm", "b", "K=128 as in a", "K=64"):
        grouped_gemm(x.a, (b[..., :64], sfb), x.indices, **GRANS)
    with refused("grouped_gemm", "b", "dtype torch.float8_e4m3fn, ...", "torch.float32", TypeError):
        grouped_gemm(x.a, (b.float(), sfb), x.indices, **GRANS)
    with refused("grouped_gemm", "b", "stride(2) == 1 (K-major)", "strides [1536, 1, 12]"):
        turned = b.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
        grouped_gemm(x.a, (turned.view(b.dtype), sfb), x.indices, **GRANS)
    with refused(
        "grouped_gemm", "b", "a group stride that is a multiple of 16 bytes, not 0", "..."
    ):
        grouped_gemm(x.a, (b[:1].expand(G, N, K), sfb), x.indices, **GRANS)
    with refused("grouped_gemm", "sfb", "3 dimensions", "[12, 1]"):
        grouped_gemm(x.a, (b, sfb[0]), x.indices, **GRANS)
    with refused("grouped_gemm", "sfb", "packed scales of shape [3, 12, 1]", "[3, 12, 4]"):
        four = torch.zeros(3, 12, 4, dtype=torch.int32, device=b.device)
        grouped_gemm(x.a, (b, four), x.indices, **GRANS)
    with refused("grouped_gemm", "sfb", "...rows (gran_k 32)", "[3, 11, 4]"):
        scales = torch.zeros(3, 11, 4, dtype=torch.uint8, device=b.device)
        grouped_gemm(x.a, (b, scales), x.indices, **GRANS)
    wide = quantize(torch.randn(G * N, 2 * K, device=b.device))
    with refused(
        "grouped_gemm", "sfb", "strides [a multiple of 4, 1, a multiple of 4], none 0", "..."
    ):
        rows_last = wide[1].contiguous().view(G, N, 2)
        tokens = quantize(torch.randn(M, 2 * K, device=b.device))
        grouped_gemm(tokens, (wide[0].view(G, N, 2 * K), rows_last), x.indices, **GRANS)
    with refused("grouped_gemm", "b", "a pair (data, scale)", "Tensor", TypeError):
        grouped_gemm(x.a, b, x.indices, **GRANS)  # type: ignore[arg-type]
    assert a.shape[0] == sfa.shape[0]


def test_out(x: Inputs) -> None:
    device = x.indices.device
    with refused("grouped_gemm", "out", "shape [64, 12]", "[64, 13]"):
        grouped_gemm(x.a, x.b, x.indices, out=torch.zeros(M, 13, device=device), **GRANS)
    with refused("grouped_gemm", "out", "contiguous rows (last stride 1)", "strides [1, 64]"):
        grouped_gemm(x.a, x.b, x.indices, out=torch.zeros(N, M, device=device).t(), **GRANS)
    with refused("grouped_gemm", "out", "a row stride >= 12", "strides [0, 1]"):
        out = torch.zeros(1, N, device=device).expand(M, N)
        grouped_gemm(x.a, x.b, x.indices, out=out, **GRANS)
    with refused("grouped_gemm_masked", "out", "a group stride >= 96", "strides [0, 12, 1]"):
        out = torch.zeros(1, 8, N, device=device).expand(G, 8, N)
        grouped_gemm_masked(x.tokens, x.b, x.counts, out=out, **GRANS)
    dtypes = "dtype torch.bfloat16 or torch.float32"
    with refused("grouped_gemm", "out", dtypes, "torch.float16", TypeError):
        out = torch.zeros(M, N, dtype=torch.float16, device=device)
        grouped_gemm(x.a, x.b, x.indices, out=out, **GRANS)
    with refused("grouped_gemm", "out", "memory apart from m_indices", "overlapping memory"):
        big = torch.zeros(M, N, device=device)
        grouped_gemm(x.a, x.b, big.view(torch.int32).flatten()[:M], out=big, **GRANS)


def test_gradients_and_devices(x: Inputs, device: torch.device) -> None:
    scales = torch.ones(G, N, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="grouped_gemm: sfb: expected a tensor that needs no"):
        grouped_gemm(x.a, (x.b[0], scales), x.indices, gran_k_a=32)
    if device.type == "cuda":
        with refused("grouped_gemm", "m_indices", "a tensor on cuda:0, as a", "one on cpu"):
            grouped_gemm(x.a, x.b, x.indices.cpu(), **GRANS)


def test_float_scales_must_be_powers_of_two(x: Inputs, device: torch.device) -> None:
    scales = torch.ones(G, N, 4, device=device)
    scales[2, 3, 1] = 0.75
    got = "0.75 at row 27, group 1"
    with refused("grouped_gemm", "sfb", "float32 scales that are powers of two ...", got):
        grouped_gemm(x.a, (x.b[0], scales), x.indices, gran_k_a=32)
    d = grouped_gemm(x.a, (x.b[0], scales), x.indices + 2, gran_k_a=32, validate_scales=False)
    assert d[:, 3].isnan().all()
    assert not d[:, :3].isnan().any()


def test_raw_ops_check_as_well(x: Inputs) -> None:
    ops = torch.ops.sm120
    kinds = (ValueError, TypeError, RuntimeError)
    inputs = (*x.a, *x.b, x.indices)
    bf16 = torch.bfloat16
    for match, call in [
        ("alignment: expected 16, 32", lambda: ops.grouped_gemm(*inputs, 32, 32, bf16, 17)),
        ("gran_k_a: expected 32 or", lambda: ops.grouped_gemm(*inputs, 33, 32, bf16)),
        ("m_indices: expected", lambda: ops.grouped_gemm(*x.a, *x.b, x.counts, 32, 32, bf16)),
        ("group_ends: expected", lambda: ops.grouped_gemm_psum(*inputs, 32, 32, bf16)),
        ("sfb: expected", lambda: ops.grouped_gemm(*x.a, x.b[0], x.a[1], x.indices, 32, 32, bf16)),
        ("b: expected", lambda: ops.grouped_gemm(*x.a, *x.a, x.indices, 32, 32, bf16)),
        ("a: expected", lambda: ops.grouped_gemm_masked(*inputs[:4], x.counts, 32, 32, bf16)),
        ("out_dtype: expected", lambda: ops.grouped_gemm(*inputs, 32, 32, torch.float16)),
        ("expected_m: expected", lambda: ops.grouped_gemm(*inputs, 32, 32, bf16, 64, -3)),
    ]:
        with pytest.raises(kinds, match=rf"sm120_ops.grouped_gemm\w*: {match}"):
            call()
    assert sm120_ops.grouped_gemm(x.a, x.b, x.indices, **GRANS).shape == (M, N)
