"""What the tests of the DeepGEMM API share: quantised operands in DeepGEMM's conventions.

References are products of the unquantised inputs, as in DeepGEMM's tests, and CONFIGS has its
tolerances for calc_diff(), which so hold the error of quantisation too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm.testing import calc_diff

BF16, FP32 = torch.bfloat16, torch.float32
Operand = tuple[torch.Tensor, torch.Tensor]
Recipe = tuple[int, int]

# (gran_k of A, of B, A is FP4, B is FP4): the tolerance. The first four are DeepGEMM's own; it
# tests no others, and FP4 with a scale for 128 values is coarser.
CONFIGS = {
    (128, 128, False, False): 0.001,
    (32, 32, True, True): 0.02,
    (128, 32, False, True): 0.01,
    (32, 128, True, False): 0.01,
    (32, 32, False, False): 0.001,
    (128, 32, False, False): 0.001,
    (32, 128, False, False): 0.001,
    (128, 128, True, True): 0.03,
    (32, 32, False, True): 0.01,
    (128, 128, True, False): 0.015,
}
SCALE_FORMS = ("float32", "packed", "bytes", "e8m0")


def refused(requirement: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=requirement)


def powers(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(-20, 20, shape, device=device).float().exp2()


def as_form(sf: torch.Tensor, form: str, mn: int, recipe: Recipe) -> torch.Tensor:
    """float32 scales in one of the accepted forms."""
    if form == "float32":
        return sf
    if form in ("bytes", "e8m0"):
        exponents = (sf.view(torch.int32) >> 23).to(torch.uint8)
        return exponents if form == "bytes" else exponents.view(torch.float8_e8m0fnu)
    k = sf.shape[-1] * recipe[1]
    groups = sf.shape[0] if sf.dim() == 3 else None
    return deep_gemm.transform_sf_into_required_layout(sf, mn, k, recipe, groups)


def quantised(x: torch.Tensor, gran_k: int, fp4: bool, block: bool = False) -> Operand:
    if fp4:
        return deep_gemm.per_token_cast_to_fp4(x, True, gran_k)
    cast = deep_gemm.per_block_cast_to_fp8 if block else deep_gemm.per_token_cast_to_fp8
    return cast(x, True, gran_k)


class Problem:
    """Random A, B (and C) with their quantised forms, as DeepGEMM's tests make them."""

    def __init__(
        self,
        device: torch.device,
        m: int,
        n: int,
        k: int,
        config: tuple[int, int, bool, bool],
        form: str = "float32",
        out_dtype: torch.dtype = BF16,
        accumulate: bool = False,
        form_b: str | None = None,
    ) -> None:
        generator = torch.Generator(device).manual_seed(m + n + k)
        randn = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
        x, w = randn(m, k).bfloat16(), randn(n, k).bfloat16()
        self.config = config
        gran_a, gran_b, fp4_a, fp4_b = config
        block = not fp4_a and not fp4_b and not accumulate
        a, b = quantised(x, gran_a, fp4_a), quantised(w, gran_b, fp4_b, block)
        recipe_a, recipe_b = (1, gran_a), (gran_b if block else 1, gran_b)
        self.a = a[0], as_form(a[1], form, m, recipe_a)
        self.b = b[0], as_form(b[1], form_b or form, n, recipe_b)
        self.c = randn(m, n).mul(32).to(out_dtype) if accumulate else None
        legacy = config == (128, 128, False, False) and not accumulate
        self.options: dict[str, Any] = (
            {} if legacy else {"recipe_a": recipe_a, "recipe_b": recipe_b}
        )
        self.d = torch.full((m, n), math.nan, device=device, dtype=out_dtype)
        self.wanted = x.float() @ w.float().t() + (0 if self.c is None else self.c.float())
        self.limit = CONFIGS[config]

    def check(self) -> None:
        diff = calc_diff(self.d, self.wanted)
        assert diff < self.limit, f"{diff} at {list(self.d.shape)}"

    def check_exactly(self) -> None:
        """Against the dequantised operands, which must have a scale a row."""
        gran_a, gran_b, fp4_a, fp4_b = self.config
        a, b = (
            (deep_gemm.cast_back_from_fp4 if fp4 else deep_gemm.cast_back_from_fp8)(*pair, gran)
            for pair, gran, fp4 in ((self.a, gran_a, fp4_a), (self.b, gran_b, fp4_b))
        )
        wanted = a.double() @ b.double().t() + (0 if self.c is None else self.c.double())
        diff = calc_diff(self.d, wanted)
        assert diff < (1e-5 if self.d.dtype == BF16 else 1e-10), f"{diff} at {list(wanted.shape)}"
