"""One builder of sample inputs for every registered op, for the tests that treat all ops alike.

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

import sm120_ops

N, K = 48, 256
EXPERTS, TOPK = 4, 2
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


# ---- quantize, layout ----------------------------------------------------------------------------

both(
    "quantize",
    lambda r, rows: {"x": r.floats(rows, K)},
    lambda t: (t["x"], "mxfp8", 32, 1, "deepgemm"),
    outputs=lambda r, t: {
        "out": r.poison(t["x"].shape[0], K, dtype=torch.float8_e4m3fn),
        "out_scale": r.packed(t["x"].shape[0], K // 128),
    },
)
both(
    "dequantize",
    lambda r, rows: {"data": r.fp8(rows, K), "scale": r.packed(rows, K // 128)},
    lambda t: (t["data"], t["scale"], 32),
    lambda t: (torch.bfloat16,),
    outputs=lambda r, t: {"out": r.poison(t["data"].shape[0], K, dtype=torch.bfloat16)},
)
# One word a row: Dynamo traces no call whose only output is a tensor that is not contiguous.
both(
    "pack_scales",
    lambda r, rows: {"scale": r.powers(rows, 4)},
    lambda t: (t["scale"], t["scale"].shape[0], 1),
    outputs=lambda r, t: {"out": r.packed(t["scale"].shape[0], 1)},
)
both(
    "unpack_scales",
    lambda r, rows: {"scale": r.packed(rows, 2)},
    lambda t: (t["scale"], 6),
    lambda t: (torch.float32,),
    outputs=lambda r, t: {"out": r.poison(t["scale"].shape[0], 6, dtype=torch.float32)},
)
both(
    "pack_fp4",
    lambda r, rows: {"codes": r.codes(rows, K) & 15},
    lambda t: (t["codes"],),
    outputs=lambda r, t: {"out": r.poison(t["codes"].shape[0], K // 2, dtype=torch.uint8)},
)
both(
    "unpack_fp4",
    lambda r, rows: {"packed": r.codes(rows, K // 2)},
    lambda t: (t["packed"],),
    outputs=lambda r, t: {"out": r.poison(t["packed"].shape[0], K, dtype=torch.uint8)},
)
both(
    "transpose_fp4",
    lambda r, rows: {"packed": r.codes(64, rows)},
    lambda t: (t["packed"],),
    outputs=lambda r, t: {"out": r.poison(2 * t["packed"].shape[1], 32, dtype=torch.uint8)},
)


# ---- gemm, grouped -------------------------------------------------------------------------------


def gemm_inputs(r: Random, rows: int) -> Tensors:
    return {
        "a": r.fp8(rows, K),
        "sfa": r.packed(rows, K // 128),
        "b": r.codes(N, K // 2),
        "sfb": r.packed(N, 1),
        "c": r.floats(rows, N),
    }


both(
    "gemm",
    gemm_inputs,
    lambda t: (t["a"], t["sfa"], t["b"], t["sfb"], 32, 128),
    lambda t: (torch.float32,),
    after=lambda t: (t["c"], []),
    outputs=lambda r, t: {"out": r.poison(t["a"].shape[0], N, dtype=torch.float32)},
)


def expert_inputs(r: Random, rows: int, *lead: int) -> Tensors:
    return {
        "a": r.fp8(*lead, rows, K),
        "sfa": r.packed(*lead, rows, K // 128),
        "b": r.codes(EXPERTS, N, K // 2),
        "sfb": r.packed(EXPERTS, N, K // 128),
    }


def contiguous_inputs(r: Random, rows: int) -> Tensors:
    """Segments of 16 rows with an expert (or none) each, padded after a few of them."""
    experts = r.ints(-1, EXPERTS, -(-rows // 16)).repeat_interleave(16)[:rows]
    filled = r.ints(0, 17, -(-rows // 16)).repeat_interleave(16)[:rows]
    within = torch.arange(rows, device=r.device) % 16
    indices = torch.where(within < filled, experts, -1)
    return {**expert_inputs(r, rows), "m_indices": indices}


def psum_inputs(r: Random, rows: int) -> Tensors:
    ends, end = [], 0
    for size in r.ints(0, rows // 2 + 2, EXPERTS).tolist():
        start = -(-end // 16) * 16
        end = min(start + size, rows) if start < rows else end
        ends.append(end)
    group_ends = torch.tensor(ends, dtype=torch.int32, device=r.device)
    return {**expert_inputs(r, rows), "group_ends": group_ends}


def masked_inputs(r: Random, rows: int) -> Tensors:
    return {**expert_inputs(r, rows, EXPERTS), "masked_m": r.ints(0, rows + 1, EXPERTS)}


for _name, _make, _index, _after in (
    ("grouped_gemm", contiguous_inputs, "m_indices", (16,)),
    ("grouped_gemm_psum", psum_inputs, "group_ends", (16, 8)),
    ("grouped_gemm_masked", masked_inputs, "masked_m", (8,)),
):
    both(
        _name,
        _make,
        lambda t, i=_index: (t["a"], t["sfa"], t["b"], t["sfb"], t[i], 32, 32),  # type: ignore[misc]
        lambda t: (torch.bfloat16,),
        after=lambda t, a=_after: a,  # type: ignore[misc]
        outputs=lambda r, t: {"out": r.poison(*t["a"].shape[:-1], N, dtype=torch.bfloat16)},
    )


# ---- hc_prenorm ----------------------------------------------------------------------------------

both(
    "hc_prenorm",
    lambda r, rows: {"x": r.bf16(rows, K), "fn": r.floats(24, K)},
    lambda t: (t["x"], t["fn"], 2, None),
    outputs=lambda r, t: {
        "d": r.poison(2, t["x"].shape[0], 24, dtype=torch.float32),
        "sqr_sum": r.poison(2, t["x"].shape[0], dtype=torch.float32),
    },
)


# ---- mqa -----------------------------------------------------------------------------------------

HEADS, DIM, KEYS, BLOCK = 16, 64, 96, 16


def ragged_inputs(r: Random, rows: int) -> Tensors:
    starts = r.ints(0, KEYS // 2, rows)
    return {
        "q": r.fp8(rows, HEADS, DIM),
        "k": r.fp8(KEYS, DIM),
        "k_scale": r.powers(KEYS),
        "weights": r.floats(rows, HEADS),
        "starts": starts,
        "ends": starts + r.ints(0, KEYS // 2, rows),
    }


def cache(r: Random, blocks: int) -> torch.Tensor:
    """Pages of FP8 data and float32 scales."""
    data = r.fp8(blocks, BLOCK * DIM).view(torch.uint8)
    scales = r.powers(blocks, BLOCK).view(torch.uint8)
    return torch.cat((data, scales), 1).view(blocks, BLOCK, 1, DIM + 4)


def paged_inputs(r: Random, rows: int) -> Tensors:
    tensors = {
        "q": r.fp8(rows, 1, HEADS, DIM),
        "kv_cache": cache(r, 40),
        "weights": r.floats(rows, HEADS),
        "context_lens": r.ints(0, 4 * BLOCK + 1, rows, 1),
        "block_table": r.ints(0, 40, rows, 4),
    }
    lens = tensors["context_lens"]
    return {**tensors, "metadata": torch.ops.sm120.paged_mqa_metadata.default(lens, 3)}


both(
    "mqa_logits",
    ragged_inputs,
    lambda t: (t["q"], None, t["k"], t["k_scale"], t["weights"], t["starts"], t["ends"]),
    outputs=lambda r, t: {"out": r.poison(t["q"].shape[0], KEYS, dtype=torch.float32)},
)
CASES["mqa_logits"].bind = lambda t: (
    (t["q"], None, t["k"], t["k_scale"], t["weights"], t["starts"], t["ends"], 0, True,
     torch.float32),
    {},
)  # fmt: skip
CASES["mqa_logits.out"].bind = lambda t: (
    (t["q"], None, t["k"], t["k_scale"], t["weights"], t["starts"], t["ends"], False, False),
    {"out": t["out"]},
)
both(
    "paged_mqa_logits",
    paged_inputs,
    lambda t: (t["q"], None, t["kv_cache"], t["weights"], t["context_lens"], t["block_table"]),
    outputs=lambda r, t: {"out": r.poison(t["q"].shape[0], 4 * BLOCK + 3, dtype=torch.float32)},
)
CASES["paged_mqa_logits"].bind = lambda t: (
    (t["q"], None, t["kv_cache"], t["weights"], t["context_lens"], t["block_table"],
     4 * BLOCK + 3, None, None, True, torch.float32),
    {},
)  # fmt: skip
CASES["paged_mqa_logits.out"].bind = lambda t: (
    (t["q"], None, t["kv_cache"], t["weights"], t["context_lens"], t["block_table"], t["metadata"],
     None, False),
    {"out": t["out"]},
)  # fmt: skip
both(
    "paged_mqa_metadata",
    lambda r, rows: {"context_lens": r.ints(0, 5000, rows, 2)},
    lambda t: (t["context_lens"],),
    lambda t: (5,),
    outputs=lambda r, t: {"out": r.poison(6, 2, dtype=torch.int32)},
)
both(
    "indexer_topk",
    lambda r, rows: {"logits": r.floats(rows, 100), "ends": r.ints(0, 101, rows)},
    lambda t: (t["logits"], None, t["ends"], 8),
    outputs=lambda r, t: {"out": r.poison(t["logits"].shape[0], 8, dtype=torch.int32)},
)
CASES["mqa_cache_write"] = Case(
    lambda r, rows: {
        "k": r.bf16(rows, DIM),
        "slots": r.permutation(40 * BLOCK, rows),
        "kv_cache": cache(r, 40),
    },
    lambda t: ((t["k"], t["slots"], t["kv_cache"], "mxfp8"), {}),
    ("kv_cache",),
)


# ---- moe -----------------------------------------------------------------------------------------

HIDDEN, INTERMEDIATE = 96, 32


def route_inputs(r: Random, rows: int) -> Tensors:
    return {"x": r.bf16(rows, HIDDEN), "topk_ids": r.ints(-1, EXPERTS, rows, TOPK)}


def capacity(tokens: Any) -> Any:
    return sm120_ops.moe_capacity(TOPK * tokens, EXPERTS, 16)


def routed(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Padding rows of the quantised tokens are undefined in a new tensor."""
    data, scale, ends, rows = results
    live = rows[rows >= 0].long()
    return [data.view(torch.uint8)[live], scale[live], ends, rows]


