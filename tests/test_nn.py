"""MXLinear and convert()."""

from __future__ import annotations

import copy
import time

import pytest
import reference
import torch
from torch import nn

import sm120_ops
from sm120_ops.nn import MXLinear, convert

CONFIGS = [(f, g) for f in ("mxfp8", "w4a8", "mxfp4") for g in (32, 128)]
# Squared relative error of the product of two normal matrices, one operand in each format.
BOUND = {"mxfp8": 1e-3, "w4a8": 1e-2, "mxfp4": 2.5e-2}


def linear_and_input(
    device: torch.device,
    k: int = 384,
    n: int = 200,
    rows: int = 33,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(k + n)
    linear = nn.Linear(k, n, bias=bias).to(device, dtype)
    return linear, torch.randn(rows, k).to(device, dtype)


@pytest.mark.parametrize(("fmt", "gran_k"), CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_close_to_nn_linear(
    device: torch.device, fmt: str, gran_k: int, dtype: torch.dtype
) -> None:
    for bias in (True, False):
        linear, x = linear_and_input(device, dtype=dtype, bias=bias)
        module = MXLinear.from_float(linear, fmt, gran_k)
        y = module(x)
        assert y.dtype == dtype
        assert y.device.type == device.type
        assert reference.calc_diff(y, linear.double()(x.double())) <= BOUND[fmt]


@pytest.mark.parametrize(("fmt", "gran_k"), CONFIGS)
@torch.no_grad()
def test_is_quantize_and_gemm(device: torch.device, fmt: str, gran_k: int) -> None:
    linear, x = linear_and_input(device)
    module = MXLinear.from_float(linear, fmt, gran_k)
    weight_gran = 32 if fmt == "w4a8" else gran_k
    blocks = 128 if fmt == "mxfp8" and gran_k == 128 else 1
    weight_format = "mxfp8" if fmt == "mxfp8" else "mxfp4"
    input_format = "mxfp4" if fmt == "mxfp4" else "mxfp8"
    a = sm120_ops.quantize(x, input_format, gran_k)
    b = sm120_ops.quantize(linear.weight, weight_format, weight_gran, blocks)
    values = [
        sm120_ops.dequantize(*pair, gran).double() for pair, gran in [(a, gran_k), (b, weight_gran)]
    ]
    expected = values[0] @ values[1].t() + linear.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["mxfp8", "w4a8", "mxfp4"])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (17, 5), (30, 4), (48, 3), (100, 33), (129, 130)])
@torch.no_grad()
def test_any_size(device: torch.device, fmt: str, k: int, n: int) -> None:
    linear, x = linear_and_input(device, k, n)
    y = MXLinear.from_float(linear, fmt)(x)
    assert y.shape == (33, n)
    exact = linear(x)
    if k >= 17:
        assert reference.calc_diff(y, exact) <= 2 * BOUND[fmt]


@torch.no_grad()
def test_leading_dimensions(device: torch.device) -> None:
    linear, x = linear_and_input(device, rows=24)
    module = MXLinear.from_float(linear)
    y = module(x)
    for shape in [(2, 12), (2, 3, 4), (24, 1), (1, 1, 24)]:
        assert torch.equal(module(x.reshape(*shape, 384)), y.reshape(*shape, 200))
    assert torch.equal(module(x[3]), y[3])
    assert module(x[:0]).shape == (0, 200)
    assert module(x.reshape(2, 12, 384)[:, :0]).shape == (2, 0, 200)


@torch.no_grad()
def test_strided_inputs(device: torch.device) -> None:
    linear, x = linear_and_input(device, rows=24)
    module = MXLinear.from_float(linear)
    y = module(x)
    assert torch.equal(module(x.t().contiguous().t()), y)
    by_step = x.reshape(4, 6, 384).transpose(0, 1)
    assert torch.equal(module(by_step), y.reshape(4, 6, 200).transpose(0, 1))
    wide = torch.randn(24, 768, device=device)
    assert torch.equal(module(wide[:, ::2]), module(wide[:, ::2].contiguous()))
    assert torch.equal(module(wide[:, 100:484]), module(wide[:, 100:484].contiguous()))


@pytest.mark.parametrize(("fmt", "gran_k"), CONFIGS)
@torch.no_grad()
def test_state_dict_round_trip(device: torch.device, fmt: str, gran_k: int) -> None:
    linear, x = linear_and_input(device, k=100, n=37)
    module = MXLinear.from_float(linear, fmt, gran_k)
    state = module.state_dict()
    assert list(state) == ["weight", "weight_scale", "bias"]
    other = MXLinear(100, 37, format=fmt, gran_k=gran_k, device=device)
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))
    other = MXLinear(100, 37, format=fmt, gran_k=gran_k, device="meta")
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        MXLinear(132, 37, format=fmt, gran_k=gran_k).load_state_dict(state)
    without = MXLinear.from_float(nn.Linear(64, 8, bias=False), fmt, gran_k)
    assert list(without.state_dict()) == ["weight", "weight_scale"]
    assert without.bias is None


