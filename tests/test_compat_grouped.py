"""m-grouped GEMMs by DeepGEMM's names: contiguous, psum, masked, in its conventions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from compat_cases import BF16, CONFIGS, FP32, SCALE_FORMS, Operand, as_form, quantised, refused

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm import runtime
from sm120_ops.compat.deep_gemm.testing import calc_diff

N, K = 136, 256


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_settings", runtime._Settings())


def stacked(x: torch.Tensor, gran_k: int, fp4: bool, block: bool, form: str) -> Operand:
    """[G, rows, K] quantised group by group, as DeepGEMM's tests do."""
    parts = [quantised(part, gran_k, fp4, block) for part in x]
    data = torch.stack([part[0].view(torch.uint8) for part in parts]).view(parts[0][0].dtype)
    sf = torch.stack([part[1] for part in parts])
    return data, as_form(sf, form, x.shape[1], (gran_k if block else 1, gran_k))


class Experts:
    """Random weights of G experts, and the options that say how they are quantised."""

    def __init__(
        self, device: torch.device, groups: int, config: tuple[int, int, bool, bool], form: str
    ) -> None:
        self.device, self.config, self.form = device, config, form
        gran_a, gran_b, fp4_a, fp4_b = config
        generator = torch.Generator(device).manual_seed(groups)
        self.w = torch.randn(groups, N, K, device=device, generator=generator).bfloat16()
        block = not fp4_a and not fp4_b
        self.b = stacked(self.w, gran_b, fp4_b, block, form)
        self.options: dict[str, Any] = {}
        if config != (128, 128, False, False):
            self.options = {
                "recipe_a": (1, gran_a),
                "recipe_b": (gran_b if block else 1, gran_b),
            }

    def tokens(self, rows: int) -> tuple[torch.Tensor, Operand]:
        x = torch.randn(rows, K, device=self.device).bfloat16()
        data, sf = quantised(x, self.config[0], self.config[2])
        return x, (data, as_form(sf, self.form, rows, (1, self.config[0])))


def segments(sizes: list[int], alignment: int) -> tuple[list[int], list[int]]:
    """The expert of each row or -1, and the end of each group."""
    indices: list[int] = []
    ends = []
    for expert, size in enumerate(sizes):
        ends.append(len(indices) + size)
        indices += [expert] * size + [-1] * (-size % alignment)
    return indices, ends


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", SCALE_FORMS)
@pytest.mark.parametrize(
    ("alignment", "psum", "out_dtype"),
    [(64, False, FP32), (64, True, BF16), (128, False, BF16), (128, True, FP32)],
)
def test_contiguous(
    device: torch.device,
    config: tuple[int, int, bool, bool],
    form: str,
    alignment: int,
    psum: bool,
    out_dtype: torch.dtype,
) -> None:
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    sizes = [3, 0, 128, 50]
    experts = Experts(device, len(sizes), config, form)
    indices, ends = segments(sizes, alignment)
    x, a = experts.tokens(len(indices))
    layout = torch.tensor(ends if psum else indices, dtype=torch.int32, device=device)
    d = torch.full((len(indices), N), 7.0, device=device, dtype=out_dtype)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(
        a, experts.b, d, layout, use_psum_layout=psum, **experts.options
    )
    rows = torch.tensor(indices, device=device)
    live = rows >= 0
    wanted = torch.einsum("mk,mnk->mn", x[live].float(), experts.w[rows[live]].float())
    assert calc_diff(d[live], wanted) < CONFIGS[config]
    assert (d[~live] == 7).all()
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        a, experts.b, d, layout, use_psum_layout=psum, ensure_zero_padding=True,
        expected_m_for_psum_layout=64 if psum else None, **experts.options,
    )  # fmt: skip
    assert calc_diff(d[live], wanted) < CONFIGS[config]
    assert (d[~live] == 0).all()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", ["float32", "packed"])
@pytest.mark.parametrize(
    ("name", "psum"), [("m_grouped_fp8_fp4_gemm", False), ("m_grouped_fp8_gemm", True)]
)
def test_contiguous_nn(
    device: torch.device, config: tuple[int, int, bool, bool], form: str, name: str, psum: bool
) -> None:
    experts = Experts(device, 2, config, form)
    data, sf = experts.b
    if data.dtype == torch.int8:  # [G, K, N / 2], packed along N
        data = torch.stack([deep_gemm.transpose_packed_fp4(part) for part in data])
    else:
        data = data.transpose(1, 2).contiguous()
    indices, ends = segments([5, 70], 128)
    x, a = experts.tokens(len(indices))
    layout = torch.tensor(ends if psum else indices, dtype=torch.int32, device=device)
    d = torch.empty(len(indices), N, device=device, dtype=BF16)
    b = (data, sf.transpose(1, 2))
    getattr(deep_gemm, f"{name}_nn_contiguous")(
        a, b, d, layout, use_psum_layout=psum, **experts.options
    )
    rows = torch.tensor(indices, device=device)
    live = rows >= 0
    wanted = torch.einsum("mk,mnk->mn", x[live].float(), experts.w[rows[live]].float())
    assert calc_diff(d[live], wanted) < CONFIGS[config]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", SCALE_FORMS)
