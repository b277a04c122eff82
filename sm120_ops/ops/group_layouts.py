"""The layouts of m-grouped GEMMs: which rows belong to which expert, and checks of what says so.

    contiguous    A [M, K], m_indices int32 [M]: the expert of each row, -1 for padding. Rows come
                  in segments of `alignment`; the valid rows of a segment stand at its head and
                  share one expert.
    psum          A [M, K], group_ends int32 [G]: group g has the rows from the end of the group
                  before it, rounded up to `alignment`, to group_ends[g].
    masked        A [G, Mmax, K], masked_m int32 [G]: of group g the first masked_m[g] rows.

All index tensors are read on the device at run time, so a captured CUDA graph may be replayed with
others. Rows of no group are never read into a result and never written. Index tensors that break
their layout cannot cause an access out of bounds: runs() defines what is computed then, and
require_layout() names the first bad row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.nn import functional

from .. import _check
from .layout import align

ALIGNMENTS = (16, 32, 64, 128)
CONTIGUOUS, PSUM, MASKED = "contiguous", "psum", "masked"
# Of each layout: the name of its index tensor, and an op's options with their defaults.
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    CONTIGUOUS: ("m_indices", {"alignment": 128, "expected_m": 0}),
    PSUM: ("group_ends", {"alignment": 128, "expected_m": 0}),
    MASKED: ("masked_m", {"expected_m": 0}),
}

Run = tuple[int, int, int]  # expert, first row, end; of A's matrix `expert` if that has groups


def check_options(op: str, options: Mapping[str, int]) -> None:
    _check.require_choice(op, "alignment", options.get("alignment", 128), ALIGNMENTS)
    expected_m = options.get("expected_m", 0)
    _check.require_number(op, "expected_m", expected_m, integer=True)
    _check.require(expected_m >= 0, op, "expected_m", "a row count, or 0 for unknown", expected_m)


def check_sizes(op: str, arg: str, sizes: torch.Tensor) -> None:
    """An int32 vector."""
    _check.require_tensor(op, arg, sizes, rank=1)
    _check.require_dtype(op, arg, sizes, (torch.int32,))
    if sizes.stride(0) != 1 and sizes.shape[0] > 1:
        _check.fail(op, arg, "a contiguous tensor", f"strides {list(sizes.stride())}")


def check_index(op: str, kind: str, index: torch.Tensor, rows: int, groups: int) -> None:
    arg = LAYOUTS[kind][0]
    check_sizes(op, arg, index)
    count = rows if kind == CONTIGUOUS else groups
    if index.shape[0] != count:
        _check.fail(op, arg, f"shape [{count}]", index.shape)


def check_same_groups(op: str, a: torch.Tensor, groups: int) -> None:
    """The masked layout's A."""
    if a.shape[0] != groups:
        _check.fail(op, "a", f"{groups} groups as in b", f"shape {list(a.shape)}")


def check_grouped_out(
    op: str, out: torch.Tensor, shape: tuple[int, ...], inputs: Mapping[str, torch.Tensor]
) -> None:
    """D [M, N] or [G, M, N]: rows contiguous, any strides without overlap. Apart from `inputs`."""
    _check.require_tensor(op, "out", out, rank=len(shape))
    if any(got != wanted for got, wanted in zip(out.shape, shape, strict=True)):
        _check.fail(op, "out", f"shape {list(shape)}", out.shape)
    strides = f"strides {list(out.stride())}"
    if out.stride(-1) != 1 and shape[-1] > 1:
        _check.fail(op, "out", "contiguous rows (last stride 1)", strides)
    if out.stride(-2) < shape[-1] and shape[-2] > 1:
        _check.fail(op, "out", f"a row stride >= {shape[-1]}", strides)
    if len(shape) == 3 and shape[0] > 1 and shape[1] > 0:
        group = (shape[1] - 1) * out.stride(1) + shape[2]
        if out.stride(0) < group:
            _check.fail(op, "out", f"a group stride >= {group}", strides)
    _check.require_same_device(op, "a", a=inputs["a"], out=out)
    _check.require_no_overlap(op, "out", out, **inputs)


