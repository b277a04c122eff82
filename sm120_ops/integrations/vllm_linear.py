"""Linear kernels in the form of vLLM's interfaces. Imports vLLM: used by vllm.py alone.

    fp8_block    weight FP8 with scales of 128 x 128 (or 32 x 32) blocks, input FP8 by token
    mxfp8        weight and input MXFP8, scales of 32 values
    mxfp4        weight MXFP4, input MXFP4 or MXFP8 as the model says

Scales are packed when the weights have been loaded; the input is quantised in each call. Block
scales that are no powers of two are rounded up to such, and the weight is quantised again with
them, as vLLM does for DeepGEMM on these GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import (
    Fp8BlockScaledMMLinearKernel,
    MxFp4LinearKernel,
    Mxfp8LinearKernel,
)
from vllm.model_executor.layers.quantization.utils import (
    quant_utils,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from .. import _stats
from ..compat.deep_gemm.layout import required
from ..ops.layout import E8M0_NAN, GRANS_MN, exponents_of
from ..ops.quantize import GRANS_K, quantize

Answer = tuple[bool, str | None]


def _supported(compute_capability: int | None, any_gpu: bool) -> Answer:
    if not current_platform.is_cuda():
        return False, "sm120_ops needs a CUDA GPU"
    if compute_capability is None:
        found = current_platform.get_device_capability()
        compute_capability = None if found is None else found[0] * 10 + found[1]
    if compute_capability is None or (compute_capability // 10 != 12 and not any_gpu):
        return False, f"sm120_ops needs compute capability 12.x, got {compute_capability}"
    return True, None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    gran_k: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] quantised to `format`, times weight [N, K] with packed scales; x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    data, x_scale = torch.ops.sm120.quantize.default(rows, format, gran_k, 1, "deepgemm")
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    n = weight.shape[0]
    c = None if bias is None else bias.to(dtype).expand(rows.shape[0], n)
    out = torch.ops.sm120.gemm.default(data, x_scale, weight, scale, gran_k, gran_k, dtype, c, ())
    return out.to(x.dtype).view(*x.shape[:-1], n)


def _pack_weight_scale(layer: Any, name: str, k: int, gran_k: int) -> None:
    scale = layer.weight_scale.data[: layer.weight.shape[0], : -(-k // gran_k)]
    packed = required(f"vllm.{name}", "weight_scale", scale, scale.shape[0], k, (1, gran_k))
    replace_parameter(layer, "weight_scale", packed)
    _stats.count(f"vllm.{name} layers loaded")


class _Mxfp8(Mxfp8LinearKernel):
    @classmethod
    def can_implement(cls, c: Any) -> Answer:
        if getattr(c, "bmm_batch_size", None) is not None:
            return False, "no batched MXFP8 linear"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        _pack_weight_scale(layer, "mxfp8", layer.weight.shape[1], 32)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        _stats.count("vllm.mxfp8")
        return linear(x, layer.weight, layer.weight_scale, "mxfp8", 32, bias)


class _MxFp4(MxFp4LinearKernel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.input_format = self._input_format(config)

    @staticmethod
    def _input_format(config: Any) -> str | None:
        """None where the input must stay as it is."""
        if not hasattr(config, "activation_quant_key"):
            return "mxfp4"  # versions that know of no other
        key = config.activation_quant_key
        if key is None:
            return None
        if key == quant_utils.kMxfp4Dynamic:
            return "mxfp4"
        return "mxfp8" if key == getattr(quant_utils, "kMxfp8Dynamic", None) else None

    @classmethod
    def _supports_quant_scheme(cls, weight_key: Any, activation_key: Any) -> bool:
        keys = [quant_utils.kMxfp4Dynamic, getattr(quant_utils, "kMxfp8Dynamic", None)]
        return weight_key == quant_utils.kMxfp4Static and activation_key in keys

    @classmethod
    def can_implement(cls, config: Any) -> Answer:
        if cls._input_format(config) is None:
            return False, "needs MXFP4 or MXFP8 activations"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        _pack_weight_scale(layer, "mxfp4", 2 * layer.weight.shape[1], 32)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        _stats.count("vllm.mxfp4")
        assert self.input_format is not None
        return linear(x, layer.weight, layer.weight_scale, self.input_format, 32, bias)


def _excluded() -> str | None:
    """The model's type, where vLLM keeps power-of-two block scales away from it."""
    try:
        from vllm.config import get_current_vllm_config
        from vllm.utils.deep_gemm import (
            should_auto_disable_deep_gemm,
        )
    except ImportError:
        return None
    model = get_current_vllm_config().model_config
    kind = None if model is None else getattr(model.hf_text_config, "model_type", None)
    return kind if should_auto_disable_deep_gemm(kind) else None


