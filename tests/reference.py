"""Float64 formulas that the tests hold the ops to, written apart from the package's own code."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

FP8, FP4 = "mxfp8", "mxfp4"


def e4m3_value(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e2m1_value(code: int) -> float:
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = code >> 1 & 3, code & 1
    return sign * (0.5 * mantissa if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2))


def ue8m0_value(byte: int) -> float:
    return math.nan if byte == 0xFF else 2.0 ** (byte - 127)


E4M3 = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64)
E2M1 = torch.tensor([e2m1_value(code) for code in range(16)], dtype=torch.float64)
UE8M0 = torch.tensor([ue8m0_value(byte) for byte in range(256)], dtype=torch.float64)

MAX = {FP8: 448.0, FP4: 6.0}
EMAX = {FP8: 8, FP4: 2}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def to_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def scale_byte(amax: float, fmt: str, rule: str) -> int:
    """amax is the value of a float32."""
    if not math.isfinite(amax):
        return 0xFF
    if rule == "deepgemm":
        # The quotient of two float32, rounded to float64 and then to float32, is rounded right.
        quotient = to_float32(max(amax, to_float32(1e-4)) / MAX[fmt])
        mantissa, exponent = math.frexp(quotient)
        return exponent - 1 + (mantissa > 0.5) + 127
    if amax == 0:
        return 0
    return min(max(math.frexp(amax)[1] - 1 - EMAX[fmt] + 127, 0), 254)


def nearest_code(values: torch.Tensor, fmt: str, rule: str) -> torch.Tensor:
    """float64 -> codes of the nearest format values; saturates."""
    table = E4M3[:127] if fmt == FP8 else E2M1[:8]
    magnitude = values.abs().clamp(max=MAX[fmt]).contiguous()
    upper = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    lower = (upper - 1).clamp(min=0)
    below, above = magnitude - table[lower], table[upper] - magnitude
    tie_up = (upper % 2 == 0) & (fmt == FP8 or rule == "ocp")
    code = torch.where((above < below) | ((above == below) & tie_up), upper, lower)
    code = torch.where(magnitude == table[upper], upper, code)
    negative = values.signbit()
    if fmt == FP4 and rule == "deepgemm":
        negative &= code != 0
    return (code + negative * (128 if fmt == FP8 else 8)).to(torch.uint8)


def quantize(
    x: torch.Tensor, fmt: str, gran_k: int, gran_mn: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes, uint8 [M, K], one a byte in FP4 too; scale bytes, uint8 [M, groups]."""
    x = x.detach().cpu().double()
    rows, k = x.shape
    amax = torch.nn.functional.pad(x.abs(), (0, -k % gran_k, 0, -rows % gran_mn))
    amax = amax.unflatten(1, (-1, gran_k)).unflatten(0, (-1, gran_mn)).amax((1, 3))
    scales = torch.tensor(
        [[scale_byte(value, fmt, rule) for value in row] for row in amax.tolist()]
    ).repeat_interleave(gran_mn, 0)[:rows]
    bytes_of = scales.repeat_interleave(gran_k, 1)[:, :k]
    codes = nearest_code(x * 2.0 ** (127 - bytes_of).double(), fmt, rule)
    codes[bytes_of == 0xFF] = 0x7F if fmt == FP8 else 0
    return codes, scales.to(torch.uint8)


def codes_of(data: torch.Tensor) -> torch.Tensor:
    """FP8 or packed FP4 data -> codes, uint8 [rows, K]."""
    raw = data.view(torch.uint8)
    if data.dtype == torch.float8_e4m3fn:
        return raw
    return torch.stack((raw & 15, raw >> 4), -1).flatten(1)


