"""What one benchmark line says, and the arithmetic behind its columns. No GPU needed here."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Mark:
    """A target: ``metric`` of a line has to be ``relation`` ``value``.

    Times and rates are marks of one GPU model (``gpu``, a part of its name); shares of a ceiling
    measured in the same run hold anywhere (``gpu=None``).
    """

    metric: str  # an attribute of Line
    relation: str  # ">=" or "<="
    value: float
    unit: str
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.relation not in (">=", "<="):
            raise ValueError(f"Mark: relation: expected >= or <=, got {self.relation!r}")

    def __str__(self) -> str:
        shown = f"{self.value * 100:.0f}" if self.unit.startswith("%") else f"{self.value:g}"
        return f"{self.relation} {shown} {self.unit}".rstrip()

    def verdict(self, line: Line, gpu_name: str) -> str:
        """``pass``, ``short``, or empty where the mark is not meant for this GPU or line."""
        if self.gpu is not None and self.gpu not in gpu_name:
            return ""
        got = getattr(line, self.metric)
        if got is None:
            return ""
        met = got >= self.value if self.relation == ">=" else got <= self.value
        return "pass" if met else "short"


@dataclasses.dataclass
class Line:
    """One measurement. Bytes are counted once each: operands, scales, C and D."""

    family: str
    name: str  # format or variant
    shape: str
    provider: str
    us: float | None
    flops: int = 0
    bytes: int = 0
    weight_bytes: int = 0  # data of B alone, without scales
    ceiling_tflops: float | None = None  # bare-loop rate of the atom that the kernel is made of
    copy_gbps: float | None = None
    relative: float | None = None  # speed beside that of another line, which the mark names
    diff: float | None = None  # calc_diff against the unquantised product
    mark: Mark | None = None
    verdict: str = ""
    note: str = ""

    @property
    def tflops(self) -> float | None:
        return self.flops / self.us / 1e6 if self.us and self.flops else None

    @property
    def gbps(self) -> float | None:
        return self.bytes / self.us / 1e3 if self.us and self.bytes else None

    @property
    def weight_tbps(self) -> float | None:
        return self.weight_bytes / self.us / 1e6 if self.us and self.weight_bytes else None

    @property
    def tbps(self) -> float | None:
        return None if self.gbps is None else self.gbps / 1e3

    @property
    def ceiling_share(self) -> float | None:
        if self.tflops is None or not self.ceiling_tflops:
            return None
        return self.tflops / self.ceiling_tflops

    @property
    def copy_share(self) -> float | None:
        return self.gbps / self.copy_gbps if self.gbps is not None and self.copy_gbps else None

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte, the abscissa of a roofline."""
        return self.flops / self.bytes if self.flops and self.bytes else None

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["mark"] = None if self.mark is None else str(self.mark)
        for name in ("tflops", "gbps", "weight_tbps", "ceiling_share", "copy_share", "intensity"):
            data[name] = getattr(self, name)
        return data


ELEMENT_BITS = {"mxfp8": 8, "mxfp4": 4, "bf16": 16, "fp32": 32}


def data_bytes(rows: int, K: int, fmt: str) -> int:
    return rows * K * ELEMENT_BITS[fmt] // 8


def scale_bytes(rows: int, K: int, gran_k: int) -> int:
    """Canonical packed scales: four K-groups a word, rows padded to a multiple of 4."""
    words = -(-K // (4 * gran_k))
    return 4 * words * (-(-rows // 4) * 4)


def gemm_flops(M: int, N: int, K: int) -> int:
    return 2 * M * N * K


def gemm_bytes(
    M: int, N: int, K: int, formats: tuple[str, str], grans: tuple[int, int], out: str = "bf16"
) -> int:
    a, b = formats
    operands = data_bytes(M, K, a) + data_bytes(N, K, b)
    scales = 0
    if a.startswith("mx"):
        scales = scale_bytes(M, K, grans[0]) + scale_bytes(N, K, grans[1])
    return operands + scales + data_bytes(M, N, out)


def quantize_bytes(M: int, K: int, fmt: str, gran_k: int, source: str = "bf16") -> int:
    return data_bytes(M, K, source) + data_bytes(M, K, fmt) + scale_bytes(M, K, gran_k)
