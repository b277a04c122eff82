"""Stand-ins for the parts of vLLM and SGLang that the plugins touch, with their real signatures.

Read from vLLM 0.33.0 (vllm/model_executor/kernels/linear/__init__.py, base.py,
scaled_mm/BlockScaledMMLinearKernel.py, mxfp8/Mxfp8LinearKernel.py, mxfp4/base.py,
layers/quantization/utils/quant_utils.py, model_executor/utils.py, platforms/interface.py,
utils/deep_gemm.py) and SGLang 0.5.23 (sglang/srt/plugins/hook_registry.py). What they do is cut
down to what a plugin can see of it.
"""

from __future__ import annotations

import contextvars
import enum
import functools
import importlib
import sys
import types
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

VLLM_VERSION = "0.33.0"
SGLANG_VERSION = "0.5.23"


# ---- vLLM: quantisation keys ---------------------------------------------------------------------


class GroupShape(NamedTuple):
    row: int
    col: int


@dataclass(frozen=True)
class ScaleDesc:
    dtype: torch.dtype
    static: bool
    group_shape: GroupShape


@dataclass(frozen=True)
class QuantKey:
    dtype: torch.dtype
    scale: ScaleDesc
    symmetric: bool = True


def _key(dtype: torch.dtype, static: bool) -> QuantKey:
    return QuantKey(dtype, ScaleDesc(torch.uint8, static, GroupShape(1, 32)))


MXFP4_STATIC, MXFP4_DYNAMIC = _key(torch.uint8, True), _key(torch.uint8, False)
MXFP8_DYNAMIC = _key(torch.float8_e4m3fn, False)


# ---- vLLM: linear kernels ------------------------------------------------------------------------

Answer = tuple[bool, str | None]


class PlatformEnum(enum.Enum):
    CUDA = enum.auto()
    ROCM = enum.auto()
    CPU = enum.auto()


class DeviceCapability(NamedTuple):
    major: int
    minor: int


class CudaPlatform:
    _enum = PlatformEnum.CUDA

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = DeviceCapability(*capability)

    def is_cuda(self) -> bool:
        return True

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        return self.capability


@dataclass
class FP8ScaledMMLinearLayerConfig:
    weight_quant_key: QuantKey
    activation_quant_key: QuantKey
    weight_shape: tuple[int, int]
    input_dtype: torch.dtype
    out_dtype: torch.dtype


class Fp8BlockScaledMMLinearKernel(ABC):
    apply_input_quant = True

    def __init__(self, config: FP8ScaledMMLinearLayerConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability: int | None = None) -> Answer: ...

    @classmethod
    def can_implement(cls, config: FP8ScaledMMLinearLayerConfig) -> Answer:
        static = config.activation_quant_key.scale.static
        return (False, "dynamic activation scales only") if static else (True, None)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The real one normalises AMD's FP8 and else leaves the weight as it is."""
        del layer

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        assert not self.apply_input_quant
        inverse = getattr(layer, "weight_scale_inv", None)
        scale = layer.weight_scale if inverse is None else inverse
        rows = x.view(-1, x.shape[-1])
        out = self.apply_block_scaled_mm(A=rows, B=layer.weight, As=rows.new_empty(1), Bs=scale)
        if bias is not None:
            out = out + bias
        return out.to(dtype=self.config.out_dtype).view(*x.shape[:-1], layer.weight.shape[0])

    @abstractmethod
    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass
class Mxfp8LinearLayerConfig:
    weight_shape: tuple[int, int]
    bmm_batch_size: int | None = None


@dataclass
class MxFp4LinearLayerConfig:
    activation_quant_key: QuantKey | None = None


class _MxKernel(ABC):
    def __init__(self, config: Any) -> None:
        assert self.can_implement(config)[0]
        assert self.is_supported()[0]
        self.config = config

    @classmethod
    @abstractmethod
    def is_supported(cls, compute_capability: int | None = None) -> Answer: ...

    @classmethod
    @abstractmethod
    def can_implement(cls, config: Any) -> Answer: ...

    @abstractmethod
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...

    @abstractmethod
    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor: ...


class Mxfp8LinearKernel(_MxKernel):
    supports_pre_processed_weights: bool = False

    def input_quant_key(self) -> QuantKey | None:
        return None


