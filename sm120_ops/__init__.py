"""Block-scaled MXFP8 and MXFP4 kernels for NVIDIA SM120 and SM121 GPUs, as `torch.ops.sm120.*`.

Importing the package loads the compiled library and registers every op; no GPU is touched. On CPU
tensors an op runs its PyTorch reference, on CUDA tensors its kernel, under `torch.compile` and CUDA
graphs too.
"""

from __future__ import annotations

from . import _load, nn
from ._stats import stats
from ._version import __version__
from .device import is_supported
from .ops.bf16 import bf16_gemm, bf16_gemm_nn, bf16_gemm_tn, bf16_gemm_tt
from .ops.einsum import einsum
from .ops.gemm import gemm, gemm_nn, gemm_tn, gemm_tt
from .ops.grouped import grouped_gemm, grouped_gemm_masked, grouped_gemm_psum
from .ops.hc_prenorm import hc_prenorm
from .ops.indexer import indexer_topk, mqa_cache_write
from .ops.k_grouped import k_grouped_gemm
from .ops.layout import pack_fp4, pack_scales, transpose_fp4, unpack_fp4, unpack_scales
from .ops.moe import moe_capacity, moe_combine, moe_route
from .ops.moe_activation import moe_activation
from .ops.moe_layer import moe, moe_workspace_size
from .ops.mqa import mqa_logits, paged_mqa_logits, paged_mqa_metadata
from .ops.quantize import dequantize, quantize

_load.load()

__all__ = [
    "__version__",
    "bf16_gemm",
    "bf16_gemm_nn",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "dequantize",
    "einsum",
    "gemm",
    "gemm_nn",
    "gemm_tn",
    "gemm_tt",
    "grouped_gemm",
    "grouped_gemm_masked",
    "grouped_gemm_psum",
    "hc_prenorm",
    "indexer_topk",
    "is_supported",
    "k_grouped_gemm",
    "moe",
    "moe_activation",
    "moe_capacity",
    "moe_combine",
    "moe_route",
    "moe_workspace_size",
    "mqa_cache_write",
    "mqa_logits",
    "nn",
    "pack_fp4",
    "pack_scales",
    "paged_mqa_logits",
    "paged_mqa_metadata",
    "quantize",
    "stats",
    "transpose_fp4",
    "unpack_fp4",
    "unpack_scales",
]
