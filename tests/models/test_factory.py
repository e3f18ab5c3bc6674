"""Where models come from: names, seeds, weights files and preprocessing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

import legocompress as lego
from legocompress.errors import LegoError, ModelNameError, UsageError, WeightsError
from legocompress.models.factory import build
from legocompress.models.preprocessing import torchvision_cfg
from legocompress.models.source import source_of
from legocompress.state.source import Source
from tests.support.tiny import SMALL, same, small

SHARED = Path(__file__).parents[3] / "shared" / "weights"

# Names


def test_a_bare_name_is_timms_where_both_have_it() -> None:
    for name, kind in [("resnet18", timm.models.resnet.ResNet),
                       ("timm/resnet18", timm.models.resnet.ResNet),
                       ("torchvision/resnet18", torchvision.models.resnet.ResNet),
                       ("squeezenet1_1", torchvision.models.squeezenet.SqueezeNet)]:  # fmt: skip
        model: Any = lego.create(name, pretrained=False)
        assert type(model) is kind
        library = "timm" if kind.__module__.startswith("timm") else "torchvision"
        assert lego.lego_state(model).source.library == library
        assert lego.lego_state(model).source.architecture == name.rpartition("/")[2]
        assert not model.training


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet51", "resnet50"),
        ("timm/resnet51", "resnet50"),
        ("torchvision/squeezenet", "squeezenet1_1"),
        ("mobilenetv2", "mobilenet"),
    ],
)
def test_unknown_names_have_near_ones_told(name: str, near: str) -> None:
    short = name.rpartition("/")[2]
    with pytest.raises(ModelNameError, match=f"unknown model '{short}'.*{near}"):
        lego.create(name)


@pytest.mark.parametrize("name", ["keras/resnet50", "a/b/resnet18", "/resnet18x", "/no/folder"])
def test_unknown_sources(name: str) -> None:
    with pytest.raises(ModelNameError):
        lego.create(name, pretrained=False)


def test_torchvisions_own_names_are_not_timms() -> None:
    with pytest.raises(ModelNameError):
        lego.create("torchvision/regnety_002")
    with pytest.raises(ModelNameError):
        lego.create("timm/squeezenet1_1")
    with pytest.raises(ModelNameError):
        lego.create("")


# A timm folder


def hub_folder(place: Path, **config: Any) -> Path:
    place.mkdir(exist_ok=True)
    dense = small(seed=4)
    save_file(dense.state_dict(), place / "model.safetensors")
    whole = {"architecture": "resnet18", "num_classes": 5, "model_args": SMALL,
             "pretrained_cfg": {"input_size": [3, 40, 40], "mean": [0.1, 0.2, 0.3],
                                "std": [1.0, 1.0, 1.0], "num_classes": 5}, **config}  # fmt: skip
    (place / "config.json").write_text(json.dumps(whole))
    return place


def test_a_timm_folder_is_opened(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub")
    model: Any = lego.create(f"local-dir:{folder}")
    assert same(model, small(seed=4))
    assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert lego.lego_state(model).source == Source(
        "timm", "resnet18", {**SMALL, "num_classes": 5}, f"local-dir:{folder}"
    )
    blank = lego.create(f"local-dir:{folder}", pretrained=False, seed=9)
    assert not same(blank, model)
    changed: Any = lego.create(f"local-dir:{folder}", preprocess={"crop_pct": 0.5})
    assert changed.pretrained_cfg["crop_pct"] == 0.5
    assert same(changed, model)


def test_a_converted_timm_folder_keeps_its_preprocessing(tmp_path: Path) -> None:
    model = lego.create(f"local-dir:{hub_folder(tmp_path / 'hub')}", preprocess={"crop_pct": 0.5})
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=2, o=2, allow_expansion=True)))
    loaded: Any = lego.load(lego.save(model, tmp_path / "a"))
    cfg = loaded.pretrained_cfg
    assert (cfg["crop_pct"], tuple(cfg["mean"]), tuple(cfg["input_size"])) == (
        0.5, (0.1, 0.2, 0.3), (3, 40, 40))  # fmt: skip
    ours, theirs = (resolve_data_config({}, model=network) for network in (model, loaded))
    assert json.dumps(ours) == json.dumps(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "{}", '{"architecture": 5}', '{"architecture": "no_such_net"}',
     '{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": 5}',
     '{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": [1]}',
     '{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"no_such": 1}}',
     '{"architecture": "resnet18", "pretrained_cfg": 5}',
     '{"architecture": "resnet18", "num_classes": "x"}'],
)  # fmt: skip
def test_a_damaged_timm_folder(tmp_path: Path, content: str, pretrained: bool) -> None:
    folder = hub_folder(tmp_path / "hub")
    (folder / "config.json").write_text(content)
    with pytest.raises(LegoError):
        lego.create(f"local-dir:{folder}", pretrained=pretrained)


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "other"])
def test_damaged_weights_of_a_timm_folder(tmp_path: Path, damage: str) -> None:
    folder = hub_folder(tmp_path / "hub")
    path = folder / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "garbage":
        path.write_bytes(b"garbage" * 100)
    else:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"cannot be loaded|do not fit"):
        lego.create(f"local-dir:{folder}")


def test_no_timm_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no model configuration"):
        lego.create(f"local-dir:{tmp_path / 'nowhere'}")


# Random weights


def test_random_weights_follow_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = small(seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(small(seed=7), one)
    assert not same(small(seed=8), one)
    assert one.state_dict()["fc.weight"].std() > 0


def test_arguments_reach_the_architecture() -> None:
    model: Any = small(in_chans=1)
    assert model.conv1.weight.shape[1] == 1
    assert model.fc.weight.shape == (5, 16)
    assert lego.lego_state(model).source.model_args == {**SMALL, "num_classes": 5, "in_chans": 1}
    assert list(build(lego.lego_state(model).source).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_preprocessing_follows_in_chans(channels: int) -> None:
    model: Any = small(in_chans=channels)
    cfg = resolve_data_config({}, model=model)
    assert cfg["input_size"] == (channels, 224, 224)
    assert len(cfg["mean"]) == len(cfg["std"]) == channels
    assert lego.plan(model, lego.LegoSpec(m=2, o=2, allow_expansion=True)).input_shape == (
        1, channels, 224, 224)  # fmt: skip


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    "args",
    [
        {"model_args": {"no_such": 1}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"checkpoint_path": "x"}},
        {"model_args": {"pretrained_cfg": {"file": "x"}}},
        {"model_args": {"block": "basic"}},
        {"model_args": {"output_stride": 5}},
        {"model_args": {"cardinality": 0}},
        {"in_chans": -1},
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, args: dict[str, Any], pretrained: bool) -> None:
    # A folder's weights stand in for a download: what is wrong must be told before.
    name = f"local-dir:{hub_folder(tmp_path / 'hub')}" if pretrained else "resnet18"
    with pytest.raises(UsageError, match="cannot be"):
        lego.create(name, pretrained=pretrained, **args)


@pytest.mark.parametrize("args", [{"in_chans": 1}, {"model_args": {"no_such": 1}},
                                  {"model_args": {"weights": "DEFAULT"}},
                                  {"model_args": {"weights_backbone": "DEFAULT"}},
                                  {"num_classes": -1}])  # fmt: skip
def test_arguments_that_do_not_fit_torchvision(args: dict[str, Any]) -> None:
    for pretrained in (True, False):
        with pytest.raises(UsageError):
            lego.create("torchvision/squeezenet1_1", pretrained=pretrained, **args)


def test_unknown_preprocessing_is_an_error() -> None:
    with pytest.raises(UsageError, match="meen"):
        small(preprocess={"meen": (0, 0, 0)})
    with pytest.raises(UsageError, match="interpolation"):
        small(preprocess={"interpolation": "no_such"})


def test_auxiliary_heads_are_left_out() -> None:
    for name in ("googlenet", "inception_v3"):
        model: Any = lego.create(f"torchvision/{name}", pretrained=False, num_classes=4)
        assert not any(
            key.split(".")[0] in ("aux1", "aux2", "AuxLogits") for key in model.state_dict()
        )
        with torch.no_grad():
            assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 4)


def test_the_source_of_networks_made_elsewhere() -> None:
    ours = timm.create_model("resnet18", pretrained=False, num_classes=3)
    assert source_of(ours) == Source("timm", "resnet18", {"num_classes": 3})
    assert source_of(nn.Sequential()) == Source(None, None)


# Preprocessing


def picture() -> Image.Image:
    """A smooth colour image with some grain, of another shape than a square."""
    y, x = np.mgrid[0:320, 0:410]
    grain = np.random.default_rng(0).normal(0, 12, (320, 410, 3))
    waves = [128 + 90 * np.sin(x / 17 + c) * np.cos(y / (11 + c)) for c in range(3)]
    pixels = np.clip(np.stack(waves, -1) + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b1", "inception_v3",
     "regnet_y_16gf", "convnext_tiny", "efficientnet_v2_s"],
)  # fmt: skip
def test_torchvisions_preprocessing_is_that_of_its_weights(name: str) -> None:

    network: Any = nn.Sequential(nn.Conv2d(3, 4, 1))
    network.pretrained_cfg = torchvision_cfg(name)
    ours = create_transform(**resolve_data_config({}, model=network), is_training=False)
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    x, expected = ours(picture()), theirs(picture())
    assert x.shape == expected.shape
    assert float((x - expected).abs().max()) < 1e-5
    assert expected.std() > 0.5


def test_every_torchvision_size_survives_the_way_through_crop_pct() -> None:

    seen = 0
    for name in torchvision.models.list_models(module=torchvision.models):
        default = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        cfg = torchvision_cfg(name)
        assert cfg["input_size"][1:] == (default.crop_size[0],) * 2, name
        scaled = math.floor(cfg["input_size"][1] / cfg["crop_pct"])
        assert scaled == default.resize_size[0], name
        assert cfg["interpolation"] == default.interpolation.value, name
        assert (cfg["mean"], cfg["std"]) == (tuple(default.mean), tuple(default.std)), name
        seen += 1
    assert seen > 50


def test_preprocessing_can_be_overridden_and_survives(tmp_path: Path) -> None:
    preprocess = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
                  "interpolation": "nearest", "crop_pct": 0.75}  # fmt: skip
    model: Any = small(preprocess=preprocess)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=2, o=2, allow_expansion=True)))
    loaded: Any = lego.load(lego.save(model, tmp_path / "a"))
    for network in (model, loaded):
        cfg = resolve_data_config({}, model=network)
        assert {key: cfg[key] for key in preprocess} == preprocess


# No network


OFFLINE = """
import sys
import legocompress as lego
for name in sys.argv[1:]:
    try:
        lego.create(name)
    except lego.LegoError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_pretrained_detectors_with_frozen_norms_are_refused_with_the_way_out() -> None:
    with pytest.raises(WeightsError, match=r"frozen norms.*load\(\)"):
        lego.create("torchvision/fcos_resnet50_fpn")


