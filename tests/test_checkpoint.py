"""The compressed folder: an exact inverse of the network, and a typed error for any other bytes."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import legocompress as lego
from legocompress.checkpoint import FORMAT_VERSION, open_model
from legocompress.convert import Record
from legocompress.errors import (
    CheckpointError,
    LegoError,
    OutputError,
    OutputExistsError,
    UsageError,
)
from legocompress.models import Source

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
CONFIG, TENSORS = "config.json", "model.safetensors"


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


# The exact inverse


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


def test_two_savings_give_the_same_bytes(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    torch.manual_seed(1)
    again = lego.load(lego.save(small(), tmp_path / "b"))
    assert digest(tmp_path / "a").keys() == {CONFIG, TENSORS}
    torch.manual_seed(0)
    lego.save(copy.deepcopy(again), tmp_path / "c")
    assert digest(tmp_path / "b") == digest(tmp_path / "c")


def test_nothing_dense_is_stored_and_the_file_is_as_large_as_the_ideal_bits(tmp_path: Path) -> None:
    model = small(k=2, dtype="fp16")
    lego.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    units = dict(lego.lego_modules(model))
    assert len(units) == 12
    for name in units:
        assert f"{name}.weight" not in stored
        assert stored[f"{name}.index"].dtype == torch.uint8
        assert stored[f"{name}.lego_filters"].dtype == torch.float16
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    report = lego.measure(model, example_input=torch.zeros(1, 3, 32, 32))
    ideal = sum(-(-row.bits // 8) for row in report.rows)
    norms = [b for n, b in model.named_buffers() if "running" in n or "num_batches" in n]
    buffers = sum(b.numel() * b.element_size() for b in norms)
    assert len(raw) - 8 - header == ideal + buffers
    assert header < 150 * len(stored)


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


def test_what_made_the_network_survives(tmp_path: Path) -> None:
    model: Any = small(k=2, dtype="bf16", rules=["layer1.*:m=0.5"], skip=["layer4.0.conv2"])
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.7}
    loaded: Any = lego.load(lego.save(model, tmp_path / "a"))
    assert isinstance(loaded.lego_record, Record)
    assert loaded.lego_record == model.lego_record
    assert loaded.lego_record.skipped["layer4.0.conv2"] == "named by --skip"
    assert loaded.lego_source == model.lego_source
    assert loaded.lego_source == Source(
        "timm", "resnet18", {**SMALL, "num_classes": 10}, "random, seed 0"
    )
    for key, value in model.pretrained_cfg.items():
        # A null and the place that the weights came from are left out, as timm does.
        if value is not None and key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
            assert loaded.pretrained_cfg[key] == value, key
    assert loaded.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert not loaded.training


def test_the_config_is_one_that_timm_reads(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["architecture"] == "resnet18"
    assert config["num_classes"] == 10
    assert config["model_args"] == {**SMALL, "num_classes": 10}
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    block = config["compression_config"]
    assert block["format_version"] == FORMAT_VERSION == 1
    assert block["spec"]["m"] == 0.7
    unit = block["layers"]["layer1.0.conv2"]
    assert (unit["n_lego"], unit["n_split"], unit["n_terms"]) == (6, 2, 1)


def test_a_network_made_by_timm_alone_is_rebuilt(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", pretrained=False, num_classes=3, **SMALL)
    spec = lego.LegoSpec(m=2, o=2, allow_expansion=True)
    lego.convert_(randomised(model), lego.plan(model, spec, torch.zeros(1, 3, 32, 32)))
    try:
        lego.save(model, tmp_path / "a")
    except CheckpointError as error:  # what timm does not note cannot be rebuilt, and it says so
        assert "create it with legocompress.create" in str(error)  # noqa: PT017
        assert not (tmp_path / "a").exists()
    else:
        assert_same(model, lego.load(tmp_path / "a"), torch.randn(2, 3, 32, 32))


def test_a_classifier_that_was_reset_is_rebuilt(tmp_path: Path) -> None:
    model = lego.create("test_resnet", pretrained=False)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=1, o=2)))
    model.reset_classifier(3)
    lego.save(model, tmp_path / "a")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(lego.load(tmp_path / "a")(x), model(x))


def test_a_network_from_a_folder_is_rebuilt_with_its_classes(tmp_path: Path) -> None:
    own = timm.create_model("convnext_atto", num_classes=7)
    timm.models.save_for_hf(own, tmp_path / "hub", safe_serialization=True)
    model = lego.create(f"local-dir:{tmp_path / 'hub'}")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), own.eval()(x), rtol=1e-4, atol=1e-5)
    lego.convert_(model, lego.plan(model))
    lego.save(model, tmp_path / "a")
    assert torch.equal(lego.load(tmp_path / "a")(x), model(x))


def test_an_own_class_needs_an_instance(tmp_path: Path) -> None:
    model = mixed()
    lego.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["architecture"] is None
    with pytest.raises(CheckpointError, match=r"load\(path, model=\.\.\.\)"):
        lego.load(tmp_path / "a")
    instance = Mixed()
    assert lego.load(tmp_path / "a", model=instance) is instance
    with pytest.raises(CheckpointError, match="no conv or Linear called 'wide'"):
        lego.load(tmp_path / "a", model=nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(CheckpointError, match="no conv or Linear called 'wide'"):
        lego.load(tmp_path / "a", model=instance)  # converted already


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no Lego module"):
        lego.save(Mixed(), tmp_path / "a")
    model: Any = small()
    model.fc = nn.Linear(16, 11)
    with pytest.raises(CheckpointError, match=r"first difference at 'fc"):
        lego.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    before = torch.get_rng_state()
    lego.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(OutputExistsError, match="something else"):
        lego.save(small(), tmp_path / "letters", force=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "dear"


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    target = tmp_path / "a"
    lego.save(small(), target)
    (target / "left over").write_text("x")
    before = digest(target)
    with pytest.raises(OutputExistsError, match="--force"):
        lego.save(small(k=2), target)
    assert digest(target) == before
    lego.save(small(k=2), target, force=True)
    assert digest(target).keys() == {CONFIG, TENSORS}
    assert next(iter(lego.lego_modules(lego.load(target))))[1].lego_shape.n_terms == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


FULL_DISK = """
import resource, sys
import legocompress as lego
from legocompress.errors import OutputError
from legocompress_cli.main import main

