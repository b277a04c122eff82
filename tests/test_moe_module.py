"""MXExperts, ExpertParallel, compiled and fake."""

from __future__ import annotations

import copy
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import moe_cases
import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing
from moe_cases import TOPK, Activation, E, H, I, T, floats, inputs
from reference import FP4, FP8
from torch._subclasses import FakeTensorMode

import sm120_ops
from sm120_ops.nn import ExpertParallel, MXExperts

OPS = torch.ops.sm120
CONFIGS = [(f, g) for f in moe_cases.FORMATS for g in (32, 128)]
# ---- MXExperts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "gran_k"), CONFIGS)
def test_close_to_the_float_layer(device: torch.device, fmt: str, gran_k: int) -> None:
    for bias, name in itertools.product((False, True), ("silu", "gpt-oss")):
        weights = floats(device, bias)
        module = MXExperts.from_float(**weights, format=fmt, gran_k=gran_k, activation=name)
        options = Activation(1.702, 1.0, 7.0, True) if name == "gpt-oss" else Activation()
        x, ids, topk_weights = inputs(device, 40)
        exact = moe_cases.layer(x, ids, topk_weights, **weights, options=options)
        bound = {"mxfp8": 5e-3, "w4a8": 4e-2, "mxfp4": 8e-2}[fmt]
        assert reference.calc_diff(module(x, ids, topk_weights), exact) <= bound


def test_weights_are_those_of_quantize(device: torch.device) -> None:
    weights = floats(device)
    for fmt, gran_k in CONFIGS:
        module = MXExperts.from_float(**weights, format=fmt, gran_k=gran_k)
        blocks = 128 if (fmt, gran_k) == ("mxfp8", 128) else 1
        weight_gran = 32 if fmt == "w4a8" else gran_k
        for name, expert in itertools.product(("gate_up", "down"), (0, E - 1)):
            data, scale = module.weights(name)
            want = sm120_ops.quantize(
                weights[name][expert], moe_cases.FORMATS[fmt][0], weight_gran, blocks
            )
            assert torch.equal(data[expert].view(torch.uint8), want[0].view(torch.uint8))
            assert torch.equal(scale[expert], want[1])


def test_transposed_weights_and_leading_dimensions(device: torch.device) -> None:
    weights = floats(device)
    module = MXExperts.from_float(**weights)
    stored: dict[str, Any] = {
        k: v.transpose(1, 2).contiguous().transpose(1, 2) for k, v in weights.items()
    }
    x, ids, topk_weights = inputs(device)
    y = module(x, ids, topk_weights)
    assert torch.equal(MXExperts.from_float(**stored)(x, ids, topk_weights), y)
    for shape in [(2, 5), (5, 1, 2)]:
        args = [t.reshape(*shape, -1) for t in (x, ids, topk_weights)]
        assert torch.equal(module(*args), y.reshape(*shape, H))
    assert torch.equal(module(x[3], ids[3], topk_weights[3]), y[3])
    assert module(x[:0], ids[:0], topk_weights[:0]).shape == (0, H)
    wide = torch.cat([x, x], 1)[:, :H]
    assert torch.equal(module(wide, ids.t().contiguous().t(), topk_weights), y)


@pytest.mark.parametrize(("fmt", "gran_k"), CONFIGS)
def test_state_dict_copies_and_casts(device: torch.device, fmt: str, gran_k: int) -> None:
    module = MXExperts.from_float(**floats(device, True), format=fmt, gran_k=gran_k)
    args = inputs(device)
    y = module(*args)
    state = module.state_dict()
    names = [f"{n}{s}" for n in ("gate_up", "down") for s in ("", "_scale", "_bias")]
    assert list(state) == names
    for where in (device, "meta"):
        other = MXExperts(E, H, I, True, fmt, gran_k, device=where)
        other.load_state_dict(state, assign=where == "meta")
        assert torch.equal(other(*args), y)
    assert torch.equal(copy.deepcopy(module)(*args), y)
    assert torch.equal(module.cpu().to(device)(*args), y)
    half = module.to(torch.bfloat16)
    assert half.gate_up.dtype == torch.int8
    assert half.down_bias is not None
    assert half.down_bias.dtype == torch.bfloat16
    assert reference.calc_diff(half(*args), y) < 1e-3
    with pytest.raises(RuntimeError, match="size mismatch"):
        MXExperts(E, H, 2 * I, True, fmt, gran_k).load_state_dict(state)
    assert "down_bias" not in MXExperts(E, H, I).state_dict()


def test_repr() -> None:
    module = MXExperts(E, H, I, format="w4a8", limit=5.0)
    assert repr(module) == (
        "MXExperts(num_experts=6, hidden=96, intermediate=64, bias=False, format=w4a8, gran_k=32, "
        "activation=silu, limit=5.0)"
    )


