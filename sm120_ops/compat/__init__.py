"""Other packages' APIs on this package's ops, and install(), which puts DeepGEMM's in place.

After install(), `import deep_gemm` gives a module with the names of `sm120_ops.compat.deep_gemm`.
A name that it lacks is looked up in the DeepGEMM that is shadowed, or, inside vLLM, in the copy
that vLLM brings along; that copy is imported when such a name is asked for and not before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
from typing import Any

from .. import _check, _stats
from . import deep_gemm

NAME = "deep_gemm"
VENDORED = "vllm.third_party.deep_gemm"
_ALIAS = "_sm120_ops_shadowed_deep_gemm"  # under which an installed deep_gemm is imported
_PACKAGE = deep_gemm.__name__

_log = logging.getLogger(__name__)
_installed: Facade | None = None
_shadowed_modules: dict[str, types.ModuleType] = {}


class Facade(types.ModuleType):
    """The module that stands as `deep_gemm` in sys.modules: our names, then those of another."""

    def __init__(self, shadowed: types.ModuleType | importlib.machinery.ModuleSpec | None) -> None:
        super().__init__(NAME, deep_gemm.__doc__)
        assert deep_gemm.__file__ is not None
        loader = importlib.machinery.SourceFileLoader(NAME, deep_gemm.__file__)
        spec = importlib.util.spec_from_file_location(
            NAME,
            deep_gemm.__file__,
            loader=loader,
            submodule_search_locations=list(deep_gemm.__path__),
        )
        assert spec is not None
        self.__spec__ = spec
        self.__loader__ = loader
        self.__package__ = NAME
        self.__file__ = deep_gemm.__file__
        self.__path__ = list(deep_gemm.__path__)
        self.__version__ = deep_gemm.__version__
        self.__all__ = list(deep_gemm.__all__)
        self.__dict__.update({name: getattr(deep_gemm, name) for name in deep_gemm.__all__})
        self._shadowed = shadowed

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            other = _fallback(self)
            if other is not None and hasattr(other, name):
                return getattr(other, name)
        raise AttributeError(f"module {NAME!r} (of sm120_ops) has no attribute {name!r}")


def _fallback(facade: Facade) -> types.ModuleType | None:
    """The DeepGEMM to ask for names that we lack; None where there is none."""
    if isinstance(facade._shadowed, types.ModuleType):
        return facade._shadowed
    if facade._shadowed is None and "vllm" not in sys.modules:
        return None
    return _import_other(facade)


@functools.cache
def _import_other(facade: Facade) -> types.ModuleType | None:
    try:
        shadowed = facade._shadowed
        if isinstance(shadowed, importlib.machinery.ModuleSpec):
            return _import_alias(shadowed)
        return importlib.import_module(VENDORED)
    except Exception as error:
        # It wants a compiler and a GPU when it is imported. Without it the name is just missing.
        _log.debug("no fallback for names that sm120_ops lacks: %s", error)
        return None


def _import_alias(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
    """Imports an installed package under another name; its imports of itself are relative."""
    assert spec.origin is not None
    alias = importlib.util.spec_from_file_location(
        _ALIAS,
        spec.origin,
        submodule_search_locations=list(spec.submodule_search_locations or []),
    )
    assert alias is not None
    assert alias.loader is not None
    module = importlib.util.module_from_spec(alias)
    sys.modules[_ALIAS] = module
    try:
        alias.loader.exec_module(module)
    except BaseException:
        del sys.modules[_ALIAS]
        raise
    return module


def _ours() -> dict[str, types.ModuleType]:
    """{name under deep_gemm: submodule}."""
    prefix = f"{_PACKAGE}."
    return {
        f"{NAME}.{name.removeprefix(prefix)}": module
        for name, module in list(sys.modules.items())
        if name.startswith(prefix)
    }


def find_other() -> types.ModuleType | importlib.machinery.ModuleSpec | None:
    """A deep_gemm that is not ours: the module where it was imported, else how to import it."""
    module = sys.modules.get(NAME)
    if module is not None:
        return None if isinstance(module, Facade) else module
    return importlib.util.find_spec(NAME)


def installed() -> bool:
    """Whether `import deep_gemm` gives this package's."""
    return _installed is not None and sys.modules.get(NAME) is _installed


def install(force: bool = False) -> types.ModuleType:
    """Makes `import deep_gemm` give `sm120_ops.compat.deep_gemm`, in this process.

    Touches no GPU. A second call changes nothing. Modules that imported another deep_gemm before
    keep that one: call this first, as the engine plugins do.

    Args:
        force: go ahead although a deep_gemm is installed, and shadow it. Names that we lack then
            come from it.

    Returns:
        The module `deep_gemm`.
    """
    global _installed
    if _installed is not None and installed():
        return _installed
    other = find_other()
    if other is not None and not force:
        where = getattr(other, "__file__", None) or getattr(other, "origin", None)
        _check.fail(
            "compat.install", "force", "True, to shadow a deep_gemm that is installed", where
        )
    _installed = Facade(other)
    for name in [n for n in sys.modules if n.startswith(f"{NAME}.")]:
        _shadowed_modules[name] = sys.modules.pop(name)
    if isinstance(other, types.ModuleType):
        _shadowed_modules[NAME] = other
    sys.modules[NAME] = _installed
    sys.modules.update(_ours())
    _stats.set_active(NAME, "installed" if other is None else "installed over another deep_gemm")
    return _installed


def uninstall() -> None:
    """Undoes install(): `import deep_gemm` gives what it gave before. Does nothing if not in place.

    Modules that hold the installed module go on using it.
    """
    global _installed
    if installed():
        for name in [n for n in sys.modules if n == NAME or n.startswith(f"{NAME}.")]:
            del sys.modules[name]
        sys.modules.update(_shadowed_modules)
        _stats.set_active(NAME, None)
    _shadowed_modules.clear()
    _installed = None
