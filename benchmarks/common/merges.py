"""Merges that a Lego network could do without a kernel, to compare with.

All with norms folded and activations fused in the same way: the dense 1x1 conv of the paper's code,
index_select, and embedding_bag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress.deploy.graph import trace
from legocompress.deploy.site import ConvSite
from legocompress.report.rivals import Form

PAPER = "merge: dense 1x1 conv (paper's code)"


def list_merges(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Form]]:
    """The Lego network by merges of plain operators; dense layers run by oneDNN."""
    yield PAPER, build_form(model, x, build_paper_merge)
    yield "merge: index_select", build_form(model, x, "reference")
    yield "merge: embedding_bag", build_form(model, x, "table")


def build_form(model: nn.Module, x: Tensor, route: str | Callable[[ConvSite], object]) -> Form:
    """The network's deployed graph with every Lego layer on one route or by a function."""
    graph = trace("", model, (x,))
    for site in graph.convs:
        if not site.is_lego:
            site.prepare("assemble", "nchw", x)
            site.use("assemble", "nchw")
        elif isinstance(route, str):
            site.prepare(route, "nchw", x)  # type: ignore[arg-type]
            site.use(route, "nchw")  # type: ignore[arg-type]
        else:
            site.run = route(site)  # type: ignore[assignment]
    for plain in graph.plains:
        plain.route = "kernel"
    run = graph.runner.forward
    return lambda: run(x)


def build_paper_merge(site: ConvSite) -> Callable[[Tensor, Tensor | None, bool], Tensor]:
    """The merge of the paper's code: per split, the Lego filters, then a dense 1x1 conv (n, m)."""
    shape, filters, index, gains, bias = site.unit
    geometry = site.geometry
    matrices = []
    for i in range(shape.n_split):
        matrix = torch.zeros(shape.n_out, shape.n_lego)
        values = torch.ones(index[i].shape) if gains is None else gains[i]
        matrices.append(matrix.scatter_add_(1, index[i], values)[:, :, None, None])

    def run(x: Tensor, residual: Tensor | None, spare: bool) -> Tensor:
        x, padding = geometry.place(x)
        y = None
        for part, matrix in zip(torch.split(x, shape.width, 1), matrices, strict=True):
            z = F.conv2d(
                part, filters[:, : part.shape[1]], None, geometry.stride, padding, geometry.dilation
            )
            split = F.conv2d(z, matrix)
            y = split if y is None else y.add_(split)
        assert y is not None
        if bias is not None:
            y += bias[:, None, None]
        if residual is not None:
            y += residual
        return torch.relu_(y) if site.activation == "relu" else y

    return run
