"""Deployed networks compute what they did, fold and fuse what they may, and nothing else."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import legocompress as lego
from benchmarks.coverage import randomise_, source, tensors
from legocompress import kernels
from legocompress.deploy.choices import POOL_ROUTES
from legocompress.deploy.graph import trace
from legocompress.deploy.network import deployed_graph
from legocompress.deploy.plain_site import LinearSite, MeanSite, PoolSite
from legocompress.deploy.site import ConvSite
from legocompress.deploy.tune import _site_times
from legocompress.errors import CheckpointError, DeployError, UsageError
from legocompress.models import build

SPEC = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)


def conv(c: int, n: int, kernel: Any = 3, **kwargs: Any) -> nn.Conv2d:
    if "padding" not in kwargs:
        kwargs["padding"] = kernel // 2
    return nn.Conv2d(c, n, kernel, **kwargs)


def converted(model: nn.Module, x: Any, **settings: Any) -> nn.Module:
    randomise_(model.eval())
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.1)
    return lego.convert_(model, lego.plan(model, SPEC.model_copy(update=settings), x))


def relative(expected: Any, found: Any) -> float:
    gaps = []
    for a, b in zip(tensors(expected), tensors(found), strict=True):
        assert a.shape == b.shape
        if a.numel():
            gaps.append(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return max(gaps)


@torch.no_grad()
def check(model: nn.Module, *inputs: Tensor, **settings: Any) -> lego.Deployment:
    """Deploy, compare on the example and on another batch, and give back what was done."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    others = tuple(torch.cat([x, 2 * x.flip(0)]) for x in inputs)
    expected, expected_others = model(*inputs), model(*others)
    assert relative(expected, torch.zeros_like(expected)) > 0
    lego.deploy_(model, inputs, seconds=0, **settings)
    assert "forward" in model.__dict__
    limit = 1e-12 if inputs[0].dtype == torch.float64 else 1e-5
    assert relative(expected, model(*inputs)) <= limit
    assert relative(expected_others, model(*others)) <= limit
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    return model.lego_deployment  # type: ignore[return-value]