def check_group_c(
    op: str, c: torch.Tensor, shape: tuple[int, int, int], out_dtype: torch.dtype
) -> None:
    """C [G, M, N], for a product a group."""
    _check.require_tensor(op, "c", c, rank=3)
    _check.require_dtype(op, "c", c, (out_dtype,))
    if any(got != wanted for got, wanted in zip(c.shape, shape, strict=True)):
        _check.fail(op, "c", f"shape {list(shape)}", c.shape)
    if c.stride(2) != 1 and shape[2] > 1:
        _check.fail(op, "c", "contiguous rows (last stride 1)", f"strides {list(c.stride())}")


def check_c_apart(op: str, out: torch.Tensor, c: torch.Tensor | None) -> None:
    """Each element of C is read by the thread that writes it, so the same place is fine."""
    if c is None or not _check.has_address(out):
        return
    if c.data_ptr() != out.data_ptr() or c.stride() != out.stride():
        _check.require_no_overlap(op, "out", out, c=c)


# ---- Which rows are computed ---------------------------------------------------------------------


def runs(
    kind: str, index: torch.Tensor, groups: int, rows: int, alignment: int = 1
) -> Iterator[Run]:
    """The rows to be computed; `rows` are A's, or those of each of its matrices.

    contiguous: of each segment the leading rows that share its first row's index, if that is an
        expert. In a segment that breaks the layout the kernel may compute other rows too, each with
        the expert its index names; every row is either so computed or left untouched.
    psum: ends are clamped to 0 .. rows, and a group starts behind the end of all groups before it.
    masked: counts are clamped to 0 .. rows.
    """
    indices = index.tolist()
    if kind == CONTIGUOUS:
        for begin in range(0, len(indices), alignment):
            segment = indices[begin : begin + alignment]
            expert = segment[0]
            if 0 <= expert < groups:
                length = next((i for i, e in enumerate(segment) if e != expert), len(segment))
                yield expert, begin, begin + length
    elif kind == PSUM:
        start = 0
        for group, end in enumerate(indices):
            end = min(max(end, 0), rows)
            if end > start:
                yield group, start, end
            start = max(start, align(end, alignment))
    else:
        for group, count in enumerate(indices):
            if count > 0:
                yield group, 0, min(count, rows)


def refuse_under_capture(op: str, sizes: torch.Tensor) -> None:
    if sizes.is_cuda and torch.cuda.is_current_stream_capturing():
        got = "a stream that is capturing a CUDA graph (the check would sync)"
        _check.fail(op, "validate", "False under graph capture", got)


def require_layout(
    op: str, kind: str, index: torch.Tensor, groups: int, rows: int, alignment: int
) -> None:
    """Reads the device (one sync); ValueError that names the first bad row or group."""
    refuse_under_capture(op, index)
    if index.shape[0] == 0:
        return
    if kind == CONTIGUOUS:
        padded = functional.pad(index, (0, -index.shape[0] % alignment), value=-1)
        segments = padded.unflatten(0, (-1, alignment))
        first = segments[:, :1]
        after_padding = (segments == -1).cummax(1).values & (segments != -1)
        bad = (segments < -1) | (segments >= groups) | after_padding
        bad |= (segments != first) & (segments != -1)
        what, unit = f"-1 or 0 .. {groups - 1}, and segments of {alignment} rows with one", "row"
        requirement = f"{what} expert each, padding last"
        bad = bad.flatten()
    elif kind == PSUM:
        before = functional.pad(index[:-1], (1, 0))
        start = torch.div(before + (alignment - 1), alignment, rounding_mode="floor") * alignment
        # An empty group may end where the one before it did.
        bad = ((index < start) & (index != before)) | (index > rows) | (index < 0)
        requirement = f"ends that do not decrease, 0 .. {rows}, starts aligned to {alignment}"
        unit = "group"
    else:
        bad = (index < 0) | (index > rows)
        requirement, unit = f"counts 0 .. {rows}", "group"
    found = bad.nonzero()
    if found.shape[0] > 0:
        at = int(found[0])
        _check.fail(op, LAYOUTS[kind][0], requirement, f"{int(index[at])} at {unit} {at}")
