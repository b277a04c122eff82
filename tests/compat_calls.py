"""One call of every DeepGEMM name, on tensors of op_samples.Random, for test_compat_names.py.

Tensors are made by name for a number of rows and a seed; `run` makes the call with them, sizes
taken off the tensors. Scales are packed where the name takes such, so that a call launches only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from op_cases_gemm import EXPERTS, K, N, contiguous_inputs, masked_inputs
from op_cases_model import BLOCK, KEYS, paged_inputs, ragged_inputs
from op_samples import Random, Tensors

from sm120_ops.compat import deep_gemm as typed

deep_gemm: Any = typed  # a call's arguments are put together from parts

ALIGNMENT = 16  # of the groups in contiguous_inputs()
BF16, FP32 = torch.bfloat16, torch.float32
GRAN_32: dict[str, Any] = {"recipe_a": (1, 32), "recipe_b": (1, 32)}
SIZES = [K // EXPERTS] * EXPERTS  # of k-groups, as the host has them


@dataclass
class Call:
    make: Callable[[Random, int], Tensors]
    run: Callable[[Tensors], Any]
    outputs: tuple[str, ...] = ()  # tensors that are written; else what `run` gives counts
    on_device: bool = True  # works on tensors, and can be captured and compiled


CALLS: dict[str, Call] = {}


def fp4(r: Random, *shape: int) -> torch.Tensor:
    return r.codes(*shape[:-1], shape[-1] // 2).view(torch.int8)


# ---- Dense ---------------------------------------------------------------------------------------


def dense(name: str, layout: str, data_a: Any, data_b: Any, c: bool) -> None:
    """`layout` as in the name; operands that it has transposed are given so, with their scales."""

    def make(r: Random, rows: int) -> Tensors:
        return {
            "a": data_a(r, *((K, rows) if layout[0] == "t" else (rows, K))),
            "sfa": r.packed(rows, K // 128),
            "b": data_b(r, *((K, N) if layout[1] == "n" else (N, K))),
            "sfb": r.packed(N, K // 128),
            "c": r.floats(rows, N),
            "d": r.poison(rows, N, dtype=FP32),
        }

    def run(t: Tensors) -> None:
        a = (t["a"], t["sfa"].t() if layout[0] == "t" else t["sfa"])
        b = (t["b"], t["sfb"].t() if layout[1] == "n" else t["sfb"])
        getattr(deep_gemm, name)(a, b, t["d"], t["c"] if c else None, **GRAN_32)

    CALLS[name] = Call(make, run, ("d",))


def unscaled(name: str, layout: str) -> None:
    def make(r: Random, rows: int) -> Tensors:
        return {
            "a": r.bf16(*((K, rows) if layout[0] == "t" else (rows, K))),
            "b": r.bf16(*((K, N) if layout[1] == "n" else (N, K))),
            "c": r.floats(rows, N),
            "d": r.poison(rows, N, dtype=FP32),
        }

    run = getattr(deep_gemm, name)
    CALLS[name] = Call(make, lambda t: run(t["a"], t["b"], t["d"], t["c"]), ("d",))


for _layout in ("nt", "nn", "tn", "tt"):
    dense(f"fp8_gemm_{_layout}", _layout, Random.fp8, Random.fp8, c=False)
    dense(f"fp8_fp4_gemm_{_layout}", _layout, Random.fp8, fp4, c=True)
    unscaled(f"bf16_gemm_{_layout}", _layout)
    unscaled(f"cublaslt_gemm_{_layout}", _layout)
dense("fp4_gemm_nt", "nt", fp4, fp4, c=False)

CALLS["fp8_gemm_nt_skip_head_mid"] = Call(
    lambda r, rows: {
        "a": r.fp8(rows, K),
        "sfa": r.packed(rows, 1),
        "b": r.fp8(N, K),
        "sfb": r.packed(N, 1),
        "d": r.poison(rows, N + 10, dtype=BF16),
    },
    lambda t: deep_gemm.fp8_gemm_nt_skip_head_mid(
        (t["a"], t["sfa"]), (t["b"], t["sfb"]), t["d"], (N // 2, 5, 0)
    ),
    ("d",),
)


# ---- Grouped -------------------------------------------------------------------------------------


def operands(t: Tensors) -> tuple[Any, Any]:
    return (t["a"], t["sfa"]), (t["b"], t["sfb"])


def grouped(name: str, masked: bool = False, nn: bool = False, a_fp4: bool = False) -> None:
    run = getattr(deep_gemm, name)

    def make(r: Random, rows: int) -> Tensors:
        tensors = (masked_inputs if masked else contiguous_inputs)(r, rows)
        shape = tensors["a"].shape[:-1]
        if a_fp4:
            tensors["a"] = fp4(r, *shape, K)
        if nn:
            tensors["b"] = fp4(r, EXPERTS, K, N)
        return {**tensors, "d": r.poison(*shape, N, dtype=BF16)}

    def call(t: Tensors) -> None:
        a, b = operands(t)
        if nn:
            b = (b[0], b[1].transpose(1, 2))
        if masked:
            run(a, b, t["d"], t["masked_m"], 8, **GRAN_32)
        else:
            run(a, b, t["d"], t["m_indices"], **GRAN_32)

    CALLS[name] = Call(make, call, ("d",))


def grouped_bf16(name: str, masked: bool = False, nn: bool = False) -> None:
    def make(r: Random, rows: int) -> Tensors:
        tensors = (masked_inputs if masked else contiguous_inputs)(r, rows)
        shape = tensors["a"].shape[:-1]
        return {
            "index": tensors["masked_m" if masked else "m_indices"],
            "a": r.bf16(*shape, K),
            "b": r.bf16(EXPERTS, *((K, N) if nn else (N, K))),
            "d": r.poison(*shape, N, dtype=BF16),
        }

    def call(t: Tensors) -> None:
        options = {"expected_m": 8} if masked else {}
        getattr(deep_gemm, name)(t["a"], t["b"], t["d"], t["index"], **options)

    CALLS[name] = Call(make, call, ("d",))


grouped("m_grouped_fp8_gemm_nt_contiguous")
grouped("m_grouped_fp8_fp4_gemm_nt_contiguous")
grouped("m_grouped_fp4_gemm_nt_contiguous", a_fp4=True)
grouped("m_grouped_fp8_gemm_nn_contiguous", nn=True)
grouped("m_grouped_fp8_fp4_gemm_nn_contiguous", nn=True)
for _name in ("m_grouped_fp8_gemm", "m_grouped_fp8_fp4_gemm", "fp8_m_grouped_gemm"):
    grouped(f"{_name}_nt_masked", masked=True)
grouped("m_grouped_fp4_gemm_nt_masked", masked=True, a_fp4=True)
grouped_bf16("m_grouped_bf16_gemm_nt_contiguous")
grouped_bf16("m_grouped_bf16_gemm_nn_contiguous", nn=True)
grouped_bf16("m_grouped_bf16_gemm_nt_masked", masked=True)
grouped_bf16("bf16_m_grouped_gemm_nt_masked", masked=True)


def k_grouped(name: str, data_a: Any, data_b: Any, scaled: bool = True) -> None:
    """The sizes on the device vary with the seed; those on the host only have the same sum."""

    def make(r: Random, rows: int) -> Tensors:
        cuts = r.ints(0, K // 32 + 1, EXPERTS - 1).sort()[0]
        ends = torch.cat([cuts, cuts.new_tensor([K // 32])])
        tensors = {
            "a": data_a(r, rows),
            "b": data_b(r, N),
            "ks": 32 * torch.diff(ends, prepend=ends.new_zeros(1)),
            "c": r.floats(EXPERTS, rows, N),
            "d": r.poison(EXPERTS, rows, N, dtype=FP32),
        }
        if scaled:
            tensors |= {"sfa": r.powers(K // 32, rows), "sfb": r.powers(K // 32, N)}
        return tensors

    def call(t: Tensors) -> None:
        a, b = operands(t) if scaled else (t["a"], t["b"])
        options = {"recipe": (1, 1, 32)} if scaled else {}
        getattr(deep_gemm, name)(a, b, t["d"], SIZES, t["ks"], t["c"], **options)

    CALLS[name] = Call(make, call, ("d",))


k_grouped("k_grouped_fp8_gemm_nt_contiguous", lambda r, n: r.fp8(K * n), lambda r, n: r.fp8(K * n))
k_grouped("k_grouped_fp8_gemm_tn_contiguous", lambda r, n: r.fp8(K, n), lambda r, n: r.fp8(K, n))
k_grouped(
    "k_grouped_bf16_gemm_tn_contiguous",
    lambda r, n: r.bf16(K, n),
    lambda r, n: r.bf16(K, n),
    scaled=False,
)


# ---- Einsum, attention, hyper-connections --------------------------------------------------------

H, R, D = 3, 256, 64
CALLS["einsum"] = Call(
    lambda r, rows: {
        "a": r.bf16(rows, H, R),
        "b": r.bf16(H, D, R),
        "d": r.poison(rows, H, D, dtype=BF16),
    },
    lambda t: deep_gemm.einsum("bhr,hdr->bhd", t["a"], t["b"], t["d"]),
    ("d",),
)
CALLS["fp8_einsum"] = Call(
    lambda r, rows: {
        "a": r.fp8(rows, H, R),
        "sfa": r.packed(H, rows, 1).transpose(0, 1),
        "b": r.fp8(H, D, R),
        "sfb": r.packed(H, D, 1),
        "d": r.poison(rows, H, D, dtype=BF16),
    },
    lambda t: deep_gemm.fp8_einsum("bhr,hdr->bhd", *operands(t), t["d"], recipe=(1, 1, 128)),
    ("d",),
)


def ragged(t: Tensors) -> Any:
    return (t["k"], t["k_scale"]), t["weights"], t["starts"], t["ends"]


def paged(t: Tensors) -> Any:
    return t["kv_cache"], t["weights"], t["context_lens"], t["block_table"], t["metadata"], KEYS


CALLS["fp8_mqa_logits"] = Call(
    ragged_inputs, lambda t: deep_gemm.fp8_mqa_logits(t["q"], *ragged(t))
)
CALLS["fp8_fp4_mqa_logits"] = Call(
    ragged_inputs,
    lambda t: deep_gemm.fp8_fp4_mqa_logits((t["q"], None), *ragged(t), False, KEYS),
)
CALLS["get_paged_mqa_logits_metadata"] = Call(
    paged_inputs, lambda t: deep_gemm.get_paged_mqa_logits_metadata(t["context_lens"], BLOCK, 7)
)
CALLS["fp8_paged_mqa_logits"] = Call(
    paged_inputs,
    lambda t: deep_gemm.fp8_paged_mqa_logits(t["q"], *paged(t), clean_logits=True),
)
CALLS["fp8_fp4_paged_mqa_logits"] = Call(
    paged_inputs,
    lambda t: deep_gemm.fp8_fp4_paged_mqa_logits(
        (t["q"].expand(-1, 9, -1, -1).contiguous(), None),
        t["kv_cache"],
        t["weights"].repeat_interleave(9, 0),
        t["context_lens"].expand(-1, 9).contiguous(),
        *paged(t)[3:],
        clean_logits=True,
    ),
)
CALLS["tf32_hc_prenorm_gemm"] = Call(
    lambda r, rows: {
        "a": r.bf16(rows, K),
        "b": r.floats(24, K),
        "d": r.poison(2, rows, 24, dtype=FP32),
        "sums": r.poison(2, rows, dtype=FP32),
    },
    lambda t: deep_gemm.tf32_hc_prenorm_gemm(t["a"], t["b"], t["d"], t["sums"], num_splits=2),
    ("d", "sums"),
)


# ---- Scales and casts ----------------------------------------------------------------------------


def on_scales(name: str, run: Callable[[torch.Tensor], Any]) -> None:
    """One word of scales a row: Dynamo traces no call whose only result is not contiguous."""
    CALLS[name] = Call(lambda r, rows: {"sf": r.powers(rows, 4)}, lambda t: run(t["sf"]))


on_scales(
    "transform_sf_into_required_layout",
    lambda sf: deep_gemm.transform_sf_into_required_layout(sf, sf.shape[0], 128, (1, 32)),
)
on_scales(
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor,
)
on_scales(
    "get_mn_major_tma_aligned_tensor",
    lambda sf: deep_gemm.get_mn_major_tma_aligned_tensor(sf).contiguous(),
)
on_scales("ceil_to_ue8m0", lambda sf: deep_gemm.ceil_to_ue8m0(sf * 1.5))
on_scales("pack_ue8m0_to_int", deep_gemm.pack_ue8m0_to_int)
CALLS["unpack_ue8m0_from_int"] = Call(
    lambda r, rows: {"words": r.packed(rows, 2)},
    lambda t: deep_gemm.unpack_ue8m0_from_int(t["words"]),
)
CALLS["get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"] = Call(
    lambda r, rows: {"sf": r.powers(K // 32, rows), "ks": r.ints(0, 1, EXPERTS) + K // EXPERTS},
    lambda t: deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
        t["sf"], t["ks"], SIZES, 32
    ),
)


def cast(name: str, *args: Any, turned: bool = False) -> None:
    CALLS[name] = Call(
        lambda r, rows: {"x": r.bf16(64, rows) if turned else r.bf16(rows, K)},
        lambda t: getattr(deep_gemm, name)(t["x"], *args),
    )


cast("per_token_cast_to_fp8", True, 32)
cast("per_block_cast_to_fp8", True, 32)
cast("per_token_cast_to_fp4", True, 32)
cast("per_channel_cast_to_fp8", True, 32, turned=True)
cast("per_custom_dims_cast_to_fp8", (0,), True)
CALLS["cast_back_from_fp8"] = Call(
    lambda r, rows: {"data": r.fp8(rows, K), "sf": r.powers(rows, K // 32)},
    lambda t: deep_gemm.cast_back_from_fp8(t["data"], t["sf"], 32),
)
CALLS["cast_back_from_fp4"] = Call(
    lambda r, rows: {"data": fp4(r, rows, K), "sf": r.powers(rows, K // 32)},
    lambda t: deep_gemm.cast_back_from_fp4(t["data"], t["sf"], 32),
)
CALLS["transpose_packed_fp4"] = Call(
    lambda r, rows: {"data": fp4(r, 64, 2 * rows)},
    lambda t: deep_gemm.transpose_packed_fp4(t["data"]),
)


# ---- Numbers and settings ------------------------------------------------------------------------


def on_host(name: str, *args: Any) -> None:
    CALLS[name] = Call(
        lambda r, rows: {}, lambda t: getattr(deep_gemm, name)(*args), on_device=False
    )


for _name, *_args in (
    ("ceil_div", 7, 4),
    ("align", 7, 4),
    ("get_tma_aligned_size", 7, 4),
    ("init", "library", "/usr/local/cuda"),
    ("shutdown",),
    ("set_num_sms", 7),
    ("get_num_sms",),
    ("set_tc_util", 80),
    ("get_tc_util",),
    ("set_pdl", True),
    ("get_pdl",),
    ("set_compile_mode", 0),
    ("get_compile_mode",),
    ("set_ignore_compile_dims", True),
    ("set_block_size_multiple_of", (1, 2)),
    ("use_deterministic_algorithms", True),
    ("set_mk_alignment_for_contiguous_layout", 64),
    ("get_mk_alignment_for_contiguous_layout",),
    ("get_m_alignment_for_contiguous_layout",),
    ("get_k_alignment_for_contiguous_layout",),
    ("get_theoretical_mk_alignment_for_contiguous_layout", 64),
):
    on_host(str(_name), *_args)
