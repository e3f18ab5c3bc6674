"""Count multiply-accumulates with fvcore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from legocompress.lego.costs import dense_params, lego_macs
from legocompress.lego.module import lego_modules
from legocompress.models.probe import evaluating


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for fvcore's FlopCountAnalysis: the merge costs one MAC a gathered value.

    Pass to `set_op_handle(**fvcore_handles())`. The transform is a plain conv, which fvcore counts.
    """

    def gathered(inputs: list[Any], outputs: list[Any]) -> int:
        sizes = outputs[0].type().sizes()
        if sizes is None or len(sizes) != 4:  # a gather of Lego filters, not of maps
            return 0
        return int(torch.Size(sizes).numel())

    return {"aten::index_select": gathered}


def fvcore_macs(model: nn.Module, example_input: Tensor) -> int | None:
    """MACs of all convs and Linears by fvcore's own count, each Lego layer by its cheaper form.

    None where the network cannot be traced, as fvcore needs.
    """
    with evaluating(model), cheapest_routes(model):
        analysis = FlopCountAnalysis(model, example_input)
        analysis.set_op_handle(**fvcore_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        try:
            counts = analysis.by_operator()
        # Tracing runs the network's own code on values it may refuse; there is then no count.
        except Exception:
            return None
    return int(sum(counts[kind] for kind in ("conv", "linear", "addmm", "index_select")))


@contextmanager
def cheapest_routes(model: nn.Module) -> Iterator[None]:
    """Run each Lego layer by its form of fewest MACs; weights of the others are assembled once."""
    before = [(module, module.route, module.frozen_weight) for _, module in lego_modules(model)]
    for module, _, _ in before:
        shape = module.lego_shape
        if "reference" in module.routes() and lego_macs(shape, 1) < dense_params(shape):
            module.route = "reference"
        else:
            module.route = "assemble"
            module.freeze()
    try:
        yield
    finally:
        for module, route, frozen in before:
            module.route = route
            module.frozen_weight = frozen
