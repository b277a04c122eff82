"""Timing of GPU work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FLUSH_BYTES = 256_000_000


def bench(
    fn: Callable[[], Any], num_warmups: int = 5, num_tests: int = 10, high_precision: bool = False
) -> float:
    """Seconds a call, by CUDA events over `num_tests` calls in a row.

    high_precision: put a long kernel first, so that the calls are queued when it ends and the
    host's launch time does not count.
    """
    torch.cuda.synchronize()
    torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()
    for _ in range(num_warmups):
        fn()
    if high_precision:
        ballast = torch.randn(8192, 8192, device="cuda")
        ballast @ ballast
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_tests):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / num_tests / 1e3


class empty_suppress(contextlib.nullcontext[None]):  # noqa: N801
    """Suppresses nothing."""


class suppress_stdout_stderr:  # noqa: N801
    """Sends the process's stdout and stderr, native code's included, to nowhere."""

    def __enter__(self) -> suppress_stdout_stderr:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        with open(os.devnull, "w") as nowhere:
            for fd, _ in self._saved:
                os.dup2(nowhere.fileno(), fd)
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in self._saved:
            os.dup2(copy, fd)
            os.close(copy)


def _profiled(
    fn: Callable[[], Any], num_tests: int, flush_l2: bool, barrier: Callable[[], Any] | None
) -> Iterator[None]:
    for _ in range(2):  # one round to warm up, one that is recorded
        for _ in range(num_tests):
            if flush_l2:
                torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()
            if barrier is not None:
                barrier()
            fn()
        torch.cuda.synchronize()
        yield


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], Any] | None = None,
) -> Any:
    """Seconds a kernel whose name contains each of `kernel_names`, by torch's profiler.

    One number for one name, a tuple for a tuple; 0 where no kernel has the name. With
    DG_USE_NVIDIA_TOOLS=1, under which profilers would collide, 1 and nothing is run.

    Args:
        num_tests: calls that are recorded.
        suppress_kineto_output: keep the profiler's own output off the terminal.
        trace_path: a Chrome trace to write.
        flush_l2: write 256 MB before each call.
        with_multiple_kernels: allow several kernels to contain one name; their mean is given.
        barrier: called before each call, to line up the ranks of a distributed test.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    if int(os.environ.get("DG_USE_NVIDIA_TOOLS", "0")):
        return 1 if isinstance(kernel_names, str) else (1,) * len(names)
    fn()
    quiet = suppress_stdout_stderr() if suppress_kineto_output else empty_suppress()
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with quiet, torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        for _ in _profiled(fn, num_tests, flush_l2, barrier):
            profiler.step()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    seconds = []
    for name in names:
        found = [event for event in profiler.key_averages() if name in event.key]
        if len(found) > 1 and not with_multiple_kernels:
            raise RuntimeError(
                f"sm120_ops.deep_gemm.testing.bench_kineto: kernel_names: expected one kernel with "
                f"{name!r} in its name, got {[event.key for event in found]}"
            )
        calls = sum(event.count for event in found)
        total = sum(event.self_device_time_total for event in found)
        seconds.append(total / calls / 1e6 if calls else 0.0)
    return seconds[0] if isinstance(kernel_names, str) else tuple(seconds)
