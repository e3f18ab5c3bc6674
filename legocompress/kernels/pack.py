"""Pack a Lego unit once into the buffer that the compiled kernels read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.lego.shape import UnitShape

# Equal to the constants in src/lego.h.
_MAGIC, _VERSION = 0x4F47454C, 2
_HEADER_BYTES = 16 * 8
_PANEL = 6
_SLACK = 16
MAX_TAPS = 1024

_SECTION_ALIGNMENT = 64  # bytes: a cache line
TRANSFORMS = ("direct", "winograd")

# Interpolation points of Winograd's F(4 x 4, r x r) besides infinity, by r. The transforms of its
# input and output, which use the same points, are in src/winograd_points.h.
_POINTS = {2: (0, 1, -1, 2), 3: (0, 1, -1, 2, -2), 4: (0, 1, -1, 2, -2, 0.5)}


def _winograd_taps(kernel: tuple[int, int], stride: int) -> int:
    """The r of Winograd's form F(4 x 4, r x r) for a kernel at a stride; 0 if it has none."""
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
    """Whether the fused kernel can run a unit.

    Both transforms need padding in pixels, at most MAX_TAPS taps and, if there is more than one
    group, groups whose channels divide into whole fragments. 'winograd' also needs dilation 1 and
    a square kernel: of 2 to 4 at stride 1, of 3 to 8 at stride 2.
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
    """Pack a unit for `torch.ops.legocompress.lego_conv2d`, and check every index.

    Each split keeps only the Lego filters that its slots use. The result is an opaque uint8 buffer
    on the CPU, the same on every CPU of one byte order. Its sizes are (n, o * k, kh, kw, rest):
    the operator's fake kernel reads the sizes of its output from them.

    Args:
        shape: sizes of the unit.
        lego_filters: (m, q, kh, kw).
        index: (o, n, k) integers in [0, m).
        coefficients: (o, n, k), or None for all ones.
        transform: 'direct', or 'winograd' for the kernels and strides that `supports` accepts.
        stride: stride of the conv, which Winograd's form depends on.

    Raises:
        KernelError: sizes that do not fit each other, an index out of range, values that are not
            finite, or a unit that the kernel does not support.
    """
    _check_unit(shape, lego_filters, index, coefficients, transform, stride)
    winograd_stride = stride if transform == "winograd" else 0
    split_rows, rows = _number_rows(shape, index)
    filters = _pack_filters(shape, lego_filters, split_rows, winograd_stride)
    gains = torch.ones(shape.n_split, shape.n_out, shape.n_terms, dtype=torch.float32)
    if coefficients is not None:
        gains = coefficients.detach().to("cpu", torch.float32)
    n_used = torch.tensor([used.numel() for used in split_rows], dtype=torch.int64)
    sections = [
        _as_bytes(n_used),
        _as_bytes(filters),
        _as_bytes(rows),
        _as_bytes(gains.transpose(0, 1)),
    ]
    return _join_sections(shape, sections, winograd_stride, n_rows=int(n_used.sum()))


def _number_rows(shape: UnitShape, index: Tensor) -> tuple[list[Tensor], Tensor]:
    """Number the rows of Z, one per split and Lego filter that the split uses.

    To the kernel a split of a group is a split like any other: output channels of other groups
    name none of its rows. Splits are ordered by group, then by split of the group.

    Returns:
        The Lego filters that each split uses, in ascending order; and the row of Z for each term
        (n, o, k) int32.
    """
    slots = index.detach().to("cpu", torch.int64)
    rows = torch.empty(shape.n_out, shape.n_split, shape.n_terms, dtype=torch.int32)
    split_rows: list[Tensor] = []
    first_row = 0
    groups = torch.arange(shape.n_out).chunk(shape.groups)
    for group, i in itertools.product(groups, range(shape.n_split)):
        used, position = torch.unique(slots[i, group], return_inverse=True)
        rows[group, i] = (position + first_row).to(torch.int32)
        first_row += used.numel()
        split_rows.append(used)
    return split_rows, rows


def _pack_filters(
    shape: UnitShape, lego_filters: Tensor, split_rows: list[Tensor], winograd_stride: int
) -> Tensor:
    """The filters that each split uses, in panels, as one float32 vector with slack at its end."""
    bank = lego_filters.detach().to("cpu", torch.float64)
    winograd = winograd_stride > 0
    taps = _transform_filters(bank, winograd_stride) if winograd else bank.flatten(2)[:, :, None]
    parts = []
    for number, used in enumerate(split_rows):
        i = number % shape.n_split
        channels = max(0, min(shape.width, shape.channels - i * shape.width))
        chosen = taps.index_select(0, used)[:, :channels]
        if winograd:
            parts.append(_arrange_panels(chosen.flatten(1, 2).permute(2, 0, 1)))
        else:
            parts.append(_arrange_panels(chosen.reshape(1, used.numel(), -1)))
    parts.append(torch.zeros(_SLACK, dtype=torch.float64))
    return torch.cat(parts).to(torch.float32)


def _join_sections(
    shape: UnitShape, sections: list[Tensor], winograd_stride: int, n_rows: int
) -> Tensor:
    """Write the header (struct Header in src/lego.h) and the sections into one buffer."""
    offsets, end = [], _HEADER_BYTES
    for section in sections:
        offsets.append(end)
        end += -(-section.numel() // _SECTION_ALIGNMENT) * _SECTION_ALIGNMENT
    kh, kw = shape.kernel
    n_sum = shape.n_split * shape.n_terms
    row_bytes = -(-end // (shape.n_out * n_sum * kh * kw))
    total = row_bytes * shape.n_out * n_sum * kh * kw
    header = [
        _MAGIC, _VERSION, total, shape.n_out, shape.groups * shape.channels, shape.width, kh, kw,
        shape.groups * shape.n_split, n_sum, winograd_stride, n_rows, *offsets,
    ]  # fmt: skip
    packed = torch.zeros(total, dtype=torch.uint8)
    packed[:_HEADER_BYTES] = _as_bytes(torch.tensor(header, dtype=torch.int64))
    for offset, section in zip(offsets, sections, strict=True):
        packed[offset : offset + section.numel()] = section
    return packed.reshape(shape.n_out, n_sum, kh, kw, row_bytes)


def _transform_filters(bank: Tensor, stride: int) -> Tensor:
    """Transform filters for Winograd: (m, q, k, k) to (m, q, phases, frequencies).

    A conv of stride s is a sum over its s x s phases, each a conv of stride 1 with r x r taps. Each
    phase becomes G taps G^T, of (r + 3)^2 frequencies. The row of G for the point a is

        (1, a, ..., a^(r-1)) / product over the other points b of (a - b)

    and the last row, of infinity, is (0, ..., 0, 1) (Cook and Toom; Lavin and Gray, 2016). If 1/2
    is a point, its factor is 2 a - 1 instead of a - 1/2, and the last row is halved.
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