def scale_bytes_of(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Packed scales -> uint8 [rows, groups], by arithmetic on the words."""
    words = scale.long() & 0xFFFFFFFF
    return torch.stack([words[:, g // 4] >> 8 * (g % 4) & 0xFF for g in range(groups)], 1).to(
        torch.uint8
    )


def pack_scale_bytes(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, groups] -> packed scales, by arithmetic on the words."""
    rows, groups = scales.shape
    words = torch.zeros(ceil_div(groups, 4), ceil_div(rows, 4) * 4, dtype=torch.int64)
    words = words.to(scales.device)
    for group in range(groups):
        words[group // 4, :rows] |= scales[:, group].long() << 8 * (group % 4)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).t()[:rows]


def values_of(codes: torch.Tensor, scales: torch.Tensor, fmt: str, gran_k: int) -> torch.Tensor:
    """codes [rows, K] and scale bytes [rows, groups] -> float64 [rows, K]."""
    table = (E4M3 if fmt == FP8 else E2M1).to(codes.device)
    factors = UE8M0.to(codes.device)[scales.long()].repeat_interleave(gran_k, 1)
    return table[codes.long()] * factors[:, : codes.shape[1]]


@dataclass
class Operand:
    """A random operand: as the ops take it, and its values."""

    data: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor
    bytes: torch.Tensor
    values: torch.Tensor  # float64 [rows, K]
    fmt: str
    gran_k: int

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data, self.scale

    def to(self, device: str) -> Operand:
        data = self.data.contiguous().to(device)
        codes, scales = self.codes.to(device), self.bytes.to(device)
        packed = pack_scale_bytes(scales)
        return Operand(data, packed, codes, scales, self.values.to(device), self.fmt, self.gran_k)


def random_operand(
    rows: int,
    k: int,
    fmt: str,
    gran_k: int,
    generator: torch.Generator,
    *,
    row_padding: int = 0,
    scale_range: tuple[int, int] = (120, 134),
) -> Operand:
    """Every finite code and `scale_range` of scales alike; rows `row_padding` bytes apart."""
    device = generator.device
    high = 256 if fmt == FP8 else 16
    codes = torch.randint(high, (rows, k), generator=generator, device=device, dtype=torch.uint8)
    if fmt == FP8:
        codes = torch.where(codes & 0x7F == 0x7F, codes - 1, codes)
        raw = codes
    else:
        raw = codes[:, ::2] | codes[:, 1::2] << 4
    scales = torch.randint(
        *scale_range, (rows, ceil_div(k, gran_k)), generator=generator, device=device
    ).to(torch.uint8)
    # What lies between the rows is NaN or large, should a kernel read it.
    buffer = torch.full((rows, raw.shape[1] + row_padding), 0x7F, dtype=torch.uint8, device=device)
    data = buffer[:, : raw.shape[1]]
    data.copy_(raw)
    if fmt == FP8:
        data = data.view(torch.float8_e4m3fn)
    values = values_of(codes, scales, fmt, gran_k)
    return Operand(data, pack_scale_bytes(scales), codes, scales, values, fmt, gran_k)


def assert_gemm_close(
    d: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    relative: float = 1e-6,
) -> None:
    """D against float64 values of A [M, K] and B [N, K].

    float32: the relative Frobenius error is at most `relative`. bfloat16: every element is within
    2^-8 of its value, half an ulp being 2^-9, plus the float32 error that cancellation leaves over.
    Both get the magnitude that was summed up as yardstick where the sum itself has cancelled.
    """
    exact = a @ b.t() + (0 if c is None else c.double())
    magnitude = a.abs() @ b.abs().t() + (0 if c is None else c.double().abs())
    assert d.shape == exact.shape
    if d.numel() == 0:
        return
    error = (d.double() - exact).abs()
    assert not error.isnan().any(), f"NaN at {error.isnan().nonzero()[0].tolist()}"
    if d.dtype == torch.float32:
        yardstick = exact.norm() if d.numel() >= 256 else magnitude.norm()
        assert error.norm() <= relative * yardstick, (
            f"relative error {error.norm() / yardstick:.3g}"
        )
    # Single elements: nothing is far off either. The sum of K terms in float32 loses a few 2^-24.
    rounding = 2.0**-8 * exact.abs() if d.dtype == torch.bfloat16 else 0
    excess = error - rounding - 2.0**-18 * magnitude
    worst = int(excess.argmax())
    row, column = divmod(worst, d.shape[1])
    assert excess.max() <= 0, f"D[{row}, {column}] = {d[row, column]}, not {exact[row, column]}"


def assert_bf16_close(
    d: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """D against float64, of bfloat16 A [M, K] and B [N, K]."""
    a, b = a.double(), b.double()
    # Tensor cores cut off what each 16 of K add below the sum's last bit: the error grows with K
    # (2.1e-6 at K = 2048 on an H200), and stays under the 1.4e-5 that a calc_diff of 1e-10 means.
    assert_gemm_close(d, a, b, c, relative=min(max(1e-6, a.shape[1] * 2.0**-29), 1.4e-5))
    if d.dtype == torch.float32 and d.numel() > 0 and a.shape[1] > 0:
        exact = a @ b.t() + (0 if c is None else c.double())
        assert calc_diff(d, exact) <= 1e-10


BYTE_FLOATS = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


def opcheck(
    op: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object] | None = None
) -> None:
    """torch.library.opcheck; its schema test cannot compare FP8 or E8M0 arguments."""
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    utils.append("test_aot_dispatch_dynamic")
    values = [*args, *(kwargs or {}).values()]
    if any(isinstance(v, torch.Tensor) and v.dtype in BYTE_FLOATS for v in values):
        utils.remove("test_schema")
    torch.library.opcheck(op, args, kwargs, test_utils=utils)


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())
