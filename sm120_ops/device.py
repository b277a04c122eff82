"""What this machine can run, in words: torch, driver, GPU, and which kernel target serves it.

Nothing here touches CUDA at import. ``describe()`` asks torch for the CUDA device, which creates
the context there; ``describe(init_cuda=False)`` asks the driver's management library (NVML) only.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import os
import platform
import re
import sys
from typing import Any, NamedTuple

import torch

from sm120_ops._version import __version__

NATIVE = "native (sm_120f)"
EMULATED = "emulated (sm_90a)"
CPU_REFERENCE = "CPU reference"
UNSUPPORTED = "not supported"

# The oldest driver branch for the CUDA runtime that is linked into the wheel, by its major version.
# CUDA 12 runs on older drivers of 12.x too, and 570 is the first that knows SM120.
MIN_DRIVERS = {13: 580, 12: 570}
SUPPORTED_GPUS = (
    "compute capability 12.x (RTX 50 series, RTX PRO Blackwell, GB10: native kernels) or "
    "exactly 9.0 (H100, H200: the same kernels with an emulated block-scaled MMA)"
)


class Target(NamedTuple):
    """The code that serves a device, and why."""

    label: str
    reason: str

    @property
    def runs_kernels(self) -> bool:
        return self.label in (NATIVE, EMULATED)


class Problem(NamedTuple):
    """Something that keeps the kernels from running: what was found, what is needed, what to do."""

    found: str
    needed: str
    run: str

    def __str__(self) -> str:
        return f"found {self.found}; needed: {self.needed}; run: {self.run}"


@dataclasses.dataclass(frozen=True)
class Environment:
    """Facts for bug reports; every field is plain data, so that ``to_json()`` is complete."""

    package: str
    build: dict[str, Any]
    kernels_loaded: bool
    python: str
    platform: str
    torch: str
    torch_cuda: str | None
    driver: str | None
    gpu_count: int
    device: str
    gpu: str | None
    capability: tuple[int, int] | None
    sms: int | None
    shared_memory_per_block: int | None
    l2_bytes: int | None
    memory_bytes: int | None
    power_limit_w: float | None
    max_sm_clock_mhz: int | None
    target: str
    reason: str
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["problems"] = [p._asdict() for p in self.problems]
        return data


def target_for(capability: tuple[int, int] | None) -> Target:
    """The kernel target of a compute capability; ``None`` means that there is no GPU.

    12.0 and 12.1 are known by their major version. A "Blackwell" family test would let 10.x in,
    whose tensor cores take none of these instructions.
    """
    if capability is None:
        return Target(
            CPU_REFERENCE,
            "no GPU here: every op runs its plain PyTorch reference on CPU tensors",
        )
    major, minor = capability
    found = f"compute capability {major}.{minor}"
    if major == 12:
        return Target(
            NATIVE,
            f"{found}: block-scaled warp MMA in hardware, one sm_120f binary for all of 12.x",
        )
    if (major, minor) == (9, 0):
        return Target(
            EMULATED,
            f"{found}: the same kernels, with the block-scaled MMA emulated by FP16 MMA and FP32 "
            "scaling; for development and tests, slower than Hopper's own FP8 path",
        )
    if major in (10, 11):
        why = (
            f"{found} is the SM{major}0 family (tcgen05 tensor cores): it shares the Blackwell "
            "name with 12.x, not the instructions"
        )
    else:
        why = f"{found} has neither the block-scaled warp MMA nor a build in this package"
    return Target(
        UNSUPPORTED, f"{why}. The kernels run on {SUPPORTED_GPUS}; CPU tensors still work"
    )


def min_driver(cuda: str) -> int:
    """The oldest driver branch that a wheel built with this CUDA version runs on."""
    return MIN_DRIVERS.get(int(cuda.partition(".")[0]), max(MIN_DRIVERS.values()))


def driver_problem(driver: str | None, cuda: str) -> Problem | None:
    """The complaint about a driver too old for the CUDA runtime inside the wheel, if it is."""
    if driver is None:
        return None
    match = re.match(r"(\d+)", driver)
    wanted = min_driver(cuda)
    if match is None or int(match.group(1)) >= wanted:
        return None
    older = " Or install the +cu129 build of this wheel" if wanted > MIN_DRIVERS[12] else ""
    return Problem(
        found=f"NVIDIA driver {driver}",
        needed=f"driver {wanted} or later, because the kernels are built with CUDA {cuda}",
        run=f"sudo apt-get install nvidia-driver-{wanted}-open "
        f"(or your system's way, then reboot), and nvidia-smi to check.{older}",
    )


def build_info() -> dict[str, Any]:
    """Public constants of the generated ``_build_info`` module; empty in an unbuilt checkout."""
    try:
        module = importlib.import_module("sm120_ops._build_info")
    except ImportError:
        return {}
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    return {
        name.lower(): value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, plain)
    }


def built_cuda() -> str:
    """Version of the CUDA toolkit that built the library; 13.0 in an unbuilt checkout."""
    return str(build_info().get("cuda", "13.0"))


def kernels_loaded() -> bool:
    """Whether the CUDA implementations are registered (the compiled library was loaded)."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key("sm120::gemm", "CUDA"))
    except RuntimeError:  # the schema itself is not registered
        return False


