"""The loss: labels, the original network's logits, and features of matched layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from legocompress.data.datasets import UNLABELLED
from legocompress.errors import DataError, UsageError
from legocompress.finetune.recipe import Distill, Recipe
from legocompress.lego.module import lego_modules


class Criterion:
    """The loss of a recipe for a network and the one that it was made of."""

    def __init__(self, recipe: Recipe, student: nn.Module, original: nn.Module | None):
        self.recipe, self.original = recipe, original
        self.distill = recipe.distill
        if self.distill is not None and original is None:
            raise UsageError("the recipe distils the original network, which is not given")
        self.layers: tuple[str, ...] = ()
        if self.distill is not None and self.distill.features and original is not None:
            self.layers = matched_layers(self.distill, student, original)

    def __call__(
        self, runs: nn.Module, student: nn.Module, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch (N, c, H, W), and the logits (N, classes).

        Args:
            runs: what computes the student: itself, or a wrapper of it.
            student: the network itself.
            images: (N, c, H, W).
            targets: labels (N,), or mixed ones (N, classes).
        """
        with captured(student, self.layers) as ours:
            logits = runs(images)
        check_labels(logits, targets, self.recipe.uses_labels)
        if self.distill is None or self.original is None:
            return self._labels(logits, targets), logits
        with torch.no_grad(), captured(self.original, self.layers) as theirs:
            wanted = self.original(images)
        if wanted.shape != logits.shape and self.distill.logits:
            raise UsageError(
                f"the network has outputs {tuple(logits.shape)} and the original "
                f"{tuple(wanted.shape)}; distil features alone with --set distill.logits=0"
            )
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.distill.labels:
            loss = loss + self.distill.labels * self._labels(logits, targets)
        if self.distill.logits:
            loss = loss + self.distill.logits * kl(logits, wanted, self.distill.temperature)
        for name in self.layers:
            weight = self.distill.features / len(self.layers)
            loss = loss + weight * relative_square(ours[name], theirs[name])
        return loss, logits

    def _labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() == 2:  # mixed, and smoothed with it
            return SoftTargetCrossEntropy()(logits.float(), targets)  # type: ignore[no-any-return]
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def check_labels(logits: Tensor, targets: Tensor, needed: bool) -> None:
    """Raise DataError unless the outputs are (N, classes) and the labels among the classes."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"the network's output is {found}; training needs (N, classes)")
    if needed and targets.dim() == 1:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= logits.shape[1]:
            wrong = "no label" if low == UNLABELLED else f"label {low if low < 0 else high}"
            raise DataError(
                f"an image has {wrong}, and the network {logits.shape[1]} outputs; "
                "--num-classes N gives it a new classifier"
            )


def kl(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(original || network) of logits (N, classes) at temperature T, mean over images.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    ours = F.log_softmax(logits.float() / temperature, 1)
    theirs = F.log_softmax(wanted.float() / temperature, 1)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def relative_square(ours: Tensor, theirs: Tensor) -> Tensor:
    """||ours - theirs||^2 / ||theirs||^2 over all elements."""
    theirs = theirs.float()
    return (ours.float() - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


def matched_layers(distill: Distill, student: nn.Module, original: nn.Module) -> tuple[str, ...]:
    """The modules whose outputs are compared; they have one name in both networks.

    By default those of the network's stages that compression changes: what comes before every Lego
    layer (a stem of large maps) costs much time and says little.

    Raises:
        UsageError: none is named and the network tells no stages, or one is in one network only.
    """
    names = distill.layers
    if not names:
        info: Any = getattr(student, "feature_info", None) or []
        modules = [name for name, _ in student.named_modules()]
        told = [str(entry.get("module")) for entry in info if isinstance(entry, dict)]
        first = next((modules.index(name) for name, _ in lego_modules(student)), 0)
        later = {*modules[first:], *(n for n in modules if modules[first].startswith(f"{n}."))}
        names = tuple(name for name in told if name in later)
    if not names:
        raise UsageError(
            f"{type(student).__name__} does not tell its stages; name the modules whose outputs "
            "are to be compared, such as --set 'distill.layers=[layer1, layer2]'"
        )
    for network, which in ((student, "network"), (original, "original")):
        known = {name for name, _ in network.named_modules()}
        for name in names:
            if name not in known:
                raise UsageError(f"distill.layers: the {which} has no module {name!r}")
    return names


@contextmanager
def captured(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """What the named modules return while the context lasts."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
