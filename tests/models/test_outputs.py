"""Outputs are flattened whatever they consist of, and their logits are found."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from legocompress.models.outputs import (
    describe_output,
    find_logits,
    flatten_float_tensors,
    flatten_leaves,
    flatten_tensors,
    list_container_types,
    simplify,
)
from tests.support.structures import ModelOutput, Pair, Result

LOGITS, MAPS, CLASSES = torch.ones(2, 5), torch.ones(2, 3, 4, 4), torch.tensor([1, 0])
ALL = [
    (LOGITS, [LOGITS], []),
    (None, [], []),
    ({"out": LOGITS, "aux": None}, [LOGITS], [dict]),
    (Result(LOGITS, {"maps": MAPS, "n": 3}), [LOGITS, MAPS], [Result, dict]),
    (ModelOutput(logits=LOGITS, maps=(MAPS, CLASSES)), [LOGITS, MAPS, CLASSES],
     [ModelOutput, tuple]),
    (Pair([MAPS, "name"], Result(LOGITS)), [MAPS, LOGITS], [Pair, list, Result]),
]  # fmt: skip


@pytest.mark.parametrize(("output", "tensors", "types"), ALL)
def test_tensors_of_any_structure(output: Any, tensors: list[Any], types: list[type]) -> None:
    flat = flatten_tensors(output)
    assert [id(tensor) for tensor in flat] == [id(tensor) for tensor in tensors]
    assert all(tensor.is_floating_point() for tensor in flatten_float_tensors(output))
    assert list_container_types(output) == types


def test_paths_lead_to_all_leaves() -> None:
    output = Pair({"a": [MAPS, None]}, Result(3, "name"))
    paths = [(path, leaf) for path, leaf in flatten_leaves(output) if leaf is not MAPS]
    assert paths == [
        (("maps", "a", 1), None),
        (("others", "logits"), 3),
        (("others", "more"), "name"),
    ]


def test_simple_containers() -> None:
    output = simplify([Pair((LOGITS, 1), Result(None)), OrderedDict(a=MAPS)])
    assert output[0] == {"maps": (LOGITS, 1), "others": {"logits": None, "more": None}}
    assert type(output[1]) is dict


@pytest.mark.parametrize(
    ("output", "logits"),
    [
        (LOGITS, LOGITS),
        (MAPS, None),
        ({"out": LOGITS, "aux": None, "maps": MAPS}, LOGITS),
        ({"a": LOGITS, "b": LOGITS + 1}, None),  # either may be meant
        ((MAPS, LOGITS, LOGITS + 1), LOGITS),
        (ModelOutput(logits=LOGITS, maps=LOGITS + 1), LOGITS),
        ([{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(7, 4)}], None),
        (torch.ones(3, 5), None),  # not one row per image
        (None, None),
    ],
)
def test_logits(output: Any, logits: Any) -> None:
    assert find_logits(output, 2) is logits


def test_descriptions() -> None:
    assert describe_output(MAPS) == "(2, 3, 4, 4)"
    assert describe_output({"a": LOGITS, "b": 1}) == "a dict of (2, 5)"
    assert describe_output(None) == "a NoneType without tensors"
