"""The dense export: the original architecture loads it strictly and gives the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import ExportError, OutputExistsError
from legocompress.export.dense import dense_state

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}


def converted(model: nn.Module, **settings: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    settings = {"m": 0.5, "o": 2, "k": 2, "allow_expansion": True, **settings}
    dtype = next(model.parameters()).dtype
    image = torch.zeros(1, 3, 32, 32, dtype=dtype)
    return lego.convert_(model.eval(), lego.plan(model, lego.LegoSpec(**settings), image))


def assert_equal(model: nn.Module, plain: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32).to(next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model.eval()(x)
        assert expected.float().std() > 0
        assert torch.equal(plain.eval()(x), expected)


def test_timm_loads_it_strictly(tmp_path: Path) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL))
    path = lego.export_dense(model, tmp_path / "a" / "x.safetensors")
    plain = timm.create_model("resnet18", num_classes=7, **SMALL)
    plain.load_state_dict(load_file(path), strict=True)
    assert not any(True for _ in lego.lego_modules(plain))
    assert_equal(model, plain)


def test_timm_loads_it_as_a_checkpoint_file(tmp_path: Path) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL))
    path = lego.export_dense(model, tmp_path / "x.safetensors")
    plain = timm.create_model("resnet18", num_classes=7, checkpoint_path=str(path), **SMALL)
    assert_equal(model, plain)


def test_torchvision_loads_it_strictly(tmp_path: Path) -> None:
    rules = ["features.[3456].*:m=0.25,k=1"]
    model = converted(torchvision.models.squeezenet1_1(num_classes=7), only=["features.[3-6].*"],
                      rules=rules)  # fmt: skip
    path = lego.export_dense(model, tmp_path / "x.safetensors")
    plain = torchvision.models.squeezenet1_1(num_classes=7)
    plain.load_state_dict(load_file(path), strict=True)
    assert_equal(model, plain)


def test_the_network_itself_stays_compressed(tmp_path: Path) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lego.export_dense(model, tmp_path / "x.safetensors")
    dense = lego.to_dense(model)
    assert not any(True for _ in lego.lego_modules(dense))
    assert len(list(lego.lego_modules(model))) == 12
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_equal(model, dense)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a
        self.head = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.b(self.a(self.stem(x))).mean((2, 3))))


def test_aliases_are_present(tmp_path: Path) -> None:
    model = converted(TwoNames())
    assert [name for name, _ in lego.lego_modules(model)] == ["a"]
    state = load_file(lego.export_dense(model, tmp_path / "x.safetensors"))
    assert state.keys() == TwoNames().state_dict().keys()
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert torch.equal(state["head.weight"], state["tied.weight"])
    plain = TwoNames()
    plain.load_state_dict(state, strict=True)
    assert_equal(model, plain)


OLD_TIMM = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 23)
needs_timm = pytest.mark.skipif(OLD_TIMM, reason="timm 1.0.22 reads a folder's file as pickle")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_in_memory_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL).to(dtype), dtype="fp16")
    state = load_file(lego.export_dense(model, tmp_path / "x.safetensors"))
    assert {v.dtype for v in state.values()} == {dtype, torch.int64}
    plain = timm.create_model("resnet18", num_classes=7, **SMALL).to(dtype)
    plain.load_state_dict(state, strict=True)
    assert_equal(model, plain)


def test_channels_last_is_exported_as_the_same_numbers(tmp_path: Path) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL))
    state = dense_state(model)
    model = model.to(memory_format=torch.channels_last)
    written = load_file(lego.export_dense(model, tmp_path / "x.safetensors"))
    assert list(state.keys()) == list(dense_state(model).keys())
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL))
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        lego.export_dense(model, path)
    assert path.read_text() == "precious"
    assert lego.export_dense(model, path, force=True) == path
    first = path.read_bytes()
    assert load_file(path)["fc.weight"].shape == (7, 16)
    lego.export_dense(model, path, force=True)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.slow
@needs_timm
def test_the_dense_state_loads_where_this_package_is_not_installed(
    tmp_path: Path, elsewhere: Callable[[str], str]
) -> None:
    model = converted(timm.create_model("resnet18", num_classes=7, **SMALL))
    path = lego.export_dense(model, tmp_path / "x.safetensors")
    folder = lego.export_timm(model, tmp_path / "folder")
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x")
    elsewhere(f"""
import timm, torch
from safetensors.torch import load_file
model = timm.create_model("resnet18", num_classes=7, **{SMALL!r})
model.load_state_dict(load_file({str(path)!r}), strict=True)
again = timm.create_model("local-dir:{folder}", pretrained=True)
x = torch.load({str(tmp_path / "x")!r}, weights_only=True)
with torch.no_grad():
    torch.save([model.eval()(x), again.eval()(x)], {str(tmp_path / "y")!r})
""")
    with torch.no_grad():
        expected = model.eval()(x)
    for found in torch.load(tmp_path / "y", weights_only=True):
        assert torch.equal(found, expected)


@needs_timm
def test_a_timm_folder_keeps_classes_channels_and_preprocessing(tmp_path: Path) -> None:
    model = lego.create(
        "resnet18",
        pretrained=False,
        num_classes=7,
        in_chans=4,
        model_args=SMALL,
        preprocess={"mean": (0.5,), "input_size": (32, 32)},
    )
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec))
    folder = lego.export_timm(model, tmp_path / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert "compression_config" not in json.loads((folder / "config.json").read_text())
    plain: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert plain.pretrained_cfg["mean"] in ([0.5] * 4, (0.5,) * 4)
    assert tuple(plain.pretrained_cfg["input_size"]) == (4, 32, 32)
    x = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model(x))
    with pytest.raises(OutputExistsError, match="--force"):
        lego.export_timm(model, folder)
    assert lego.export_timm(model, folder, force=True) == folder
    assert lego.open_model(str(folder)).pretrained_cfg["crop_pct"] == 0.95


@pytest.mark.slow
def test_what_timm_does_not_build_is_refused_as_its_folder(tmp_path: Path) -> None:
    model = lego.create("torchvision/squeezenet1_1", pretrained=False)
    converted(model, only=["features.3.expand1x1"])
    with pytest.raises(ExportError, match=r"timm has no squeezenet1_1.*--to dense"):
        lego.export_timm(model, tmp_path / "a")
    with pytest.raises(ExportError, match="timm has no TwoNames"):
        lego.export_timm(converted(TwoNames()), tmp_path / "a")
    deployed = converted(lego.create("repvgg_a0", pretrained=False), only=["stages.0.0.*"])
    with pytest.raises(ExportError, match="is fused"):
        lego.export_timm(deployed, tmp_path / "a")
    assert not list(tmp_path.iterdir())
