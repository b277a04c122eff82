"""vLLM plugin: DeepGEMM's names, and linear kernels for fp8_block, mxfp8 and mxfp4 layers.

vLLM calls register() in every process, maybe more than once. It does something only where
SM120_OPS_DEEP_GEMM is set (_activation.py), and then says in one line of the log what. Neither it
nor the import touches a GPU. Read from vLLM 0.33.0; where a version lacks a hook, the part that
needs it is left out and named in that line.
"""

from __future__ import annotations

import logging
import sys

from .. import __version__, _stats, compat
from ._activation import RefusalError, forced, requested

_log = logging.getLogger("vllm.sm120_ops")  # below "vllm", so that vLLM's handler prints it
_done = False


def _register_linear_kernels(any_gpu: bool) -> str:
    """Puts our kernels first in vLLM's lists; gives their kinds, or why there are none."""
    try:
        from vllm.model_executor.kernels import linear
        from vllm.platforms import PlatformEnum

        from .vllm_linear import make_kernels

        hook = linear.register_linear_kernel
        kernels = make_kernels(any_gpu)
    except (ImportError, AttributeError) as error:
        return f"no linear kernels (this vLLM lacks the hook: {error})"
    names = []
    for kind, kernel in kernels.items():
        kept = getattr(linear, f"_POSSIBLE_{kind.upper()}_KERNELS", {}).get(PlatformEnum.CUDA, [])
        if kernel.__name__ not in [known.__name__ for known in kept]:
            hook(kernel, PlatformEnum.CUDA, kind)
            if kernel in kept:  # the hook appends, and the first that can is taken
                kept.remove(kernel)
                kept.insert(0, kernel)
        names.append(kind)
        _stats.set_active(f"vllm.{kind}", kernel.__name__)
    return f"linear kernels for {', '.join(names)}"


def _install(force: bool) -> str:
    try:
        compat.install(force)
    except ValueError as error:
        raise RefusalError(f"{error} (SM120_OPS_DEEP_GEMM=force shadows it)") from error
    bound = getattr(sys.modules.get("vllm.utils.deep_gemm"), "_fp8_gemm_nt_impl", None)
    late = bound is not None and not bound.__module__.startswith("sm120_ops.")
    return "deep_gemm" + (" (too late: vLLM uses another already)" if late else "")


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    global _done
    if _done or not requested():
        return
    _done = True
    try:
        force = forced()
        parts = [_install(force), _register_linear_kernels(force)]
    except RefusalError as refusal:
        _log.warning("sm120_ops %s is off: %s", __version__, refusal)
    else:
        _log.info("sm120_ops %s serves %s", __version__, " and ".join(parts))
