"""The MoE steps and the whole layer: exact where they say so, any routing, poisoned padding."""

from __future__ import annotations

import itertools
import os
from typing import Any

import moe_cases
import pytest
import reference
import torch
from moe_cases import ACTIVATIONS, ROUTINGS, Activation, Case
from reference import FP4, FP8

import sm120_ops
from sm120_ops.nn import MXExperts
from sm120_ops.ops.moe_layer import make_plan

OPS = torch.ops.sm120
CHUNKS = 10
DEFAULT_CASES = {"cpu": 40, "cuda": 400}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All bits set: NaN in every float format, scale byte 0xFF, row -1."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device).view(dtype).view(shape)


def poisoned_quantized(
    rows: int, k: int, fmt: str, gran_k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float8_e4m3fn if fmt == FP8 else torch.uint8
    data = poisoned((rows, k if fmt == FP8 else k // 2), dtype, device)
    words = reference.ceil_div(k, 4 * gran_k)
    padded = reference.ceil_div(rows, 4) * 4
    return data, poisoned((words, padded), torch.int32, device).t()[:rows]


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


# ---- moe_route -----------------------------------------------------------------------------------


def check_route(
    x: torch.Tensor, ids: torch.Tensor, experts: int, fmt: str, gran_k: int, alignment: int
) -> None:
    """Against a count one slot at a time, and quantize() for the bits; twice; padding untouched."""
    device, k = x.device, x.shape[1]
    want_ends, want_rows = moe_cases.rows_of(ids.cpu(), experts, alignment)
    capacity = sm120_ops.moe_capacity(ids.numel(), experts, alignment)
    assert max(want_ends) <= capacity
    assert capacity % alignment == 0
    data, scale = poisoned_quantized(capacity, k, fmt, gran_k, device)
    ends = poisoned((experts,), torch.int32, device)
    rows = poisoned(tuple(ids.shape), torch.int32, device)
    args = (x, ids, experts, fmt, gran_k, alignment)
    OPS.moe_route.out(*args, out=data, out_scale=scale, group_ends=ends, rows=rows)
    assert ends.tolist() == want_ends
    assert torch.equal(rows.cpu().long(), want_rows)
    flat = want_rows.flatten()
    slots = (flat >= 0).nonzero().flatten()
    live, tokens = flat[slots].to(device), (slots // ids.shape[1]).to(device)
    want, want_scale = sm120_ops.quantize(x, fmt, gran_k)
    assert torch.equal(data.view(torch.uint8)[live], want.view(torch.uint8)[tokens])
    assert torch.equal(scale[live], want_scale[tokens])
    rest = torch.ones(capacity, dtype=torch.bool, device=device)
    rest[live] = False
    assert (data.view(torch.uint8)[rest] == 0xFF).all(), "padding rows of data were written"
    assert (scale[rest] == -1).all(), "padding rows of the scales were written"

    again = sm120_ops.moe_route(x, ids, experts, fmt, gran_k, alignment)
    assert torch.equal(again[2], ends)
    assert torch.equal(again[3], rows)
    assert torch.equal(again[0].view(torch.uint8)[live], data.view(torch.uint8)[live])
    assert torch.equal(again[1][live], scale[live])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_route(device: torch.device, routing: str, fmt: str) -> None:
    generator = torch.Generator().manual_seed(len(routing))
    for number, (tokens, topk, experts, k) in enumerate(
        [(0, 2, 3, 32), (1, 1, 1, 32), (1, 8, 256, 4096), (7, 3, 5, 96), (33, 6, 64, 544),
         (150, 16, 20, 288), (300, 2, 512, 64), (40, 32, 1024, 2880)]
    ):  # fmt: skip
        ids = moe_cases.route(routing, tokens, topk, experts, generator)
        ids = ids.int() if number % 2 else ids
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        x = torch.randn(tokens, k, generator=generator).mul(3).to(dtype)
        gran_k, alignment = (32, 128)[number % 2], (16, 32, 64, 128)[number % 4]
        check_route(x.to(device), ids.to(device), experts, fmt, gran_k, alignment)


def test_route_special_values(device: torch.device) -> None:
    """NaN and Inf stay in the group they are in; zeros; K that ends inside a group of 128."""
    x = torch.randn(6, 176, device=device)
    x[1, 5], x[2, 100], x[3] = torch.nan, torch.inf, 0
    ids = torch.tensor([[0], [1], [0], [1], [2], [0]], device=device)
    for gran_k, dtype in itertools.product((32, 128), (torch.bfloat16, torch.float32)):
        check_route(x.to(dtype), ids, 3, FP8, gran_k, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [512, 8192])
def test_route_large(tokens: int) -> None:
    """Several tokens a block and several batches; against the CPU kernel."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 1024, generator=generator).bfloat16()
    for routing, topk, experts in [("uniform", 6, 256), ("zipf", 16, 512), ("one", 8, 64)]:
        ids = moe_cases.route(routing, tokens, topk, experts, generator)
        want = sm120_ops.moe_route(x, ids, experts, FP4, 32, 64)
        got = sm120_ops.moe_route(x.cuda(), ids.cuda(), experts, FP4, 32, 64)
        assert torch.equal(got[2].cpu(), want[2])
        assert torch.equal(got[3].cpu(), want[3])
        live = want[3].flatten().long()
        assert torch.equal(got[0].cpu()[live], want[0][live])
        assert torch.equal(got[1].cpu()[live], want[1][live])


def test_capacity_is_the_most_that_can_occur() -> None:
    for experts, slots, alignment in itertools.product((1, 2, 3), range(7), (16, 32)):
        most = 0
        for ids in itertools.product(range(-1, experts), repeat=slots):
            ends = moe_cases.rows_of(torch.tensor(ids).view(-1, 1), experts, alignment)[0]
            most = max(most, -(-max(ends) // alignment) * alignment)
        assert sm120_ops.moe_capacity(slots, experts, alignment) == most


# ---- moe_activation ------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FP8, FP4])
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activation(
    device: torch.device, fmt: str, gran_k: int, name: str, dtype: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(gran_k)
    options = ACTIVATIONS[name]
    for k, counts, alignment in [
        (32, [1], 16), (96, [3, 0, 17, 16, 0], 16), (288, [0, 0], 32), (544, [40, 1, 129], 128),
        (2880, [0, 2, 5], 64), (64, [2] * 300, 16),
    ]:  # fmt: skip
        ends, groups, start = [], [], 0
        for group, count in enumerate(counts):
            ends.append(start + count)
            groups += [(row, group) for row in range(start, start + count)]
            start = -(-ends[-1] // alignment) * alignment
        num_rows = start + 24
        live, group_of = (torch.tensor(t, dtype=torch.int64) for t in zip(*groups, strict=True)) \
            if groups else (torch.empty(0, dtype=torch.int64),) * 2  # fmt: skip
        gate_up = torch.full((num_rows, 2 * k), torch.nan)  # padding rows must not be read
        values = torch.randn(len(live), 2 * k, generator=generator) * 3
        gate_up[live] = values
        gate_up = gate_up.to(device, dtype)
        bias = torch.randn(len(counts), 2 * k, generator=generator).to(device, dtype)
        live, group_of = live.to(device), group_of.to(device)
        exact, slack = moe_cases.swiglu(
            gate_up[live].double(), bias[group_of].double() if with_bias else None, options
        )
        data, scale = poisoned_quantized(num_rows, k, fmt, gran_k, device)
        group_ends = torch.tensor(ends, dtype=torch.int32, device=device)
        args = (gate_up, group_ends, fmt, gran_k, alignment, bias if with_bias else None)
        args += (options.alpha, options.up_offset, options.limit, options.interleaved)
        OPS.moe_activation.out(*args, out=data, out_scale=scale)
        moe_cases.assert_quantized(
            data.view(torch.uint8)[live].view(data.dtype), scale[live], exact, slack, fmt, gran_k
        )
        rest = torch.ones(num_rows, dtype=torch.bool, device=device)
        rest[live] = False
        assert (data.view(torch.uint8)[rest] == 0xFF).all(), "padding rows of data were written"
        assert (scale[rest] == -1).all(), "padding rows of the scales were written"
        again = sm120_ops.moe_activation(*args)
        assert torch.equal(again[0].view(torch.uint8)[live], data.view(torch.uint8)[live])
        assert torch.equal(again[1][live], scale[live])


def test_activation_special_values(device: torch.device) -> None:
    """NaN through a limit, Inf, gates whose exponential overflows."""
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 3.0, -0.0, 0.5])
    gate_up = torch.zeros(8, 64, device=device)
    gate_up[:, :32] = 1
    gate_up[:, 3] = gate.to(device)
    gate_up[:, 32:] = 2
    ends = torch.tensor([8], dtype=torch.int32, device=device)
    for limit in (None, 7.0):
        data, scale = sm120_ops.moe_activation(gate_up, ends, FP8, 32, 16, limit=limit)
        exact, slack = moe_cases.swiglu(gate_up.double(), None, Activation(limit=limit))
        moe_cases.assert_quantized(data, scale, exact, slack, FP8, 32)


def test_activation_ends_beyond_the_matrix(device: torch.device) -> None:
    """Ends that are none give some rows, and never a write outside."""
    gate_up = torch.randn(20, 64, device=device)
    for bad in ([30, 40], [2**31 - 1, 5], [-5, 12], [16, 3]):
        data, scale = poisoned_quantized(24, 32, FP8, 32, device)
        ends = torch.tensor(bad, dtype=torch.int32, device=device)
        OPS.moe_activation.out(gate_up, ends, FP8, 32, 16, out=data[:20], out_scale=scale[:20])
        assert (data[20:].view(torch.uint8) == 0xFF).all()


# ---- moe_combine ---------------------------------------------------------------------------------


def combine_slot_by_slot(
    x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None,
    ids: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    y = torch.zeros(rows.shape[0], x.shape[1])
    for token, slot in itertools.product(*map(range, rows.shape)):
        if rows[token, slot] >= 0:
            value = x[rows[token, slot]].float()
            if bias is not None:
                value = value + bias[ids[token, slot]].float()
            y[token] = y[token] + weights[token, slot].float() * value
    return y


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_combine(
    device: torch.device, x_dtype: torch.dtype, out_dtype: torch.dtype, with_bias: bool
) -> None:
    """Bit for bit the float32 sum in the order of slots."""
    generator = torch.Generator().manual_seed(5)
    for tokens, topk, experts, n in [
        (1, 1, 1, 8),
        (3, 2, 4, 1048),
        (9, 8, 5, 72),
        (5, 19, 7, 2880),
    ]:
        ids = moe_cases.route("dropped", tokens, topk, experts, generator)
        _, rows = moe_cases.rows_of(ids, experts, 16)
        x = torch.full((int(rows.max()) + 18, n), torch.nan)
        x[rows[rows >= 0]] = torch.randn(int((rows >= 0).sum()), n, generator=generator)
        weights = torch.rand(tokens, topk, generator=generator)
        weights[rows < 0] = torch.nan  # not looked at
        bias = torch.randn(experts, n, generator=generator)
        weights_dtype = torch.bfloat16 if topk == 8 else torch.float32
        x, weights, bias = x.to(x_dtype), weights.to(weights_dtype), bias.to(x_dtype)
        want = combine_slot_by_slot(x, rows, weights, bias if with_bias else None, ids)
        args = [t.to(device) for t in (x, rows.int(), weights, bias, ids)]
        if not with_bias:
            args[3] = None  # type: ignore[call-overload]
        got = sm120_ops.moe_combine(*args, out_dtype=out_dtype)
        assert got.dtype == out_dtype
        assert same_bits(got.cpu(), want.to(out_dtype))
        out = poisoned((tokens, n), out_dtype, device)
        assert sm120_ops.moe_combine(*args, out=out) is out
        assert same_bits(out, got)


def test_combine_of_nothing(device: torch.device) -> None:
    x = torch.full((16, 32), torch.nan, device=device)
    rows = torch.tensor(
        [[-1, -1], [16, 2**31 - 1], [-5, -(2**31)]], dtype=torch.int32, device=device
    )
    weights = torch.full((3, 2), torch.nan, device=device)
    assert (sm120_ops.moe_combine(x, rows, weights) == 0).all()
    assert sm120_ops.moe_combine(x, rows[:0], weights[:0]).shape == (0, 32)
    assert (sm120_ops.moe_combine(x[:0], rows, weights) == 0).all()


# ---- The layer -----------------------------------------------------------------------------------


def make_layer(case: Case, device: torch.device) -> tuple[MXExperts, list[torch.Tensor], Any]:
    """Module, (x, ids, weights), and the float weights it was made of, all on the device."""
    generator = torch.Generator().manual_seed(case.seed)
    e, i, h = case.experts, case.intermediate, case.hidden

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    floats: list[torch.Tensor | None] = [normal(e, 2 * i, h) / h**0.5, normal(e, h, i) / i**0.5]
    floats += [normal(e, 2 * i), normal(e, h)] if case.bias else [None, None]
    floats = [None if t is None else t.to(device) for t in floats]
    o = ACTIVATIONS[case.activation]
    module = MXExperts.from_float(
        *floats,  # type: ignore[arg-type]
        format=case.format,
        gran_k=case.gran_k,
        alpha=o.alpha,
        up_offset=o.up_offset,
        limit=o.limit,
        interleaved=o.interleaved,
    )
    x = normal(case.tokens, h).to(case.dtype)
    ids = moe_cases.route(case.routing, case.tokens, case.topk, e, generator)
    weights = torch.rand(case.tokens, case.topk, generator=generator)
    inputs = [
        x,
        ids.int() if case.ids32 else ids,
        weights.bfloat16() if case.bf16_weights else weights,
    ]
    return module, [t.to(device) for t in inputs], floats


# Squared relative error of the layer, two products and the activation, against float64. With room,
# as there may be but a few rows.
BOUND = {"mxfp8": 1e-2, "w4a8": 6e-2, "mxfp4": 0.15}


def check_layer(case: Case, device: torch.device) -> None:
    module, inputs, floats = make_layer(case, device)
    plan = make_plan(
        case.tokens, case.topk, case.experts, case.hidden, case.intermediate,
        moe_cases.FORMATS[case.format][1], case.gran_k, case.dtype,
    )  # fmt: skip
    workspace = poisoned((plan.workspace,), torch.uint8, device)
    y = module(*inputs, workspace=workspace)
    assert y.dtype == case.dtype
    assert same_bits(module(*inputs, workspace=workspace), y), "two runs differ"
    assert same_bits(module(*inputs), y), "the workspace makes a difference"
    assert y.isfinite().all()
    ids = inputs[1]
    dead = ((ids < 0) | (ids >= case.experts)).all(1)
    assert (y[dead] == 0).all(), "a token without experts"
    exact = moe_cases.layer(*inputs, *floats, options=ACTIVATIONS[case.activation])
    if exact.norm() > 0 and min(case.hidden, case.intermediate) >= 64:
        assert reference.calc_diff(y, exact) <= BOUND[case.format]
    if device.type == "cuda":  # each step is held to its own tolerance elsewhere
        reference_y = module.cpu()(*(t.cpu() for t in inputs))
        assert (
            case.tokens == 0
            or exact.norm() == 0
            or reference.calc_diff(y.cpu(), reference_y) <= 1e-4
        )


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_layers(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = moe_cases.draw(seed, small=device.type == "cpu")
        try:
            check_layer(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


LAYER = Case(
    7, 24, 4, 12, 128, 96, "w4a8", 32, "uniform", "gpt-oss", True, torch.bfloat16, False, False
)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_layer_is_its_five_steps(device: torch.device, routing: str) -> None:
    case = Case(**{**vars(LAYER), "routing": routing})
    module, (x, ids, weights), _ = make_layer(case, device)
    plan = make_plan(24, 4, 12, 128, 96, FP8, 32, x.dtype)
    alignment, hint = plan.alignment, plan.expected_m
    a, sfa, ends, rows = sm120_ops.moe_route(x, ids, 12, FP8, 32, alignment)
    product = poisoned((plan.capacity, 192), torch.bfloat16, device)
    steps = (ends, 32, 32, alignment, hint)
    OPS.grouped_gemm_psum.out(a, sfa, *module.weights("gate_up"), *steps, out=product)
    options = (module.gate_up_bias, 1.702, 1.0, 3.0, True)
    h, sfh = sm120_ops.moe_activation(product, ends, FP8, 32, alignment, *options)
    result = poisoned((plan.capacity, 128), torch.bfloat16, device)
    OPS.grouped_gemm_psum.out(h, sfh, *module.weights("down"), *steps, out=result)
    y = sm120_ops.moe_combine(result, rows, weights, module.down_bias, ids)
    assert same_bits(module(x, ids, weights), y)


def test_tokens_do_not_depend_on_each_other(device: torch.device) -> None:
    """A NaN token spoils its own output and no other."""
    module, (x, ids, weights), _ = make_layer(LAYER, device)
    y = module(x, ids, weights)
    x[5, 3] = torch.nan
    spoiled = module(x, ids, weights)
    assert spoiled[5].isnan().all()
    others = torch.arange(24, device=device) != 5
    assert same_bits(spoiled[others], y[others])


def test_workspace_size_grows_with_tokens() -> None:
    for experts, topk in [(1, 1), (2, 1), (8, 2), (256, 6)]:
        sizes = [sm120_ops.moe_workspace_size(t, topk, experts, 128, 64) for t in range(3000)]
        assert sizes == sorted(sizes)


def test_any_routing_fits(device: torch.device) -> None:
    """One workspace, of the size that the shapes give, and every routing."""
    module, (x, _, weights), _ = make_layer(LAYER, device)
    workspace = torch.zeros(module.workspace_size(24, 4), dtype=torch.uint8, device=device)
    generator = torch.Generator().manual_seed(1)
    for routing in ROUTINGS:
        ids = moe_cases.route(routing, 24, 4, 12, generator).to(device)
        assert same_bits(module(x, ids, weights, workspace), module(x, ids, weights))


# ---- On the GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", list(moe_cases.FORMATS))
@pytest.mark.parametrize("tokens", [1, 24, 300])
def test_graph_replays_with_fresh_routings(fmt: str, tokens: int) -> None:
    device = torch.device("cuda")
    case = Case(**{**vars(LAYER), "format": fmt, "tokens": tokens, "hidden": 512, "experts": 64})
    module, (x, ids, weights), _ = make_layer(case, device)
    workspace = poisoned((module.workspace_size(tokens, 4),), torch.uint8, device)
    module(x, ids, weights, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x, ids, weights, workspace)
    generator = torch.Generator().manual_seed(2)
    for replay in range(50):
        routing = ROUTINGS[replay % len(ROUTINGS)]
        ids.copy_(moe_cases.route(routing, tokens, 4, 64, generator))
        x.copy_(torch.randn(x.shape, generator=generator))
        weights.copy_(torch.rand(weights.shape, generator=generator))
        workspace.fill_(0xFF)
        graph.replay()
        assert same_bits(y, module(x, ids, weights)), f"replay {replay}, {routing}"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 1024])
def test_at_most_five_launches(tokens: int) -> None:
    case = Case(**{**vars(LAYER), "tokens": tokens, "hidden": 1024, "experts": 64})
    module, inputs, _ = make_layer(case, torch.device("cuda"))
    module(*inputs)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        module(*inputs)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 5, kernels


@pytest.mark.gpu
def test_no_host_sync() -> None:
    module, inputs, _ = make_layer(LAYER, torch.device("cuda"))
    expected = module(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = module(*inputs)
        assert not stream.query(), "the layer waited for the GPU"
    stream.synchronize()
    assert same_bits(y, expected)


@pytest.mark.determinism
@pytest.mark.parametrize("fmt", list(moe_cases.FORMATS))
def test_full_size_layer_repeats(fmt: str) -> None:
    for tokens in (1, 32, 256):
        case = Case(**{**vars(LAYER), "format": fmt, "tokens": tokens, "topk": 6})
        case = Case(**{**vars(case), "hidden": 4096, "intermediate": 2048, "experts": 32})
        module, inputs, _ = make_layer(case, torch.device("cuda"))
        first = module(*inputs)
        for _ in range(20):
            assert same_bits(module(*inputs), first)


@pytest.mark.sanitizer
def test_layers_for_the_sanitizer() -> None:
    for seed in range(6):
        module, inputs, _ = make_layer(moe_cases.draw(seed, small=True), torch.device("cuda"))
        module(*inputs)
    torch.cuda.synchronize()
