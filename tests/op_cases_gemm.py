"""Sample inputs (op_samples.py) of the quantisation, layout and GEMM families."""

from __future__ import annotations

import torch
from op_samples import Random, Tensors, both

N, K = 48, 256
EXPERTS = 4


# ---- quantize, layout ----------------------------------------------------------------------------

both(
    "quantize",
    lambda r, rows: {"x": r.floats(rows, K)},
    lambda t: (t["x"], "mxfp8", 32, 1, "deepgemm"),
    outputs=lambda r, t: {
        "out": r.poison(t["x"].shape[0], K, dtype=torch.float8_e4m3fn),
        "out_scale": r.packed(t["x"].shape[0], K // 128),
    },
)
both(
    "dequantize",
    lambda r, rows: {"data": r.fp8(rows, K), "scale": r.packed(rows, K // 128)},
    lambda t: (t["data"], t["scale"], 32),
    lambda t: (torch.bfloat16,),
    outputs=lambda r, t: {"out": r.poison(t["data"].shape[0], K, dtype=torch.bfloat16)},
)
# One word a row: Dynamo traces no call whose only output is a tensor that is not contiguous.
both(
    "pack_scales",
    lambda r, rows: {"scale": r.powers(rows, 4)},
    lambda t: (t["scale"], t["scale"].shape[0], 1),
    outputs=lambda r, t: {"out": r.packed(t["scale"].shape[0], 1)},
)
both(
    "unpack_scales",
    lambda r, rows: {"scale": r.packed(rows, 2)},
    lambda t: (t["scale"], 6),
    lambda t: (torch.float32,),
    outputs=lambda r, t: {"out": r.poison(t["scale"].shape[0], 6, dtype=torch.float32)},
)
both(
    "pack_fp4",
    lambda r, rows: {"codes": r.codes(rows, K) & 15},
    lambda t: (t["codes"],),
    outputs=lambda r, t: {"out": r.poison(t["codes"].shape[0], K // 2, dtype=torch.uint8)},
)
both(
    "unpack_fp4",
    lambda r, rows: {"packed": r.codes(rows, K // 2)},
    lambda t: (t["packed"],),
    outputs=lambda r, t: {"out": r.poison(t["packed"].shape[0], K, dtype=torch.uint8)},
)
both(
    "transpose_fp4",
    lambda r, rows: {"packed": r.codes(64, rows)},
    lambda t: (t["packed"],),
    outputs=lambda r, t: {"out": r.poison(2 * t["packed"].shape[1], 32, dtype=torch.uint8)},
)


# ---- gemm, grouped -------------------------------------------------------------------------------


def gemm_inputs(r: Random, rows: int) -> Tensors:
    return {
        "a": r.fp8(rows, K),
        "sfa": r.packed(rows, K // 128),
        "b": r.codes(N, K // 2),
        "sfb": r.packed(N, 1),
        "c": r.floats(rows, N),
    }


both(
    "gemm",
    gemm_inputs,
    lambda t: (t["a"], t["sfa"], t["b"], t["sfb"], 32, 128),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"], []),
    outputs=lambda r, t: {"out": r.poison(t["a"].shape[0], N, dtype=torch.float32)},
)


def expert_inputs(r: Random, rows: int, *lead: int) -> Tensors:
    return {
        "a": r.fp8(*lead, rows, K),
        "sfa": r.packed(*lead, rows, K // 128),
        "b": r.codes(EXPERTS, N, K // 2),
        "sfb": r.packed(EXPERTS, N, K // 128),
    }


def contiguous_inputs(r: Random, rows: int) -> Tensors:
    """Segments of 16 rows with an expert (or none) each, padded after a few of them."""
    experts = r.ints(-1, EXPERTS, -(-rows // 16)).repeat_interleave(16)[:rows]
    filled = r.ints(0, 17, -(-rows // 16)).repeat_interleave(16)[:rows]
    within = torch.arange(rows, device=r.device) % 16
    indices = torch.where(within < filled, experts, -1)
    return {**expert_inputs(r, rows), "m_indices": indices}


def psum_inputs(r: Random, rows: int) -> Tensors:
    ends, end = [], 0
    for size in r.ints(0, rows // 2 + 2, EXPERTS).tolist():
        start = -(-end // 16) * 16
        end = min(start + size, rows) if start < rows else end
        ends.append(end)
    group_ends = torch.tensor(ends, dtype=torch.int32, device=r.device)
    return {**expert_inputs(r, rows), "group_ends": group_ends}


def masked_inputs(r: Random, rows: int) -> Tensors:
    return {**expert_inputs(r, rows, EXPERTS), "masked_m": r.ints(0, rows + 1, EXPERTS)}


for _name, _make, _index, _after in (
    ("grouped_gemm", contiguous_inputs, "m_indices", (16,)),
    ("grouped_gemm_psum", psum_inputs, "group_ends", (16, 8)),
    ("grouped_gemm_masked", masked_inputs, "masked_m", (8,)),
):
    both(
        _name,
        _make,
        lambda t, i=_index: (t["a"], t["sfa"], t["b"], t["sfb"], t[i], 32, 32),  # type: ignore[misc]
        lambda t: (torch.bfloat16,),
        after=lambda t, a=_after: a,  # type: ignore[misc]
        outputs=lambda r, t: {"out": r.poison(*t["a"].shape[:-1], N, dtype=torch.bfloat16)},
    )


# ---- k_grouped -----------------------------------------------------------------------------------


def k_grouped_inputs(r: Random, rows: int) -> Tensors:
    """Groups that divide K, which need not use all of it; each begins a new row of scales."""
    return {
        "a": r.fp8(K, rows),
        "sfa": r.powers(K // 32 + EXPERTS, rows),
        "b": r.fp8(K, N),
        "sfb": r.powers(K // 32 + EXPERTS, N),
        "ks": 16 * r.ints(0, K // EXPERTS // 16 + 1, EXPERTS),
        "c": r.floats(EXPERTS, rows, N),
    }


both(
    "k_grouped_gemm",
    k_grouped_inputs,
    lambda t: (t["a"], t["sfa"], t["b"], t["sfb"], t["ks"], 32, 32),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"],),
    outputs=lambda r, t: {"out": r.poison(EXPERTS, t["a"].shape[1], N, dtype=torch.float32)},
)


# ---- bf16 ----------------------------------------------------------------------------------------

both(
    "bf16_gemm",
    lambda r, rows: {"a": r.bf16(rows, K), "b": r.bf16(K, N), "c": r.floats(rows, N)},
    lambda t: (t["a"], t["b"].t()),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"],),
    outputs=lambda r, t: {"out": r.poison(t["a"].shape[0], N, dtype=torch.float32)},
)


def bf16_weights(r: Random, t: Tensors) -> Tensors:
    """The grouped case `t` with bfloat16 operands."""
    index: Tensors = {key: t[key] for key in ("m_indices", "group_ends", "masked_m") if key in t}
    return {"a": r.bf16(*t["a"].shape), "b": r.bf16(EXPERTS, N, K), **index}


for _name, _make, _index, _after in (
    ("bf16_grouped_gemm", contiguous_inputs, "m_indices", (16,)),
    ("bf16_grouped_gemm_psum", psum_inputs, "group_ends", (16, 8)),
    ("bf16_grouped_gemm_masked", masked_inputs, "masked_m", (8,)),
):
    both(
        _name,
        lambda r, rows, m=_make: bf16_weights(r, m(r, rows)),  # type: ignore[misc]
        lambda t, i=_index: (t["a"], t["b"], t[i]),  # type: ignore[misc]
        lambda t: (torch.bfloat16,),
        after=lambda t, a=_after: a,  # type: ignore[misc]
        outputs=lambda r, t: {"out": r.poison(*t["a"].shape[:-1], N, dtype=torch.bfloat16)},
    )


def bf16_k_grouped_inputs(r: Random, rows: int) -> Tensors:
    """Groups that divide the rows, which need not use all of them."""
    return {
        "a": r.bf16(rows, 40),
        "b": r.bf16(rows, N),
        "ks": r.ints(0, rows // EXPERTS + 2, EXPERTS),
        "c": r.floats(EXPERTS, 40, N),
    }


both(
    "bf16_k_grouped_gemm",
    bf16_k_grouped_inputs,
    lambda t: (t["a"], t["b"], t["ks"]),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"],),
    outputs=lambda r, t: {"out": r.poison(EXPERTS, 40, N, dtype=torch.float32)},
)


# ---- hc_prenorm ----------------------------------------------------------------------------------

both(
    "hc_prenorm",
    lambda r, rows: {"x": r.bf16(rows, K), "fn": r.floats(24, K)},
    lambda t: (t["x"], t["fn"], 2, None),
    outputs=lambda r, t: {
        "d": r.poison(2, t["x"].shape[0], 24, dtype=torch.float32),
        "sqr_sum": r.poison(2, t["x"].shape[0], dtype=torch.float32),
    },
)


# ---- einsum --------------------------------------------------------------------------------------

both(
    "batched_gemm",
    lambda r, rows: {**expert_inputs(r, rows, EXPERTS), "c": r.floats(rows, EXPERTS, N)},
    lambda t: (t["a"], t["sfa"], t["b"], t["sfb"], 32, 32),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"], True),
    outputs=lambda r, t: {"out": r.poison(t["a"].shape[1], EXPERTS, N, dtype=torch.float32)},
)
both(
    "bf16_batched_gemm",
    lambda r, rows: {
        "a": r.bf16(rows, EXPERTS, K),
        "b": r.bf16(EXPERTS, K, N),
        "c": r.floats(rows, EXPERTS, N),
    },
    lambda t: (t["a"].transpose(0, 1), t["b"].transpose(1, 2)),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"], True),
    outputs=lambda r, t: {"out": r.poison(t["a"].shape[0], EXPERTS, N, dtype=torch.float32)},
)
both(
    "bf16_batch_sum",
    lambda r, rows: {
        "a": r.bf16(rows, EXPERTS, K),
        "b": r.bf16(rows, N, K),
        "c": r.floats(EXPERTS, N),
    },
    lambda t: (t["a"], t["b"]),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"],),
    outputs=lambda r, t: {"out": r.poison(EXPERTS, N, dtype=torch.float32)},
)
