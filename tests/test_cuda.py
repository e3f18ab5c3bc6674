"""The same network on a GPU: needs one, and says so where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import legocompress as lego
from benchmarks.common.networks import randomise_
from benchmarks.coverage import EXACT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    randomise_(model)
    return model


def test_exact_conversion_on_the_device_changes_no_bit() -> None:
    original = network().cuda()
    model = copy.deepcopy(original)
    lego.convert_(model, lego.plan(model, EXACT))
    x = torch.rand(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
    assert all(m.lego_filters.is_cuda and m.index.is_cuda for _, m in lego.lego_modules(model))


@pytest.mark.parametrize(("k", "coefficients"), [(1, True), (1, False), (3, True)])
def test_conversion_on_the_device_is_as_good_as_on_the_cpu(k: int, coefficients: bool) -> None:
    spec = lego.LegoSpec(m=0.5, o=2, k=k, coefficients=coefficients)
    errors = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        lego.convert_(model, lego.plan(model, spec))
        errors.append([m.weight_error for _, m in lego.lego_modules(model)])
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_conversion_on_the_device_repeats_to_the_byte() -> None:
    states = []
    for _ in range(2):
        model = network().cuda()
        lego.convert_(model, lego.plan(model), seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_routes_agree(dtype: torch.dtype) -> None:
    model = network()
    lego.convert_(model, lego.plan(model))
    model.to("cuda", dtype)
    x = torch.rand(2, 3, 64, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        assembled = model(x)
        for _, module in lego.lego_modules(model):
            module.route = "reference"
        merged = model(x)
    scale = float(assembled.abs().max())
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert float((assembled - merged).abs().max()) < tolerance * scale


def test_save_from_and_load_to_the_device(tmp_path: Path) -> None:
    model = network().cuda()
    lego.convert_(model, lego.plan(model))
    x = torch.rand(2, 3, 64, 64, device="cuda")
    lego.save(model, tmp_path / "lego")
    with torch.no_grad():
        assert torch.equal(lego.load(tmp_path / "lego").cuda()(x), model(x))


def test_compile_and_data_parallel() -> None:
    model = network()
    lego.convert_(model, lego.plan(model))
    model.cuda()
    x = torch.rand(4, 3, 64, 64, device="cuda")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model)(x), expected, rtol=1e-3, atol=1e-4)
        replicas = nn.parallel.replicate(model, [torch.device("cuda", 0)])
        assert torch.equal(replicas[0](x), expected)
