"""Routings, float64 formulas and drawn cases of the MoE tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import reference
import torch
from reference import FP4, FP8, ceil_div

from sm120_ops.bench import routing


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All bits set: NaN in every float format, scale byte 0xFF, row -1."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device).view(dtype).view(shape)


def poisoned_quantized(
    rows: int, k: int, fmt: str, gran_k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float8_e4m3fn if fmt == FP8 else torch.uint8
    data = poisoned((rows, k if fmt == FP8 else k // 2), dtype, device)
    words = ceil_div(k, 4 * gran_k)
    padded = ceil_div(rows, 4) * 4
    return data, poisoned((words, padded), torch.int32, device).t()[:rows]


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


ROUTINGS = (*routing.ROUTINGS, "dropped")


def route(
    name: str, tokens: int, topk: int, experts: int, generator: torch.Generator
) -> torch.Tensor:
    """Expert ids, int64 [tokens, topk]; "dropped" has -1 and ids out of range among the others."""
    if name != "dropped":
        return routing.expert_ids(name, tokens, topk, experts, generator)
    ids = routing.expert_ids("uniform", tokens, topk, experts, generator)
    bad = torch.tensor([-1, experts, -(2**31), 2**31 - 1])
    picks = bad[torch.randint(4, ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.4, picks, ids)


def rows_of(ids: torch.Tensor, experts: int, alignment: int) -> tuple[list[int], torch.Tensor]:
    """Group ends and the row of each slot, one slot at a time."""
    flat = ids.flatten().tolist()
    ends, rows, start = [], torch.full((len(flat),), -1), 0
    for expert in range(experts):
        end = start
        for slot, id in enumerate(flat):
            if id == expert:
                rows[slot] = end
                end += 1
        ends.append(end)
        start = -(-end // alignment) * alignment
    return ends, rows.view(ids.shape)


@dataclass(frozen=True)
class Activation:
    alpha: float = 1.0
    up_offset: float = 0.0
    limit: float | None = None
    interleaved: bool = False


ACTIVATIONS = {
    "silu": Activation(),
    "deepseek-v4": Activation(limit=2.5),
    "gpt-oss": Activation(1.702, 1.0, 3.0, True),
}


def swiglu(
    gate_up: torch.Tensor, bias: torch.Tensor | None, options: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 values -> h, and how far from it float32 arithmetic may be."""
    columns = gate_up.shape[1]
    order = torch.arange(columns).view(-1, 2).t().flatten() if options.interleaved else None
    parts = [gate_up, torch.zeros_like(gate_up) if bias is None else bias]
    parts = [part if order is None else part[:, order.to(part.device)] for part in parts]
    gate, up = (parts[0] + parts[1]).chunk(2, 1)
    gate_size, up_size = (parts[0].abs() + parts[1].abs()).chunk(2, 1)
    if options.limit is not None:
        gate = torch.where(gate > options.limit, options.limit, gate)
        up = torch.where(up > options.limit, options.limit, up)
        up = torch.where(up < -options.limit, -options.limit, up)
    glu = gate / (1 + torch.exp(-options.alpha * gate))
    h = glu * (up + options.up_offset)
    slack = 2.0**-18 * h.abs()
    slack += 2.0**-22 * (
        glu.abs() * (up_size + 1) + 1.2 * gate_size * (up + options.up_offset).abs()
    )
    return h, slack.nan_to_num(0, 0, 0)  # infinite arguments, which a limit may have made finite


def _bytes_of(amax: torch.Tensor, fmt: str) -> torch.Tensor:
    mantissa, exponent = torch.frexp(amax.clamp(min=1e-4) / reference.MAX[fmt])
    return exponent - 1 + (mantissa > 0.5).int() + 127


