"""The Lego module: every route against the dense layer of the assembled weight, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.func import functional_call

from legocompress.errors import ConversionError, DenseOnlyError
from legocompress.lego.algebra import assemble
from legocompress.lego.module import LegoModule, lego_class, replaced_class
from legocompress.lego.surgery import to_dense_
from legocompress.lego.unit import LegoUnit
from tests.support.lego_layers import STANDARDISED, Layer, by_route, close, conv, lego_, twins

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
