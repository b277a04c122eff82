"""einsum: the grouped output projection of DeepSeek-V4, its gradients, and a sum over a batch.

The line that a large BF16 product is held to is bf16_gemm of equal work, in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sm120_ops.bench.ceilings import atom_of
from sm120_ops.bench.gemm import calc_diff
from sm120_ops.bench.record import Line, Mark, data_bytes, gemm_flops, scale_bytes

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

H, R, D = 8, 4096, 1024
FORWARD, BACKWARD, GRADIENT, SUM = "bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr", "bmk,bnk->mn"

WEIGHTS = Mark("weight_tbps", ">=", 2.4, "TB/s weights", gpu="H200")
OF_GEMM = Mark("relative", ">=", 0.9, "x bf16_gemm")


class Case(NamedTuple):
    equation: str
    fmt: str
    gran_k: int
    sizes: dict[str, int]
    mark: Mark | None = None

    def size(self, indices: str) -> int:
        product = 1
        for index in indices:
            product *= self.sizes[index]
        return product

    def shape(self, indices: str) -> list[int]:
        return [self.sizes[index] for index in indices]

    @property
    def name(self) -> str:
        fmt = self.fmt if self.fmt == "bf16" else f"{self.fmt} gran {self.gran_k}"
        return f"{fmt} {self.equation}"

    @property
    def label(self) -> str:
        return " ".join(f"{index}={size}" for index, size in self.sizes.items())


def _heads(
    b: int, fmt: str = "bf16", gran_k: int = 32, equation: str = FORWARD, mark: Mark | None = None
) -> Case:
    return Case(equation, fmt, gran_k, {"b": b, "h": H, "r": R, "d": D}, mark)


def _sum(b: int, m: int, n: int, k: int) -> Case:
    return Case(SUM, "bf16", 0, {"b": b, "m": m, "n": n, "k": k})


LARGE = 8192
TABLE = (
    *(_heads(b, mark=WEIGHTS) for b in (1, 4, 16)),
    _heads(64),
    _heads(LARGE, mark=OF_GEMM),
    _heads(LARGE, equation=BACKWARD),
    _heads(LARGE, equation=GRADIENT),
    *(_heads(b, "mxfp8", 128) for b in (1, 16, LARGE)),
    *(_heads(b, "mxfp8", 32) for b in (1, 16, LARGE)),
    *(_heads(b, "mxfp4", 32) for b in (1, 16, LARGE)),
    _sum(129, 128, 384, 128),
    _sum(LARGE, 128, 384, 128),
    _sum(LARGE, 256, 256, 256),
)


def cases(mode: str) -> Iterator[Case]:
    yield from TABLE
    if mode == "full":
        for b in (2, 8, 32, 128, 256, 512, 1024, 2048, 4096):
            yield _heads(b)
            for fmt, gran_k in (("mxfp8", 128), ("mxfp8", 32), ("mxfp4", 32)):
                yield _heads(b, fmt, gran_k)
        for b in (2, 16, 129):
            yield _heads(b, equation=BACKWARD)
            yield _heads(b, equation=GRADIENT)


def _quantized(x: torch.Tensor, case: Case, indices: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[.., .., K] as 'bhr' or 'hdr': scales packed head by head, as the op reads them."""
    heads = indices.index("h")
    by_head = x.movedim(heads, 0).flatten(0, 1)
    data, scale = torch.ops.sm120.quantize(by_head, case.fmt, case.gran_k)
    # 16-byte aligned heads: rows of all heads, padded by whole heads where a head has not 4k rows.
    rows = x.shape[1 - heads]
    padded = -(-rows // 4) * 4
    words = scale.shape[1]
    kept = torch.zeros(H, words, padded, dtype=torch.int32, device=x.device)
    kept[:, :, :rows] = scale.unflatten(0, (H, rows)).transpose(1, 2)
    packed = kept[:, :, :rows].transpose(1, 2).movedim(0, heads)
    return data.unflatten(0, (H, rows)).movedim(0, heads).contiguous(), packed


def run(context: Context) -> Iterator[Line]:
    import sm120_ops

    gemm_us: float | None = None
    for case in cases(context.mode):
        inputs, _, d_indices = case.equation.partition("->")
        a_indices, b_indices = inputs.split(",")
        generator = torch.Generator(context.device).manual_seed(case.sizes["b"])
        x, w = (
            torch.randn(
                case.shape(indices),
                device=context.device,
                generator=generator,
                dtype=torch.bfloat16,
            )
            for indices in (a_indices, b_indices)
        )
        scaled = case.fmt != "bf16"
        k = next(i for i in a_indices[::-1] if i in b_indices and i not in d_indices)
        out_dtype = torch.float32 if case.equation == SUM else torch.bfloat16
        d = torch.full(case.shape(d_indices), float("nan"), device=context.device, dtype=out_dtype)
        size = d.nbytes
        for indices in (a_indices, b_indices):
            rows = case.size(indices) // case.sizes[k]
            size += data_bytes(rows, case.sizes[k], case.fmt)
            size += scale_bytes(rows, case.sizes[k], case.gran_k) if scaled else 0
        fields: dict[str, Any] = {
            "family": "einsum",
            "name": case.name,
            "shape": case.label,
            "flops": gemm_flops(1, 1, case.size("".join(case.sizes))),
            "bytes": size,
            "weight_bytes": data_bytes(case.size(b_indices), 1, case.fmt),
        }
        atom = atom_of((case.fmt, case.fmt), (case.gran_k,) * 2) if scaled else "bf16"
        if case.mark is OF_GEMM:
            # As many rows and columns, and as long a sum, without the heads.
            rows, columns = torch.randn(
                2, case.sizes["b"], R, device=context.device, dtype=torch.bfloat16
            )
            plain = torch.empty(len(rows), len(columns), device=context.device, dtype=x.dtype)
            call = functools.partial(torch.ops.sm120.bf16_gemm.out, rows, columns, out=plain)
            line = context.time(call, provider="bf16_gemm, equal work", atom=atom, **fields)
            gemm_us = line.us
            yield line
        if scaled:
            a, b = _quantized(x, case, a_indices), _quantized(w, case, b_indices)
            run_op = functools.partial(
                sm120_ops.einsum,
                case.equation,
                a,
                b,
                out=d,
                gran_k_a=case.gran_k,
                gran_k_b=case.gran_k,
            )
        else:
            run_op = functools.partial(sm120_ops.einsum, case.equation, x, w, out=d)
        line = context.time(run_op, provider="sm120_ops", atom=atom, **fields)
        product = torch.einsum(case.equation, x, w)
        line.diff = calc_diff(d, product)
        line.mark = case.mark
        if case.mark is OF_GEMM and gemm_us is not None and line.us is not None:
            line.relative = gemm_us / line.us
        yield context.judge(line)
        if context.with_peers and not scaled:
            call = functools.partial(torch.einsum, case.equation, x, w)
            yield context.time_peer(call, provider="torch.einsum", **fields)
