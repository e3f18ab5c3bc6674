"""The loss of a recipe: labels, the original network's logits, and features of chosen layers."""

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
from legocompress.models.outputs import describe_output, find_logits, flatten_float_tensors


class Criterion:
    """The loss of a recipe, for a network (the student) and the original that teaches it."""

    def __init__(self, recipe: Recipe, student: nn.Module, original: nn.Module | None):
        self.recipe, self.original = recipe, original
        self.distill = recipe.distill
        if self.distill is not None and original is None:
            raise UsageError("the recipe distils the original network, which is not given")
        self.layers: tuple[str, ...] = ()
        if self.distill is not None and self.distill.features and original is not None:
            self.layers = choose_feature_layers(self.distill, student, original)

    def __call__(
        self, runs: nn.Module, student: nn.Module, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch, and the logits (N, classes).

        Of several outputs only the logits enter the loss. Auxiliary heads do not, as in timm.

        Args:
            runs: the module to call: the student itself, or a wrapper of it.
            student: the network itself.
            images: (N, c, H, W).
            targets: labels (N,), or mixed ones (N, classes).

        Raises:
            DataError: the outputs are not (N, classes), or a label is not among the classes.
            UsageError: the original has another number of outputs.
        """
        with capture_outputs(student, self.layers) as features:
            output = runs(images)
        logits = take_logits(output, len(images))
        check_labels(logits, targets, self.recipe.uses_labels)
        # DistributedDataParallel waits for the gradients of all that the outputs depend on.
        unused = 0.0 if runs is student else _sum_to_zero(output, logits)
        if self.distill is None or self.original is None:
            return self._label_loss(logits, targets) + unused, logits
        with torch.no_grad(), capture_outputs(self.original, self.layers) as original_features:
            original_logits = take_logits(self.original(images), len(images))
        if original_logits.shape != logits.shape and self.distill.logits:
            raise UsageError(
                f"the network has outputs {tuple(logits.shape)} and the original "
                f"{tuple(original_logits.shape)}; distil features alone with "
                "--set distill.logits=0"
            )
        loss = logits.new_zeros((), dtype=torch.float32) + unused
        if self.distill.labels:
            loss = loss + self.distill.labels * self._label_loss(logits, targets)
        if self.distill.logits:
            divergence = kl_divergence(logits, original_logits, self.distill.temperature)
            loss = loss + self.distill.logits * divergence
        for name in self.layers:
            weight = self.distill.features / len(self.layers)
            loss = loss + weight * relative_squared_error(features[name], original_features[name])
        return loss, logits

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() == 2:  # mixed targets are smoothed already
            return SoftTargetCrossEntropy()(logits.float(), targets)  # type: ignore[no-any-return]
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def take_logits(output: Any, n_images: int) -> Tensor:
    """Return the logits (N, classes) in a network's output; see `find_logits` which these are.

    Raises:
        DataError: no tensor of the output is surely the logits.
    """
    logits = find_logits(output, n_images)
    if logits is None:
        raise DataError(
            f"the network's output is {describe_output(output)}; training needs (N, classes): wrap "
            "the network in a module that returns the logits alone"
        )
    return logits


def _sum_to_zero(output: Any, logits: Tensor) -> Tensor | float:
    """0 times the sum of the output's other tensors that have a gradient."""
    others = (x for x in flatten_float_tensors(output) if x is not logits and x.requires_grad)
    return sum((0.0 * x.float().sum() for x in others), start=0.0)


def check_labels(logits: Tensor, targets: Tensor, reads_labels: bool) -> None:
    """Check the labels (N,) against the logits (N, classes), if the loss reads them.

    Raises:
        DataError: a label is not among the classes.
    """
    if reads_labels and targets.dim() == 1:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= logits.shape[1]:
            wrong = "no label" if low == UNLABELLED else f"label {low if low < 0 else high}"
            raise DataError(
                f"an image has {wrong}, and the network {logits.shape[1]} outputs; "
                "--num-classes N gives it a new classifier"
            )


def kl_divergence(logits: Tensor, original_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(original || network) of logits (N, classes) at temperature T, mean over images.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    log_student = F.log_softmax(logits.float() / temperature, 1)
    log_original = F.log_softmax(original_logits.float() / temperature, 1)
    divergence = F.kl_div(log_student, log_original, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def relative_squared_error(features: Tensor, original: Tensor) -> Tensor:
    """||features - original||^2 / ||original||^2 over all elements."""
    original = original.float()
    error = (features.float() - original).square().mean()
    return error / original.square().mean().clamp(min=1e-12)


def choose_feature_layers(
    distill: Distill, student: nn.Module, original: nn.Module
) -> tuple[str, ...]:
    """Choose the modules whose outputs are compared; they have the same name in both networks.

    By default, the stages of timm's feature_info, except those that come before every Lego layer:
    compression does not change them, and comparing their large maps takes much time.

    Raises:
        UsageError: the recipe names none and the network has no feature_info, or one of the
            networks has no module of that name.
    """
    names = distill.layers or _list_compressed_stages(student)
    if not names:
        raise UsageError(
            f"{type(student).__name__} does not tell its stages; name the modules whose outputs "
            "are to be compared, such as --set 'distill.layers=[layer1, layer2]'"
        )
    for network, which in ((student, "network"), (original, "original")):
        modules = {name for name, _ in network.named_modules()}
        for name in names:
            if name not in modules:
                raise UsageError(f"distill.layers: the {which} has no module {name!r}")
    return names


def _list_compressed_stages(student: nn.Module) -> tuple[str, ...]:
    """The stages of timm's feature_info from the one that holds the first Lego layer on."""
    info: Any = getattr(student, "feature_info", None) or []
    stages = [str(entry.get("module")) for entry in info if isinstance(entry, dict)]
    modules = [name for name, _ in student.named_modules()]
    first = next((modules.index(name) for name, _ in lego_modules(student)), 0)
    parents = {name for name in modules if modules[first].startswith(f"{name}.")}
    reached = {*modules[first:], *parents}
    return tuple(name for name in stages if name in reached)


@contextmanager
def capture_outputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of the named modules, by name, while the context lasts."""
    outputs: dict[str, Tensor] = {}

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(make_hook(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
