"""Every compiled GEMM configuration, by the op that takes one instead of choosing it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from reference import FP4, Operand, random_operand

# 128 x 128 with 64x32 warps, and 16 x 8, are compiled for FP8 beside FP8 alone.
FP8_ONLY_TILES = (2, 9)


def run_forced(
    a: Operand,
    b: Operand,
    out: torch.Tensor,
    config: tuple[int, bool, bool],
    c: torch.Tensor | None = None,
    head_splits: Sequence[int] = (),
) -> torch.Tensor:
    """`config` is (tile, swapped, split)."""
    torch.ops.sm120._gemm_forced(
        a.data, a.scale, b.data, b.scale, a.gran_k, b.gran_k, c, list(head_splits), out, *config
    )
    return out


@functools.cache
def tile_count() -> int:
    """The op refuses the first tile past the end of the compiled table."""
    generator = torch.Generator("cuda").manual_seed(0)
    a = random_operand(1, 32, "mxfp8", 32, generator)
    out = torch.empty(1, 1, device="cuda")
    for tile in itertools.count():
        try:
            run_forced(a, a, out, (tile, False, False))
        except ValueError as error:
            if "a compiled tile" not in str(error) or tile == 0:
                raise
            return tile
    raise AssertionError


def legal_configs(fmt_a: str, fmt_b: str, k: int) -> Iterator[tuple[int, bool, bool]]:
    """FP4 beside FP8 belongs on the 16-row axis, and one K-block of 128 cannot be split."""
    for tile, swapped, split in itertools.product(
        range(tile_count()), (False, True), (False, True)
    ):
        if fmt_a != fmt_b and swapped != (fmt_b == FP4):
            continue
        if split and k <= 128:
            continue
        if tile in FP8_ONLY_TILES and FP4 in (fmt_a, fmt_b):
            continue
        yield tile, swapped, split
