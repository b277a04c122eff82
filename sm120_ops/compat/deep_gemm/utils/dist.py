"""DeepGEMM's `utils.dist`: the few helpers of its multi-process tests."""

from __future__ import annotations

import os

import torch
from torch import distributed

_local_rank: int | None = None


def init_dist(
    local_rank: int, num_local_ranks: int
) -> tuple[int, int, distributed.ProcessGroup | None]:
    """Joins the NCCL group that MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK (of nodes) name.

    Makes cuda:local_rank the default device. Gives (rank, world size, a group of all ranks).
    """
    global _local_rank
    _local_rank = local_rank
    nodes, node = int(os.getenv("WORLD_SIZE", "1")), int(os.getenv("RANK", "0"))
    address = os.getenv("MASTER_ADDR", "127.0.0.1")
    world = nodes * num_local_ranks
    distributed.init_process_group(
        backend="nccl",
        init_method=f"tcp://{address}:{os.getenv('MASTER_PORT', '8361')}",
        world_size=world,
        rank=node * num_local_ranks + local_rank,
        device_id=torch.device("cuda", local_rank),
    )
    torch.set_default_device("cuda")
    torch.cuda.set_device(local_rank)
    group = distributed.new_group(list(range(world)))
    return distributed.get_rank(), distributed.get_world_size(), group


def uneven_all_gather(
    tensor: torch.Tensor, dim: int = 0, group: distributed.ProcessGroup | None = None
) -> torch.Tensor:
    """All ranks' tensors, which may differ in size along `dim`, one after the other."""
    world = distributed.get_world_size(group)
    own = torch.tensor([tensor.shape[dim]], device=tensor.device)
    gathered = [torch.zeros_like(own) for _ in range(world)]
    distributed.all_gather(gathered, own, group=group)
    sizes = [int(size.item()) for size in gathered]
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([p.narrow(dim, 0, n) for p, n in zip(parts, sizes, strict=True)], dim)


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Prints on every rank, or on the first of each node; then all ranks meet."""
    if _local_rank is None:
        raise RuntimeError(
            "sm120_ops.deep_gemm.utils.dist.dist_print: expected init_dist() before it, got none"
        )
    if not once_in_node or _local_rank == 0:
        print(s, flush=True)
    distributed.barrier()
