"""What a network takes: its example input as arguments of `forward`, and its required inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from legocompress.errors import UsageError
from legocompress.models.outputs import flatten_float_tensors

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a network."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def float_tensors(self) -> tuple[Tensor, ...]:
        """The floating-point tensors among the arguments, also those in lists and mappings."""
        return tuple(flatten_float_tensors((self.args, self.kwargs)))

    def are_float_tensors(self) -> bool:
        """Whether all arguments are positional floating-point tensors."""
        return not self.kwargs and all(
            type(arg) is Tensor and arg.is_floating_point() for arg in self.args
        )


def to_arguments(model: nn.Module, example_input: Any) -> Arguments:
    """Turn an example input into the arguments of the model's `forward`.

    Args:
        model: the network.
        example_input: a tuple of positional arguments, a dict of keyword arguments, or anything
            else as the only argument. Keyword arguments that have a position become positional.

    Raises:
        UsageError: `forward` does not take such arguments.
    """
    args: tuple[Any, ...] = (example_input,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        args, kwargs = (), dict(example_input)
    elif isinstance(example_input, tuple):
        args = example_input
    signature = _read_signature(model)
    if signature is None:
        return Arguments(args, kwargs)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"example_input does not fit this network, whose forward takes {signature}: {error}. "
            "Give a tensor (N, c, H, W), a tuple of the arguments, or a dict of arguments by name"
        ) from None
    return Arguments(bound.args, bound.kwargs)


def name_inputs(model: nn.Module, n_inputs: int) -> list[str]:
    """Name the first inputs of a network by its parameters; one input is called `image`."""
    if n_inputs == 1:
        return ["image"]
    signature = _read_signature(model)
    parameters = signature.parameters.values() if signature is not None else ()
    names = [parameter.name for parameter in parameters if parameter.kind in POSITIONAL]
    return names[:n_inputs] if len(names) >= n_inputs else [f"input_{i}" for i in range(n_inputs)]


def required_inputs(model: nn.Module) -> list[str]:
    """List the names of the arguments that `forward` cannot go without."""
    signature = _read_signature(model)
    if signature is None:
        return []
    return [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in VARIABLE
    ]


def check_one_input(model: nn.Module, function: str) -> None:
    """Raise UsageError unless the network runs on one image input; `function` needs that."""
    names = required_inputs(model)
    if len(names) > 1:
        raise UsageError(
            f"{function} takes networks of one image input; this network's forward takes "
            f"{len(names)} ({', '.join(names)}). Give a part of it that takes images alone, or "
            "wrap it in a module that makes the other inputs from the images"
        )


def _read_signature(model: nn.Module) -> inspect.Signature | None:
    """Read the signature of `forward`; None where Python cannot tell, as for compiled code."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
