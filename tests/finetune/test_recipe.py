"""Recipes: shipped ones load, every fault is told with its path, overrides go where they point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from legocompress.errors import RecipeError
from legocompress.finetune.recipe import Recipe, Stage
from legocompress.finetune.recipe_loading import list_shipped_recipes, load_recipe
from tests.support.tiny import recipe

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = ["cifar10-paper", "demo", "fashion-mnist", "finetune-small-data", "imagenet-full",
         "imagenet-short"]  # fmt: skip


def test_these_are_shipped() -> None:
    assert list_shipped_recipes() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# legocompress finetune CKPT --recipe {name} ")
    assert " --data-dir " in first


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_written_back_is_the_same(name: str, tmp_path: Path) -> None:
    found = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(found.model_dump(mode="json")))
    assert load_recipe(str(path)) == found
    assert found.description


def test_the_imagenet_recipes_are_as_long_as_they_say() -> None:
    assert 9 <= load_recipe("imagenet-short").epochs <= 18
    assert load_recipe("cifar10-paper").epochs == 400


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


GOOD = "optimizer: {lr: 0.1}\nstages: [{epochs: 1}]\n"


def test_every_fault_is_told_with_its_path(tmp_path: Path) -> None:
    name = write(
        tmp_path / "r.yaml",
        "optimizer: {lrr: 1, weight_decay: -1}\nstages:\n  - {epochs: 0, rates: {proxys: 2}}\n"
        "batch: 7\nema: {decay: 1.5}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    text = str(caught.value)
    for fault in (
        "7 faults",
        "optimizer.lr: is needed",
        "optimizer.lrr: unknown key; did you mean 'lr'?",
        "optimizer.weight_decay: -1: input should be greater than or equal to 0",
        "stages.0.epochs: 0",
        "stages.0.rates.proxys: unknown key; did you mean 'proxies'?",
        "batch: unknown key; did you mean 'batch_size'?",
        "ema.decay: 1.5",
    ):
        assert fault in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [{epochs: 1}]", "optimizer: is needed"),
        (GOOD + "stages: [{epochs: 1, indices: frozen}, {epochs: 1}]", "given twice"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("- 1\n", "not a YAML mapping"),
        ("3", "not a YAML mapping"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "is not valid YAML"),
        ("? [a]\n: 1", "is not valid YAML"),
        ("1: 2", "not a YAML mapping"),
        ("optimizer: {lr: .inf}\nstages: [{epochs: 1}]", "optimizer.lr"),
        (GOOD + "mixup: {prob: 1}", "mixup and cutmix are both 0"),
        (GOOD + "distill: {logits: 0}", "logits and features are both 0"),
        (GOOD + "batch_size: 10\naccumulate: 4", "not a multiple"),
        (GOOD + "schedule: {warmup_epochs: 1}", "leaves nothing of 1 epochs"),
        (GOOD + "distill: {labels: 0}\nlabel_smoothing: 0.1", "no labels to smooth"),
        ("optimizer: {lr: 1}\nstages: [{epochs: 1, indices: frozen}, {epochs: 1}]", "stay so"),
        ("optimizer: {lr: 1}\nstages: [{epochs: 1, rates: {proxies: 0}}]", "indices: frozen"),
        ("optimizer: {lr: 1}\nstages: []", "stages"),
    ],
)
def test_a_recipe_that_may_not_be(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^recipe ") as caught:
        load_recipe(write(tmp_path / "r.yaml", text))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["no-such", "demo.yaml", "/nowhere/x.yml"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(RecipeError, match=r"demo|cannot be read"):
        load_recipe(name)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="larger"):
        load_recipe(write(tmp_path / "r.yaml", " " * (2**20 + 1)))


def test_overrides_go_where_they_point() -> None:
    changes = ["optimizer.lr=1e-2", "stages.0.epochs=5", "stages.0.rates.proxies=3",
               "ema.decay=0.9", "distill=null", "distill.labels=0.5", "schedule.name=poly",
               "optimizer.options={eps: 1}", "data.dataset=torch/cifar10"]  # fmt: skip
    found = load_recipe("demo", changes)
    assert found.optimizer.lr == 0.01
    assert found.stages[0].epochs == 5
    assert found.stages[0].rates.proxies == 3
    assert found.ema is not None
    assert found.ema.decay == 0.9
    assert found.distill is not None
    assert (found.distill.labels, found.distill.logits) == (0.5, 0.9)  # the default, afresh
    assert found.optimizer.options == {"eps": 1}
    assert found.data.dataset == "torch/cifar10"
    assert load_recipe("demo", ["distill=null"]).distill is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lr", "dotted.path=value"),
        ("=3", "dotted.path=value"),
        ("optimizer.lrr=3", "optimizer.lrr: unknown key"),
        ("stages.7.epochs=3", "entries 0 to 1"),
        ("stages.x.epochs=3", "entries 0 to 1"),
        ("batch_size.x=3", "batch_size has no parts"),
        ("batch_size=[", "not valid YAML"),
        ("batch_size=many", "batch_size: 'many'"),
        ("a.b.c=1", "a: unknown key"),
    ],
)
def test_an_override_that_may_not_be(change: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [change])
    assert words in str(caught.value)


def test_the_stage_of_an_epoch() -> None:
    stages = [{"epochs": 2}, {"epochs": 1, "indices": "frozen"}]
    found = recipe(stages=stages)
    assert found.epochs == 3
    assert [found.stage_of(e).indices for e in range(4)] == ["trained"] * 2 + ["frozen"] * 2


def test_recipes_are_frozen_values() -> None:
    found = recipe()
    setting: Any = found
    with pytest.raises(ValueError):
        setting.batch_size = 3
    assert Recipe(**found.model_dump()) == found
    assert Stage(epochs=1) == Stage(epochs=1)
