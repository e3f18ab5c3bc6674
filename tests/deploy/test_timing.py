"""Candidates are timed in turns."""

from __future__ import annotations

from typing import Any

import torch

from legocompress.deploy.timing import pick_fastest, time_interleaved


def test_timing_runs_in_turns_and_drops_slow_candidates() -> None:
    ran: list[str] = []

    def candidate(name: str, cost: int) -> Any:
        return lambda: ran.append(name) or torch.ones(cost).sum()

    times = time_interleaved(
        {"slow": candidate("s", 4_000_000), "fast": candidate("f", 10)},
        torch.device("cpu"),
        5,
        drop=2,
    )
    assert pick_fastest(times) == "fast"
    assert (len(times["slow"]), len(times["fast"])) == (3, 5)
    assert "".join(ran) == "sf" + "sfsfsf" + "ff"
    assert (
        len(time_interleaved({"one": candidate("o", 1)}, torch.device("cpu"), 9, seconds=0)["one"])
        == 1
    )
