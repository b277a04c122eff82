"""Plugins of vLLM and SGLang against stubs of their hooks, and the calls the engines make."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_stubs as stubs
import pytest
import torch

import sm120_ops
from sm120_ops import compat, device
from sm120_ops.compat import deep_gemm
from sm120_ops.integrations import sglang as sglang_plugin
from sm120_ops.integrations import vllm as vllm_plugin

ROOT = Path(__file__).resolve().parent.parent
ENV = "SM120_OPS_DEEP_GEMM"
SM120, GB10, H200 = (12, 0), (12, 1), (9, 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins as a new process: nothing installed, no plugin run, no engine loaded."""
    for plugin in (vllm_plugin, sglang_plugin):
        monkeypatch.setattr(plugin, "_done", False)
    monkeypatch.delenv(ENV, raising=False)
    sm120_ops.stats(reset=True)
    before = dict(sys.modules)
    yield
    compat.uninstall()
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("vllm", "sglang", "deep_gemm") or "vllm_linear" in name:
            del sys.modules[name]


def use(monkeypatch: pytest.MonkeyPatch, modules: dict[str, types.ModuleType]) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def gpus(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, int]) -> None:
    monkeypatch.setattr(device, "capabilities", lambda: list(found))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "sm120_ops" in record.name]


# ---- Activation ----------------------------------------------------------------------------------


@pytest.mark.source
def test_entry_points_are_declared() -> None:
    import tomllib  # of Python 3.11, which the build needs as well; the installed package does not

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]
    for group, plugin in (
        ("vllm.general_plugins", vllm_plugin),
        ("sglang.srt.plugins", sglang_plugin),
    ):
        module, function = points[group]["sm120_ops"].split(":")
        assert getattr(importlib.import_module(module), function) is plugin.register


@pytest.mark.parametrize("plugin", [vllm_plugin, sglang_plugin])
@pytest.mark.parametrize(
    ("value", "found", "active"),
    [
        (None, [SM120], False),
        ("0", [SM120], False),
        ("", [SM120], False),
        ("1", [SM120], True),
        ("1", [GB10], True),
        ("1", [H200], False),
        ("1", [SM120, H200], False),
        ("1", [], False),
        ("yes", [SM120], False),
        ("force", [H200], True),
        ("force", [], True),
    ],
)
def test_when_a_plugin_acts(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    plugin: Any,
    value: str | None,
    found: list[tuple[int, int]],
    active: bool,
) -> None:
    use(monkeypatch, stubs.vllm_modules())
    use(monkeypatch, stubs.sglang_modules())
    gpus(monkeypatch, *found)
    if value is not None:
        monkeypatch.setenv(ENV, value)
    with caplog.at_level(logging.INFO):
        plugin.register()
        plugin.register()
    assert compat.installed() is active
    expected = 0 if value in (None, "0", "") else 1
    assert len(lines(caplog)) == expected
    if active:
        import deep_gemm as module

        assert module.fp8_gemm_nt is deep_gemm.fp8_gemm_nt
        assert sm120_ops.stats()["active"]["deep_gemm"] == "installed"


@pytest.mark.parametrize("plugin", [vllm_plugin, sglang_plugin])
def test_refuses_to_shadow(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    plugin: Any,
) -> None:
    use(monkeypatch, stubs.vllm_modules())
    monkeypatch.setitem(sys.modules, "deep_gemm", types.ModuleType("deep_gemm"))
    gpus(monkeypatch, SM120)
    monkeypatch.setenv(ENV, "1")
    with caplog.at_level(logging.INFO):
        plugin.register()
    assert not compat.installed()
    (line,) = lines(caplog)
    assert "is off" in line
    assert "SM120_OPS_DEEP_GEMM=force" in line


