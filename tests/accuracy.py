"""Full-size accuracy on a GPU, as a table: python tests/accuracy.py

Per shape and format pair: FP32 output against float64 over the dequantised operands (relative
Frobenius error), BF16 output's largest relative error away from cancellation, and calc_diff
(1 - 2<x,y> / (|x|^2 + |y|^2)) against the product of the unquantised BF16 inputs.
"""

from __future__ import annotations

import torch

import sm120_ops

SHAPES = [(4096, 7168, 16384), (128, 7168, 2048), (1, 2112, 7168)]
# format and gran_k of A, format, gran_k and gran_mn of B
CASES = [
    ("mxfp8", 128, "mxfp8", 128, 128),
    ("mxfp8", 32, "mxfp8", 32, 1),
    ("mxfp8", 128, "mxfp4", 32, 1),
    ("mxfp8", 32, "mxfp4", 32, 1),
    ("mxfp4", 32, "mxfp8", 128, 1),
    ("mxfp4", 32, "mxfp4", 32, 1),
]
ROWS_AT_ONCE = 512  # of the float64 reference


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    b = b.double()
    return torch.cat([rows.double() @ b.t() for rows in a.split(ROWS_AT_ONCE)])


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    return (1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum())).item()


def main() -> None:
    torch.manual_seed(1)
    for m, n, k in SHAPES:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        unquantised = product(x, w)
        for format_a, gran_a, format_b, gran_b, gran_mn in CASES:
            a = sm120_ops.quantize(x, format_a, gran_k=gran_a)
            b = sm120_ops.quantize(w, format_b, gran_k=gran_b, gran_mn=gran_mn)
            d32, d16 = (
                sm120_ops.gemm(a, b, gran_k_a=gran_a, gran_k_b=gran_b, out_dtype=dtype).double()
                for dtype in (torch.float32, torch.bfloat16)
            )
            exact = product(sm120_ops.dequantize(*a, gran_a), sm120_ops.dequantize(*b, gran_b))
            relative = (d16 - exact).abs() / exact.abs()
            clear = exact.abs() > 0.1 * exact.abs().mean()  # away from cancellation
            print(
                f"{m}x{n}x{k} {format_a}/{gran_a} x {format_b}/{gran_b}:"
                f" fp32 Frobenius {((d32 - exact).norm() / exact.norm()).item():.2e}"
                f"  bf16 max relative {relative[clear].max().item():.2e} (2^-8 = 3.91e-03)"
                f"  calc_diff {calc_diff(d32, unquantised):.2e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
