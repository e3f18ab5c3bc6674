"""Every fault of a recipe is reported, with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from legocompress.errors import RecipeError
from legocompress.finetune.recipe_loading import load_recipe

GOOD = "optimizer: {lr: 0.1}\nstages: [{epochs: 1}]\n"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_fault_is_reported_with_its_path(tmp_path: Path) -> None:
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
def test_an_invalid_recipe_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^recipe ") as caught:
        load_recipe(write(tmp_path / "r.yaml", text))
    assert words in str(caught.value)
