"""Smaller forms of a network's convs: low rank by SVD or Tucker, fewer channels, palettes.

Truncated SVD (Zhang et al., 2016), Tucker-2 (Kim et al., 2016; tensorly), structured pruning by
group magnitude (Fang et al., 2023; torch-pruning) and 4-bit k-means palettization (scikit-learn).
A ratio says what share of its parameters a layer keeps: one share for all layers or, with the rule
by which Lego layers are sized, one for each.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import legocompress as lego
from legocompress.calibrate.moments import Moments
from legocompress.compress.forms import signal_lost
from legocompress.compress.plan_types import LayerPlan
from legocompress.models.probe import default_input

PALETTE_BITS = 4
MOST_PRUNED = 0.95  # of a layer, where layers are ranked together
SHARES = 32  # of a layer's parameters that are chosen from, where they are chosen by layer
PRICES = 8.0  # decades

Fit = Callable[[nn.Module, str, Moments, Moments], None]


@dataclass(frozen=True)
class Shrunk:
    """A network of the right shapes, and how to fill it.

    `fit` puts the fitted form of one layer into a network, which is `start` before the first of
    them; `kept` are the output channels that are left of the original's, where not all are.
    """

    network: nn.Module
    start: nn.Module
    fit: Fit
    kept: dict[str, Tensor] = field(default_factory=dict)


Shrink = Callable[[nn.Module, Sequence[str], float], Shrunk]


def convs_of(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Conv2d]:
    """The ungrouped convs of these names."""
    found: dict[str, nn.Conv2d] = {}
    for name in names:
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        assert conv.groups == 1
        found[name] = conv
    return found


def _chain(conv: nn.Conv2d, first: int | None, core: tuple[int, int]) -> nn.Sequential:
    """Convs c -> (first) -> n with the kernel in the one of channels `core`."""
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


def svd_form(conv: nn.Conv2d, ratio: float) -> nn.Sequential:
    """A conv of the original kernel to few channels and a 1x1 conv from there."""
    n, d = conv.out_channels, conv.weight[0].numel()
    rank = max(1, int(ratio * n * d / (n + d)))
    return _chain(conv, None, (conv.in_channels, rank))


def tucker_form(conv: nn.Conv2d, ratio: float) -> nn.Sequential:
    """1x1, core and 1x1; of a 1x1 conv, whose Tucker-2 form is a matrix's, the SVD."""
    n, c = conv.out_channels, conv.in_channels
    pixels = math.prod(conv.kernel_size)
    if pixels == 1:
        return svd_form(conv, ratio)
    best = (1, 1)
    for inner in range(1, c + 1):
        outer = max(1, round(inner * n / c))
        if c * inner + inner * outer * pixels + outer * n <= ratio * conv.weight.numel():
            best = (inner, outer)
    return _chain(conv, best[0], best)


def merged(weights: Sequence[Tensor]) -> Tensor:
    """The one kernel (n, c, kh, kw) of convs in a row, all but one of them 1x1."""
    total = weights[0]
    for weight in weights[1:]:
        both = torch.einsum("srab,rckl->scabkl", weight, total)
        n, c, a, b, k, m = both.shape
        total = both.reshape(n, c, a * k, b * m)
    return total


def _split(outer: Tensor, inner: Tensor, shape: torch.Size) -> list[Tensor]:
    """Kernels of the two convs whose product is outer (n, r) inner (r, D), of like scale."""
    scale = (inner.norm(dim=1) / outer.norm(dim=0).clamp(min=1e-12)).clamp(min=1e-12).sqrt()
    return [
        (inner / scale[:, None]).reshape(-1, *shape[1:]),
        (outer * scale)[:, :, None, None],
    ]


def svd_fits(conv: nn.Conv2d, form: nn.Sequential, seen: Moments) -> list[list[Tensor]]:
    """The truncated SVD of the weight, and the reduced-rank regression on what was seen."""
    weight, rank = conv.weight.detach(), form[0].out_channels
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    plain = _split(u[:, :rank] * s[:rank], vh[:rank], weight.shape)
    solved = seen.solve()
    outputs = (seen.times(solved) @ solved.mT)[0].double()
    leading = torch.linalg.eigh(outputs).eigenvectors[:, -rank:].float()
    return [plain, _split(leading, leading.T @ solved[0], weight.shape)]


