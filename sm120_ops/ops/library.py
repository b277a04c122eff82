"""Registration of the ops: parts of `torch.ops.sm120`, one for each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Library(torch.library.Library):
    """A part of the namespace whose CPU kernels are as opaque to autograd as the CUDA kernels.

    The CPU kernels are plain PyTorch: autograd would look into them, and find gradients where
    there are none on a GPU.
    """

    def __init__(self) -> None:
        super().__init__("sm120", "FRAGMENT")

    def impl(self, op_name: Any, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
        super().impl(op_name, torch.no_grad()(fn), *args, **options)
