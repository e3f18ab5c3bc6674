"""The parts of a network that trace, largest first, with example inputs for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.deploy.conv_layer import is_deployable_conv
from legocompress.deploy.fusing import FusedGraph, fuse_graph
from legocompress.errors import UsageError
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.models.inputs import Arguments, to_arguments
from legocompress.models.outputs import flatten_float_tensors
from legocompress.models.probe import default_input, evaluating


@dataclass
class Part:
    """A traced part of a network.

    `example` has the shape of the part's inputs; unless the part is the whole network, its values
    do not count (see `_example_calls`).
    """

    graph: FusedGraph
    example: tuple[Tensor, ...]

    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs to run the part on; random ones, the same at every call, if only shapes exist."""
        return _with_values(self.example)


@dataclass
class Partition:
    """What could be traced of a network.

    Attributes:
        images: the float tensors among the example's arguments, also in lists and dicts.
        lego_layers: all Lego layers of the network, traced or not.
        parts: the traced parts; a part that another part calls comes after it.
        notes: which modules were not traced as a whole, and why.
    """

    images: tuple[Tensor, ...]
    lego_layers: list[LegoModule]
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def graphs(self) -> list[FusedGraph]:
        """The graphs of the parts, in their order."""
        return [part.graph for part in self.parts]


def partition_model(model: nn.Module, example_input: Any = None) -> Partition:
    """Trace a network, or where it does not trace, its children, and so on down.

    Args:
        model: the network.
        example_input: a tensor (N, c, H, W), a tuple of arguments or a dict of keyword arguments;
            by default one image of the size that the model's configuration names.

    Raises:
        UsageError: there is no float tensor in the example, or it does not fit the model's forward.
    """
    if example_input is None:
        example_input = default_input(model)
    if example_input is None or not flatten_float_tensors(example_input):
        raise UsageError(
            "example_input has no image: give a float tensor (N, c, H, W), a tuple of arguments "
            "or a dict of keyword arguments"
        )
    arguments = to_arguments(model, example_input)
    layers = [layer for _, layer in lego_modules(model)]
    partitioner = _Partitioner(model, arguments, Partition(arguments.float_tensors(), layers))
    with evaluating(model):
        partitioner.visit("", model)
    return partitioner.partition


class _Partitioner:
    """Visits the modules of a network from the root down, and traces the first that it can."""

    def __init__(self, model: nn.Module, arguments: Arguments, partition: Partition) -> None:
        self.model, self.arguments, self.partition = model, arguments, partition
        self.visited: set[nn.Module] = set()
        self.examples: dict[nn.Module, tuple[Tensor, ...] | str] = {}

    def visit(self, name: str, module: nn.Module) -> None:
        """Trace a module that has convs; where that fails, note why and visit its children."""
        convs = (m for m in module.modules() if is_deployable_conv(m, allow_hooks=True))
        if module in self.visited or next(convs, None) is None:
            return
        self.visited.add(module)
        example = self._example(module)
        graph = self._trace(name, module, example) if isinstance(example, tuple) else example
        if isinstance(graph, str):
            self.partition.notes.append(f"{name or '(root)'} is not traced as a whole: {graph}")
            for child, part in module.named_children():
                self.visit(_join(name, child), part)
            return
        assert isinstance(example, tuple)
        if graph.convs:
            self.partition.parts.append(Part(graph, example))
        names = {part: part_name for part_name, part in module.named_modules()}
        for part in graph.undeployed_modules():
            self.visit(_join(name, names.get(part, "")), part)

    def _example(self, module: nn.Module) -> tuple[Tensor, ...] | str:
        """Inputs for a module, or why there are none."""
        if module is self.model:
            only_tensors = self.arguments.are_float_tensors()
            return self.arguments.args if only_tensors else NOT_ONLY_TENSORS
        if not self.examples:
            self.examples.update(_example_calls(self.model, self.arguments))
        return self.examples.get(module, "it did not run")

    def _trace(self, name: str, module: nn.Module, example: tuple[Tensor, ...]) -> FusedGraph | str:
        """The module's graph, or why it does not trace."""
        try:
            return fuse_graph(name, module, _with_values(example))
        # Tracing runs the network's own code on values that it may refuse with any exception.
        except Exception as error:
            return describe_error(error)


NOT_ONLY_TENSORS = "it takes more than tensors"


def _example_calls(
    model: nn.Module, arguments: Arguments
) -> dict[nn.Module, tuple[Tensor, ...] | str]:
    """The shapes of each module's inputs at its first call in one forward pass, or why not.

    To save memory a shape is held as one zero that is expanded to it; `_with_values` fills it.
    """
    calls: dict[nn.Module, tuple[Tensor, ...] | str] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        only_tensors = inputs and all(type(x) is Tensor and x.is_floating_point() for x in inputs)
        if kwargs or not only_tensors:
            calls.setdefault(module, "it is not called on tensors alone")
        else:
            calls.setdefault(module, tuple(x.new_zeros(1).expand(x.shape) for x in inputs))

    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        with evaluating(model):
            model(*arguments.args, **arguments.kwargs)
    # The example may suit only some of the network: then the modules that ran have their shapes.
    except Exception as error:
        calls.setdefault(model, describe_error(error))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _with_values(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors themselves, with random values where one number is expanded to a shape."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(x.shape, generator=generator).to(x) if 0 in x.stride() else x for x in example
    )


def _join(name: str, child: str) -> str:
    return ".".join(part for part in (name, child) if part)


def describe_error(error: Exception) -> str:
    """The type of an error and the first line of its text, cut to 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
