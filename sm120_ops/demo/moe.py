"""``python -m sm120_ops demo --moe``: the model's own feed-forward layers as mixtures of experts.

The neurons of each layer's FFN are clustered by their input weights into experts of equal size, and
a token goes to the experts whose neurons it excites most. That is a mixture of experts on a real
model's weights and activations. It runs in FP32, and through MXExperts in each format; the table
compares the two on the same routing. (What the mixture leaves out of the whole FFN is another
matter, and stands in the row of FP32.)

BERT's GELU is taken as g * sigmoid(1.702 g), which SwiGLU gives with an up projection of zeros and
up_offset 1.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from torch import nn

from sm120_ops._console import make_console, step
from sm120_ops.demo.bert import Layer, SentenceEncoder
from sm120_ops.demo.tokenizer import WordPiece

MAX_EXPERTS, TOPK_SHARE = 8, 2  # a token goes to one in TOPK_SHARE experts
ALPHA = 1.702
ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class MoeRow:
    """One row of the table: the layers on the same inputs, then the whole model."""

    format: str
    experts: str
    megabytes: float  # of the experts' weights, scales included
    layer_cosine: float  # mean over tokens and layers, against the FP32 mixture
    worst_cosine: float
    layer_error: float  # relative, Frobenius, of the worst layer
    embedding_cosine: float  # smallest over the sentences; of FP32: against the whole FFN


def cluster(rows: torch.Tensor, clusters: int) -> torch.Tensor:
    """Balanced k-means on the directions of rows [N, K] -> row indices [clusters, N / clusters]."""
    generator = torch.Generator().manual_seed(0)
    points = nn.functional.normalize(rows.float().cpu(), dim=1)
    size = len(points) // clusters
    centres = points[torch.randperm(len(points), generator=generator)[:clusters]]
    members: list[list[int]] = []
    for _ in range(ROUNDS):
        similarity = points @ centres.T
        members = [[] for _ in range(clusters)]
        placed = [False] * len(points)
        for pair in similarity.flatten().argsort(descending=True, stable=True).tolist():
            point, centre = divmod(pair, clusters)
            if not placed[point] and len(members[centre]) < size:
                members[centre].append(point)
                placed[point] = True
        centres = nn.functional.normalize(torch.stack([points[m].mean(0) for m in members]), dim=1)
    return torch.tensor(members).sort(1).values


class MoeFfn(nn.Module):
    """The FFN of a layer with its neurons in experts. `quantized` is None in FP32."""

    first: nn.Linear
    second: nn.Linear
    members: torch.Tensor

    def __init__(self, layer: Layer):
        super().__init__()
        self.first = layer.intermediate["dense"]  # type: ignore[assignment]
        self.second = layer.output.dense
        neurons = self.first.out_features
        experts = max(count for count in range(1, MAX_EXPERTS + 1) if neurons % (32 * count) == 0)
        self.topk = max(experts // TOPK_SHARE, 1)
        members = cluster(self.first.weight.detach(), experts).to(self.first.weight.device)
        self.register_buffer("members", members)
        self.quantized: nn.Module | None = None

    def quantize(self, format: str) -> None:
        from sm120_ops.nn import MXExperts

        gate, gate_bias = self.first.weight[self.members], self.first.bias[self.members]
        down = self.second.weight.T[self.members].transpose(1, 2)
        self.quantized = MXExperts.from_float(
            torch.cat((gate, torch.zeros_like(gate)), 1),
            down,
            torch.cat((gate_bias, torch.zeros_like(gate_bias)), 1),
            down.new_zeros(len(down), down.shape[1]),
            format=format,
            alpha=ALPHA,
            up_offset=1.0,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.first(x)
        hidden = gate * torch.sigmoid(ALPHA * gate)
        excitement = hidden.abs() * self.second.weight.norm(dim=0)
        ids = excitement[..., self.members].sum(-1).topk(self.topk, -1).indices
        bias = self.second.bias
        if self.quantized is not None:
            y: torch.Tensor = self.quantized(x, ids, torch.ones_like(ids, dtype=torch.float32))
            return y + bias
        kept = torch.zeros_like(hidden)
        kept.scatter_(-1, self.members[ids].flatten(-2), 1.0)
        return (hidden * kept) @ self.second.weight.T + bias


class MoeLayer(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.attention, self.norm, self.ffn = layer.attention, layer.output.LayerNorm, MoeFfn(layer)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        out: torch.Tensor = self.norm(self.ffn(x) + x)
        return out


def ffns(model: nn.Module) -> list[MoeFfn]:
    return [module for module in model.modules() if isinstance(module, MoeFfn)]


def expert_megabytes(model: nn.Module) -> float:
    total = 0
    for ffn in ffns(model):
        modules = (ffn.first, ffn.second) if ffn.quantized is None else (ffn.quantized,)
        for module in modules:
            tensors = [*module.parameters(), *module.buffers()]
            total += sum(t.numel() * t.element_size() for t in tensors)
    return total / 1e6


@torch.no_grad()
def compare_moe(directory: Path, device: torch.device, sentences: tuple[str, ...]) -> list[MoeRow]:
    """The mixture in FP32 and in each format; the FP32 row comes first."""
    from sm120_ops.demo import FORMATS

    with step("reading the model"):
        tokenizer = WordPiece.from_file(directory / "tokenizer.json")
        ids, mask = (t.to(device) for t in tokenizer.encode(list(sentences)))
        model = SentenceEncoder.from_directory(directory).to(device)
        whole = model(ids, mask)
    with step("clustering the neurons into experts"):
        layers: nn.ModuleList = model.get_submodule("encoder.layer")  # type: ignore[assignment]
        for index, layer in enumerate(layers):
            layers[index] = MoeLayer(layer)  # type: ignore[arg-type]
    inputs: list[torch.Tensor] = []
    hooks = [
        f.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for f in ffns(model)
    ]
    reference = model(ids, mask)
    for hook in hooks:
        hook.remove()
    live = mask.bool()
    exact = [ffn(x)[live] for ffn, x in zip(ffns(model), inputs, strict=True)]
    first = ffns(model)[0]
    experts = f"{first.topk} of {len(first.members)} x {first.members.shape[1]} neurons"
    cosine = (reference * whole).sum(1).min().item()
    rows = [MoeRow("FP32", experts, expert_megabytes(model), 1.0, 1.0, 0.0, cosine)]
    for key, name, _ in FORMATS:
        with step(f"quantising the experts to {name}"):
            candidate = copy.deepcopy(model)
            for ffn in ffns(candidate):
                ffn.quantize(key)
            got = [ffn(x)[live] for ffn, x in zip(ffns(candidate), inputs, strict=True)]
            pairs = list(zip(got, exact, strict=True))
            cosines = torch.cat([nn.functional.cosine_similarity(y, z, dim=1) for y, z in pairs])
            row = MoeRow(
                format=name,
                experts=experts,
                megabytes=expert_megabytes(candidate),
                layer_cosine=cosines.mean().item(),
                worst_cosine=cosines.min().item(),
                layer_error=max(((y - z).norm() / z.norm()).item() for y, z in pairs),
                embedding_cosine=(candidate(ids, mask) * reference).sum(1).min().item(),
            )
        rows.append(row)
    return rows


def print_moe(rows: list[MoeRow], device: torch.device) -> None:
    from rich.table import Table

    table = Table(title=f"all-MiniLM-L6-v2, each FFN as {rows[0].experts}, on {device}")
    table.add_column("experts in")
    for heading in (
        "experts MB",
        "mean cosine of a token",
        "least",
        "error of the worst layer",
        "least cosine of a sentence",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.format,
            f"{row.megabytes:.1f}",
            f"{row.layer_cosine:.5f}",
            f"{row.worst_cosine:.5f}",
            f"{row.layer_error:.2%}",
            f"{row.embedding_cosine:.5f}" + (" to the whole FFN" if row.format == "FP32" else ""),
        )
    make_console().print(table)
