"""MXExperts, the experts of a mixture-of-experts layer in inference.

    format    weights                 tokens and hidden activations, quantised at each call
    mxfp8     MXFP8                   MXFP8
    w4a8      MXFP4                   MXFP8
    mxfp4     MXFP4                   MXFP4

Scales are as in MXLinear: one per row and `gran_k` values of K, but with MXFP8 and gran_k=128 one
per 128 x 128 block of an expert's weight; the weights of w4a8 always have gran_k=32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import _check
from ..ops.layout import align, ceil_div
from ..ops.moe import MAX_EXPERTS
from ..ops.moe_layer import Operand, moe, moe_workspace_size
from ..ops.quantize import FLOAT_DTYPES, GRANS_K, K_MULTIPLE, RULES, data_shape, quantize
from .linear import FORMATS

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"alpha": 1.0, "up_offset": 0.0, "limit": None, "interleaved": False},
    "gpt-oss": {"alpha": 1.702, "up_offset": 1.0, "limit": 7.0, "interleaved": True},
}


class MXExperts(nn.Module):
    """y[t] = sum over slots s of w[t, s] * expert(topk_ids[t, s])(x[t]), for inference.

    An expert is down @ swiglu(gate_up @ x + gate_up_bias) + down_bias. forward() takes tokens
    [..., hidden], bfloat16, float16 or float32, with topk_ids (int32 or int64) and topk_weights
    (bfloat16 or float32) [..., topk], and gives y of x's shape and dtype. A slot whose id is no
    expert, such as -1, is dropped. Five kernel launches, no host sync, and memory whose size
    follows from shapes alone: see docs/moe.md. There is no backward.

    Buffers, as in MXLinear: `gate_up` and `down` hold the bytes of the quantised data as int8, [E,
    rows, row bytes]; `gate_up_scale` and `down_scale` the packed scales of all experts as
    [words, align(E * rows, 4)], contiguous; `gate_up_bias` [E, 2 * I] and `down_bias` [E, H] are
    bfloat16 or float32. Build an MXExperts of the same arguments to load its state_dict.
    """

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_scale: torch.Tensor
    down_bias: torch.Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        bias: bool = False,
        format: str = "mxfp8",
        gran_k: int | None = None,
        activation: str = "silu",
        alpha: float | None = None,
        up_offset: float | None = None,
        limit: float | None = None,
        interleaved: bool | None = None,
        rule: str = "deepgemm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Zero weights. `dtype` is that of the biases; the others are as in from_float()."""
        super().__init__()
        op = "nn.MXExperts"
        gran_k = 32 if gran_k is None else gran_k
        _check.require_choice(op, "format", format, tuple(FORMATS))
        _check.require_choice(op, "gran_k", gran_k, GRANS_K)
        _check.require_choice(op, "activation", activation, tuple(ACTIVATIONS))
        _check.require_choice(op, "rule", rule, RULES)
        _check.require(
            1 <= num_experts <= MAX_EXPERTS, op, "num_experts", f"1 to {MAX_EXPERTS}", num_experts
        )
        multiple = max(K_MULTIPLE[f] for f in FORMATS[format])
        for arg, size in (("hidden", hidden), ("intermediate", intermediate)):
            requirement = f"a positive multiple of {multiple} for {format}"
            _check.require(size > 0 and size % multiple == 0, op, arg, requirement, size)
        given = {"alpha": alpha, "up_offset": up_offset, "limit": limit, "interleaved": interleaved}
        self.options = ACTIVATIONS[activation] | {k: v for k, v in given.items() if v is not None}
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.format, self.gran_k, self.activation, self.rule = format, gran_k, activation, rule
        self.weight_gran_k = 32 if format == "w4a8" else gran_k
        self.weight_gran_mn = 128 if format == "mxfp8" and gran_k == 128 else 1
        for name, rows, k in (
            ("gate_up", 2 * intermediate, hidden),
            ("down", hidden, intermediate),
        ):
            shape = (num_experts, *data_shape(rows, k, FORMATS[format].weight))
            words, padded = ceil_div(k, 4 * self.weight_gran_k), align(num_experts * rows, 4)
            data = torch.zeros(shape, dtype=torch.int8, device=device)
            scale = torch.zeros((words, padded), dtype=torch.int32, device=device)
            zeros = torch.zeros((num_experts, rows), dtype=dtype, device=device) if bias else None
            self.register_buffer(name, data)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_bias", zeros)

    @classmethod
    def from_float(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        format: str = "mxfp8",
        gran_k: int | None = None,
        activation: str = "silu",
        alpha: float | None = None,
        up_offset: float | None = None,
        limit: float | None = None,
        interleaved: bool | None = None,
        rule: str = "deepgemm",
    ) -> MXExperts:
        """Quantises the weights, expert by expert.

        Args:
            gate_up: [E, 2 * I, H], bfloat16, float16 or float32, on any device; rows are gates and
                then ups, or with `interleaved` gate, up, gate, up ... A view is fine: transformers
                keeps gpt-oss's gate_up_proj as [E, H, 2 * I], so give its .transpose(1, 2).
            down: [E, H, I], likewise. H and I: multiples of 16 for "mxfp8", else of 32.
            gate_up_bias: [E, 2 * I]; down_bias: [E, H]; both or neither. bfloat16 and float32 are
                kept, float16 becomes float32.
            format: "mxfp8", "w4a8" or "mxfp4".
            gran_k: values along K that share a scale, 32 (default) or 128.
            activation: "silu" or "gpt-oss", which set the four options after it.
            alpha, up_offset, limit, interleaved: of moe_activation(), where they differ from that:
                DeepSeek-V4 is "silu" with limit=swiglu_limit.
            rule: scale rule of quantize(), for the weights. Activations take "deepgemm".
        """
        op = "nn.MXExperts"
        for arg, weight in (("gate_up", gate_up), ("down", down)):
            _check.require_tensor(op, arg, weight, rank=3)
            _check.require_dtype(op, arg, weight, FLOAT_DTYPES)
        experts, hidden, intermediate = down.shape
        if tuple(gate_up.shape) != (experts, 2 * intermediate, hidden):
            requirement = (
                f"shape [{experts}, {2 * intermediate}, {hidden}] for down {list(down.shape)}"
            )
            _check.fail(op, "gate_up", requirement, gate_up.shape)
        if (gate_up_bias is None) != (down_bias is None):
            _check.fail(op, "down_bias", "a bias beside gate_up_bias, or neither", "one alone")
        module = cls(
            experts,
            hidden,
            intermediate,
            gate_up_bias is not None,
            format,
            gran_k,
            activation,
            alpha,
            up_offset,
            limit,
            interleaved,
            rule,
            device=down.device,
            dtype=_bias_dtype(gate_up_bias, down_bias),
        )
        biases = {"gate_up": gate_up_bias, "down": down_bias}
        for name, weight in (("gate_up", gate_up), ("down", down)):
            for expert in range(experts):
                module.quantize_expert(name, expert, weight[expert].detach())
            bias = biases[name]
            if bias is not None:
                shape = weight.shape[:2]
                if bias.shape != shape:
                    _check.fail(op, f"{name}_bias", f"shape {list(shape)}", bias.shape)
                module.get_buffer(f"{name}_bias").copy_(bias.detach())
        return module.eval()

    @torch.no_grad()
    def quantize_expert(self, name: str, expert: int, weight: torch.Tensor) -> None:
        """Puts one expert's float weight [rows, K] in place; `name` is "gate_up" or "down"."""
        data, scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        rows = data.shape[1]
        one, one_scale = quantize(
            weight.contiguous(),
            FORMATS[self.format].weight,
            self.weight_gran_k,
            self.weight_gran_mn,
            self.rule,
        )
        data[expert] = one.view(torch.int8)
        scale[:, expert * rows : (expert + 1) * rows] = one_scale.t()

    def weights(self, name: str) -> Operand:
        """(data, scale) of "gate_up" or "down" as moe() takes them: views of the buffers."""
        data, scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        rows = data.shape[1]
        dtype = torch.float8_e4m3fn if FORMATS[self.format].weight == "mxfp8" else torch.uint8
        packed = scale.t()[: self.num_experts * rows].unflatten(0, (self.num_experts, rows))
        return data.view(dtype), packed

    def workspace_size(self, tokens: int, topk: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of workspace for up to `tokens` tokens of `dtype`."""
        shape = (tokens, topk, self.num_experts, self.hidden, self.intermediate)
        return moe_workspace_size(*shape, FORMATS[self.format].input, self.gran_k, dtype)

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        workspace: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """y, of x's shape. `workspace`: as in moe(); `out_dtype`: default x's."""
        op = "nn.MXExperts"
        _check.require_tensor(op, "x", x)
        _check.require_dtype(op, "x", x, FLOAT_DTYPES)
        if x.dim() == 0 or x.shape[-1] != self.hidden:
            _check.fail(op, "x", f"shape [..., {self.hidden}]", x.shape)
        for arg, slots in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            _check.require_tensor(op, arg, slots)
            if slots.dim() != x.dim() or slots.shape[:-1] != x.shape[:-1]:
                _check.fail(op, arg, f"shape {[*x.shape[:-1], 'topk']}", slots.shape)
        _check.require_no_grad(op, x=x, topk_weights=topk_weights)
        _check.require_same_device(op, "gate_up", gate_up=self.gate_up, x=x)
        y = moe(
            x.reshape(-1, self.hidden).contiguous(),
            topk_ids.reshape(-1, topk_ids.shape[-1]).contiguous(),
            topk_weights.reshape(-1, topk_weights.shape[-1]).contiguous(),
            self.weights("gate_up"),
            self.weights("down"),
            format=FORMATS[self.format].input,
            gran_k=self.gran_k,
            weight_gran_k=self.weight_gran_k,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            out_dtype=out_dtype,
            workspace=workspace,
            **self.options,
        )
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        options = {k: v for k, v in self.options.items() if v != ACTIVATIONS[self.activation][k]}
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden}, "
            f"intermediate={self.intermediate}, bias={self.down_bias is not None}, "
            f"format={self.format}, gran_k={self.gran_k}, activation={self.activation}"
            + "".join(f", {key}={value}" for key, value in options.items())
        )


def _bias_dtype(*biases: torch.Tensor | None) -> torch.dtype | None:
    dtypes = {bias.dtype for bias in biases if bias is not None}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
