"""Plans: what is replaced, what stays dense and why, in which order, at what cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from legocompress.compress.convert import convert_
from legocompress.compress.planning import plan
from legocompress.errors import PatternError, PlanError
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec
from tests.support.planning import (
    IMAGE,
    assert_sums_to,
    assert_untouched,
    net,
    row,
    small,
    snapshot,
)


def test_resnet50_has_the_numbers_of_the_paper() -> None:
    model = timm.create_model("resnet50", pretrained=False)
    made = plan(model, LegoSpec(m=0.5, o=2))
    assert made.input_shape == (1, 3, 224, 224)
    assert made.note is None
    assert_sums_to(made, model)
    dense = sum(r.dense_params for r in made.rows) + made.other_params
    after = sum(r.params for r in made.rows) + made.other_params
    assert dense == 25_557_032
    assert after / 1e6 == pytest.approx(8.03, abs=0.005)
    assert sum(r.dense_macs or 0 for r in made.rows) / 1e9 == pytest.approx(4.09, rel=0.01)
    assert sum(r.macs or 0 for r in made.rows) / 1e9 == pytest.approx(2.13, rel=0.01)
    assert made.skipped.keys() == {"conv1", "fc"}
    assert len(made.layers) == 52
    assert all(r.bits < r.dense_bits for r in made.layers.values())


def test_what_was_converted_has_the_size_that_was_planned() -> None:
    model = net(nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, groups=2), nn.Conv2d(12, 8, 1))
    made = small(model, m=0.5, o=3, k=2, rules=["3:coefficients=false"])
    assert made.layers.keys() == {"2", "3"}
    converted = convert_(copy.deepcopy(model), made)
    total = sum(p.numel() for p in converted.parameters())
    assert total == sum(r.params for r in made.rows) + made.other_params
    for name, planned in made.layers.items():
        layer: Any = converted.get_submodule(name)
        coefficients = 0 if layer.coefficients is None else layer.coefficients.numel()
        bits = (layer.lego_shape.n_lego - 1).bit_length()
        assert planned.params == layer.lego_filters.numel() + coefficients
        assert planned.bits == (
            32 * layer.lego_filters.numel() + bits * layer.index.numel() + 16 * coefficients
        )


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0"])
def test_planning_touches_nothing(name: str) -> None:
    model = timm.create_model(name, pretrained=False).train()
    list(model.children())[1].eval()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight.requires_grad_(False)
    before = snapshot(model)
    image, random = torch.randn(1, 3, 32, 32), torch.get_rng_state()
    small(model, image=image)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_planning_touches_nothing_where_the_network_changes_its_own_buffers() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.body = net(nn.Conv2d(16, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.body(x)

    model = Counts()
    before = snapshot(model)
    assert small(model).layers.keys() == {"body.1"}
    assert_untouched(model, before)


def test_tied_weights_stay_dense_and_count_once() -> None:
    model: Any = net(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    model[2].weight = model[1].weight
    made = small(model)
    assert made.skipped["1"] == "its weight is shared: with 2.weight"
    assert made.skipped["2"] == "its weight is shared: with 1.weight"
    assert row(made, "1").dense_macs == 16 * 16 * 9 * 36
    assert row(made, "2").dense_macs == 16 * 16 * 9 * 16
    assert made.layers.keys() == {"3"}
    assert_sums_to(made, model)


@pytest.mark.parametrize("settings", [{"rules": ["0:m=0.25"]}, {"only": ["0"], "m": 0.25}])
def test_an_exact_name_takes_the_stem_in(settings: dict[str, Any]) -> None:
    made = small(net(nn.Conv2d(16, 8, 3)), o=3, **settings)
    assert made.layers["0"].shape == UnitShape(16, 3, (3, 3), 1, 4, 3, 1)
    assert small(net(nn.Conv2d(16, 8, 3)), only=["*"]).skipped["0"].startswith("stem")


def test_linear_layers_are_taken_in_on_request() -> None:
    model = net(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(576, 10))
    unit = UnitShape(10, 576, (1, 1), 1, 5, 2, 1)
    assert small(model, linear=True).layers["3"].shape == unit
    assert small(model, only=["3"]).layers["3"].shape == unit
    assert small(model, only=["3"]).layers.keys() == {"3"}
    assert small(model).skipped["3"].startswith("Linear")


def test_a_network_of_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    with pytest.raises(PlanError, match=r"Sequential has no Conv2d.*--linear"):
        small(model, image=torch.zeros(1, 16))
    assert small(model, image=torch.zeros(1, 16), linear=True).layers.keys() == {"0", "1"}


def test_a_network_without_any_layer_has_nothing_to_convert() -> None:
    with pytest.raises(PlanError, match="nothing to convert"):
        small(nn.Sequential(nn.ReLU()))
    with pytest.raises(PlanError, match="nothing to convert"):
        small(nn.Sequential(nn.ReLU()), linear=True)


def test_only_and_skip_choose_and_say_so() -> None:
    model = net(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 1))
    made = small(model, only=["1", "2"], skip=["2"])
    assert made.layers.keys() == {"1"}
    assert made.skipped["2"] == "skipped by name"
    assert made.skipped["3"] == "not named by --only"


def test_a_pattern_that_matches_no_layer_is_an_error() -> None:
    with pytest.raises(PatternError, match=r"--skip pattern 'layer9\.\*' matches none"):
        small(net(nn.Conv2d(16, 8, 3)), skip=["layer9.*"])


def test_rules_change_single_layers_and_the_first_wins() -> None:
    model = net(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    made = small(
        model, rules=["2:m=0.25,o=4,k=3", "[12]:o=8,coefficients=false,dtype=bf16"], m=0.5, o=2
    )
    assert made.layers["1"].shape == UnitShape(16, 16, (3, 3), 1, 8, 8, 1)
    assert made.layers["2"].shape == UnitShape(16, 16, (3, 3), 1, 4, 4, 3)
    assert made.layers["3"].shape == UnitShape(16, 16, (3, 3), 1, 8, 2, 1)
    assert made.layers["1"].params == 8 * 2 * 9
    assert made.layers["1"].bits == 8 * 2 * 9 * 16 + 128 * 3
    assert made.layers["2"].params == 4 * 4 * 9 + 4 * 16 * 3
    assert made.layers["2"].bits == 4 * 4 * 9 * 32 + 4 * 16 * 3 * (2 + 16)


def test_all_skipped_is_a_plan_but_no_conversion() -> None:
    model = net(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
    made = small(model)
    assert made.layers == {}
    assert made.skipped.keys() == {"0", "1"}
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"no layer can be converted: .*1 x depthwise"):
        convert_(model, made)
    assert_untouched(model, before)


def test_a_conv_that_runs_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)
            self.same = nn.Conv2d(16, 16, 3, padding=1)
            self.alias = self.same

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.same(self.stem(x)))

    model = Twice()
    made = small(model)
    assert made.layers.keys() == {"same"}
    assert made.layers["same"].dense_macs == 2 * 16 * 16 * 9 * 64
    assert made.layers["same"].macs == 2 * (8 * 16 * 9 + 32) * 64
    assert_sums_to(made, model)


def test_macs_scale_with_the_input() -> None:
    model = net(nn.Conv2d(16, 16, 3))
    one, four = small(model), small(model, image=torch.zeros(2, 3, 10, 14))
    assert one.layers["1"].dense_macs == 2304 * 36
    assert four.layers["1"].dense_macs == 2304 * 2 * 8 * 12
    assert four.input_shape == (2, 3, 10, 14)


def test_a_layer_that_does_not_run_has_unknown_macs() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(16, 16, 3)
            self.body = net(nn.Conv2d(16, 16, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    made = small(Unused())
    assert [r.name for r in made.rows] == ["body.0", "body.1", "head"]
    assert row(made, "head").dense_macs is None
    assert row(made, "head").macs is None
    assert row(made, "head").converted


def test_a_network_that_refuses_images_is_planned_with_a_note() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(16, 16, 3)
            self.b = nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("tokens only")

    model = Tokens()
    made = plan(model)
    assert made.note is not None
    assert "ValueError: tokens only" in made.note
    assert made.input_shape is None
    assert made.skipped == {"a": "stem: it sees the image"}
    assert made.layers["b"].dense_macs is None
    assert_sums_to(made, model)


def test_an_example_input_that_fails_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        small(net(nn.Conv2d(16, 16, 3)), image=torch.zeros(1, 5, 8, 8))


def test_several_arguments_are_given_as_a_tuple() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(nn.Conv2d(16, 16, 3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.body(x + y)

    made = small(Pair(), image=(IMAGE, IMAGE))
    assert made.input_shape == (1, 3, 8, 8)
    assert made.layers["body.1"].dense_macs == 2304 * 36


def test_a_converted_network_cannot_be_planned_again() -> None:
    model = net(nn.Conv2d(16, 16, 3))
    convert_(model, small(model))
    with pytest.raises(PlanError, match="holds Lego modules already"):
        small(model)


def test_a_training_form_is_planned_as_its_deployed_form() -> None:
    model = timm.create_model("repvgg_a0", pretrained=False)
    image = torch.zeros(1, 3, 32, 32)
    made = small(model, image=image)
    deployed = reparameterize_model(copy.deepcopy(model).eval())
    alone = small(deployed, image=image)
    assert made.reparameterize
    assert all("reparam_conv" in name or name == "head.fc" for name in (r.name for r in made.rows))
    assert made.rows == alone.rows
    assert_sums_to(made, deployed)


def test_a_fuse_method_from_elsewhere_is_left_alone() -> None:
    class Fuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(nn.Conv2d(16, 16, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

        def fuse(self) -> None:
            raise AssertionError("must not be called")

    assert not small(Fuses()).reparameterize
