"""The m-grouped GEMM against float64 over dequantised operands: layouts, formats, forms, edges."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import reference
import torch
from grouped_cases import CONTIGUOUS, MASKED, OPS, PSUM, Case, Problem, bits, group_scale
from reference import FP4, FP8, opcheck
from torch._subclasses import FakeTensorMode

import sm120_ops
from sm120_ops.ops.groups import prepare_groups

PAIRS = list(itertools.product((FP8, FP4), (FP8, FP4)))
GRANS = list(itertools.product((32, 128), (32, 128)))
SMALL = {CONTIGUOUS: (3, 150), PSUM: (5, 150), MASKED: (3, 37)}  # groups, rows


def small_case(op: str, **fields: Any) -> Case:
    groups, rows = SMALL[op]
    return dataclasses.replace(Case(op, groups, rows, 36, 160, alignment=32), **fields)


def check(case: Case, device: torch.device) -> Problem:
    problem = Problem(case, device)
    first, second = problem.run(), problem.run()
    assert torch.equal(bits(first), bits(second)), "two runs differ"
    problem.check(first)
    return problem


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize(("gran_k_a", "gran_k_b"), GRANS)
def test_formats_and_granularities(
    device: torch.device, op: str, fmt_a: str, fmt_b: str, gran_k_a: int, gran_k_b: int
) -> None:
    for fp32, k in ((False, 544), (True, 288)):
        check(
            small_case(
                op, k=k, fmt_a=fmt_a, fmt_b=fmt_b, gran_k_a=gran_k_a, gran_k_b=gran_k_b, fp32=fp32
            ),
            device,
        )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("routing", ["few", "full", "one", "none"])
@pytest.mark.parametrize("alignment", [16, 32, 64, 128])
def test_routings(device: torch.device, op: str, routing: str, alignment: int) -> None:
    for fmt_b, margin in ((FP8, 0), (FP4, 5)):
        check(
            small_case(op, routing=routing, alignment=alignment, fmt_b=fmt_b, margin=margin,
                       seed=alignment),
            device,
        )  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_new_result_is_zero_outside_of_groups(device: torch.device, op: str) -> None:
    problem = Problem(small_case(op), device)
    function = getattr(sm120_ops, op)
    a, b = (problem.a_data, problem.sfa), (problem.b_data, problem.sfb)
    d = function(a, b, problem.index, **problem.options)
    assert d.shape == problem.shape
    assert d.dtype == torch.bfloat16
    assert d.is_contiguous()
    expected = problem.run()
    flat = d.reshape(-1, d.shape[-1])
    assert torch.equal(flat[problem.valid], expected.reshape(flat.shape)[problem.valid])
    assert (flat[~problem.valid] == 0).all()
    fp32 = function(a, b, problem.index, **problem.options, out_dtype=torch.float32)
    assert fp32.dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
def test_row_and_group_strides(device: torch.device, op: str) -> None:
    """Operands and D as slices of larger tensors."""
    problem = Problem(small_case(op, n=40, margin=3), device)
    expected = problem.run()
    groups, n, width = problem.b_data.shape
    wide = torch.full((groups, n + 2, width + 48), 0x7F, dtype=torch.uint8, device=device)
    wide[:, 1 : n + 1, 16 : width + 16] = problem.b_data.view(torch.uint8)
    problem.b_data = wide[:, 1 : n + 1, 16 : width + 16].view(problem.b_data.dtype)
    raw = problem.a_data.view(torch.uint8)
    padded = torch.full(
        (*raw.shape[:-1], raw.shape[-1] + 32), 0x7F, dtype=torch.uint8, device=device
    )
    padded[..., : raw.shape[-1]] = raw
    problem.a_data = padded[..., : raw.shape[-1]].view(problem.a_data.dtype)
    assert torch.equal(bits(problem.run()), bits(expected))
    if op == MASKED:
        tall = torch.full((groups, 50, 43), 5.0, dtype=torch.bfloat16, device=device)
        tall[:, :37] = 77.0
        problem.run(tall[:, :37])
        assert torch.equal(bits(tall[:, :37].contiguous()), bits(expected))
        assert (tall[:, 37:] == 5.0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("n", "gran_k"), [(36, 32), (33, 128), (130, 128)])
def test_scale_forms_give_the_same(device: torch.device, op: str, n: int, gran_k: int) -> None:
    groups = SMALL[op][0]
    problem = Problem(small_case(op, n=n, k=288, gran_k_a=gran_k, gran_k_b=gran_k), device)
    expected = problem.run()
    by_bytes = problem.b.bytes.view(groups, n, -1)
    values = reference.UE8M0.to(device)[by_bytes.long()].float()
    forms = [by_bytes, by_bytes.view(torch.float8_e8m0fnu), values]
    if n % 4 == 0:
        forms.append(group_scale(problem.b, groups, n, one_matrix=True))
    for scale in forms:
        problem.sfb = scale
        assert torch.equal(bits(problem.run()), bits(expected))
    _, packed, found = prepare_groups("grouped_gemm", "b", (problem.b_data, values), None, True)
    assert found == gran_k
    assert packed.shape == (groups, n, -(-288 // (4 * gran_k)))


@pytest.mark.parametrize("gran_mn", [32, 128])
def test_block_scales(device: torch.device, gran_mn: int) -> None:
    for n in (128, 150, 30):
        problem = Problem(small_case(CONTIGUOUS, n=n), device)
        blocks = problem.b.bytes.view(3, n, -1)[:, ::gran_mn].contiguous()
        per_row = blocks.repeat_interleave(gran_mn, 1)[:, :n]
        problem.sfb = per_row
        expected = problem.run()
        problem.sfb = blocks
        assert torch.equal(bits(problem.run()), bits(expected))


@pytest.mark.parametrize("op", OPS)
def test_empty(device: torch.device, op: str) -> None:
    for fields in ({"groups": 0}, {"rows": 0}, {"n": 0}, {"k": 0}, {"groups": 1, "rows": 1}):
        case = small_case(op, **fields)
        index = None if case.groups else [-1] * (case.rows if op == CONTIGUOUS else 0)
        problem = Problem(case, device, index)
        problem.check(problem.run())


BROKEN_SEGMENTS = {
    "hole": {5: -1},
    "another expert": {7: 2},
    "out of range": {3: 3, 40: -2, 64: 1 << 30, 100: -(1 << 31)},
    "starts late": {0: -1, 1: -1, 32: 2},
}


@pytest.mark.parametrize("broken", BROKEN_SEGMENTS)
@pytest.mark.parametrize("alignment", [16, 32, 64, 128])
def test_broken_segments(device: torch.device, broken: str, alignment: int) -> None:
    """The leading rows that share the first row's index are computed, whatever comes behind."""
    index = [1] * 150
    for row, expert in BROKEN_SEGMENTS[broken].items():
        index[row] = expert
    for fmt_b in (FP8, FP4):
        case = small_case(CONTIGUOUS, alignment=alignment, fmt_b=fmt_b)
        problem = Problem(case, device, index)
        problem.check(problem.run())
        first = min(BROKEN_SEGMENTS[broken])
        row = first + 1 if broken == "hole" else 2 if broken == "starts late" else first
        with pytest.raises(ValueError, match=rf"m_indices: expected .* at row {row}$"):
            problem.run(validate=True)


