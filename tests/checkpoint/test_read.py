"""Whatever is wrong with a folder ends in a typed error, before memory is taken."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import legocompress as lego
from legocompress.checkpoint import open_model
from legocompress.errors import (
    CheckpointError,
    LegoError,
    UsageError,
)
from tests.support.folders import CONFIG, SMALL, TENSORS, edit_config, edit_tensors, refused, small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return lego.save(small(dtype="fp16"), tmp_path_factory.mktemp("saved") / "a")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


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
    refused(tmp_path / "nowhere", "is not a compressed folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a compressed folder")


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
        (block(format_version=3), "format version 3.*install a version"),
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
        (block(library=None), "a network that no library builds"),
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
        (top(architecture=5), "a network that no library builds|architecture"),
        (top(architecture=None), "a network that no library builds"),
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


@pytest.mark.slow
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
