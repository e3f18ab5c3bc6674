"""Evaluate a network: accuracy on labelled images, agreement with the original on any images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from timm.utils import accuracy
from torch import Tensor, nn

from legocompress.data.datasets import UNLABELLED
from legocompress.data.memory import reusing_memory
from legocompress.errors import DataError, first_line
from legocompress.models.inputs import check_one_input
from legocompress.models.outputs import describe_output, find_logits, flatten_float_tensors
from legocompress.models.probe import evaluating


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Accuracies are percentages, and None without labels. `agreement` is the percentage of images for
    which the original has the same first class. `output_error` is the relative error
    ||y - y'|| / ||y|| of all floating-point tensors in the outputs. Both are None without the
    original.
    """

    images: int
    top1: float | None
    top5: float | None
    original_top1: float | None
    original_top5: float | None
    agreement: float | None
    output_error: float | None


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    original: nn.Module | None = None,
    n_classes: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure accuracy on labelled images and agreement with the original network.

    On a CPU, memory of feature maps is reused meanwhile (`reusing_memory`).

    Args:
        model: a network from (N, c, H, W) to (N, classes), or to a tuple, dict or dataclass that
            has such a tensor: the first one, but in a dict the only one.
        batches: pairs of images and labels (N,), labels `UNLABELLED` where there are none.
        original: the network before compression.
        n_classes: number of outputs that the labels assume, if it is known (`Images.n_classes`).
        on_batch: called with the number of images after each batch.

    Raises:
        DataError: a label exceeds the outputs of the network, there is no output (N, classes), the
            two networks' outputs differ in shape, or there is no image.
        UsageError: a network takes several inputs.
    """
    for network in (model, original) if original is not None else (model,):
        check_one_input(network, "evaluate")
    sums = dict.fromkeys(("images", "labelled", "top1", "top5", "o1", "o5", "same"), 0.0)
    error = reference = 0.0
    device = next(model.parameters()).device
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(reusing_memory())
        stack.enter_context(evaluating(model))
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            y, tensors = _run(model, images, labels)
            if n_classes is not None and n_classes != y.shape[1]:
                raise DataError(
                    f"the data has {n_classes} class folders and the network {y.shape[1]} outputs, "
                    "so the folders' order cannot be the outputs'; give --class-map FILE, which "
                    "lists the folders of all outputs in their order (`evaluate --no-labels` "
                    "measures agreement alone)"
                )
            sums["images"] += len(images)
            known = labels != UNLABELLED
            sums["labelled"] += int(known.sum())
            _add_accuracy(sums, ("top1", "top5"), y[known], labels[known])
            if original is not None:
                with evaluating(original):
                    target, target_tensors = _run(original, images, labels)
                if target.shape != y.shape:
                    raise DataError(
                        f"the network has {y.shape[1]} outputs and the original {target.shape[1]}; "
                        "name the network that it was converted from"
                    )
                _add_accuracy(sums, ("o1", "o5"), target[known], labels[known])
                sums["same"] += int((y.argmax(1) == target.argmax(1)).sum())
                error += _squared_distance(tensors, target_tensors)
                reference += sum(float(tensor.square().sum()) for tensor in target_tensors)
            if on_batch is not None:
                on_batch(len(images))
    if not sums["images"]:
        raise DataError("there is no image to evaluate on")

    def percent(key: str, of: str) -> float | None:
        return 100 * sums[key] / sums[of] if sums[of] else None

    both = original is not None
    return Evaluation(
        images=int(sums["images"]),
        top1=percent("top1", "labelled"),
        top5=percent("top5", "labelled"),
        original_top1=percent("o1", "labelled") if both else None,
        original_top5=percent("o5", "labelled") if both else None,
        agreement=percent("same", "images") if both else None,
        output_error=(error / max(reference, 1e-30)) ** 0.5 if both else None,
    )


def _add_accuracy(sums: dict[str, float], keys: tuple[str, str], y: Tensor, labels: Tensor) -> None:
    if len(labels):
        for key, value in zip(keys, accuracy(y, labels, topk=(1, 5)), strict=True):
            sums[key] += float(value) * len(labels) / 100


def _squared_distance(outputs: list[Tensor], targets: list[Tensor]) -> float:
    """The squared distance of two networks' outputs; DataError if their shapes differ."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, targets)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"the network returns tensors of shapes {shapes[0]} and the original {shapes[1]}; name "
            "the network that it was converted from"
        )
    pairs = zip(outputs, targets, strict=True)
    return sum(float((output - target).square().sum()) for output, target in pairs)


def _run(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run a network; return its logits (N, classes) and all float tensors of its output."""
    try:
        output = model(images)
    except RuntimeError as error:
        raise DataError(
            f"the network refuses images of shape {tuple(images.shape)}: {first_line(error)}"
        ) from error
    y = find_logits(output, len(images))
    if y is None:
        raise DataError(
            f"the network's output is {describe_output(output)}; accuracy and agreement need one "
            "tensor (N, classes)"
        )
    wrong = labels[(labels != UNLABELLED) & ((labels < 0) | (labels >= y.shape[1]))]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} is beyond the network's {y.shape[1]} outputs; check the "
            "data set, or name the classes' order with --class-map"
        )
    return y.float(), [tensor.float() for tensor in flatten_float_tensors(output)]