class _Fp8Block(Fp8BlockScaledMMLinearKernel):
    apply_input_quant = False

    @classmethod
    def can_implement(cls, config: Any) -> Answer:
        able, reason = super().can_implement(config)
        if not able:
            return able, reason
        if config.out_dtype != torch.bfloat16:
            return False, "gives bfloat16"
        rows, gran_k = config.weight_quant_key.scale.group_shape
        group = tuple(config.activation_quant_key.scale.group_shape)
        if rows not in GRANS_MN or gran_k not in GRANS_K or group != (1, gran_k):
            return False, f"no scales of {rows} x {gran_k} blocks with inputs by {group}"
        if config.weight_shape[1] % 16 != 0:
            return False, "needs a K that is a multiple of 16"
        model = _excluded()
        return (True, None) if model is None else (False, f"kept away from {model} by vLLM")

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        gran_mn, gran_k = self.config.weight_quant_key.scale.group_shape
        inverse = getattr(layer, "weight_scale_inv", None)
        name = "weight_scale" if inverse is None else "weight_scale_inv"
        weight, scale = layer.weight.data, getattr(layer, name).data
        if scale.dtype == torch.float32 and (exponents_of(scale) == E8M0_NAN).any():
            weight, scale = requantized(weight, scale, gran_mn, gran_k)
        # The engine multiplies such a layer itself, by einsum, with a group for each of its parts.
        parts = getattr(layer, "bmm_batch_size", 0) if getattr(layer, "is_bmm", False) else None
        if parts is not None:
            weight = weight.view(parts, -1, weight.shape[1])
            scale = scale.view(parts, -1, scale.shape[1])
        *_, n, k = weight.shape
        recipe = (1 if scale.dtype == torch.int32 else gran_mn, gran_k)
        packed = required("vllm.fp8_block", name, scale, n, k, recipe, parts)
        replace_parameter(layer, "weight", weight)
        replace_parameter(layer, name, packed)
        _stats.count("vllm.fp8_block layers loaded")

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        _stats.count("vllm.fp8_block")
        gran_k = self.config.weight_quant_key.scale.group_shape[1]
        return linear(A, B, Bs, "mxfp8", gran_k, None)


def requantized(
    weight: torch.Tensor, scale: torch.Tensor, gran_mn: int, gran_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 [N, K] with float32 block scales -> the same with powers of two, in float32 too."""
    rows = scale.repeat_interleave(gran_mn, 0)[: weight.shape[0]]
    values = weight.float() * rows.repeat_interleave(gran_k, 1)[:, : weight.shape[1]]
    data, packed = quantize(values, "mxfp8", gran_k, gran_mn)
    groups = scale.shape[1]
    unpacked = torch.ops.sm120.unpack_scales.default(packed, groups, torch.float32)
    return data, unpacked[::gran_mn].contiguous()


def make_kernels(any_gpu: bool) -> dict[str, type]:
    """{kind: kernel class}. any_gpu: let vLLM take them on other GPUs than 12.x."""

    def is_supported(cls: type, compute_capability: int | None = None) -> Answer:
        return _supported(compute_capability, any_gpu)

    def named(name: str, base: type) -> type:
        return type(name, (base,), {"is_supported": classmethod(is_supported)})

    return {
        "fp8_block": named("Sm120OpsFp8BlockLinearKernel", _Fp8Block),
        "mxfp8": named("Sm120OpsMxfp8LinearKernel", _Mxfp8),
        "mxfp4": named("Sm120OpsMxfp4LinearKernel", _MxFp4),
    }
