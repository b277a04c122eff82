"""Every DeepGEMM name once: on each device, in a CUDA graph, under torch.compile."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from compat_calls import ALIGNMENT, CALLS
from op_samples import Random, Tensors
from test_every_op import CUDA, same

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm import mega, runtime
from sm120_ops.compat.deep_gemm.testing import calc_diff
from sm120_ops.compat.deep_gemm.utils import dist

CPU = torch.device("cpu")
ROWS = [56, 40, 72, 64, 104]  # whole 16 bytes of BF16, more than one block of 32
LIMIT = 1e-5  # of a GPU's result against the CPU's: the same operands

every_name = pytest.mark.parametrize("name", CALLS)
every_call = pytest.mark.parametrize("name", [n for n, call in CALLS.items() if call.on_device])


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_settings", runtime._Settings())
    deep_gemm.set_mk_alignment_for_contiguous_layout(ALIGNMENT)


def sample(name: str, device: torch.device, rows: int, seed: int) -> Tensors:
    return CALLS[name].make(Random(device, seed), rows)


def call(name: str, tensors: Tensors) -> list[torch.Tensor]:
    result: Any = CALLS[name].run(tensors)
    if CALLS[name].outputs:
        assert result is None
        return [tensors[output] for output in CALLS[name].outputs]
    return list(result) if isinstance(result, tuple) else [result]


def eager(name: str, device: torch.device, rows: int, seed: int) -> list[torch.Tensor]:
    return [x.clone() for x in call(name, sample(name, device, rows, seed))]


def test_every_name_has_a_call() -> None:
    """Those of utils.dist and of mega MoE have tests of their own."""
    functions = {
        name
        for name in deep_gemm.__all__
        if inspect.isfunction(getattr(deep_gemm, name))
        and getattr(deep_gemm, name).__module__ not in (mega.__name__, dist.__name__)
    }
    assert functions == set(CALLS)


def values(x: torch.Tensor) -> torch.Tensor:
    """Numbers that can be compared: finite ones, 0 where there is none."""
    x = x.double() if x.dtype.itemsize > 1 or x.dtype.is_floating_point else x.view(torch.uint8)
    return x.double().nan_to_num(0, 0, 0).cpu()


@every_name
def test_call(device: torch.device, name: str) -> None:
    results = call(name, sample(name, device, 56, 0))
    if not CALLS[name].on_device:
        return
    again = call(name, sample(name, CPU, 56, 0))
    for result, expected in zip(results, again, strict=True):
        assert result.device.type == device.type
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert calc_diff(values(result), values(expected)) < LIMIT


@pytest.mark.gpu
@every_call
def test_graph(name: str) -> None:
    """Captured once, replayed with other contents of every input."""
    static = sample(name, CUDA, 56, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(name, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(name, static)
    for seed in range(1, 5):
        for key, tensor in sample(name, CUDA, 56, seed).items():
            static[key].copy_(tensor)
        graph.replay()
        assert same([x.clone() for x in results], eager(name, CUDA, 56, seed)), seed


@every_call
def test_compile(device: torch.device, name: str) -> None:
    """One graph without a break, of any number of rows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(tensors: Tensors) -> list[torch.Tensor]:
        return call(name, tensors)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, rows in enumerate(ROWS):
            got = [x.clone() for x in compiled(sample(name, device, rows, seed))]
            for x, y in zip(got, eager(name, device, rows, seed), strict=True):
                # Not by bits: what torch makes of a complex number loses the sign of a zero.
                assert torch.equal(values(x), values(y)), rows
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- utils.dist ----------------------------------------------------------------------------------

GATHER = """
import sys
import torch
from torch import distributed
from sm120_ops.compat.deep_gemm import utils
rank, world, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if device == "cuda":
    got = utils.init_dist(rank, world)
    assert got[:2] == (rank, world)
    assert torch.empty(1).is_cuda
    group = got[2]
else:
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    utils.dist._local_rank, group = rank, None
x = torch.full((3, rank + 1), float(rank), device=device)
whole = utils.uneven_all_gather(x, dim=1, group=group)
assert whole.tolist() == [[float(r) for r in range(world) for _ in range(r + 1)]] * 3
utils.dist.dist_print("met", once_in_node=True)
distributed.destroy_process_group()
"""


def run_ranks(world: int, device: str) -> None:
    # init_dist() reads WORLD_SIZE as the number of nodes.
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_PORT": str(29500 + os.getpid() % 4000), "WORLD_SIZE": "1", "RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHER, str(rank), str(world), device],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world
    assert [output.count("met") for output in outputs] == [1] + [0] * (world - 1)


def test_gather_of_two_ranks() -> None:
    run_ranks(2, "cpu")


@pytest.mark.gpu
def test_gather_over_nccl() -> None:
    run_ranks(torch.cuda.device_count(), "cuda")


def test_dist_print_needs_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_local_rank", None)
    with pytest.raises(RuntimeError, match=r"dist_print: expected init_dist\(\) before it"):
        dist.dist_print("nobody")
