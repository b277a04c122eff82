"""One indexer step of sparse attention on the hidden states of a real model.

    python examples/sparse_indexer.py [--format mxfp8|mxfp4] [--device cpu|cuda] [--model DIR]

The demo's sentence encoder (all-MiniLM-L6-v2) reads a text; the hidden states of its last layer are
the tokens. As in DeepSeek-V3.2's lightning indexer, each token has one key and each query token 64
heads of queries with a weight a head. The keys go into a paged FP8 or FP4 cache, the logits of the
last tokens against all tokens before them come from the cache, and the best are chosen. The
projections are random: the encoder was not trained with an indexer. All is then compared with
the same step in float32 without any quantisation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sm120_ops
from sm120_ops.demo import SENTENCES
from sm120_ops.demo.bert import SentenceEncoder
from sm120_ops.demo.tokenizer import WordPiece
from sm120_ops.demo.weights import HOW_TO_GET_IT, find_model

HEADS, DIM, BLOCK_KV, TOP_K = 64, 128, 64, 32
QUERIES = 4  # the last tokens of each sequence, as with speculative decoding


def hidden_states(directory: Path, device: torch.device) -> torch.Tensor:
    """Two sequences of tokens, [2, length, hidden]: the sentences in two orders."""
    tokenizer = WordPiece.from_file(directory / "tokenizer.json")
    model = SentenceEncoder.from_directory(directory).to(device)
    texts = [" ".join(SENTENCES), " ".join(reversed(SENTENCES))]
    ids, mask = (t.to(device) for t in tokenizer.encode(texts))
    x = model.embeddings(ids)
    for layer in model.encoder["layer"]:  # type: ignore[union-attr]
        x = layer(x, mask.bool()[:, None, None, :])
    return x


def quantise_queries(
    q: torch.Tensor, weights: torch.Tensor, fmt: str
) -> tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """q [B, n, H, D] and weights [B * n, H] as paged_mqa_logits() takes them."""
    shape = q.shape
    data, scale = sm120_ops.quantize(q.reshape(-1, DIM), fmt, 128 if fmt == "mxfp8" else 32)
    if fmt == "mxfp4":
        return (data.view(*shape[:3], DIM // 2), scale[:, 0].reshape(shape[:3])), weights
    # FP8 queries come without scales: relu(s x) = s relu(x), so they belong to the weights.
    factors = sm120_ops.unpack_scales(scale, 1, torch.float32).view_as(weights)
    return data.view(shape), weights * factors


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--format", choices=("mxfp8", "mxfp4"), default="mxfp8")
    parser.add_argument("--device", default="cuda" if sm120_ops.is_supported() else "cpu")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    directory = find_model(options.model)
    if directory is None:
        raise SystemExit(f"the demo model is not installed; get it by {HOW_TO_GET_IT}")
    device, fmt = torch.device(options.device), options.format

    states = hidden_states(directory, device)
    batch, length, hidden = states.shape
    generator = torch.Generator().manual_seed(0)

    def project(x: torch.Tensor, columns: int) -> torch.Tensor:
        matrix = torch.randn(hidden, columns, generator=generator) / hidden**0.5
        return x @ matrix.to(device)

    keys = project(states, DIM).bfloat16()
    last = states[:, -QUERIES:]
    queries = project(last, HEADS * DIM).view(batch, QUERIES, HEADS, DIM).bfloat16()
    weights = project(last, HEADS).reshape(-1, HEADS).float()

    # The cache: every sequence has its own pages, in any order.
    pages = -(-length // BLOCK_KV)
    width = DIM if fmt == "mxfp8" else DIM // 2
    cache = torch.zeros(batch * pages + 1, BLOCK_KV, 1, width + 4, dtype=torch.uint8, device=device)
    table = torch.randperm(batch * pages, generator=generator).view(batch, pages).int().to(device)
    position = torch.arange(length, device=device)
    slots = table[:, position // BLOCK_KV] * BLOCK_KV + position % BLOCK_KV
    sm120_ops.mqa_cache_write(keys.flatten(0, 1), slots.flatten(), cache, fmt)

    # Query i of a sequence sees the tokens up to its own.
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    q, scaled_weights = quantise_queries(queries, weights, fmt)
    logits = sm120_ops.paged_mqa_logits(
        q, cache, scaled_weights, lengths, table, pages * BLOCK_KV, clean=True
    )
    own = torch.arange(QUERIES, dtype=torch.int32, device=device) + length - QUERIES + 1
    chosen = sm120_ops.indexer_topk(logits, own.repeat(batch), TOP_K)

    products = torch.einsum("bnhd,bkd->bnhk", queries.float(), keys.float()).relu()
    exact = torch.einsum("bnhk,bnh->bnk", products, weights.view(batch, QUERIES, HEADS))
    exact = exact.flatten(0, 1)
    seen = position < own.repeat(batch)[:, None]
    got = logits[:, :length]
    difference = 1 - 2 * (got * exact)[seen].sum() / (got.square() + exact.square())[seen].sum()
    best = torch.where(seen, exact, -torch.inf).topk(TOP_K).indices
    kept = torch.mean((chosen[:, :, None] == best[:, None, :]).any(2).float()).item()
    limit, least = (2e-3, 0.85) if fmt == "mxfp8" else (2e-2, 0.6)
    print(f"{fmt} on {device}: {batch} sequences of {length} tokens, {QUERIES} queries each")
    print(f"logits against float32: calc_diff {difference:.1e} (at most {limit:.0e})")
    print(f"top {TOP_K}: {kept:.1%} of the tokens float32 chooses (at least {least:.0%})")
    print(f"query 0 attends to cache slots {slots[0, chosen[0].long()].tolist()[:8]} ...")
    if difference > limit or kept < least:
        raise SystemExit("the indexer's choice does not agree with float32")


if __name__ == "__main__":
    main()
