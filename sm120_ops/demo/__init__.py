"""``python -m sm120_ops demo``: a real sentence-embedding model on the ops of this package.

all-MiniLM-L6-v2 encodes a dozen sentences in FP32 and with every linear layer in MXFP8, W4A8 (FP4
weights, FP8 activations) and MXFP4; the table shows how close the embeddings stay. The same code
runs the CPU reference and the GPU kernels. The op tour is on data of the model too; without the
model's files it is what remains of the demo, on random data.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sm120_ops._console import UsageError, make_console, step
from sm120_ops.demo.bert import SentenceEncoder
from sm120_ops.demo.optour import print_op_tour
from sm120_ops.demo.tokenizer import WordPiece
from sm120_ops.demo.tourdata import model_data, random_data
from sm120_ops.demo.weights import HOW_TO_GET_IT, export_bf16, find_model
from sm120_ops.device import describe, is_supported

# Four topics of three: the two relatives of each sentence should be its nearest neighbours.
SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone plays a guitar in front of a crowd.",
    "The violinist gave a wonderful concert last night.",
    "The central bank raised interest rates again.",
    "Stock markets fell sharply after the announcement.",
    "Inflation makes groceries and rent more expensive.",
    "The telescope took a picture of a distant galaxy.",
    "Astronomers discovered a planet around a nearby star.",
    "A rocket carried the satellite into orbit.",
    "Boil the pasta in salted water for nine minutes.",
    "Add garlic and olive oil to the tomato sauce.",
    "The bread needs an hour in a hot oven.",
)
FORMATS = (
    ("mxfp8", "MXFP8", "FP8 / FP8"),
    ("w4a8", "W4A8", "FP4 / FP8"),
    ("mxfp4", "MXFP4", "FP4 / FP4"),
)
NEIGHBOURS = 2  # of each sentence: the other two of its topic


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One row of the table: a format's embeddings against those of FP32."""

    format: str
    operands: str
    linears: int  # layers converted
    megabytes: float  # weights of the encoder's layers, scales included
    min_cosine: float
    mean_cosine: float
    nearest_kept: int  # sentences whose nearest neighbour is that of FP32
    order_kept: int  # sentences whose first two neighbours are those of FP32, in order
    sentences: int
    milliseconds: float


def neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    """Indices [n, NEIGHBOURS] of the most similar other sentences, nearest first."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.argsort(dim=1, descending=True)[:, :NEIGHBOURS]


def encoder_megabytes(model: nn.Module) -> float:
    encoder = model.get_submodule("encoder")
    tensors = [*encoder.parameters(), *encoder.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def timed(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """Result, and best milliseconds of runs that go on for a second (five runs at most)."""
    times: list[float] = []
    result = run()  # warms up
    while len(times) < 5 and sum(times) < 1000:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return result.cpu(), min(times)


@torch.no_grad()
def compare_formats(
    directory: Path, device: torch.device, sentences: tuple[str, ...] = SENTENCES
) -> list[Encoding]:
    """Encodes ``sentences`` in FP32 and in each format of FORMATS; the FP32 row comes first."""
    from sm120_ops.nn import convert

    with step("reading the model"):
        tokenizer = WordPiece.from_file(directory / "tokenizer.json")
        ids, mask = (t.to(device) for t in tokenizer.encode(list(sentences)))
        model = SentenceEncoder.from_directory(directory).to(device)
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())

    def encode(name: str, operands: str, candidate: nn.Module, count: int) -> Encoding:
        embeddings, milliseconds = timed(lambda: candidate(ids, mask), device)
        cosine = (embeddings * reference).sum(1)
        same = neighbours(embeddings) == neighbours(reference)
        return Encoding(
            format=name,
            operands=operands,
            linears=count,
            megabytes=encoder_megabytes(candidate),
            min_cosine=cosine.min().item(),
            mean_cosine=cosine.mean().item(),
            nearest_kept=int(same[:, 0].sum()),
            order_kept=int(same.all(dim=1).sum()),
            sentences=len(sentences),
            milliseconds=milliseconds,
        )

    with step("encoding in FP32"):
        reference = model(ids, mask).cpu()
        rows = [encode("FP32", "FP32 / FP32", model, 0)]
    for key, name, operands in FORMATS:
        with step(f"converting {linears} linear layers to {name} and encoding"):
            candidate = convert(copy.deepcopy(model), key)
            rows.append(encode(name, operands, candidate, linears))
    return rows


def print_encodings(rows: list[Encoding], device: torch.device) -> None:
    from rich.table import Table

    table = Table(title=f"all-MiniLM-L6-v2, {rows[0].sentences} sentences on {device}")
    table.add_column("linear layers in")
    table.add_column("weights / activations")
    for heading in (
        "layers",
        "encoder MB",
        "min cosine",
        "mean cosine",
        "nearest neighbour kept",
        "first two in order",
        "best ms",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        kept = "yes" if row.nearest_kept == row.sentences else "no"
        table.add_row(
            row.format,
            row.operands,
            str(row.linears) if row.linears else "-",
            f"{row.megabytes:.1f}",
            f"{row.min_cosine:.5f}",
            f"{row.mean_cosine:.5f}",
            f"{kept} ({row.nearest_kept} of {row.sentences})",
            f"{row.order_kept} of {row.sentences}",
            f"{row.milliseconds:.1f}",
        )
    make_console().print(table)


def choose_device(name: str | None) -> torch.device:
    """The device asked for; else the GPU if the kernels run on it; else the CPU."""
    if name is None:
        return torch.device("cuda" if is_supported() else "cpu")
    try:
        environment = describe(name)
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch cannot parse the name
        raise UsageError(f"demo: --device: {error}") from error
    device = torch.device(name)
    if device.type == "cuda" and not is_supported(device):
        raise UsageError(f"demo: --device: {environment.gpu}: {environment.reason}")
    return device


def run_demo(
    model: Path | None = None,
    *,
    ops: bool = False,
    moe: bool = False,
    export: Path | None = None,
    device_name: str | None = None,
) -> int:
    """Entry point of the command line; returns the exit code."""
    console = make_console()
    device = choose_device(device_name)
    environment = describe(device_name)
    console.print(f"sm120_ops {environment.package} on {environment.gpu or 'CPU'}: ", end="")
    console.print(f"{environment.target} ({environment.reason})", markup=False)
    for problem in environment.problems:
        console.print(f"note: {problem}", markup=False)
    directory = find_model(model)
    if export is not None:
        if directory is None:
            raise UsageError(f"demo: --export-bf16: no model to copy; get it by {HOW_TO_GET_IT}")
        size = export_bf16(directory, export)
        console.print(f"wrote {export} ({size / 1e6:.0f} MB); read it with --model {export}")
        return 0
    if directory is not None and not ops:
        if moe:
            from sm120_ops.demo.moe import compare_moe, print_moe

            print_moe(compare_moe(directory, device, SENTENCES), device)
        else:
            print_encodings(compare_formats(directory, device), device)
        if device.type == "cpu":
            console.print(
                "CPU times are those of the PyTorch reference, which is made to be right, "
                "not fast; on a supported GPU the same command runs the kernels."
            )
        return 0
    if directory is not None:
        return print_op_tour(model_data(directory, device, SENTENCES))
    console.print("The model is not installed. To get it:", markup=False)
    console.print(f"  {HOW_TO_GET_IT}", markup=False)
    console.print("Until then, a tour of the ops on random data:", markup=False)
    return print_op_tour(random_data(device))
