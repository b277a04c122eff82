"""Sample inputs (op_samples.py) of the indexer and MoE families."""

from __future__ import annotations

from typing import Any

import torch
from op_samples import CASES, Case, Random, Tensors, both

import sm120_ops

K = 256
EXPERTS, TOPK = 4, 2


# ---- mqa -----------------------------------------------------------------------------------------

HEADS, DIM, KEYS, BLOCK = 16, 64, 96, 16


def ragged_inputs(r: Random, rows: int) -> Tensors:
    starts = r.ints(0, KEYS // 2, rows)
    return {
        "q": r.fp8(rows, HEADS, DIM),
        "k": r.fp8(KEYS, DIM),
        "k_scale": r.powers(KEYS),
        "weights": r.floats(rows, HEADS),
        "starts": starts,
        "ends": starts + r.ints(0, KEYS // 2, rows),
    }


def cache(r: Random, blocks: int) -> torch.Tensor:
    """Pages of FP8 data and float32 scales."""
    data = r.fp8(blocks, BLOCK * DIM).view(torch.uint8)
    scales = r.powers(blocks, BLOCK).view(torch.uint8)
    return torch.cat((data, scales), 1).view(blocks, BLOCK, 1, DIM + 4)


def paged_inputs(r: Random, rows: int) -> Tensors:
    tensors = {
        "q": r.fp8(rows, 1, HEADS, DIM),
        "kv_cache": cache(r, 40),
        "weights": r.floats(rows, HEADS),
        "context_lens": r.ints(0, 4 * BLOCK + 1, rows, 1),
        "block_table": r.ints(0, 40, rows, 4),
    }
    lens = tensors["context_lens"]
    return {**tensors, "metadata": torch.ops.sm120.paged_mqa_metadata.default(lens, 3)}


both(
    "mqa_logits",
    ragged_inputs,
    lambda t: (t["q"], None, t["k"], t["k_scale"], t["weights"], t["starts"], t["ends"]),
    outputs=lambda r, t: {"out": r.poison(t["q"].shape[0], KEYS, dtype=torch.float32)},
)
CASES["mqa_logits"].bind = lambda t: (
    (t["q"], None, t["k"], t["k_scale"], t["weights"], t["starts"], t["ends"], 0, True,
     torch.float32),
    {},
)  # fmt: skip
CASES["mqa_logits.out"].bind = lambda t: (
    (t["q"], None, t["k"], t["k_scale"], t["weights"], t["starts"], t["ends"], False, False),
    {"out": t["out"]},
)
both(
    "paged_mqa_logits",
    paged_inputs,
    lambda t: (t["q"], None, t["kv_cache"], t["weights"], t["context_lens"], t["block_table"]),
    outputs=lambda r, t: {"out": r.poison(t["q"].shape[0], 4 * BLOCK + 3, dtype=torch.float32)},
)
CASES["paged_mqa_logits"].bind = lambda t: (
    (t["q"], None, t["kv_cache"], t["weights"], t["context_lens"], t["block_table"],
     4 * BLOCK + 3, None, None, True, torch.float32),
    {},
)  # fmt: skip
CASES["paged_mqa_logits.out"].bind = lambda t: (
    (t["q"], None, t["kv_cache"], t["weights"], t["context_lens"], t["block_table"], t["metadata"],
     None, False),
    {"out": t["out"]},
)  # fmt: skip
both(
    "paged_mqa_metadata",
    lambda r, rows: {"context_lens": r.ints(0, 5000, rows, 2)},
    lambda t: (t["context_lens"],),
    lambda t: (5,),
    outputs=lambda r, t: {"out": r.poison(6, 2, dtype=torch.int32)},
)
both(
    "indexer_topk",
    lambda r, rows: {"logits": r.floats(rows, 100), "ends": r.ints(0, 101, rows)},
    lambda t: (t["logits"], None, t["ends"], 8),
    outputs=lambda r, t: {"out": r.poison(t["logits"].shape[0], 8, dtype=torch.int32)},
)
CASES["mqa_cache_write"] = Case(
    lambda r, rows: {
        "k": r.bf16(rows, DIM),
        "slots": r.permutation(40 * BLOCK, rows),
        "kv_cache": cache(r, 40),
    },
    lambda t: ((t["k"], t["slots"], t["kv_cache"], "mxfp8"), {}),
    ("kv_cache",),
)


# ---- moe -----------------------------------------------------------------------------------------

HIDDEN, INTERMEDIATE = 96, 32


def route_inputs(r: Random, rows: int) -> Tensors:
    return {"x": r.bf16(rows, HIDDEN), "topk_ids": r.ints(-1, EXPERTS, rows, TOPK)}


def capacity(tokens: Any) -> Any:
    return sm120_ops.moe_capacity(TOPK * tokens, EXPERTS, 16)


def routed(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Padding rows of the quantised tokens are undefined in a new tensor."""
    data, scale, ends, rows = results
    live = rows[rows >= 0].long()
    return [data.view(torch.uint8)[live], scale[live], ends, rows]


both(
    "moe_route",
    route_inputs,
    # FP4: opcheck compares padding rows too, and to it a NaN is never the same.
    lambda t: (t["x"], t["topk_ids"], EXPERTS, "mxfp4", 32, 16),
    outputs=lambda r, t: {
        "out": r.poison(capacity(t["x"].shape[0]), HIDDEN // 2, dtype=torch.uint8),
        "out_scale": torch.zeros(
            1, capacity(t["x"].shape[0]), dtype=torch.int32, device=r.device
        ).t(),
        "group_ends": r.poison(EXPERTS, dtype=torch.int32),
        "rows": r.poison(t["x"].shape[0], TOPK, dtype=torch.int32),
    },
    defined=routed,
)


def activation_inputs(r: Random, rows: int) -> Tensors:
    """All rows are in a group, so that all of the result is defined."""
    cut = int(r.ints(0, rows, 1)) // 16 * 16
    ends = torch.tensor([cut, rows], dtype=torch.int32, device=r.device)
    return {"gate_up": r.bf16(rows, 2 * K), "group_ends": ends}


both(
    "moe_activation",
    activation_inputs,
    lambda t: (t["gate_up"], t["group_ends"], "mxfp8", 32, 16),
    outputs=lambda r, t: {
        "out": r.poison(t["gate_up"].shape[0], K, dtype=torch.float8_e4m3fn),
        "out_scale": r.packed(t["gate_up"].shape[0], K // 128),
    },
)


def combine_inputs(r: Random, rows: int) -> Tensors:
    return {
        "x": r.bf16(64, HIDDEN),
        "rows": r.ints(-1, 64, rows, TOPK),
        "topk_weights": r.floats(rows, TOPK),
    }


both(
    "moe_combine",
    combine_inputs,
    lambda t: (t["x"], t["rows"], t["topk_weights"], None, None),
    lambda t: (torch.bfloat16,),
    outputs=lambda r, t: {"out": r.poison(t["rows"].shape[0], HIDDEN, dtype=torch.bfloat16)},
)


def moe_inputs(r: Random, rows: int) -> Tensors:
    return {
        **route_inputs(r, rows),
        "topk_weights": r.floats(rows, TOPK),
        "gate_up": r.codes(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2),
        "gate_up_scale": r.packed(EXPERTS, 2 * INTERMEDIATE, 1),
        "down": r.codes(EXPERTS, HIDDEN, INTERMEDIATE // 2),
        "down_scale": r.packed(EXPERTS, HIDDEN, 1),
    }


_MOE = ("x", "topk_ids", "topk_weights", "gate_up", "gate_up_scale", "down", "down_scale")
CASES["moe"] = Case(moe_inputs, lambda t: ((*(t[n] for n in _MOE), "mxfp8", 32, 32), {}))
CASES["moe.out"] = Case(
    lambda r, rows: {
        **moe_inputs(r, rows),
        "workspace": torch.zeros(1 << 20, dtype=torch.uint8, device=r.device),
        "out": r.poison(rows, HIDDEN, dtype=torch.bfloat16),
    },
    lambda t: (
        (*(t[n] for n in _MOE), "mxfp8", 32, 32),
        {"workspace": t["workspace"], "out": t["out"]},
    ),
    ("out",),
)
