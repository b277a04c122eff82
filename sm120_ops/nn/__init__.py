"""Modules that run whole models on the block-scaled kernels."""

from .expert_parallel import ExpertParallel
from .experts import MXExperts
from .linear import MXLinear, convert

__all__ = ["ExpertParallel", "MXExperts", "MXLinear", "convert"]
