"""Read a recipe: a shipped one by name, or a YAML file, with the user's overrides applied."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from legocompress.errors import RecipeError
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.recipe_faults import explain_faults
from legocompress.finetune.recipe_overrides import apply_override_

MAX_RECIPE_BYTES = 2**20


def list_shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in files("legocompress.recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def load_recipe(name: str, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe by the name of a shipped one or from a YAML file.

    Args:
        name: such as `fashion-mnist`, or a path that ends in .yaml or .yml.
        changes: `dotted.path=value` each, the value as YAML: `optimizer.lr=0.01`,
            `stages.0.epochs=2`, `ema=null`.

    Raises:
        RecipeError: there is no such recipe, or it is not valid; the message lists every fault.
    """
    values = _parse_yaml(name, _read_text(name))
    for change in changes:
        apply_override_(values, change)
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise RecipeError(f"recipe {name!r}: {explain_faults(error)}") from None


def _read_text(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        shipped = list_shipped_recipes()
        if name in shipped:
            return (files("legocompress.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        raise RecipeError(
            f"no recipe is called {name!r}; shipped are {', '.join(shipped)}, or give "
            "the path of a .yaml file"
        )
    try:
        if Path(name).stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"recipe {name!r} is larger than {MAX_RECIPE_BYTES:,} bytes")
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name!r} cannot be read: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys; plain YAML would silently keep the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = [key for key in keys if keys.count(key) > 1]
        if duplicates:
            raise yaml.YAMLError(f"key {duplicates[0]!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _parse_yaml(name: str, text: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"recipe {name!r} is not valid YAML: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"recipe {name!r} is not a YAML mapping of settings")
    return values
