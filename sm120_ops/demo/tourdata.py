"""What the op tour works on: one layer of the demo's model reading its sentences, or random data.

What an op multiplies is a weight of that layer and what comes to it there. Random data plays the
same parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sm120_ops.demo.bert import SentenceEncoder
from sm120_ops.demo.tokenizer import WordPiece

LAYER = 2  # from 0, of the model's 6: behind the embeddings, before the last ones' task
EXPERTS = 3  # parts of the FFN's neurons that the grouped ops take for experts


class TourData(NamedTuple):
    source: str  # for the table's title
    x: torch.Tensor  # BF16 [tokens, hidden], what comes to the feed-forward part
    up: torch.Tensor  # BF16 [neurons, hidden]
    up_bias: torch.Tensor  # BF16 [neurons]
    neurons: torch.Tensor  # BF16 [tokens, neurons], behind the activation
    down: torch.Tensor  # FP32 [hidden, neurons]
    heads: torch.Tensor  # BF16 [tokens, heads, D], what attention gives
    out: torch.Tensor  # BF16 [heads, hidden, D], the attention's output projection by head
    queries: torch.Tensor  # BF16 [tokens, heads, D]
    keys: torch.Tensor  # BF16 [tokens, D], of one head


def random_data(device: torch.device) -> TourData:
    """Drawn on the CPU, so that all devices see the same."""
    generator = torch.Generator().manual_seed(120)
    tokens, hidden, neurons, heads, width = 48, 512, 768, 8, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device)

    return TourData(
        "random data",
        x=normal(tokens, hidden),
        up=normal(neurons, hidden),
        up_bias=normal(neurons),
        neurons=normal(tokens, neurons),
        down=torch.randn(hidden, neurons, generator=generator).to(device),
        heads=normal(tokens, heads, width),
        out=normal(heads, hidden, width),
        queries=normal(tokens, heads, width),
        keys=normal(tokens, width),
    )


@torch.no_grad()
def model_data(directory: Path, device: torch.device, sentences: Sequence[str]) -> TourData:
    """The tensors of one layer on real sentences, in FP32 on the CPU and rounded to BF16 once."""
    tokenizer = WordPiece.from_file(directory / "tokenizer.json")
    ids, mask = tokenizer.encode(list(sentences))
    model = SentenceEncoder.from_directory(directory)
    layers: Any = model.encoder["layer"]
    index = min(LAYER, len(layers) - 1)
    layer = layers[index]
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        # without the padding: [tokens, width]
        seen[module] = torch.cat((inputs[0], result), -1)[mask.bool()]

    attention, output = layer.attention["self"], layer.attention["output"].dense
    up, down = layer.intermediate["dense"], layer.output.dense
    for module in (attention.query, attention.key, output, up, down):
        module.register_forward_hook(keep)
    model(ids, mask)
    hidden, heads = up.in_features, attention.heads

    def bf16(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.bfloat16).to(device)

    def by_head(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (heads, -1))

    return TourData(
        f"layer {index + 1} of the model, reading {len(sentences)} sentences",
        x=bf16(seen[up][:, :hidden]),
        up=bf16(up.weight),
        up_bias=bf16(up.bias),
        neurons=bf16(seen[down][:, : down.in_features]),
        down=down.weight.to(device),
        heads=bf16(by_head(seen[output][:, :hidden])),
        out=bf16(by_head(output.weight).transpose(0, 1).contiguous()),
        queries=bf16(by_head(seen[attention.query][:, hidden:])),
        keys=bf16(by_head(seen[attention.key][:, hidden:])[:, 0].contiguous()),
    )