class _Nvml:
    """The few NVML queries that need no CUDA context. Absent library: every answer is None."""

    def __init__(self) -> None:
        try:
            self.lib: ctypes.CDLL | None = ctypes.CDLL("libnvidia-ml.so.1")
            if self.lib.nvmlInit_v2() != 0:
                self.lib = None
        except OSError:
            self.lib = None

    def driver(self) -> str | None:
        if self.lib is None:
            return None
        text = ctypes.create_string_buffer(96)
        ok = self.lib.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96)) == 0
        return text.value.decode() if ok else None

    def count(self) -> int:
        value = ctypes.c_uint(0)
        if self.lib is None or self.lib.nvmlDeviceGetCount_v2(ctypes.byref(value)) != 0:
            return 0
        return value.value

    def handle(self, uuid: str | None, index: int = 0) -> ctypes.c_void_p | None:
        """By UUID where torch gives one: NVML counts GPUs that CUDA_VISIBLE_DEVICES hides."""
        if self.lib is None:
            return None
        handle = ctypes.c_void_p()
        if uuid is not None:
            name = ctypes.c_char_p(f"GPU-{uuid}".encode())
            status = self.lib.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
        else:
            status = self.lib.nvmlDeviceGetHandleByIndex_v2(
                ctypes.c_uint(index), ctypes.byref(handle)
            )
        return handle if status == 0 else None

    def name(self, handle: ctypes.c_void_p) -> str | None:
        assert self.lib is not None
        text = ctypes.create_string_buffer(96)
        ok = self.lib.nvmlDeviceGetName(handle, text, ctypes.c_uint(96)) == 0
        return text.value.decode() if ok else None

    def capability(self, handle: ctypes.c_void_p) -> tuple[int, int] | None:
        assert self.lib is not None
        major, minor = ctypes.c_int(), ctypes.c_int()
        ok = (
            self.lib.nvmlDeviceGetCudaComputeCapability(
                handle, ctypes.byref(major), ctypes.byref(minor)
            )
            == 0
        )
        return (major.value, minor.value) if ok else None

    def power_limit_w(self, handle: ctypes.c_void_p) -> float | None:
        assert self.lib is not None
        value = ctypes.c_uint()
        ok = self.lib.nvmlDeviceGetEnforcedPowerLimit(handle, ctypes.byref(value)) == 0
        return value.value / 1000 if ok else None

    def max_sm_clock_mhz(self, handle: ctypes.c_void_p) -> int | None:
        assert self.lib is not None
        value = ctypes.c_uint()
        clock_sm = ctypes.c_int(1)  # NVML_CLOCK_SM
        ok = self.lib.nvmlDeviceGetMaxClockInfo(handle, clock_sm, ctypes.byref(value)) == 0
        return value.value if ok else None


def _visible_indices(count: int) -> list[int]:
    """NVML's indices of the GPUs that CUDA_VISIBLE_DEVICES leaves, all if it names them otherwise.

    CUDA counts as NVML does only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return list(range(count))
    entries = [entry.strip() for entry in visible.split(",")]
    if not all(entry.isdigit() for entry in entries):
        return list(range(count))
    return [int(entry) for entry in entries if int(entry) < count]


def capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs this process may use, without a CUDA context.

    Asks NVML unless torch has a context already. Empty where there is no GPU or no answer.
    """
    if torch.cuda.is_initialized():
        return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    nvml = _Nvml()
    handles = [nvml.handle(None, index) for index in _visible_indices(nvml.count())]
    found = [nvml.capability(handle) for handle in handles if handle is not None]
    return [capability for capability in found if capability is not None]


