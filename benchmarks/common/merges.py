"""Merges that a Lego network could do without a kernel, to compare with.

All with norms folded and activations fused in the same way: the dense 1x1 conv of the paper's code,
index_select, and embedding_bag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.fusing import fuse_graph
from legocompress.report.rivals import Form

PAPER = "merge: dense 1x1 conv (paper's code)"


def list_merges(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Form]]:
    """The Lego network by merges of plain operators; dense layers run by oneDNN."""
    yield PAPER, build_form(model, x, build_paper_merge)
    yield "merge: index_select", build_form(model, x, "reference")
    yield "merge: embedding_bag", build_form(model, x, "table")


def build_form(model: nn.Module, x: Tensor, route: str | Callable[[DeployedConv], object]) -> Form:
    """The network's deployed graph with every Lego layer on one route or by a function."""
    graph = fuse_graph("", model, (x,))
    for conv in graph.convs:
        if not conv.is_lego:
            conv.prepare("assemble", "nchw", x)
            conv.use("assemble", "nchw")
        elif isinstance(route, str):
            conv.prepare(route, "nchw", x)  # type: ignore[arg-type]
            conv.use(route, "nchw")  # type: ignore[arg-type]
        else:
            conv.run = route(conv)  # type: ignore[assignment]
    for plain in graph.plains:
        plain.route = "kernel"
    run = graph.graph_module.forward
    return lambda: run(x)


def build_paper_merge(conv: DeployedConv) -> Callable[[Tensor, Tensor | None, bool], Tensor]:
    """The merge of the paper's code: per split, the Lego filters, then a dense 1x1 conv (n, m)."""
    folded = conv.folded
    filters, index, gains = folded.unit
    shape, bias, geometry = folded.shape, folded.bias, folded.geometry
    matrices = []
    for i in range(shape.n_split):
        matrix = torch.zeros(shape.n_out, shape.n_lego)
        values = torch.ones(index[i].shape) if gains is None else gains[i]
        matrices.append(matrix.scatter_add_(1, index[i], values)[:, :, None, None])

    def run(x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        x, padding = geometry.pad_input(x)
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
        return torch.relu_(y) if folded.activation == "relu" else y

    return run
