"""Comparisons."""

from __future__ import annotations

from typing import Any

import torch


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> Any:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in float64; 0 for two tensors of zeros."""
    x, y = x.double(), y.double()
    norms = (x * x + y * y).sum()
    return 0.0 if norms == 0 else 1 - 2 * (x * y).sum() / norms


def count_bytes(*tensors: Any) -> int:
    """Bytes of all tensors in nested tuples and lists; None counts nothing."""
    total = 0
    for item in tensors:
        if isinstance(item, tuple | list):
            total += count_bytes(*item)
        elif item is not None:
            total += item.numel() * item.element_size()
    return total


def assert_bitwise_equal(x: torch.Tensor, y: torch.Tensor, label: str = "") -> None:
    """AssertionError that names the first element that differs."""
    assert x.shape == y.shape, f"{label}: shapes {list(x.shape)} and {list(y.shape)}"
    assert x.dtype == y.dtype, f"{label}: dtypes {x.dtype} and {y.dtype}"
    size = x.element_size()
    bytes_x = x.contiguous().view(-1).view(torch.uint8).view(-1, size)
    bytes_y = y.contiguous().view(-1).view(torch.uint8).view(-1, size)
    differs = (bytes_x != bytes_y).any(1).nonzero()
    if differs.shape[0] > 0:
        first = int(differs[0])
        got, wanted = bytes_x[first].tolist(), bytes_y[first].tolist()
        count = differs.shape[0]
        raise AssertionError(f"{label}: {count} elements differ, first {first}: {got}, {wanted}")
