"""Overrides set what their path names."""

from __future__ import annotations

import pytest

from legocompress.errors import RecipeError
from legocompress.finetune.recipe_loading import load_recipe


def test_overrides_set_what_their_path_names() -> None:
    changes = ["optimizer.lr=1e-2", "stages.0.epochs=5", "stages.0.rates.proxies=3",
               "ema.decay=0.9", "distill=null", "distill.labels=0.5", "schedule.name=poly",
               "optimizer.options={eps: 1}", "data.dataset=torch/cifar10"]  # fmt: skip
    settings = load_recipe("demo", changes)
    assert settings.optimizer.lr == 0.01
    assert settings.stages[0].epochs == 5
    assert settings.stages[0].rates.proxies == 3
    assert settings.ema is not None
    assert settings.ema.decay == 0.9
    assert settings.distill is not None
    assert (settings.distill.labels, settings.distill.logits) == (0.5, 0.9)  # the default, afresh
    assert settings.optimizer.options == {"eps": 1}
    assert settings.data.dataset == "torch/cifar10"
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
def test_an_invalid_override_is_refused(change: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [change])
    assert words in str(caught.value)
