"""The torch.export program: equal to the network, small, and free of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

import legocompress as lego
from legocompress import kernels
from legocompress.errors import (
    ExportError,
    KernelError,
    OutputError,
    OutputExistsError,
    UsageError,
)
from legocompress.export.interface import make_example_inputs, measure_differences
from legocompress.export.program import (
    StoredUnit,
    build_reference,
    check_agrees,
    index_dtype,
    make_hollow_copy,
    trace_program,
)
from tests.support.disks import full_disk

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}


class Mixed(nn.Module):
    """Plain, grouped, padded, strided and doubly used convs, a norm and Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 13, 3, stride=2, padding=1)
        self.padded = nn.Conv2d(13, 13, (3, 1), padding="same", bias=False)
        self.circular = nn.Conv2d(13, 12, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(12, 20, 3, padding=1, groups=2)
        self.hidden = nn.Linear(20, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.stem(x)).relu())
        x = self.circular(self.padded(self.padded(x).relu()))
        return self.head(self.hidden(self.grouped(x).relu().mean((2, 3))))


def mixed(**settings: Any) -> nn.Module:
    model = Mixed().eval()
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    settings = {"m": 0.6, "o": 2, "k": 2, "linear": True, "allow_expansion": True, **settings}
    plan = lego.plan(model, lego.LegoSpec(**settings), torch.zeros(1, 3, 12, 12))
    return lego.convert_(model, plan)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_a_stored_unit_gives_back_the_unit(dtype: str, coefficients: bool) -> None:
    model = mixed(dtype=dtype, coefficients=coefficients, k=3)
    units = dict(lego.lego_modules(model))
    assert len(units) == 6
    for unit in units.values():
        stored = StoredUnit(unit)
        back = stored()
        assert torch.equal(back["lego_filters"], unit.lego_filters)
        assert torch.equal(back["index"], unit.index)
        assert back["index"].dtype == torch.int64
        assert ("coefficients" in back) == coefficients
        if unit.coefficients is not None:
            assert torch.equal(back["coefficients"], unit.coefficients)
        bits = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8}[dtype]
        assert 8 * stored.filters.element_size() == bits
        assert stored.index.dtype == torch.uint8


def test_the_index_is_as_narrow_as_its_values_allow() -> None:
    kinds = [torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32]
    counts = [1, 2**8, 2**8 + 1, 2**15, 2**15 + 1]
    assert [index_dtype(count) for count in counts] == kinds
    for count, kind in zip(counts, kinds, strict=True):
        assert torch.tensor(count - 1).to(kind).item() == count - 1


@pytest.mark.parametrize(("form", "dtype"), [("lego", "int8"), ("dense", "fp32")])
def test_a_program_runs_where_this_package_is_not_installed(
    form: Any, dtype: str, tmp_path: Path, elsewhere: Callable[[str], str]
) -> None:
    model = mixed(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = lego.export_program(
        model, tmp_path / "x.pt2", form, example_input=torch.zeros(1, 3, 12, 12)
    )
    assert found.path == tmp_path / "x.pt2"
    assert found.bytes == found.path.stat().st_size
    assert found.relative_difference < 1e-5
    x = torch.randn(5, 3, 12, 12)
    torch.save(x, tmp_path / "x")
    elsewhere(f"""
import torch
program = torch.export.load({str(found.path)!r}).module()
x = torch.load({str(tmp_path / "x")!r}, weights_only=True)
with torch.no_grad():
    torch.save([program(x), program(x[:1])], {str(tmp_path / "y")!r})
""")
    five, one = torch.load(tmp_path / "y", weights_only=True)
    expected = outputs(model, x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(five, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one, expected[:1], rtol=1e-5, atol=1e-6)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {unit.route for _, unit in lego.lego_modules(model)} == {"assemble"}


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
def test_a_fused_program_calls_the_kernels_and_needs_this_package(
    tmp_path: Path, elsewhere: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(forms: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[float]]:
        return {name: [float(name not in ("fused", "nchw fastest"))] for name in forms}

    monkeypatch.setattr("legocompress.deploy.autotune.time_interleaved", times)
    model = timm.create_model("resnet18", num_classes=7, **SMALL).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    image = torch.zeros(1, 3, 32, 32)
    spec = lego.LegoSpec(m=0.5, o=2, dtype="fp16", allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, image))
    units = [unit for _, unit in lego.lego_modules(model)]
    for unit in units:  # as training leaves them: not rounded
        unit.lego_filters.data += 1e-3 * torch.randn_like(unit.lego_filters)
    found = lego.export_program(model, tmp_path / "x.pt2", "fused", example_input=image)
    assert lego.lego_state(model).deployment is None
    program = torch.export.load(found.path)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("legocompress.lego_conv2d.default") >= len(units)
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(outputs(program.module(), x), outputs(model, x))
    with pytest.raises(AssertionError, match="lego_conv2d"):
        elsewhere(f"import torch; torch.export.load({str(found.path)!r})")


def test_a_fused_program_wants_the_kernels_and_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = mixed(), torch.zeros(1, 3, 12, 12)
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "no compiler was there")
    with pytest.raises(KernelError, match="no compiler was there"):
        lego.export_program(model, tmp_path / "x.pt2", "fused", example_input=image)
    monkeypatch.undo()
    counting = Counting().eval()
    lego.convert_(counting, lego.plan(counting, lego.LegoSpec(allow_expansion=True), image))
    with pytest.raises(ExportError, match=r"no single graph.*--form lego"):
        lego.export_program(counting, tmp_path / "x.pt2", "fused", example_input=image)
    assert not list(tmp_path.iterdir())


def test_the_lego_form_merges_and_stores_no_dense_weight() -> None:
    model = mixed(dtype="fp16", coefficients=False, linear=False)
    hollow, units = make_hollow_copy(model, "lego")
    assert {unit.route for _, unit in lego.lego_modules(hollow)} == {"reference"}
    assert sum(p.numel() for _, u in lego.lego_modules(hollow) for p in [u.lego_filters]) == 0
    assert {unit.filters.dtype for unit in units.values()} == {torch.float16}
    other, _ = make_hollow_copy(model, "assemble-at-load")
    assert {unit.route for _, unit in lego.lego_modules(other)} == {"assemble"}


def test_a_class_with_a_forward_of_its_own_is_assembled(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ScaledStdConv2d(8, 16, 3), ScaledStdConv2d(16, 8, 3))
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 12, 12)))
    units = [unit for _, unit in lego.lego_modules(model)]
    assert [type(unit).__name__ for unit in units] == ["LegoScaledStdConv2d"] * 2
    found = lego.export_program(model, tmp_path / "x.pt2", example_input=torch.zeros(1, 3, 12, 12))
    assert found.relative_difference < 1e-5


