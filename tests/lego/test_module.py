"""The Lego module: every route against the dense layer of the assembled weight, in float64."""

from __future__ import annotations

import copy
import io
import pickle  # a round trip, as copies between processes make it
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.func import functional_call

from legocompress.errors import ConversionError, DenseOnlyError
from legocompress.lego.algebra import assemble
from legocompress.lego.module import LegoModule, lego_class, lego_modules, replaced_class
from legocompress.lego.shape import UnitShape
from legocompress.lego.surgery import become_lego_, freeze_, guard_fusing_, to_dense, to_dense_
from legocompress.lego.unit import LegoUnit

Layer = nn.Conv2d | nn.Linear


def lego_(
    layer: Layer, n_split: int = 2, n_lego: int = 3, n_terms: int = 1, coefficients: bool = True
) -> LegoModule:
    """Turn a layer into a Lego module of random filters."""
    linear = isinstance(layer, nn.Linear)
    n_out, channels = layer.weight.shape[:2]
    kernel = (1, 1) if linear else (layer.weight.shape[2], layer.weight.shape[3])
    groups = 1 if linear else layer.groups
    shape = UnitShape(n_out, channels, kernel, groups, n_lego, n_split, n_terms)
    slots = (n_split, n_out, n_terms)
    filters = torch.randn(n_lego, shape.width, *kernel, dtype=torch.float64)
    index = torch.randint(n_lego, slots)
    gains = torch.randn(slots, dtype=torch.float64) if coefficients else None
    return become_lego_(layer, shape, LegoUnit(filters, index, gains))


def twins(layer: Layer, **unit: Any) -> tuple[Layer, Any]:
    """The same layer twice: dense with the assembled weight, and as a Lego module."""
    dense = copy.deepcopy(layer)
    module = lego_(layer, **unit)
    with torch.no_grad():
        dense.weight.copy_(module.weight)
    return dense, module


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs, dtype=torch.float64)  # type: ignore[misc]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def by_route(module: LegoModule, route: str, x: Tensor) -> Tensor:
    module.route = route  # type: ignore[assignment]
    try:
        return module(x)
    finally:
        module.route = "assemble"


GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "dilation": (2, 1), "padding": 2, "stride": 2},
    {"kernel_size": (1, 5), "padding": (0, 2)},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 2)},
    *[
        {"kernel_size": (3, 5), "padding": padding, "padding_mode": mode, **extra}
        for mode in ("reflect", "replicate", "circular")
        for padding, extra in [(1, {}), ((2, 1), {"stride": (1, 2)}), ("same", {"dilation": 2})]
    ],
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
]
UNITS: list[dict[str, Any]] = [
    {"n_split": 2, "n_terms": 1},
    {"n_split": 3, "n_terms": 2},
    {"n_split": 4, "n_terms": 3, "coefficients": False},  # the last split is all padding
]


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_routes_equal_the_dense_conv(geometry: dict[str, Any], unit: dict[str, Any]) -> None:
    dense, module = twins(conv(6, 8, bias=unit["n_terms"] != 2, **geometry), **unit)
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64)
    expected = dense(x)
    assert expected.abs().max() > 0.1
    close(by_route(module, "assemble", x), expected)
    close(by_route(module, "reference", x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("n_terms", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("channels", "n_split"), [(4, 2), (5, 2), (7, 4)])
def test_grouped_conv_routes_equal_the_dense_conv(
    channels: int, n_split: int, groups: int, n_terms: int, coefficients: bool, bias: bool
) -> None:
    layer = conv(channels * groups, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    dense, module = twins(layer, n_split=n_split, n_terms=n_terms, coefficients=coefficients)
    x = torch.randn(2, channels * groups, 6, 7, dtype=torch.float64)
    close(by_route(module, "assemble", x), dense(x))
    close(by_route(module, "reference", x), dense(x))


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"padding": "same", "groups": 2},
        *[{"padding": (1, 2), "padding_mode": m} for m in ("reflect", "replicate", "circular")],
    ],
    ids=str,
)
def test_an_image_without_batch_axis(geometry: dict[str, Any]) -> None:
    dense, module = twins(conv(6, 8, 3, **geometry), n_split=2, n_terms=2)
    x = torch.randn(6, 7, 8, dtype=torch.float64)
    assert dense(x).dim() == 3
    close(by_route(module, "assemble", x), dense(x))
    close(by_route(module, "reference", x), dense(x))


