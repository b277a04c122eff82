"""Times of GPU work, from CUDA events, with a cold L2, as a median over runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH_MODES = ("write", "read")


class Timing(NamedTuple):
    us: float  # median
    best_us: float
    runs: int


class Timer:
    """``measure(launch)`` times one call of ``launch`` at a time, the L2 flushed before each.

    The flush writes a buffer of more than twice the L2. It also keeps the GPU busy while the host
    enqueues event, work and event, so that host time stays out of the figure. What remains in it is
    the launch itself and the distance of two events on an idle stream (``floor_us``).

    A run is enqueued when the one before it is over. With more of them behind it in the queue, the
    time of one kernel scatters, and is 0.7 us longer (H200: 3.8 instead of 3.1 us for a tiny one).

    A written buffer leaves dirty lines, whose write-back then competes with the work that is timed:
    about one L2 of extra traffic. ``flush="read"`` reads the buffer again afterwards, so that the
    L2 is cold and clean, as it is behind another layer's weights.

    Runs that take more than ``BURST_US`` come in bursts of no more, and the GPU rests before each.
    Large products draw more than its power limit: without rests the clock falls within tens of
    milliseconds, and the figures would depend on what was measured before.
    """

    BURST_US, REST_S = 10e3, 0.1
    FLUSH_WRITES = 4  # half a millisecond of an H200

    def __init__(self, device: torch.device, *, quick: bool = False, flush: str = "read"):
        if flush not in FLUSH_MODES:
            raise ValueError(f"Timer: flush: expected one of {FLUSH_MODES}, got {flush!r}")
        props = torch.cuda.get_device_properties(device)
        self.device = device
        self.flush_mode = flush
        self.max_runs, self.budget_us = (15, 0.1e6) if quick else (60, 0.5e6)
        size = max(512 << 20, 4 * getattr(props, "L2_cache_size", 0))
        size = min(size, props.total_memory // 8)
        self.flush_buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
        self.floor_us = self.measure(lambda: None).us

    def flush(self) -> None:
        for _ in range(self.FLUSH_WRITES):
            self.flush_buffer.zero_()
        if self.flush_mode == "read":
            self.flush_buffer.max()

    def _time(self, launch: Callable[[], object], runs: int) -> list[float]:
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(runs)
        ]
        for start, end in pairs:
            torch.cuda.synchronize(self.device)
            self.flush()
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]

    def measure(self, launch: Callable[[], object]) -> Timing:
        for _ in range(2):  # loads the module, fills the allocator, raises the clocks
            launch()
        estimate = max(min(self._time(launch, 3)), 1.0)
        runs = min(max(int(self.budget_us / estimate), 5), self.max_runs)
        burst = max(int(self.BURST_US / estimate), 1)
        times: list[float] = []
        while len(times) < runs:
            if runs > burst:
                time.sleep(self.REST_S)
                launch()  # the first one after a rest is slower
            times += self._time(launch, min(burst, runs - len(times)))
        return Timing(statistics.median(times), min(times), len(times))


def measure_host_us(call: Callable[[], object], device: torch.device, *, quick: bool) -> float:
    """Median host microseconds of an asynchronous ``call``.

    Batches are short enough that the launch queue (about 1,000 entries) never fills: a full queue
    would make the host wait for the GPU and measure that instead.
    """
    batch, batches = (100, 10) if quick else (200, 30)
    for _ in range(batch):
        call()
    times = []
    for _ in range(batches):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - start) / batch * 1e6)
    torch.cuda.synchronize(device)
    return statistics.median(times)
