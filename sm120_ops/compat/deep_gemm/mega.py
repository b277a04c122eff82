"""Mega MoE: DeepGEMM's one kernel of dispatch, two GEMMs and combine, for SM100 alone.

It is made of multicast and tensor-memory instructions that SM120 does not have. The names are here
so that who asks for it learns that, and what to use instead.
"""

from __future__ import annotations

from typing import Any, NoReturn


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"sm120_ops.deep_gemm.{name}: expected a GPU of the SM100 family, got this package, which "
        "has no mega MoE kernel for SM120; use the grouped GEMMs (m_grouped_fp8_fp4_gemm_nt_*), "
        "in an engine by choosing its DeepGEMM MoE backend without mega MoE"
    )


class SymmBuffer:
    """The symmetric memory of mega MoE; refuses to be made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        _refuse("SymmBuffer")


def get_symm_buffer_for_mega_moe(
    group: Any,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool = True,
    activation: str = "swiglu",
    **options: Any,
) -> NoReturn:
    _refuse("get_symm_buffer_for_mega_moe")


def transform_weights_for_mega_moe(l1_weights: Any, l2_weights: Any, **options: Any) -> NoReturn:
    _refuse("transform_weights_for_mega_moe")


def fp8_fp4_mega_moe(
    y: Any,
    l1_weights: Any,
    l2_weights: Any,
    sym_buffer: Any,
    cumulative_local_expert_recv_stats: Any = None,
    recipe: tuple[int, int, int] = (1, 1, 32),
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    **options: Any,
) -> NoReturn:
    _refuse("fp8_fp4_mega_moe")