def test_half_precision_networks_run_in_fp32(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=7, **SMALL).half().eval()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.float16)
    spec = lego.LegoSpec(m=0.5, o=2, dtype="fp16", allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, image))
    found = lego.export_program(model, tmp_path / "x.pt2", "dense", example_input=image)
    (x,) = make_example_inputs(model, image)
    assert x.dtype == torch.float32
    program = torch.export.load(found.path).module()
    torch.testing.assert_close(outputs(program, x), outputs(build_reference(model, "dense"), x))


def test_what_training_has_moved_is_rounded_as_in_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    image = torch.zeros(1, 3, 12, 12)
    spec = lego.LegoSpec(m=0.5, o=2, dtype="int8", allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, image))
    for _, unit in lego.lego_modules(model):
        unit.lego_filters.data += 0.1 * torch.randn_like(unit.lego_filters)
    lego.save(model, tmp_path / "saved")
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    saved = lego.load(tmp_path / "saved", model=plain)
    found = lego.export_program(model, tmp_path / "x.pt2", example_input=image)
    assert found.relative_difference < 1e-5
    x = torch.randn(2, 3, 12, 12)
    theirs = outputs(torch.export.load(found.path).module(), x)
    torch.testing.assert_close(theirs, outputs(saved, x), rtol=1e-5, atol=1e-6)
    assert float((theirs - outputs(model.eval(), x)).abs().max()) > 1e-4


class Counting(nn.Module):
    """A network that no tracer can follow: its path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.b = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y if float(y.sum()) > 0 else -y


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 12, 12)
    model = Counting().eval()
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, image))
    with pytest.raises(ExportError, match=r"cannot trace.*--to dense"):
        lego.export_program(model, tmp_path / "x.pt2", example_input=image)
    with pytest.raises(UsageError, match="'lego', 'dense' and 'fused'"):
        lego.export_program(model, tmp_path / "x.pt2", "assemble-at-load", example_input=image)
    (tmp_path / "there").write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        lego.export_program(model, tmp_path / "there", example_input=image)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    with pytest.raises(UsageError, match="example_input"):
        make_example_inputs(nn.Identity(), None)
    with pytest.raises(ExportError, match="cannot trace"):
        trace_program(Counting(), torch.zeros(2, 3, 12, 12))


def test_a_wrong_export_is_not_written() -> None:
    a = {"out": torch.tensor([1.0, -4.0]), "aux": torch.tensor([2.0])}
    b = {"out": torch.tensor([1.0, -3.0]), "aux": torch.tensor([2.5])}
    assert measure_differences(a, b) == (1.0, 0.25)
    assert measure_differences(a, a) == (0.0, 0.0)
    for bad in (0.25, float("nan")):
        with pytest.raises(ExportError, match="nothing was written"):
            check_agrees("the program", bad)
    check_agrees("the program", 1e-5)


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    """torch's own writer would end the process here, since its destructor throws."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    lego.convert_(net, lego.plan(net, lego.LegoSpec(allow_expansion=True), torch.zeros(1, 3, 9, 9)))
    target = tmp_path / "a.pt2"
    target.write_bytes(b"old")
    with full_disk(500), pytest.raises(OutputError, match="no space left to write"):
        lego.export_program(net, target, force=True, example_input=torch.zeros(1, 3, 9, 9))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
