"""The limits on what a file's configuration may make a library build."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import timm
import torch
from torch import nn

from legocompress.checkpoint.limits import check_arguments, check_input_size, limit_construction
from legocompress.errors import CheckpointError


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 21843, "in_chans": 1, "drop_rate": 0.1, "act_layer": "silu"},
        {"layers": [3, 4, 23, 3], "channels": [256, 512, 1024, 2048], "block_args": {"a": None}},
        {"img_size": [1024, 2048], "depth_multiplier": 3.1, "features_only": True},
    ],
)
def test_what_networks_are_built_with_is_allowed(arguments: dict[str, Any]) -> None:
    check_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layers": [10**6, 1, 1, 1]}, "layers is 1e[+]06; at most 65,536"),
        ({"layers": [60_000] * 30}, "add up to"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"depth_multiplier": 100.0}, "depth_multiplier is 100; at most 64"),
        ({"drop_rate": float("nan")}, "drop_rate is nan"),
        ({"cfg": {"deep": [{"width": -(2**40)}]}}, "width"),
        ({"x": [1] * 5000}, "5,000 values"),
        ({"stem_type": "a" * 5000}, "stem_type has 5,000 characters"),
    ],
    ids=["deep", "sum", "classes", "factor", "nan", "nested", "long", "text"],
)
def test_what_no_network_is_built_with_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        check_arguments(arguments)


def test_deep_nesting_is_refused() -> None:
    nest: Any = 1
    for _ in range(30):
        nest = [nest]
    with pytest.raises(CheckpointError, match="nested"):
        check_arguments({"x": nest})


def test_an_image_size_is_three_sizes() -> None:
    for good in ({}, {"input_size": None}, {"input_size": [3, 224, 224]}):
        check_input_size(good)
    for bad in ("x", 224, [3, 224], [3, 0, 224], [3, 1e3, 1e3], [3, True, 9], [3, 60000, 60000]):
        with pytest.raises(CheckpointError, match=r"test_input_size=.* is not an image size"):
            check_input_size({"test_input_size": bad})


def parts_of(model: nn.Module) -> tuple[int, int]:
    tensors = [*model.parameters(), *model.buffers()]
    return len(list(model.modules())) - 1 + len(tensors), sum(t.numel() for t in tensors)


def test_a_constructor_is_stopped_where_it_passes_a_limit() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Linear(5, 2))

    parts, numbers = parts_of(build())
    assert (parts, numbers) == (4 + 2 + 5 + 2, 135 + 5 + 21 + 12)
    with limit_construction(parts, numbers):
        assert parts_of(build()) == (parts, numbers)
    for limits in ((parts - 1, numbers), (parts, numbers - 1)):
        with limit_construction(*limits), pytest.raises(CheckpointError, match="more than"):
            build()
    build()  # the limit ends with its block


def test_a_long_list_of_layers_ends_soon() -> None:
    with (
        torch.device("meta"),
        limit_construction(500, 2**40),
        pytest.raises(CheckpointError, match="more than 500 parts"),
    ):
        timm.create_model("resnet18", layers=(10**6, 1, 1, 1))


def test_other_threads_are_left_alone() -> None:
    built: list[nn.Module] = []
    with limit_construction(0, 0):
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert len(built) == 1
