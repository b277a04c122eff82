"""torch.compile, export and fake tensors: one graph for every batch size, strides as in eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import sm120_ops
from sm120_ops.nn import MXLinear, convert

BACKENDS = ["eager", "aot_eager", "inductor"]
SIZES = [7, 3, 64, 2, 100, 33, 5, 128, 20, 19]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def run_sizes(
    function: Callable[[torch.Tensor], torch.Tensor], backend: str, k: int, device: torch.device
) -> None:
    """Compiles once, runs ten batch sizes, and compares each with eager, bit for bit."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            x = torch.randn(size, k, device=device).bfloat16()
            got, expected = compiled(x), function(x)
            assert got.stride() == expected.stride()
            assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("fmt", "gran_k"), [("mxfp8", 32), ("mxfp8", 128), ("w4a8", 32)])
def test_linear(device: torch.device, backend: str, fmt: str, gran_k: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 70).to(device, torch.bfloat16)
    run_sizes(MXLinear.from_float(linear, fmt, gran_k), backend, 256, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_with_padded_k(device: torch.device, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 36), nn.ReLU(), nn.Linear(36, 50, bias=False), nn.Tanh())
    run_sizes(convert(model.to(device, torch.bfloat16), "mxfp4"), backend, 100, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_dimensional_input(device: torch.device, backend: str) -> None:
    module = MXLinear.from_float(nn.Linear(64, 32).to(device))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(2, 3), (5, 7), (3, 50), (9, 2)]:
            x = torch.randn(*shape, 64, device=device)
            assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_forms(device: torch.device, backend: str) -> None:
    """float32 and byte scales, per row and per block; the float32 check is left out."""
    w = torch.randn(256, 256, device=device)
    w_data, w_scale = sm120_ops.quantize(w, "mxfp8", 128, 128)
    w_blocks = sm120_ops.unpack_scales(w_scale, 2, torch.float32)[::128].contiguous()

    def function(x: torch.Tensor) -> torch.Tensor:
        data, scale = sm120_ops.quantize(x, "mxfp8", 128)
        rows = sm120_ops.unpack_scales(scale, 2, torch.float32)
        as_bytes = sm120_ops.unpack_scales(scale, 2)
        d = sm120_ops.gemm((data, rows), (w_data, w_blocks), out_dtype=torch.float32)
        return sm120_ops.gemm((data, as_bytes), (w_data, w_scale), gran_k_b=128, c=d)

    run_sizes(function, backend, 256, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_forms_and_head_splits(device: torch.device, backend: str) -> None:
    w = sm120_ops.quantize(torch.randn(64, 256, device=device), "mxfp4")

    def function(x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        data = torch.empty(rows, 256, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(2, (rows + 3) // 4 * 4, dtype=torch.int32, device=x.device).t()[:rows]
        sm120_ops.quantize(x, out=(data, scale))
        out = torch.zeros(rows, 80, device=x.device)
        sm120_ops.gemm((data, scale), w, head_splits=[16, 4, 0], out=out, gran_k_a=32, gran_k_b=32)
        values = sm120_ops.dequantize(data, scale, 32, torch.float32)
        return out * 2 + values.sum(1, keepdim=True)

    run_sizes(function, backend, 256, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_fp4(device: torch.device, backend: str) -> None:
    w_data, w_scale = sm120_ops.quantize(torch.randn(96, 64, device=device), "mxfp4")
    codes = sm120_ops.unpack_fp4(w_data)

    def function(x: torch.Tensor) -> torch.Tensor:
        repacked = sm120_ops.pack_fp4(codes)
        columns = sm120_ops.transpose_fp4(repacked)  # [K, N / 2]
        a = sm120_ops.quantize(x, "mxfp8")
        return sm120_ops.gemm_nn(a, (columns, w_scale), gran_k_a=32, gran_k_b=32)

    run_sizes(function, backend, 64, device)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_rows_chosen_by_data(device: torch.device, backend: str) -> None:
    """A row count that only the device knows, as of tokens routed to an expert."""
    module = MXLinear.from_float(nn.Linear(64, 32, device=device, dtype=torch.bfloat16))

    def function(x: torch.Tensor) -> torch.Tensor:
        return module(x[x[:, 0] > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        with torch.no_grad():
            for seed in range(3):
                torch.manual_seed(seed)
                x = torch.randn(40, 64, device=device).bfloat16()
                assert torch.equal(compiled(x), function(x))


def test_errors_under_compile(device: torch.device) -> None:
    compiled = torch.compile(sm120_ops.quantize, fullgraph=True, backend="eager")
    with pytest.raises(
        Exception, match=r"sm120_ops.quantize: x: expected K to be a multiple of 16"
    ):
        compiled(torch.randn(4, 24, device=device))
    x = torch.randn(4, 32, device=device, requires_grad=True)
    with pytest.raises(
        Exception, match=r"sm120_ops.quantize: x: expected a tensor that needs no grad"
    ):
        compiled(x)


def test_export(device: torch.device) -> None:
    module = MXLinear.from_float(nn.Linear(64, 48).to(device)).eval()
    x = torch.randn(8, 64, device=device)
    rows = torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: rows}})
        for size in (8, 3, 301):
            x = torch.randn(size, 64, device=device)
            assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("rows", [0, 1, 4, 37])
def test_fake_tensors_match_real_ones(device: torch.device, fmt: str, rows: int) -> None:
    """Shape, stride, dtype of every op; fake CUDA tensors need no GPU."""
    torch.manual_seed(0)
    x = torch.randn(rows, 288, device=device)
    w = torch.randn(40, 288, device=device)
    ops = torch.ops.sm120

    def everything(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        results: list[torch.Tensor] = []
        for gran_k, gran_mn in itertools.product((32, 128), (1, 32, 128)):
            data, scale = ops.quantize(x, fmt, gran_k, gran_mn, "ocp")
            w_data, w_scale = ops.quantize(w, fmt, gran_k, gran_mn)
            groups = 9 if gran_k == 32 else 3
            floats = ops.unpack_scales(scale, groups, torch.float32)
            results += [data, scale, floats, ops.unpack_scales(scale, groups, torch.uint8)]
            results += [ops.pack_scales(floats, x.shape[0], 1)]
            results += [ops.dequantize(data, scale, gran_k, torch.bfloat16)]
            args = (data, scale, w_data, w_scale, gran_k, gran_k, torch.float32)
            results += [ops.gemm(*args), ops.gemm(*args, None, [4, 3, 1])]
        codes = ops.unpack_fp4(w_data.view(torch.uint8))
        return [*results, codes, ops.pack_fp4(codes), ops.transpose_fp4(codes)]

    real = everything(x, w)
    with FakeTensorMode() as mode:
        fake = everything(mode.from_tensor(x), mode.from_tensor(w))
        elsewhere = everything(
            torch.empty(rows, 288, device="cuda"), torch.empty(40, 288, device="cuda")
        )
    for one, other, cuda in zip(real, fake, elsewhere, strict=True):
        assert one.shape == other.shape == cuda.shape
        assert one.dtype == other.dtype == cuda.dtype
        assert one.device == other.device
        assert cuda.device.type == "cuda"
        if one.numel() > 0:
            assert one.stride() == other.stride() == cuda.stride()
    meta = everything(x.to("meta"), w.to("meta"))
    assert [one.shape for one in meta] == [one.shape for one in real]


@pytest.mark.parametrize("dynamic", [True, None])
def test_batch_of_one_and_automatic_dynamic_shapes(
    device: torch.device, dynamic: bool | None
) -> None:
    """torch gives size 1 a graph of its own, and by default the very first size; no op adds any."""
    module = MXLinear.from_float(nn.Linear(64, 32, device=device))
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for size in [1, *SIZES, 1]:
            x = torch.randn(size, 64, device=device)
            assert torch.equal(compiled(x), module(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
