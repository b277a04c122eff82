"""The pictures of the reference pages: how data flows through a family, as SVG.

A picture is rows of boxes, from top to bottom, and arrows between boxes. A new family is one more
entry in PICTURES; the page shows it by `![...](../images/<name>.svg)`.
"""

from __future__ import annotations

import itertools
from html import escape
from typing import NamedTuple

FONT, LINE, PAD = 13, 17, 10  # pixels: text size, line height, space inside a box
COLUMN_GAP, ROW_GAP, MARGIN = 28, 30, 12
CHARACTER, BOLD = 7.0, 8.2  # width of one in this font, about
INK, PAPER = "#1f2937", "#ffffff"
FILL = {"tensor": "#e0f2fe", "kernel": "#fde68a", "step": "#f1f5f9"}
EDGE = {"tensor": "#0369a1", "kernel": "#b45309", "step": "#64748b"}


class Box(NamedTuple):
    """Text lines are separated by newlines; the first is bold."""

    text: str
    kind: str = "step"


class Picture(NamedTuple):
    title: str
    rows: list[dict[str, Box]]
    arrows: list[tuple[str, str]]


def tensor(text: str) -> Box:
    return Box(text, "tensor")


def kernel(text: str) -> Box:
    return Box(text, "kernel")


def chain(*names: str) -> list[tuple[str, str]]:
    return list(itertools.pairwise(names))


