"""Refuse networks that a step cannot take: wrapped, compiled, scripted, lazy or quantised ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from legocompress.errors import QuantizationError, UsageError
from legocompress.state.model_state import quantization_of

# Wrappers of torch by name of their class, since importing some of them takes seconds. A network
# in a wrapper has other layer names, which neither a plan nor a checkpoint of the network fits.
WRAPPED_AS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}


def check_network(model: Any) -> None:
    """Check that a network is a plain module whose weights exist.

    Raises:
        UsageError: it is wrapped, compiled or scripted, or a layer of it is lazy.
    """
    refuse_wrapper(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            layer = name.rpartition(".")[0]
            raise UsageError(
                f"layer {layer!r} is lazy and has no weights yet; run the network once on an input "
                "before"
            )


def refuse_wrapper(model: Any) -> None:
    """Check that a network is a plain module, neither wrapped nor compiled code.

    Raises:
        UsageError: it is a wrapper (such as DataParallel or a network from torch.compile) or holds
            one, or it is scripted, traced, or no module at all.
    """
    if isinstance(model, functools.partial):
        raise UsageError(
            "the network is a functools.partial; pass the nn.Module inside it, and further "
            "arguments as example_input=(image, ...)"
        )
    if not isinstance(model, nn.Module):
        raise UsageError(f"the network is a {type(model).__name__}; pass an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"the network is scripted or traced ({type(model).__name__}), so its layers cannot be "
            "replaced; pass the Python network that it was made from"
        )
    for name, module in model.named_modules():
        kind = _find_wrapper(module)
        if kind is not None:
            where = f"layer {name!r}" if name else "the network"
            action = (
                f"put its .{WRAPPED_AS[kind]} in its place"
                if name
                else (f"pass its .{WRAPPED_AS[kind]}")
            )
            raise UsageError(f"{where} is {_describe(kind)}; {action}, and wrap the result again")


def refuse_quantized(model: nn.Module, what: str) -> None:
    """Check that a network is not quantised.

    Args:
        model: the network.
        what: the function that cannot take a quantised one, for the error.

    Raises:
        QuantizationError: it is.
    """
    if quantization_of(model) is not None:
        raise QuantizationError(
            f"{what} takes a network in fp32, and this one is quantised; do it before quantize_, "
            "or call unquantize_ to take the fp32 network with rounded weights behind it"
        )


def _find_wrapper(module: nn.Module) -> str | None:
    """The name of the wrapper class of torch that a module is an instance of."""
    for cls in type(module).__mro__:
        if cls.__name__ in WRAPPED_AS and cls.__module__.startswith("torch."):
            return cls.__name__
    return None


def _describe(kind: str) -> str:
    if kind == "OptimizedModule":
        return "compiled by torch.compile"
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
