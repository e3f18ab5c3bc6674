"""Documents that scripts read: JSON and YAML."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
import yaml

from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.finetune.recipe import Recipe


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def print_plan_json(plan: Plan) -> None:
    """Print a plan as JSON: the spec, one entry per layer, and the totals of all other parts."""
    print_json(
        {
            "spec": plan.spec.model_dump(mode="json"),
            "layers": [_layer_values(row) for row in plan.rows],
            "other_params": plan.other_params,
            "other_bits": plan.other_bits,
            "proxy_bytes": plan.proxy_bytes,
            "input_shape": plan.input_shape,
            "reparameterize": plan.reparameterize,
            "note": plan.note,
        }
    )


def _layer_values(row: LayerPlan) -> dict[str, Any]:
    return {
        **asdict(row),
        "spec": None if row.spec is None else row.spec.model_dump(mode="json"),
        "params": row.params,
        "bits": row.bits,
        "macs": row.macs,
        "proxy_params": row.proxy_params,
    }


def print_recipe(recipe: Recipe, as_json: bool) -> None:
    """Print a recipe with all its defaults, as JSON or as YAML that can be loaded again."""
    values = recipe.model_dump(mode="json")
    if as_json:
        print_json(values)
    else:
        click.echo(yaml.safe_dump(values, sort_keys=False), nl=False)