PICTURES = {
    "quantize": Picture(
        "quantize: one pass from values to codes and scales",
        [
            {"x": tensor("x [rows, K]\nbf16, fp16 or fp32")},
            {"amax": Box("amax\nof gran_k values of K\ntimes gran_mn rows")},
            {"rule": Box("scale 2^(e-127)\nrule deepgemm or ocp")},
            {"round": Box("x * 2^(127-e)\nrounded once")},
            {
                "data": tensor("data\nFP8 [rows, K], or\nFP4 [rows, K/2]"),
                "scale": tensor("packed scales\nint32, MN-major\n[rows, ceil(K / 4 gran_k)]"),
            },
        ],
        [*chain("x", "amax", "rule", "round", "data"), ("rule", "scale")],
    ),
    "layout": Picture(
        "Three forms of scales, the packed one inside the kernels",
        [
            {
                "float": tensor("float32\npowers of two"),
                "bytes": tensor("UE8M0 bytes\nuint8 or float8_e8m0fnu"),
            },
            {"pack": kernel("pack_scales\none scale a row, or\na block of 32, 128 rows")},
            {"packed": tensor("packed int32\n4 K-groups a word, MN-major,\nrows padded to 4")},
            {
                "ops": kernel("every op\nreads it by TMA"),
                "unpack": kernel("unpack_scales\nfor other code"),
            },
        ],
        [
            ("float", "pack"),
            ("bytes", "pack"),
            ("pack", "packed"),
            ("packed", "ops"),
            ("packed", "unpack"),
        ],
    ),
    "gemm": Picture(
        "A tile of the GEMM, from global memory to D",
        [
            {
                "a": tensor("A [M, K] and scales\nFP8, or packed FP4"),
                "b": tensor("B [N, K] and scales\nFP8, or packed FP4"),
            },
            {"tma": kernel("producer warp\nTMA, one K-block of 128 a stage")},
            {"ring": tensor("ring in shared memory\nat most 99 KB, full and empty barriers")},
            {"read": kernel("8 math warps\nldmatrix; FP4 is unpacked in registers")},
            {
                "mma": kernel("block-scaled MMA\nsm_120f: one instruction, sm_90a: emulated"),
                "split": Box("split K\npartial sums, added in CTA order"),
            },
            {"epilogue": kernel("epilogue\n+ C, one rounding, head split")},
            {"d": tensor("D [M, N]\nbf16 or fp32")},
        ],
        [
            ("a", "tma"),
            *chain("b", "tma", "ring", "read", "mma", "epilogue", "d"),
            ("mma", "split"),
            ("split", "epilogue"),
        ],
    ),
    "grouped": Picture(
        "Grouped GEMM: a warp looks for tiles that have work",
        [
            {"index": tensor("group index\nm_indices, group_ends or masked_m,\non the device")},
            {"scheduler": kernel("scheduler warp\nfinds live tiles, skips empty segments")},
            {
                "queue": Box("queue\nof four tiles"),
                "a": tensor("A\nrows of all groups"),
                "b": tensor("B\n[G, N, K]"),
            },
            {"tma": kernel("producer warp\nTMA of a tile's rows and weights")},
            {"main": kernel("main loop and epilogue\nthe dense GEMM's, of the same tile")},
            {"d": tensor("D\nrows of no group\nkeep what they held")},
        ],
        [
            *chain("index", "scheduler", "queue", "tma", "main", "d"),
            ("a", "tma"),
            ("b", "tma"),
        ],
    ),
    "k_grouped": Picture(
        "K-grouped GEMM: a K of its own for each group",
        [
            {
                "ks": tensor("ks int32 [G]\non the device"),
                "a": tensor("A, B of all groups\nnt or tn layout, and scales"),
            },
            {"pack": kernel("pack\nK-major, each group from a\nwhole block of 128 on")},
            {"buffer": tensor("workspace\nsize known from shapes")},
            {"main": kernel("main loop\na range of K-blocks a group")},
            {"d": tensor("D [G, M, N]\n+ C")},
        ],
        [("ks", "pack"), *chain("a", "pack", "buffer", "main", "d")],
    ),
    "moe": Picture(
        "An MoE layer in five launches",
        [
            {
                "x": tensor("x [T, H]"),
                "ids": tensor("topk_ids, weights\n[T, topk]"),
            },
            {"route": kernel("1 moe_route\na row for each slot, tokens quantised")},
            {"up": kernel("2 grouped_gemm_psum\ngate_up weights, [M, H] -> [M, 2I]")},
            {"act": kernel("3 moe_activation\nbias, SwiGLU, quantise, -> [M, I]")},
            {"down": kernel("4 grouped_gemm_psum\ndown weights, -> [M, H]")},
            {"combine": kernel("5 moe_combine\nweighted sum over slots, in slot order")},
            {"y": tensor("y [T, H]")},
        ],
        [*chain("x", "route", "up", "act", "down", "combine", "y"), ("ids", "route")],
    ),
    "bf16": Picture(
        "A tile of the BF16 GEMM",
        [
            {
                "a": tensor("A\nbf16, K-major or M-major"),
                "b": tensor("B\nbf16, K-major or N-major"),
            },
            {"tma": kernel("producer warp\nTMA of either layout, no transpose pass")},
            {"ring": tensor("ring in shared memory\nat most 99 KB")},
            {"read": kernel("8 math warps\nldmatrix, transposing where K is not innermost")},
            {"mma": kernel("mma.sync bf16\nFP32 sums, on both targets")},
            {"epilogue": kernel("epilogue\n+ C, one rounding")},
            {"d": tensor("D [M, N]\nbf16 or fp32")},
        ],
        [("a", "tma"), *chain("b", "tma", "ring", "read", "mma", "epilogue", "d")],
    ),
    "einsum": Picture(
        "einsum: an equation becomes one launch",
        [
            {"operands": tensor("operands\nFP8, FP4 or bf16, as they lie")},
            {"views": Box("views [groups, rows, K]\nany group stride, no copy")},
            {
                "batched": kernel("batched_gemm, bf16_batched_gemm\na product for each group"),
                "sum": kernel("bf16_batch_sum\nsummed over the groups too"),
            },
            {"d": tensor("D\nheads beside one another, or one matrix")},
        ],
        [
            *chain("operands", "views", "batched", "d"),
            ("views", "sum"),
            ("sum", "d"),
        ],
    ),
    "hc_prenorm": Picture(
        "Hyper-connection prenorm: one pass over x",
        [
            {"x": tensor("x [M, K]\nbf16"), "fn": tensor("fn [N, K]\nfloat32, rounded to TF32")},
            {"kernel": kernel("hc_prenorm\nTF32 MMA, and squares of the same x")},
            {"splits": Box("splits of K\nsummed in a fixed order, or handed out")},
            {"d": tensor("d [M, N]\nfloat32"), "sqr": tensor("sqr_sum [M]\nfloat32")},
        ],
        [("x", "kernel"), *chain("fn", "kernel", "splits", "d"), ("splits", "sqr")],
    ),
    "mqa": Picture(
        "A step of a sparse-attention indexer",
        [
            {"new": tensor("new keys")},
            {"write": kernel("mqa_cache_write\nquantise into pages")},
            {
                "q": tensor("q, weights\nFP8 or FP4, [S, H, D]"),
                "cache": tensor("paged cache\nof a page keys, then scales"),
                "meta": kernel("paged_mqa_metadata\nshares of equal length"),
            },
            {
                "logits": kernel(
                    "mqa_logits, paged_mqa_logits\nsum over heads of relu(q . k) * weight"
                )
            },
            {"scores": tensor("logits\nfloat32 [rows, keys]")},
            {"topk": kernel("indexer_topk")},
            {"indices": tensor("indices\nint32 [rows, k]")},
        ],
        [
            *chain("new", "write", "cache", "logits", "scores", "topk", "indices"),
            ("q", "logits"),
            ("meta", "logits"),
        ],
    ),
    "nn": Picture(
        "From a model of torch to a model of these kernels",
        [
            {"model": tensor("model\nnn.Linear, bf16 or fp32")},
            {"convert": kernel("convert\nfilter(name, linear)")},
            {
                "linear": kernel("MXLinear\npacked weights, kept\nas buffers"),
                "rest": Box("everything else\nas it was"),
            },
            {"call": Box("a call\nquantize(x), gemm, bias")},
            {"y": tensor("y\nx's dtype")},
        ],
        [*chain("model", "convert", "linear", "call", "y"), ("convert", "rest")],
    ),
}


