"""The activation between the two grouped GEMMs of a mixture-of-experts layer.

SwiGLU of a gate g and an up u, with the bias of the row's expert added to both first:

    g = min(g, limit), u = max(min(u, limit), -limit)            where a limit is given
    h = g * sigmoid(alpha * g) * (u + up_offset)

    SiLU (Llama, DeepSeek-V3)    alpha 1, up_offset 0
    DeepSeek-V4                  the same with limit = swiglu_limit
    gpt-oss                      alpha 1.702, up_offset 1, limit 7, interleaved
                                 (GptOssExperts in transformers' modeling_gpt_oss)

A NaN gate or up gives NaN, through any limit. h is quantised by the rule `deepgemm` of quantize().
The CPU kernel computes h in float64 and rounds it to float32; the CUDA kernel computes in float32,
within a relative 2^-18, so that a code may differ where h lies that close to a rounding boundary.
"""

from __future__ import annotations

import torch

from .. import _check
from .layout import TAGS, align
from .library import Library
from .moe import (
    ALIGNMENTS,
    STEP_DTYPES,
    check_dense,
    check_format,
    check_quantized,
    empty_quantized,
)

_lib = Library()
_ACTIVATION = (
    "Tensor gate_up, Tensor group_ends, str format, int gran_k, int alignment, Tensor? bias=None,"
    " float alpha=1.0, float up_offset=0.0, float? limit=None, bool interleaved=False"
)
_lib.define(f"moe_activation({_ACTIVATION}) -> (Tensor, Tensor)", tags=TAGS)
_lib.define(
    f"moe_activation.out({_ACTIVATION}, *, Tensor(a!) out, Tensor(b!) out_scale) -> ()", tags=TAGS
)


def _check_activation(
    gate_up: torch.Tensor,
    group_ends: torch.Tensor,
    format: str,
    gran_k: int,
    alignment: int,
    bias: torch.Tensor | None,
    limit: float | None,
) -> tuple[int, int]:
    """Gives the shape of the result."""
    op = "moe_activation"
    check_dense(op, "gate_up", gate_up, 2)
    _check.require_dtype(op, "gate_up", gate_up, STEP_DTYPES)
    if gate_up.shape[1] % 2 != 0:
        _check.fail(op, "gate_up", "an even number of columns", gate_up.shape)
    check_format(op, "gate_up", format, gran_k, gate_up.shape[1] // 2)
    _check.require_choice(op, "alignment", alignment, ALIGNMENTS)
    _check.require_tensor(op, "group_ends", group_ends, rank=1)
    _check.require_dtype(op, "group_ends", group_ends, (torch.int32,))
    if bias is not None:
        check_dense(op, "bias", bias, 2)
        _check.require_dtype(op, "bias", bias, STEP_DTYPES)
        shape = (group_ends.shape[0], gate_up.shape[1])
        if bias.shape[0] != shape[0] or bias.shape[1] != shape[1]:
            _check.fail(op, "bias", f"shape {list(shape)}", bias.shape)
    if limit is not None and not limit > 0:
        _check.fail(op, "limit", "a positive number or None", limit)
    _check.require_same_device(op, "gate_up", gate_up=gate_up, group_ends=group_ends, bias=bias)
    return gate_up.shape[0], gate_up.shape[1] // 2


def _check_activation_out(
    out: torch.Tensor,
    out_scale: torch.Tensor,
    shape: tuple[int, int],
    gate_up: torch.Tensor,
    group_ends: torch.Tensor,
    format: str,
    gran_k: int,
    bias: torch.Tensor | None,
) -> None:
    op = "moe_activation"
    check_quantized(op, *shape, format, gran_k, out, out_scale)
    outputs = {"out": out, "out_scale": out_scale}
    _check.require_same_device(op, "gate_up", gate_up=gate_up, **outputs)
    for name, output in outputs.items():
        _check.require_no_overlap(
            op, name, output, gate_up=gate_up, group_ends=group_ends, bias=bias
        )


def _live_rows(
    group_ends: torch.Tensor, alignment: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in groups, and the group of each, from ends on the CPU."""
    rows, groups, start = [], [], 0
    for group, end in enumerate(group_ends.tolist()):
        here = torch.arange(start, max(min(end, num_rows), start))
        rows.append(here)
        groups.append(torch.full_like(here, group))
        start = align(end, alignment)
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty, *rows]), torch.cat([empty, *groups])


def swiglu(
    gate_up: torch.Tensor,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """The formula at the head of this file, [..., 2 * I] -> [..., I], in the dtype of gate_up."""
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else gate_up.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + up_offset)


def _activation_into(
    out: torch.Tensor,
    out_scale: torch.Tensor,
    gate_up: torch.Tensor,
    group_ends: torch.Tensor,
    format: str,
    gran_k: int,
    alignment: int,
    bias: torch.Tensor | None,
    alpha: float,
    up_offset: float,
    limit: float | None,
    interleaved: bool,
) -> None:
    rows, groups = _live_rows(group_ends, alignment, gate_up.shape[0])
    values = gate_up[rows].double()
    if bias is not None:
        values += bias[groups].double()
    h = swiglu(values, alpha, up_offset, limit, interleaved).float()
    data, scale = torch.ops.sm120.quantize(h, format, gran_k)
    out.view(torch.uint8)[rows] = data.view(torch.uint8)
    out_scale[rows] = scale


def _new_activation(
    gate_up: torch.Tensor, format: str, gran_k: int, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = shape
    return empty_quantized(gate_up, rows, k, format, gran_k)


_lib.reference(
    "moe_activation",
    check=_check_activation,
    check_out=_check_activation_out,
    new=_new_activation,
    into=_activation_into,
    clear=True,
)


def moe_activation(
    gate_up: torch.Tensor,
    group_ends: torch.Tensor,
    format: str = "mxfp8",
    gran_k: int = 32,
    alignment: int = 16,
    bias: torch.Tensor | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU of the rows in groups, quantised. See the head of this file for the formula.

    Args:
        gate_up: [M, 2 * K], bfloat16 or float32, contiguous: the gates and then the ups, or with
            `interleaved` gate, up, gate, up ... K % 16 == 0 for "mxfp8", 32 for "mxfp4".
        group_ends, alignment: the groups, as in moe_route(). Rows outside them are left alone, and
            rows from M on do not exist: ends beyond M end there.
        format, gran_k: as in quantize().
        bias: [groups, 2 * K], bfloat16 or float32, columns as those of gate_up.
        alpha, up_offset, limit: of the formula.

    Returns:
        (data, scale) as quantize() gives them, M rows; those outside groups are uninitialised.
    """
    if not torch.compiler.is_compiling():
        _check_activation(gate_up, group_ends, format, gran_k, alignment, bias, limit)
    _check.require_no_grad("moe_activation", gate_up=gate_up, bias=bias)
    return torch.ops.sm120.moe_activation.default(
        gate_up, group_ends, format, gran_k, alignment, bias, alpha, up_offset, limit, interleaved
    )
