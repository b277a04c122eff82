"""``python -m sm120_ops info | demo | bench | selftest``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from sm120_ops._console import UsageError, make_console


def make_parser() -> argparse.ArgumentParser:
    from sm120_ops.bench import FAMILIES

    parser = argparse.ArgumentParser(
        prog="python -m sm120_ops",
        description="Block-scaled MXFP8 and MXFP4 kernels for SM120 and SM121 GPUs.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what this machine is, and which target will run")
    info.add_argument("--json", action="store_true", help="as JSON, for bug reports")

    demo = commands.add_parser("demo", help="a real sentence-embedding model in MXFP8 and MXFP4")
    demo.add_argument(
        "--model", type=Path, metavar="DIR", help="local copy of all-MiniLM-L6-v2 (FP32 or BF16)"
    )
    demo.add_argument(
        "--ops", action="store_true", help="each op on data of the model, or random data"
    )
    demo.add_argument(
        "--moe", action="store_true", help="the model's feed-forward layers as mixtures of experts"
    )
    demo.add_argument("--device", help="cpu or cuda[:N]; default: the GPU if the kernels run on it")
    demo.add_argument(
        "--export-bf16", type=Path, metavar="DIR", help="write a BF16 copy of the model and stop"
    )

    bench = commands.add_parser("bench", help="times and rates against ceilings and peers")
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer shapes and runs")
    size.add_argument("--full", action="store_true", help="the layers of whole models, every M")
    bench.add_argument(
        "--families",
        nargs="+",
        metavar="NAME",
        help=f"some of {', '.join(FAMILIES)}; default: all",
    )
    bench.add_argument("--no-peers", action="store_true", help="leave out torch and Triton")
    bench.add_argument(
        "--flush",
        choices=("write", "read"),
        default="read",
        help="how L2 is emptied before each run: by writing a buffer, or by reading it again after "
        "that, so that no dirty lines are left (default: read)",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="write a roofline plot")

    selftest = commands.add_parser("selftest", help="check every op here, then run the benchmark")
    selftest.add_argument(
        "--report", type=Path, metavar="FILE", help="default: sm120_ops-selftest-GPU-DATE.json"
    )
    selftest.add_argument("--quick", action="store_true", help="fewer cases")
    selftest.add_argument("--no-bench", action="store_true", help="leave out the benchmark")
    return parser


def run_info(as_json: bool) -> int:
    from sm120_ops.device import describe

    environment = describe()
    if as_json:
        print(json.dumps(environment.to_json(), indent=1))
        return 0
    from rich.table import Table

    def amount(value: int | None, unit: int, name: str) -> str:
        return "-" if value is None else f"{value / unit:,.0f} {name}"

    capability = environment.capability
    watts, clock = environment.power_limit_w, environment.max_sm_clock_mhz
    rows = {
        "sm120_ops": environment.package,
        **{f"  built with {name}": str(value) for name, value in environment.build.items()},
        "kernel library": "loaded" if environment.kernels_loaded else "not loaded",
        "Python": f"{environment.python} on {environment.platform}",
        "torch": f"{environment.torch} (CUDA {environment.torch_cuda or 'none'})",
        "driver": environment.driver or "-",
        "GPU": f"{environment.gpu or 'none'} ({environment.gpu_count} visible)",
        "compute capability": "-" if capability is None else f"{capability[0]}.{capability[1]}",
        "SMs": str(environment.sms or "-"),
        "shared memory a block": amount(environment.shared_memory_per_block, 1, "bytes"),
        "L2": amount(environment.l2_bytes, 1 << 20, "MiB"),
        "memory": amount(environment.memory_bytes, 1 << 30, "GiB"),
        "power limit": "-" if watts is None else f"{watts:.0f} W",
        "highest SM clock": "-" if clock is None else f"{clock} MHz",
        "target": environment.target,
        "why": environment.reason,
    }
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    for problem in environment.problems:
        table.add_row("problem", f"found {problem.found}", style="red")
        table.add_row("  needed", problem.needed)
        table.add_row("  run", problem.run)
    make_console().print(table)
    return 0


def dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "info":
        return run_info(arguments.json)
    if arguments.command == "demo":
        from sm120_ops.demo import run_demo

        return run_demo(
            arguments.model,
            ops=arguments.ops,
            moe=arguments.moe,
            export=arguments.export_bf16,
            device_name=arguments.device,
        )
    if arguments.command == "bench":
        from sm120_ops.bench import run_bench

        return run_bench(
            arguments.families,
            mode="quick" if arguments.quick else "full" if arguments.full else "standard",
            with_peers=not arguments.no_peers,
            flush=arguments.flush,
            json_path=arguments.json,
            plot_path=arguments.plot,
        )
    from sm120_ops.selftest import run_selftest

    return run_selftest(arguments.report, quick=arguments.quick, with_bench=not arguments.no_bench)


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a check failed; 2: wrong use, or this machine lacks what the command needs."""
    arguments = make_parser().parse_args(argv)
    try:
        return dispatch(arguments)
    except UsageError as error:
        print(f"sm120_ops: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` closed the pipe: nothing is left to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