class _Placed(NamedTuple):
    box: Box
    x: float
    y: float
    width: float
    height: float


def _size(box: Box) -> tuple[float, float]:
    first, *others = box.text.split("\n")
    width = max([len(first) * BOLD, *(len(line) * CHARACTER for line in others)])
    return width + 2 * PAD, (1 + len(others)) * LINE + 2 * PAD - 4


def _place(rows: list[dict[str, Box]]) -> tuple[dict[str, _Placed], float, float]:
    """Boxes of a row beside each other and in the middle; width and height of the picture."""
    widths = [
        sum(_size(box)[0] for box in row.values()) + COLUMN_GAP * (len(row) - 1) for row in rows
    ]
    width = max(widths) + 2 * MARGIN
    placed, y = {}, float(MARGIN)
    for row, needed in zip(rows, widths, strict=True):
        height = max(_size(box)[1] for box in row.values())
        x = (width - needed) / 2
        for name, box in row.items():
            placed[name] = _Placed(box, x, y, _size(box)[0], height)
            x += _size(box)[0] + COLUMN_GAP
        y += height + ROW_GAP
    return placed, width, y - ROW_GAP + MARGIN


def _draw_box(placed: _Placed) -> list[str]:
    box, x, y, width, height = placed
    radius = 12 if box.kind == "tensor" else 3
    out = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="{radius}" '
        f'fill="{FILL[box.kind]}" stroke="{EDGE[box.kind]}"/>'
    ]
    for number, line in enumerate(box.text.split("\n")):
        weight = ' font-weight="bold"' if number == 0 else ""
        baseline = y + PAD + LINE * number + FONT - 2
        out.append(
            f'<text x="{x + width / 2:.0f}" y="{baseline:.0f}" text-anchor="middle"{weight}>'
            f"{escape(line)}</text>"
        )
    return out


def _draw_arrow(start: _Placed, end: _Placed) -> str:
    if start.y == end.y:  # beside each other
        right = end.x > start.x
        y = start.y + start.height / 2
        x1 = start.x + (start.width if right else 0)
        x2 = end.x + (-5 if right else end.width + 5)
        path = f"M{x1:.0f} {y:.0f} L{x2:.0f} {y:.0f}"
    else:
        x1, y1 = start.x + start.width / 2, start.y + start.height
        x2, y2 = end.x + end.width / 2, end.y - 5
        middle = (y1 + y2) / 2
        path = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="{INK}" marker-end="url(#head)"/>'


def svg(picture: Picture) -> str:
    placed, width, height = _place(picture.rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" font-size="{FONT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f"<title>{escape(picture.title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>',
        *(_draw_arrow(placed[a], placed[b]) for a, b in picture.arrows),
        f'<g fill="{INK}">',
        *(line for box in placed.values() for line in _draw_box(box)),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"
