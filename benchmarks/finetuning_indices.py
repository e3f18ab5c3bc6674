"""What learning the indices adds where nothing else is in the way, and what an anchor does.

    python -m benchmarks.finetuning_indices

Claim: without an anchor the estimator does harm, even from the right indices; with one it repairs
most wrong indices and leaves right ones alone. The target is one trained layer's filters; all of
the unit is fitted by plain gradient descent for 200 steps, from the indices of clustering, of which
0 or 30 % of the slots were redrawn at random. Prints the relative weight error. Takes about a
minute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import make_parser
from benchmarks.common.tables import format_head, format_row
from benchmarks.common.tasks import create_shipped
from benchmarks.common.units import FOUR, SIXTEEN, format_unit
from legocompress.finetune.optimize import add_anchor_

ANCHORS = (None, 0.0, 0.3, 1.0, 3.0)  # None: indices are frozen


def fit_layer(
    target: Tensor, spec: lego.LegoSpec, wrong: float, anchor: float | None, n_steps: int
) -> float:
    """Fit a Lego layer to a weight by gradient descent; the relative error at the end.

    Args:
        target: the weight (64, 64, 3, 3).
        spec: the unit.
        wrong: share of the slots that start from random indices.
        anchor: strength of the anchor of trained indices; None freezes the indices.
        n_steps: of gradient descent.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, bias=False)
    conv.weight = nn.Parameter(target.clone())
    model = lego.convert_(conv, lego.plan(conv, spec))
    (_, module), *_ = lego.lego_modules(model)
    o, n, k = module.index.shape
    drawn = torch.rand(o, n, module.lego_shape.n_lego).argsort(2)[:, :, :k]
    chosen = torch.rand(o, n) < wrong
    module.index[chosen] = drawn[chosen]
    if anchor is not None:
        lego.train_indices_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / n_steps)
        optimizer.zero_grad()
        torch.autograd.backward(0.5 * (module.weight - target).square().sum())
        add_anchor_(model, anchor or 0.0)
        optimizer.step()
    lego.freeze_indices_(model)
    return float((module.weight.detach() - target).norm() / target.norm())


def main() -> None:
    """Fit every unit from right and from wrong indices and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="of gradient descent")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weight = create_shipped().get_submodule("layer3.0.conv2").weight
    assert isinstance(weight, Tensor)
    columns = ["unit", "wrong slots", "frozen", "N free", "anchor 0.3", "anchor 1", "anchor 3"]
    print(format_head(columns))
    for unit in ({**FOUR, "k": 1}, {**SIXTEEN, "k": 4}):
        for wrong in (0.0, 0.3):
            spec = lego.LegoSpec(**unit, only=("",))
            errors = [fit_layer(weight.detach(), spec, wrong, a, args.steps) for a in ANCHORS]
            cells = [format_unit(unit), f"{wrong:.0%}", *(f"{error:.3f}" for error in errors)]
            print(format_row(cells), flush=True)


if __name__ == "__main__":
    main()