class Block(nn.Module):
    """A stem, and a residual block whose parts a test may change."""

    def __init__(self, norm: Any = nn.BatchNorm2d, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1, self.norm1, self.act1 = conv(8, 8, bias=False), norm(8), act()
        self.conv2, self.norm2 = conv(8, 16, stride=2), norm(16)
        self.down, self.norm3 = conv(8, 16, 1, stride=2, bias=False), norm(16)
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.norm3(self.down(x))
        return self.act2(y)


X = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "coefficients"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_a_residual_block_is_folded_and_fused(
    dtype: torch.dtype, k: int, coefficients: bool, act: Any
) -> None:
    x = X.to(dtype)
    model = converted(Block(act=act), X, k=k, coefficients=coefficients).to(dtype)
    found = check(model, x)
    fused = 0 if act is nn.Hardswish else 2
    assert (found.n_layers, found.n_lego, found.notes) == (4, 3, ())
    assert (found.n_norms, found.n_sums, found.n_activations) == (3, 1, fused)
    assert found.choices.routes.keys() == {"stem", "conv1", "conv2", "down"}
    if dtype == torch.float64:
        assert set(found.choices.routes.values()) <= {"assemble", "table", "reference"}


@pytest.mark.parametrize(
    ("norm", "n_norms"),
    [
        (FrozenBatchNorm2d, 3),
        (lambda n: BatchNormAct2d(n, act_layer=nn.ReLU), 3),
        (lambda n: BatchNormAct2d(n, act_layer=nn.Hardswish), 3),
        (lambda n: BatchNormAct2d(n, apply_act=False), 3),
        (lambda n: nn.BatchNorm2d(n, affine=False), 3),
        (lambda n: nn.BatchNorm2d(n, track_running_stats=False), 0),
        (lambda n: nn.GroupNorm(2, n), 0),
    ],
)
def test_norms_of_every_kind(norm: Any, n_norms: int) -> None:
    model = converted(Block(norm), X)
    if n_norms:
        assert check(model, X).n_norms == n_norms
    else:
        with torch.no_grad():  # such norms know their batch
            expected = model(X)
            assert lego.deploy_(model, X, seconds=0).lego_deployment.n_norms == 0
            assert relative(expected, model(X)) < 1e-5


class Geometry(nn.Module):
    """Convs put in every way: strided, dilated, grouped, padded by name, by mode, SAME."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(3, 8),
            conv(8, 12, 3, stride=2, dilation=2, padding=2),
            Conv2dSame(12, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            Conv2dSame(8, 8, 4),
            conv(8, 12, 3, groups=2),
            conv(12, 12, (1, 3), padding="same"),
            conv(12, 12, 2, padding="same", groups=3),
            conv(12, 8, 3, padding="valid"),
            conv(8, 8, 3, padding_mode="reflect"),
            conv(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            nn.Dropout(0.5),
            conv(8, 8, 5, padding=(1, 2)),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("size", [(27, 31), (40, 32)])
def test_every_geometry(size: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *size)
    found = check(converted(Geometry(), x), x)
    assert (found.n_layers, found.n_norms, found.n_activations) == (11, 2, 2)
    assert found.n_lego >= 9


def test_other_sizes_than_the_example() -> None:
    model = converted(Geometry(), torch.randn(1, 3, 32, 32))
    others = [torch.randn(1, 3, 33, 29), torch.randn(3, 3, 46, 25)]
    with torch.no_grad():
        expected = [model(x) for x in others]
        lego.deploy_(model, torch.randn(1, 3, 32, 32), seconds=0)
        for x, y in zip(others, expected, strict=True):
            assert relative(y, model(x)) < 1e-5


class Sums(nn.Module):
    """Sums that may be fused, and those that may not, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.conv, self.norm = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8)
        self.one = conv(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "add":
            return x + self.norm(self.conv(x))
        if self.kind == "method":
            return self.norm(self.conv(x)).add_(x).relu_()
        if self.kind == "twice":
            y = self.norm(self.conv(x))
            return y + y
        if self.kind == "alpha":
            return torch.add(self.conv(x), x, alpha=2)
        if self.kind == "broadcast":
            return self.conv(x) + x.mean((2, 3), keepdim=True)
        if self.kind == "wider":
            return self.one(x) + x
        if self.kind == "input changes":
            y = self.conv(x)
            x.mul_(2)
            return y + x
        if self.kind == "both convs":
            return F.relu(self.conv(x) + self.norm(self.conv(x)))
        y = self.norm(self.conv(x))  # "heard twice"
        return F.relu(y) + y


@pytest.mark.parametrize(
    ("kind", "n_sums"),
    [("add", 1), ("method", 1), ("twice", 0), ("alpha", 0), ("broadcast", 0), ("wider", 0),
     ("input changes", 0), ("both convs", 1), ("heard twice", 0)],
)  # fmt: skip
def test_sums(kind: str, n_sums: int) -> None:
    found = check(converted(Sums(kind), X), X)
    assert found.n_sums == n_sums
    if kind == "both convs":
        assert {"conv", "conv#2"} < found.choices.routes.keys()


def test_an_alias_that_tracing_does_not_see() -> None:
    class Alias(Sums):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = x
            y += self.conv(x)  # traced as y = y + ..., which leaves x as it was
            return y + x

    model = converted(Alias(""), X)
    with torch.no_grad():
        expected = model(X)
        lego.deploy_(model, X, seconds=0)
        assert relative(expected, model(X)) < 1e-6


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv(3, 8), conv(8, 8)
        self.again, self.norm = self.conv, nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.again(self.stem(x)))
        return self.norm(self.conv(x))


def test_a_conv_that_is_called_several_times() -> None:
    found = check(converted(Shared(), X), X)
    assert found.choices.routes.keys() == {"stem", "conv", "conv#2"}


