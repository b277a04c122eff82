"""Which experts tokens go to: the routings that MoE kernels are measured and tested with."""

from __future__ import annotations

import torch

ROUTINGS = ("uniform", "zipf", "few", "one", "none")


def expert_ids(
    routing: str, tokens: int, topk: int, experts: int, generator: torch.Generator
) -> torch.Tensor:
    """Ids, int64 [tokens, topk] on the CPU; a token's experts differ where there are enough.

    uniform: all experts alike; zipf: the r-th with weight 1 / r; few: 20 of every 64 experts, at
    least one; one: every slot to the same expert; none: every slot dropped (-1).
    """
    if routing == "none":
        return torch.full((tokens, topk), -1)
    if routing == "one":
        return torch.full((tokens, topk), experts // 2)
    weights = torch.ones(experts)
    if routing == "zipf":
        weights /= torch.arange(1, experts + 1)
    if routing == "few":
        weights[max(experts * 20 // 64, 1) :] = 0
    weights = weights[torch.randperm(experts, generator=generator)]
    enough = int((weights > 0).sum()) >= topk
    if tokens == 0:
        return torch.zeros(0, topk, dtype=torch.int64)
    return torch.multinomial(
        weights.expand(tokens, -1), topk, replacement=not enough, generator=generator
    )
