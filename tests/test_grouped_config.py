"""The choice of a configuration for grouped tokens: pure host code, tested without a GPU."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from test_gemm_config import FORMATS, SMS, TILES

import sm120_ops  # noqa: F401  registers the ops

OPS = ("grouped_gemm", "grouped_gemm_psum", "grouped_gemm_masked")
MIXED = ("mxfp8", "mxfp4")


def choose(
    op: str,
    m: int,
    n: int,
    k: int,
    groups: int,
    *,
    alignment: int = 128,
    expected_m: int = 0,
    formats: tuple[str, str] = ("mxfp8", "mxfp8"),
    grans: tuple[int, int] = (128, 128),
    sms: int = 188,
) -> dict[str, Any]:
    native = sms != 132
    text = torch.ops.sm120._grouped_config(
        op, m, n, k, groups, alignment, expected_m, *formats, *grans, sms, native, 96 << 20,
        1792 if native else 4800,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(text)
    return result


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize("op", OPS)
def test_every_choice_is_legal(op: str, formats: tuple[str, str], sms: int) -> None:
    shapes = itertools.product((1, 64, 4096, 65536), (8, 4096, 7168), (32, 2880), (1, 64, 384))
    for (m, n, k, groups), alignment, expected in itertools.product(
        shapes, (16, 64, 128), (0, 2, 5000)
    ):
        config = choose(op, m, n, k, groups, alignment=alignment, expected_m=expected,
                        formats=formats, sms=sms)  # fmt: skip
        tile = (config["tile_rows"], config["tile_cols"], config["warps_down"])
        assert tile in TILES
        assert not config["split"]
        assert 1 <= config["grid"] <= sms
        assert config["total_us"] > 0
        if formats[0] != formats[1]:  # the FP4 operand is on the 16-row axis
            assert config["swapped"] == (formats[1] == "mxfp4")


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("formats", [("mxfp8", "mxfp8"), MIXED], ids="-".join)
def test_few_tokens_take_a_small_tile(sms: int, formats: tuple[str, str]) -> None:
    """With the weights on the rows, but for products whose tiles then would not fill the waves."""
    for tokens in (1, 8, 16):
        for op, m in (("grouped_gemm_psum", 6 * 32), ("grouped_gemm_masked", 128)):
            config = choose(op, m, 4096, 4096, 256, alignment=32, expected_m=tokens,
                            formats=formats, sms=sms)  # fmt: skip
            tokens_of_tile = config["tile_cols" if config["swapped"] else "tile_rows"]
            assert tokens_of_tile <= 64
            assert config["swapped"] or op == "grouped_gemm_psum"
    # Blocks of 64 rows, most of them padding: what is unknown is taken for a few tokens.
    for blocks in (20, 65):
        config = choose("grouped_gemm", 64 * blocks, 4096, 4096, 64, alignment=64, formats=formats,
                        sms=sms)  # fmt: skip
        assert config["swapped"]
        assert config["tile_cols"] <= 32


@pytest.mark.parametrize("sms", SMS)
def test_prompts_take_the_large_tile(sms: int) -> None:
    for formats in FORMATS:
        large = [(128, 128)] if sms == 132 else [(128, 128), (128, 256)]
        config = choose("grouped_gemm", 8192, 4096, 7168, 8, formats=formats, sms=sms)
        assert (config["tile_rows"], config["tile_cols"]) in large
        config = choose("grouped_gemm_masked", 4096, 4096, 7168, 8, formats=formats, sms=sms,
                        expected_m=2000)  # fmt: skip
        assert (config["tile_rows"], config["tile_cols"]) in large


def test_no_tile_is_larger_than_what_a_segment_fills() -> None:
    """With segments of 16 rows a tile serves 16, however many rows an expert has."""
    config = choose("grouped_gemm", 1 << 16, 4096, 4096, 8, alignment=16, sms=132)
    assert config["swapped"]
    assert config["tile_cols"] == 16


def test_the_hint_decides_in_the_masked_layout() -> None:
    areas = [
        config["tile_rows"] * config["tile_cols"]
        for expected in (1, 16, 64, 1000)
        for config in [choose("grouped_gemm_masked", 4096, 4096, 4096, 64, expected_m=expected)]
    ]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemm", 1, 8, 128, 1), "op: expected grouped_gemm, grouped_gemm_psum or"),
        (("grouped_gemm", 0, 8, 128, 1), "m, n, k, groups, alignment, num_sms: expected"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        choose(*arguments)