def test_who_listens_hears_the_same() -> None:
    model = converted(Block(), X)
    heard: list[Tensor] = []
    for layer in (model.conv1, model.norm2):
        layer.register_forward_hook(lambda module, args, output: heard.append(output.clone()))
    with torch.no_grad():
        model(X)
    expected = heard[:]
    found = check(model, X)
    heard.clear()
    with torch.no_grad():
        model(X)
    assert len(heard) == len(expected) == 2
    assert relative(expected, heard) < 1e-5
    assert (found.n_norms, found.n_sums) == (1, 1)  # of the one conv that nobody listens to


def test_a_hooked_root_and_a_bare_conv() -> None:
    model = converted(Block(), X)
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    check(model, X)
    assert set(seen) == {Tensor}
    layer = converted(nn.Sequential(conv(3, 8), conv(8, 8)), X)[1]
    x = torch.randn(2, 8, 9, 9)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert check(layer, x).choices.routes.keys() == {""}


class Stubborn(nn.Module):
    """Does not trace as a whole, since it looks at its values; its parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), nn.Sequential(conv(16, 16), nn.BatchNorm2d(16))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.first(x)
        if x.sum() > -1e9:
            x = self.norm(self.second(x)) + x
        return self.second(x) if twice else x


def test_what_does_not_trace_is_deployed_in_parts() -> None:
    model = converted(Stubborn(), X)
    with torch.no_grad():
        expected = model(X), model(X, twice=True)
        lego.deploy_(model, X, seconds=0)
        assert relative(expected, (model(X), model(X, twice=True))) < 1e-5
    found = model.lego_deployment
    assert (found.n_layers, found.n_norms) == (5, 4)
    assert found.choices.formats.keys() == {"first", "second"}
    assert "(root) is not traced as a whole: TraceError" in found.notes[0]


def test_what_changes_its_buffers_is_not_traced() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Block()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.body(x) * self.count

    model = converted(Counting(), X)
    before = float(model.count)
    lego.deploy_(model, X, seconds=0)
    assert "changes its buffers" in model.lego_deployment.notes[0]
    with torch.no_grad():
        assert relative(model.body(X) * (model.count + 1), model(X)) == 0
    assert float(model.count) > before


# What stands in for the forward, and for how long


def deployed() -> tuple[nn.Module, Tensor]:
    model = converted(Block(), X)
    with torch.no_grad():
        expected = model(X)
    return lego.deploy_(model, X, seconds=0), expected


def runs_by_graph(model: nn.Module) -> bool:
    own = model.__dict__["forward"]
    run, ran = own.run, []
    own.run = lambda *args: ran.append(1) or run(*args)
    try:
        model(X)
    finally:
        own.run = run
    return bool(ran)


def test_training_and_gradients_go_through_the_own_code() -> None:
    model, _ = deployed()
    assert runs_by_graph(model)
    model.train()
    model(X).sum().backward()
    assert model.conv1.lego_filters.grad.abs().max() > 0
    model.eval()
    assert not runs_by_graph(model)  # the norms' statistics have moved
    model, expected = deployed()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert relative(expected, model(X)) < 1e-5


@pytest.mark.parametrize("change", ["load", "step", "double", "autocast", "dense"])
def test_a_change_is_seen(change: str) -> None:
    model, expected = deployed()
    x = X
    with torch.no_grad():
        if change == "load":
            other = {name: value.clone() for name, value in model.state_dict().items()}
            other["conv1.lego_filters"] *= 2
            model.load_state_dict(other)
        elif change == "step":
            model.conv1.lego_filters.mul_(2)
        elif change == "double":
            model.double()
            x = X.double()
        elif change == "dense":
            lego.to_dense_(model)
            assert "forward" not in model.__dict__
        if change in ("load", "step"):
            assert not runs_by_graph(model)
            assert relative(expected, model(X)) > 1e-3
            assert torch.equal(model(X), lego.undeploy_(model)(X))
        elif change == "autocast":
            with torch.autocast("cpu"):
                assert not runs_by_graph(model)
        else:
            assert relative(expected.to(x.dtype), model(x)) < 1e-5


def test_copies_exports_and_undeploying() -> None:
    model, expected = deployed()
    twin = copy.deepcopy(model)
    assert not runs_by_graph(twin) if "forward" in twin.__dict__ else True
    with torch.no_grad():
        assert relative(expected, twin(X)) < 1e-6
        assert relative(expected, lego.to_dense(model)(X)) < 1e-6
        exported = torch.export.export(model, (X,)).module()
        assert relative(expected, exported(X)) < 1e-6
        assert list(inspect.signature(model.forward).parameters) == ["x"]
        lego.undeploy_(model)
        assert "forward" not in model.__dict__
        assert torch.equal(model(X), twin(X))


def test_a_hook_that_comes_later_is_heard() -> None:
    model, expected = deployed()
    heard: list[Tensor] = []
    with model.norm1.register_forward_hook(lambda module, args, output: heard.append(output)):
        with torch.no_grad():
            assert relative(expected, model(X)) < 1e-6
        assert len(heard) == 1
    assert runs_by_graph(model)
    totals = lego.measure(model, example_input=X).totals()
    assert totals["dense_macs"] > totals["macs"] > 0


def test_deploying_again_starts_afresh() -> None:
    model, _ = deployed()
    with torch.no_grad():
        model.conv1.lego_filters.mul_(2)
        expected = lego.to_dense(model)(X)
        lego.deploy_(model, X, seconds=0)
        assert runs_by_graph(model)
        assert relative(expected, model(X)) < 1e-5


# Choices


def test_choices_are_replayed_to_the_bit() -> None:
    model, _ = deployed()
    choices = model.lego_deployment.choices
    assert model.lego_deployment.milliseconds.keys() == choices.routes.keys()
    with torch.no_grad():
        expected = model(X)
        lego.deploy_(model, X, choices=choices)
        assert torch.equal(model(X), expected)
    assert model.lego_deployment.choices == choices
    assert model.lego_deployment.milliseconds == {}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"routes": {}}, "'stem'"),
        ({"formats": {}}, "no format"),
        ({"routes": {"stem": "plain"}}, "'plain'"),
        ({"routes": {"stem": "reference"}}, "possible"),
    ],
)
def test_choices_of_another_network_are_refused(change: dict[str, Any], word: str) -> None:
    model, expected = deployed()
    choices = model.lego_deployment.choices
    if change.get("routes"):
        change = {"routes": {**choices.routes, **change["routes"]}}
    with pytest.raises(DeployError, match=word):
        lego.deploy_(model, X, choices=choices.model_copy(update=change))
    with torch.no_grad():
        assert relative(expected, model(X)) < 1e-6


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("route", ["assemble", "onednn", "fused", "winograd"])
def test_every_route_in_both_formats(route: Any, layout: Any) -> None:
    for net in (Block(act=nn.ReLU6), Geometry()):
        x = torch.randn(2, 3, 30, 26)
        model = converted(net, x, k=2)
        with torch.no_grad():
            expected = model(x)
            lego.deploy_(model, x, seconds=0)
            own = model.lego_deployment.choices
            routes = dict.fromkeys(own.routes, route)
            if route == "fused" and isinstance(net, Geometry):  # it has no groups
                routes |= {f"layers.{i}": "onednn" for i in (5, 7, 10)}
            if route == "winograd":
                kept = {"stem", "conv1"} if isinstance(net, Block) else {"layers.0", "layers.8"}
                routes = {n: route if n in kept else r for n, r in own.routes.items()}
            choices = own.model_copy(update={"routes": routes, "formats": {"": layout}})
            lego.deploy_(model, x, choices=choices)
            assert relative(expected, model(x)) < 1e-5
            assert relative(expected[:1], model(x[:1])) < 1e-5


def hinted(tmp_path: Path) -> Path:
    model = lego.create(
        "resnet18",
        pretrained=False,
        num_classes=10,
        model_args={"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    )
    image = torch.randn(1, 3, 32, 32)
    converted(model, image)
    lego.deploy_(model, image, seconds=0)
    return lego.save(model, tmp_path / "hinted")


def test_the_checkpoint_keeps_the_choices_as_a_hint(tmp_path: Path) -> None:
    folder = hinted(tmp_path)
    model = lego.load(folder)
    image = torch.randn(1, 3, 32, 32)
    (choices,) = model.lego_choices
    lego.deploy_(model, image)
    assert model.lego_deployment.hint_used
    assert model.lego_deployment.choices == choices
    lego.deploy_(model, image, seconds=0, remeasure=True)
    assert not model.lego_deployment.hint_used
    lego.deploy_(model, torch.randn(2, 3, 32, 32), seconds=0)  # another batch
    assert not model.lego_deployment.hint_used
    shapes = [hint.machine.input_shapes[0] for hint in model.lego_choices]
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 32)]
    lego.save(model, tmp_path / "again")
    assert lego.load(tmp_path / "again").lego_choices == model.lego_choices


@pytest.mark.parametrize(
    "change",
    [
        {"routes": {"conv1": "magic"}},
        {"routes": {"conv1": 3}},
        {"formats": {"": "sideways"}},
        {"machine": None},
        {"unknown": 1},
    ],
)
def test_a_hint_that_is_none_is_a_typed_error(change: dict[str, Any], tmp_path: Path) -> None:
    folder = hinted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"]["deployment"][0].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="deployment"):
        lego.load(folder)


def test_a_hint_of_another_network_is_not_used(tmp_path: Path) -> None:
    folder = hinted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"]["deployment"][0]["routes"] = {"nowhere": "fused"}
    (folder / "config.json").write_text(json.dumps(config))
    model = lego.deploy_(lego.load(folder), torch.randn(1, 3, 32, 32), seconds=0)
    assert not model.lego_deployment.hint_used
    assert "conv1" in model.lego_deployment.choices.routes


@pytest.mark.parametrize("example", ["image", torch.zeros(1, 3, 8, 8).int(), ()])
def test_an_example_that_is_no_image(example: Any) -> None:
    with pytest.raises(UsageError, match="example_input"):
        lego.deploy_(converted(Block(), X), example)


# Parts


def test_missing_kernels_are_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "there was no compiler")
    for _ in range(2):
        check(converted(Block(), torch.randn(1, 3, 9, 11)), torch.randn(1, 3, 9, 11))
    assert [record.message for record in caplog.records] == [
        "deploy_ goes on without the fused kernel, slower: there was no compiler"
    ]


class Twice(nn.Module):
    """Two sums with one map: the second alone may overwrite it, and not where it is kept."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.stem, self.one, self.two = conv(3, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.two(self.one(x) + x) + x
        return y + x.mean() if self.keep else y


@pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_unavailable()))
@pytest.mark.parametrize("keep", [False, True])
def test_residuals_are_overwritten_only_where_nobody_reads_them(keep: bool) -> None:
    model = converted(Twice(keep), torch.randn(1, 3, 9, 11))
    assert check(model, torch.randn(1, 3, 9, 11), only=("fused",)).n_sums == 2
    calls = [n for n in deployed_graph(model).graph.nodes if n.op == "call_module"]
    assert [len(node.args) for node in calls if "sites" in node.target] == [1, 2, 2 if keep else 3]


@torch.no_grad()
def test_a_spare_residual_is_overwritten_while_timing_in_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 3, 9, 11)
    site = trace("", converted(Twice(keep=False), x), (x,)).convs[2]
    calls: list[tuple[int, bool]] = []
    runner = ConvSite.runner

    def heard(self: ConvSite, *route: Any) -> Any:
        def run(x: Tensor, residual: Tensor, spare: bool) -> Tensor:
            calls.append((residual.data_ptr(), spare))
            return run_it(x, residual, spare)

        run_it = runner(self, *route)
        return run

    monkeypatch.setattr(ConvSite, "runner", heard)
    residual = torch.randn(1, 8, 9, 11)
    before = residual.clone()
    times = _site_times(site, None, "nchw", torch.randn(1, 8, 9, 11), residual, True)
    assert torch.equal(residual, before)
    timed = [place for place, spare in calls if spare]
    assert len(timed) >= sum(map(len, times.values()))
    assert residual.data_ptr() not in timed


