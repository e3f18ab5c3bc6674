"""Low rank: truncated SVD (Zhang et al., 2016) and Tucker-2 (Kim et al., 2016; tensorly).

A ratio says which share of its parameters a layer keeps: one share for all layers or, by the rule
by which Lego layers are sized, one for each.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.rivals.shrunk import Shrink, Shrunk, get_convs
from legocompress.calibrate.moments import Moments
from legocompress.compress.forms import signal_lost
from legocompress.compress.plan_types import LayerPlan

SHARES = 32  # of a layer's parameters that are chosen from, where they are chosen by layer
PRICES = 8.0  # decades

Form = Callable[[nn.Conv2d, float], nn.Sequential]
Error = Callable[[nn.Conv2d, nn.Sequential], float]
Fits = Callable[[nn.Conv2d, nn.Sequential, Moments], list[list[Tensor]]]
Shares = Callable[[nn.Module, Sequence[str], float], dict[str, float]]


def make_chain(conv: nn.Conv2d, first: int | None, core: tuple[int, int]) -> nn.Sequential:
    """Convs c -> (first) -> n; the conv from core[0] to core[1] channels has the kernel."""
    places: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
    }
    parts = [] if first is None else [nn.Conv2d(conv.in_channels, first, 1, bias=False)]
    parts.append(nn.Conv2d(*core, conv.kernel_size, bias=False, **places))  # type: ignore[arg-type]
    parts.append(nn.Conv2d(core[1], conv.out_channels, 1, bias=conv.bias is not None))
    if conv.bias is not None:
        parts[-1].bias = copy.deepcopy(conv.bias)
    return nn.Sequential(*parts)


def list_parts(form: nn.Sequential) -> list[nn.Conv2d]:
    """The convs of a chain."""
    return [part for part in form if isinstance(part, nn.Conv2d)]


def make_svd(conv: nn.Conv2d, ratio: float) -> nn.Sequential:
    """A conv of the original kernel size to few channels, then a 1x1 conv."""
    n, d = conv.out_channels, conv.weight[0].numel()
    rank = max(1, int(ratio * n * d / (n + d)))
    return make_chain(conv, None, (conv.in_channels, rank))


def make_tucker(conv: nn.Conv2d, ratio: float) -> nn.Sequential:
    """A 1x1 conv, the core and a 1x1 conv; a 1x1 conv is a matrix and gets its SVD."""
    n, c = conv.out_channels, conv.in_channels
    pixels = math.prod(conv.kernel_size)
    if pixels == 1:
        return make_svd(conv, ratio)
    best = (1, 1)
    for inner in range(1, c + 1):
        outer = max(1, round(inner * n / c))
        if c * inner + inner * outer * pixels + outer * n <= ratio * conv.weight.numel():
            best = (inner, outer)
    return make_chain(conv, best[0], best)


def merge_kernels(weights: Sequence[Tensor]) -> Tensor:
    """The kernel (n, c, kh, kw) of a chain of convs, all but one of them 1x1."""
    total = weights[0]
    for weight in weights[1:]:
        both = torch.einsum("srab,rckl->scabkl", weight, total)
        n, c, a, b, k, m = both.shape
        total = both.reshape(n, c, a * k, b * m)
    return total


def split_scale(outer: Tensor, inner: Tensor, shape: torch.Size) -> list[Tensor]:
    """Kernels of two convs of similar scale whose product is outer (n, r) @ inner (r, D)."""
    scale = (inner.norm(dim=1) / outer.norm(dim=0).clamp(min=1e-12)).clamp(min=1e-12).sqrt()
    return [
        (inner / scale[:, None]).reshape(-1, *shape[1:]),
        (outer * scale)[:, :, None, None],
    ]


def fit_svd(conv: nn.Conv2d, form: nn.Sequential, moments: Moments) -> list[list[Tensor]]:
    """Two candidates: truncated SVD of the weight, reduced-rank regression on the images."""
    weight, rank = conv.weight.detach(), list_parts(form)[0].out_channels
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    plain = split_scale(u[:, :rank] * s[:rank], vh[:rank], weight.shape)
    solved = moments.solve()
    outputs = (moments.times(solved) @ solved.mT)[0].double()
    leading = torch.linalg.eigh(outputs).eigenvectors[:, -rank:].float()
    return [plain, split_scale(leading, leading.T @ solved[0], weight.shape)]


def fit_tucker(conv: nn.Conv2d, form: nn.Sequential, moments: Moments) -> list[list[Tensor]]:
    """Candidates: Tucker-2 of the weight and of the least-squares weight, with fitted cores."""
    if len(form) == 2:
        return fit_svd(conv, form, moments)
    import tensorly
    from tensorly.decomposition import partial_tucker

    weight = conv.weight.detach()
    core_conv = list_parts(form)[1]
    rank = [core_conv.out_channels, core_conv.in_channels]
    candidates = []
    with tensorly.backend_context("pytorch"):
        for tensor in (weight, moments.solve().reshape(weight.shape)):
            (core, (outer, inner)), _ = partial_tucker(tensor, rank, modes=[0, 1])
            cores = [fit_core(outer, inner, conv, moments)]
            if tensor is weight:
                cores.append(core)
            candidates += [[inner.T[:, :, None, None], c, outer[:, :, None, None]] for c in cores]
    return candidates


def fit_core(outer: Tensor, inner: Tensor, conv: nn.Conv2d, moments: Moments) -> Tensor:
    """The core of least error between two orthonormal factors (n, r_out) and (c, r_in)."""
    pixels = math.prod(conv.kernel_size)
    project = torch.kron(inner.contiguous(), torch.eye(pixels)).double()
    square = project.T @ moments.square[0, 0].double() @ project
    cross = (outer.T @ moments.cross[0]).double() @ project
    core = torch.cholesky_solve(cross.T, torch.linalg.cholesky(square)).T
    return core.float().reshape(outer.shape[1], inner.shape[1], *conv.kernel_size)


def measure_svd_error(conv: nn.Conv2d, form: nn.Sequential) -> float:
    """Relative squared error of the truncated SVD."""
    squares = torch.linalg.svdvals(conv.weight.detach().double().flatten(1)).square()
    return float(squares[list_parts(form)[0].out_channels :].sum() / squares.sum())


def measure_tucker_error(conv: nn.Conv2d, form: nn.Sequential) -> float:
    """Relative squared error of the higher-order SVD."""
    if len(form) == 2:
        return measure_svd_error(conv, form)
    weight = conv.weight.detach().double()
    core = weight
    core_conv = list_parts(form)[1]
    for mode, rank in enumerate((core_conv.out_channels, core_conv.in_channels)):
        rows = weight.transpose(0, mode).flatten(1)
        leading = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -rank:]
        core = (core.transpose(mode, -1) @ leading).transpose(mode, -1)
    return float(1 - core.square().sum() / weight.square().sum())


@functools.cache
def list_choices(form: Form, error: Error, conv: nn.Conv2d) -> list[tuple[float, float, int]]:
    """Share, loss and parameters of a layer's forms; the share of the dense form is infinite."""
    choices = [(math.inf, 0.0, conv.weight.numel())]
    for step in range(1, SHARES + 1):
        chain = form(conv, step / SHARES)
        size = sum(part.weight.numel() for part in list_parts(chain))
        choices.append((step / SHARES, signal_lost(error(conv, chain)), size))
    return choices


