"""Random MQA problems with poison wherever nothing may be read, and their float64 logits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import E2M1, E4M3, FP8, UE8M0, calc_diff, ceil_div

POISON = 77.0  # what outputs hold before an op runs


def random_data(
    rows: int, dim: int, fmt: str, generator: torch.Generator, scales: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw bytes [rows, W], scales [rows] (float32 or packed words; FP8 queries have none and ignore
    them), and float64 values without the float32 scale."""
    device = generator.device
    if fmt == FP8:
        raw = torch.randint(256, (rows, dim), generator=generator, device=device).to(torch.uint8)
        raw = torch.where(raw & 0x7F == 0x7F, raw - 1, raw)
        scale = torch.rand(rows, generator=generator, device=device) + 0.1
        return raw, scale, E4M3.to(device)[raw.long()]
    codes = torch.randint(16, (rows, dim), generator=generator, device=device)
    raw = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    # Bytes past D / 32 mean nothing and may hold anything, NaN's code included.
    bytes_of = torch.randint(*scales, (rows, 4), generator=generator, device=device)
    bytes_of[:, dim // 32 :] = 0xFF
    factors = UE8M0.to(device)[bytes_of].repeat_interleave(32, 1)[:, :dim]
    word = bytes_of.to(torch.uint8).view(torch.int32).reshape(rows)
    return raw, word, E2M1.to(device)[codes] * factors


def exact_logits(
    q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """q [R, H, D], keys [n, D], weights [R, H] -> [R, n], in float64."""
    rows = []
    for values, weight in zip(q.split(64), weights.double().split(64), strict=True):
        products = torch.relu(torch.einsum("rhd,nd->rhn", values, keys))
        rows.append(torch.einsum("rhn,rh->rn", products, weight))
    logits = torch.cat(rows) if rows else q.new_zeros(0, len(keys))
    return logits if scale is None else logits * scale.double()


def assert_logits(
    got: torch.Tensor, exact: torch.Tensor, seen: torch.Tensor, outside: float | None
) -> None:
    """`seen` columns against `exact` (-inf there is exact too), the others equal to `outside`."""
    assert got.shape == exact.shape
    if outside is not None:
        wrong = (got != outside) & ~seen
        assert not wrong.any(), f"written outside the window: {wrong.nonzero()[0].tolist()}"
    masked = seen & exact.isinf()
    assert (got[masked] == -torch.inf).all()
    seen = seen & ~masked
    assert got[seen].isfinite().all(), f"{(~got.isfinite() & seen).nonzero()[:3].tolist()}"
    if not seen.any():
        return
    if not exact[seen].any():  # no head's product is positive
        assert not got[seen].any()
        return
    diff = calc_diff(got[seen], exact[seen])
    assert diff < 5e-6, f"calc_diff {diff}"
    scale = exact[seen].abs().amax()
    tolerance = 1e-5 if got.dtype == torch.float32 else 2.0**-8
    worst = (got[seen].double() - exact[seen]).abs().amax()
    assert worst <= tolerance * scale, f"off by {worst} of {scale}"


def padded_rows(x: torch.Tensor, margin: int, poison: float | int) -> torch.Tensor:
    """The same values with `margin` poisoned columns behind each row."""
    buffer = torch.full((x.shape[0], x.shape[1] + margin), poison, dtype=x.dtype, device=x.device)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


@dataclass
class Ragged:
    args: tuple[Any, ...]  # q, q_scale, k, k_scale, weights, starts, ends
    exact: torch.Tensor  # [S, SKV]
    starts: torch.Tensor  # cut
    ends: torch.Tensor

    def seen(self) -> torch.Tensor:
        columns = torch.arange(self.exact.shape[1], device=self.exact.device)
        return (columns >= self.starts[:, None]) & (columns < self.ends[:, None])

    def compressed(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the compressed form, and which columns are seen."""
        columns = torch.arange(width, device=self.exact.device)
        seen = columns < (self.ends - self.starts)[:, None]
        at = (self.starts[:, None] + columns).clamp(max=max(self.exact.shape[1] - 1, 0))
        if self.exact.shape[1] == 0:
            return self.exact.new_zeros(len(self.starts), width), seen
        return self.exact.gather(1, at), seen


def draw_windows(rng: random.Random, rows: int, keys: int) -> tuple[list[int], list[int]]:
    kind = rng.choice(("causal", "random", "packed", "wild", "full"))
    starts, ends = [], []
    for i in range(rows):
        if kind == "causal":
            start, end = 0, keys - rows + i + 1
        elif kind == "full":
            start, end = 0, keys
        elif kind == "packed":  # queries of short sequences, one after the other
            start = i // 5 * 40 % max(keys, 1)
            end = min(start + 30 + i % 5, keys)
        else:
            start, end = rng.randint(0, keys), rng.randint(0, keys)
        if kind == "wild":
            start, end = (
                rng.choice([start, -9, 1 << 30]),
                rng.choice([end, -(1 << 31), (1 << 31) - 1]),
            )
        starts.append(start)
        ends.append(end)
    return starts, ends


def make_ragged(
    seed: int,
    device: torch.device,
    rows: int,
    heads: int,
    dim: int,
    keys: int,
    fmt: str,
    *,
    scales: tuple[int, int] = (120, 134),
    k_scales: tuple[int, int] | None = None,
    padding: int = 0,
    windows: tuple[list[int], list[int]] | None = None,
) -> Ragged:
    rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    q_raw, q_scale, q = random_data(rows * heads, dim, fmt, generator, scales)
    k_raw, k_scale, k = random_data(keys, dim, fmt, generator, k_scales or scales)
    weights = torch.randn(rows, heads, generator=generator, device=device)
    lists = draw_windows(rng, rows, keys) if windows is None else windows
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in lists)
    low = starts.long().clamp(min=0)
    high = ends.long().clamp(max=keys)
    # Keys that no row sees are poisoned.
    columns = torch.arange(keys, device=device)
    used = ((columns >= low[:, None]) & (columns < high[:, None])).any(0)
    k_raw[~used] = 0x7F
    k_scale[~used] = torch.nan if fmt == FP8 else -1
    exact = exact_logits(
        q.unflatten(0, (rows, heads)), torch.where(used[:, None], k, 0), weights,
        torch.where(used, k_scale, 0) if fmt == FP8 else None,
    )  # fmt: skip
    k_data = padded_rows(k_raw, padding, 0x7F)
    q_data = q_raw.view(rows, heads, q_raw.shape[1])
    if fmt == FP8:
        q_data, k_data = q_data.view(torch.float8_e4m3fn), k_data.view(torch.float8_e4m3fn)
    args = (
        q_data,
        None if fmt == FP8 else q_scale.view(rows, heads),
        k_data,
        k_scale,
        padded_rows(weights, padding and 3, torch.nan),
        starts,
        ends,
    )
    return Ragged(args, exact, low.clamp(max=keys), torch.maximum(high, low.clamp(max=keys)))


@dataclass
class Paged:
    q: torch.Tensor
    q_scale: torch.Tensor | None
    kv_cache: torch.Tensor
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    exact: torch.Tensor  # [B * next_n, columns], -inf at keys of unknown blocks
    lengths: torch.Tensor  # of each row, cut
    indices: torch.Tensor | None = None
    others: list[Any] = field(default_factory=list)

    @property
    def args(self) -> tuple[Any, ...]:
        return (
            self.q, self.q_scale, self.kv_cache, self.weights, self.context_lens, self.block_table
        )  # fmt: skip

    def seen(self) -> torch.Tensor:
        columns = torch.arange(self.exact.shape[1], device=self.exact.device)
        return columns < self.lengths[:, None]


def make_paged(
    seed: int,
    device: torch.device,
    lengths: list[list[int]],  # of each row, [B][next_n]
    heads: int,
    dim: int,
    block_kv: int,
    fmt: str,
    columns: int,
    *,
    one_length: bool = False,  # context_lens [B]; the rows' lengths follow from the last
    scales: tuple[int, int] = (120, 134),
    page_padding: int = 0,
    unknown: float = 0.0,  # share of table entries that name no block
    indices: list[int] | None = None,
) -> Paged:
    rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    batch, next_n = len(lengths), len(lengths[0]) if lengths else 1
    if one_length:
        lengths = [[row[-1] - (next_n - 1 - i) for i in range(next_n)] for row in lengths]
    longest = [max(0, *(min(n, columns) for n in row)) for row in lengths]
    # Sequences of varlen rows: the rows of one index have one table.
    leaders = list(range(batch))
    if indices is not None:
        for i in range(1, batch):
            if indices[i] == indices[i - 1]:
                leaders[i] = leaders[i - 1]
        for i in range(batch):
            longest[leaders[i]] = max(longest[leaders[i]], longest[i])
    need = [ceil_div(n, block_kv) if leaders[b] == b else 0 for b, n in enumerate(longest)]
    blocks = sum(need) + 3
    width = dim if fmt == FP8 else dim // 2
    page = block_kv * (width + 4)
    buffer = torch.full((blocks, page + page_padding), 0xFF, dtype=torch.uint8, device=device)
    cache = buffer[:, :page].view(blocks, block_kv, 1, width + 4)
    order = list(range(blocks))
    rng.shuffle(order)
    table_width = max([*need, 1]) + rng.randint(0, 2)
    garbage = [-1, -7, blocks, blocks + 5, (1 << 31) - 1, -(1 << 31)]
    table = [[rng.choice(garbage) for _ in range(table_width + 2)] for _ in range(batch)]
    q_raw, q_scale, q = random_data(batch * next_n * heads, dim, fmt, generator, scales)
    weights = torch.randn(batch * next_n, heads, generator=generator, device=device)
    exact = torch.zeros(batch * next_n, columns, dtype=torch.float64, device=device)
    queries = q.unflatten(0, (batch * next_n, heads))
    keys_of: dict[int, tuple[torch.Tensor, torch.Tensor | None, list[bool]]] = {}
    used = 0
    for b in range(batch):
        leader = leaders[b]
        if leader == b:
            count = longest[b]
            raw, scale, values = random_data(count, dim, fmt, generator, scales)
            known = []
            for p in range(need[b]):
                block = order[used]
                used += 1
                rows = slice(p * block_kv, min((p + 1) * block_kv, count))
                here = rows.stop - rows.start
                buffer[block, : here * width] = raw[rows].reshape(-1)
                at = block_kv * width
                buffer[block, at : at + 4 * here] = scale[rows].view(torch.uint8)
                known.append(rng.random() >= unknown)
                if known[-1]:
                    table[b][p] = block
            keys_of[b] = (values, scale if fmt == FP8 else None, known)
        else:
            table[b] = list(table[leader])
        values, factors, known = keys_of[leader]
        some = slice(b * next_n, (b + 1) * next_n)
        part = exact_logits(queries[some], values, weights[some], factors)
        for p, is_known in enumerate(known):
            if not is_known:
                part[:, p * block_kv : (p + 1) * block_kv] = -torch.inf
        exact[some, : part.shape[1]] = part
    table_tensor = torch.tensor(table, dtype=torch.int32, device=device).reshape(
        batch, table_width + 2
    )[:, :table_width]
    flat = [n for row in lengths for n in row]
    if one_length:
        context_lens = [row[-1] for row in lengths]
        shape: tuple[int, ...] = (batch,)
    else:
        context_lens, shape = flat, (batch, next_n)
    data = q_raw.view(batch, next_n, heads, width)
    limit = min(columns, table_width * block_kv)
    return Paged(
        q=data.view(torch.float8_e4m3fn) if fmt == FP8 else data,
        q_scale=None if fmt == FP8 else q_scale.view(batch, next_n, heads),
        kv_cache=cache,
        weights=weights,
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device).reshape(shape),
        block_table=table_tensor,
        exact=exact,
        lengths=torch.tensor(flat, device=device).clamp(0, limit),
        indices=None if indices is None else torch.tensor(
            indices, dtype=torch.int32, device=device
        ),
    )  # fmt: skip
