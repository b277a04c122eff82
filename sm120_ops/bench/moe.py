"""Whole MoE layers of real models: launches, time and share of the bandwidth floor.

The floor of a layer is what it cannot help moving: tokens in and out, and the weights and scales of
the experts that are hit, at the speed of a copy. The share of it is the column of the copy.
Peers: the same steps unfused (our quantize and grouped GEMMs, the rest in torch), a loop of
torch._scaled_mm over the experts that are hit, and torch._grouped_mm in BF16. The loop gets the
routing as Python numbers, which a real one would have to fetch from the device first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from sm120_ops.bench.ceilings import atom_of
from sm120_ops.bench.gemm import calc_diff
from sm120_ops.bench.record import Line
from sm120_ops.bench.routing import ROUTINGS, expert_ids
from sm120_ops.nn import MXExperts
from sm120_ops.nn.linear import FORMATS
from sm120_ops.ops.moe import moe_capacity
from sm120_ops.ops.moe_activation import swiglu

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

ALIGNMENT = 16  # of the groups of the unfused sequence


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    experts: int
    topk: int
    intermediate: int
    format: str
    gran_k: int
    activation: str = "silu"
    limit: float | None = None
    bias: bool = False


V4_FLASH = Model("V4-Flash", 4096, 256, 6, 2048, "w4a8", 128, limit=10.0)
V3 = Model("V3", 7168, 256, 8, 2048, "mxfp8", 128)
GPT_OSS = Model("gpt-oss-120b", 2880, 128, 4, 2880, "w4a8", 32, "gpt-oss", bias=True)


@dataclasses.dataclass(frozen=True)
class Case:
    model: Model
    tokens: int
    routing: str = "uniform"


def cases(mode: str) -> Iterator[Case]:
    """Cases of one model follow each other: its weights are made once."""
    if mode == "quick":
        yield from (Case(V4_FLASH, tokens) for tokens in (1, 8, 32, 256))
        return
    many = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    for model in (V4_FLASH, V3, GPT_OSS):
        for tokens in many if mode == "full" else (1, 8, 32, 256, 4096):
            yield Case(model, tokens)
        for routing in ROUTINGS[1:]:
            for tokens in many if mode == "full" else (32,):
                yield Case(model, tokens, routing)


def make_experts(model: Model, device: torch.device) -> MXExperts:
    """Random weights, quantised one expert at a time: the float ones of a model would not fit."""
    module = MXExperts(
        model.experts,
        model.hidden,
        model.intermediate,
        model.bias,
        model.format,
        model.gran_k,
        model.activation,
        limit=model.limit,
        device=device,
        dtype=torch.bfloat16,
    )
    generator = torch.Generator(device).manual_seed(model.hidden)
    shapes = {
        "gate_up": (2 * model.intermediate, model.hidden),
        "down": (model.hidden, model.intermediate),
    }
    for name, (rows, k) in shapes.items():
        for expert in range(model.experts):
            weight = torch.randn(rows, k, device=device, generator=generator, dtype=torch.bfloat16)
            module.quantize_expert(name, expert, weight / k**0.5)
    return module


class Inputs:
    def __init__(self, case: Case, device: torch.device):
        model = case.model
        generator = torch.Generator().manual_seed(case.tokens)
        self.host_ids = expert_ids(case.routing, case.tokens, model.topk, model.experts, generator)
        self.ids = self.host_ids.to(device)
        x = torch.randn(case.tokens, model.hidden, generator=generator)
        self.x = x.to(device, torch.bfloat16)
        weights = torch.rand(case.tokens, model.topk, generator=generator)
        self.weights = (weights / weights.sum(1, keepdim=True)).to(device)

    @property
    def hit(self) -> torch.Tensor:
        """Experts that get at least one token."""
        return self.host_ids[self.host_ids >= 0].unique()


def launches_of(call: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills of one call."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def captured(call: Callable[[], object]) -> Callable[[], None]:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


# ---- Peers ---------------------------------------------------------------------------------------


def unfused(module: MXExperts, inputs: Inputs) -> torch.Tensor:
    """The layer as a sequence: our quantize and grouped GEMMs, everything else in torch."""
    ops, fmt, alignment = torch.ops.sm120, FORMATS[module.format].input, ALIGNMENT
    tokens, topk = inputs.ids.shape
    ids, experts = inputs.ids.flatten(), module.num_experts
    slots = torch.arange(len(ids), device=ids.device)
    dropped = ids < 0
    key = torch.where(dropped, experts, ids)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    starts = (counts + alignment - 1) // alignment * alignment
    starts = starts.cumsum(0) - starts
    order = key.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, slots) - (counts.cumsum(0) - counts)[key]
    rows = moe_capacity(tokens * topk, experts, alignment)
    row = torch.where(dropped, rows, starts[key] + rank)  # one more row takes the dropped ones
    ends = (starts + counts)[:-1].int()
    steps = (ends, module.gran_k, module.weight_gran_k, torch.bfloat16, alignment)

    spread = inputs.x.new_zeros(rows + 1, module.hidden)
    spread[row] = inputs.x.repeat_interleave(topk, 0)
    a, sfa = ops.quantize(spread[:rows], fmt, module.gran_k)
    gate_up = ops.grouped_gemm_psum(a, sfa, *module.weights("gate_up"), *steps)
    if module.gate_up_bias is not None:
        group = torch.searchsorted(ends, torch.arange(rows, device=ids.device), right=True)
        gate_up = gate_up + module.gate_up_bias[group.clamp(max=experts - 1)]
    hidden = swiglu(gate_up, **module.options).contiguous()
    h, sfh = ops.quantize(hidden, fmt, module.gran_k)
    down = ops.grouped_gemm_psum(h, sfh, *module.weights("down"), *steps)
    picked = down[row.clamp(max=rows - 1)].view(tokens, topk, -1).float()
    if module.down_bias is not None:
        picked = picked + module.down_bias[inputs.ids.clamp(min=0)]
    weighted = torch.where(dropped.view(tokens, topk, 1), 0, picked * inputs.weights[..., None])
    return weighted.sum(1).bfloat16()


def sorted_tokens(inputs: Inputs) -> tuple[torch.Tensor, list[int], list[int]]:
    """x in order of the experts, which experts are hit, and by how many rows."""
    flat = inputs.host_ids.flatten()
    live = (flat >= 0).nonzero().flatten()
    slots = live[flat[live].argsort(stable=True)]
    hit, counts = flat[live].unique(return_counts=True)
    tokens = (slots // inputs.host_ids.shape[1]).to(inputs.x.device)
    return inputs.x[tokens], hit.tolist(), counts.tolist()


def random_bytes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Random FP8 codes of magnitudes below 2: for the time that they take, not for their values."""
    codes = torch.randint(0, 64, shape, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn)