def test_broken_ends_and_counts(device: torch.device) -> None:
    for index in ([40, 20, 90, -5, 200], [-1, -1, 0, 3, 1 << 30], [150, 150, 150, 150, 150]):
        problem = Problem(small_case(PSUM), device, index)
        problem.check(problem.run())
    problem = Problem(small_case(PSUM), device, [40, 20, 90, 90, 90])
    with pytest.raises(ValueError, match=r"group_ends: expected .* got 20 at group 1"):
        problem.run(validate=True)
    problem = Problem(small_case(MASKED), device, [38, -1, 1 << 30])
    problem.check(problem.run())
    with pytest.raises(ValueError, match=r"masked_m: expected counts 0 .. 37, got 38 at group 0"):
        problem.run(validate=True)


@pytest.mark.parametrize("op", OPS)
def test_a_right_layout_validates(device: torch.device, op: str) -> None:
    for routing, seed in itertools.product(("mixed", "few", "full", "one", "none"), range(5)):
        problem = Problem(small_case(op, routing=routing, seed=seed), device)
        problem.check(problem.run(validate=True))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_fakes(device: torch.device, op: str) -> None:
    for fmt in (FP8, FP4):
        rows = 36 if op == MASKED else 152  # a clone of packed scales needs rows % 4 == 0
        problem = Problem(small_case(op, fmt_a=fmt, fmt_b=fmt, rows=rows), device)
        packet = getattr(torch.ops.sm120, op)
        options = list(problem.options.values())
        args = (*problem.inputs, *options[:2], torch.float32, *options[2:])
        opcheck(packet.default, args)
        out = torch.zeros(problem.shape, device=device)
        opcheck(packet.out, (*problem.inputs, *options), {"out": out})
        real = packet.default(*args)
        with FakeTensorMode() as mode:
            fake = packet.default(
                *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args)
            )
        assert fake.shape == real.shape
        assert fake.stride() == real.stride()
        assert fake.dtype == real.dtype


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(device: torch.device, backend: str) -> None:
    """One graph for every number of tokens and every routing."""
    torch._dynamo.reset()
    weights = Problem(small_case(CONTIGUOUS), device)
    b = (weights.b_data, weights.b.bytes.view(3, 36, -1))

    def function(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return sm120_ops.grouped_gemm(sm120_ops.quantize(x), b, index, alignment=16)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch.manual_seed(0)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (64, 16, 80, 33, 128):  # no size of the weights among them
            x = torch.randn(rows, 160, device=device)
            index = torch.randint(-1, 3, (-(-rows // 16),), device=device, dtype=torch.int32)
            index = index.repeat_interleave(16)[:rows].clone()
            assert torch.equal(compiled(x, index), function(x, index))
