"""A weight that anything else holds is found, whatever holds it; a tied bias stays tied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress.compress.convert import convert_
from legocompress.compress.planning import plan
from legocompress.compress.sharing import find_shared_weights
from legocompress.errors import ConversionError
from legocompress.lego.module import LegoModule, lego_modules

IMAGE = torch.zeros(1, 3, 12, 12)


class Net(nn.Module):
    """A stem and two convs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.a = nn.Conv2d(16, 16, 3)
        self.b = nn.Conv2d(16, 16, 3)
        self.extra: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x)))


class Adapted(nn.Module):
    """A conv with a low-rank update that holds the weight itself, as adapters (LoRA) do."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.weight = conv, conv.weight
        self.down = nn.Parameter(torch.zeros(2, conv.weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(len(conv.weight), 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + (self.up @ self.down).view_as(self.weight))


def tie_to_layer(model: Net) -> None:
    model.b.weight = model.a.weight


def tie_to_raw_parameter(model: Net) -> None:
    model.tied = model.a.weight


def register_twice(model: Net) -> None:
    model.a.again = model.a.weight  # type: ignore[assignment]


def view_in_a_parameter(model: Net) -> None:
    model.part = nn.Parameter(model.a.weight.data[8:])


def hold_in_a_buffer(model: Net) -> None:
    model.register_buffer("flat", model.a.weight.data.flatten())


def hold_in_a_parameter_list(model: Net) -> None:
    model.some = nn.ParameterList([model.a.weight])


def hold_in_an_adapter(model: Net) -> None:
    model.a = Adapted(model.a)  # type: ignore[assignment]


def hold_in_a_list(model: Net) -> None:
    model.extra = {"all": [model.a.weight]}


def hold_in_a_partial(model: Net) -> None:
    model.extra = functools.partial(F.conv2d, weight=model.a.weight)


@pytest.mark.parametrize(
    ("tie", "name", "other"),
    [
        (tie_to_layer, "a", "b.weight"),
        (tie_to_raw_parameter, "a", "tied"),
        (register_twice, "a", "a.again"),
        (view_in_a_parameter, "a", "part"),
        (hold_in_a_buffer, "a", "flat"),
        (hold_in_a_parameter_list, "a", "some.0"),
        (hold_in_an_adapter, "a.conv", "a.weight"),
        (hold_in_a_list, "a", "extra"),
        (hold_in_a_partial, "a", "extra"),
    ],
)
def test_a_shared_weight_stays_dense_and_names_its_other_holder(
    tie: Callable[[Net], None], name: str, other: str
) -> None:
    model = Net()
    tie(model)
    made = plan(model, example_input=IMAGE)
    assert made.skipped[name] == f"its weight is shared: with {other}"
    assert list(made.layers) == ([] if tie is tie_to_layer else ["b"])


def test_a_weight_that_was_tied_after_the_plan_is_refused_before_anything_changes() -> None:
    model = Net()
    made = plan(model, example_input=IMAGE)
    assert list(made.layers) == ["a", "b"]
    model.tied = model.b.weight
    with pytest.raises(ConversionError, match=r"'b' cannot be converted: .*with tied; make a new"):
        convert_(model, made)
    assert list(lego_modules(model)) == []
    assert model.tied is model.b.weight


def test_weights_that_are_apart_in_one_storage_are_not_shared() -> None:
    model = Net()
    flat = torch.randn(2, 16, 16, 3, 3)
    model.a.weight, model.b.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    assert find_shared_weights(model) == {}
    model.b.weight = nn.Parameter(flat[0])  # another parameter of the same values
    assert find_shared_weights(model) == {id(model.a): "b.weight", id(model.b): "a.weight"}


def test_a_layer_at_two_names_holds_its_weight_once_and_converts() -> None:
    model = Net()
    model.b = model.a
    made = plan(model, example_input=IMAGE)
    assert list(made.layers) == ["a"]
    convert_(model, made)
    assert model.a is model.b
    assert isinstance(model.b, LegoModule)


def test_shared_weights_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    assert find_shared_weights(model) == {}
    tie_to_raw_parameter(model)
    assert find_shared_weights(model) == {id(model.a): "tied"}


def test_a_tied_bias_stays_tied_and_learns_from_both() -> None:
    torch.manual_seed(0)
    model: Any = Net()
    model.b.bias = model.a.bias
    model.offset = model.a.bias
    convert_(model, plan(model, example_input=IMAGE))
    assert [name for name, _ in lego_modules(model)] == ["a", "b"]
    assert model.a.bias is model.b.bias is model.offset
    model(torch.randn(1, 3, 12, 12)).sum().backward()
    gradient = model.offset.grad.clone()
    with torch.no_grad():
        model.offset -= 0.1 * gradient
    assert gradient.abs().max() > 0
    assert model.a.bias.data_ptr() == model.b.bias.data_ptr()
