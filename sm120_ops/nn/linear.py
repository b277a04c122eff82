"""MXLinear, a drop-in for nn.Linear in inference, and convert() for whole models.

    format    weight                  input, quantised at each call
    mxfp8     MXFP8                   MXFP8
    w4a8      MXFP4                   MXFP8
    mxfp4     MXFP4                   MXFP4

Weights and inputs have one scale per row and `gran_k` values of K, with two exceptions: MXFP8 with
gran_k=128 has 128 x 128 weight blocks, and the weights of w4a8 always have gran_k=32. Where
in_features is no multiple of 16 (of 32 with an MXFP4 operand), K is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .. import _check
from ..ops.gemm import gemm
from ..ops.layout import align, ceil_div
from ..ops.quantize import FLOAT_DTYPES, GRANS_K, K_MULTIPLE, RULES, data_shape, quantize


class _Format(NamedTuple):
    weight: str
    input: str


FORMATS = {
    "mxfp8": _Format("mxfp8", "mxfp8"),
    "w4a8": _Format("mxfp4", "mxfp8"),
    "mxfp4": _Format("mxfp4", "mxfp4"),
}


class MXLinear(nn.Module):
    """y = x @ weight.T + bias with quantised weight and input, for inference.

    x is [..., in_features], bfloat16, float16 or float32, and y [..., out_features] has its dtype.
    The bias is added to the float32 sums, before they are rounded once. There is no backward: with
    grad mode on, an input that requires grad is a RuntimeError.

    Buffers: `weight` holds the bytes of the quantised data, [out_features, row bytes]; as int8,
    which `module.to(dtype)` leaves alone, and which model code that looks at weight.dtype takes for
    a quantised layer. `weight_scale` holds the packed scales as [words, align(out_features, 4)],
    contiguous, so that copies keep their layout. `bias` is as in nn.Linear. Build an MXLinear of
    the same arguments to load its state_dict.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "mxfp8",
        gran_k: int | None = None,
        rule: str = "deepgemm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Zero weights. `dtype` is that of the bias; the others are as in from_float()."""
        super().__init__()
        gran_k = 32 if gran_k is None else gran_k
        _check.require_choice("nn.MXLinear", "format", format, tuple(FORMATS))
        _check.require_choice("nn.MXLinear", "gran_k", gran_k, GRANS_K)
        _check.require_choice("nn.MXLinear", "rule", rule, RULES)
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.gran_k = gran_k
        self.rule = rule
        formats = FORMATS[format]
        self.padded_k = align(in_features, max(K_MULTIPLE[f] for f in formats))
        self.weight_gran_k = 32 if format == "w4a8" else gran_k
        self.weight_gran_mn = 128 if format == "mxfp8" and gran_k == 128 else 1
        shape = data_shape(out_features, self.padded_k, formats.weight)
        words = ceil_div(self.padded_k, 4 * self.weight_gran_k)
        rows = align(out_features, 4)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer(
            "weight_scale", torch.zeros((words, rows), dtype=torch.int32, device=device)
        )
        self.register_buffer(
            "bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        )

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        format: str = "mxfp8",
        gran_k: int | None = None,
        rule: str = "deepgemm",
    ) -> MXLinear:
        """Quantises the weight of a linear layer.

        Args:
            linear: the layer, of dtype bfloat16, float16 or float32, on any device.
            format: "mxfp8", "w4a8" or "mxfp4".
            gran_k: values along K that share a scale, 32 (default) or 128.
            rule: scale rule of quantize(), for weight and input.
        """
        weight = linear.weight.detach()
        _check.require_dtype("nn.MXLinear", "linear.weight", weight, FLOAT_DTYPES)
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            format=format,
            gran_k=gran_k,
            rule=rule,
            device=weight.device,
            dtype=weight.dtype if linear.bias is None else linear.bias.dtype,
        )
        data, scale = quantize(
            functional.pad(weight, (0, module.padded_k - module.in_features)).contiguous(),
            FORMATS[format].weight,
            module.weight_gran_k,
            module.weight_gran_mn,
            rule,
        )
        module.weight.copy_(data.view(torch.int8))
        module.weight_scale[:, : module.out_features] = scale.t()
        if module.bias is not None:
            module.bias.copy_(linear.bias.detach())
        return module.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check.require_tensor("nn.MXLinear", "x", x)
        _check.require_dtype("nn.MXLinear", "x", x, FLOAT_DTYPES)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            _check.fail("nn.MXLinear", "x", f"shape [..., {self.in_features}]", x.shape)
        _check.require_no_grad("nn.MXLinear", x=x)
        _check.require_same_device("nn.MXLinear", "weight", weight=self.weight, x=x)
        formats = FORMATS[self.format]
        rows = x.reshape(-1, self.in_features)
        if self.padded_k != self.in_features:
            rows = functional.pad(rows, (0, self.padded_k - self.in_features))
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        weight = self.weight.view(torch.float8_e4m3fn if formats.weight == "mxfp8" else torch.uint8)
        out_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        bias = self.bias
        y = gemm(
            quantize(rows, formats.input, self.gran_k, rule=self.rule),
            (weight, self.weight_scale.t()[: self.out_features]),
            gran_k_a=self.gran_k,
            gran_k_b=self.weight_gran_k,
            out_dtype=out_dtype,
            c=None if bias is None else bias.to(out_dtype).expand(rows.shape[0], -1),
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, gran_k={self.gran_k}"
        )


def convert(
    model: nn.Module,
    format: str = "mxfp8",
    filter: Callable[[str, nn.Module], bool] | None = None,
    gran_k: int | None = None,
    rule: str = "deepgemm",
) -> nn.Module:
    """Replaces the nn.Linear layers of a model by MXLinear, in place.

    Subclasses of nn.Linear stay: their owners mostly use their weight in other ways (the
    out_proj of nn.MultiheadAttention is one). A layer that stands in several places is converted
    once; a weight tied to an embedding is copied, and the embedding keeps its precision.

    Args:
        model: any module.
        format, gran_k, rule: as in MXLinear.from_float().
        filter: filter(name, linear) decides which layers to convert; default all. A layer that
            stands in several places is asked about under its first name.

    Returns:
        The model; a new MXLinear if it is itself an nn.Linear.
    """
    _check.require_choice("nn.convert", "format", format, tuple(FORMATS))
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (filter is None or filter(name, module)):
            replacements[module] = MXLinear.from_float(module, format, gran_k, rule)
    if model in replacements:
        return replacements[model]
    for parent in model.modules():
        children = [(name, child) for name, child in parent._modules.items() if child is not None]
        for name, child in children:
            if child in replacements:
                setattr(parent, name, replacements[child])
    if replacements:
        for module in model.modules():
            _avoid_fused_path(module)
    return model


def _avoid_fused_path(module: nn.Module) -> None:
    """Keeps torch's own encoder from reading linear1.weight past the module in inference."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
