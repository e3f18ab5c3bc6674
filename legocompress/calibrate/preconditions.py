"""Whether two networks can be calibrated on some images; all checks come before any change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from legocompress.errors import ConversionError, DataError, first_line
from legocompress.lego.module import lego_modules
from legocompress.models.inputs import check_one_input
from legocompress.models.outputs import flatten_float_tensors, is_list_of_results

BACKBONES = ("backbone.body", "backbone")  # of torchvision's detectors, the innermost first


def check_networks(model: nn.Module, original: nn.Module) -> None:
    """Check that the original has the model's layers, and that both take one input.

    Raises:
        ConversionError: the original lacks a layer.
        UsageError: a network takes several inputs.
    """
    names = {name for name, _ in original.named_modules()}
    missing = [name for name, _ in lego_modules(model) if name not in names]
    if missing:
        raise ConversionError(
            f"the original has no layer {missing[0]!r}; give the network that was converted, with "
            "its original weights"
        )
    for network in (model, original):
        check_one_input(network, "calibrate_")


def check_images(images: Any, fewest: int) -> None:
    """Check that the images are one float tensor of enough images; DataError if not."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"images to calibrate on are one float tensor (N, c, H, W), not {kind}; `gather` "
            "makes it of batches, and torch.stack of a list of images of one size"
        )
    if len(images) < fewest:
        raise DataError(f"{len(images)} images are too few to calibrate on; give {fewest} or more")


def check_outputs(model: nn.Module, original: nn.Module, images: Tensor) -> None:
    """Run both networks on some images, and check that their outputs can be compared.

    Raises:
        DataError: a network refuses the images, or returns no tensors or a list of detections.
    """
    for kind, network in (("converted network", model), ("original", original)):
        try:
            output = network(images)
        # The code of a network may refuse its input with any exception.
        except Exception as error:
            raise DataError(
                f"the {kind} refuses images of shape {tuple(images.shape)}: {first_line(error)}"
                f"{_advise_part(network)}"
            ) from error
        if is_list_of_results(output):
            raise DataError(
                f"{type(network).__name__} returns a list of results for each image, which "
                f"calibration cannot compare{_advise_part(network)}"
            )
        if not flatten_float_tensors(output):
            raise DataError(
                f"the output of {type(network).__name__} has no floating-point tensor that could "
                f"be compared{_advise_part(network)}"
            )


def _advise_part(network: nn.Module) -> str:
    """Say how to calibrate a part alone; name the backbone where the network has one."""
    names = {name for name, _ in network.named_modules()}
    part = next((name for name in BACKBONES if name in names), None)
    if part is None:
        return (
            ". Calibrate a part that maps images to feature maps: "
            "calibrate_(model.PART, original.PART, images)"
        )
    return (
        f". Calibrate its backbone alone: calibrate_(model.{part}, original.{part}, images), with "
        "the images as the backbone gets them"
    )
