"""The steps of an MoE layer around its GEMMs, each by itself, in bytes a second.

Shapes of DeepSeek-V4-Flash. Only the rows that tokens take up are counted, not the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sm120_ops.bench.moe import V4_FLASH, captured
from sm120_ops.bench.record import Line, data_bytes
from sm120_ops.bench.routing import expert_ids
from sm120_ops.ops.moe_layer import choose_alignment

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

TOKENS = {
    "quick": (1, 32, 4096),
    "standard": (1, 8, 32, 256, 4096, 8192),
    "full": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
}
FORMATS = (("mxfp8", 32), ("mxfp8", 128), ("mxfp4", 32))


def run(context: Context) -> Iterator[Line]:
    ops, model, device = torch.ops.sm120, V4_FLASH, context.device
    hidden, intermediate, topk = model.hidden, model.intermediate, model.topk
    for tokens in TOKENS[context.mode]:
        generator = torch.Generator().manual_seed(tokens)
        ids = expert_ids("uniform", tokens, topk, model.experts, generator).to(device)
        x = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16)
        weights = torch.rand(tokens, topk, generator=generator).to(device)
        slots = tokens * topk
        alignment = choose_alignment(slots, model.experts)
        for fmt, gran_k in FORMATS:
            args = (x, ids, model.experts, fmt, gran_k, alignment)
            data, scale, ends, rows = ops.moe_route(*args)
            outputs = {"out": data, "out_scale": scale, "group_ends": ends, "rows": rows}
            gate_up = torch.randn(len(data), 2 * intermediate, device=device, dtype=torch.bfloat16)
            act_args = (gate_up, ends, fmt, gran_k, alignment)
            act, act_scale = ops.moe_activation(*act_args)
            down = torch.randn(len(data), hidden, device=device, dtype=torch.bfloat16)
            y = torch.empty_like(x)
            calls = {
                "route": (
                    functools.partial(ops.moe_route.out, *args, **outputs),
                    x.nbytes
                    + ids.nbytes
                    + rows.nbytes
                    + quantized_bytes(slots, hidden, fmt, gran_k),
                ),
                "activation": (
                    functools.partial(
                        ops.moe_activation.out, *act_args, out=act, out_scale=act_scale
                    ),
                    slots * 2 * intermediate * 2
                    + quantized_bytes(slots, intermediate, fmt, gran_k),
                ),
            }
            if (fmt, gran_k) == FORMATS[0]:
                combine = functools.partial(
                    ops.moe_combine.out, down, rows, weights, None, None, out=y
                )
                calls["combine"] = (combine, slots * hidden * 2 + y.nbytes + weights.nbytes)
            for name, (call, size) in calls.items():
                label = name if name == "combine" else f"{name} {fmt} gran {gran_k}"
                fields = {"family": "moe_steps", "name": label, "shape": f"T={tokens}"}
                yield context.time(call, provider="sm120_ops", bytes=size, **fields)
                if device.type == "cuda" and name == "route" and tokens <= 32:
                    line = context.time(captured(call), provider="sm120_ops", bytes=size, **fields)
                    line.note = "CUDA graph"
                    yield line


def quantized_bytes(rows: int, k: int, fmt: str, gran_k: int) -> int:
    return data_bytes(rows, k, fmt) + 4 * rows * -(-k // (4 * gran_k))
