"""`recipes` on the command line."""

from __future__ import annotations

import json

import yaml

import legocompress as lego
from legocompress.finetune.recipe_loading import list_shipped_recipes
from tests.support.command_line import Run


def test_recipes_are_listed_and_shown(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    assert all(name in out for name in list_shipped_recipes())
    code, out, _ = run("recipes", "fashion-mnist")
    assert lego.Recipe(**yaml.safe_load(out)) == lego.load_recipe("fashion-mnist")
    code, out, _ = run("recipes", "--json")
    assert sorted(json.loads(out)) == list_shipped_recipes()
    code, out, _ = run("recipes", "demo", "--json")
    assert json.loads(out)["stages"][0]["epochs"] == 6
    assert run("recipes", "none")[0] == 2
