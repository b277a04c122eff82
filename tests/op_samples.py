"""One builder of sample inputs for every registered op, for the tests that treat all ops alike.
The builders themselves are in op_cases_gemm.py and op_cases_model.py.

A builder makes tensors by name for a number of rows, the dimension that varies, and a seed that
varies the contents: routings, lengths, tables and scales as well as data. Same rows, same shapes
and strides. `bind` says how the op is called with them, sizes taken off the tensors, so that it can
be traced with symbolic ones. No fixed size is one of the row counts that the tests begin with, as
torch.compile would take the two for the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import sm120_ops  # noqa: F401

MAX_ROWS = 160  # of packed scales, whose column stride is the same for any number of rows

Tensors = dict[str, torch.Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Random:
    """Random tensors on a device; the same for the same seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """low .. high - 1, int32."""
        x = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)
        return x.to(self.device)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def bf16(self, *shape: int) -> torch.Tensor:
        return self.floats(*shape, dtype=torch.bfloat16)

    def codes(self, *shape: int) -> torch.Tensor:
        return self.ints(0, 256, *shape).to(torch.uint8)

    def fp8(self, *shape: int) -> torch.Tensor:
        codes = self.codes(*shape)
        return torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)

    def packed(self, *shape: int) -> torch.Tensor:
        """Packed scales int32 [..., rows, words]."""
        *lead, rows, words = shape
        exponents = self.ints(120, 134, *lead, words, MAX_ROWS, 4).to(torch.uint8)
        return exponents.view(torch.int32).squeeze(-1).transpose(-1, -2)[..., :rows, :]

    def powers(self, *shape: int) -> torch.Tensor:
        return self.ints(-20, 20, *shape).float().exp2()

    def permutation(self, n: int, count: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator)[:count].int().to(self.device)

    def poison(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """An output: something that no op writes, the same for any seed."""
        raw = torch.full((torch.Size(shape).numel() * dtype.itemsize,), 0x5A, dtype=torch.uint8)
        return raw.view(dtype).view(shape).to(self.device)


@dataclass
class Case:
    make: Callable[[Random, int], Tensors]
    bind: Callable[[Tensors], Arguments]
    outputs: tuple[str, ...] = ()  # tensors that the op writes
    # Of what it gives, that which is defined; all of it by default.
    defined: Callable[[list[torch.Tensor]], list[torch.Tensor]] = list
    least: int = 2  # rows


def overload(name: str) -> torch._ops.OpOverload:
    op, _, kind = name.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.sm120, op), kind or "default")
    return found


def call(name: str, tensors: Tensors) -> list[torch.Tensor]:
    """What the op gives, or what it has written."""
    case = CASES[name]
    args, kwargs = case.bind(tensors)
    result = overload(name)(*args, **kwargs)
    if case.outputs:
        return [tensors[output] for output in case.outputs]
    return list(result) if isinstance(result, tuple | list) else [result]


def sample(name: str, device: torch.device, rows: int = 7, seed: int = 0) -> Tensors:
    return CASES[name].make(Random(device, seed), rows)


def private(name: str) -> bool:
    """Entry points for tests and benchmarks, which are no part of the API."""
    return name.startswith("_")


def registered() -> list[str]:
    """All ops of the namespace, as `op` or `op.overload`."""
    names = torch._C._dispatch_get_all_op_names()
    found = [name.removeprefix("sm120::") for name in names if name.startswith("sm120::")]
    return sorted(name for name in found if not private(name))


CASES: dict[str, Case] = {}


def both(
    name: str,
    make: Callable[[Random, int], Tensors],
    bind: Callable[[Tensors], tuple[Any, ...]],
    dtype: Callable[[Tensors], tuple[Any, ...]] = lambda t: (),
    *,
    outputs: Callable[[Random, Tensors], Tensors],
    after: Callable[[Tensors], tuple[Any, ...]] = lambda t: (),
    names: dict[str, str] | None = None,
    **options: Any,
) -> None:
    """The allocating form, bind + dtype + after, and the `out` form, bind + after and outputs."""

    def with_outputs(random: Random, rows: int) -> Tensors:
        tensors = make(random, rows)
        return {**tensors, **outputs(random, tensors)}

    written = tuple(
        outputs(Random(torch.device("cpu"), 0), make(Random(torch.device("cpu"), 0), 4))
    )
    CASES[name] = Case(make, lambda t: ((*bind(t), *dtype(t), *after(t)), {}), **options)
    options.pop("defined", None)
    CASES[f"{name}.out"] = Case(
        with_outputs,
        lambda t: ((*bind(t), *after(t)), {output: t[output] for output in written}),
        written,
        **options,
    )
