"""Conversion: exact where it can be, seeded, rounded to what is stored, and all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from legocompress.compress.convert import convert_, summarise_reasons
from legocompress.compress.plan_types import LayerPlan
from legocompress.compress.planning import plan
from legocompress.errors import ConversionError, DenseOnlyError, PlanError
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.lego.surgery import to_dense_
from legocompress.models.factory import create
from legocompress.spec import LegoSpec
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state
from legocompress.state.source import Source
from tests.support.small_cnn import IMAGE, NAMES, converted, lego, randomised, same_bytes, small_cnn


@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("o", [1, 2, 4])
def test_a_bank_of_all_fragments_is_bit_equal(o: int, k: int, coefficients: bool) -> None:
    model = small_cnn()
    dense = copy.deepcopy(model)
    converted(model, m=o, o=o, k=k, coefficients=coefficients, allow_expansion=True)
    assert [name for name, _ in lego_modules(model)] == NAMES
    for name, module in lego_modules(model):
        assert torch.equal(module.weight, dense.get_submodule(name).weight)
        assert module.weight_error == 0
    x = torch.randn(3, 3, 12, 12)
    assert torch.equal(model(x), dense(x))
    assert model(x).std() > 0


@pytest.mark.slow
def test_resnet18_of_grey_images_is_bit_equal_when_exact() -> None:
    model = randomised(timm.create_model("resnet18", pretrained=False, in_chans=1))
    dense, image = copy.deepcopy(model), torch.zeros(1, 1, 32, 32)
    converted(model, image=image, m=2, o=2, allow_expansion=True)
    assert len(list(lego_modules(model))) == 19
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(model(x), dense(x))
    assert same_bytes(to_dense_(model), dense)
    assert torch.equal(model(x), dense(x))


@pytest.mark.slow
def test_a_training_form_is_bit_equal_to_its_deployed_form_when_exact() -> None:
    model = randomised(timm.create_model("repvgg_a0", pretrained=False))
    deployed = reparameterize_model(copy.deepcopy(model))
    image = torch.zeros(1, 3, 32, 32)
    made = plan(model, LegoSpec(m=2, o=2, allow_expansion=True, only=["stages.[012]*"]), image)
    model = convert_(model, made)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), deployed(x))
    assert lego_state(model).source.reparameterized
    assert lego_state(model).source.architecture == "repvgg_a0"
    block = model.get_submodule("stages.0.0")
    with pytest.raises(DenseOnlyError, match="to_dense"):
        block.reparameterize()


def test_what_the_layer_was_stays() -> None:
    model = small_cnn().train()
    model[6].weight.requires_grad_(False)
    model[3].eval()
    layers = {name: model.get_submodule(name) for name in NAMES}
    fired: list[str] = []
    model[7].register_forward_hook(lambda m, x, y: fired.append("7"))
    biases = {name: layer.bias for name, layer in layers.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted(model, m=0.5, o=2)
    for name, layer in layers.items():
        module = lego(model, name)
        assert module is layer
        assert module.bias is biases[name]
        assert module.training is (name != "3")
        assert module.lego_filters.requires_grad is (name != "6")
    after = model.state_dict()
    kept = [name for name in state if name in after]
    assert len(kept) == len(state) - len(NAMES)
    assert all(torch.equal(after[name], state[name]) for name in kept)
    fired.clear()
    model.eval()(torch.randn(1, 3, 12, 12))
    assert fired == ["7"]


def test_a_conv_alone_can_be_converted() -> None:
    model = nn.Conv2d(8, 8, 3)
    weight = model.weight.detach().clone()
    image = torch.zeros(1, 8, 6, 6)
    root: Any = converted(model, image=image, only=[""], m=2, o=2, allow_expansion=True)
    assert root is model
    assert isinstance(root, LegoModule)
    assert torch.equal(root.weight, weight)


def test_a_linear_layer_is_converted_on_request() -> None:
    model = small_cnn()
    dense = copy.deepcopy(model)
    converted(model, m=2, o=2, linear=True, allow_expansion=True)
    assert lego(model, "13").weight.shape == (5, 16)
    x = torch.randn(3, 3, 12, 12)
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("coefficients", [True, False])
def test_the_same_seed_gives_the_same_bytes(coefficients: bool, k: int) -> None:
    model = small_cnn()
    first = converted(copy.deepcopy(model), seed=3, k=k, coefficients=coefficients)
    torch.manual_seed(99)
    random = torch.get_rng_state()
    again = converted(copy.deepcopy(model), seed=3, k=k, coefficients=coefficients)
    assert torch.equal(torch.get_rng_state(), random)
    assert same_bytes(first, again)


@pytest.mark.slow
def test_another_seed_gives_other_bytes_where_chance_plays_a_part() -> None:
    # More than 4,096 fragments are clustered in random blocks; fewer need no chance.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2100, 1))
    first, again, other = (
        converted(copy.deepcopy(model), seed=seed, m=0.0625, coefficients=False)
        for seed in (0, 0, 1)
    )
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


def changed_nothing(model: nn.Module, act: Callable[[], object]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    act()
    assert [type(module) for module in model.modules()] == kinds
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_stop_it_before_anything_changes(value: float) -> None:
    model = small_cnn().train()
    made = plan(model, LegoSpec(), IMAGE)
    with torch.no_grad():
        model[7].weight[3, 2, 1, 0] = value

    def act() -> None:
        with pytest.raises(ConversionError, match=r"layer '7' holds NaN or infinity.*--skip '7'"):
            convert_(model, made)

    changed_nothing(model, act)
    rest = converted(model, skip=["7"])
    assert [name for name, _ in lego_modules(rest)] == ["3", "6", "10"]


@pytest.mark.slow
def test_a_training_form_with_bad_weights_is_not_changed_either() -> None:
    model = timm.create_model("repvgg_a0", pretrained=False).train()
    made = plan(model, LegoSpec(only=["stages.0.*"]), torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        model.get_submodule("stages.0.0").conv_kxk.conv.weight[0] = float("nan")

    def act() -> None:
        with pytest.raises(ConversionError, match=r"stages\.0\.0"):
            convert_(model, made)

    changed_nothing(model, act)


def other_shape() -> nn.Module:
    model = small_cnn()
    model[10] = nn.Conv2d(10, 17, 1)
    return model


def other_names() -> nn.Module:
    return nn.Sequential(*list(small_cnn())[:10])


def other_kind() -> nn.Module:
    model = small_cnn()
    model[3] = nn.ConvTranspose2d(12, 8, 3)  # its weight has the planned shape
    return model


def other_groups() -> nn.Module:
    model = small_cnn()
    model[6] = nn.Conv2d(24, 20, 3, padding=1, groups=4)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [(other_shape, "'10'"), (other_names, "'10'"), (other_kind, "'3'"), (other_groups, "'6'")],
)
def test_a_plan_for_another_model_is_refused_before_anything_changes(
    make: Callable[[], nn.Module], name: str
) -> None:
    made = plan(small_cnn(), LegoSpec(), IMAGE)
    model = make()

    def act() -> None:
        with pytest.raises(PlanError, match=name):
            convert_(model, made)

    changed_nothing(model, act)


def test_a_plan_cannot_be_carried_out_twice() -> None:
    model = small_cnn()
    made = plan(model, LegoSpec(), IMAGE)
    convert_(model, made)

    def act() -> None:
        with pytest.raises(PlanError, match="'3' is a Lego module already; a plan is carried out"):
            convert_(model, made)
        with pytest.raises(PlanError, match=r"holds Lego modules already; .*to_dense\(model\)"):
            plan(model, LegoSpec(), IMAGE)

    changed_nothing(model, act)


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = small_cnn()
    made = plan(model, LegoSpec(), IMAGE.to("meta"))
    assert list(made.layers) == NAMES
    with pytest.raises(ConversionError, match=r"'3.weight' is on the meta device.*to_empty"):
        convert_(model, made)
    assert list(lego_modules(model)) == []


def test_a_training_form_on_the_meta_device_is_refused_before_it_is_fused() -> None:
    with torch.device("meta"):
        model = timm.create_model("repvgg_a0", pretrained=False)
    made = plan(model, LegoSpec(only=["stages.0.*"]), torch.zeros(1, 3, 32, 32))
    assert made.reparameterize
    names = list(model.state_dict())
    with pytest.raises(ConversionError, match="is on the meta device"):
        convert_(model, made)
    assert list(model.state_dict()) == names


def test_a_plan_is_not_carried_out_on_a_lazy_layer() -> None:
    model = small_cnn()
    made = plan(model, LegoSpec(), IMAGE)
    model[10] = nn.LazyConv2d(16, 1)
    with pytest.raises(PlanError, match="'10' is lazy and has no weights yet; run the network"):
        convert_(model, made)
    assert list(lego_modules(model)) == []


def test_a_layer_that_became_complex_after_the_plan_stops_it_before_anything_changes() -> None:
    model = small_cnn()
    made = plan(model, LegoSpec(), IMAGE)
    model[10] = nn.Conv2d(10, 16, 1, dtype=torch.complex64)

    def act() -> None:
        words = "'10' cannot be converted: complex weights are not supported"
        with pytest.raises(ConversionError, match=words):
            convert_(model, made)

    changed_nothing(model, act)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)],
)
@pytest.mark.parametrize("settings", [{"k": 1}, {"k": 2, "coefficients": False}])
def test_layers_of_other_dtypes_compute_what_their_assembled_weight_says(
    dtype: torch.dtype, tolerance: float, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3)).to(dtype)
    exact = converted(copy.deepcopy(model).double(), image=IMAGE.double(), **settings)
    converted(model, image=IMAGE.to(dtype), **settings)
    layer = lego(model, "2")
    assert layer.lego_filters.dtype == dtype
    # Clustered in float32 at least: as good as from the same values in float64.
    assert layer.weight_error == pytest.approx(lego(exact, "2").weight_error, rel=0.02)
    x = torch.randn(2, 3, 12, 12, dtype=dtype)
    expected = to_dense_(copy.deepcopy(model)).double()(x.double())
    for layer.route in ("assemble", "reference"):
        output = model(x)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_rule_changes_the_dtype_of_one_layer() -> None:
    model = small_cnn()
    converted(model, rules=["6:dtype=fp16,coefficients=false"])
    assert lego(model, "6").storage_dtype == "fp16"
    assert lego(model, "6").coefficients is None
    assert lego(model, "3").storage_dtype == "fp32"
    assert lego(model, "3").coefficients is not None


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes_keep_theirs(dtype: torch.dtype, storage: str) -> None:
    model = small_cnn().to(dtype)
    dense = copy.deepcopy(model)
    converted(model, image=IMAGE.to(dtype), m=0.25, o=2, dtype=storage)
    assert len(list(lego_modules(model))) > 2
    for name, module in lego_modules(model):
        assert {p.dtype for p in module.parameters()} == {dtype}
        exact = dense.get_submodule(name).weight.detach().double()
        assert (module.weight.double() - exact).norm() < 0.9 * exact.norm()


def test_each_layer_is_told_once_in_order() -> None:
    told: list[LayerPlan] = []
    model = small_cnn()
    made = plan(model, LegoSpec(skip=["7"]), IMAGE)
    assert convert_(model, made, on_layer=told.append) is model
    assert [row.name for row in told] == ["3", "6", "10"]
    assert told == list(made.layers.values())


def test_source_and_record_are_noted() -> None:
    model: Any = small_cnn()
    made = plan(model, LegoSpec(m=0.25, skip=["7"]), IMAGE)
    convert_(model, made, seed=5)
    assert lego_state(model).source == Source(None, None)
    assert lego_state(model).conversion == ConversionRecord(made.spec, 5, made.skipped)
    assert lego_state(model).conversion.skipped["7"] == "skipped by name"


def test_the_source_of_a_created_model_is_kept() -> None:
    model: Any = create("resnet18", pretrained=False, num_classes=7, in_chans=1, seed=3)
    noted = lego_state(model).source
    converted(model, image=torch.zeros(1, 1, 32, 32), only=["layer1.*"])
    assert lego_state(model).source == noted
    assert noted.architecture == "resnet18"
    assert not noted.reparameterized


def test_reasons_are_counted_most_first() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8)
    )
    counted = summarise_reasons(plan(model, LegoSpec(), IMAGE))
    assert counted.startswith("2 x depthwise; 1 x stem")


def test_one_training_step_moves_every_filter_and_coefficient() -> None:
    model = small_cnn()
    converted(model, m=0.5, o=2, k=2)
    model.train()
    x, target = torch.randn(8, 3, 12, 12), torch.randint(5, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _, module in lego_modules(model):
        for grad in (module.lego_filters.grad, module.coefficients.grad):  # type: ignore[union-attr]
            assert grad is not None
            assert bool(grad.isfinite().all())
        filters: Any = module.lego_filters.grad
        gains: Any = module.coefficients.grad  # type: ignore[union-attr]
        assert bool((filters.flatten(1).abs().sum(1) > 0).all())
        assert bool((gains != 0).all())
    optimizer.step()
    for name, module in lego_modules(model):
        assert not torch.equal(module.lego_filters, before[f"{name}.lego_filters"])
        assert torch.equal(module.index, before[f"{name}.index"])
    assert nn.functional.cross_entropy(model(x), target) < loss