@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("n_terms", [1, 3])
@pytest.mark.parametrize("size", [(3, 6), (2, 5, 6), (6,), (2, 3, 2, 6)], ids=str)
def test_linear_routes_equal_the_dense_linear(
    size: tuple[int, ...], n_terms: int, coefficients: bool
) -> None:
    for n_split, bias in [(2, True), (4, False)]:
        layer = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
        dense, module = twins(layer, n_split=n_split, n_terms=n_terms, coefficients=coefficients)
        assert module.weight.shape == (5, 6)
        x = torch.randn(size, dtype=torch.float64)
        close(by_route(module, "assemble", x), dense(x))
        close(by_route(module, "reference", x), dense(x))


@pytest.mark.parametrize("size", [(7, 9), (8, 5), (12, 12)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 5, "stride": (2, 3)},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 1, "dilation": 2, "groups": 2},
    ],
    ids=str,
)
def test_dynamic_padding_is_kept_by_both_routes(
    geometry: dict[str, Any], size: tuple[int, int]
) -> None:
    dense, module = twins(Conv2dSame(6, 8, **geometry).double(), n_split=2, n_terms=2)
    assert isinstance(module, Conv2dSame)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    close(by_route(module, "assemble", x), dense(x))
    close(by_route(module, "reference", x), dense(x))


STANDARDISED = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]


@pytest.mark.parametrize("kind", STANDARDISED)
@pytest.mark.parametrize("stride", [1, 2])
def test_weight_standardisation_runs_on_the_assembled_weight(
    kind: type[nn.Conv2d], stride: int
) -> None:
    layer = kind(6, 8, 3, stride=stride).double()
    for parameter in layer.parameters():  # gains start as ones and would hide a lost one
        nn.init.uniform_(parameter, 0.5, 1.5)
    dense, module = twins(layer, n_split=4, n_terms=2)
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    plain = F.conv2d(x, module.weight, module.bias, stride)
    assert dense(x).shape != plain.shape or (dense(x) - plain).abs().max() > 1e-3
    close(module(x), dense(x))
    module.eval()
    dense.eval()
    close(module(x), dense(x))
    assert module.routes() == ("assemble",)
    with pytest.raises(ConversionError, match=rf"Lego{kind.__name__} has no route 'reference'"):
        module.route = "reference"
    assert module.route == "assemble"


def test_an_unknown_route_is_refused() -> None:
    module = lego_(conv(4, 4, 3))
    with pytest.raises(ConversionError, match="'fused'; it has assemble, reference"):
        module.route = "fused"  # type: ignore[assignment]


