"""Timing candidates in turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds.

    With one CPU thread it counts the CPU time of this process, which other processes cannot
    disturb; on a GPU it synchronises before it reads the wall clock.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    if device.type == "cuda":

        def synchronise_and_read() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronise_and_read
    return time.perf_counter


def cool_down_seconds(device: torch.device, seconds: float) -> float:
    """The seconds to cool down before a timed run: 0 on a GPU and with one CPU thread.

    Several CPU threads keep spinning for some milliseconds after a job, which slows down the
    threads of the next candidate.
    """
    return seconds if device.type == "cpu" and torch.get_num_threads() > 1 else 0.0


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
    drop: float = float("inf"),
    warm: bool = False,
    cool_down: float = 0.0,
) -> dict[str, list[float]]:
    """Run each candidate once per round, after one warm-up run, and return its times in seconds.

    Args:
        candidates: what to run, by name.
        device: where they run.
        rounds: timed rounds; at least one is run.
        seconds: no further round starts once this much time has passed.
        drop: after the third round, a candidate whose best time is more than `drop` times the best
            of all is timed no longer.
        warm: run each candidate once untimed before each timed run, so that its weights are in the
            cache, as on a server that runs this candidate only.
        cool_down: seconds for which a candidate runs untimed before each timed run, until the
            threads of the candidate before it have fallen asleep.
    """
    now = clock(device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    running = dict(candidates)
    for candidate in candidates.values():
        candidate()
    started = time.perf_counter()
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, candidate in running.items():
                cooled = time.perf_counter() + cool_down
                while time.perf_counter() < cooled:
                    candidate()
                if warm:
                    candidate()
                start = now()
                candidate()
                times[name].append(now() - start)
            if turn == 2:
                limit = drop * min(map(min, times.values()))
                running = {name: run for name, run in running.items() if min(times[name]) <= limit}
            if time.perf_counter() - started > seconds:
                break
    finally:
        if was_collecting:
            gc.enable()
    return times


def pick_fastest(times: Mapping[str, list[float]]) -> str:
    """The name with the smallest median time."""
    return min(times, key=lambda name: statistics.median(times[name]))
