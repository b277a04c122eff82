"""The formats in FP64, written from their definitions and apart from the ops' own code.

E4M3 is sign, 4 exponent bits (bias 7), 3 mantissa bits, without infinities; E2M1 is sign, 2
exponent bits (bias 1), 1 mantissa bit; UE8M0 is 2^(byte - 127), with 0xFF for NaN.
"""

from __future__ import annotations

import torch

EXPONENT_BITS = {"mxfp8": (4, 7), "mxfp4": (2, 1)}  # bits, bias
MANTISSA_BITS = {"mxfp8": 3, "mxfp4": 1}
MAX_VALUE = {"mxfp8": 448.0, "mxfp4": 6.0}
EMAX = {"mxfp8": 8, "mxfp4": 2}


def code_values(fmt: str) -> torch.Tensor:
    """FP64 value of every code of a format: [256] for MXFP8, [16] for MXFP4."""
    bits, bias = EXPONENT_BITS[fmt]
    mantissa_bits = MANTISSA_BITS[fmt]
    values = []
    for code in range(1 << (1 + bits + mantissa_bits)):
        mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        exponent = (code >> mantissa_bits) & ((1 << bits) - 1)
        sign = -1.0 if code >> (bits + mantissa_bits) else 1.0
        if fmt == "mxfp8" and code & 0x7F == 0x7F:
            values.append(float("nan"))
        elif exponent == 0:
            values.append(sign * mantissa * 2.0 ** (1 - bias))
        else:
            values.append(sign * (1 + mantissa) * 2.0 ** (exponent - bias))
    return torch.tensor(values, dtype=torch.float64)


def scale_values(exponents: torch.Tensor) -> torch.Tensor:
    """UE8M0 bytes -> FP64 scales."""
    values = [2.0 ** (byte - 127) for byte in range(255)] + [torch.nan]
    return torch.tensor(values, dtype=torch.float64)[exponents.to(torch.int64)]


def scale_bytes(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """Packed int32 scales [rows, words] -> bytes [rows, groups], by shifts."""
    words = packed.to(torch.int64)
    parts = [(words >> (8 * i)) & 0xFF for i in range(4)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :groups]


def codes_of(data: torch.Tensor) -> torch.Tensor:
    """Codes [rows, K] of FP8 data or of packed FP4, whose low nibble has the even k."""
    raw = data.view(torch.uint8).to(torch.int64)
    if data.dtype == torch.float8_e4m3fn:
        return raw
    return torch.stack((raw % 16, raw // 16), dim=-1).flatten(1)


def dequantize(data: torch.Tensor, packed: torch.Tensor, gran_k: int) -> torch.Tensor:
    """FP64 values [rows, K]."""
    fmt = "mxfp8" if data.dtype == torch.float8_e4m3fn else "mxfp4"
    values = code_values(fmt)[codes_of(data)]
    K = values.shape[1]
    scales = scale_values(scale_bytes(packed, -(-K // gran_k)))
    return values * scales.repeat_interleave(gran_k, dim=1)[:, :K]


def exponents(amax: torch.Tensor, fmt: str, rule: str) -> torch.Tensor:
    """Scale bytes of groups with the finite maxima ``amax`` (FP64)."""
    if rule == "deepgemm":
        # The rule is defined on the FP32 quotient: near a power of two its rounding decides.
        quotient = amax.float().clamp(min=1e-4) / torch.tensor(MAX_VALUE[fmt])
        mantissa, exponent = torch.frexp(quotient.double())  # mantissa in [0.5, 1)
        return torch.where(mantissa == 0.5, exponent - 1, exponent).to(torch.int64) + 127
    _, exponent = torch.frexp(amax)
    byte = exponent.to(torch.int64) - 1 - EMAX[fmt] + 127
    return torch.where(amax == 0, 0, byte.clamp(0, 254))


def round_to_format(x: torch.Tensor, fmt: str, rule: str) -> torch.Tensor:
    """FP64 values of the nearest codes, saturating; ties to even, or down for FP4 "deepgemm"."""
    _, bias = EXPONENT_BITS[fmt]
    magnitude = x.abs().clamp(max=MAX_VALUE[fmt])
    _, exponent = torch.frexp(magnitude)
    exponent = (exponent.to(torch.int64) - 1).clamp(min=1 - bias)
    step = torch.ldexp(torch.ones_like(x), exponent - MANTISSA_BITS[fmt])
    in_steps = magnitude / step
    ties_down = fmt == "mxfp4" and rule == "deepgemm"
    rounded = torch.ceil(in_steps - 0.5) if ties_down else torch.round(in_steps)
    return torch.copysign(rounded * step, x)


def quantize(
    x: torch.Tensor, fmt: str, gran_k: int, gran_mn: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite x [M, K] -> FP64 values of the data [M, K], and scale bytes [M, groups]."""
    M, K = x.shape
    groups, blocks = -(-K // gran_k), -(-M // gran_mn)
    padded = x.new_zeros(blocks * gran_mn, groups * gran_k, dtype=torch.float64)
    padded[:M, :K] = x.double()
    amax = padded.view(blocks, gran_mn, groups, gran_k).abs().amax(dim=(1, 3))
    byte = exponents(amax, fmt, rule).repeat_interleave(gran_mn, dim=0)[:M]
    scale = scale_values(byte).repeat_interleave(gran_k, dim=1)[:, :K]
    return round_to_format(x.double() / scale, fmt, rule), byte
