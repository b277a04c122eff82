"""DeepGEMM's settings: kept and given back. None of them changes a result here.

They are per process, as in DeepGEMM. `num_sms` is what the engines size a paged schedule by;
`mk_alignment` is what they pad groups to, and the start of a group in the psum layout. Tensor-core
utilisation, programmatic launch, block sizes and compiled dimensions steer DeepGEMM's choice of
kernels to compile, and there is nothing to compile here.
"""

from __future__ import annotations

import torch

from ... import _check, _stats
from ...ops.layout import ceil_div

DEFAULT_ALIGNMENT = 128
SMALL_ALIGNMENT = 64  # DeepGEMM's for at most that many rows a group


class _Settings:
    num_sms: int | None = None
    mk_alignment = DEFAULT_ALIGNMENT
    tc_util = 100
    pdl = False
    compile_mode = 0
    ignore_compile_dims = False
    block_size_multiple_of: int | tuple[int, int] = 1
    deterministic = True


_settings = _Settings()


def skips(name: str) -> bool:
    """Counts a call; True if the caller only wants kernels compiled (set_compile_mode(1))."""
    _stats.count(name)
    return _settings.compile_mode != 0


def _positive(op: str, arg: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _check.fail_type(f"deep_gemm.{op}", arg, "an int", type(value).__name__)
    _check.require(value > 0, f"deep_gemm.{op}", arg, "a positive number", value)
    return value


def init(lib_root: str = "", cuda_home: str = "") -> None:
    """DeepGEMM's start of its compiler: nothing to do."""


def shutdown() -> None:
    """DeepGEMM's release of its handles: nothing to do."""


def set_num_sms(num_sms: int) -> None:
    """Sets what get_num_sms() gives. The GEMM kernels use all SMs either way."""
    _settings.num_sms = _positive("set_num_sms", "num_sms", num_sms)


def get_num_sms() -> int:
    """The number set, else the SMs of the current CUDA device, else 1."""
    if _settings.num_sms is not None:
        return _settings.num_sms
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def set_tc_util(tc_util: int) -> None:
    _settings.tc_util = tc_util


def get_tc_util() -> int:
    return _settings.tc_util


def set_pdl(enable_pdl: bool) -> None:
    """Kept only: every launch that can use programmatic dependent launch does."""
    _settings.pdl = bool(enable_pdl)


def get_pdl() -> bool:
    return _settings.pdl


def set_compile_mode(mode: int) -> None:
    """1: GEMM calls return at once, for there is nothing to compile. 0: they run."""
    _settings.compile_mode = int(mode)


def get_compile_mode() -> int:
    return _settings.compile_mode


def set_ignore_compile_dims(value: bool) -> None:
    _settings.ignore_compile_dims = bool(value)


def set_block_size_multiple_of(value: int | tuple[int, int]) -> None:
    _settings.block_size_multiple_of = value


def use_deterministic_algorithms(enabled: bool = True) -> None:
    """Kept only: every op is bitwise deterministic."""
    _settings.deterministic = bool(enabled)


def set_mk_alignment_for_contiguous_layout(value: int) -> None:
    """Sets the row alignment of groups: of use to the caller's padding and to the psum layout."""
    _settings.mk_alignment = _positive("set_mk_alignment_for_contiguous_layout", "value", value)


def get_mk_alignment_for_contiguous_layout() -> int:
    return _settings.mk_alignment


def get_theoretical_mk_alignment_for_contiguous_layout(
    expected_m: int | None = None, num_groups: int | None = None
) -> int:
    """The alignment to pad to for `expected_m` rows (in all, or a group without num_groups)."""
    if expected_m is None:
        return DEFAULT_ALIGNMENT
    per_group = expected_m if num_groups is None else ceil_div(expected_m, num_groups)
    return SMALL_ALIGNMENT if per_group <= SMALL_ALIGNMENT else DEFAULT_ALIGNMENT


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
