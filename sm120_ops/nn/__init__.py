"""Modules that run whole models on the block-scaled kernels."""

from .linear import MXLinear, convert

__all__ = ["MXLinear", "convert"]