@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(13, 16), (5, 7), (9, 71)])
def test_every_pooling_is_pooling(
    kernel: Any, stride: int, padding: int, dilation: int, size: tuple[int, int]
) -> None:
    if padding and kernel == 1:
        return
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    x = torch.randn(2, 11, *size)
    x[0, 0, 3, 4], x[0, 1, 4, 5], x[1, 10] = torch.nan, torch.inf, -torch.inf
    before, site = x.clone(), PoolSite("pool", pool)
    for route in POOL_ROUTES:
        assert torch.equal(site.run(route, x).nan_to_num(7), pool(x).nan_to_num(7))
    assert torch.equal(before.nan_to_num(7), x.nan_to_num(7))


EXACT = {"m": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_lego", "n_norms"),
    [
        ("timm/resnet18", 19, 20),
        ("timm/regnety_002", 69, 44),
        ("timm/tf_mobilenetv3_small_075", 41, 34),
        ("timm/nf_regnet_b0", 30, 0),
        ("torchvision/googlenet", 56, 57),
        ("torchvision/mnasnet0_5", 34, 52),
    ],
)
def test_networks_compute_the_same(name: str, n_lego: int, n_norms: int) -> None:
    model = build(source(name))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = converted(model, x, **EXACT)(x)
        lego.deploy_(model, x, seconds=0)
        assert relative(expected, model(x)) < 1e-4
    done = model.lego_deployment
    assert done.n_lego >= n_lego
    assert done.n_norms == n_norms