@pytest.mark.slow
def test_offline_says_what_to_do(tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), dead)
    places = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    environment = {**os.environ, **proxies, **places, "HF_HUB_OFFLINE": "1"}
    names = ["test_resnet", "torchvision/squeezenet1_1", "hf-hub:timm/resnet18.a1_in1k"]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, *names],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    assert len(lines) == 3
    for name, line in zip(names, lines, strict=True):
        assert line.startswith("WeightsError: ")
        assert f"'{name}'" in line
    for line in lines[:2]:
        assert "--weights FILE" in line
        assert "--no-pretrained" in line


# Real weights


@pytest.mark.parametrize(
    ("name", "file", "args"),
    [
        ("torchvision/mobilenet_v2", "mobilenet_v2", {}),
        ("torchvision/squeezenet1_1", "squeezenet1_1", {}),
        ("timm/tf_efficientnet_lite0", "tf_efficientnet_lite0", {}),
        ("timm/resnet50", "resnet50_embed768", {"num_classes": 768}),
        ("torchvision/resnet50", "resnet50_embed768", {"num_classes": 768}),
    ],
)
def test_real_weights_load(name: str, file: str, args: dict[str, Any]) -> None:
    path = SHARED / f"{file}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the checkout")
    model = lego.create(name, weights=path, **args)
    stored, own = load_file(path), model.state_dict()
    assert stored.keys() <= own.keys()
    for key, value in stored.items():
        assert torch.equal(own[key], value.to(own[key].dtype).reshape(own[key].shape)), key
