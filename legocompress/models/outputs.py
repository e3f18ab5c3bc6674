"""What is in the output of a network: tensors in containers of any kind, beside other values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Path = tuple[str | int, ...]


def flatten_tensors(output: Any) -> list[Tensor]:
    """List all tensors in an output, in order.

    They may be nested in mappings, lists, tuples, dataclasses, and containers that are registered
    with PyTorch's pytree.
    """
    return [leaf for _, leaf in flatten_leaves(output) if isinstance(leaf, Tensor)]


def flatten_float_tensors(output: Any) -> list[Tensor]:
    """List the floating-point tensors in an output, in order."""
    return [tensor for tensor in flatten_tensors(output) if tensor.is_floating_point()]


def flatten_leaves(output: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield everything in an output that is not a container, each with the keys that lead to it."""
    members = list_members(output)
    if members is not None:
        for key, member in members:
            yield from flatten_leaves(member, (*path, key))
        return
    leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
    if len(leaves) == 1 and leaves[0] is output:
        yield path, output
        return
    for number, leaf in enumerate(leaves):  # a container that somebody has registered
        yield from flatten_leaves(leaf, (*path, number))


def list_members(value: Any) -> list[tuple[str | int, Any]] | None:
    """List the members of a mapping, list, tuple or dataclass with their keys; None for others."""
    if isinstance(value, Mapping):
        return [(key if isinstance(key, int) else str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return None


def list_container_types(output: Any) -> list[type]:
    """List the types of all containers in an output, in order."""
    members = list_members(output)
    if members is None:
        return []
    return [type(output), *(t for _, part in members for t in list_container_types(part))]


def simplify(output: Any) -> Any:
    """Return an output in plain containers: dataclasses, named tuples and the like become dicts."""
    members = list_members(output)
    if members is None:
        return output
    if isinstance(output, list):
        return [simplify(part) for _, part in members]
    if type(output) is tuple:
        return tuple(simplify(part) for _, part in members)
    return {key: simplify(part) for key, part in members}


def is_list_of_results(output: Any) -> bool:
    """Whether an output is a list of one mapping per image, as detectors return it."""
    return isinstance(output, list) and any(isinstance(part, Mapping) for part in output)


def find_logits(output: Any, n_images: int) -> Tensor | None:
    """Return the logits (N, classes) in an output, or None where no tensor is surely that.

    The logits are the output itself or the first floating-point tensor (N, C) in it. In a mapping
    whose type gives no order of importance (not a dataclass) this tensor must be the only one.
    A list of results per image, as detectors return it, has no logits.
    """
    if is_list_of_results(output):
        return None
    candidates = [
        tensor
        for tensor in flatten_float_tensors(output)
        if tensor.dim() == 2 and len(tensor) == n_images
    ]
    is_ordered = not isinstance(output, Mapping) or is_dataclass(output)
    return candidates[0] if candidates and (is_ordered or len(candidates) == 1) else None


def describe_output(output: Any) -> str:
    """Describe an output in an error message: the shape of a tensor, else the type with shapes."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    shapes = [str(tuple(tensor.shape)) for tensor in flatten_tensors(output)]
    more = ", ..." if len(shapes) > 4 else ""
    held = f" of {', '.join(shapes[:4])}{more}" if shapes else " without tensors"
    return f"a {type(output).__name__}{held}"