def scaled_mm_loop(model: Model, inputs: Inputs) -> Callable[[], object]:
    """Both products of each expert in FP8 with one scale a tensor, and SwiGLU between them."""
    device = inputs.x.device
    gate_up = random_bytes((model.experts, 2 * model.intermediate, model.hidden), device)
    down = random_bytes((model.experts, model.hidden, model.intermediate), device)
    one = torch.ones((), device=device)
    x, hit, counts = sorted_tokens(inputs)
    parts = x.to(torch.float8_e4m3fn).split(counts)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    def call() -> None:
        for expert, part in zip(hit, parts, strict=True):
            hidden = swiglu(product(part, gate_up[expert]))
            product(hidden.to(torch.float8_e4m3fn), down[expert])

    return call


def grouped_mm(model: Model, inputs: Inputs) -> Callable[[], object]:
    """torch._grouped_mm in BF16 on tokens already in order, and SwiGLU between the two."""
    device, kind = inputs.x.device, torch.bfloat16
    shape = (model.experts, 2 * model.intermediate, model.hidden)
    gate_up = torch.randn(shape, device=device, dtype=kind).transpose(1, 2)
    shape = (model.experts, model.hidden, model.intermediate)
    down = torch.randn(shape, device=device, dtype=kind).transpose(1, 2)
    x, hit, counts = sorted_tokens(inputs)
    sizes = torch.zeros(model.experts, dtype=torch.int32)
    sizes[hit] = torch.tensor(counts, dtype=torch.int32)
    ends = sizes.cumsum(0).int().to(device)

    def call() -> None:
        hidden = swiglu(torch._grouped_mm(x, gate_up, offs=ends))
        torch._grouped_mm(hidden, down, offs=ends)

    return call