class MxFp4LinearKernel(_MxKernel):
    @classmethod
    def _supports_quant_scheme(
        cls, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return weight_key == MXFP4_STATIC and activation_key in (None, MXFP4_DYNAMIC)


class _Other:
    """A kernel that is in vLLM's list before ours."""


def replace_parameter(
    layer: torch.nn.Module, param_name: str, new_tensor: torch.Tensor | None
) -> None:
    old = getattr(layer, param_name)
    same = new_tensor is not None and (
        old.shape == new_tensor.shape
        and old.stride() == new_tensor.stride()
        and old.dtype == new_tensor.dtype
    )
    if new_tensor is not None and same:
        old.data.copy_(new_tensor)
    elif new_tensor is not None:
        setattr(layer, param_name, torch.nn.Parameter(new_tensor, requires_grad=False))


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def _with_parents(modules: list[types.ModuleType]) -> dict[str, types.ModuleType]:
    found = {module.__name__: module for module in modules}
    for name in list(found):
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            package = found.setdefault(parent, types.ModuleType(parent))
            package.__path__ = []
            child = ".".join(parts[: end + 1])
            setattr(package, parts[end], found.setdefault(child, types.ModuleType(child)))
    return found


def vllm_modules(
    capability: tuple[int, int] = (12, 0), *, hook: bool = True, model_type: str = "deepseek_v4"
) -> dict[str, types.ModuleType]:
    """What `sys.modules` has of vLLM, as far as the plugin looks."""
    lists: dict[str, dict[PlatformEnum, list[type]]] = {
        f"_POSSIBLE_{kind}_KERNELS": {PlatformEnum.CUDA: [_Other]}
        for kind in ("FP8_BLOCK", "MXFP8", "MXFP4")
    }

    def register_linear_kernel(
        kernel_class: type, platform: PlatformEnum, kernel_type: str = "mp"
    ) -> None:
        name = f"_POSSIBLE_{kernel_type.upper()}_KERNELS"
        if name not in lists:
            raise ValueError(f"Unrecognized kernel type: {kernel_type}")
        lists[name].setdefault(platform, []).append(kernel_class)

    def should_auto_disable_deep_gemm(model_type: str | None) -> bool:
        return model_type in ("qwen3_5_text", "qwen3_5_moe_text", "kolibri1")

    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            hf_text_config=types.SimpleNamespace(model_type=model_type)
        )
    )
    linear = _module(
        "vllm.model_executor.kernels.linear",
        Fp8BlockScaledMMLinearKernel=Fp8BlockScaledMMLinearKernel,
        Mxfp8LinearKernel=Mxfp8LinearKernel,
        MxFp4LinearKernel=MxFp4LinearKernel,
        **lists,
    )
    if hook:
        linear.__dict__["register_linear_kernel"] = register_linear_kernel
    return _with_parents(
        [
            linear,
            _module(
                "vllm.platforms",
                PlatformEnum=PlatformEnum,
                current_platform=CudaPlatform(capability),
            ),
            _module(
                "vllm.model_executor.layers.quantization.utils.quant_utils",
                kMxfp4Static=MXFP4_STATIC,
                kMxfp4Dynamic=MXFP4_DYNAMIC,
                kMxfp8Dynamic=MXFP8_DYNAMIC,
            ),
            _module("vllm.model_executor.utils", replace_parameter=replace_parameter),
            _module("vllm.config", get_current_vllm_config=lambda: config),
            _module(
                "vllm.utils.deep_gemm",
                should_auto_disable_deep_gemm=should_auto_disable_deep_gemm,
                _fp8_gemm_nt_impl=None,
            ),
        ]
    )


# ---- SGLang: hooks -------------------------------------------------------------------------------


class HookSource(NamedTuple):
    plugin_name: str
    dist_name: str | None


Hook = tuple["HookType", Callable[..., Any], HookSource | None]


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


def sglang_modules() -> dict[str, types.ModuleType]:
    """sglang.srt.plugins.hook_registry with a registry of its own."""
    current: contextvars.ContextVar[HookSource | None] = contextvars.ContextVar("s", default=None)

    class HookRegistry:
        _hooks: ClassVar[dict[str, list[Hook]]] = defaultdict(list)
        _patched: ClassVar[set[str]] = set()

        @classmethod
        def register(
            cls,
            target: str,
            hook: Callable[..., Any],
            hook_type: HookType = HookType.AFTER,
            *,
            source: HookSource | None = None,
        ) -> None:
            if isinstance(hook, type) and hook_type != HookType.REPLACE:
                raise TypeError("a class can only replace")
            cls._hooks[target].append((hook_type, hook, source or current.get()))

        @classmethod
        def apply_hooks(cls) -> None:
            """Replaces the targets, and every other binding of them in a loaded module."""
            for target, hooks in cls._hooks.items():
                if target in cls._patched:
                    continue
                cls._patched.add(target)
                path, name = target.rsplit(".", 1)
                owner = importlib.import_module(path)
                original, (_, hook, _) = getattr(owner, name), hooks[-1]
                wrapped = functools.wraps(original)(functools.partial(hook))
                for module in list(sys.modules.values()):
                    for attribute, value in list(vars(module).items()):
                        if value is original:
                            setattr(module, attribute, wrapped)

    return _with_parents(
        [
            _module(
                "sglang.srt.plugins.hook_registry",
                HookRegistry=HookRegistry,
                HookType=HookType,
                HookSource=HookSource,
            )
        ]
    )
