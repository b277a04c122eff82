"""The op families: schema, fake kernel, CPU reference and public wrapper of each in one file.

Importing this defines `torch.ops.sm120.*` and its CPU kernels; it does not load the CUDA library.
"""

from . import gemm, grouped, k_grouped, layout, moe, moe_activation, moe_layer, quantize

__all__ = [
    "gemm",
    "grouped",
    "k_grouped",
    "layout",
    "moe",
    "moe_activation",
    "moe_layer",
    "quantize",
]
