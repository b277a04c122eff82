"""Reads the machine code of a compiled library: kernels, loops, and what the main loop executes.

    python tests/sass.py sm120_ops/_C.so [name-part] [arch]

prints one line per kernel. cuobjdump (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) does the
disassembly; this module finds basic blocks, dominators and natural loops in its text, since the
main loop of a kernel is by definition the innermost loop around its matrix instructions.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Opcode families. The native block-scaled MMAs are QMMA.SF (one operand FP8 at least) and OMMA.SF
# (both FP4); HMMA is what the emulated target and the BF16 and TF32 kernels use.
MMA = re.compile(r"^(QMMA|OMMA|HMMA|IMMA|DMMA)\b")
SHARED_LOAD = re.compile(r"^(LDSM|LDS)\b")
LOCAL_MEMORY = re.compile(r"^(LDL|STL)\b")
# fence.proxy.async gives MEMBAR.ALL.CTA + FENCE.VIEW.ASYNC, fence.acq_rel.cta MEMBAR.ALL.CTA.
FENCE = re.compile(r"^(FENCE|MEMBAR)\b")
# An arrive that releases a stage to the producer carries no transaction count (.A1T0); the
# producer's own arrive.expect_tx has a count operand and is plain SYNCS.ARRIVE.TRANS64.
RELEASE = re.compile(r"^SYNCS\.ARRIVE\b.*\.A1T0")
STOP = re.compile(r"^(EXIT|RET|KILL)\b")
JUMP = re.compile(r"^(BRA|JMP)\b")
INDIRECT = re.compile(r"^(BRX|JMX|BRXU|JMXU)\b")

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)(.*?)\s*;")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _loaded_registers(opcode: str) -> int:
    """How many registers a thread gets: LDSM.16.M88.4 4, LDS.128 4, LDS 1."""
    last = opcode.split(".")[-1]
    return {"2": 2, "4": 4, "64": 2, "128": 4}.get(last, 1)


@dataclass
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1" or ""
    opcode: str  # with its modifiers: "LDSM.16.M88.4"
    operands: str

    @property
    def target(self) -> int:
        """Address that a direct jump goes to (the last hexadecimal operand)."""
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)

    @property
    def conditional(self) -> bool:
        # BRA.U !UP0, BRA.DIV, BRA P0,: the condition may stand among the operands.
        bare = re.fullmatch(r"\s*(`\(\S+\)|0x[0-9a-f]+)\s*", self.operands)
        return bool(self.predicate) or bare is None


@dataclass
class Loop:
    """A natural loop: the instructions at and between its head and its last back edge.

    Code that the compiler moved behind the end of the kernel (the spin of an mbarrier wait that
    did not succeed at once) belongs to the loop as a graph but is left out of `body`.
    """

    head: int
    body: list[Instruction] = field(repr=False)
    blocks: frozenset[int] = field(repr=False)

    @property
    def mmas(self) -> int:
        return sum(1 for i in self.body if MMA.match(i.opcode))

    @property
    def instructions_per_mma(self) -> float:
        """NOPs count: ptxas puts them between MMAs, and each takes an issue slot."""
        return len(self.body) / max(self.mmas, 1)

    @property
    def nops_per_mma(self) -> float:
        return sum(1 for i in self.body if i.opcode == "NOP") / max(self.mmas, 1)

    @property
    def local_accesses(self) -> list[Instruction]:
        return [i for i in self.body if LOCAL_MEMORY.match(i.opcode)]

    def unfenced_releases(self) -> list[Instruction]:
        """Releases with a shared-memory load but no fence between that load and them."""
        found, fenced = [], True
        # Twice around, for a load before the back edge that is released after it.
        for instruction in self.body + self.body:
            if SHARED_LOAD.match(instruction.opcode):
                fenced = False
            elif FENCE.match(instruction.opcode):
                fenced = True
            elif RELEASE.match(instruction.opcode) and not fenced:
                found.append(instruction)
        return list({i.address: i for i in found}.values())

    def early_releases(self) -> list[Instruction]:
        """Releases that may be issued while a shared-memory load is in flight.

        A warp issues its instructions in order, and one that names a register a load writes waits
        for the load. So every load must have a fence or such an instruction behind it.
        """
        found: list[Instruction] = []
        in_flight: list[set[int]] = []  # registers of each load
        for instruction in self.body + self.body:
            named = {int(r) for r in re.findall(r"\bR(\d+)\b", instruction.operands)}
            if SHARED_LOAD.match(instruction.opcode):
                first = int(re.findall(r"\bR(\d+)\b", instruction.operands)[0])
                in_flight.append({first + i for i in range(_loaded_registers(instruction.opcode))})
                continue
            if FENCE.match(instruction.opcode):
                in_flight = []
            in_flight = [load for load in in_flight if not load & named]
            if RELEASE.match(instruction.opcode) and in_flight:
                found.append(instruction)
        return list({i.address: i for i in found}.values())

    @property
    def releases(self) -> int:
        return sum(1 for i in self.body if RELEASE.match(i.opcode))


@dataclass
class Kernel:
    name: str  # demangled
    arch: str
    registers: int
    static_shared: int  # bytes; dynamic shared memory is not in the machine code
    stack: int
    code: list[Instruction] = field(repr=False)

    @functools.cached_property
    def opcodes(self) -> set[str]:
        return {i.opcode for i in self.code}

    @functools.cached_property
    def mma_opcodes(self) -> set[str]:
        return {opcode for opcode in self.opcodes if MMA.match(opcode)}

    @functools.cached_property
    def mma_loops(self) -> list[Loop]:
        return mma_loops(self.code)


def mma_loops(code: list[Instruction]) -> list[Loop]:
    """Innermost loops that execute matrix instructions, most MMAs first."""
    loops = [loop for loop in natural_loops(code) if loop.mmas]
    inner = [a for a in loops if not any(b.blocks < a.blocks for b in loops)]
    return sorted(inner, key=lambda loop: -loop.mmas)


def natural_loops(code: list[Instruction]) -> list[Loop]:
    """Natural loops of one kernel, loops with one head merged."""
    starts = {code[0].address}
    for instruction, following in itertools.pairwise(code):
        if INDIRECT.match(instruction.opcode):
            raise ValueError(f"indirect branch at {instruction.address:#x}: targets are unknown")
        if JUMP.match(instruction.opcode):
            starts |= {instruction.target, following.address}
        elif STOP.match(instruction.opcode):
            starts.add(following.address)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            current = blocks[instruction.address] = []
        current.append(instruction)

    order = sorted(blocks)
    after: dict[int, list[int]] = {}
    for start, below in itertools.zip_longest(order, order[1:]):
        last = blocks[start][-1]
        jumps = bool(JUMP.match(last.opcode))
        after[start] = [last.target] if jumps else []
        stops = bool(STOP.match(last.opcode)) and not last.predicate
        falls_through = last.conditional if jumps else not stops
        if falls_through and below is not None:
            after[start].append(below)
    before: dict[int, set[int]] = {start: set() for start in order}
    for start in order:
        for successor in after[start]:
            before[successor].add(start)

    dominators = _dominators(order[0], after, before)
    members: dict[int, set[int]] = {}
    for start, dominated_by in dominators.items():
        for head in after[start]:
            if head in dominated_by:  # a back edge start -> head
                loop = members.setdefault(head, {head})
                pending = [start]
                while pending:
                    block = pending.pop()
                    if block not in loop:
                        loop.add(block)
                        pending.extend(before[block] & dominators.keys())
    loops = []
    for head, loop in members.items():
        last_edge = max(start for start in loop if head in after[start])
        inline = [block for block in sorted(loop) if head <= block <= last_edge]
        body = [instruction for block in inline for instruction in blocks[block]]
        loops.append(Loop(head, body, frozenset(loop)))
    return loops


def _dominators(
    entry: int, after: dict[int, list[int]], before: dict[int, set[int]]
) -> dict[int, set[int]]:
    """Blocks that every path from the entry to a block passes, for each reachable block."""
    reachable, pending = {entry}, [entry]
    while pending:
        for successor in after[pending.pop()]:
            if successor not in reachable:
                reachable.add(successor)
                pending.append(successor)
    dominators = {block: set(reachable) for block in reachable}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {entry}):
            new = set.intersection(*(dominators[b] for b in before[block] & reachable)) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def find_tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: from the PyPI wheels, PATH or CUDA_HOME."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for part in (spec.submodule_search_locations or []) if spec else []:
        folders.append(Path(part) / "cu13" / "bin")
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"]) / "bin")
    search = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which(name, path=search)


def _cuobjdump(library: Path, *arguments: str) -> str:
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump; run: pip install nvidia-cuda-cuobjdump")
    nvdisasm = find_tool("nvdisasm")  # cuobjdump calls it by name
    environment = dict(os.environ)
    if nvdisasm is not None:
        environment["PATH"] = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [tool, *arguments, str(library)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def parse(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each function in cuobjdump's text, by mangled name."""
    code: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if "Function :" in line:
            current = code[line.split("Function :")[1].strip()] = []
        elif match := _LINE.match(line):
            address, predicate, opcode, operands = match.groups()
            current.append(Instruction(int(address, 16), predicate or "", opcode, operands))
    return code