@pytest.mark.slow
def test_a_detector_is_deployed_in_parts() -> None:
    model = build(source("torchvision/ssdlite320_mobilenet_v3_large"))
    images = [torch.rand(3, 320, 320)]
    with torch.no_grad():
        converted(model, (images,), **EXACT)
        features = model.backbone(images[0][None])
        outputs = model.head(list(features.values()))
        lego.deploy_(model, (images,), seconds=0)
        assert relative(features, model.backbone(images[0][None])) < 1e-4
        assert relative(outputs, model.head(list(features.values()))) < 1e-4
        assert len(model(images)) == 1
    done = model.lego_deployment
    assert "backbone" in done.choices.formats
    assert done.n_lego > 60
    assert done.notes[0].startswith("(root) is not traced as a whole")


@pytest.mark.parametrize("batch", [1, 5])
def test_means_and_linear_layers_run_by_routes_of_ours(batch: int) -> None:
    mean, x = MeanSite("mean"), torch.randn(batch, 300, 7, 13)
    assert torch.allclose(mean.run("kernel", x), x.mean((2, 3), keepdim=True), atol=1e-6)
    assert torch.equal(mean.run("kernel", x[:0]), mean.plain(x[:0]))
    linear = nn.Linear(300, 77)
    site, x = LinearSite("fc", linear), torch.randn(batch, 300)
    with torch.no_grad():
        assert torch.allclose(site.run("kernel", x), linear(x), atol=1e-5)
        assert torch.equal(site.run("plain", x), linear(x))


def test_a_classifier_runs_by_routes_of_ours_on_two_threads() -> None:
    model = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    torch.set_num_threads(2)
    try:
        found = check(converted(model, X), X)
    finally:
        torch.set_num_threads(1)
    assert {found.choices.routes[name] for name in ("1", "3")} <= set(POOL_ROUTES)
