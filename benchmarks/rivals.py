"""Other ways to make a network smaller, each with the label-free repair that Lego filters get.

Truncated SVD (Zhang et al., 2016), Tucker-2 (Kim et al., 2016; tensorly), structured pruning by
group magnitude (Fang et al., 2023; torch-pruning) and 4-bit k-means palettization (scikit-learn).
The share of its parameters that a layer keeps is bisected to a budget of bytes or of MACs: one for
all layers or, with the rule by which Lego layers are sized, one for each, whichever held-out images
prefer. The first conv and the classifier keep their outputs as they are.

Repair, on the same images as ours: layer by layer, in the order in which they run, each form is
fitted to the original's outputs on the inputs that the repaired layers before it give (reduced-rank
regression, least squares for Tucker's core and for what pruning left), where held-out images say
that this is better than the plain form; then norm statistics; then all parameters tuned together.
Palettes have no layer step: their codebooks are tuned.
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
from legocompress.allocate import signal_lost
from legocompress.calibrate import _keep_if_better
from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.front import Front, steps
from legocompress.calibrate.joint import (
    RATES,
    copy_of_state,
    output_error,
    reestimate_norms_,
    tune_,
)
from legocompress.calibrate.layers import DAMPING, HELD_OUT, SAMPLES, sample
from legocompress.calibrate.moments import Moments
from legocompress.calibrate.stream import run_to
from legocompress.codec import encode
from legocompress.measure import fvcore_macs
from legocompress.plan import LayerPlan
from legocompress.probe import default_input, evaluating

METHODS = ("svd", "tucker", "pruning", "palette")
BATCH = 32
PALETTE_BITS = 4
MOST_PRUNED = 0.95  # of a layer, where layers are ranked together
HALVINGS = 12
SHARES = 32  # of a layer's parameters that are chosen from, where they are chosen by layer
PRICES = 8.0  # decades
PACKAGES = {"tucker": "tensorly", "pruning": "torch_pruning", "palette": "sklearn"}

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


# ----------------------------------------------------------------------------------------- costs


def stored_bytes(network: nn.Module) -> int:
    """Bytes of all tensors that a file would hold; of a palette, packed indices and codebook."""
    total = sum(t.numel() * t.element_size() for t in encode(network).values())
    for module in network.modules():
        if isinstance(module, Palette):
            packed = -(-module.number.numel() * PALETTE_BITS // 8)
            total += packed - module.number.numel() * module.number.element_size()
    return total


def macs(network: nn.Module) -> int:
    """Multiply-accumulates of one image, by fvcore."""
    image = default_input(network)
    assert image is not None
    counted = fvcore_macs(network, image)
    assert counted is not None
    return counted


COSTS: dict[str, Callable[[nn.Module], int]] = {"bytes": stored_bytes, "macs": macs}


def largest_ratio(cost: Callable[[float], float], budget: float) -> float:
    """The largest ratio in (0, 1] whose cost, which grows with it, is within the budget.

    Raises:
        ValueError: no ratio is.
    """
    if cost(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if not low:
        raise ValueError(f"no ratio costs at most {budget:g}")
    return low


# ----------------------------------------------------------------------------------------- forms


def _convs(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Conv2d]:
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
    convs = _convs(original, names)
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
    convs = _convs(original, names)
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
        weight = _convs(student, [name])[name].weight.data
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
    for conv in _convs(network, names).values():
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


# ---------------------------------------------------------------------------------------- repair


def compress(
    method: str,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: tuple[str, float] | None,
    epochs: int,
    seed: int,
    rates: Sequence[float] = RATES,
) -> tuple[nn.Module, dict[str, Any]]:
    """Compress the layers `names` by a method of `METHODS` and repair the network.

    Args:
        method: which.
        original: the network, which stays as it is.
        names: the convs to be compressed.
        images: (N, c, H, W), preprocessed; one in `HELD_OUT` is used by no step and judges all.
        budget: kind of cost of `COSTS` and the most of it; None for palettes, which have no ratio.
        epochs: passes over the images of the last step.
        seed: of sampled pixels, clustering and the order of batches.
        rates: learning rates of the last step; the one of least error stays.

    Raises:
        ValueError: the method cannot meet the budget.
    """
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    used, kept = images[~held_out], torch.split(images[held_out], BATCH)
    with evaluating(original):
        points = _points(original, names, images)
        if method == "palette":
            found = {"": (palettised(original, names, seed).eval(), 1.0)}
        else:
            assert budget is not None
            found = {
                variant: _filled(shrink, original, names, images, budget, seed)
                for variant, shrink in SHRINKS[method].items()
            }
        judges = {v: partial(output_error, n, original, kept) for v, (n, _) in found.items()}
        for variant, (network, _) in found.items():
            with evaluating(network):
                renew = partial(reestimate_norms_, network, torch.split(used, BATCH))
                _keep_if_better(network, judges[variant], renew)
        best = min(found, key=lambda variant: judges[variant]())
        network, ratio = found[best]
        shapes = steps(network, images[:2])
        theirs = steps(original, images[:2])
        alike = [p for p in points if shapes[p].shape == theirs[p].shape]

        values = list(network.parameters())
        convs = [m for m in network.modules() if type(m) is nn.Conv2d]
        with evaluating(network):
            bases = input_bases(network, convs, used)

        def tune(rate: float) -> None:
            tune_(network, original, used, values, alike, epochs, BATCH, seed, rate, bases)

        with evaluating(network):
            rate = _best_rate(network, judges[best], tune, rates if epochs else ())
            error = judges[best]()
    facts = {"variant": best, "ratio": ratio, "rate": rate, "held_out_error": error}
    return network, {**facts, "bytes": stored_bytes(network), "macs": macs(network)}


def _points(original: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """The modules whose outputs Lego filters are tuned towards too."""
    front = Front((original, original), [images[:2]])
    for name in sorted(names, key=lambda n: front.steps[n].enter):
        front.advance(name)
    return front.passed


def _filled(
    shrink: Shrink,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: tuple[str, float],
    seed: int,
) -> tuple[nn.Module, float]:
    """The network within the budget, its layers repaired one after the other, and its ratio."""
    kind, most = budget
    ratio = largest_ratio(lambda r: COSTS[kind](shrink(original, names, r).network), most)
    shrunk = shrink(original, names, ratio)
    student = shrunk.start.eval()
    with evaluating(student):
        front = Front((original, student), torch.split(images, BATCH))
        for number, name in enumerate(sorted(names, key=lambda n: front.steps[n].enter)):
            front.advance(name)
            seen, held_out = _moments(front, name, shrunk.kept.get(name), seed + 1_000_003 * number)
            shrunk.fit(student, name, seen, held_out)
    return student, ratio


def _moments(front: Front, name: str, kept: Tensor | None, seed: int) -> tuple[Moments, Moments]:
    """Sums of the student's inputs and the original's outputs, of most images and of the rest."""
    generator = torch.Generator().manual_seed(seed)
    per_image = -(-SAMPLES // sum(len(images) for images in front.images))
    conv = _convs(front.networks[1], [name])[name]
    weight = conv.weight.detach().flatten(1)[None]
    device = weight.device
    both = [Moments(1, weight.shape[2], weight.shape[1], 1, device) for _ in range(2)]
    first = 0
    for original, student, images in front.batches():
        (target,) = run_to(original, original.get_submodule(name), 1, images)
        (call,) = run_to(student, conv, 1, images)
        image, position = sample(len(images), math.prod(call.size), per_image, generator)
        x = call.patches(image, position, conv.in_channels)
        wanted = target.patches(image, position, target.weight.shape[1])
        y = wanted @ target.weight.flatten(1).T
        y = y if kept is None else y[:, :, kept]
        held = (image + first) % HELD_OUT == HELD_OUT - 1
        both[0].add(x[~held], y[~held])
        both[1].add(x[held], y[held])
        first += len(images)
    both[0].finish(weight, DAMPING)
    both[1].finish(weight)
    return both[0], both[1]


def _best_rate(
    network: nn.Module,
    judge: Callable[[], float],
    tune: Callable[[float], None],
    rates: Sequence[float],
) -> float | None:
    """Tune at each rate from the same start; keep what is best, None where that is the start."""
    start = best = copy_of_state(network)
    error, chosen = judge(), None
    for rate in rates:
        network.load_state_dict(start)
        tune(rate)
        if (now := judge()) < error:
            error, chosen, best = now, rate, copy_of_state(network)
    network.load_state_dict(best)
    return chosen


def planned(network: nn.Module, spec: lego.LegoSpec) -> list[str]:
    """The layers that Lego filters take the place of."""
    return list(lego.plan(network, spec).layers)