@functools.cache
def read_kernels(library: Path, arch: str) -> list[Kernel]:
    """All kernels that `library` has machine code of for `arch` ("sm_120f" or "sm_90a")."""
    resources: dict[str, tuple[int, int, int]] = {}
    name = ""
    for line in _cuobjdump(library, "-res-usage", "-arch", arch).splitlines():
        if line.startswith(" Function "):
            name = line.removeprefix(" Function ").rstrip(":").strip()
        elif name and (match := _RESOURCES.search(line)):
            registers, stack, shared, _ = map(int, match.groups())
            resources[name] = (registers, shared, stack)
            name = ""
    code = parse(_cuobjdump(library, "-sass", "-arch", arch))
    mangled = sorted(code)
    demangled = subprocess.run(
        ["c++filt"], check=True, capture_output=True, text=True, input="\n".join(mangled)
    ).stdout.splitlines()
    return [
        Kernel(plain, arch, *resources[raw], code[raw])
        for raw, plain in zip(mangled, demangled, strict=True)
    ]


def short_name(kernel: Kernel) -> str:
    """Name without namespace, return type and arguments: block_scaled_gemm<...>."""
    name = re.sub(r"^void ", "", kernel.name).replace("(anonymous namespace)::", "")
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and position > 0:
            name = name[:position]
            break
    return re.sub(r"\b(\w+::)+", "", name)


def table(kernels: list[Kernel]) -> str:
    """One line per kernel: resources, matrix instructions, main loop."""
    head = "regs,smem,stack,MMA,in loop,instr/MMA,of it NOP,LDL/STL,ordered,kernel"
    rows: list[tuple[str, ...]] = [tuple(head.split(","))]
    for kernel in kernels:
        mma = ",".join(sorted({".".join(o.split(".")[:2]) for o in kernel.mma_opcodes})) or "-"
        resources = (str(kernel.registers), str(kernel.static_shared), str(kernel.stack))
        loops = [
            (
                str(loop.mmas),
                f"{loop.instructions_per_mma:.2f}",
                f"{loop.nops_per_mma:.2f}",
                str(len(loop.local_accesses)),
                f"{loop.releases - len(loop.early_releases())}/{loop.releases}",
            )
            for loop in kernel.mma_loops
        ]
        rows += [
            (*resources, mma, *numbers, short_name(kernel)) for numbers in loops or [("-",) * 5]
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    for target in sys.argv[3:] or ["sm_120f"]:
        print(f"{path} {target}")
        print(table([k for k in read_kernels(path, target) if part in k.name]))
