"""Which layers compute as PyTorch's own classes do: only these may run by other routes."""

from __future__ import annotations

from timm.layers import Conv2dSame
from torch import nn

# The classes whose computation this package writes in other forms. A subclass comes first.
PLAIN_CLASSES: tuple[type[nn.Module], ...] = (Conv2dSame, nn.Conv2d, nn.Linear)
# What a call of a layer passes through, from the call itself to the convolution.
METHODS = (
    "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__", "forward",
    "_conv_forward",
)  # fmt: skip
# What the computation reads from the instance, so a class must not define it.
ATTRIBUTES = (
    "weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode",
    "_reversed_padding_repeated_twice",
)  # fmt: skip


class Replacement:
    """Base of callables that replace a method on one instance, until `to_dense_` removes them."""


def is_plain_class(cls: type[nn.Module]) -> bool:
    """Whether a class computes exactly as nn.Conv2d, timm's Conv2dSame or nn.Linear does.

    A subclass may have a constructor and other methods of its own, but nothing that a call passes
    through.
    """
    base = next((plain for plain in PLAIN_CLASSES if issubclass(cls, plain)), None)
    if base is None or any(hasattr(cls, name) for name in ATTRIBUTES):
        return False
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in METHODS)


def has_replaced_method(layer: nn.Module) -> bool:
    """Whether somebody has replaced, on this instance, a method that its calls pass through."""
    replaced = (layer.__dict__.get(name) for name in METHODS)
    return any(method is not None and not isinstance(method, Replacement) for method in replaced)


def is_plain_parameter(value: object) -> bool:
    """Whether a value is an nn.Parameter and not a tensor subclass with operations of its own."""
    return type(value) is nn.Parameter