@pytest.mark.parametrize("max_m", [64, 101])
def test_masked(
    device: torch.device, config: tuple[int, int, bool, bool], form: str, max_m: int
) -> None:
    sizes = [3, 0, max_m, 50]
    experts = Experts(device, len(sizes), config, form)
    x = torch.randn(len(sizes), max_m, K, device=device).bfloat16()
    a = stacked(x, config[0], config[2], False, form)
    masked_m = torch.tensor(sizes, dtype=torch.int32, device=device)
    wanted = torch.einsum("gmk,gnk->gmn", x.float(), experts.w.float())
    for name in (
        "m_grouped_fp8_fp4_gemm_nt_masked",
        "m_grouped_fp8_gemm_nt_masked",
        "fp8_m_grouped_gemm_nt_masked",
        "m_grouped_fp4_gemm_nt_masked",
    ):
        dtype = BF16 if name == "fp8_m_grouped_gemm_nt_masked" else FP32
        d = torch.full((len(sizes), max_m, N), 7.0, device=device, dtype=dtype)
        # The engines pass the last two by keyword as well.
        getattr(deep_gemm, name)(
            a, experts.b, d, masked_m=masked_m, expected_m=24, **experts.options
        )
        for group, size in enumerate(sizes):
            if size > 0:
                diff = calc_diff(d[group, :size], wanted[group, :size])
                assert diff < CONFIGS[config]
            assert (d[group, size:] == 7).all()


def test_no_tokens_and_no_experts_hit(device: torch.device) -> None:
    experts = Experts(device, 3, (128, 128, False, False), "packed")
    none = torch.full((128,), -1, dtype=torch.int32, device=device)
    for rows in (0, 128):
        _, a = experts.tokens(rows)
        d = torch.full((rows, N), 7.0, device=device, dtype=BF16)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, experts.b, d, none[:rows])
        assert (d == 7).all()


def test_padding_rows_are_not_read(device: torch.device) -> None:
    """Unaligned groups with NaN behind them, which DeepGEMM multiplies."""
    config = (128, 32, False, True)
    experts = Experts(device, 2, config, "packed")
    indices, _ = segments([5, 77], 128)
    x, (data, sf) = experts.tokens(len(indices))
    rows = torch.tensor(indices, dtype=torch.int32, device=device)
    live = rows >= 0
    data.view(torch.uint8)[~live] = 0x7F  # NaN
    d = torch.full((len(indices), N), math.inf, device=device, dtype=BF16)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(
        (data, sf), experts.b, d, rows, recipe_a=(1, 128), recipe_b=(1, 32)
    )
    wanted = torch.einsum("mk,mnk->mn", x[live].float(), experts.w[rows[live].long()].float())
    assert calc_diff(d[live], wanted) < CONFIGS[config]
    assert d[~live].isinf().all()


def test_refusals(device: torch.device) -> None:
    experts = Experts(device, 2, (128, 128, False, False), "float32")
    _, a = experts.tokens(128)
    d = torch.empty(128, N, device=device, dtype=BF16)
    layout = torch.zeros(128, dtype=torch.int32, device=device)
    nt, masked = (
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous,
        deep_gemm.fp8_m_grouped_gemm_nt_masked,
    )
    with refused("nt_contiguous: epilogue: expected None"):
        nt(a, experts.b, d, layout, epilogue=object())
    bad = experts.b[0], experts.b[1] * 1.25
    with refused("nt_contiguous: sfb: expected float32 scales that are powers of two"):
        nt(a, bad, d, layout)
    with refused(r"nt_contiguous: sfb: expected shape \[2, 5, 8\] \(gran_mn 32, gran_k 32\)"):
        nt(a, experts.b, d, layout, recipe_a=(1, 128), recipe_b=(32, 32))
    for options in ({"enable_overlap": True}, {"enable_overlap": True, "signal": layout}):
        a3 = (a[0][None].repeat(2, 1, 1), a[1][None].repeat(2, 1, 1))
        with refused("nt_masked: enable_overlap: expected False"):
            masked(a3, experts.b, d[None].repeat(2, 1, 1), layout[:2], 4, **options)
    deep_gemm.set_mk_alignment_for_contiguous_layout(8)
    with refused("grouped_gemm: alignment: expected 16, 32, 64 or 128, got 8"):
        nt(a, experts.b, d, layout)
    for value, psum in itertools.product((256,), (False,)):
        deep_gemm.set_mk_alignment_for_contiguous_layout(value)
        nt(a, experts.b, d, layout, use_psum_layout=psum)
