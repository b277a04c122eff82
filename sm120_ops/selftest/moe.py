"""Mixture-of-experts layers of the self-test: whole layers, of random weights and routings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from sm120_ops.bench.routing import ROUTINGS, expert_ids
from sm120_ops.nn import MXExperts
from sm120_ops.selftest.bounds import Case, Parts, relative_error

# Relative Frobenius error of a layer of random weights: two products of quantised operands and the
# activation between them.
FORMAT_ERROR = {"mxfp8": 0.15, "w4a8": 0.35, "mxfp4": 0.55}
# Of the GPU to the CPU reference: where their float32 sums differ, a hidden value may be quantised
# to the neighbouring code.
REFERENCE_ERROR = 0.02


@dataclasses.dataclass(frozen=True)
class MoeCase(Case):
    tokens: int
    experts: int
    topk: int
    hidden: int
    intermediate: int
    format: str
    routing: str = "uniform"
    activation: str = "silu"

    def parts(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Float weights, and x, topk_ids, topk_weights; on the CPU."""
        generator = torch.Generator().manual_seed(self.tokens * 31 + self.hidden)
        e, i, h = self.experts, self.intermediate, self.hidden

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        weights = {"gate_up": normal(e, 2 * i, h) / h**0.5, "down": normal(e, h, i) / i**0.5}
        if self.activation == "gpt-oss":
            weights |= {"gate_up_bias": normal(e, 2 * i), "down_bias": normal(e, h)}
        x = normal(self.tokens, h).bfloat16()
        ids = expert_ids(self.routing, self.tokens, self.topk, e, generator)
        return weights, [x, ids, torch.rand(self.tokens, self.topk, generator=generator)]

    def run(self, device: torch.device) -> dict[str, torch.Tensor]:
        weights, inputs = self.parts()
        module = MXExperts.from_float(**weights, format=self.format, activation=self.activation)
        return {"out": module.to(device)(*(t.to(device) for t in inputs)).cpu()}

    def errors(self, got: Parts, want: Parts | None = None) -> dict[str, float]:
        if want is None:
            error = relative_error(got["out"], formula(self), FORMAT_ERROR[self.format])
        else:
            error = relative_error(got["out"], want["out"], REFERENCE_ERROR)
        return {"out": error}


def formula(case: MoeCase) -> torch.Tensor:
    """The layer in FP64, without any quantisation."""
    weights, (x, ids, topk_weights) = case.parts()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(case.experts):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        product = x[tokens].double() @ weights["gate_up"][expert].double().T
        if case.activation == "gpt-oss":
            product += weights["gate_up_bias"][expert].double()
            gate, up = product[:, ::2].clamp(max=7.0), product[:, 1::2].clamp(-7.0, 7.0)
            hidden = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        else:
            gate, up = product.chunk(2, 1)
            hidden = gate / (1 + torch.exp(-gate)) * up
        row = hidden @ weights["down"][expert].double().T
        if case.activation == "gpt-oss":
            row += weights["down_bias"][expert].double()
        y.index_add_(0, tokens, row * topk_weights[tokens, slots, None].double())
    return y


def moe_cases(quick: bool) -> Iterator[MoeCase]:
    for fmt in FORMAT_ERROR:
        for routing in ROUTINGS:
            yield MoeCase(24, 16, 4, 256, 128, fmt, routing)
        yield MoeCase(1, 64, 6, 512, 256, fmt, activation="gpt-oss")
        if not quick:
            yield MoeCase(130, 32, 2, 288, 96, fmt, "zipf", "gpt-oss")
            yield MoeCase(600, 8, 2, 256, 160, fmt)
