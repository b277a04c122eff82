"""A mixture-of-experts layer spread over processes, held against the same layer in one process.

    torchrun --nproc-per-node 2 examples/expert_parallel.py [--format w4a8] [--capacity]

Runs on one GPU a process with NCCL where there are enough, else on CPUs with gloo. Every process
makes the same random weights, keeps its share of the experts, and sends tokens of its own through
the layer; each then compares its part with what all experts in one process give.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

import sm120_ops
from sm120_ops.nn import ExpertParallel, MXExperts

EXPERTS, TOPK, HIDDEN, INTERMEDIATE, TOKENS = 16, 4, 256, 128, 24


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="mxfp8", choices=("mxfp8", "w4a8", "mxfp4"))
    parser.add_argument(
        "--capacity", action="store_true", help="fixed sizes for every exchange: no host sync"
    )
    arguments = parser.parse_args()
    ranks, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    on_gpu = sm120_ops.is_supported() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()

    generator = torch.Generator().manual_seed(0)  # the same on every rank
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    gate_up, down = gate_up.to(device), down.to(device)
    generator.manual_seed(1 + rank)  # each rank has tokens of its own, and a number of its own
    tokens = TOKENS + rank
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device)
    scores = torch.randn(tokens, EXPERTS, generator=generator).softmax(1).to(device)
    weights, ids = scores.topk(TOPK, 1)

    share = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    mine = MXExperts.from_float(gate_up[share], down[share], format=arguments.format)
    layer = ExpertParallel(mine, capacity=(TOKENS + ranks) * TOPK if arguments.capacity else None)
    y = layer(x, ids, weights)

    whole = MXExperts.from_float(gate_up, down, format=arguments.format)
    expected = whole(x, ids, weights)
    error = ((y - expected).norm() / expected.norm()).item()
    same = "bit for bit" if torch.equal(y, expected) else f"to {error:.1e}"
    print(f"rank {rank} of {ranks} on {device}: {tokens} tokens, equal {same}", flush=True)
    if not error <= 1e-6:
        raise SystemExit(f"rank {rank}: relative error {error:.3g}, expected at most 1e-6")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
