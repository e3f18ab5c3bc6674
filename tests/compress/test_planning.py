"""Plans: what is replaced, what stays dense and why, in which order, at what cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import CondConv2d, StdConv2d
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

from legocompress.compress.convert import convert_
from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.compress.planning import plan
from legocompress.errors import PatternError, PlanError, SpecError
from legocompress.lego.costs import lego_bits
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec

IMAGE = torch.zeros(1, 3, 8, 8)


def net(*layers: nn.Module) -> nn.Sequential:
    """A stem of 16 channels, then these layers."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers)


def small(
    model: nn.Module, spec: LegoSpec | None = None, image: Any = IMAGE, **settings: Any
) -> Plan:
    return plan(model, spec or LegoSpec(**settings), image)


def row(made: Plan, name: str) -> LayerPlan:
    return next(r for r in made.rows if r.name == name)


def assert_sums_to(made: Plan, model: nn.Module) -> None:
    """The rows and the rest must be the model itself, in numbers and in bits."""
    params = list(model.parameters())
    assert sum(r.dense_params for r in made.rows) + made.other_params == sum(
        p.numel() for p in params
    )
    assert sum(r.dense_bits for r in made.rows) + made.other_bits == sum(
        8 * p.numel() * p.element_size() for p in params
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


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {
        name: (
            type(module),
            module.training,
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return {"state": state, "modules": modules, "grads": grads}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["grads"] == before["grads"]
    assert list(after["state"]) == list(before["state"])
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value)


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


def test_the_stem_is_the_first_conv_that_runs() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(16, 8, 1)
            self.middle = nn.Conv2d(16, 16, 3, padding=1)
            self.first = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    made = small(Reversed())
    assert [r.name for r in made.rows] == ["first", "middle", "last"]
    assert made.skipped == {"first": "stem: it sees the image"}


def test_every_conv_that_sees_the_image_is_a_stem() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(6, 16, 3, padding=1)
            self.b = nn.Conv2d(6, 16, 1)
            self.c = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    made = small(Branches(), image=torch.zeros(1, 6, 8, 8))
    assert made.skipped.keys() == {"a", "b"}
    assert all(reason.startswith("stem") for reason in made.skipped.values())


def test_the_configuration_names_stem_and_classifier() -> None:
    model: Any = net(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 10, 1))
    model.pretrained_cfg = {"first_conv": ("0", "1"), "classifier": "3"}
    made = small(model)
    assert made.skipped == {
        "0": "stem: it sees the image",
        "1": "stem: it sees the image",
        "3": "classifier",
    }


def test_a_conv_classifier_by_torchvisions_naming_stays_dense() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = net(nn.Conv2d(16, 16, 1))
            self.classifier = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 10, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x))

    made = small(Squeeze())
    assert made.skipped == {
        "features.0": "stem: it sees the image",
        "classifier.2": "classifier",
    }


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = CondConv2d(16, 8, 3, padding=1, num_experts=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, torch.full((x.shape[0], 4), 0.25))


class Reshaped(nn.Module):
    """Runs a layer for another number of axes inside a network of images."""

    def __init__(self, layer: nn.Module, *size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(x.shape[0], *self.size))


@pytest.mark.parametrize(
    ("make", "name", "reason", "macs"),
    [
        (lambda: nn.Conv2d(16, 16, 3, groups=16), "1", "depthwise", 16 * 9 * 36),
        (lambda: nn.Conv2d(16, 32, 3, groups=16), "1", "depthwise", 32 * 9 * 36),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 8)),
            "1.1",
            "Linear layer (--linear takes it in)",
            8192,
        ),
        (
            lambda: nn.ConvTranspose2d(16, 8, 2, stride=2),
            "1",
            "ConvTranspose2d is not supported",
            16 * 8 * 4 * 64,
        ),
        (
            lambda: Reshaped(nn.Conv1d(16, 8, 3), 16, 64),
            "1.layer",
            "Conv1d is not supported",
            16 * 8 * 3 * 62,
        ),
        (
            lambda: Reshaped(nn.Conv3d(4, 8, 1), 4, 4, 8, 8),
            "1.layer",
            "Conv3d is not supported",
            4 * 8 * 256,
        ),
        (Routed, "1.mix", "CondConv2d is not supported", 16 * 8 * 9 * 64),
        (
            lambda: parametrizations.weight_norm(nn.Conv2d(16, 8, 3)),
            "1",
            "its weight is computed",
            16 * 8 * 9 * 36,
        ),
    ],
    ids=["depthwise", "multiplier", "linear", "up", "1d", "3d", "cond", "weight-norm"],
)
def test_what_cannot_be_converted_says_why_and_still_costs(
    make: Callable[[], nn.Module], name: str, reason: str, macs: int
) -> None:
    model = net(make())
    made = small(model, only=["*"])
    assert made.skipped[name].startswith(reason)
    assert not row(made, name).converted
    assert row(made, name).dense_macs == row(made, name).macs == macs
    assert_sums_to(made, model)


@pytest.mark.parametrize("exact", [True, False])
def test_a_depthwise_conv_stays_dense_even_where_it_is_named(exact: bool) -> None:
    made = small(net(nn.Conv2d(16, 16, 3, groups=16)), only=["1"] if exact else ["*"])
    assert made.skipped["1"].startswith("depthwise")


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


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.LazyConv2d(8, 3), "2"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(8)), "2.1"),
    ],
    ids=["conv", "linear"],
)
def test_a_lazy_layer_is_left_lazy_and_says_so(make: Callable[[], nn.Module], name: str) -> None:
    model = net(nn.Conv2d(16, 16, 3), make())
    made = small(model)
    assert "lazy" in made.skipped[name]
    assert made.layers.keys() == {"1"}
    assert any(is_lazy(p) for p in model.parameters())


