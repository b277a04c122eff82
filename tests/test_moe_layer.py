"""The whole MoE layer: drawn cases, its five steps, any routing, graphs and launches."""

from __future__ import annotations

import os
from typing import Any

import moe_cases
import pytest
import reference
import torch
from moe_cases import ACTIVATIONS, ROUTINGS, Case, poisoned, same_bits
from reference import FP8

import sm120_ops
from sm120_ops.nn import MXExperts
from sm120_ops.ops.moe_layer import make_plan

OPS = torch.ops.sm120
CHUNKS = 10
DEFAULT_CASES = {"cpu": 40, "cuda": 400}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))


def make_layer(
    case: Case, device: torch.device
) -> tuple[MXExperts, list[torch.Tensor], dict[str, Any]]:
    """Module, (x, ids, weights), and the float weights it was made of, all on the device."""
    generator = torch.Generator().manual_seed(case.seed)
    e, i, h = case.experts, case.intermediate, case.hidden

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    floats: dict[str, Any] = {
        "gate_up": normal(e, 2 * i, h).to(device) / h**0.5,
        "down": normal(e, h, i).to(device) / i**0.5,
    }
    if case.bias:
        floats["gate_up_bias"] = normal(e, 2 * i).to(device)
        floats["down_bias"] = normal(e, h).to(device)
    options: dict[str, Any] = vars(ACTIVATIONS[case.activation])
    module = MXExperts.from_float(**floats, format=case.format, gran_k=case.gran_k, **options)
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
    x, ids, weights = inputs
    dead = ((ids < 0) | (ids >= case.experts)).all(1)
    assert (y[dead] == 0).all(), "a token without experts"
    exact = moe_cases.layer(x, ids, weights, **floats, options=ACTIVATIONS[case.activation])
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
