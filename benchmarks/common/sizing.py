"""How layers are sized: one m, o and k for all, or chosen by layer within the same costs."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from torch import nn

import legocompress as lego

SIZINGS = ("uniform", "bytes", "macs", "both")  # by layer within these costs of the uniform form


def size_layers(
    network: nn.Module, spec: lego.LegoSpec, sizing: str, max_terms: int | None = None
) -> lego.LegoSpec:
    """The spec itself for `uniform`, else m, o and k by layer within what the spec costs.

    Args:
        network: the network to be converted; it stays as it is.
        spec: one m, o and k for all layers.
        sizing: one of `SIZINGS`.
        max_terms: the most that k may be; by default that of the spec.
    """
    if sizing == "uniform":
        return spec
    costs = lego.measure(lego.convert_(copy.deepcopy(network), lego.plan(network, spec))).totals()
    return lego.allocate(
        network,
        spec.model_copy(update={"k": max_terms or spec.k}),
        max_size=None if sizing == "macs" else costs["bits"] / costs["dense_bits"],
        max_macs=None if sizing == "bytes" else costs["macs_used_only"] / costs["dense_macs"],
    )


def add_terms_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--terms`, the `max_terms` of `size_layers`."""
    parser.add_argument(
        "--terms", type=int, help="most of k where layers are sized; by default k itself"
    )


def make_sizing_key(sizing: str, max_terms: int | None) -> dict[str, Any]:
    """The part of a row's key that names its sizing, and the most of k where that matters."""
    return {"sized": sizing} if sizing == "uniform" else {"sized": sizing, "terms": max_terms}