def quantization() -> Any:
    return pytest.importorskip("torch.ao.quantization")


def test_layers_of_quantisation_aware_training_stay_as_they_are() -> None:
    config = quantization().get_default_qat_qconfig()
    model = net(torch.ao.nn.qat.Conv2d(16, 8, 3, qconfig=config), nn.Conv2d(8, 8, 3))
    before = snapshot(model)
    made = small(model)
    assert made.skipped["1"] == "part of a quantised model"
    assert made.layers.keys() == {"2"}
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_layers_of_a_quantised_model_stay_dense() -> None:
    quantization()
    model = net(torch.ao.nn.quantized.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 3))
    assert small(model, image=None).skipped["1"] == "part of a quantised model"


def test_a_subclass_of_conv_is_converted() -> None:
    made = small(net(StdConv2d(16, 8, 3)))
    assert made.layers["1"].type_name == "StdConv2d"


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


@pytest.mark.parametrize("kernel", [1, 3])  # a 1x1 filter is small beside its slots
@pytest.mark.parametrize(("m", "k"), [(0.25, 1), (0.5, 2)])
@pytest.mark.parametrize("channels", [5, 6, 7, 9, 10, 13])
@pytest.mark.parametrize("o", [2, 3, 4, 5])
def test_channels_that_o_does_not_divide_get_the_split_of_fewest_bits(
    o: int, channels: int, m: float, k: int, kernel: int
) -> None:
    model = net(
        nn.Conv2d(16, channels, 1), nn.Conv2d(channels, 16, kernel), nn.Conv2d(16, 60, 1),
        nn.Conv2d(60, 16, 1),
    )  # fmt: skip
    shape = small(model, m=m, o=o, k=k, allow_expansion=True).layers["2"].shape
    assert shape is not None

    def bits(n_split: int) -> int:
        unit = UnitShape(16, channels, (kernel, kernel), 1, round(m * 16), n_split, k)
        return lego_bits(unit, 32, 16)

    if channels % o == 0:
        assert shape.n_split == o
    else:
        assert bits(shape.n_split) == min(bits(s) for s in range(1, o + 1))
    assert (shape.n_lego, shape.n_terms) == (round(m * 16), k)


def test_padding_and_a_smaller_split_both_happen() -> None:
    def split(channels: int, o: int, kernel: int) -> tuple[int, int]:
        model = net(
            nn.Conv2d(16, channels, 1), nn.Conv2d(channels, 64, kernel), nn.Conv2d(64, 60, 1)
        )
        shape = small(model, o=o, m=0.25).layers["2"].shape
        assert shape is not None
        return shape.n_split, shape.width

    assert split(13, 4, 3) == (4, 4)  # padded: narrower filters save more than slots cost
    assert split(13, 4, 1) == (2, 7)  # the other way round: 16*w*32 + 64*o*20 bits
    assert split(6, 4, 3) == (3, 2)  # o = 4 would leave a fragment all padding


def test_an_o_that_divides_nothing_names_values_that_work() -> None:
    model = net(nn.Conv2d(16, 12, 3), nn.Conv2d(12, 12, 3))
    with pytest.raises(SpecError) as error:
        small(model, o=5)
    message = str(error.value)
    assert "o=5 divides the input channels of no layer" in message
    assert "12, 16" in message
    assert message.endswith("values that divide some: 1, 2, 3, 4, 6, 8, 12, 16")


def test_grouped_channels_are_split_inside_their_group() -> None:
    made = small(net(nn.Conv2d(16, 24, 3, groups=4)), o=2)
    assert made.layers["1"].shape == UnitShape(24, 4, (3, 3), 4, 12, 2, 1)
    # Transform m'*c*kh*kw and merge n*o, for 36 pixels.
    assert made.layers["1"].macs == min((12 * 16 * 9 + 48) * 36, 24 * 4 * 9 * 36)


def test_macs_are_never_told_to_rise() -> None:
    made = small(net(nn.Conv2d(16, 16, 1)), m=1, o=1, allow_expansion=True)
    assert made.layers["1"].macs == made.layers["1"].dense_macs == 16 * 16 * 64


def test_a_layer_that_is_too_small_stays_dense() -> None:
    model = net(nn.Conv2d(16, 4, 3), nn.Conv2d(4, 16, 3))
    made = small(model, m=0.25, o=2)
    assert made.skipped["1"] == "too small: 1 Lego filters for 2 splits"
    assert made.layers.keys() == {"2"}


def test_a_layer_that_would_not_shrink_stays_dense_with_its_bits() -> None:
    model = net(nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1))
    # 8 filters of 1 value, 32 slots of 3 + 16 bits; dense 32 values.
    made = small(model, m=0.5, o=2, k=2)
    assert made.skipped["2"] == f"no saving: {8 * 32 + 64 * 19:,} bits as Lego unit, 1,024 dense"
    with pytest.raises(PlanError, match=r"no layer can be converted: .*no saving"):
        convert_(model, made)
    assert small(model, m=0.5, o=2, k=2, allow_expansion=True).layers.keys() == {"1", "2"}


def test_a_bank_of_all_fragments_takes_one_term() -> None:
    made = small(net(nn.Conv2d(16, 8, 3)), m=2, o=2, k=3, allow_expansion=True)
    assert made.layers["1"].shape == UnitShape(8, 16, (3, 3), 1, 16, 2, 1)


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
