"""Quantised networks in a folder: int8 weights and ranges, checked before use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import CheckpointError
from tests.support.folders import CONFIG, TENSORS, edit_config, edit_tensors
from tests.support.quantizing import Small, small_images, small_network


@pytest.fixture(scope="module")
def quantised() -> nn.Module:
    model = lego.quantize_(small_network(), small_images())
    lego.lego_state(model).source = lego.Source(None, None)
    return model


@pytest.fixture
def folder(quantised: nn.Module, tmp_path: Path) -> Path:
    return lego.save(quantised, tmp_path / "saved")


def test_a_loaded_network_gives_the_same_bits(quantised: nn.Module, folder: Path) -> None:
    loaded = lego.load(folder, model=Small())
    images = small_images(5, seed=3)
    with torch.no_grad():
        assert torch.equal(loaded(images), quantised(images))
        assert torch.equal(type(loaded).forward(loaded, images), Small.forward(quantised, images))  # type: ignore[arg-type]
    assert lego.lego_state(loaded).quantization == lego.lego_state(quantised).quantization
    again = lego.save(loaded, folder.parent / "again")
    for name in (CONFIG, TENSORS):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_hook_before_the_first_call_is_heard_once(quantised: nn.Module, folder: Path) -> None:
    loaded = lego.load(folder, model=Small())
    conv = next(module for module in loaded.modules() if isinstance(module, nn.Conv2d))
    calls: list[int] = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        loaded(small_images(1))
        assert calls == [1]
        handle.remove()
        assert torch.equal(loaded(small_images(1)), quantised(small_images(1)))


def test_a_dense_network_is_saved_when_it_is_quantised(tmp_path: Path) -> None:
    model = lego.quantize_(small_network(convert=False), small_images())
    lego.lego_state(model).source = lego.Source(None, None)
    loaded = lego.load(lego.save(model, tmp_path / "dense"), model=Small())
    images = small_images(5, seed=3)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_weights_are_stored_as_int8(folder: Path) -> None:
    stored: dict[str, Tensor] = {}
    edit_tensors(folder, stored.update)
    assert stored["stem.weight"].dtype == torch.int8
    assert stored["stem.weight_scales"].dtype == torch.bfloat16
    assert stored["a.lego_filters"].dtype == torch.int8


def test_the_format_version_is_raised_for_quantised_networks_only(
    quantised: nn.Module, folder: Path, tmp_path: Path
) -> None:
    versions: list[int] = []
    edit_config(folder, lambda c: versions.append(c["compression_config"]["format_version"]))
    plain = small_network()
    lego.lego_state(plain).source = lego.Source(None, None)
    other = lego.save(plain, tmp_path / "plain")
    edit_config(other, lambda c: versions.append(c["compression_config"]["format_version"]))
    assert versions == [2, 1]
    assert lego.lego_state(lego.load(other, model=Small())).quantization is None


def test_a_network_that_has_changed_is_not_saved(tmp_path: Path) -> None:
    model = lego.quantize_(small_network(), small_images())
    with torch.no_grad():
        model.get_submodule("stem").weight.add_(0.01)  # type: ignore[operator, union-attr]
    lego.lego_state(model).source = lego.Source(None, None)
    with pytest.raises(CheckpointError, match=r"'stem\.weight' has changed since quantize_"):
        lego.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def part(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        change(config["compression_config"]["quantization"])

    return edit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q["parts"][""]["ranges"]["stem"].update(scale=0.0), "stem.scale"),
        (lambda q: q["parts"][""]["ranges"]["stem"].update(scale=-1.0), "stem.scale"),
        (lambda q: q["parts"][""]["ranges"]["stem"].update(scale=1e300), "stem.scale"),
        (lambda q: q["parts"][""]["ranges"]["stem"].update(zero=256), "stem.zero"),
        (lambda q: q["parts"][""]["ranges"]["stem"].update(zero=-1), "stem.zero"),
        (lambda q: q["parts"][""]["ranges"]["stem"].update(zero=1.5), "stem.zero"),
        (lambda q: q["parts"][""]["shifts"]["stem"].update(filters="z"), "stem.filters"),
        (lambda q: q["parts"][""]["shifts"]["stem"].update(output=8), "stem.output"),
        (lambda q: q["parts"].update(nowhere=q["parts"].pop("")), "no part called 'nowhere'"),
        (lambda q: q["parts"][""].update(inputs=[[1, 3, 2**16, 2**16]]), "values are allowed"),
        (lambda q: q["parts"][""].update(inputs=[]), "inputs"),
        (lambda q: q.update(dense_layers=["nowhere"]), "no conv or Linear called 'nowhere'"),
        (lambda q: q.update(dense_layers=["a"]), "no conv or Linear called 'a'"),
        (lambda q: q.update(dense_layers=["stem"]), "tensor.*(unknown|int8)"),
        (lambda q: q.update(precision="int4"), "precision"),
        (lambda q: q.update(extra=1), "extra"),
    ],
)
def test_hostile_records_are_refused_when_the_folder_is_loaded(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    edit_config(folder, part(change))
    with pytest.raises(CheckpointError, match=words):
        lego.load(folder, model=Small())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["ranges"].pop("stem"), "ranges of 'stem': the network needs them"),
        (lambda p: p["ranges"].update(x=p["ranges"]["stem"]), "ranges of 'x'.*does not need"),
        (lambda p: p["shifts"].pop("stem"), "shifts of 'stem': the network needs them"),
        (lambda p: p["shifts"]["stem"].update(filters="aa"), "'stem' has 8 filters, and 2 shifts"),
        (lambda p: p.update(float_layers={"x": "why"}), "no layer 'x'"),
        (lambda p: p.update(inputs=[[1, 5, 12, 12]]), "cannot be traced on inputs"),
    ],
)
def test_names_and_sizes_are_checked_before_the_first_call(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    edit_config(folder, part(lambda q: change(q["parts"][""])))
    loaded = lego.load(folder, model=Small())
    with torch.no_grad(), pytest.raises(CheckpointError, match=words):
        loaded(small_images(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["stem.weight"].fill_(-128), r"stem\.weight.*-128"),
        (lambda t: t["stem.weight_scales"].fill_(0), "positive finite scales"),
        (lambda t: t.pop("stem.weight_scales"), r"stem\.weight_scales' is missing"),
        (lambda t: t.update({"stem.weight": t["stem.weight"].float()}), "float32, expected int8"),
    ],
)
def test_hostile_weights_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], words: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=words):
        lego.load(folder, model=Small())