@torch.no_grad()
def test_copies_moves_and_casts(device: torch.device) -> None:
    linear, x = linear_and_input(torch.device("cpu"), n=37)  # rows that need padding
    module = MXLinear.from_float(linear).to(device)
    x = x.to(device)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert torch.equal(module.cpu().to(device)(x), y)
    half = copy.deepcopy(module).to(torch.bfloat16)  # the quantised weight is left alone
    assert half.weight.dtype == torch.int8
    assert half.bias is not None
    assert half.bias.dtype == torch.bfloat16
    assert reference.calc_diff(half(x.bfloat16()), y) < 1e-3


@torch.no_grad()
def test_bias_is_added_before_the_rounding(device: torch.device) -> None:
    """1 + 2^-8 is no bfloat16: with two roundings the 2^-8 of the product would be lost."""
    linear = nn.Linear(32, 8).to(device, torch.bfloat16)
    linear.weight.zero_()
    linear.weight[:, 0] = 2.0**-8
    linear.bias.fill_(1.0)
    x = torch.zeros(4, 32, device=device, dtype=torch.bfloat16)
    x[:, 0] = 1.5
    y = MXLinear.from_float(linear)(x)
    assert (y == torch.tensor(1.0 + 1.5 * 2.0**-8, dtype=torch.bfloat16, device=device)).all()


def test_grad_rule(device: torch.device) -> None:
    linear, x = linear_and_input(device)
    module = MXLinear.from_float(linear)
    assert not list(module.parameters())
    x.requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"sm120_ops.nn.MXLinear: x: expected a tensor that needs"
    ):
        module(x)
    with torch.no_grad():
        y = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), y)
    assert torch.equal(module(x.detach()), y)


def test_wrong_arguments(device: torch.device) -> None:
    linear, x = linear_and_input(device)
    module = MXLinear.from_float(linear)
    prefix = "sm120_ops.nn.MXLinear: "
    with pytest.raises(
        ValueError, match=prefix + r"x: expected shape \[..., 384\], got \[3, 100\]"
    ):
        module(x[:3, :100])
    with pytest.raises(
        TypeError, match=prefix + "x: expected dtype torch.bfloat16, .* torch.int64"
    ):
        module(x.long())
    with pytest.raises(ValueError, match=prefix + "format: expected 'mxfp8', .* got 'fp8'"):
        MXLinear.from_float(linear, "fp8")
    with pytest.raises(ValueError, match=prefix + "gran_k: expected 32 or 128, got 16"):
        MXLinear.from_float(linear, gran_k=16)
    with pytest.raises(TypeError, match=prefix + "linear.weight: .* got torch.float64"):
        MXLinear.from_float(linear.double())
    with pytest.raises(ValueError, match=r"nn.convert: format: expected 'mxfp8', .* got 'int8'"):
        convert(nn.Sequential(linear), "int8")
    if device.type == "cuda":
        with pytest.raises(
            ValueError, match="x: expected a tensor on cuda:0, as weight, got one on"
        ):
            module(x.cpu())


def test_repr() -> None:
    module = MXLinear.from_float(nn.Linear(30, 7), "w4a8", 128)
    assert repr(module) == (
        "MXLinear(in_features=30, out_features=7, bias=True, format=w4a8, gran_k=128)"
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


@torch.no_grad()
def test_convert(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Block(), Block()).eval().to(device)
    x = torch.randn(9, 64, device=device)
    exact = model(x)
    names: list[str] = []

    def keep_first(name: str, module: nn.Module) -> bool:
        assert type(module) is nn.Linear
        names.append(name)
        return name != "0"

    assert convert(model, "mxfp8", keep_first) is model
    assert names == ["0", "1.up", "1.down", "2.up", "2.down"]
    assert type(model[0]) is nn.Linear
    assert sum(isinstance(module, MXLinear) for module in model.modules()) == 4
    assert not any(module.training for module in model.modules())
    assert reference.calc_diff(model(x), exact) < 1e-3
    assert isinstance(convert(nn.Linear(8, 8), "mxfp4"), MXLinear)


def test_convert_shared_and_subclassed_layers() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Identity()})
    model["attention"] = nn.MultiheadAttention(32, 4)
    convert(model)
    assert isinstance(model["a"], MXLinear)
    assert model["a"] is model.get_submodule("b.0")
    assert type(model["attention"].out_proj) is not MXLinear  # its weight is used without a call


@torch.no_grad()
def test_convert_torch_encoder(device: torch.device) -> None:
    """torch's own encoder has a fused inference path that reads linear1.weight."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().to(device)
    x = torch.randn(3, 7, 64, device=device)
    padding = torch.zeros(3, 7, dtype=torch.bool, device=device)
    padding[1, 4:] = True
    exact = model(x, src_key_padding_mask=padding)
    convert(model)
    y = model(x, src_key_padding_mask=padding)
    assert reference.calc_diff(y[~padding], exact[~padding]) < 1e-3
    assert reference.calc_diff(model(x), copy.deepcopy(model)(x)) == pytest.approx(0, abs=1e-12)


@torch.no_grad()
def test_cpu_reference_is_fast_enough_for_a_small_model() -> None:
    """The linear layers of a 6-layer encoder of width 384 on 12 sentences, in seconds."""
    layers = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    modules = [MXLinear.from_float(nn.Linear(*shape), "w4a8") for shape in layers]
    begin = time.perf_counter()
    for _ in range(6):
        for module in modules:
            module(torch.randn(12, 24, module.in_features))
    assert time.perf_counter() - begin < 15
