"""DeepGEMM's public Python API: names, parameters in order, defaults.

API is version 2.5.0 (branch nv_dev, a6b593d). NEWER_CALLS are parameters that 2.8.1, the version in
vLLM 0.33.0, calls otherwise or has more of. A signature is written as a Python parameter list.
"""

from __future__ import annotations

_DENSE = "a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims={!r}"
_DENSE += ", disable_ue8m0_cast=False"
_GROUPED = "a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None"
_GROUPED += ", compiled_dims='nk', disable_ue8m0_cast=False, use_psum_layout=False"
_MASKED = "a, b, d, masked_m, expected_m, recipe=None, recipe_a=None, recipe_b=None"
_MASKED += ", compiled_dims='nk', disable_ue8m0_cast=False"
_K_GROUPED = "a, b, d, ks, ks_tensor, c=None, recipe=(1, 1, 128), compiled_dims='mn'"
_BF16 = "a, b, d, c=None, compiled_dims={!r}"
_BF16_GROUPED = "a, b, d, grouped_layout, compiled_dims='nk', use_psum_layout=False"
_BF16_MASKED = "a, b, d, masked_m, expected_m, compiled_dims='nk'"
_MQA = "q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=True, max_seqlen_k=0"
_PAGED = "q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len"
_PAGED += ", clean_logits=False"
_FP32 = "logits_dtype=torch.float32"

API = {
    # dense
    "fp8_fp4_gemm_nt": _DENSE.format("nk"),
    "fp8_fp4_gemm_nn": _DENSE.format("nk"),
    "fp8_fp4_gemm_tn": _DENSE.format("mn"),
    "fp8_fp4_gemm_tt": _DENSE.format("mn"),
    "fp8_gemm_nt": _DENSE.format("nk"),
    "fp8_gemm_nn": _DENSE.format("nk"),
    "fp8_gemm_tn": _DENSE.format("mn"),
    "fp8_gemm_tt": _DENSE.format("mn"),
    "fp8_gemm_nt_skip_head_mid": (
        "a, b, d, head_splits, recipe=None, compiled_dims='nk', disable_ue8m0_cast=False"
    ),
    "bf16_gemm_nt": _BF16.format("nk"),
    "bf16_gemm_nn": _BF16.format("nk"),
    "bf16_gemm_tn": _BF16.format("mn"),
    "bf16_gemm_tt": _BF16.format("mn"),
    "cublaslt_gemm_nt": "a, b, d, c=None",
    "cublaslt_gemm_nn": "a, b, d, c=None",
    "cublaslt_gemm_tn": "a, b, d, c=None",
    "cublaslt_gemm_tt": "a, b, d, c=None",
    # grouped
    "m_grouped_fp8_fp4_gemm_nt_contiguous": _GROUPED + ", expected_m_for_psum_layout=None",
    "m_grouped_fp8_gemm_nt_contiguous": _GROUPED + ", expected_m_for_psum_layout=None",
    "m_grouped_fp8_fp4_gemm_nn_contiguous": _GROUPED,
    "m_grouped_fp8_gemm_nn_contiguous": _GROUPED,
    "m_grouped_fp8_fp4_gemm_nt_masked": _MASKED,
    "m_grouped_fp8_gemm_nt_masked": _MASKED,
    "fp8_m_grouped_gemm_nt_masked": _MASKED,
    "k_grouped_fp8_gemm_nt_contiguous": _K_GROUPED,
    "k_grouped_fp8_gemm_tn_contiguous": _K_GROUPED,
    "m_grouped_bf16_gemm_nt_contiguous": _BF16_GROUPED + ", expected_m_for_psum_layout=None",
    "m_grouped_bf16_gemm_nn_contiguous": _BF16_GROUPED,
    "m_grouped_bf16_gemm_nt_masked": _BF16_MASKED,
    "bf16_m_grouped_gemm_nt_masked": _BF16_MASKED,
    "k_grouped_bf16_gemm_tn_contiguous": "a, b, d, ks, ks_tensor, c=None, compiled_dims='mn'",
    # einsum
    "einsum": "expr, a, b, d, c=None, use_cublaslt=False",
    "fp8_einsum": "expr, a, b, d, c=None, recipe=(1, 128, 128)",
    # attention, hyper-connections
    "fp8_fp4_mqa_logits": f"{_MQA}, {_FP32}",
    "fp8_mqa_logits": _MQA,
    "get_paged_mqa_logits_metadata": "context_lens, block_kv, num_sms, indices=None",
    "fp8_fp4_paged_mqa_logits": f"{_PAGED}, {_FP32}, indices=None",
    "fp8_paged_mqa_logits": f"{_PAGED}, indices=None",
    "tf32_hc_prenorm_gemm": "a, b, d, sqr_sum, num_splits=None",
    # layout
    "transform_sf_into_required_layout": (
        "sf, mn, k, recipe, num_groups=None, is_sfa=None, disable_ue8m0_cast=False"
    ),
    "get_tma_aligned_size": "x, element_size",
    "get_mn_major_tma_aligned_tensor": "sf",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "sf",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": "sf, ks_tensor, ks, gran_k",
    "set_mk_alignment_for_contiguous_layout": "value",
    "get_mk_alignment_for_contiguous_layout": "",
    "get_theoretical_mk_alignment_for_contiguous_layout": "expected_m=None, num_groups=None",
    "get_m_alignment_for_contiguous_layout": "",
    "get_k_alignment_for_contiguous_layout": "",
    # settings
    "init": "lib_root, cuda_home",
    "set_num_sms": "num_sms",
    "get_num_sms": "",
    "set_tc_util": "tc_util",
    "get_tc_util": "",
    "set_pdl": "enable_pdl",
    "get_pdl": "",
    "set_ignore_compile_dims": "value",
    "set_block_size_multiple_of": "value",
    "set_compile_mode": "mode",
    "get_compile_mode": "",
    # mega MoE
    "SymmBuffer": "*args",
    "get_symm_buffer_for_mega_moe": (
        "group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden"
        ", use_fp8_dispatch=True, activation='swiglu'"
    ),
    "transform_weights_for_mega_moe": "l1_weights, l2_weights",
    "fp8_fp4_mega_moe": (
        "y, l1_weights, l2_weights, sym_buffer, cumulative_local_expert_recv_stats=None"
        ", recipe=(1, 1, 32), activation='swiglu', activation_clamp=None, fast_math=True"
    ),
}

