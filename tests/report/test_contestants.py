"""Networks to compare are opened by name, and must take the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.report.contestants import (
    check_same_sizes,
    find_preprocessing,
    open_contestants,
)
from tests.support.command_line import DENSE
from tests.support.onnx_files import write_classifier
from tests.support.tiny import compressed


def test_sizes_that_are_open_fit_any() -> None:
    sizes: dict[str, tuple[int | None, ...]] = {"a": (None, None, 16), "b": (1, 8, None)}
    assert check_same_sizes(sizes) == (1, 8, 16)


def test_sizes_that_differ_or_are_unknown() -> None:
    with pytest.raises(UsageError, match="'a' takes images of 1 x 16 x 16 and 'b' of 1 x any x 8"):
        check_same_sizes({"a": (1, 16, 16), "b": (1, None, 8)})
    with pytest.raises(UsageError, match="no network names the size"):
        check_same_sizes({"a": (1, None, 16)})


def test_a_dense_network_weighs_its_parameters_and_buffers() -> None:
    (contestant,) = open_contestants([DENSE])
    network = lego.create(DENSE)
    tensors = network.state_dict().values()
    assert contestant.kind == "dense"
    assert contestant.n_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert contestant.macs == lego.measure(network).totals()["macs"]


def test_what_a_network_weighs_and_costs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = lego.save(compressed(), tmp_path / "net")
    file = write_classifier(tmp_path / "net.onnx")
    packed, onnx = open_contestants([str(folder), str(file)])
    assert (packed.kind, onnx.kind) == ("lego", "onnx")
    assert packed.n_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert packed.macs == lego.measure(lego.load(folder)).totals()["macs"]
    assert onnx.macs == 16 * 16 * 4 * 9 + 12
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(packed.classify(x), lego.load(folder)(x))
    assert find_preprocessing([onnx, packed]) is packed.network
    with pytest.raises(UsageError, match="none of these networks names the preprocessing"):
        find_preprocessing([onnx])
