"""Find weights that something else in the network holds, too; replacing one would untie them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class _Holding:
    """One place that holds a tensor, and the bytes of the storage that the tensor covers."""

    layer: int  # id of the module
    attribute: str
    name: str  # of the module and attribute, for the user
    start: int
    end: int


def find_shared_weights(model: nn.Module) -> dict[int, str]:
    """Find the layers whose weight is held elsewhere, too: id of the layer -> names of the holders.

    Holders are parameters and buffers of any module, under any name, and tensors in plain
    attributes, lists, dicts and `functools.partial`. They share a weight if they are the same
    tensor, or views of one storage that overlap. A module with two names holds its weight once.
    """
    holdings: dict[int, list[_Holding]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for attribute, tensor in _list_tensors(module):
            if is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel():
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            start, end = _covered_bytes(tensor)
            storage = tensor.untyped_storage()._cdata
            holdings[storage].append(_Holding(id(module), attribute, name, start, end))
    shared = {}
    for group in holdings.values():
        for weight in group:
            others = [
                other.name
                for other in group
                if other is not weight and other.start < weight.end and weight.start < other.end
            ]
            if weight.attribute == "weight" and others:
                shared[weight.layer] = ", ".join(dict.fromkeys(others))
    return shared


def _list_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a module holds itself, with the attribute that holds it."""
    registered = ("_parameters", "_buffers")
    for kind in registered:
        for attribute, tensor in module.__dict__[kind].items():
            if tensor is not None:
                yield attribute, tensor
    for attribute, value in module.__dict__.items():
        if attribute not in registered:
            for tensor in _tensors_in(value, depth=3):
                yield attribute, tensor


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors in a value, down to `depth` containers in each other; modules are not."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for part in _parts(value):
            yield from _tensors_in(part, depth - 1)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [*value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


def _covered_bytes(tensor: Tensor) -> tuple[int, int]:
    """The first byte of the storage that a tensor covers, and the one after the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + length) * tensor.element_size()