def test_plugins_touch_no_gpu_and_survive_fork() -> None:
    """In a process of its own: import, activation, fork; torch has no CUDA context after it."""
    code = """
import os, sys
import sm120_ops.integrations.vllm as plugin
from sm120_ops.integrations import sglang as other
import torch
plugin.register(); other.register()
import deep_gemm
assert deep_gemm.__name__ == "deep_gemm"
assert not torch.cuda.is_initialized()
pid = os.fork()
if pid == 0:
    plugin.register()
    x = torch.randn(4, 128)
    d = torch.empty(4, 4, dtype=torch.bfloat16)
    a = deep_gemm.per_token_cast_to_fp8(x, True)
    deep_gemm.fp8_gemm_nt(a, a, d, recipe_a=(1, 128), recipe_b=(1, 128))
    os._exit(0 if d.isfinite().all() and not torch.cuda.is_initialized() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    env = {**os.environ, ENV: "force", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


# ---- vLLM: finding deep_gemm ---------------------------------------------------------------------


def test_found_as_vllm_looks_for_it() -> None:
    """vLLM asks find_spec() and imports; then it takes each name by getattr with a default."""
    compat.install()
    spec = importlib.util.find_spec("deep_gemm")
    assert spec is not None
    assert spec.name == "deep_gemm"
    assert spec.origin is not None
    assert Path(spec.origin).is_file()
    module = importlib.import_module("deep_gemm")
    assert module.__spec__ is spec
    import deep_gemm.utils.layout as layout_module

    assert layout_module is sys.modules["deep_gemm"].utils.layout
    assert [int(part) for part in module.__version__.split(".")] >= [2, 8]
    for name in VLLM_NAMES:
        assert callable(getattr(module, name, None)), name
    # Optional ones are left to be missing, or to the copy that vLLM brings along.
    assert getattr(module, "fp8_fp4_sparse_mqa_logits", None) is None


# By `getattr(_dg, name, None)` in vllm/utils/deep_gemm.py, without the kernels of SM100 alone.
VLLM_NAMES = [
    "cublaslt_gemm_nt",
    "fp8_gemm_nt",
    "fp8_einsum",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "get_paged_mqa_logits_metadata",
    "tf32_hc_prenorm_gemm",
    "get_mn_major_tma_aligned_tensor",
    "get_mk_alignment_for_contiguous_layout",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "set_mk_alignment_for_contiguous_layout",
    "transform_sf_into_required_layout",
    "pack_ue8m0_to_int",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_num_sms",
    "set_num_sms",
    "set_pdl",
]


def test_falls_through_to_vllms_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = types.ModuleType("vllm.third_party.deep_gemm")
    copy.mega_mhc = lambda: "theirs"  # type: ignore[attr-defined]
    copy.fp8_gemm_nt = None  # type: ignore[attr-defined]
    module = compat.install()
    assert not hasattr(module, "mega_mhc")
    use(monkeypatch, stubs.vllm_modules())
    monkeypatch.setitem(sys.modules, "vllm.third_party", types.ModuleType("vllm.third_party"))
    monkeypatch.setitem(sys.modules, "vllm.third_party.deep_gemm", copy)
    assert module.mega_mhc() == "theirs"
    assert module.fp8_gemm_nt is deep_gemm.fp8_gemm_nt
    assert not hasattr(module, "no_such_name")


# ---- vLLM: linear kernels ------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{kind: the first kernel of vLLM's list}, after the plugin has run on an RTX card."""
    modules = stubs.vllm_modules()
    use(monkeypatch, modules)
    gpus(monkeypatch, SM120)
    monkeypatch.setenv(ENV, "1")
    vllm_plugin.register()
    linear = modules["vllm.model_executor.kernels.linear"]
    lists = {
        kind: getattr(linear, f"_POSSIBLE_{kind.upper()}_KERNELS")[stubs.PlatformEnum.CUDA]
        for kind in ("fp8_block", "mxfp8", "mxfp4")
    }
    for kept in lists.values():
        assert [kernel.__name__.startswith("Sm120Ops") for kernel in kept] == [True, False]
    return {kind: kept[0] for kind, kept in lists.items()}


def test_old_vllm_without_the_hook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, stubs.vllm_modules(hook=False))
    gpus(monkeypatch, SM120)
    monkeypatch.setenv(ENV, "1")
    with caplog.at_level(logging.INFO):
        vllm_plugin.register()
    assert compat.installed()
    (line,) = lines(caplog)
    assert "serves deep_gemm and no linear kernels (this vLLM lacks the hook" in line