@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: conv(6, 8, 3, stride=2, padding=1), (2, 6, 6, 5)),
        (lambda: conv(10, 8, (1, 3), groups=2, padding="same"), (2, 10, 4, 5)),
        (lambda: nn.Linear(5, 4, dtype=torch.float64), (3, 5)),
        (lambda: Conv2dSame(6, 4, 3, stride=2).double(), (2, 6, 5, 7)),
    ],
    ids=["strided", "grouped", "linear", "same"],
)
def test_gradients_agree_by_both_routes_and_by_hand(
    make: Callable[[], Layer], size: tuple[int, ...], coefficients: bool
) -> None:
    dense, module = twins(make(), n_split=2, n_terms=2, coefficients=coefficients)
    x = torch.randn(size, dtype=torch.float64)
    probe = torch.randn_like(dense(x))
    names = ["lego_filters", "bias", *(["coefficients"] if coefficients else [])]

    def grads(route: str) -> dict[str, Tensor]:
        seen = x.clone().requires_grad_()
        module.zero_grad()
        (by_route(module, route, seen) * probe).sum().backward()
        assert seen.grad is not None
        return {"x": seen.grad, **{n: getattr(module, n).grad.clone() for n in names}}

    def by_hand() -> dict[str, Tensor]:
        leaves = {n: getattr(module, n).detach().clone().requires_grad_() for n in names}
        seen = x.clone().requires_grad_()
        unit = LegoUnit(leaves["lego_filters"], module.index, leaves.get("coefficients"))
        filters = assemble(module.lego_shape, unit).reshape(dense.weight.shape)
        call = {"weight": filters, "bias": leaves["bias"]}
        (functional_call(dense, call, (seen,)) * probe).sum().backward()
        return {n: leaf.grad for n, leaf in {"x": seen, **leaves}.items() if leaf.grad is not None}

    expected = by_hand()
    assert expected.keys() == {"x", *names}
    for route in ("assemble", "reference"):
        for name, grad in grads(route).items():
            assert grad.abs().max() > 0
            close(grad, expected[name])