def _gpu_index(device: torch.device | str | int | None) -> int | None:
    """The CUDA index that ``device`` means; None when it is a CPU device or no GPU is usable."""
    if device is not None:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if chosen.type == "cpu":
            return None
        if chosen.type != "cuda":
            raise ValueError(
                f"sm120_ops.describe: device: expected a cuda or cpu device, got {chosen}"
            )
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (chosen.index or 0) >= count:
            raise ValueError(
                f"sm120_ops.describe: device: expected one of {count} CUDA devices, got {chosen}"
            )
        return torch.cuda.current_device() if chosen.index is None else chosen.index
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _no_gpu_problem(nvml: _Nvml) -> Problem | None:
    """Why a GPU that the driver knows is not usable from torch."""
    if nvml.count() == 0:
        return None
    handle = nvml.handle(None)
    name = (nvml.name(handle) if handle is not None else None) or "an NVIDIA GPU"
    if torch.version.cuda is None:
        return Problem(
            found=f"{name}, but torch {torch.__version__} is built without CUDA",
            needed="torch 2.11 or later with CUDA",
            run="pip install --index-url https://download.pytorch.org/whl/cu130 'torch>=2.11'",
        )
    return Problem(
        found=f"{name}, but torch.cuda.is_available() is False (torch CUDA {torch.version.cuda}, "
        f"driver {nvml.driver()})",
        needed=f"a driver that torch can use ({min_driver(built_cuda())} or later for these "
        "kernels) and a visible device",
        run="nvidia-smi, and look at CUDA_VISIBLE_DEVICES",
    )


def _library_problem(target: Target) -> Problem | None:
    if not target.runs_kernels or kernels_loaded():
        return None
    return Problem(
        found="no CUDA implementation of torch.ops.sm120.gemm is registered",
        needed="the compiled library sm120_ops/_C.so",
        run="pip install the wheel, or `make wheel` in a checkout; the import log says why",
    )


def describe(
    device: torch.device | str | int | None = None, *, init_cuda: bool = True
) -> Environment:
    """Facts about this machine and ``device`` (default: the current CUDA device, if there is one).

    ``init_cuda=False`` leaves CUDA alone: the GPU's name and capability then come from NVML, and
    what only the CUDA runtime knows is None.
    """
    nvml = _Nvml()
    driver = nvml.driver()
    index = _gpu_index(device) if init_cuda else None
    wants_cpu = (
        device is not None and not isinstance(device, int) and torch.device(device).type == "cpu"
    )

    props: Any = None
    capability: tuple[int, int] | None = None
    name: str | None = None
    handle = None
    if index is not None:
        props = torch.cuda.get_device_properties(index)
        capability = (props.major, props.minor)
        name = props.name
        uuid = getattr(props, "uuid", None)
        handle = nvml.handle(None if uuid is None else str(uuid))
    elif not init_cuda and not wants_cpu:
        handle = nvml.handle(None)
        if handle is not None:
            name, capability = nvml.name(handle), nvml.capability(handle)

    target = target_for(capability)
    if wants_cpu:
        target = Target(CPU_REFERENCE, "CPU tensors run the plain PyTorch reference of every op")
    problems = [
        driver_problem(driver, built_cuda()),
        _library_problem(target),
    ]
    if index is None and init_cuda and not wants_cpu:
        problems.append(_no_gpu_problem(nvml))

    return Environment(
        package=__version__,
        build=build_info(),
        kernels_loaded=kernels_loaded(),
        python=sys.version.split()[0],
        platform=platform.platform(),
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        driver=driver,
        gpu_count=torch.cuda.device_count() if init_cuda else nvml.count(),
        device="cpu" if index is None else f"cuda:{index}",
        gpu=name,
        capability=capability,
        sms=getattr(props, "multi_processor_count", None),
        shared_memory_per_block=getattr(props, "shared_memory_per_block_optin", None),
        l2_bytes=getattr(props, "L2_cache_size", None),
        memory_bytes=getattr(props, "total_memory", None),
        power_limit_w=nvml.power_limit_w(handle) if handle is not None else None,
        max_sm_clock_mhz=nvml.max_sm_clock_mhz(handle) if handle is not None else None,
        target=target.label,
        reason=target.reason,
        problems=tuple(p for p in problems if p is not None),
    )


def is_supported(device: torch.device | str | int | None = None) -> bool:
    """Whether the CUDA kernels can run on ``device`` (default: the current CUDA device).

    False for CPU devices and for machines without a usable GPU, where the ops still work on CPU
    tensors through their reference.
    """
    try:
        index = _gpu_index(device)
    except ValueError:
        return False
    if index is None:
        return False
    return target_for(torch.cuda.get_device_capability(index)).runs_kernels and kernels_loaded()