def test_registered_twice_is_there_once(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_plugin, "_done", False)
    vllm_plugin.register()
    linear = sys.modules["vllm.model_executor.kernels.linear"]
    kept = linear._POSSIBLE_MXFP8_KERNELS[stubs.PlatformEnum.CUDA]
    assert kept == [kernels["mxfp8"], stubs._Other]


@pytest.mark.parametrize("kind", ["fp8_block", "mxfp8", "mxfp4"])
def test_is_supported(kernels: dict[str, Any], kind: str) -> None:
    assert kernels[kind].is_supported() == (True, None)
    assert kernels[kind].is_supported(121) == (True, None)
    supported, reason = kernels[kind].is_supported(90)
    assert not supported
    assert "12.x" in reason


class Layer(torch.nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def group_key(dtype: torch.dtype, static: bool, rows: int, columns: int) -> stubs.QuantKey:
    shape = stubs.GroupShape(rows, columns)
    return stubs.QuantKey(dtype, stubs.ScaleDesc(torch.float32, static, shape))


def block_config(n: int, k: int, block: int = 128) -> stubs.FP8ScaledMMLinearLayerConfig:
    fp8 = torch.float8_e4m3fn
    weight, x = group_key(fp8, True, block, block), group_key(fp8, False, 1, block)
    return stubs.FP8ScaledMMLinearLayerConfig(weight, x, (n, k), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("use_ue8m0", [True, False])
@pytest.mark.parametrize("scale_name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("block", [128, 32])
def test_fp8_block_layer(
    device: torch.device,
    kernels: dict[str, Any],
    scale_dtype: torch.dtype,
    use_ue8m0: bool,
    scale_name: str,
    block: int,
) -> None:
    if scale_dtype != torch.float32 and not use_ue8m0:
        return  # bytes are powers of two
    torch.manual_seed(0)
    n, k = 200, 320
    w = torch.randn(n, k, device=device)
    data, scale = deep_gemm.per_block_cast_to_fp8(w, use_ue8m0, block)
    if scale_dtype != torch.float32:
        scale = (scale.view(torch.int32) >> 23).to(torch.uint8).view(scale_dtype)
    layer = Layer(**{"weight": data, scale_name: scale})
    config = block_config(n, k, block)
    assert kernels["fp8_block"].can_implement(config) == (True, None)
    kernel = kernels["fp8_block"](config)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(2, 3, k, device=device, dtype=torch.bfloat16)
    bias = torch.randn(n, device=device, dtype=torch.bfloat16)
    y = kernel.apply_weights(layer, x, bias)
    assert y.shape == (2, 3, n)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x.float() @ w.t() + bias) < 0.06
    calls = sm120_ops.stats()["calls"]
    assert calls["vllm.fp8_block"] == calls["vllm.fp8_block layers loaded"] == 1


def test_fp8_block_refuses(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels["fp8_block"]
    odd = block_config(128, 128)
    odd.activation_quant_key = group_key(torch.float8_e4m3fn, False, 1, 64)
    assert not kernel.can_implement(odd)[0]
    assert not kernel.can_implement(block_config(128, 136))[0]
    other = stubs.vllm_modules(model_type="qwen3_5_text")
    monkeypatch.setitem(sys.modules, "vllm.config", other["vllm.config"])
    able, reason = kernel.can_implement(block_config(128, 128))
    assert not able
    assert "qwen3_5_text" in reason


def test_fp8_block_layer_for_einsum(device: torch.device, kernels: dict[str, Any]) -> None:
    """DeepSeek-V4's wo_a: the engine takes weight [g, r, d] and packed scales and multiplies."""
    torch.manual_seed(0)
    groups, rows, k = 2, 256, 512
    w = torch.randn(groups * rows, k, device=device)
    data, scale = deep_gemm.per_block_cast_to_fp8(w, True)
    layer = Layer(weight=data, weight_scale_inv=scale)
    layer.is_bmm, layer.bmm_batch_size = True, groups  # type: ignore[assignment]
    kernel = kernels["fp8_block"](block_config(groups * rows, k))
    kernel.process_weights_after_loading(layer)
    assert layer.weight.shape == (groups, rows, k)
    assert layer.weight_scale_inv.shape == (groups, rows, 1)
    assert layer.weight_scale_inv.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mxfp8_layer(device: torch.device, kernels: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n, k = 70, 288
    w = torch.randn(n, k, device=device)
    data, packed = sm120_ops.quantize(w, "mxfp8")
    layer = Layer(weight=data, weight_scale=sm120_ops.unpack_scales(packed, k // 32))
    kernel = kernels["mxfp8"](stubs.Mxfp8LinearLayerConfig((n, k)))
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, k, device=device, dtype=dtype)
    bias = torch.randn(n, device=device, dtype=dtype)
    y = kernel.apply_weights(layer, x, bias)
    assert y.dtype == dtype
    assert relative_error(y, x.float() @ w.t() + bias) < 0.06
    assert not kernels["mxfp8"].can_implement(stubs.Mxfp8LinearLayerConfig((n, k), 4))[0]


@pytest.mark.parametrize(
    ("key", "limit"), [(stubs.MXFP4_DYNAMIC, 0.25), (stubs.MXFP8_DYNAMIC, 0.15)]
)
def test_mxfp4_layer(
    device: torch.device, kernels: dict[str, Any], key: stubs.QuantKey, limit: float
) -> None:
    torch.manual_seed(0)
    n, k = 70, 320
    w = torch.randn(n, k, device=device)
    data, packed = sm120_ops.quantize(w, "mxfp4")
    layer = Layer(weight=data, weight_scale=sm120_ops.unpack_scales(packed, k // 32))
    config = stubs.MxFp4LinearLayerConfig(key)
    assert kernels["mxfp4"]._supports_quant_scheme(stubs.MXFP4_STATIC, key)
    kernel = kernels["mxfp4"](config)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, k, device=device, dtype=torch.bfloat16)
    assert relative_error(kernel.apply_weights(layer, x), x.float() @ w.t()) < limit


def test_mxfp4_keeps_off_unquantised_inputs(kernels: dict[str, Any]) -> None:
    assert not kernels["mxfp4"].can_implement(stubs.MxFp4LinearLayerConfig(None))[0]
    assert not kernels["mxfp4"]._supports_quant_scheme(stubs.MXFP4_STATIC, None)
    assert kernels["mxfp4"].can_implement(object())[0]  # versions without the key


# ---- SGLang --------------------------------------------------------------------------------------


def test_sglang_hooks_replace_functions_already_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler process: its modules have bound names of the real deep_gemm."""
    modules = stubs.sglang_modules()
    use(monkeypatch, modules)
    real = types.ModuleType("deep_gemm")
    theirs = {name: (lambda *a, name=name: name) for name in ("fp8_gemm_nt", "fp8_fp4_mega_moe")}
    real.__dict__.update(theirs)
    user = types.ModuleType("sglang.user")
    user.__dict__.update(deep_gemm=real, gemm=real.fp8_gemm_nt)
    monkeypatch.setitem(sys.modules, "deep_gemm", real)
    monkeypatch.setitem(sys.modules, "sglang.user", user)
    monkeypatch.setenv(ENV, "force")
    with caplog.at_level(logging.INFO):
        sglang_plugin.register()
    modules["sglang.srt.plugins.hook_registry"].HookRegistry.apply_hooks()
    for function in (user.gemm, user.deep_gemm.fp8_gemm_nt):
        assert function.func is deep_gemm.fp8_gemm_nt
    assert real.fp8_fp4_mega_moe() == "fp8_fp4_mega_moe"
    assert sys.modules["deep_gemm"] is real
    (line,) = lines(caplog)
    assert "serves 1 functions of" in line


def test_sglang_without_hooks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", types.ModuleType("deep_gemm"))
    monkeypatch.setenv(ENV, "force")
    sglang_plugin.register()
    (line,) = lines(caplog)
    assert "has no HookRegistry" in line
