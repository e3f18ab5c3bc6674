"""What the tests of compressed folders share: networks to save, and ways to damage a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import (
    CheckpointError,
)

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
CONFIG = "config.json"
TENSORS = "model.safetensors"


class Mixed(nn.Module):
    """A user's own class: plain, grouped, padded and doubly named convs, norms and Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 13, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(13, 13, 1, bias=False)
        self.padded = nn.Conv2d(13, 12, (3, 1), padding="same")
        self.again = self.padded
        self.split = nn.Conv2d(12, 20, 3, padding=1, groups=2)
        self.hidden = nn.Linear(20, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.again(self.grouped(self.wide(x)).relu())
        x = self.split(x).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


def randomised(model: nn.Module) -> nn.Module:
    """Give norms random parameters and statistics: ones and zeros would hide wrong tensors."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def mixed(**settings: Any) -> nn.Module:
    settings = {"m": 0.6, "o": 2, "linear": True, "allow_expansion": True, **settings}
    model = randomised(Mixed())
    return lego.convert_(
        model, lego.plan(model, lego.LegoSpec(**settings), torch.zeros(1, 3, 12, 12))
    )


def small(**settings: Any) -> nn.Module:
    """A timm network of some 20,000 parameters, converted with banks of 5, 6 and 12 filters."""
    model = lego.create("resnet18", pretrained=False, num_classes=10, model_args=SMALL)
    settings = {"m": 0.7, "o": 2, "allow_expansion": True, **settings}
    plan = lego.plan(randomised(model), lego.LegoSpec(**settings), torch.zeros(1, 3, 32, 32))
    return lego.convert_(model, plan)


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """The networks hold the same bits under the same names, and give the same bits."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
    units, others = dict(lego.lego_modules(a)), dict(lego.lego_modules(b))
    assert list(units) == list(others)
    for name, unit in units.items():
        for key in ("lego_shape", "storage_dtype", "weight_error"):
            assert getattr(unit, key) == getattr(others[name], key), name
        assert type(unit) is type(others[name])
    with torch.no_grad():
        expected = a.eval()(x)
        assert torch.isfinite(expected).all()
        assert expected.float().std() > 0
        assert torch.equal(b(x), expected)


def digest(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(folder: Path, match: str = ".") -> str:
    """Load must end in a CheckpointError of one clear line, on any of the ways in."""
    with pytest.raises(CheckpointError, match=match) as caught:
        lego.load(folder)
    text = str(caught.value)
    assert 10 < len(text) < 1500
    assert "\n" not in text.strip()
    return text


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)
