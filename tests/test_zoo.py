"""No model breaks: whole networks of timm and torchvision, and what their users do with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureListNet
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

import legocompress as lego
from benchmarks.common.networks import randomise_
from benchmarks.coverage import EXACT, are_equal, check_architecture, run_model
from legocompress.errors import DenseOnlyError

pytestmark = pytest.mark.slow

NAMES = [
    "timm/resnet18",
    "timm/regnety_002",
    "timm/dla46x_c",
    "timm/tf_efficientnet_es",
    "timm/tf_mobilenetv3_small_075",
    "timm/mixnet_s",
    "timm/nf_regnet_b0",
    "timm/resnetv2_50x1_bit",
    "timm/efficientnet_cc_b0_4e",
    "timm/lambda_resnet26t",
    "timm/coat_lite_tiny",
    "timm/efficientnet_b1_pruned",
    "timm/gcresnext26ts",
    "timm/bat_resnext26ts",
    "timm/lowformer_b0",
    "timm/efficientvim_m1",
    "timm/repvgg_a0",
    "timm/edgenext_xx_small",
    "timm/convnext_zepto_rms",
    "timm/fastvit_t8",
    "timm/levit_conv_128s",
    "timm/nextvit_small",
    "timm/tresnet_m",
    "torchvision/mnasnet0_5",
    "torchvision/ssdlite320_mobilenet_v3_large",
    "torchvision/deeplabv3_mobilenet_v3_large",
    "torchvision/googlenet",
    "torchvision/regnet_x_400mf",
    "torchvision/raft_small",
    "torchvision/retinanet_resnet50_fpn",
    "torchvision/quantized_mobilenet_v2",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exact_conversion_changes_no_bit(name: str) -> None:
    """Outputs equal after conversion, saving and reloading, and going back to dense."""
    result = check_architecture(name, max_params=60_000_000)
    assert result["status"] == "checked"
    assert result["faults"] == []
    assert result["converted"] > 0


def converted(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A randomised network and its exact conversion."""
    torch.manual_seed(0)
    original = timm.create_model(name, **kwargs).eval()
    randomise_(original)
    model = copy.deepcopy(original)
    return original, lego.convert_(model, lego.plan(model, EXACT))


def image(channels: int = 3, size: int = 64) -> Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_other_channels_and_classes() -> None:
    original, model = converted("resnet18", in_chans=5, num_classes=7)
    assert run_model(model, (image(5),))[0].shape == (1, 7)
    assert are_equal(run_model(original, (image(5),)), run_model(model, (image(5),)))


@pytest.mark.parametrize("name", ["resnet18", "tf_mobilenetv3_small_075"])
def test_head_methods(name: str) -> None:
    original, model = converted(name)
    features = model.forward_features(image())
    assert torch.equal(features, original.forward_features(image()))
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3
    assert model(image()).shape == (1, 3)


def test_features_only_keeps_the_stem_and_equals() -> None:
    original, model = converted("resnet18", features_only=True)
    assert isinstance(model, FeatureListNet)
    assert not isinstance(model.conv1, lego.LegoModule)
    assert are_equal(run_model(original, (image(),)), run_model(model, (image(),)))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    _, plain = converted("resnet18")
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    for model in (plain, saving):
        model.train()
        model(image().repeat(2, 1, 1, 1)).square().mean().backward()
    compared = 0
    for (_, a), (_, b) in zip(lego.lego_modules(plain), lego.lego_modules(saving), strict=True):
        assert torch.equal(a.lego_filters.grad, b.lego_filters.grad)
        compared += bool(a.lego_filters.grad.abs().max() > 0)
    assert compared > 0


def test_fx_feature_extraction() -> None:
    original, model = converted("resnet18")
    nodes = {"layer2": "middle", "fc": "out"}
    expected = create_feature_extractor(original, nodes)(image())
    found = create_feature_extractor(model, nodes)(image())
    assert torch.equal(expected["middle"], found["middle"])
    assert torch.equal(expected["out"], found["out"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    original, model = converted("resnet18")
    x = image().to(dtype)
    assert are_equal(run_model(original.to(dtype), (x,)), run_model(model.to(dtype), (x,)))


def test_channels_last() -> None:
    original, model = converted("resnet18")
    x = image().to(memory_format=torch.channels_last)
    for network in (original, model):
        network.to(memory_format=torch.channels_last)
    weight = model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert are_equal(run_model(original, (x,)), run_model(model, (x,)))


@pytest.mark.slow
def test_compile_sees_through() -> None:
    _, model = converted("resnet18")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), model(image()))


def test_data_parallel_replicas_compute_the_same() -> None:
    _, model = converted("resnet18")
    replica = model.layer1[0].conv1._replicate_for_data_parallel()
    source = model.layer1[0].conv1
    for name, value in (*source._parameters.items(), *source._buffers.items()):
        setattr(replica, name, value)  # as torch's replicate does
    x = torch.rand(1, 64, 8, 8)
    assert torch.equal(replica(x), source(x))


def test_torch_fusers_are_told_to_go_dense() -> None:
    original, model = converted("resnet18")
    with pytest.raises(DenseOnlyError, match="to_dense"):
        fuse_conv_bn_eval(model.layer1[0].conv1, model.layer1[0].bn1)
    block = lego.to_dense(model).layer1[0]
    fused = fuse_conv_bn_eval(block.conv1, block.bn1)
    x = torch.rand(1, 64, 8, 8)
    expected = original.layer1[0].bn1(original.layer1[0].conv1(x))
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


def test_state_dict_round_trip_into_another_conversion() -> None:
    _, model = converted("resnet18")
    other = timm.create_model("resnet18").eval()
    lego.convert_(other, lego.plan(other, EXACT))
    other.load_state_dict(model.state_dict())
    assert are_equal(run_model(model, (image(),)), run_model(other, (image(),)))


@pytest.mark.parametrize("name", ["repvgg_a0", "nextvit_small"])
def test_fusing_a_converted_model_raises(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    lego.convert_(model, lego.plan(model, EXACT))
    blocks = [m for m in model.modules() if "reparameterize" in m.__dict__]
    assert blocks
    with pytest.raises(DenseOnlyError, match="to_dense"):
        blocks[0].reparameterize()
    with pytest.raises(DenseOnlyError, match="to_dense"):
        timm.utils.reparameterize_model(model)
    timm.utils.reparameterize_model(lego.to_dense(model))
