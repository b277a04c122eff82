"""SGLang plugin: DeepGEMM's names.

SGLang imports `deep_gemm` at the top of its modules. Where that has not happened yet when it calls
register(), install() puts ours in place. Where it has, as in its scheduler processes, each function
of that deep_gemm that we have too is replaced through SGLang's HookRegistry, which rebinds it in
every module that imported it; what we lack stays as it is.

It does something only where SM120_OPS_DEEP_GEMM is set (_activation.py), and then says in one line
of the log what. Neither it nor the import touches a GPU. Read from SGLang 0.5.23.
"""

from __future__ import annotations

import inspect
import logging
import sys
import types

from .. import __version__, _stats, compat
from ..compat import deep_gemm
from ..compat.deep_gemm import mega
from ._activation import RefusalError, forced, requested

_log = logging.getLogger("sglang.sm120_ops")
_done = False


def _replaces(name: str, other: types.ModuleType) -> bool:
    function = getattr(deep_gemm, name)
    # Mega MoE only says here that there is none: theirs says so too, or works.
    serves = inspect.isfunction(function) and function.__module__ != mega.__name__
    return serves and callable(getattr(other, name, None))


def _hook(other: types.ModuleType) -> str:
    try:
        from sglang.srt.plugins.hook_registry import (
            HookRegistry,
            HookType,
        )
    except ImportError as error:
        reason = "another deep_gemm is imported already, and this SGLang has no HookRegistry"
        raise RefusalError(f"{reason} ({error})") from error
    names = [name for name in deep_gemm.__all__ if _replaces(name, other)]
    for name in names:
        HookRegistry.register(f"deep_gemm.{name}", getattr(deep_gemm, name), HookType.REPLACE)
    _stats.set_active("deep_gemm", f"{len(names)} functions replaced by SGLang's HookRegistry")
    return f"{len(names)} functions of {getattr(other, '__file__', 'deep_gemm')}"


def _activate(force: bool) -> str:
    other = sys.modules.get(compat.NAME)
    if other is None or compat.installed():
        try:
            compat.install(force)
        except ValueError as error:
            raise RefusalError(f"{error} (SM120_OPS_DEEP_GEMM=force shadows it)") from error
        return "deep_gemm"
    if not force:
        raise RefusalError("a deep_gemm is installed (SM120_OPS_DEEP_GEMM=force replaces it)")
    return _hook(other)


def register() -> None:
    """Entry point of `sglang.srt.plugins`."""
    global _done
    if _done or not requested():
        return
    _done = True
    try:
        part = _activate(forced())
    except RefusalError as refusal:
        _log.warning("sm120_ops %s is off: %s", __version__, refusal)
    else:
        _log.info("sm120_ops %s serves %s", __version__, part)
