"""Decorators for test functions."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch


def get_arch_major() -> int:
    """Major compute capability of the current GPU."""
    return torch.cuda.get_device_capability()[0]


def test_filter(condition: Callable[[], bool]) -> Callable[..., Callable[..., None]]:
    """Runs the function only where `condition()` holds, and says so where it does not."""

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> None:
            if condition():
                function(*args, **options)
            else:
                print(f"{function.__name__}: left out by {condition}")

        return run

    return decorate


test_filter.__test__ = False  # type: ignore[attr-defined]  # its name says test, it is none


def ignore_env(name: str, condition: Callable[[], bool]) -> Callable[..., Callable[..., None]]:
    """Runs the function without the environment variable `name` where `condition()` holds."""

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> None:
            saved = os.environ.pop(name, None) if condition() else None
            try:
                function(*args, **options)
            finally:
                if saved is not None:
                    os.environ[name] = saved

        return run

    return decorate