both(
    "moe_route",
    route_inputs,
    lambda t: (t["x"], t["topk_ids"], EXPERTS, "mxfp8", 32, 16),
    outputs=lambda r, t: {
        "out": r.poison(capacity(t["x"].shape[0]), HIDDEN, dtype=torch.float8_e4m3fn),
        "out_scale": torch.zeros(
            1, capacity(t["x"].shape[0]), dtype=torch.int32, device=r.device
        ).t(),
        "group_ends": r.poison(EXPERTS, dtype=torch.int32),
        "rows": r.poison(t["x"].shape[0], TOPK, dtype=torch.int32),
    },
    defined=routed,
)


def activation_inputs(r: Random, rows: int) -> Tensors:
    """All rows are in a group, so that all of the result is defined."""
    cut = int(r.ints(0, rows, 1)) // 16 * 16
    ends = torch.tensor([cut, rows], dtype=torch.int32, device=r.device)
    return {"gate_up": r.bf16(rows, 2 * K), "group_ends": ends}


both(
    "moe_activation",
    activation_inputs,
    lambda t: (t["gate_up"], t["group_ends"], "mxfp8", 32, 16),
    outputs=lambda r, t: {
        "out": r.poison(t["gate_up"].shape[0], K, dtype=torch.float8_e4m3fn),
        "out_scale": r.packed(t["gate_up"].shape[0], K // 128),
    },
)


def combine_inputs(r: Random, rows: int) -> Tensors:
    return {
        "x": r.bf16(64, HIDDEN),
        "rows": r.ints(-1, 64, rows, TOPK),
        "topk_weights": r.floats(rows, TOPK),
    }


both(
    "moe_combine",
    combine_inputs,
    lambda t: (t["x"], t["rows"], t["topk_weights"], None, None),
    lambda t: (torch.bfloat16,),
    outputs=lambda r, t: {"out": r.poison(t["rows"].shape[0], HIDDEN, dtype=torch.bfloat16)},
)


def moe_inputs(r: Random, rows: int) -> Tensors:
    return {
        **route_inputs(r, rows),
        "topk_weights": r.floats(rows, TOPK),
        "gate_up": r.codes(EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2),
        "gate_up_scale": r.packed(EXPERTS, 2 * INTERMEDIATE, 1),
        "down": r.codes(EXPERTS, HIDDEN, INTERMEDIATE // 2),
        "down_scale": r.packed(EXPERTS, HIDDEN, 1),
    }


_MOE = ("x", "topk_ids", "topk_weights", "gate_up", "gate_up_scale", "down", "down_scale")
CASES["moe"] = Case(moe_inputs, lambda t: ((*(t[n] for n in _MOE), "mxfp8", 32, 32), {}))
CASES["moe.out"] = Case(
    lambda r, rows: {
        **moe_inputs(r, rows),
        "workspace": torch.zeros(1 << 20, dtype=torch.uint8, device=r.device),
        "out": r.poison(rows, HIDDEN, dtype=torch.bfloat16),
    },
    lambda t: (
        (*(t[n] for n in _MOE), "mxfp8", 32, 32),
        {"workspace": t["workspace"], "out": t["out"]},
    ),
    ("out",),
)
