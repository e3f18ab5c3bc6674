"""Overrides of a recipe's values: `dotted.path=value`, as `--set` takes them."""

from __future__ import annotations

from typing import Any

import yaml

from legocompress.errors import RecipeError


def apply_override_(values: dict[str, Any], change: str) -> dict[str, Any]:
    """Set one `dotted.path=value` in nested mappings and lists, in place.

    A part of the path that is a number selects a list entry. Missing mappings on the way are
    created.

    Raises:
        RecipeError: the change is malformed, or its path does not lead anywhere.
    """
    path, text = _split_change(change)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {change!r}: the value is not valid YAML") from None
    *parents, leaf = path
    container: Any = values
    for depth, part in enumerate(parents):
        key = _find_key(container, part, change, parents[:depth])
        if isinstance(container, dict) and container.get(key) is None:
            container[key] = {}
        container = container[key]
    container[_find_key(container, leaf, change, parents)] = value
    return values


def _split_change(change: str) -> tuple[list[str], str]:
    """The parts of the path, and the value as text."""
    path, equals, text = change.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {change!r} is not of the form dotted.path=value")
    return path.strip().split("."), text


def _find_key(container: Any, part: str, change: str, above: list[str]) -> Any:
    """The key of `container` that one part of a path names; `above` is the path to `container`."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise RecipeError(f"--set {change!r}: {'.'.join(above)} has no parts")
    if not part.isdigit() or int(part) >= len(container):
        raise RecipeError(
            f"--set {change!r}: {'.'.join(above)} has entries 0 to {len(container) - 1}, "
            f"not {part!r}"
        )
    return int(part)