# ---- Lines ---------------------------------------------------------------------------------------


def amounts(case: Case, module: MXExperts, inputs: Inputs) -> dict[str, int]:
    """FLOPs and the bytes of the floor."""
    model, hit = case.model, len(inputs.hit)
    rows = int((inputs.host_ids >= 0).sum())
    weights = [module.weights(name) for name in ("gate_up", "down")]
    data = hit * sum(w.nbytes for w, _ in weights) // model.experts
    scales = hit * sum(s.numel() * 4 for _, s in weights) // model.experts
    biases = [b for b in (module.gate_up_bias, module.down_bias) if b is not None]
    scales += hit * sum(b.nbytes for b in biases) // model.experts
    tokens = 2 * inputs.x.nbytes + inputs.ids.nbytes + inputs.weights.nbytes
    flops = 2 * rows * 3 * model.intermediate * model.hidden
    return {"flops": flops, "bytes": data + scales + tokens, "weight_bytes": data}


def lines_of(context: Context, case: Case, module: MXExperts) -> Iterator[Line]:
    model, device = case.model, context.device
    inputs = Inputs(case, device)
    formats = FORMATS[model.format]
    fields: dict[str, Any] = {
        "family": "moe",
        "shape": f"{model.name} T={case.tokens} {case.routing}",
        "atom": atom_of((formats.input, formats.weight), (module.gran_k, module.weight_gran_k)),
        **amounts(case, module, inputs),
    }
    size = module.workspace_size(case.tokens, model.topk)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)

    def layer() -> torch.Tensor:
        return module(inputs.x, inputs.ids, inputs.weights, workspace)

    def sequence() -> torch.Tensor:
        return unfused(module, inputs)

    rounds = {"sm120_ops": layer}
    if context.with_peers:
        rounds["unfused ops"] = sequence
    outputs = {provider: call() for provider, call in rounds.items()}
    for provider, call in rounds.items():
        line = context.time(call, name=model.format, provider=provider, **fields)
        line.diff = calc_diff(outputs[provider], outputs["sm120_ops"])
        if device.type == "cuda":
            line.note = f"{launches_of(call, device)} launches"
            yield line
            graph = context.time(captured(call), name=model.format, provider=provider, **fields)
            graph.note = "CUDA graph"
            line = graph
        yield line
    if context.with_peers and case.routing == "uniform":
        peers = {"_scaled_mm loop": (scaled_mm_loop, "fp8"), "_grouped_mm": (grouped_mm, "bf16")}
        fields.pop("atom")
        for provider, (make, name) in peers.items():
            if not hasattr(torch, provider.split()[0]):
                continue
            one_element = 1 if name == "fp8" else 2
            data = 3 * model.intermediate * model.hidden * one_element * len(inputs.hit)
            sizes = {"weight_bytes": data, "bytes": data + 2 * inputs.x.nbytes}
            yield context.time_peer(
                make(model, inputs), name=name, provider=f"torch.{provider}", **(fields | sizes)
            )


def run(context: Context) -> Iterator[Line]:
    model: Model | None = None
    module: MXExperts | None = None
    for case in cases(context.mode):
        if module is None or case.model != model:
            module = None  # frees the last weights before the next are made
            model, module = case.model, make_experts(case.model, context.device)
        yield from lines_of(context, case, module)
