"""Registration of the ops: parts of `torch.ops.sm120`, one for each family.

An op has an allocating form and an `out` form, and each a CPU kernel and a fake kernel. All four
follow from what an op's file says once (Library.reference()): how its arguments are checked, what
new results look like, how given ones are checked, and what is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .. import _check

Call = dict[str, Any]  # an op's arguments by name


class _Form:
    """The schema of one form of an op."""

    def __init__(self, op: str, overload: str) -> None:
        arguments = torch._C._get_schema(f"sm120::{op}", overload).arguments
        self.names = [argument.name for argument in arguments]
        self.outputs = [argument.name for argument in arguments if argument.is_out]
        self.defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def bind(self, args: tuple[Any, ...], options: Call) -> Call:
        """torch leaves arguments out that are equal to their defaults."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **options}


def _by_name(function: Callable[..., Any]) -> Callable[[Call], Any]:
    """Calls a function with those of the arguments that it names, or all if it has `**`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return lambda call: function(**call)
    names = [p.name for p in parameters]
    return lambda call: function(**{name: call[name] for name in names if name in call})


def _new_out(call: Call) -> torch.Tensor:
    leader = next(value for value in call.values() if isinstance(value, torch.Tensor))
    return leader.new_empty(call["shape"], dtype=call["out_dtype"])


def _copy(out: torch.Tensor, result: torch.Tensor) -> None:
    if out.element_size() == 1:  # of codes: FP8, FP4 in any of its dtypes, scales
        out, result = out.view(torch.uint8), result.view(torch.uint8)
    out.copy_(result)


class Library(torch.library.Library):
    """A part of the namespace whose CPU kernels are as opaque to autograd as the CUDA kernels.

    The CPU kernels are plain PyTorch: autograd would look into them, and find gradients where
    there are none on a GPU.
    """

    def __init__(self) -> None:
        super().__init__("sm120", "FRAGMENT")

    def impl(self, op_name: Any, fn: Callable[..., Any], *args: Any, **options: Any) -> None:
        super().impl(op_name, torch.no_grad()(fn), *args, **options)

    def reference(
        self,
        op: str,
        *,
        check: Callable[..., Any],
        check_out: Callable[..., None],
        new: Callable[..., Any] | None = None,
        compute: Callable[..., Any] | None = None,
        into: Callable[..., None] | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        clear: bool = False,
    ) -> None:
        """Registers the CPU and fake kernels of `op` and `op.out`, which are defined already.

        The functions are given the op's arguments by the names that their parameters have.

        Args:
            check: checks everything but outputs; what it gives, mostly the result's shape, is the
                argument `shape` of the others.
            check_out: checks outputs, which it takes under their names in the schema.
            new: makes the results, uninitialised; default: one of `shape` and `out_dtype`, where
                the first tensor is. All of this is done with fake tensors too.
            compute, into: one of them; plain PyTorch. Either gives new results, which the `out`
                form copies, or writes to outputs.
            dtypes: what `out` may be, of an op whose allocating form has an argument `out_dtype`
                (or `dtype`): the `out` form takes that from its output.
            clear: zero new results before `into` writes to parts of them.
        """
        new_form, out_form = _Form(op, ""), _Form(op, "out")
        dtype_name = "out_dtype" if "out_dtype" in new_form.names else "dtype"
        checked, checked_out = _by_name(check), _by_name(check_out)
        make = _new_out if new is None else _by_name(new)
        computed = None if compute is None else _by_name(compute)
        write = None if into is None else _by_name(into)

        def bind(args: tuple[Any, ...], options: Call) -> Call:
            call = new_form.bind(args, options)
            return {**call, "shape": checked(call)}

        def bind_out(args: tuple[Any, ...], options: Call) -> Call:
            call = out_form.bind(args, options)
            if dtypes is not None:
                _check.require_tensor(op, "out", call["out"])
                _check.require_dtype(op, "out", call["out"], dtypes)
                call[dtype_name] = call["out"].dtype
            call["shape"] = checked(call)
            checked_out(call)
            return call

        def fake(*args: Any, **options: Any) -> Any:
            return make(bind(args, options))

        def fake_out(*args: Any, **options: Any) -> None:
            bind_out(args, options)

        def cpu(*args: Any, **options: Any) -> Any:
            call = bind(args, options)
            if computed is not None:
                return computed(call)
            assert write is not None
            results = make(call)
            tensors = results if isinstance(results, tuple) else (results,)
            if clear:
                for tensor in tensors:
                    tensor.zero_()
            write({**call, **dict(zip(out_form.outputs, tensors, strict=True))})
            return results

        def cpu_out(*args: Any, **options: Any) -> None:
            call = bind_out(args, options)
            if computed is None:
                assert write is not None
                write(call)
                return
            results = computed(call)
            tensors = results if isinstance(results, tuple) else (results,)
            for name, tensor in zip(out_form.outputs, tensors, strict=True):
                _copy(call[name], tensor)

        torch.library.register_fake(f"sm120::{op}", fake, lib=self)
        torch.library.register_fake(f"sm120::{op}.out", fake_out, lib=self)
        self.impl(op, cpu, "CPU")
        self.impl(f"{op}.out", cpu_out, "CPU")
