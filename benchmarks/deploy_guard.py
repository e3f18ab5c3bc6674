"""What it costs a deployed network to notice at each call that it has changed.

    python -m benchmarks.deploy_guard --rounds 40

Claim: the check takes about 1 % of the time of ResNet-50 at batch 1, 2 % of the time of the
compressed network, and more of its time in int8, since it takes as long there. Times a deployed
network with the check and without it in interleaved runs, and the check alone, right after a run,
when the caches hold what they hold in use. Takes about six minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import make_parser
from benchmarks.common.tables import format_head, format_row
from legocompress.deploy.timing import clock

FORMS = ("dense", "m=0.5 o=2", "m=0.5 o=2 int8")
N_RANGES = 10  # images, of noise


class NoGuard:
    """Stands in the place of the check, and finds nothing."""

    def has_new_hooks(self) -> bool:
        """No."""
        return False

    def find_change(self) -> None:
        """None."""


def deploy_network(name: str, form: str, x: Tensor) -> nn.Module:
    """The network deployed in one of `FORMS`, with random weights."""
    model = lego.create(f"torchvision/{name}", pretrained=False).eval()
    if form != "dense":
        lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2)))
    if form.endswith("int8"):
        lego.quantize_(model, torch.randn(N_RANGES, *x.shape[1:]))
    return lego.deploy_(model, x, seconds=5)


@torch.inference_mode()
def time_guard(model: nn.Module, x: Tensor, n_rounds: int) -> dict[str, list[float]]:
    """Seconds of each run with and without the check, and of the check alone, in turns."""
    now = clock(x.device)
    forward: Any = model.__dict__["forward"]
    guards: dict[str, Any] = {"without": NoGuard(), "with": forward.guard}
    times: dict[str, list[float]] = {"without": [], "with": [], "check": []}
    for turn in range(n_rounds + 2):
        for form in ("without", "with") if turn % 2 else ("with", "without"):
            forward.guard = guards[form]
            started = now()
            model(x)
            times[form].append(now() - started)
        started = now()
        noticed = guards["with"].has_new_hooks() or guards["with"].find_change()
        times["check"].append(now() - started)
        assert not noticed
    forward.guard = guards["with"]
    return {form: seconds[2:] for form, seconds in times.items()}  # the first two warm up


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--network", default="resnet50", help="of torchvision")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=40, help="timed runs of each form")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles need two values")
    return args


def main() -> None:
    """Time the forms of the network and print the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    x = torch.randn(1, 3, 224, 224)
    columns = ("form", "run, ms", "check, ms", "check over run", "with over without, quartiles")
    print(format_head(list(columns)))
    for form in args.form:
        times = time_guard(deploy_network(args.network, form, x), x, args.rounds)
        run, check = statistics.median(times["without"]), statistics.median(times["check"])
        pairs = zip(times["with"], times["without"], strict=True)
        low, middle, high = statistics.quantiles([ours / plain for ours, plain in pairs], n=4)
        ratios = f"{middle:.4f} ({low:.4f} to {high:.4f})"
        cells = [form, f"{1e3 * run:.1f}", f"{1e3 * check:.3f}", f"{check / run:.2%}", ratios]
        print(format_row(cells), flush=True)
    print(f"\n{args.network} at 224, batch 1, {args.threads} thread(s), {args.rounds} rounds")


if __name__ == "__main__":
    main()
