"""What a case of the self-test is, and what rounding can do to sums of products."""

from __future__ import annotations

import abc

import torch

# One BF16 rounding is 2^-8 of the value at most. FP32 sums of at most 4,096 products, in any order,
# are within 2^-18 of the sum of magnitudes. The kernel and the reference each round once, and where
# their sums lie on two sides of a midpoint they give neighbouring values: two roundings apart.
BF16_ROUNDING = 2.0**-8
SUM_ERROR = 2.0**-18
# Frobenius norm of the difference over that of the reference, where D is FP32.
FP32_NORM_ERROR = 1e-6


def sum_error(
    got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, roundings: int = 1
) -> float:
    """Worst element, in units of what is allowed for it: at most 1 is right, NaN is wrong.

    ``want`` is FP64, ``magnitude`` what the sums of absolute products are. Infinite elements of
    ``want`` must be met exactly.
    """
    infinite = want.isinf()
    if not torch.equal(got[infinite].double(), want[infinite]):
        return float("nan")
    got, want, magnitude = got[~infinite], want[~infinite], magnitude[~infinite]
    rounding = BF16_ROUNDING * roundings if got.dtype == torch.bfloat16 else 0.0
    allowed = rounding * want.abs() + SUM_ERROR * magnitude
    difference = (got.double() - want).abs()
    ratio = torch.where(difference == 0, 0.0, difference / allowed)
    worst = ratio.max().item() if ratio.numel() else 0.0
    if got.dtype == torch.float32 and want.norm() > 0:
        worst = max(worst, (difference.norm() / want.norm()).item() / FP32_NORM_ERROR)
    return worst


Parts = dict[str, torch.Tensor]


class Case(abc.ABC):
    """An op, or a few, on one set of inputs."""

    allowed = 1.0  # the most that an error may be

    @abc.abstractmethod
    def run(self, device: torch.device) -> Parts:
        """The results, on the CPU."""

    @abc.abstractmethod
    def errors(self, got: Parts, want: Parts | None = None) -> dict[str, float]:
        """Of each part, against the FP64 formula or, where given, the CPU reference's results.

        In units of what is allowed; where nothing is, what share or how much differs.
        """


class ExactCase(Case):
    """Bits that have to be equal on all devices."""

    allowed = 0.0

    def errors(self, got: Parts, want: Parts | None = None) -> dict[str, float]:
        if want is None:
            return self.differences(got)
        return {part: same_bits(value, want[part]) for part, value in got.items()}

    @abc.abstractmethod
    def differences(self, got: Parts) -> dict[str, float]:
        """From the formula."""


def same_bits(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of elements that differ, by their bits (so that NaN equals NaN)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("nan")
    if got.numel() == 0:
        return 0.0
    # clone(), for contiguous() leaves a [1, 1] tensor with any strides as it is.
    a, b = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (got, want))
    return (a != b).double().mean().item()


def relative_error(got: torch.Tensor, want: torch.Tensor, allowed: float) -> float:
    """Of the Frobenius norm, in units of what is allowed; NaN where the result is."""
    difference, norm = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return difference / norm / allowed if norm > 0 else difference


class SumCase(Case):
    """A case whose one result, "out", is sums of products: what its family's file has to say."""

    @abc.abstractmethod
    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        """FP64 values of "out", and the sums of magnitudes."""

    def errors(self, got: Parts, want: Parts | None = None) -> dict[str, float]:
        return {"out": self.error(got["out"], None if want is None else want["out"])}

    def error(self, got: torch.Tensor, want: torch.Tensor | None = None) -> float:
        """Against the formula or, where given, the CPU reference's result."""
        exact, magnitude = self.formula()
        if want is None:
            return sum_error(got, exact, magnitude)
        return sum_error(got, want.double(), magnitude, roundings=2)