def choose_shares(
    form: Form,
    error: Error,
    by_pixels: bool,
    original: nn.Module,
    names: Sequence[str],
    ratio: float,
) -> dict[str, float]:
    """Choose the share of each layer as `lego.allocate` does; the price falls with the ratio.

    Each layer takes the form of least loss + price * cost; a cost counts parameters, or MACs with
    `by_pixels`.
    """
    pixels = {row.name: row.pixels or 0 for row in _plan_rows(original)}
    convs = get_convs(original, names)
    scale = {name: pixels[name] if by_pixels else 1 for name in names}
    dense = sum(scale[name] * conv.weight.numel() for name, conv in convs.items())
    price = 10.0 ** (PRICES * (0.5 - ratio)) / dense
    chosen = {}
    for name, conv in convs.items():
        rate = price * scale[name]
        chosen[name] = min(list_choices(form, error, conv), key=lambda c: c[1] + rate * c[2])[0]
    return chosen


@functools.cache
def _plan_rows(original: nn.Module) -> tuple[LayerPlan, ...]:
    return lego.plan(original).rows


def factorise(
    form: Form,
    fits: Fits,
    shares: Shares,
    original: nn.Module,
    names: Sequence[str],
    ratio: float,
) -> Shrunk:
    """The network with each layer in its form, where that saves parameters."""
    network = copy.deepcopy(original)
    convs = get_convs(original, names)
    share_of = shares(original, names, ratio)
    forms = {
        name: form(conv, share_of[name]) for name, conv in convs.items() if share_of[name] <= 1
    }
    for name, chain in forms.items():
        if sum(p.numel() for p in chain.parameters()) >= convs[name].weight.numel():
            continue  # no saving: the layer stays as it is
        network.set_submodule(name, chain)

    def fit(student: nn.Module, name: str, moments: Moments, held_out: Moments) -> None:
        chain = network.get_submodule(name)
        if not isinstance(chain, nn.Sequential):
            return
        best = min(
            fits(convs[name], chain, moments),
            key=lambda kernels: held_out.error(merge_kernels(kernels).flatten(1)[None]),
        )
        chain = copy.deepcopy(chain)
        for part, weight in zip(list_parts(chain), best, strict=True):
            part.weight.data.copy_(weight)
        student.set_submodule(name, chain)

    return Shrunk(network, copy.deepcopy(original), fit)


def share_equally(original: nn.Module, names: Sequence[str], ratio: float) -> dict[str, float]:
    """The same share for all layers."""
    return dict.fromkeys(names, ratio)


def list_variants(form: Form, fits: Fits, error: Error) -> dict[str, Shrink]:
    """One method with equal shares, and with shares by layer for bytes and for MACs."""
    shares: dict[str, Shares] = {
        "": share_equally,
        "by layer, bytes": partial(choose_shares, form, error, False),
        "by layer, MACs": partial(choose_shares, form, error, True),
    }
    return {name: partial(factorise, form, fits, rule) for name, rule in shares.items()}


SVD: dict[str, Shrink] = list_variants(make_svd, fit_svd, measure_svd_error)
TUCKER: dict[str, Shrink] = list_variants(make_tucker, fit_tucker, measure_tucker_error)