def _arrange_panels(filters: Tensor) -> Tensor:
    """Cut filters (frequencies, rows, values) into panels, and interleave those of each panel.

    A panel holds at most 6 filters; the first panels have one filter more than the others where
    the number does not divide. Within a panel the order is (value, filter).
    """
    frequencies, rows, values = filters.shape
    count = -(-rows // _PANEL)
    small, n_tall = divmod(rows, count)
    cut = n_tall * (small + 1)
    tall = filters[:, :cut].reshape(frequencies, n_tall, small + 1, values)
    rest = filters[:, cut:].reshape(frequencies, count - n_tall, small, values)
    parts = [part.transpose(2, 3).reshape(frequencies, -1) for part in (tall, rest)]
    return torch.cat(parts, 1).flatten()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _check_unit(
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
    expected = {
        "lego_filters": (lego_filters, (shape.n_lego, shape.width, *shape.kernel)),
        "index": (index, (shape.n_split, shape.n_out, shape.n_terms)),
        "coefficients": (coefficients, (shape.n_split, shape.n_out, shape.n_terms)),
    }
    for name, (tensor, sizes) in expected.items():
        if tensor is not None and tuple(tensor.shape) != sizes:
            raise KernelError(f"{name} is {tuple(tensor.shape)}; the unit needs {sizes}")
        if tensor is not None and tensor.is_floating_point() != (name != "index"):
            raise KernelError(
                f"{name} is {tensor.dtype}; index has integers, the other tensors have floats"
            )
    if index.dtype == torch.bool:
        raise KernelError("index is torch.bool; it must hold integers")
    _check_index_range(index, shape.n_lego)
    for name, tensor in (("lego_filters", lego_filters), ("coefficients", coefficients)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise KernelError(f"{name} holds values that are not finite")


def _check_index_range(index: Tensor, n_lego: int) -> None:
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= n_lego:
        raise KernelError(
            f"index holds {low if low < 0 else high}, but the {n_lego} Lego filters are "
            f"numbered 0 to {n_lego - 1}"
        )
