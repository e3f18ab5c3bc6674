"""`recipes`: list the shipped recipes for fine-tuning, or show one."""

from __future__ import annotations

import click

from legocompress.finetune.recipe_loading import list_shipped_recipes, load_recipe

from . import render
from .help import SectionedCommand
from .options import json_option


@click.command(cls=SectionedCommand)
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the shipped recipes, or show all settings of NAME (shipped, or a .yaml file)."""
    if name is not None:
        render.print_recipe(load_recipe(name), as_json)
        return
    shipped = {each: load_recipe(each) for each in list_shipped_recipes()}
    if as_json:
        render.print_json({each: r.model_dump(mode="json") for each, r in shipped.items()})
        return
    rows = [[each, str(r.epochs), r.description] for each, r in shipped.items()]
    render.print_table(["recipe", "epochs", "note"], rows)