def assert_quantized(
    data: torch.Tensor,
    scale: torch.Tensor,
    exact: torch.Tensor,
    slack: torch.Tensor,
    fmt: str,
    gran_k: int,
) -> None:
    """Every scale and code is what the rule `deepgemm` gives for some value within the slack."""
    k = exact.shape[1]
    groups = ceil_div(k, gran_k)
    codes, got = reference.codes_of(data), reference.scale_bytes_of(scale, groups).int()
    low, high = (exact.abs() - slack).clamp(min=0), exact.abs() + slack
    grouped = [
        torch.nn.functional.pad(t, (0, -k % gran_k)).unflatten(1, (groups, gran_k)).amax(2)
        for t in (low, high)
    ]
    nan = ~torch.isfinite(grouped[1])
    assert torch.equal(got == 0xFF, nan), "scale bytes of NaN"
    least, most = (_bytes_of(t.nan_to_num(1, 1, 1), fmt) for t in grouped)
    assert (nan | ((least <= got) & (got <= most))).all(), "scale bytes"
    factor = 2.0 ** (127 - got).double().repeat_interleave(gran_k, 1)[:, :k]
    bad = nan.repeat_interleave(gran_k, 1)[:, :k]
    assert (codes[bad] == (0x7F if fmt == FP8 else 0)).all(), "codes of NaN groups"
    table = reference.E4M3 if fmt == FP8 else reference.E2M1
    values = table.to(data.device)[codes.long()]
    bounds = []
    for t in (exact - slack, exact + slack):
        scaled = torch.where(bad, 0, t * factor).cpu()
        nearest = table[reference.nearest_code(scaled, fmt, "deepgemm").long()]
        bounds.append(nearest.to(data.device))
    assert (bad | ((bounds[0] <= values) & (values <= bounds[1]))).all(), "codes"


def layer(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    options: Activation = ACTIVATIONS["silu"],
) -> torch.Tensor:
    """The layer in float64 without any quantisation, slot by slot."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(gate_up.shape[0]):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        product = x[tokens].double() @ gate_up[expert].double().t()
        bias = None if gate_up_bias is None else gate_up_bias[expert].double().expand_as(product)
        row = swiglu(product, bias, options)[0] @ down[expert].double().t()
        if down_bias is not None:
            row = row + down_bias[expert].double()
        y.index_add_(0, tokens, row * weights[tokens, slots, None].double())
    return y


@dataclass(frozen=True)
class Case:
    seed: int
    tokens: int
    topk: int
    experts: int
    hidden: int
    intermediate: int
    format: str  # of the module: mxfp8, w4a8, mxfp4
    gran_k: int
    routing: str
    activation: str
    bias: bool
    dtype: torch.dtype
    ids32: bool
    bf16_weights: bool


def draw(seed: int, small: bool) -> Case:
    rng = random.Random(seed)
    fmt = rng.choice(("mxfp8", "w4a8", "mxfp4"))
    multiple = 16 if fmt == "mxfp8" else 32
    largest = 128 if small else rng.choice((256, 1024))
    experts = rng.choice((1, 2, 5, 16, 64, 128, 256))
    tokens = rng.choice((0, 1, 2, 3, 8, 17, 32, 100, 256, 700))
    topk = rng.choice((1, 2, 3, 4, 6, 8))
    if small:
        experts, tokens = min(experts, 16), min(tokens, 40)
    return Case(
        seed=seed,
        tokens=tokens,
        topk=topk,
        experts=experts,
        hidden=multiple * rng.randint(1, largest // multiple),
        intermediate=multiple * rng.randint(1, largest // multiple),
        format=fmt,
        gran_k=rng.choice((32, 128)),
        routing=rng.choice(ROUTINGS),
        activation=rng.choice(tuple(ACTIVATIONS)),
        bias=rng.random() < 0.4,
        dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        ids32=rng.random() < 0.5,
        bf16_weights=rng.random() < 0.3,
    )


FORMATS = {"mxfp8": (FP8, FP8), "w4a8": (FP4, FP8), "mxfp4": (FP4, FP4)}  # weights, activations

# ---- A small layer

E, I, H, T, TOPK = 6, 64, 96, 10, 3  # noqa: E741  (of a small layer)


def floats(device: torch.device | str = "cpu", bias: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    result = {
        "gate_up": torch.randn(E, 2 * I, H, generator=generator) / H**0.5,
        "down": torch.randn(E, H, I, generator=generator) / I**0.5,
    }
    if bias:
        result["gate_up_bias"] = torch.randn(E, 2 * I, generator=generator)
        result["down_bias"] = torch.randn(E, H, generator=generator)
    return {name: tensor.to(device) for name, tensor in result.items()}


def inputs(
    device: torch.device | str = "cpu", tokens: int = T, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator)
    ids = route("uniform", tokens, TOPK, E, generator)
    return x.to(device), ids.to(device), torch.rand(tokens, TOPK, generator=generator).to(device)