def tucker_fits(conv: nn.Conv2d, form: nn.Sequential, seen: Moments) -> list[list[Tensor]]:
    """Tucker-2 of the weight; the same with its core, and of the solution, fitted to the seen."""
    if len(form) == 2:
        return svd_fits(conv, form, seen)
    import tensorly
    from tensorly.decomposition import partial_tucker

    weight = conv.weight.detach()
    rank = [form[1].out_channels, form[1].in_channels]
    found = []
    with tensorly.backend_context("pytorch"):
        for tensor in (weight, seen.solve().reshape(weight.shape)):
            (core, (outer, inner)), _ = partial_tucker(tensor, rank, modes=[0, 1])
            cores = [_core(outer, inner, conv, seen)]
            if tensor is weight:
                cores.append(core)
            found += [[inner.T[:, :, None, None], c, outer[:, :, None, None]] for c in cores]
    return found


def _core(outer: Tensor, inner: Tensor, conv: nn.Conv2d, seen: Moments) -> Tensor:
    """The core of least error between two orthonormal factors (n, r_out) and (c, r_in)."""
    pixels = math.prod(conv.kernel_size)
    project = torch.kron(inner.contiguous(), torch.eye(pixels)).double()
    square = project.T @ seen.square[0, 0].double() @ project
    cross = (outer.T @ seen.cross[0]).double() @ project
    core = torch.cholesky_solve(cross.T, torch.linalg.cholesky(square)).T
    return core.float().reshape(outer.shape[1], inner.shape[1], *conv.kernel_size)


def svd_error(conv: nn.Conv2d, form: nn.Sequential) -> float:
    """Squared error of the truncated SVD, relative."""
    squares = torch.linalg.svdvals(conv.weight.detach().double().flatten(1)).square()
    return float(squares[form[0].out_channels :].sum() / squares.sum())


def tucker_error(conv: nn.Conv2d, form: nn.Sequential) -> float:
    """Squared error of the higher-order SVD, relative."""
    if len(form) == 2:
        return svd_error(conv, form)
    weight = conv.weight.detach().double()
    core = weight
    for mode, rank in enumerate((form[1].out_channels, form[1].in_channels)):
        rows = weight.transpose(0, mode).flatten(1)
        leading = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -rank:]
        core = (core.transpose(mode, -1) @ leading).transpose(mode, -1)
    return float(1 - core.square().sum() / weight.square().sum())


Form = Callable[[nn.Conv2d, float], nn.Sequential]
Error = Callable[[nn.Conv2d, nn.Sequential], float]


@functools.cache
def _choices(form: Form, error: Error, conv: nn.Conv2d) -> list[tuple[float, float, int]]:
    """Share, loss and parameters of a layer's forms; the dense one has no bound on its share."""
    found = [(math.inf, 0.0, conv.weight.numel())]
    for step in range(1, SHARES + 1):
        chain = form(conv, step / SHARES)
        size = sum(part.weight.numel() for part in chain)  # type: ignore[misc]
        found.append((step / SHARES, signal_lost(error(conv, chain)), size))
    return found


def by_layer(
    form: Form,
    error: Error,
    by_pixels: bool,
    original: nn.Module,
    names: Sequence[str],
    ratio: float,
) -> dict[str, float]:
    """Shares of each layer, as `lego.allocate` chooses, at a price that falls with the ratio."""
    pixels = {row.name: row.pixels or 0 for row in _rows(original)}
    convs = convs_of(original, names)
    scale = {name: pixels[name] if by_pixels else 1 for name in names}
    dense = sum(scale[name] * conv.weight.numel() for name, conv in convs.items())
    price = 10.0 ** (PRICES * (0.5 - ratio)) / dense
    found = {}
    for name, conv in convs.items():
        rate = price * scale[name]
        found[name] = min(_choices(form, error, conv), key=lambda c: c[1] + rate * c[2])[0]
    return found


@functools.cache
def _rows(original: nn.Module) -> tuple[LayerPlan, ...]:
    return lego.plan(original).rows


