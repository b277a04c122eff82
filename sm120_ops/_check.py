"""Argument checks with one error text: `sm120_ops.<op>: <arg>: expected <requirement>, got <got>`.

The checks run in three places: in the public wrappers, in the CPU kernels (for users of the raw
`torch.ops.sm120`) and in the fake kernels, where sizes may be symbolic. They therefore compare
strides before they compare sizes with 0 or 1: the latter would tie a compiled graph to a size.
"""

from __future__ import annotations

import numbers
from typing import NoReturn

import torch


def message(op: str, arg: str, requirement: object, got: object) -> str:
    return f"sm120_ops.{op}: {arg}: expected {requirement}, got {describe(got)}"


def describe(got: object) -> str:
    if isinstance(got, torch.Tensor):
        return f"{got.dtype} {list(got.shape)} with strides {list(got.stride())} on {got.device}"
    if isinstance(got, torch.Size):
        return str(list(got))
    return str(got)


def fail(op: str, arg: str, requirement: object, got: object) -> NoReturn:
    raise ValueError(message(op, arg, requirement, got))


def fail_type(op: str, arg: str, requirement: object, got: object) -> NoReturn:
    raise TypeError(message(op, arg, requirement, got))


def require(ok: object, op: str, arg: str, requirement: object, got: object) -> None:
    """ValueError unless `ok`. `got` is formatted only then, so pass the object, not its text."""
    if not ok:
        fail(op, arg, requirement, got)


def require_tensor(op: str, arg: str, value: object, *, rank: int | None = None) -> None:
    if not isinstance(value, torch.Tensor):
        fail_type(op, arg, "a torch.Tensor", type(value).__name__)
    if rank is not None and value.dim() != rank:
        fail(op, arg, f"{rank} dimensions", value.shape)


def require_dtype(op: str, arg: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes[:-1])
        requirement = f"{names} or {dtypes[-1]}" if names else str(dtypes[-1])
        fail_type(op, arg, f"dtype {requirement}", tensor.dtype)


def output_dtype(
    op: str,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    *,
    c: torch.Tensor | None = None,
    default: torch.dtype = torch.bfloat16,
) -> torch.dtype:
    """The dtype of a result, one of ``dtypes``: that of ``out``, which ``out_dtype`` must not
    contradict; without ``out`` it is ``out_dtype``, or else that of ``c``, or else the default.
    """
    if out is not None:
        require_tensor(op, "out", out)
        require_dtype(op, "out", out, dtypes)
        if out_dtype is not None and out.dtype != out_dtype:
            fail_type(op, "out", f"dtype {out_dtype} (out_dtype)", out.dtype)
        return out.dtype
    if out_dtype is not None:
        require_choice(op, "out_dtype", out_dtype, dtypes)
        return out_dtype
    if c is None:
        return default
    require_tensor(op, "c", c)
    require_dtype(op, "c", c, dtypes)
    return c.dtype


def require_choice(op: str, arg: str, value: object, choices: tuple[object, ...]) -> None:
    # Of these types, since 32.0 equals 32, and an array compared with it is neither true nor false.
    plain = type(value) in (int, str, torch.dtype) or isinstance(value, numbers.Integral)
    if not plain or value not in choices:
        names = ", ".join(repr(choice) for choice in choices[:-1])
        fail(op, arg, f"{names} or {choices[-1]!r}", repr(value))


def require_number(op: str, arg: str, value: object, *, integer: bool = False) -> None:
    """A number, NumPy's and symbolic ones included."""
    whole = (int, numbers.Integral, torch.SymInt)
    if not isinstance(value, whole if integer else (*whole, numbers.Real, torch.SymFloat)):
        fail_type(op, arg, "an int" if integer else "a number", type(value).__name__)


def require_same_device(op: str, first: str, **tensors: torch.Tensor | None) -> None:
    """All tensors on the device of the one named `first`."""
    leader = tensors[first]
    assert leader is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != leader.device:
            fail(op, name, f"a tensor on {leader.device}, as {first}", f"one on {tensor.device}")


def require_no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """Each a tensor that needs no gradient, or None.

    The ops have no backward; an output that silently cuts the graph would be a trap.
    """
    grad_mode = torch.is_grad_enabled()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        require_tensor(op, name, tensor)
        if grad_mode and tensor.requires_grad:
            raise RuntimeError(
                message(
                    op,
                    name,
                    "a tensor that needs no gradient (the op is for inference only: call it "
                    "under torch.no_grad() or torch.inference_mode(), or detach() its input)",
                    "requires_grad=True with grad mode on",
                )
            )


def has_address(tensor: torch.Tensor) -> bool:
    """False for fake, functional and meta tensors, which have no memory to ask about."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and tensor.device.type != "meta"


def require_aligned(op: str, arg: str, tensor: torch.Tensor, alignment: int = 16) -> None:
    if has_address(tensor) and tensor.data_ptr() % alignment != 0:
        fail(op, arg, f"a {alignment}-byte aligned data pointer", hex(tensor.data_ptr()))


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses [begin, end) that the elements span; empty for a tensor without elements."""
    if tensor.numel() == 0:
        return (0, 0)
    span = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        span += (size - 1) * stride
    begin = tensor.data_ptr()
    return (begin, begin + span * tensor.element_size())


def _disjoint_columns(x: torch.Tensor, y: torch.Tensor) -> bool:
    """True for two matrices that are disjoint column slices of one row-major buffer."""
    row = x.stride(0) * x.element_size()
    if row <= 0 or row != y.stride(0) * y.element_size():
        return False
    offset = (y.data_ptr() - x.data_ptr()) % row
    x_width, y_width = x.shape[1] * x.element_size(), y.shape[1] * y.element_size()
    return offset >= x_width and offset + y_width <= row


def require_no_overlap(op: str, arg: str, out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """ValueError unless the elements of `out` surely share no memory with an input's."""
    if not has_address(out):
        return
    begin, end = byte_range(out)
    for name, tensor in inputs.items():
        if tensor is None or not has_address(tensor):
            continue
        other_begin, other_end = byte_range(tensor)
        if begin >= other_end or other_begin >= end:
            continue
        matrices = out.dim() == 2 and tensor.dim() == 2
        if matrices and out.stride(1) == tensor.stride(1) == 1 and _disjoint_columns(out, tensor):
            continue
        fail(op, arg, f"memory apart from {name}", "overlapping memory")