MATH_API = {
    "ceil_div": "x, y",
    "align": "x, y",
    "ceil_to_ue8m0": "x",
    "pack_ue8m0_to_int": "x",
    "unpack_ue8m0_from_int": "packed_sf",
    "per_token_cast_to_fp8": "x, use_ue8m0, gran_k=128, use_packed_ue8m0=False",
    "per_channel_cast_to_fp8": "x, use_ue8m0, gran_k=128",
    "per_block_cast_to_fp8": "x, use_ue8m0, gran_k=128",
    "per_custom_dims_cast_to_fp8": "x, dims, use_ue8m0",
    "per_token_cast_to_fp4": "x, use_ue8m0, gran_k=128, use_packed_ue8m0=False",
    "transpose_packed_fp4": "a",
    "cast_back_from_fp4": "packed, sf, gran_k=128, use_packed_ue8m0=False",
}

LAYOUT_NAMES = [
    "get_tma_aligned_size",
    "get_mn_major_tma_aligned_tensor",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "set_mk_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_k_alignment_for_contiguous_layout",
]

TESTING_API = {
    "bench": "fn, num_warmups=5, num_tests=10, high_precision=False",
    "bench_kineto": (
        "fn, kernel_names, num_tests=30, suppress_kineto_output=False, trace_path=None"
        ", flush_l2=True, with_multiple_kernels=False, barrier=None"
    ),
    "calc_diff": "x, y",
    "count_bytes": "*tensors",
    "get_arch_major": "",
    "test_filter": "condition",
    "ignore_env": "name, condition",
}

DIST_API = {
    "init_dist": "local_rank, num_local_ranks",
    "uneven_all_gather": "tensor, dim=0, group=None",
    "dist_print": "s='', once_in_node=False",
}

# What 2.8.1 is called with beyond that, as "positional arguments; keywords".
NEWER_CALLS = {
    "fp8_fp4_gemm_nt": "a, b, d; alpha epilogue",
    "fp4_gemm_nt": "a, b, d; alpha epilogue",
    "m_grouped_fp8_fp4_gemm_nt_contiguous": "a, b, d, g; ensure_zero_padding epilogue",
    "m_grouped_fp4_gemm_nt_contiguous": "a, b, d, g; ensure_zero_padding epilogue",
    "m_grouped_fp8_fp4_gemm_nn_contiguous": "a, b, d, g; ensure_zero_padding epilogue",
    "m_grouped_fp8_fp4_gemm_nt_masked": "a, b, d, m, e; epilogue",
    "fp8_m_grouped_gemm_nt_masked": "a, b, d, m, e; enable_overlap max_block_n signal",
    "k_grouped_fp8_gemm_nt_contiguous": "a, b, d, k, g; use_psum_layout epilogue",
    "k_grouped_fp8_gemm_tn_contiguous": "a, b, d, k, g; use_psum_layout epilogue",
    "k_grouped_bf16_gemm_tn_contiguous": "a, b, d, k, g; use_psum_layout epilogue",
    "bf16_gemm_nt": "a, b, d; alpha epilogue",
    "m_grouped_bf16_gemm_nt_contiguous": "a, b, d, g; ensure_zero_padding epilogue",
    "m_grouped_bf16_gemm_nt_masked": "a, b, d, m, e; epilogue",
    "fp8_einsum": "x, a, b, d; epilogue use_128x4_sfd_layout",
    "einsum": "x, a, b, d; epilogue",
    "fp8_fp4_mqa_logits": "q, kv, w, s, e, n; schedule_meta",
    "fp8_fp4_paged_mqa_logits": "q, kv, w, l, t, m, n; indices",
    "get_paged_mqa_logits_metadata": "l, b, n; indices",
    "tf32_hc_prenorm_gemm": "a, b, d, s, n; ",
    "use_deterministic_algorithms": "b; ",
    "shutdown": "; ",
}
