"""What holds for every op alike: torch.library's checks, torch.compile, export, CUDA graphs,
streams, devices, threads, processes. The table of samples is op_samples.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import op_cases_gemm  # noqa: F401
import op_cases_model  # noqa: F401
import op_samples
import pytest
import reference
import torch
from op_samples import CASES, call, overload, sample

from sm120_ops.ops.layout import fresh

TESTS = Path(__file__).resolve().parent
SIZES = [7, 3, 64, 2, 100, 33, 5, 128, 20, 19]

every_op = pytest.mark.parametrize("name", CASES)


def defined(name: str, results: list[torch.Tensor]) -> list[torch.Tensor]:
    return [result.clone() for result in CASES[name].defined(results)]


def eager(name: str, device: torch.device, rows: int, seed: int) -> list[torch.Tensor]:
    return defined(name, call(name, sample(name, device, rows, seed)))


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(got) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw(a), raw(b))
        for a, b in zip(got, wanted, strict=True)
    )


def test_every_registered_op_has_a_sample() -> None:
    assert sorted(CASES) == op_samples.registered()
    assert len(CASES) >= 40


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New memory has contents of its own, so that two runs agree in what an op leaves undefined."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@every_op
@pytest.mark.usefixtures("filled_memory")
def test_opcheck(device: torch.device, name: str) -> None:
    """Schema, mutations, fake kernel, autograd registration, tracing with symbolic shapes."""
    # opcheck clones its arguments, and a clone of packed scales is padded for rows % 4 == 0 alone.
    args, kwargs = CASES[name].bind(sample(name, device, 8))
    reference.opcheck(overload(name), args, kwargs)


@every_op
def test_no_gradient(device: torch.device, name: str) -> None:
    """As documented of the raw ops: results carry none, or torch warns on the way back."""
    tensors = sample(name, device, 8)
    floats = [
        x.requires_grad_()
        for key, x in tensors.items()
        if x.dtype in (torch.float32, torch.bfloat16) and key not in CASES[name].outputs
    ]
    results = [x for x in call(name, tensors) if x.requires_grad]
    if results:
        with pytest.warns(UserWarning, match=f"{name}: an autograd kernel was not registered"):
            torch.autograd.backward([x.float().nan_to_num(0, 0, 0).sum() for x in results])
    assert [x.grad for x in floats] == [None] * len(floats)


@every_op
def test_samples_with_other_seeds_differ(name: str) -> None:
    """Else the tests below would replay what they captured."""
    cpu = torch.device("cpu")
    assert not same(eager(name, cpu, 33, 1), eager(name, cpu, 33, 2))
    assert same(eager(name, cpu, 33, 1), eager(name, cpu, 33, 1))


@every_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device: torch.device, name: str, backend: str) -> None:
    """One graph without a break for ten sizes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(tensors: op_samples.Tensors) -> list[torch.Tensor]:
        # Packed scales leave the graph as row-major copies: Inductor asks of a graph's outputs
        # whether they are dense, and has a second graph for the sizes of which that is true.
        return [x if x.stride(-1) == 1 else fresh(x) for x in call(name, tensors)]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, rows in enumerate(SIZES):
            got = defined(name, compiled(sample(name, device, rows, seed)))
            assert same(got, eager(name, device, rows, seed)), rows
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Module(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, tensors: op_samples.Tensors) -> list[torch.Tensor]:
        return call(self.name, tensors)


@every_op
def test_export(device: torch.device, name: str) -> None:
    small, large = (sample(name, device, rows) for rows in (24, 40))
    varying = {
        key: {
            dim: torch.export.Dim.AUTO
            for dim in range(x.dim())
            if x.shape[dim] != large[key].shape[dim]
        }
        for key, x in small.items()
    }
    program = torch.export.export(Module(name), (small,), dynamic_shapes={"tensors": varying})
    for rows in (24, 9, 77):
        got = defined(name, program.module()(sample(name, device, rows, 3)))
        assert same(got, eager(name, device, rows, 3))


@every_op
def test_threads(device: torch.device, name: str) -> None:
    """Eight threads, each with contents of its own."""
    seeds = range(8)
    wanted = [eager(name, device, 33, seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        for _ in range(3):
            got = list(pool.map(lambda seed: eager(name, device, 33, seed), seeds))
            assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


# ---- GPU -----------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("rows", [2, 33, 128])
def test_graph(name: str, rows: int) -> None:
    """Captured once; replayed with other contents of every input, and outputs poisoned again."""
    static = sample(name, CUDA, rows, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(name, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(name, static)
    for seed in range(1, 6):
        for key, tensor in sample(name, CUDA, rows, seed).items():
            assert static[key].stride() == tensor.stride()
            static[key].copy_(tensor)
        graph.replay()
        assert same(defined(name, results), eager(name, CUDA, rows, seed)), seed


@pytest.mark.gpu
@every_op
def test_streams(name: str) -> None:
    """Two side streams at once, each held up first; work on the wrong stream would overtake it."""
    wanted = [eager(name, CUDA, 33, seed) for seed in (1, 2)]
    inputs = [sample(name, CUDA, 33, seed) for seed in (1, 2)]
    late = [sample(name, CUDA, 33, 9) for _ in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for stream, held, tensors in zip(streams, late, inputs, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for key, x in tensors.items():
                held[key].copy_(x)
            results.append(call(name, held))
    torch.cuda.synchronize()
    for got, expected in zip(results, wanted, strict=True):
        assert same(defined(name, got), expected)


@pytest.mark.gpu
@every_op
def test_second_device(name: str) -> None:
    """Tensors on cuda:1 while cuda:0 is current; the result is there, and so is the work."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU on this machine")
    wanted = eager(name, CUDA, 33, 1)
    results = eager(name, torch.device("cuda", 1), 33, 1)
    assert torch.cuda.current_device() == 0
    assert all(result.device.index == 1 for result in results)
    assert same([result.to(CUDA) for result in results], wanted)


def run_all(extra: str, **environment: str) -> None:
    """Every op twice in a process of its own, on the GPU where there is one."""
    code = f"""
import os, sys
import torch
import op_cases_gemm, op_cases_model, op_samples

def all_ops():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, case in op_samples.CASES.items():
        runs = [
            case.defined(op_samples.call(name, op_samples.sample(name, device, 33, 1)))
            for _ in range(2)
        ]
        for one, other in zip(*runs):
            one, other = (x.contiguous().view(-1).view(torch.uint8) for x in (one, other))
            assert torch.equal(one, other), name
{extra}
"""
    path = os.pathsep.join([str(TESTS), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=300)


def test_fork_after_import() -> None:
    """A worker that an engine forks after the import, before anyone has used CUDA."""
    run_all("""
pid = os.fork()
if pid == 0:
    all_ops()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""")


@pytest.mark.gpu
def test_without_caching_allocator() -> None:
    """Every tensor is an allocation of its own: what is read past one is not another's."""
    run_all("all_ops()\ntorch.cuda.synchronize()", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
