"""Expert parallelism: the experts of a layer spread over the ranks of a torch.distributed group.

Rank r holds experts r * E / R .. (r + 1) * E / R - 1. Every (token, slot) travels as one row of x
to the rank of its expert, is run there as a token with a single slot of weight 1, and comes back as
one row; the rank it came from weights and sums the rows of its own tokens, in the order of their
slots. So the order of sums is that of one process holding all experts: the result is the same bit
for bit, unless a GEMM of another number of rows takes another tile and so rounds its float32 sums
differently.

How much travels where depends on the routing, and a rank does not know what the others send it:

    capacity=None   the counts are exchanged first and read by the host (ONE host sync a call),
                    then exactly the rows that are needed travel
    capacity=n      every pair of ranks always exchanges n rows: no sync, and the call can be
                    captured in a CUDA graph. Slots past the n-th from one rank to another are
                    dropped; n = tokens * topk drops none
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from .. import _check
from ..ops.moe import moe_combine
from .experts import MXExperts


class ExpertParallel(nn.Module):
    """MXExperts over all ranks of a group; `experts` are those of this rank.

    forward() takes this rank's own tokens, with ids among all experts, and gives their y. Ranks may
    have different numbers of tokens, also none, but all must call it, in the same order. topk must
    be the same on all, x of the same dtype, and with a capacity that as well. So is the making of
    one a collective call.
    """

    def __init__(
        self,
        experts: MXExperts,
        group: dist.ProcessGroup | None = None,
        capacity: int | None = None,
    ) -> None:
        """
        Args:
            experts: this rank's E / R experts: rank r's share of the layer, in order.
            group: default the world.
            capacity: rows from each rank to each other; None exchanges counts instead.
        """
        super().__init__()
        op = "nn.ExpertParallel"
        if not dist.is_initialized():
            _check.fail(op, "group", "an initialised process group", "none")
        _check.require(capacity is None or capacity > 0, op, "capacity", "None or > 0", capacity)
        self.experts = experts
        self.group = group
        self.capacity = capacity
        self.ranks = dist.get_world_size(group)
        self.num_experts = experts.num_experts * self.ranks
        shape = torch.tensor([experts.num_experts, experts.hidden], device=experts.down.device)
        extremes = torch.cat((shape, -shape))
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
        if not torch.equal(extremes, torch.cat((shape, -shape))):
            requirement = f"{shape.tolist()} experts and hidden size on all ranks, as here"
            _check.fail(op, "experts", requirement, "others elsewhere")

    def forward(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """y, of x's shape and dtype. Arguments as in MXExperts.forward()."""
        op = "nn.ExpertParallel"
        _check.require_tensor(op, "x", x)
        hidden = self.experts.hidden
        if x.dim() == 0 or x.shape[-1] != hidden:
            _check.fail(op, "x", f"shape [..., {hidden}]", x.shape)
        for arg, slots in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            _check.require_tensor(op, arg, slots)
            if slots.shape[:-1] != x.shape[:-1] or slots.shape[-1:] != topk_ids.shape[-1:]:
                _check.fail(op, arg, f"shape {[*x.shape[:-1], 'topk']}", slots.shape)
        _check.require_no_grad(op, x=x, topk_weights=topk_weights)
        tokens, topk = x.reshape(-1, hidden), topk_ids.shape[-1]
        ids = topk_ids.reshape(-1).long()
        rank_of_slot = ids.div(self.experts.num_experts, rounding_mode="floor")
        dropped = (ids < 0) | (ids >= self.num_experts)
        rank_of_slot = torch.where(dropped, self.ranks, rank_of_slot)
        counts = torch.zeros(self.ranks + 1, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, rank_of_slot, torch.ones_like(rank_of_slot))
        order = rank_of_slot.argsort(stable=True)  # by rank, then by token and slot
        place = torch.empty_like(order)  # of a slot in that order
        place[order] = torch.arange(len(order), device=x.device)
        within = place - (counts.cumsum(0) - counts)[rank_of_slot]
        local = ids - rank_of_slot * self.experts.num_experts

        send: Sequence[int]
        receive: Sequence[int]
        if self.capacity is None:
            arriving = torch.empty_like(counts[: self.ranks])
            dist.all_to_all_single(arriving, counts[: self.ranks].contiguous(), group=self.group)
            send = counts[: self.ranks].tolist()  # the host sync
            receive = arriving.tolist()
            row = torch.where(dropped, -1, place)
        else:
            send = receive = [self.capacity] * self.ranks
            dropped |= within >= self.capacity
            row = torch.where(dropped, -1, rank_of_slot * self.capacity + within)

        # One row more than is sent takes what the dropped slots scatter.
        row_or_last = torch.where(dropped, sum(send), row)
        token = torch.arange(len(ids), device=x.device).div(topk, rounding_mode="floor")
        x_out = x.new_zeros(sum(send) + 1, hidden).index_copy_(0, row_or_last, tokens[token])
        ids_out = torch.full((sum(send) + 1,), -1, dtype=torch.int64, device=x.device)
        ids_out.index_copy_(0, row_or_last, local)
        x_in = self._exchange(x_out[:-1], send, receive)
        ids_in = self._exchange(ids_out[:-1], send, receive)[:, None]
        ones = torch.ones(ids_in.shape, device=x.device)
        # A bias is added in float32: its sum with a row must not be rounded before it is weighted.
        wide = self.experts.down_bias is not None or x.dtype != torch.bfloat16
        dtype = torch.float32 if wide else torch.bfloat16
        y_in = self._exchange(self.experts(x_in, ids_in, ones, out_dtype=dtype), receive, send)
        y = moe_combine(
            y_in,
            row.int().reshape(-1, topk),
            topk_weights.reshape(-1, topk).contiguous(),
            out_dtype=x.dtype,
        )
        return y.reshape(x.shape)

    def _exchange(
        self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        arrived = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(arrived, rows.contiguous(), list(receive), list(send), self.group)
        return arrived
