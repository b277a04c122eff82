"""The choice of a BF16 GEMM configuration: pure host code, so it is tested without a GPU."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

import sm120_ops  # noqa: F401  registers the ops

SMS = (48, 132, 170, 188)  # GB10, H200, RTX 5090, RTX PRO 6000
# rows, cols, warps down, slices -> K of a stage
TILES = {
    (128, 256, 2, 1): 32,
    (128, 128, 2, 2): 64,
    (128, 64, 2, 2): 64,
    (64, 64, 2, 2): 64,
    (64, 32, 2, 4): 128,
    (64, 16, 2, 4): 128,
    (16, 32, 1, 8): 256,
    (16, 8, 1, 8): 256,
}
MS = (1, 7, 16, 17, 33, 64, 65, 128, 300, 1024, 4096, 65536)
NKS = [(1, 0), (8, 1), (1, 32), (8, 128), (576, 7168), (2112, 7168), (7168, 2048), (7168, 16384)]
OPS = ("bf16_grouped_gemm", "bf16_grouped_gemm_psum", "bf16_grouped_gemm_masked")


def choose(m: int, n: int, k: int, sms: int) -> dict[str, Any]:
    native = sms != 132
    text = torch.ops.sm120._bf16_gemm_config(
        m, n, k, sms, native, 96 << 20, 1792 if native else 4800
    )
    result: dict[str, Any] = json.loads(text)
    return result


def choose_grouped(
    op: str, m: int, n: int, k: int, groups: int, alignment: int, expected_m: int, sms: int
) -> dict[str, Any]:
    native = sms != 132
    text = torch.ops.sm120._bf16_grouped_config(
        op, m, n, k, groups, alignment, expected_m, sms, native, 96 << 20,
        1792 if native else 4800,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(text)
    return result


def tile_of(config: dict[str, Any]) -> tuple[int, int, int, int]:
    return tuple(config[key] for key in ("tile_rows", "tile_cols", "warps_down", "slices"))


@pytest.mark.parametrize("sms", SMS)
def test_every_choice_is_legal(sms: int) -> None:
    for m, (n, k) in itertools.product(MS, NKS):
        config = choose(m, n, k, sms)
        block_k = TILES[tile_of(config)]
        rows, cols = (n, m) if config["swapped"] else (m, n)
        tiles = -(-rows // config["tile_rows"]) * -(-cols // config["tile_cols"])
        blocks = tiles * -(-k // block_k)
        if config["split"]:  # every CTA has work, and all of them run at once
            assert k > block_k
            parts = min(sms // tiles, -(-k // block_k))
            assert config["grid"] == (tiles * parts if parts > 1 else min(sms, blocks))
        else:
            assert config["grid"] == min(sms, tiles)
        assert config["total_us"] > 0


@pytest.mark.parametrize("sms", SMS)
def test_few_tokens_take_few_columns_and_fill_the_gpu(sms: int) -> None:
    for m in (1, 8, 16):
        config = choose(m, 7168, 16384, sms)
        assert config["tile_cols" if config["swapped"] else "tile_rows"] <= 32
        assert config["grid"] >= 0.6 * sms


def test_large_products_take_the_large_tile_whole() -> None:
    """On the H200. Where an MMA takes 4 clocks of an SM, smaller tiles keep it busy as well."""
    config = choose(4096, 7168, 16384, 132)
    assert tile_of(config) == (128, 256, 2, 1)
    assert not config["split"]
    for sms in (48, 170, 188):
        config = choose(4096, 7168, 16384, sms)
        assert config["tile_rows"] * config["tile_cols"] >= 64 * 64


@pytest.mark.parametrize("sms", SMS)
def test_long_sums_take_a_tile_that_cuts_them_into_chains(sms: int) -> None:
    for m, n in itertools.product(MS, (8, 2112, 7168)):
        config = choose(m, n, 32768, sms)
        # That tile has no room for chains. A split may take it: a CTA has but a part of K then.
        assert config["split"] or tile_of(config) != (128, 128, 2, 2)


def test_few_tiles_with_long_k_are_split() -> None:
    for m, n, k in ((1, 576, 7168), (128, 2112, 7168), (128, 576, 7168)):
        assert choose(m, n, k, 132)["split"]


def test_more_tokens_never_cost_less() -> None:
    """The model is monotonic enough to be believed: within 15 % over growing M."""
    last = 0.0
    for m in MS:
        total = choose(m, 7168, 2048, 188)["total_us"]
        assert total >= 0.85 * last
        last = total


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("op", OPS)
def test_every_grouped_choice_is_legal(op: str, sms: int) -> None:
    shapes = itertools.product((1, 64, 4096, 65536), (1, 8, 4096, 7168), (0, 32, 2880), (1, 64))
    for (m, n, k, groups), alignment, expected in itertools.product(
        shapes, (16, 64, 128), (0, 2, 5000)
    ):
        config = choose_grouped(op, m, n, k, groups, alignment, expected, sms)
        assert tile_of(config) in TILES
        assert not config["split"]
        assert 1 <= config["grid"] <= sms
        assert config["total_us"] > 0


@pytest.mark.parametrize("sms", SMS)
def test_decoding_takes_a_small_tile_and_prompts_the_large_one(sms: int) -> None:
    for tokens in (1, 8, 16):
        for op, m in (("bf16_grouped_gemm_psum", 192), ("bf16_grouped_gemm_masked", 128)):
            config = choose_grouped(op, m, 4096, 4096, 256, 32, tokens, sms)
            assert config["tile_cols" if config["swapped"] else "tile_rows"] <= 64
    config = choose_grouped("bf16_grouped_gemm", 8192, 4096, 7168, 8, 128, 0, sms)
    area = config["tile_rows"] * config["tile_cols"]
    assert area >= (128 * 128 if sms == 132 else 64 * 64)


def test_no_tile_is_larger_than_what_a_segment_fills() -> None:
    config = choose_grouped("bf16_grouped_gemm", 1 << 16, 4096, 4096, 8, 16, 0, 132)
    assert config["tile_cols" if config["swapped"] else "tile_rows"] == 16


def test_bad_arguments() -> None:
    with pytest.raises((ValueError, RuntimeError), match="m, n, k, num_sms: expected"):
        choose(0, 8, 128, 132)
    with pytest.raises((ValueError, RuntimeError), match="op: expected bf16_grouped_gemm, "):
        choose_grouped("grouped_gemm", 1, 8, 128, 1, 16, 0, 132)
    with pytest.raises((ValueError, RuntimeError), match="alignment, num_sms: expected"):
        choose_grouped("bf16_grouped_gemm", 0, 8, 128, 1, 16, 0, 132)
