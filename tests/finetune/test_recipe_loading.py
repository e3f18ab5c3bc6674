"""Recipes are read from the package and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from legocompress.errors import RecipeError
from legocompress.finetune.recipe_loading import list_shipped_recipes, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = ["cifar10-paper", "demo", "fashion-mnist", "finetune-small-data", "imagenet-full",
         "imagenet-short"]  # fmt: skip


def test_the_shipped_recipes_are_listed() -> None:
    assert list_shipped_recipes() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# legocompress finetune CKPT --recipe {name} ")
    assert " --data-dir " in first


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_written_back_is_the_same(name: str, tmp_path: Path) -> None:
    settings = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_recipe(str(path)) == settings
    assert settings.description


def test_the_imagenet_recipes_are_as_long_as_they_say() -> None:
    assert 9 <= load_recipe("imagenet-short").epochs <= 18
    assert load_recipe("cifar10-paper").epochs == 400


@pytest.mark.parametrize("name", ["no-such", "demo.yaml", "/nowhere/x.yml"])
def test_a_missing_recipe_is_reported(name: str) -> None:
    with pytest.raises(RecipeError, match=r"demo|cannot be read"):
        load_recipe(name)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(RecipeError, match="larger"):
        load_recipe(str(path))
