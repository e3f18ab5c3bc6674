"""A Lego unit packed once into the buffer that the compiled kernels read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.lego.shape import UnitShape

# The same numbers stand in src/lego.h.
_MAGIC, _VERSION = 0x4F47454C, 2
_HEAD_BYTES = 16 * 8
_PANEL = 6
_SLACK = 16
MAX_TAPS = 1024
TRANSFORMS = ("direct", "winograd")

# Points of Winograd's F(4 x 4, r x r) besides infinity, by r; its other transforms: src/winograd.h.
_POINTS = {2: (0, 1, -1, 2), 3: (0, 1, -1, 2, -2), 4: (0, 1, -1, 2, -2, 0.5)}


def _winograd_taps(kernel: tuple[int, int], stride: int) -> int:
    """Taps r of Winograd's form of a kernel at a stride; 0 where it has none."""
    square = kernel[0] == kernel[1] and stride in (1, 2) and kernel[0] > stride
    taps = -(-kernel[0] // stride)
    return taps if square and taps in _POINTS else 0


def supports(
    shape: UnitShape,
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    transform: str = "direct",
) -> bool:
    """Whether the fused kernel can run a unit: padding in numbers of pixels, and groups whose
    channels are whole fragments.

    'winograd' wants a square kernel with dilation 1: of 2 to 4 at stride 1, of 3 to 8 at stride 2.
    """
    if transform not in TRANSFORMS or isinstance(padding, str):
        return False
    if shape.groups > 1 and shape.n_split * shape.width != shape.channels:
        return False
    if shape.kernel[0] * shape.kernel[1] > MAX_TAPS:
        return False
    if transform == "direct":
        return True
    plain = stride[0] == stride[1] and all(step == 1 for step in dilation)
    return plain and _winograd_taps(shape.kernel, stride[0]) > 0


def pack(
    shape: UnitShape,
    lego_filters: Tensor,
    index: Tensor,
    coefficients: Tensor | None,
    *,
    transform: str = "direct",
    stride: int = 1,
) -> Tensor:
    """Pack a unit for `torch.ops.legocompress.lego_conv2d`; every index is checked here, once.

    Each split keeps only the Lego filters that its slots name. The result is an opaque uint8 buffer
    on the CPU, the same on every CPU of a byte order; its sizes are (n, o * k, kh, kw, rest), which
    is where the operator's fake kernel finds the sizes of its output.

    Args:
        shape: sizes of the unit.
        lego_filters: (m, q, kh, kw).
        index: (o, n, k) integers in [0, m).
        coefficients: (o, n, k), or None for all ones.
        transform: 'direct', or 'winograd' for the kernels and strides that `supports` tells.
        stride: of the convs to come, where Winograd's form depends on it.

    Raises:
        KernelError: sizes that do not fit each other, an index out of range, values that are not
            finite, or a unit that the kernel does not support.
    """
    _check(shape, lego_filters, index, coefficients, transform, stride)
    kh, kw = shape.kernel
    bank = lego_filters.detach().to("cpu", torch.float64)
    winograd = transform == "winograd"
    taps = _frequencies(bank, stride) if winograd else bank.flatten(2)[:, :, None]
    slots = index.detach().to("cpu", torch.int64)
    rows = torch.empty(shape.n_out, shape.n_split, shape.n_terms, dtype=torch.int32)
    split_rows, filters, base = [], [], 0
    members = torch.arange(shape.n_out).chunk(shape.groups)
    # To the kernel a split of a group is a split like any other, which the others' rows leave out.
    for group, i in itertools.product(members, range(shape.n_split)):
        used, position = torch.unique(slots[i, group], return_inverse=True)
        rows[group, i] = (position + base).to(torch.int32)
        base += used.numel()
        split_rows.append(used.numel())
        channels = max(0, min(shape.width, shape.channels - i * shape.width))
        chosen = taps.index_select(0, used)[:, :channels]
        if winograd:
            filters.append(_panels(chosen.flatten(1, 2).permute(2, 0, 1)))
        else:
            filters.append(_panels(chosen.reshape(1, used.numel(), -1)))
    filters.append(torch.zeros(_SLACK, dtype=torch.float64))
    gains = torch.ones(shape.n_split, shape.n_out, shape.n_terms, dtype=torch.float32)
    if coefficients is not None:
        gains = coefficients.detach().to("cpu", torch.float32)
    sections = [
        _bytes(torch.tensor(split_rows, dtype=torch.int64)),
        _bytes(torch.cat(filters).to(torch.float32)),
        _bytes(rows),
        _bytes(gains.transpose(0, 1)),
    ]
    n_sum = shape.n_split * shape.n_terms
    places, end = [], _HEAD_BYTES
    for section in sections:
        places.append(end)
        end += -(-section.numel() // 64) * 64
    row_bytes = -(-end // (shape.n_out * n_sum * kh * kw))
    total = row_bytes * shape.n_out * n_sum * kh * kw
    head = [
        _MAGIC, _VERSION, total, shape.n_out, shape.groups * shape.channels, shape.width, kh, kw,
        shape.groups * shape.n_split, n_sum, stride if winograd else 0, base, *places,
    ]  # fmt: skip
    packed = torch.zeros(total, dtype=torch.uint8)
    packed[:_HEAD_BYTES] = _bytes(torch.tensor(head, dtype=torch.int64))
    for place, section in zip(places, sections, strict=True):
        packed[place : place + section.numel()] = section
    return packed.reshape(shape.n_out, n_sum, kh, kw, row_bytes)


def _frequencies(bank: Tensor, stride: int) -> Tensor:
    """Filters (m, q, k, k) to (m, q, phases, frequencies), by r x r taps of every phase.

    A row of the transform holds the powers of its point, over the product of the polynomials of
    the other points there (Cook and Toom; Lavin and Gray, 2016); the last row is infinity's.
    """
    m, q, k, _ = bank.shape
    r = -(-k // stride)
    points = torch.tensor(_POINTS[r], dtype=torch.float64)
    factors = 1 + (points % 1 > 0)  # of 2 x - 1 for the point 1/2
    gaps = (points[:, None] - points) * factors + torch.eye(len(points), dtype=torch.float64)
    rows = points[:, None] ** torch.arange(r, dtype=torch.float64) / gaps.prod(1, keepdim=True)
    highest = torch.eye(r, dtype=torch.float64)[-1:] / factors.prod()
    g = torch.cat([rows, highest])
    bank = F.pad(bank, (0, r * stride - k, 0, r * stride - k))
    phases = bank.reshape(m, q, r, stride, r, stride)
    return torch.einsum("ai,mqiyjx,bj->mqyxab", g, phases, g).reshape(m, q, stride * stride, -1)


def _panels(filters: Tensor) -> Tensor:
    """Filters (frequencies, rows, values) side by side, at most 6 of them, as even as can be."""
    frequencies, rows, values = filters.shape
    count = -(-rows // _PANEL)
    small, n_tall = divmod(rows, count)
    cut = n_tall * (small + 1)
    tall = filters[:, :cut].reshape(frequencies, n_tall, small + 1, values)
    rest = filters[:, cut:].reshape(frequencies, count - n_tall, small, values)
    parts = [part.transpose(2, 3).reshape(frequencies, -1) for part in (tall, rest)]
    return torch.cat(parts, 1).flatten()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _check(
    shape: UnitShape,
    lego_filters: Tensor,
    index: Tensor,
    coefficients: Tensor | None,
    transform: str,
    stride: int,
) -> None:
    if transform not in TRANSFORMS:
        raise KernelError(
            f"transform {transform!r} is not known; there are {', '.join(TRANSFORMS)}"
        )
    if not supports(shape, (stride, stride), (0, 0), (1, 1), transform):
        raise KernelError(
            f"the fused kernel has no {transform!r} form of a unit with kernel {shape.kernel}, "
            f"stride {stride}, groups={shape.groups} and {shape.n_split} splits of the "
            f"{shape.channels} channels of a group; use another route"
        )
    wanted = {
        "lego_filters": (lego_filters, (shape.n_lego, shape.width, *shape.kernel)),
        "index": (index, (shape.n_split, shape.n_out, shape.n_terms)),
        "coefficients": (coefficients, (shape.n_split, shape.n_out, shape.n_terms)),
    }
    for name, (tensor, sizes) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != sizes:
            raise KernelError(f"{name} is {tuple(tensor.shape)}; the unit wants {sizes}")
        if tensor is not None and tensor.is_floating_point() != (name != "index"):
            raise KernelError(f"{name} is {tensor.dtype}; index has integers, the others floats")
    if index.dtype == torch.bool:
        raise KernelError("index is torch.bool; give integers")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= shape.n_lego:
        raise KernelError(
            f"index holds {low if low < 0 else high}, but the {shape.n_lego} Lego filters are "
            f"numbered 0 to {shape.n_lego - 1}"
        )
    for name, tensor in (("lego_filters", lego_filters), ("coefficients", coefficients)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise KernelError(f"{name} holds values that are not finite")
