"""Every argument of the public functions, replaced by things that it is not.

Each must be refused with the text of sm120_ops._check: op, argument, requirement, got. Flags take
anything, as in Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sm120_ops

GARBAGE = {
    "float": 1.5,
    "str": "x",
    "list": [1],
    "object": object(),
    "array": np.zeros(3),
    "tensor": torch.zeros(3, dtype=torch.int8),
    "None": None,
}
FLAGS = {"validate", "validate_scales", "relative", "clean"}
# Numbers that need not be whole; what BF16 operands have no use for.
TAKEN = {("hc_prenorm", "eps", "float")} | {
    ("einsum", arg, name) for arg in ("gran_k_a", "gran_k_b") for name in GARBAGE
}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls() -> dict[str, dict[str, Any]]:
    a, b = (sm120_ops.quantize(normal(rows, 64), "mxfp8", 32) for rows in (8, 16))
    gran: dict[str, Any] = {"gran_k_a": 32, "gran_k_b": 32}
    tokens = sm120_ops.quantize(normal(128, 128), "mxfp8", 32)
    experts = [sm120_ops.quantize(normal(64, 128), "mxfp8", 32) for _ in range(4)]
    scales = torch.stack([scale.t().contiguous() for _, scale in experts]).transpose(1, 2)
    weights = (torch.stack([data for data, _ in experts]), scales)
    rows, matrices = normal(128, 128), normal(4, 64, 128)
    index = torch.zeros(128, dtype=torch.int32)
    return {
        "quantize": {"x": normal(8, 64)},
        "dequantize": {"data": a[0], "scale": a[1]},
        "gemm": {"a": a, "b": b, **gran},
        "bf16_gemm": {"a": normal(8, 64), "b": normal(16, 64)},
        "einsum": {"equation": "bhr,hdr->bhd", "a": normal(3, 2, 64), "b": normal(2, 8, 64)},
        "grouped_gemm": {"a": tokens, "b": weights, "m_indices": index, **gran},
        "bf16_grouped_gemm": {"a": rows, "b": matrices, "m_indices": index},
        "bf16_grouped_gemm_psum": {"a": rows, "b": matrices, "group_ends": ints(9, 128, 128, 128)},
        "bf16_grouped_gemm_masked": {
            "a": normal(4, 8, 128),
            "b": matrices,
            "masked_m": ints(0, 1, 2, 8),
        },
        "bf16_k_grouped_gemm": {"a": normal(64, 8), "b": normal(64, 16), "ks": ints(32, 32)},
        "hc_prenorm": {"x": normal(4, 128), "fn": normal(24, 128, dtype=torch.float32)},
        "indexer_topk": {"logits": normal(2, 64, dtype=torch.float32), "ends": ints(64, 9), "k": 8},
        "k_grouped_gemm": {
            "a": (fp8(256, 16), torch.ones(2, 16)),
            "b": (fp8(256, 32), torch.ones(2, 32)),
            "ks": ints(128, 128),
        },
        "pack_scales": {"scale": torch.ones(8, 4)},
        "unpack_scales": {"scale": a[1], "groups": 2},
        "mqa_logits": {
            "q": fp8(4, 32, 128),
            "k": (fp8(16, 128), torch.ones(16)),
            "weights": torch.ones(4, 32),
            "starts": ints(0, 0, 0, 0),
            "ends": ints(4, 5, 6, 7),
        },
        "paged_mqa_logits": {
            "q": fp8(2, 1, 32, 128),
            "kv_cache": torch.zeros(4, 64, 1, 132, dtype=torch.uint8),
            "weights": torch.ones(2, 32),
            "context_lens": ints(5, 9),
            "block_table": ints(0, 1, 2, 3).view(2, 2),
            "max_context_len": 128,
        },
        "paged_mqa_metadata": {"context_lens": ints(5, 9), "num_ctas": 4},
        "moe_route": {
            "x": normal(4, 64),
            "topk_ids": ints(0, 1, 2, 3).view(4, 1),
            "num_experts": 4,
        },
    }


def test_numpy_numbers() -> None:
    logits, ends = normal(2, 64, dtype=torch.float32), ints(64, 9)
    topk = sm120_ops.indexer_topk(logits, ends, np.int64(8), block_kv=np.int32(64))  # type: ignore[arg-type]
    assert torch.equal(topk, sm120_ops.indexer_topk(logits, ends, 8))
    x, fn = normal(4, 128), normal(24, 128, dtype=torch.float32)
    d, _ = sm120_ops.hc_prenorm(x, fn, eps=np.float32(0.5))  # type: ignore[arg-type]
    assert torch.equal(d, sm120_ops.hc_prenorm(x, fn, eps=0.5)[0])
    data, scale = sm120_ops.quantize(x, "mxfp8", np.int64(32))  # type: ignore[arg-type]
    assert data.shape == x.shape
    assert scale.shape == (4, 1)


@pytest.mark.parametrize("name", list(calls()))
def test_garbage(name: str) -> None:
    function: Callable[..., object] = getattr(sm120_ops, name)
    good = calls()[name]
    function(**good)
    for arg, parameter in inspect.signature(function).parameters.items():
        if arg in FLAGS:
            continue
        for kind, value in GARBAGE.items():
            if (value is None and parameter.default is None) or (name, arg, kind) in TAKEN:
                continue
            with pytest.raises((TypeError, ValueError)) as error:
                function(**{**good, arg: value})
            assert f"sm120_ops.{name}: " in str(error.value), f"{arg}={kind}: {error.value}"