@pytest.mark.parametrize("route", ["assemble", "reference"])
def test_gradcheck(route: str) -> None:
    module: Any = lego_(conv(3, 4, 2, padding=1), n_split=2, n_lego=2, n_terms=2)
    module.route = route
    names = ("lego_filters", "coefficients", "bias")

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    leaves = [getattr(module, n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, (x, *leaves))


@pytest.mark.parametrize(
    "kind", [nn.Conv2d, Conv2dSame, *STANDARDISED], ids=lambda kind: kind.__name__
)
def test_the_module_stays_its_conv(kind: type[nn.Conv2d]) -> None:
    layer = kind(6, 8, 3, stride=2, dilation=1, groups=2, bias=True)
    before = {
        name: getattr(layer, name)
        for name in (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
            *("groups", "padding_mode", "transposed", "output_padding", "training"),
        )
    }
    bias, identity = layer.bias, id(layer)
    module: Any = lego_(layer)
    assert id(module) == identity
    assert isinstance(module, kind)
    assert isinstance(module, LegoModule)
    assert type(module) is lego_class(kind)
    assert type(module).__name__ == f"Lego{kind.__name__}"
    assert replaced_class(module) is kind
    assert {name: getattr(module, name) for name in before} == before
    assert module.bias is bias
    assert module.weight.shape == (8, 3, 3, 3)
    assert "n_lego=3, n_split=2, n_terms=1" in repr(module)
    assert "stride=(2, 2)" in repr(module)


def test_linear_stays_linear() -> None:
    module: Any = lego_(nn.Linear(6, 5))
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (6, 5)
    assert "in_features=6, out_features=5" in repr(module)


def test_the_input_may_be_given_by_its_name() -> None:
    dense, module = twins(conv(4, 4, 3))
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    close(module(input=x), dense(input=x))


def test_every_kind_of_hook_still_fires() -> None:
    layer = conv(4, 4, 3)
    fired: list[str] = []
    layer.register_forward_pre_hook(lambda m, x: fired.append("pre"))
    layer.register_forward_hook(lambda m, x, y: y + 1)
    layer.register_full_backward_hook(lambda m, gx, gy: fired.append("backward"))
    layer.register_state_dict_pre_hook(lambda *args: fired.append("state"))
    dense, module = twins(layer)
    fired.clear()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    y = module(x)
    close(y, F.conv2d(x, module.weight, module.bias) + 1)
    y.sum().backward()
    module.state_dict()
    assert fired == ["pre", "backward", "state"]
    close(y, dense(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_training_flag_and_requires_grad_are_kept(learns: bool, training: bool) -> None:
    layer = nn.Conv2d(4, 4, 3).train(training)
    layer.weight.requires_grad_(learns)
    module: Any = lego_(layer)
    assert module.training is training
    assert module.lego_filters.requires_grad is learns
    assert module.coefficients.requires_grad is learns
    assert module.bias.requires_grad
    assert module.weight.requires_grad is learns
    to_dense_(module)
    assert module.training is training
    assert module.weight.requires_grad is learns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_layer_is_kept(dtype: torch.dtype) -> None:
    module: Any = lego_(nn.Conv2d(4, 4, 3, dtype=dtype))
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.weight.dtype == dtype
    assert module.index.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_casts_the_parameters_and_leaves_the_index(dtype: torch.dtype) -> None:
    module: Any = lego_(nn.Conv2d(6, 4, 3), n_split=4, n_terms=2)
    index = module.index.clone()
    exact = [p.detach().clone() for p in module.parameters()]
    x = torch.randn(1, 6, 5, 5)
    before = module(x)
    module.freeze()
    module.to(dtype)
    assert torch.equal(module.index, index)
    assert module.index.dtype == torch.int64
    for value, kept in zip(module.parameters(), exact, strict=True):
        assert torch.equal(value, kept.to(dtype))
    shape = module.lego_shape
    fresh = assemble(shape, module.lego_unit)
    assert torch.equal(module.weight, fresh)
    tolerance = {torch.float16: 0.05, torch.bfloat16: 0.4, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(module(x.to(dtype)).float(), before, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n_split", [1, 2, 4])
def test_channels_last_is_kept_both_ways(n_split: int) -> None:
    last = torch.channels_last
    layer = nn.Conv2d(4, 6, 3).to(memory_format=last)
    assert not layer.weight.is_contiguous()
    module: Any = lego_(layer, n_split=n_split)
    values = module.weight.detach().clone()
    assert module.weight.is_contiguous(memory_format=last)
    module.freeze()
    assert module.weight.is_contiguous(memory_format=last)
    module.to(memory_format=torch.contiguous_format)
    assert module.weight.is_contiguous()
    module.to(memory_format=last)
    assert module.weight.is_contiguous(memory_format=last)
    assert torch.equal(module.weight, values)
    copied = copy.deepcopy(module)
    assert copied.weight.is_contiguous(memory_format=last)
    to_dense_(module)
    assert module.weight.is_contiguous(memory_format=last)
    assert torch.equal(module.weight, values)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "kind", [nn.Conv2d, Conv2dSame, ScaledStdConv2d], ids=lambda kind: kind.__name__
)
def test_deepcopy_is_equal_and_independent(kind: type[nn.Conv2d], frozen: bool) -> None:
    module: Any = lego_(kind(6, 4, 3, bias=True).double(), n_split=4, n_terms=2).eval()
    if frozen:
        module.freeze()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    expected = module(x)
    copied = copy.deepcopy(module)
    assert type(copied) is type(module)
    assert copied.lego_shape == module.lego_shape
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        copied.lego_filters.mul_(2)
        copied.bias.add_(1)
        copied.index.zero_()
    copied.train()
    assert torch.equal(module(x), expected)
    assert not torch.equal(copied(x), expected)


def test_pickle_round_trip() -> None:
    # Processes hand networks on so; no file of ours is read that way.
    model = nn.Sequential(
        lego_(conv(6, 4, 3), n_split=4, n_terms=2),
        lego_(Conv2dSame(4, 4, 3, stride=2).double(), coefficients=False),
        nn.Flatten(),
        lego_(nn.Linear(16, 3, dtype=torch.float64)),
    )
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    back = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in back] == [type(m) for m in model]
    assert torch.equal(back(x), model(x))
    with torch.no_grad():
        back[0].lego_filters.zero_()
    assert model[0].lego_filters.abs().max() > 0


def test_state_dict_holds_the_unit_and_no_dense_weight() -> None:
    module: Any = lego_(conv(6, 4, 3), n_terms=2)
    module.freeze()
    state = module.state_dict()
    assert set(state) == {"lego_filters", "coefficients", "bias", "index"}
    assert set(lego_(conv(6, 4, 3, bias=False), coefficients=False).state_dict()) == {
        "lego_filters",
        "index",
    }


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_state_dict_round_trip_leaves_no_stale_weight(frozen: bool, assign: bool) -> None:
    source: Any = lego_(conv(6, 4, 3), n_terms=2).eval()
    target: Any = lego_(conv(6, 4, 3), n_terms=2).eval()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    if frozen:
        freeze_(target)
        freeze_(source)
    assert not torch.equal(target(x), source(x))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target(x), source(x))


def test_freezing_keeps_outputs_and_training_thaws() -> None:
    model = nn.Sequential(
        lego_(conv(6, 4, 3), n_split=4, n_terms=2), nn.ReLU(), lego_(conv(4, 4, 1))
    ).eval()
    first: Any = model[0]
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    expected = model(x)
    assert freeze_(model) is model
    assert torch.equal(model(x), expected)
    assert first.weight is first.weight
    assert not first.weight.requires_grad
    with torch.no_grad():
        first.lego_filters.mul_(2)
    assert torch.equal(model(x), expected)
    model.eval()
    assert torch.equal(model(x), expected)
    model.train()
    assert first.frozen_weight is None
    assert first.weight.requires_grad
    assert not torch.equal(model(x), expected)
    model(x).sum().backward()
    assert first.lego_filters.grad.abs().max() > 0


def test_the_reference_route_runs_the_filters_of_a_frozen_module() -> None:
    dense, module = twins(conv(6, 4, 3), n_terms=2)
    module.eval().freeze()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    close(by_route(module, "reference", x), dense(x))
    close(by_route(module, "assemble", x), dense(x))


def test_setting_the_weight_names_to_dense() -> None:
    module: Any = lego_(conv(6, 4, 3))
    before = module.weight.detach().clone()
    with pytest.raises(DenseOnlyError, match=r"LegoConv2d .*to_dense\(model\)"):
        module.weight = nn.Parameter(torch.zeros(4, 6, 3, 3))
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind", [nn.Conv2d, Conv2dSame, *STANDARDISED], ids=lambda kind: kind.__name__
)
def test_to_dense_gives_the_original_layer_back(
    kind: type[nn.Conv2d], bias: bool, frozen: bool
) -> None:
    layer = kind(6, 8, 3, stride=2, bias=bias).double()
    keys, attributes = list(layer.state_dict()), set(layer.__dict__)
    module: Any = lego_(layer, n_split=4, n_terms=2).eval()
    weight = module.weight.detach().clone()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    expected = module(x)
    if frozen:
        module.freeze()
    dense: Any = to_dense_(module)
    assert dense is module
    assert type(dense) is kind
    assert isinstance(dense.weight, nn.Parameter)
    assert torch.equal(dense.weight, weight)
    assert torch.equal(dense(x), expected)
    assert set(dense.__dict__) == attributes
    assert not dict(dense.named_buffers())
    assert list(dense.state_dict()) == keys
    dense.weight = nn.Parameter(torch.zeros_like(weight))
    assert not torch.equal(dense(x), expected)


def test_to_dense_gives_a_linear_back() -> None:
    module: Any = lego_(nn.Linear(6, 5, dtype=torch.float64), n_split=4)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = module(x)
    to_dense_(module)
    assert type(module) is nn.Linear
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("route", ["assemble", "reference"])
def test_fx_traces_the_same_function(route: str) -> None:
    model = nn.Sequential(
        lego_(conv(6, 8, 3, stride=2, padding=1), n_split=4, n_terms=2),
        nn.ReLU(),
        lego_(conv(8, 4, 1, groups=2, bias=False), coefficients=False),
    )
    for _, module in lego_modules(model):
        module.route = route  # type: ignore[assignment]
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    close(traced(x), model(x))
    again = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    close(traced(again), model(again))


def test_fx_traces_linear_and_frozen_modules() -> None:
    model = nn.Sequential(lego_(conv(6, 8, 3)), nn.Flatten(), lego_(nn.Linear(8, 3).double()))
    freeze_(model.eval())
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("route", ["assemble", "reference"])
def test_compiling_gives_the_same_function_without_graph_breaks(route: str) -> None:
    model = nn.Sequential(
        lego_(conv(6, 8, 3, stride=2, padding=1), n_split=4, n_terms=2),
        nn.Flatten(),
        lego_(nn.Linear(8 * 9, 3, dtype=torch.float64)),
    )
    for _, module in lego_modules(model):
        module.route = route  # type: ignore[assignment]
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_is_refused_and_the_dense_network_scripts() -> None:
    model = nn.Sequential(lego_(conv(6, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1).double()).eval()
    with pytest.raises(DenseOnlyError, match=r"script legocompress\.to_dense\(model\)"):
        torch.jit.script(model)
    assert isinstance(model[0], LegoModule)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(torch.jit.script(to_dense(model))(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_a_replica_for_data_parallel_computes_and_learns_the_same() -> None:
    for coefficients in (True, False):
        module: Any = lego_(conv(6, 4, 3), n_terms=2, coefficients=coefficients)
        replica = module._replicate_for_data_parallel()
        for name, value in module._parameters.items():  # as torch.nn.parallel.replicate does
            if value is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, value * 1)
        for name, buffer in module._buffers.items():
            if buffer is None:
                replica._buffers[name] = None
            else:
                setattr(replica, name, buffer.clone())
        x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
        for route in ("assemble", "reference"):
            replica._route = route
            close(replica(x), module(x))
        replica(x).square().sum().backward()
        assert module.lego_filters.grad.abs().max() > 0


def test_a_conv_at_two_names_stays_one_object() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = conv(4, 4, 3, padding=1)
            self.second = self.first
            self.listed = [self.first]

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model: Any = Twice()
    lego_(model.first)
    assert model.second is model.first is model.listed[0]
    assert [name for name, _ in lego_modules(model)] == ["first"]
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    weight, bias = model.first.weight, model.first.bias
    once = F.conv2d(x, weight, bias, padding=1)
    close(model(x), F.conv2d(once, weight, bias, padding=1))
    copied = copy.deepcopy(model)
    assert copied.second is copied.first
    to_dense_(model)
    assert type(model.second) is nn.Conv2d
    assert model.second is model.first


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4, 3, padding=1)
        self.fused = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def fuse(self) -> None:
        self.fused += 1


class Deploys(Block):
    def switch_to_deploy(self) -> None:
        self.fused += 1

    def reparameterize(self) -> None:
        self.fused += 1


def test_fuse_methods_of_blocks_with_lego_modules_are_guarded() -> None:
    model: Any = nn.Sequential(Block(), Deploys(), Block())
    lego_(model[0].conv)
    lego_(model[1].conv)
    assert guard_fusing_(model) is model
    for method in (model[0].fuse, model[1].fuse, model[1].switch_to_deploy):
        with pytest.raises(DenseOnlyError, match=r"to_dense\(model\)"):
            method()
    with pytest.raises(DenseOnlyError, match=r"reparameterize\(\)"):
        model[1].reparameterize()
    model[2].fuse()  # holds no Lego module
    assert [block.fused for block in model] == [0, 0, 1]
    copied = copy.deepcopy(model)
    with pytest.raises(DenseOnlyError):
        copied[0].fuse()
    to_dense_(model)
    model[0].fuse()
    model[1].fuse()
    model[1].reparameterize()
    assert [block.fused for block in model] == [1, 2, 1]
    with pytest.raises(DenseOnlyError):
        copied[0].fuse()
