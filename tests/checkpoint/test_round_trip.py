"""Loading undoes saving, to the bit, for every kind of network, dtype and source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import legocompress as lego
from legocompress.errors import (
    CheckpointError,
)
from tests.support.folders import (
    SMALL,
    TENSORS,
    Mixed,
    assert_same,
    digest,
    mixed,
    randomised,
    small,
)

pytestmark = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("coefficients", ["binary", "fp16", "fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_loading_undoes_saving(dtype: str, coefficients: str, k: int, tmp_path: Path) -> None:
    gains = {} if coefficients == "binary" else {"coefficients_dtype": coefficients}
    model = mixed(dtype=dtype, coefficients=coefficients != "binary", k=k, **gains)
    assert len(list(lego.lego_modules(model))) == 6
    lego.save(model, tmp_path / "a")
    loaded = lego.load(tmp_path / "a", model=Mixed())
    assert_same(model, loaded, torch.randn(2, 3, 12, 12))
    for (_, ours), (_, theirs) in zip(
        lego.lego_modules(model), lego.lego_modules(loaded), strict=True
    ):
        if ours.coefficients is not None:
            assert ours.coefficients_dtype == theirs.coefficients_dtype == coefficients
    lego.save(loaded, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("memory", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_dtype_in_memory_survives(
    memory: torch.dtype, when: str, dtype: str, tmp_path: Path
) -> None:
    model = randomised(Mixed())
    model = model.to(memory) if when == "before" else model
    spec = lego.LegoSpec(m=0.6, o=2, k=2, dtype=dtype, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 12, 12, dtype=memory)
                                   if when == "before" else torch.zeros(1, 3, 12, 12)))  # fmt: skip
    model = model.to(memory)
    lego.save(model, tmp_path / "a")
    loaded = lego.load(tmp_path / "a", model=Mixed())
    assert {p.dtype for p in loaded.parameters()} == {memory}
    if memory != torch.bfloat16 or when == "before":
        assert_same(model, loaded, torch.randn(2, 3, 12, 12).to(memory))
    lego.save(loaded, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_channels_last_network_round_trips(tmp_path: Path) -> None:
    model = small(k=2).to(memory_format=torch.channels_last)
    lego.save(model, tmp_path / "a")
    loaded = lego.load(tmp_path / "a")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert_same(model, loaded.to(memory_format=torch.channels_last), x)
    lego.save(loaded, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_two_names_of_a_conv_are_stored_once_and_stay_one(tmp_path: Path) -> None:
    model = mixed()
    lego.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    assert "padded.lego_filters" in stored
    assert not any(name.startswith("again.") for name in stored)
    loaded: Any = lego.load(tmp_path / "a", model=Mixed())
    assert loaded.again is loaded.padded
    assert isinstance(loaded.again, lego.LegoModule)


def test_views_of_one_buffer_can_be_saved(tmp_path: Path) -> None:
    class WithViews(Mixed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.arange(6.0))
            self.register_buffer("part", self.whole[2:])

    model = randomised(WithViews())
    spec = lego.LegoSpec(m=0.6, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 12, 12)))
    lego.save(model, tmp_path / "a")
    loaded = lego.load(tmp_path / "a", model=WithViews())
    assert loaded.state_dict()["part"].tolist() == [2, 3, 4, 5]


def test_int8_filters_take_a_byte_a_value_and_two_a_filter(tmp_path: Path) -> None:
    model = small(k=2, dtype="int8")
    lego.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    full = small(k=2)
    others = dict(lego.lego_modules(full))
    for name, unit in lego.lego_modules(model):
        values, scales = stored[f"{name}.lego_filters"], stored[f"{name}.lego_scales"]
        assert (values.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
        assert scales.shape == (unit.lego_shape.n_lego,)
        assert values.abs().flatten(1).amax(1).unique().tolist() == [127]
        step = scales.float().reshape(-1, 1, 1, 1)
        assert torch.equal(unit.lego_filters, values.float() * step)
        difference = (unit.lego_filters - others[name].lego_filters).abs()
        assert bool((difference <= 0.5001 * step).all())
    image = torch.zeros(1, 3, 32, 32)
    report, wide = (lego.measure(m, example_input=image) for m in (model, full))
    shapes = [unit.lego_shape for _, unit in lego.lego_modules(model)]
    saved = sum(24 * s.n_filter_values - 16 * s.n_lego for s in shapes)
    assert wide.total("bits") - report.total("bits") == saved
    plan = lego.plan(
        lego.create("resnet18", pretrained=False, num_classes=10, model_args=SMALL),
        lego.LegoSpec(m=0.7, o=2, k=2, dtype="int8", allow_expansion=True),
        image,
    )
    assert {r.name: r.bits for r in report.rows if r.n_lego} == {
        name: row.bits for name, row in plan.layers.items()
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("layer1.0.conv2.lego_scales"), "lego_scales' is missing"),
        (lambda t: t["layer1.0.conv2.lego_scales"].neg_(), "positive finite"),
        (lambda t: t["layer1.0.conv2.lego_scales"].fill_(torch.inf), "positive finite"),
        (lambda t: t["layer1.0.conv2.lego_filters"].fill_(-128), "-128"),
        (lambda t: t.update({"fc.lego_scales": torch.ones(2)}), "'fc.lego_scales' is unknown"),
        (
            lambda t: t.update(
                {"layer1.0.conv2.lego_scales": t["layer1.0.conv2.lego_scales"].float()}
            ),
            "bf16",
        ),
    ],
    ids=["missing", "negative", "infinite", "-128", "unknown", "fp32"],
)
def test_int8_tensors_are_checked(
    change: Callable[[dict[str, Tensor]], Any], text: str, tmp_path: Path
) -> None:
    lego.save(small(dtype="int8"), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / "a" / TENSORS)
    with pytest.raises(CheckpointError, match=text):
        lego.load(tmp_path / "a")


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    before = torch.get_rng_state()
    lego.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("resnet18", {}),
        ("test_resnet", {}),
        ("test_byobnet", {}),
        ("test_convnext2", {}),
        ("regnety_002", {}),
        ("mobilenetv3_small_050", {}),
        ("tf_efficientnet_lite0", {}),
        ("repvgg_a0", {}),
        ("nf_regnet_b0", {}),
        ("convnext_atto", {}),
        ("ghostnet_050", {}),
        ("torchvision/squeezenet1_1", {}),
        ("torchvision/mnasnet0_5", {}),
        ("torchvision/shufflenet_v2_x0_5", {}),
        ("torchvision/googlenet", {}),
    ],
)
def test_architectures_round_trip(name: str, model_args: dict[str, Any], tmp_path: Path) -> None:
    model = lego.create(name, pretrained=False, num_classes=10, model_args=model_args)
    # An exact bank is made at once; scrambling its index then makes the Lego form a network of
    # its own, as clustering would.
    spec = lego.LegoSpec(m=2, o=2, dtype="fp16", allow_expansion=True, skip=["stages.3.*"]
                         if name == "nf_regnet_b0" else [])  # fmt: skip
    plan = lego.plan(randomised(model), spec, torch.zeros(1, 3, 64, 64))
    model = lego.convert_(model, plan)
    units = list(lego.lego_modules(model))
    assert len(units) == len(plan.layers) >= 3
    for _, unit in units:
        unit.index.copy_(
            unit.index.flatten()[torch.randperm(unit.index.numel())].view_as(unit.index)
        )
    folder = lego.save(model, tmp_path / "a")
    loaded = lego.load(folder)
    assert_same(model, loaded, torch.randn(2, 3, 64, 64))
    lego.save(loaded, tmp_path / "b")
    assert digest(folder) == digest(tmp_path / "b")
