"""Convolutions that oneDNN computes wrongly in 16 bits run in float32, and no others do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from legocompress.finetune.safe_convolutions import SafeConvolutions, is_unsafe
from tests.support.tiny import compressed


class Dtypes(TorchDispatchMode):
    """The dtypes of what every convolution is given, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            self.seen |= {a.dtype for a in args if isinstance(a, Tensor)}
        return func(*args, **(kwargs or {}))


@contextmanager
def polluted() -> Iterator[None]:
    """Memory that is handed out next holds NaN, as far as a test can see to it."""
    for n in [*range(8, 200, 16), *range(256, 32_768, 256), 2**16, 2**18, 2**20]:
        del [torch.full((n,), torch.nan, dtype=torch.bfloat16) for _ in range(2)][:]
    yield


def gradients(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> list[Tensor]:
    """The output, and the gradients of x and weight, with all memory polluted before each pass."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), SafeConvolutions(), polluted():
        y = F.conv2d(x, weight, None, stride, padding)
    assert y.dtype == torch.bfloat16
    with polluted():
        y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((1, 1), 3, 2, 1),
        ((2, 2), 3, 3, 1),
        ((3, 3), 3, 4, 1),
        ((7, 1), (1, 7), 2, (0, 5)),
        ((14, 2), (1, 3), 2, (0, 1)),
        ((14, 4), 3, 2, 0),
        ((8, 7), (1, 7), (1, 2), 0),
    ],
)
def test_narrow_maps_give_right_values_whatever_was_in_memory(
    size: tuple[int, int], kernel: Any, stride: Any, padding: Any
) -> None:
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x, weight = torch.randn(8, 8, *size).bfloat16().float(), torch.randn(16, 8, *kernel).bfloat16()
    weight = weight.float()
    found = [gradients(x, weight, stride, padding) for _ in range(3)]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding)
    y.backward(torch.ones_like(y))
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], other) for other in values)
    for value, expected in zip(found[0], [y.detach(), x.grad, weight.grad], strict=True):
        torch.testing.assert_close(value.float(), expected, rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "autocast", "expected"),
    [
        (1, 2, 1, True, torch.float32),
        (1, 2, (0, 1), True, torch.float32),
        (2, 2, 1, True, torch.float32),
        (1, 1, 1, True, torch.bfloat16),
        (1, (2, 1), 1, True, torch.bfloat16),
        (4, 2, 1, True, torch.bfloat16),
        (3, 1, "valid", True, torch.bfloat16),
        (3, 2, "valid", True, torch.float32),
        (1, 1, "same", True, torch.bfloat16),
        (1, 2, 1, False, torch.float32),
    ],
)
def test_only_unsafe_convolutions_change_their_dtype(
    size: int, stride: Any, padding: Any, autocast: bool, expected: torch.dtype
) -> None:
    height = 3 if padding in ("valid", (0, 1)) else size
    x = torch.randn(2, 4, height, size)
    layer = nn.Conv2d(4, 4, 3, stride, padding)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        SafeConvolutions(),
        Dtypes() as dtypes,
    ):
        y = layer(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.float().sum().backward()
    assert dtypes.seen == {expected}


def test_bf16_networks_and_one_dimension_count_too() -> None:
    x, layer = torch.randn(2, 4, 1).bfloat16(), nn.Conv1d(4, 4, 3, 2, 1).bfloat16()
    with SafeConvolutions(), Dtypes() as dtypes:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert dtypes.seen == {torch.float32}


def test_float32_and_float64_stay_as_they_are() -> None:
    model = compressed().double().eval()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with SafeConvolutions(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert torch.equal(model(x), expected)


def test_the_rule() -> None:
    assert is_unsafe(width=1, kernel=3, stride=2, padding=1, dilation=1)
    assert is_unsafe(width=1, kernel=7, stride=2, padding=5, dilation=1)  # narrow, out 3 pixels
    assert is_unsafe(width=14, kernel=7, stride=2, padding=0, dilation=2)  # out 1 pixel
    assert not is_unsafe(width=14, kernel=7, stride=2, padding=3, dilation=1)
    assert not is_unsafe(width=1, kernel=3, stride=1, padding=1, dilation=1)