def _factorised(
    form: Form,
    fits: Callable[[nn.Conv2d, nn.Sequential, Moments], list[list[Tensor]]],
    shares: Callable[[nn.Module, Sequence[str], float], dict[str, float]],
    original: nn.Module,
    names: Sequence[str],
    ratio: float,
) -> Shrunk:
    network = copy.deepcopy(original)
    convs = convs_of(original, names)
    kept = shares(original, names, ratio)
    forms = {name: form(conv, kept[name]) for name, conv in convs.items() if kept[name] <= 1}
    for name, chain in forms.items():
        if sum(p.numel() for p in chain.parameters()) >= convs[name].weight.numel():
            continue  # no saving: the layer stays as it is
        network.set_submodule(name, chain)

    def fit(student: nn.Module, name: str, seen: Moments, held_out: Moments) -> None:
        chain = network.get_submodule(name)
        if not isinstance(chain, nn.Sequential):
            return
        found = fits(convs[name], chain, seen)
        best = min(found, key=lambda weights: held_out.error(merged(weights).flatten(1)[None]))
        chain = copy.deepcopy(chain)
        for part, weight in zip(chain, best, strict=True):
            part.weight.data.copy_(weight)
        student.set_submodule(name, chain)

    return Shrunk(network, copy.deepcopy(original), fit)


@torch.enable_grad()  # by which torch-pruning finds what hangs together
def _pruned(together: bool, original: nn.Module, names: Sequence[str], ratio: float) -> Shrunk:
    """Without the output channels of least group magnitude, ranked by layer or all together."""
    import torch_pruning as tp

    network = copy.deepcopy(original)
    place = {module: name for name, module in network.named_modules()}
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    pruner = tp.pruner.BasePruner(
        network,
        default_input(network),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=together,
        pruning_ratio=1 - ratio,
        max_pruning_ratio=MOST_PRUNED,
        ignored_layers=[m for m in layers if place[m] not in names],
    )
    kept: dict[str, Tensor] = {}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            name = place.get(dependency.target.module, "")
            if name in names and dependency.handler == tp.prune_conv_out_channels:
                left = kept.get(name, torch.arange(original.get_submodule(name).out_channels))
                kept[name] = left[~torch.isin(torch.arange(len(left)), torch.tensor(channels))]
        group.prune()

    def fit(student: nn.Module, name: str, seen: Moments, held_out: Moments) -> None:
        weight = convs_of(student, [name])[name].weight.data
        solved = seen.solve()
        if held_out.error(solved) < held_out.error(weight.flatten(1)[None]):
            weight.copy_(solved.reshape(weight.shape))

    return Shrunk(network, copy.deepcopy(network), fit, kept)


class Palette(nn.Module):
    """A weight as numbers into a codebook (16,), which is the parameter."""

    number: Tensor

    def __init__(self, weight: Tensor, seed: int) -> None:
        super().__init__()
        from sklearn.cluster import KMeans

        size = min(2**PALETTE_BITS, weight.numel())
        fitted = KMeans(size, random_state=seed, n_init=3).fit(weight.reshape(-1, 1).numpy())
        self.register_buffer("number", torch.from_numpy(fitted.labels_).reshape(weight.shape))
        self._codebook = torch.from_numpy(fitted.cluster_centers_[:, 0]).to(weight.dtype)

    def forward(self, codebook: Tensor) -> Tensor:
        """The weight."""
        return codebook[self.number.long()]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook, which becomes the parameter."""
        return self._codebook


def palettised(original: nn.Module, names: Sequence[str], seed: int) -> nn.Module:
    """The network with 16 values for the weights of each of the layers."""
    network = copy.deepcopy(original)
    for conv in convs_of(network, names).values():
        parametrize.register_parametrization(conv, "weight", Palette(conv.weight.detach(), seed))
    return network


def _one_share(original: nn.Module, names: Sequence[str], ratio: float) -> dict[str, float]:
    return dict.fromkeys(names, ratio)


def _variants(form: Form, fits: Any, error: Error) -> dict[str, Shrink]:
    shares = {
        "": _one_share,
        "by layer, bytes": partial(by_layer, form, error, False),
        "by layer, MACs": partial(by_layer, form, error, True),
    }
    return {name: partial(_factorised, form, fits, rule) for name, rule in shares.items()}


SHRINKS: dict[str, dict[str, Shrink]] = {
    "svd": _variants(svd_form, svd_fits, svd_error),
    "tucker": _variants(tucker_form, tucker_fits, tucker_error),
    "pruning": {"by layer": partial(_pruned, False), "all together": partial(_pruned, True)},
}