# ---- torch.compile, fake tensors -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_for_any_batch(device: torch.device, backend: str) -> None:
    """One graph, although alignment and tiles change with the number of tokens."""
    torch._dynamo.reset()
    module = MXExperts.from_float(**floats(device), format="w4a8")

    def function(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return module(x * 2, ids, weights) + x

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 3, 64, 200, 5, 300, 2):
            args = inputs(device, tokens)
            assert torch.equal(compiled(*args), function(*args))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_steps(device: torch.device) -> None:
    torch._dynamo.reset()

    def function(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        _, _, ends, rows = sm120_ops.moe_route(x, ids, E, "mxfp4", 32, 16)
        products = torch.ones(sm120_ops.moe_capacity(ids.numel(), E, 16), H, device=x.device)
        data, scale = sm120_ops.moe_activation(products.tile(1, 2), ends)
        values = sm120_ops.dequantize(data, scale).nan_to_num(0)
        return sm120_ops.moe_combine(values, rows, weights)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 30, 4):
            args = inputs(device, tokens)
            assert torch.equal(compiled(*args), function(*args))


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_fake_tensors_match_real_ones(device: torch.device, tokens: int) -> None:
    module = MXExperts.from_float(**floats(device), format="mxfp4")
    weights = [*module.weights("gate_up"), *module.weights("down")]

    def everything(*tensors: torch.Tensor) -> list[torch.Tensor]:
        x, ids, topk_weights, *experts = tensors
        data, scale, ends, rows = OPS.moe_route(x, ids, E, FP4, 32, 32)
        product = x.new_zeros(data.shape[0], 2 * I)
        hidden = OPS.moe_activation(product, ends, FP8, 128, 32)
        y = OPS.moe_combine(product, rows, topk_weights, None, None, torch.float16)
        return [
            data,
            scale,
            ends,
            rows,
            *hidden,
            y,
            OPS.moe(x, ids, topk_weights, *experts, FP4, 32, 32),
        ]

    args = [*inputs(device, tokens), *weights]
    real = everything(*args)
    with FakeTensorMode() as mode:
        fake = everything(*(mode.from_tensor(t) for t in args))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.numel() == 0 or one.stride() == other.stride()


def test_opcheck(device: torch.device) -> None:
    x, ids, weights = inputs(device)
    rows = OPS.moe_route(x, ids, E, FP4, 32, 16)[3]
    product = torch.randn(sm120_ops.moe_capacity(T * TOPK, E, 16), 64, device=device)
    reference.opcheck(OPS.moe_combine.default, (product, rows, weights, None, None, torch.float32))
    reference.opcheck(
        OPS.moe_combine.out,
        (product, rows, weights, None, None),
        {"out": torch.zeros(T, 64, device=device)},
    )


# ---- Expert parallelism --------------------------------------------------------------------------


def run_rank(rank: int, ranks: int, port: int, backend: str, capacity: int | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=ranks)
    experts = 8
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Any] = {
        "gate_up": torch.randn(experts, 2 * I, H, generator=generator) / H**0.5,
        "down": torch.randn(experts, H, I, generator=generator) / I**0.5,
        "gate_up_bias": torch.randn(experts, 2 * I, generator=generator),
        "down_bias": torch.randn(experts, H, generator=generator),
    }
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    share = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
    for number, bias in enumerate((False, True)):
        names = list(weights)[: 4 if bias else 2]
        mine = MXExperts.from_float(**{n: weights[n][share] for n in names}, format="w4a8")
        whole = MXExperts.from_float(**{n: weights[n] for n in names}, format="w4a8")
        layer = ExpertParallel(mine, capacity=capacity)
        for routing, dtype in itertools.product(
            ("uniform", "one", "none", "dropped"), (torch.float32, torch.bfloat16)
        ):
            generator.manual_seed(100 * number + rank)
            tokens = (5, 0, 12, 1)[rank]  # a rank without tokens takes part
            x = torch.randn(tokens, H, generator=generator).to(device, dtype)
            ids = moe_cases.route(routing, tokens, TOPK, experts, generator).to(device)
            topk_weights = torch.rand(tokens, TOPK, generator=generator).to(device)
            y, expected = layer(x, ids, topk_weights), whole(x, ids, topk_weights)
            assert y.dtype == dtype
            # On the CPU sums are float64 and rounded, so their order does not show.
            if device.type == "cpu":
                assert torch.equal(y, expected), (routing, dtype)
            elif dtype == torch.float32:
                assert (y - expected).norm() <= 1e-6 * expected.norm(), (routing, dtype)
            else:
                assert reference.calc_diff(y, expected) <= 1e-6 or not expected.any()
    if capacity is None:
        small = ExpertParallel(mine, capacity=1)  # drops what is too much, and says so in the docs
        x = torch.randn(4, H, device=device)
        ids = torch.tensor([[0], [0], [experts - 1], [-1]], device=device)
        y = small(x, ids, torch.ones(4, 1, device=device))
        assert y.any(1).tolist() == [True, False, True, False]
    dist.destroy_process_group()


def spawn(ranks: int, backend: str, capacity: int | None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (ranks, port, backend, capacity), nprocs=ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("capacity", [None, 12 * TOPK])
def test_expert_parallel_equals_one_process(ranks: int, capacity: int | None) -> None:
    spawn(ranks, "gloo", capacity)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("capacity", [None, 12 * TOPK])
def test_expert_parallel_on_two_gpus(capacity: int | None) -> None:
    spawn(2, "nccl", capacity)


@pytest.mark.source
@pytest.mark.parametrize("options", [[], ["--capacity", "--format", "w4a8"]])
def test_example(options: list[str]) -> None:
    script = Path(__file__).resolve().parents[1] / "examples" / "expert_parallel.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    package = Path(sm120_ops.__file__).parents[1]  # the script's own folder is not enough
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    done = subprocess.run(
        [*launch, str(script), *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("tokens, equal") == 2


def test_expert_parallel_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"nn.ExpertParallel: group: expected an initialised"):
        ExpertParallel(MXExperts(E, H, I))
