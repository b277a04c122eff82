"""The choice of a GEMM configuration: pure host code, so it is tested without a GPU."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

import sm120_ops  # noqa: F401  registers the ops

FORMATS = [(a, b) for a in ("mxfp8", "mxfp4") for b in ("mxfp8", "mxfp4")]
SMS = (48, 132, 170, 188)  # GB10, H200, RTX 5090, RTX PRO 6000
TILES = {(128, 256, 2), (128, 128, 4), (128, 128, 2), (128, 64, 4), (64, 64, 4)} | {
    (64, 32, 4),
    (64, 16, 4),
    (128, 16, 8),
    (128, 8, 8),
    (16, 8, 1),
}
MS = (1, 7, 16, 17, 33, 64, 65, 128, 300, 1024, 4096, 65536)
NKS = [(1, 32), (8, 128), (576, 7168), (2112, 7168), (7168, 2048), (7168, 16384), (24576, 1536)]


def choose(
    m: int, n: int, k: int, formats: tuple[str, str], grans: tuple[int, int], sms: int, native: bool
) -> dict[str, Any]:
    text = torch.ops.sm120._gemm_config(
        m, n, k, *formats, *grans, sms, native, 96 << 20, 1792 if native else 4800
    )
    return json.loads(text)


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_every_choice_is_legal(formats: tuple[str, str], sms: int) -> None:
    for m, (n, k), grans in itertools.product(MS, NKS, ((32, 32), (128, 128), (128, 32))):
        config = choose(m, n, k, formats, grans, sms, sms != 132)
        assert (config["tile_rows"], config["tile_cols"], config["warps_down"]) in TILES
        rows, cols = (n, m) if config["swapped"] else (m, n)
        tiles = -(-rows // config["tile_rows"]) * -(-cols // config["tile_cols"])
        blocks = tiles * -(-k // 128)
        if formats[0] != formats[1]:  # the FP4 operand is on the 16-row axis
            assert config["swapped"] == (formats[1] == "mxfp4")
        if config["split"]:  # every CTA has work, and all of them run at once
            assert k > 128
            assert config["grid"] == min(sms, blocks)
        else:
            assert config["grid"] == min(sms, tiles)
        assert config["total_us"] > 0


@pytest.mark.parametrize("sms", SMS)
def test_few_tokens_put_weights_on_the_rows_and_fill_the_gpu(sms: int) -> None:
    for m in (1, 8, 16):
        config = choose(m, 7168, 16384, ("mxfp8", "mxfp8"), (128, 128), sms, sms != 132)
        assert config["swapped"]
        assert config["tile_cols"] <= 32
        assert config["grid"] >= 0.6 * sms


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_large_products_take_the_large_tile(formats: tuple[str, str], sms: int) -> None:
    """128 x 256 where the MMA is native; the emulation lacks the registers for it."""
    for grans in ((32, 32), (128, 128), (128, 32)):
        config = choose(4096, 7168, 16384, formats, grans, sms, sms != 132)
        assert config["tile_rows"] == 128
        assert config["tile_cols"] == (128 if sms == 132 else 256)
        if sms == 132:
            assert config["warps_down"] == (2 if formats == ("mxfp8", "mxfp8") else 4)


def test_few_tiles_with_long_k_are_split() -> None:
    for m, n, k in ((16, 2112, 7168), (128, 2112, 7168), (128, 576, 7168)):
        assert choose(m, n, k, ("mxfp8", "mxfp8"), (128, 128), 132, False)["split"]
    # One tile of 16 weight rows for each SM instead.
    config = choose(1, 2112, 7168, ("mxfp8", "mxfp8"), (128, 128), 132, False)
    assert (config["tile_rows"], config["split"], config["grid"]) == (16, False, 132)


def test_more_tokens_never_cost_less() -> None:
    """The model is monotonic enough to be believed: within 15 % over growing M."""
    for formats in FORMATS:
        last = 0.0
        for m in MS:
            total = choose(m, 7168, 2048, formats, (32, 32), 188, True)["total_us"]
            assert total >= 0.85 * last
            last = total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 128, "mxfp8", "mxfp8"), "m, n, k, num_sms: expected"),
        ((8, 8, 128, "mxfp6", "mxfp8"), 'format_a: expected "mxfp8" or "mxfp4", got mxfp6'),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.sm120._gemm_config(*arguments, 32, 32, 188, True, 0, 1792)
