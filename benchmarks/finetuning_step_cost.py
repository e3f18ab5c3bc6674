"""What a training step of a Lego network costs over a step of the dense one.

    python -m benchmarks.finetuning_step_cost --steps 8

Claim: training costs little more than dense training, with frozen and with trained indices. Times
steps of the shipped network in turns in one process. Prints median and quartiles of Lego / dense
per unit. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import nn

import legocompress as lego
from benchmarks.common.arguments import make_parser
from benchmarks.common.tables import format_head, format_row
from benchmarks.common.tasks import create_shipped
from benchmarks.common.units import FOUR, SIXTEEN, format_unit
from legocompress.finetune.optimize import add_anchor_

UNITS = ({**FOUR, "k": 1}, {**SIXTEEN, "k": 1}, {**SIXTEEN, "k": 4})
ANCHOR = 0.1


def make_networks(unit: dict[str, Any]) -> dict[str, nn.Module]:
    """The dense network, and the converted one with frozen and with trained indices."""
    shipped = create_shipped()
    frozen = lego.convert_(create_shipped(), lego.plan(shipped, lego.LegoSpec(**unit)))
    trained = lego.train_indices_(copy.deepcopy(frozen))
    return {"dense": create_shipped(), "frozen": frozen, "trained": trained}


def time_steps(networks: dict[str, nn.Module], n_steps: int, batch: int) -> dict[str, list[float]]:
    """Seconds of each step of each network, in turns; one more step warms up."""
    x = torch.randn(batch, 1, 56, 56)
    optimizers = {
        form: torch.optim.SGD(network.train().parameters(), 1e-4, momentum=0.9)
        for form, network in networks.items()
    }
    times: dict[str, list[float]] = {form: [] for form in networks}
    for _ in range(n_steps + 1):
        for form, network in networks.items():
            started = time.perf_counter()
            optimizers[form].zero_grad()
            torch.autograd.backward(network(x).square().mean())
            if form == "trained":
                add_anchor_(network, ANCHOR)
            optimizers[form].step()
            times[form].append(time.perf_counter() - started)
    return {form: seconds[1:] for form, seconds in times.items()}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each form")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: quartiles need two values")
    return args


def main() -> None:
    """Time the steps of every unit and print the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(format_head(["unit", "indices", "step over the dense step, median", "quartiles"]))
    for unit in UNITS:
        times = time_steps(make_networks(unit), args.steps, args.batch)
        for form in ("frozen", "trained"):
            pairs = zip(times[form], times["dense"], strict=True)
            low, middle, high = statistics.quantiles([ours / dense for ours, dense in pairs], n=4)
            cells = [format_unit(unit), form, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
            print(format_row(cells), flush=True)
    print(f"\n{args.steps} steps of {args.batch} images, {args.threads} thread(s), fp32, CPU")


if __name__ == "__main__":
    main()