model = lego.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    lego.save(model, sys.argv[1], force=True)
except OutputError as error:
    print(f"OutputError: {error}", flush=True)
sys.argv = ["legocompress", "export", sys.argv[1], "--out", sys.argv[2]]
main()
"""


def test_a_full_disk_keeps_the_old_folder_and_leaves_no_litter(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    before = digest(tmp_path)
    out = str(tmp_path / "dense.safetensors")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL_DISK, str(tmp_path / "a"), out, "20000"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.startswith("OutputError: no space left to write")
    assert ran.stderr.startswith("Error: no space left to write")
    assert ran.stderr.count("\n") == 1
    assert digest(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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


# What is not true to itself


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return lego.save(small(dtype="fp16"), tmp_path_factory.mktemp("saved") / "a")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


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


def test_the_fixture_itself_loads(folder: Path) -> None:
    edit_config(folder, lambda config: None)
    edit_tensors(folder, lambda tensors: None)
    assert len(list(lego.lego_modules(lego.load(folder)))) == 12


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"no {name}")
    (folder / name).mkdir()
    refused(folder, f"no {name}")


def test_no_folder_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is no compressed folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is no compressed folder")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.3, 0.5, 0.9, 0.999, -1])
def test_truncated_tensors(folder: Path, kept: float) -> None:
    raw = (folder / TENSORS).read_bytes()
    length = int(kept * len(raw)) if isinstance(kept, float) else kept
    (folder / TENSORS).write_bytes(raw[:length])
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff" * 64, b"{" * 100, b"[]", b"5" * 9000])
def test_garbage(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder, name)


def test_random_bytes(folder: Path) -> None:
    raw = random.Random(0).randbytes(5000)
    (folder / TENSORS).write_bytes(raw)
    refused(folder)
    (folder / CONFIG).write_bytes(raw)
    refused(folder)


@pytest.mark.parametrize("depth", [100, 190, 300, 800, 900, 960, 990, 1000, 5000, 200_000])
@pytest.mark.parametrize("place", ["whole", "spec", "layers"])
def test_deep_nesting(folder: Path, depth: int, place: str) -> None:
    nest = "[" * depth + "]" * depth
    if place == "whole":
        (folder / CONFIG).write_text(nest)
    else:
        text = '{"compression_config": {"format_version": 1, "%s": %s}}' % (place, nest)  # noqa: UP031
        (folder / CONFIG).write_text(text)
    refused(folder)


def test_a_huge_config_is_not_read(folder: Path) -> None:
    with (folder / CONFIG).open("ab") as file:
        file.truncate(33 * 2**20)
    refused(folder, "larger than")


def block(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["compression_config"].update(changes)


def unit(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["compression_config"]["layers"]["layer1.0.conv2"].update(changes)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


def args(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model_args"].update(changes)


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        layers = config["compression_config"]["layers"]
        layers[name] = layers.pop("layer1.0.conv2")

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c.pop("compression_config"), "no compression_config"),
        (top(compression_config=[]), "no compression_config"),
        (top(compression_config="x"), "no compression_config"),
        (block(format_version=2), "format version 2.*install a version"),
        (block(format_version=0), "format version 0"),
        (block(format_version="1"), "format version '1'"),
        (block(format_version=True), "format_version"),
        (block(format_version=None), "format version None"),
        (block(format_version=10**30), "format version 1000"),
        (block(surprise=1), "surprise"),
        (unit(surprise=1), "surprise"),
        (lambda c: c["compression_config"].pop("layers"), "layers"),
        (lambda c: c["compression_config"]["layers"]["layer1.0.conv2"].pop("n_lego"), "n_lego"),
        (block(layers=[]), "layers"),
        (block(layers={}), "."),
        (block(layers={"layer1.0.conv2": 5}), "layers"),
        (block(library="tensorflow"), "library"),
        (block(library=None), "somebody's own class"),
        (block(library=5), "library"),
        (block(reparameterized=1), "reparameterized"),
        (block(weights=None), "weights"),
        (block(seed="x"), "seed"),
        (block(skipped={"a": 1}), "skipped"),
        (block(spec=[1]), "spec"),
        (block(spec={"m": -1}), "spec: m"),
        (block(spec={"m": "x"}), "spec: m"),
        (block(spec={"unknown": 1}), "unknown"),
        (block(spec={"rules": 5}), "rules"),
        (block(spec={"m": 5}), "more Lego filters"),
        (block(spec={"rules": [5]}), "rules"),
        (block(spec={"rules": ["x"]}), "rule"),
        (top(architecture="no_such_network"), "no_such_network"),
        (top(architecture="../x"), "unknown model"),
        (top(architecture="hf-hub:somebody/thing"), "unknown model"),
        (top(architecture="local-dir:/tmp"), "unknown model"),
        (top(architecture="resnet18.no_such_tag"), "cannot be rebuilt"),
        (top(architecture=5), "somebody's own class|architecture"),
        (top(architecture=None), "somebody's own class"),
        (top(architecture="resnet50"), "."),
        (top(architecture=""), "."),
        (top(model_args=5), "model_args"),
        (top(model_args="x"), "model_args"),
        (top(model_args=[["a", 1]]), "model_args"),
        (top(model_args=[]), "model_args"),
        (top(model_args=None), "."),
        (top(pretrained_cfg=5), "pretrained_cfg"),
        (args(pretrained=True), "pretrained"),
        (args(checkpoint_path="/etc/passwd"), "checkpoint_path"),
        (args(pretrained_cfg={"file": "x"}), "pretrained_cfg"),
        (args(pretrained_cfg_overlay={}), "pretrained_cfg_overlay"),
        (args(cache_dir="x"), "cache_dir"),
        (args(no_such_argument=1), "no_such_argument"),
        (args(variant="resnet50"), "variant"),
        (args(num_classes=11), "fc"),
        (args(num_classes="x"), "."),
        (args(num_classes=-1), "."),
        (args(num_classes=10**30), "."),
        (args(num_classes=[10]), "."),
        (args(in_chans=10**12), "."),
        (args(in_chans=0), "."),
        (args(block="basic"), "."),
        (args(block=5), "."),
        (args(layers="abcd"), "."),
        (args(layers=5), "."),
        (args(channels=[]), "."),
        (args(channels=[0, 0, 0, 0]), "."),
        (args(channels=[8.5, 8, 8, 8]), "."),
        (args(act_layer="no_such"), "."),
        (args(norm_layer="no_such"), "."),
        (args(norm_layer=5), "."),
        (args(aa_layer={"a": 1}), "."),
        (args(global_pool=5), "."),
        (args(global_pool="no_such"), "."),
        (args(output_stride=0), "."),
        (args(output_stride=7), "."),
        (args(cardinality=0), "."),
        (args(base_width="x"), "."),
        (args(block_args={"attn_layer": "no_such"}), "."),
        (args(block_args=5), "."),
        (args(stem_type=5), "."),
        (args(block_reduce_first=0), "."),
        (args(features_only=True), "."),
        (args(features_only=True, out_indices=[99]), "."),
        (args(features_only=True, feature_cls="no_such"), "."),
        (renamed("no.such.layer"), "no conv or Linear called 'no.such.layer'"),
        (renamed("bn1"), "no conv or Linear called 'bn1'"),
        (renamed(""), "no conv or Linear called ''"),
        (renamed("../x"), "no conv or Linear called '../x'"),
        (renamed("/etc/passwd"), "no conv or Linear"),
        (renamed("layer1.0.conv2.weight"), "no conv or Linear"),
        (renamed("layer1.0.conv2.forward"), "no conv or Linear"),
        (renamed("layer1.0.conv2.__class__"), "no conv or Linear"),
        (renamed("layer1..conv2"), "no conv or Linear"),
        (renamed("layer1.0.conv2."), "no conv or Linear"),
        (renamed("\0"), "no conv or Linear"),
        (renamed("fc"), "layer1.0.conv2|fc"),
        (unit(n_lego=0), "n_lego"),
        (unit(n_lego=-1), "n_lego"),
        (unit(n_lego=5), "layer1.0.conv2.lego_filters.*shape"),
        (unit(n_lego=7), "layer1.0.conv2.lego_filters.*shape"),
        (unit(n_lego=17), "n_lego=17"),
        (unit(n_lego=2**31), "n_lego"),
        (unit(n_lego=2**31 + 1), "n_lego"),
        (unit(n_lego=10**40), "n_lego"),
        (unit(n_lego=6.0), "n_lego"),
        (unit(n_lego=6.5), "n_lego"),
        (unit(n_lego="6"), "n_lego"),
        (unit(n_lego=None), "n_lego"),
        (unit(n_lego=True), "n_lego"),
        (unit(n_split=0), "n_split"),
        (unit(n_split=1), "layer1.0.conv2"),
        (unit(n_split=4), "layer1.0.conv2"),
        (unit(n_split=9), "n_split=9"),
        (unit(n_split=2**31), "n_split"),
        (unit(n_terms=0), "n_terms"),
        (unit(n_terms=2), "layer1.0.conv2"),
        (unit(n_terms=7), "n_terms=7|n_terms exceeds|exceeds the Lego filters"),
        (unit(n_terms=2**31), "n_terms|exceeds"),
        (unit(dtype="fp8"), "dtype"),
        (unit(dtype="fp32"), "layer1.0.conv2.lego_filters.*float16.*fp32"),
        (unit(dtype=None), "dtype"),
        (unit(coefficients_dtype=None), "layer1.0.conv2.coefficients"),
        (unit(coefficients_dtype="bf16"), "layer1.0.conv2.coefficients"),
        (unit(memory_dtype="int8"), "memory_dtype"),
        (unit(memory_dtype="qint8"), "memory_dtype"),
        (unit(weight_error="x"), "weight_error"),
        (unit(weight_error=float("nan")), "weight_error"),
        (unit(weight_error=float("inf")), "weight_error"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_config_that_cannot_be_true(
    folder: Path, edit: Callable[[dict[str, Any]], None], match: str
) -> None:
    edit_config(folder, edit)
    refused(folder, match)


def test_a_network_larger_than_its_file_is_refused_before_memory_is_taken(folder: Path) -> None:
    # Gigabytes of classifier by the config, 680 bytes of it in the file.
    for classes, match in ((10**9, "num_classes is 1e[+]09"), (10**7, "more than"), (10**6, "fc")):
        edit_config(folder, args(num_classes=classes))
        assert "allocate" not in refused(folder, match)


def test_a_slot_that_names_no_lego_filter(folder: Path) -> None:
    # Six filters need three bits, which can say 6 and 7 as well.
    name = "layer1.0.conv2.index"
    for filter_ in (6, 7):
        raw = bytearray((folder / TENSORS).read_bytes())
        header = int.from_bytes(raw[:8], "little")
        start, _ = json.loads(raw[8 : 8 + header])[name]["data_offsets"]
        raw[8 + header + start] = raw[8 + header + start] & ~0b111 | filter_
        (folder / TENSORS).write_bytes(bytes(raw))
        refused(folder, f"{name}' names Lego filter {filter_}, but there are 6")


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


UNIT = "layer1.0.conv2"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.clear(), "no tensor|missing"),
        (lambda t: t.pop(f"{UNIT}.lego_filters"), f"{UNIT}.lego_filters' is missing"),
        (lambda t: t.pop(f"{UNIT}.index"), f"{UNIT}.index' is missing"),
        (lambda t: t.pop(f"{UNIT}.coefficients"), f"{UNIT}.coefficients' is missing"),
        (lambda t: t.pop("conv1.weight"), "conv1.weight"),
        (lambda t: t.pop("fc.bias"), "fc.bias"),
        (lambda t: t.pop("bn1.num_batches_tracked"), "bn1.num_batches_tracked"),
        (lambda t: t.update({f"{UNIT}.weight": torch.zeros(8, 8, 3, 3)}), f"{UNIT}.weight"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "extra' is unknown"),
        (lambda t: t.update({"../x": torch.zeros(1)}), "../x' is unknown"),
        (replaced(f"{UNIT}.lego_filters", lambda v: v[:-1]), "shape"),
        (replaced(f"{UNIT}.lego_filters", lambda v: v.flatten()), "shape"),
        (replaced(f"{UNIT}.lego_filters", lambda v: v.transpose(0, 1)), "shape"),
        (replaced(f"{UNIT}.lego_filters", lambda v: v.float()), "float32"),
        (replaced(f"{UNIT}.lego_filters", lambda v: v.bfloat16()), "bfloat16"),
        (replaced(f"{UNIT}.lego_filters", lambda v: v.to(torch.int16)), "int16"),
        (replaced(f"{UNIT}.coefficients", lambda v: v.float()), "float32"),
        (replaced(f"{UNIT}.coefficients", lambda v: v[..., 0]), "shape"),
        (replaced(f"{UNIT}.index", lambda v: v[:-1]), "shape"),
        (replaced(f"{UNIT}.index", lambda v: torch.cat([v, v])), "shape"),
        (replaced(f"{UNIT}.index", lambda v: v.to(torch.int8)), "int8"),
        (replaced(f"{UNIT}.index", lambda v: v.long()), "int64"),
        (replaced(f"{UNIT}.index", lambda v: v.float()), "float32"),
        (replaced(f"{UNIT}.index", lambda v: v.bool()), "bool"),
        (replaced("fc.weight", lambda v: v.T), "fc.weight.*shape"),
        (replaced("fc.weight", lambda v: v.long()), "fc.weight.*int64"),
        (replaced("fc.weight", lambda v: v.to(torch.float8_e4m3fn)), "fc.weight.*float8"),
        (replaced("bn1.running_mean", lambda v: v[None]), "bn1.running_mean.*shape"),
        (replaced("bn1.running_var", lambda v: v.to(torch.complex64)), "complex64"),
        (replaced("bn1.num_batches_tracked", lambda v: v.float()), "num_batches_tracked.*float32"),
        (replaced("bn1.num_batches_tracked", lambda v: v.to(torch.uint8)), "uint8"),
        (replaced("bn1.num_batches_tracked", lambda v: v.to(torch.complex64)), "complex64"),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path, edit: Callable[[dict[str, Tensor]], None], match: str
) -> None:
    edit_tensors(folder, edit)
    refused(folder, match)


def test_random_damage_ends_in_a_typed_error_or_a_network(folder: Path) -> None:
    generator = random.Random(0)
    raw = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
    header = 8 + int.from_bytes(raw[TENSORS][:8], "little")
    ends = []
    for turn in range(240):
        name = CONFIG if turn % 3 else TENSORS
        damaged = bytearray(raw[name])
        for _ in range(generator.choice([1, 1, 1, 4])):
            # Half of the hits on the tensors go to what says where they are.
            limit = header if name == TENSORS and turn % 2 else len(damaged)
            damaged[generator.randrange(limit)] = generator.randrange(256)
        for other in raw:
            (folder / other).write_bytes(bytes(damaged) if other == name else raw[other])
        try:
            model = lego.load(folder)
        except LegoError as error:
            ends.append(error)
        else:
            assert list(lego.lego_modules(model))
            ends.append(None)
    failed = sum(end is not None for end in ends)
    assert 80 < failed < 235


def test_open_model_tells_the_kinds_of_folder_apart(folder: Path, tmp_path: Path) -> None:
    assert len(list(lego.lego_modules(open_model(str(folder))))) == 12
    plain = tmp_path / "plain"
    plain.mkdir()
    dense = lego.create("resnet18", pretrained=False, num_classes=10, model_args=SMALL, seed=3)
    save_file(dense.state_dict(), plain / TENSORS)
    config = {"architecture": "resnet18", "num_classes": 10, "model_args": SMALL,
              "pretrained_cfg": {"input_size": [3, 32, 32]}}  # fmt: skip
    (plain / CONFIG).write_text(json.dumps(config))
    opened = open_model(str(plain))
    assert torch.equal(opened.state_dict()["fc.weight"], dense.state_dict()["fc.weight"])
    assert tuple(opened.pretrained_cfg["input_size"]) == (3, 32, 32)
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=TENSORS):
        open_model(str(folder))


@pytest.mark.parametrize(
    "arguments",
    [{"weights": "x"}, {"num_classes": 3}, {"in_chans": 1}, {"model_args": {"a": 1}},
     {"pretrained": False}],
)  # fmt: skip
def test_a_compressed_folder_takes_no_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="compressed"):
        open_model(str(folder), **arguments)


def test_the_output_is_told_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        lego.save(small(), tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "x"
