"""What engines run where they have no MQA kernel: torch, and Triton of the kind they carry."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sm120_ops.bench.record import Line

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context
    from sm120_ops.bench.mqa import Paged, Ragged

ROWS_AT_ONCE = 64  # of the torch path: its products are [rows, H, keys]


def _torch_rows(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """BF16 values: q [R, H, D], keys [n, D], weights [R, H] -> [R, n]."""
    products = torch.relu(torch.matmul(q.flatten(0, 1), keys.t())).unflatten(0, q.shape[:2])
    return torch.einsum("rhn,rh->rn", products.float(), weights)


def torch_ragged(inputs: Ragged, out: torch.Tensor) -> None:
    q, _, k, k_scale, weights, starts, ends = inputs.args
    keys = k.bfloat16()
    columns = torch.arange(len(k), device=k.device)
    for i in range(0, len(q), ROWS_AT_ONCE):
        some = slice(i, i + ROWS_AT_ONCE)
        logits = _torch_rows(q[some].bfloat16(), keys, weights[some]) * k_scale
        inside = (columns >= starts[some, None]) & (columns < ends[some, None])
        out[some] = torch.where(inside, logits, -torch.inf)


def torch_paged(inputs: Paged, out: torch.Tensor) -> None:
    q, _, cache, weights, lengths, table = inputs.args
    next_n, dim = q.shape[1], q.shape[3]
    block_kv = cache.shape[1]
    for b, length in enumerate(lengths.tolist()):
        pages = cache.flatten(1)[table[b, : -(-length // block_kv)].long()]
        data = pages[:, : block_kv * dim].reshape(-1, dim)[:length].view(torch.float8_e4m3fn)
        scale = pages[:, block_kv * dim :].contiguous().view(torch.float32).flatten()[:length]
        some = slice(b * next_n, (b + 1) * next_n)
        out[some, :length] = _torch_rows(q[b].bfloat16(), data.bfloat16(), weights[some]) * scale


def of_ragged(
    context: Context, name: str, inputs: Ragged, common: dict[str, Any]
) -> Iterator[Line]:
    try:
        from sm120_ops.bench import mqa_triton
    except ImportError:  # triton is an optional peer
        pass
    else:
        call = functools.partial(mqa_triton.ragged, *inputs.args, inputs.out)
        yield context.time_peer(call, name=name, provider="triton", **common)
    call = functools.partial(torch_ragged, inputs, inputs.out)
    yield context.time_peer(call, name=name, provider="torch", **common)


def of_paged(context: Context, name: str, inputs: Paged, common: dict[str, Any]) -> Iterator[Line]:
    try:
        from sm120_ops.bench import mqa_triton
    except ImportError:
        pass
    else:
        call = functools.partial(mqa_triton.paged, *inputs.args, inputs.out)
        yield context.time_peer(call, name=name, provider="triton", **common)
    if len(inputs.args[4]) <= 8:  # a loop over sequences on the host
        call = functools.partial(torch_paged, inputs, inputs.out)
        yield context.time_peer(call, name=name, provider="torch", **common)
