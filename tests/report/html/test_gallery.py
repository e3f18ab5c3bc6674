"""Which layers' filters are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from legocompress.errors import UsageError
from legocompress.report.html.gallery import (
    check_original,
    draw_all_filters,
    draw_pairs,
    is_original,
)
from legocompress.report.html.pictures import draw_weight
from tests.support.pages import make_pair


def test_pictures_stop_at_their_budget() -> None:
    _, model, report = make_pair()
    whole = draw_all_filters(model, report.rows, 10**6)
    assert [item.row.name for item in whole] == ["layer1", "layer2"]
    assert all(item.drawn is not None for item in whole)
    some = draw_all_filters(model, report.rows, 10)
    assert [item.drawn is None for item in some] == [False, True]


def test_the_first_layer_and_the_worst_are_compared() -> None:
    original, model, report = make_pair()
    rows = [replace(report.rows[1], weight_error=0.0), replace(report.rows[2], weight_error=0.9)]
    first, worst = draw_pairs(model, original, rows)
    assert (first.row.name, worst.row.name) == ("layer1", "layer2")
    assert first.whole == (16, 8)
    assert first.shown == (15, 8)
    weight = original.get_submodule("layer1").weight.detach()
    scale = float(torch.quantile(weight[:15].abs().flatten(), 0.99))
    change = model.get_submodule("layer1").weight.detach() - weight
    pictures = dict(first.parts)
    assert pictures["original"] == draw_weight(weight, scale)
    assert pictures["difference"] == draw_weight(change, scale)
    assert draw_pairs(model, None, rows) == []


def test_another_network_is_not_the_original() -> None:
    original, model, _ = make_pair()
    assert is_original(model, original)
    check_original(model, original)
    original.layer2 = torch.nn.Conv2d(16, 16, 3)
    assert not is_original(model, original)
    with pytest.raises(UsageError, match=r"'layer2' has a weight of shape \(16, 16, 3, 3\)"):
        check_original(model, original)
