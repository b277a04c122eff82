"""The op families: schema, fake kernel, CPU reference and public wrapper of each in one file.

Importing this defines `torch.ops.sm120.*` and its CPU kernels; it does not load the CUDA library.
"""

from . import (
    bf16,
    einsum,
    gemm,
    grouped,
    hc_prenorm,
    indexer,
    k_grouped,
    layout,
    moe,
    moe_activation,
    moe_layer,
    mqa,
    quantize,
)

__all__ = [
    "bf16",
    "einsum",
    "gemm",
    "grouped",
    "hc_prenorm",
    "indexer",
    "k_grouped",
    "layout",
    "moe",
    "moe_activation",
    "moe_layer",
    "mqa",
    "quantize",
]
