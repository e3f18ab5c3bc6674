"""Forms run in turns."""

from __future__ import annotations

from typing import Any

import torch

from legocompress.deploy.timing import fastest, interleaved


def test_timing_runs_in_turns_and_drops_what_has_lost() -> None:
    ran: list[str] = []

    def form(name: str, cost: int) -> Any:
        return lambda: ran.append(name) or torch.ones(cost).sum()

    taken = interleaved(
        {"slow": form("s", 4_000_000), "fast": form("f", 10)}, torch.device("cpu"), 5, drop=2
    )
    assert fastest(taken) == "fast"
    assert (len(taken["slow"]), len(taken["fast"])) == (3, 5)
    assert "".join(ran) == "sf" + "sfsfsf" + "ff"
    assert len(interleaved({"one": form("o", 1)}, torch.device("cpu"), 9, seconds=0)["one"]) == 1
