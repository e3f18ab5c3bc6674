"""Interleaved timing: what is compared runs in turns, so that a slow moment hits all of it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds; on one CPU thread those of this process, which other processes cannot spoil."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.perf_counter


def settling(device: torch.device, seconds: float) -> float:
    """The seconds, where what is timed has threads of its own; 0 where it has none."""
    return seconds if device.type == "cpu" and torch.get_num_threads() > 1 else 0.0


def interleaved(
    forms: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
    drop: float = float("inf"),
    warm: bool = False,
    settle: float = 0.0,
) -> dict[str, list[float]]:
    """Run each form once a round, after a warm-up, and return its times in seconds.

    Args:
        forms: what to run, by name.
        device: where they run.
        rounds: timed rounds; at least one is run.
        seconds: no further round starts once this much time has gone.
        drop: a form whose first three runs took more than `drop` times the fastest runs no more.
        warm: run each form once untimed before each timed run, as a server that runs one form does.
        settle: seconds that each form runs untimed before each timed run, until the threads of the
            form before have fallen asleep and its own have found their cores.
    """
    now = clock(device)
    taken: dict[str, list[float]] = {name: [] for name in forms}
    running = dict(forms)
    for form in forms.values():
        form()
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, form in running.items():
                settled = time.perf_counter() + settle
                while time.perf_counter() < settled:
                    form()
                if warm:
                    form()
                start = now()
                form()
                taken[name].append(now() - start)
            if turn == 2:
                limit = drop * min(map(min, taken.values()))
                running = {n: form for n, form in running.items() if min(taken[n]) <= limit}
            if time.perf_counter() - started > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return taken


def fastest(taken: Mapping[str, list[float]]) -> str:
    """The form of the smallest median."""
    return min(taken, key=lambda name: statistics.median(taken[name]))
