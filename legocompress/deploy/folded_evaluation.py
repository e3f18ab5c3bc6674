"""Evaluate a network in a folded form on a CPU, which is put together without timing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from legocompress.data import evaluation
from legocompress.data.evaluation import Evaluation
from legocompress.data.memory import reusing_memory
from legocompress.deploy.forward import DeployedForward, install_, uninstall_
from legocompress.deploy.fusing import FusedGraph
from legocompress.deploy.partition import partition_model
from legocompress.deploy.route_plan import RoutePlan, Routes, prepare_plan
from legocompress.models.checks import refuse_wrapper
from legocompress.models.probe import evaluating

LEAST_PIXELS = 128 * 224 * 224  # of all images; with fewer, building the form does not pay


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    original: nn.Module | None = None,
    n_classes: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure accuracy on labelled images and agreement with the original network.

    On a CPU, with glibc, memory of feature maps is reused meanwhile and returned at the end. A
    network that is not deployed runs in a folded form meanwhile (`running_folded`), if there are
    enough images; its outputs are the same within rounding. A deployed network runs as it is.

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
    with ExitStack() as stack:
        # Before the batches are read, since reading in other threads and tracing do not mix.
        example = _read_example(batches)
        if example is not None:
            stack.enter_context(reusing_memory())
            for network in (model, original):
                if network is not None:
                    stack.enter_context(running_folded(network, example))
        return evaluation.evaluate(model, batches, original, n_classes, on_batch)


@contextmanager
def running_folded(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Run a network by oneDNN's convs in channels last, with norms folded in, for a while.

    Activations and residual sums are fused into the convs before them. Nothing is timed. A Lego
    layer runs by its assembled weight. The network is in eval mode meanwhile; at the end its flags
    are restored and it runs its own code again. A network for which this form cannot be built, or
    which is deployed, runs as it is: on another device than a CPU, in another dtype than float32,
    or where a part of it does not trace or would compute something else.

    Args:
        model: the network.
        example: images (N, c, H, W) of the size that it will run on.
    """
    if not _can_be_folded(model, example):
        yield
        return
    with evaluating(model):
        try:
            _fold_(model, example)
        # Tracing runs the network's own code, which may raise anything; then it runs as it is.
        except Exception:
            uninstall_(model)
        try:
            yield
        finally:
            uninstall_(model)


def _fold_(model: nn.Module, example: Tensor) -> None:
    refuse_wrapper(model)
    # A part that another part calls comes after it, and is installed before it.
    for part in reversed(partition_model(model, example).parts):
        inputs = part.inputs()
        plan = RoutePlan("channels_last", _choose_routes(part.graph, inputs[0]))
        with torch.no_grad():
            prepare_plan(part.graph, inputs, plan)
        install_(part.graph, plan.memory_format, inputs, set())


def _choose_routes(graph: FusedGraph, x: Tensor) -> Routes:
    """oneDNN for each conv that it can run, and PyTorch's own operators for all else."""
    routes: Routes = {plain.name: "plain" for plain in graph.plains}
    for conv in graph.convs:
        is_possible = "onednn" in conv.routes(x.device, x.dtype)
        routes[conv.name] = "onednn" if is_possible else "assemble"
    return routes


def _can_be_folded(model: nn.Module, example: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    tensors = (example, *model.parameters(), *model.buffers())
    return (
        all(x.device.type == "cpu" for x in tensors)
        and all(x.dtype == torch.float32 for x in tensors if x.is_floating_point())
        and example.dim() == 4
        and not torch.is_autocast_enabled("cpu")
        and not any(
            isinstance(module.__dict__.get("forward"), DeployedForward)
            for module in model.modules()
        )
    )


def _read_example(batches: Any) -> Tensor | None:
    """Two images (2, c, H, W) like those of the batches, or None if there are too few in all.

    None also where their number is not known before they are read.
    """
    data: Any = batches.dataset if isinstance(batches, DataLoader) else None
    has_positions = isinstance(data, Sized) and not isinstance(data, IterableDataset)
    if has_positions:
        image, n_images = data[0][0] if len(data) else None, len(data)
    elif isinstance(batches, (list, tuple)) and batches:
        image, n_images = batches[0][0][0], sum(len(images) for images, _ in batches)
    else:
        return None
    if not isinstance(image, Tensor) or image.dim() != 3:
        return None
    is_worthwhile = n_images * image.shape[1] * image.shape[2] >= LEAST_PIXELS
    return torch.stack([image, image]) if is_worthwhile else None
