"""Inputs and outputs of an exported file: examples, plain containers, names, and comparison."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.errors import ExportError, UsageError
from legocompress.models.inputs import to_arguments
from legocompress.models.outputs import Path as LeafPath
from legocompress.models.outputs import (
    flatten_leaves,
    flatten_tensors,
    list_container_types,
    simplify,
)
from legocompress.models.probe import default_input


def make_example_inputs(model: nn.Module, example_input: Any, batch: int = 2) -> tuple[Tensor, ...]:
    """Random float32 inputs (batch, ...), of the sizes of the example or the configuration.

    Raises:
        UsageError: the size is unknown, or the example does not fit the model's `forward`.
        ExportError: the example holds more than float tensors (N, ...) of one N.
    """
    example = default_input(model) if example_input is None else example_input
    if example is None:
        raise UsageError(
            "the size of the input is unknown, since the model has no parameter; give example_input"
        )
    arguments = to_arguments(model, example)
    if not arguments.are_float_tensors():
        types = [type(x).__name__ for x in (*arguments.args, *arguments.kwargs.values())]
        raise ExportError(
            "an exported file takes float tensors (N, ...) by position, and example_input has "
            f"{', '.join(types)}. The dense weights can be exported with --to dense"
        )
    if len({tuple(x.shape[:1]) for x in arguments.args}) != 1 or not arguments.args[0].dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in arguments.args)
        raise ExportError(
            "all inputs of an exported file are batches (N, ...) of one N; example_input has "
            f"{shapes}"
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(batch, *x.shape[1:], generator=generator) for x in arguments.args)


class SimpleOutputs(nn.Module):
    """A network whose outputs are in plain containers, so that loading a file needs no class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        """Run the network; dataclasses, named tuples and subclasses of dict become dicts."""
        return simplify(self.network(*inputs))


class TensorOutputs(SimpleOutputs):
    """A network that returns a tuple of the tensors in its output."""

    def forward(self, *inputs: Any) -> Any:
        """Run the network and leave out all but tensors."""
        return tuple(flatten_tensors(self.network(*inputs)))


def has_plain_containers(output: Any) -> bool:
    """Whether a program can return the output as it is: plain dicts, lists and tuples."""
    return set(list_container_types(output)) <= {dict, OrderedDict, list, tuple}


def check_leaves(output: Any) -> None:
    """Raise ExportError if a torch.export program cannot return a value in the output."""
    for path, leaf in flatten_leaves(output):
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float)):
            raise ExportError(
                f"the network returns a {type(leaf).__name__} at {name_output(path)!r}; a "
                "torch.export program returns tensors, numbers and None. Leave it out in a module "
                "around the network"
            )


def name_output(path: LeafPath) -> str:
    """Name an output by the keys that lead to it: `logits`, `features.0`, `output_1`, `output`."""
    name = ".".join(map(str, path))
    if not path:
        return "output"
    return f"output_{name}" if isinstance(path[0], int) else name


def name_outputs(output: Any) -> list[str]:
    """Name all tensors in an output; one tensor without a name of its own is `output`."""
    paths = [path for path, leaf in flatten_leaves(output) if isinstance(leaf, Tensor)]
    if len(paths) == 1 and all(isinstance(key, int) for key in paths[0]):
        return ["output"]
    return [name_output(path) for path in paths]


def make_unique(names: list[str], taken: set[str]) -> Iterator[str]:
    """Yield the names; those that are taken, or come again, get a number."""
    taken = set(taken)
    for name in names:
        tried = (name if number == 0 else f"{name}_{number}" for number in count())
        unique = next(candidate for candidate in tried if candidate not in taken)
        taken.add(unique)
        yield unique


def measure_differences(expected: Any, actual: Any) -> tuple[float, float]:
    """The largest difference of two nested outputs: absolute, and relative to the largest value.

    Of integer tensors, such as classes, the relative difference is the share of values that differ.
    Values that are not tensors must be equal, and so must shapes and infinite or NaN values;
    otherwise both numbers are infinite.
    """
    # Outputs of another number are refused in the next line.
    pairs = list(zip(_leaves(expected), _leaves(actual), strict=False))
    if len(_leaves(expected)) != len(_leaves(actual)) or not all(_match(a, b) for a, b in pairs):
        return float("inf"), float("inf")
    absolute = largest = share = 0.0
    for a, b in ((a, b) for a, b in pairs if isinstance(a, Tensor) and a.numel()):
        if a.is_floating_point():
            finite = a.isfinite()
            gap = (a.double() - b.double())[finite]
            absolute = max(absolute, float(gap.abs().max()) if gap.numel() else 0.0)
            largest = max(largest, float(a[finite].abs().max()) if gap.numel() else 0.0)
        else:
            share = max(share, float((a != b).double().mean()))
    return absolute, max(absolute / max(largest, 1e-30), share)


def _leaves(output: Any) -> list[Any]:
    return [leaf for _, leaf in flatten_leaves(output)]


def _match(expected: Any, actual: Any) -> bool:
    """Whether two leaves are alike apart from rounding."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return type(expected) is type(actual) and bool(expected == actual)
    if expected.shape != actual.shape:
        return False
    special = ~expected.isfinite() | ~actual.isfinite()
    return torch.allclose(expected[special].double(), actual[special].double(), equal_nan=True)
