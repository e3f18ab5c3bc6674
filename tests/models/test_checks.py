"""What is not a plain network is refused with the thing to pass instead; all else passes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.models.checks import check_network, refuse_wrapper
from tests.support.tiny import compressed, dense, recipe

IMAGE = torch.zeros(1, 3, 12, 12)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)).eval()


def distributed(model: nn.Module) -> nn.Module:
    """A DistributedDataParallel without its process group."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (nn.DataParallel, r"the network is a DataParallel; pass its \.module"),
        (distributed, r"the network is a DistributedDataParallel; pass its \.module"),
        (AveragedModel, r"the network is an AveragedModel; pass its \.module"),
        (compiled, r"the network is compiled by torch\.compile; pass its \._orig_mod"),
        (torch.jit.script, "scripted or traced.*pass the Python network"),
        (lambda model: torch.jit.trace(model, IMAGE), "scripted or traced.*pass the Python"),
        (functools.partial, r"functools\.partial; pass the nn\.Module inside it"),
        (lambda model: model.state_dict(), "the network is a OrderedDict; pass an nn.Module"),
    ],
    ids=["dp", "ddp", "averaged", "compiled", "scripted", "traced", "partial", "state"],
)
def test_a_wrapper_says_what_to_pass(wrap: Callable[[nn.Module], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        refuse_wrapper(wrap(net()))


def test_a_wrapper_inside_the_network_is_named() -> None:
    model = net()
    model[2] = nn.DataParallel(model[2])
    words = r"layer '2' is a DataParallel; put its \.module in its place"
    with pytest.raises(UsageError, match=words):
        lego.plan(model, example_input=IMAGE)


def test_a_lazy_layer_is_named_until_it_has_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3))
    refuse_wrapper(model)
    with pytest.raises(UsageError, match=r"layer '1' is lazy.*run the network once"):
        check_network(model)
    model(IMAGE)
    check_network(model)


def test_a_class_of_the_user_may_have_the_name_of_a_wrapper() -> None:
    class DataParallel(nn.Sequential):
        pass

    check_network(DataParallel(*net()))


def test_every_entry_point_refuses_before_it_changes_anything(tmp_path: Path) -> None:
    model = compressed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = lego.plan(dense())
    images, batch, wrapped = torch.zeros(12, 1, 16, 16), torch.zeros(1, 1, 16, 16), compiled(model)
    out = tmp_path / "out"
    nothing: Any = None
    calls: list[Callable[[], Any]] = [
        lambda: lego.plan(wrapped),
        lambda: lego.allocate(wrapped, max_size=0.5),
        lambda: lego.convert_(wrapped, plan),
        lambda: lego.calibrate_(wrapped, dense(), images),
        lambda: lego.calibrate_(model, compiled(dense()), images),
        lambda: lego.finetune_(wrapped, recipe(), nothing, nothing),
        lambda: lego.finetune_(model, recipe(), nothing, nothing, original=compiled(dense())),
        lambda: lego.deploy_(wrapped, batch),
        lambda: lego.measure(wrapped, example_input=batch),
        lambda: lego.benchmark(wrapped),
        lambda: lego.save(wrapped, out),
        lambda: lego.load(out, model=compiled(dense())),
        lambda: lego.export_dense(wrapped, out),
        lambda: lego.export_timm(wrapped, out),
        lambda: lego.export_onnx(wrapped, out),
        lambda: lego.export_program(wrapped, out),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"compiled by torch\.compile; pass its \._orig_mod"):
            call()
    assert not out.exists()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def convert(model: nn.Module) -> nn.Module:
    return lego.convert_(model, lego.plan(model, example_input=IMAGE))


def test_a_graph_of_fx_converts_as_its_network_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    graph = convert(torch.fx.symbolic_trace(copy.deepcopy(model)))
    convert(model)
    x = torch.randn(2, 3, 12, 12)
    assert isinstance(graph.get_submodule("2"), lego.LegoModule)
    assert torch.equal(graph(x), model(x))
    lego.save(graph, tmp_path / "a")
    assert torch.equal(lego.load(tmp_path / "a", model=torch.fx.symbolic_trace(net()))(x), model(x))


@pytest.mark.slow
def test_a_network_that_compiles_itself_in_place_converts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    model.compile(backend="eager")
    x = torch.randn(2, 3, 12, 12)
    dense_output = model(x)
    convert(model)
    with torch.no_grad():
        assert torch.equal(model(x), lego.to_dense(model)(x))
        assert not torch.equal(model(x), dense_output)
    assert next(iter(model.state_dict())) == "0.weight"


def test_a_partial_head_around_a_layer_uses_the_converted_layer() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.conv = nn.Conv2d(16, 8, 1)
            self.head = functools.partial(self.conv)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Headed()
    before = model(IMAGE + 1)
    convert(model)
    assert isinstance(model.conv, lego.LegoModule)
    assert torch.equal(model(IMAGE + 1), model.conv(model.body(IMAGE + 1)))
    assert not torch.equal(model(IMAGE + 1), before)
