"""Which bf16 convolutions oneDNN computes wrongly on this CPU.

    python -m benchmarks.bf16_amx                                      # known cases
    python -m benchmarks.bf16_amx --random 60                          # and random ones, 60 s
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m benchmarks.bf16_amx  # without AMX

Claim: with a horizontal stride, oneDNN computes some narrow bf16 convolutions wrongly: values are
wrong, NaN, or change from call to call. Needs torch alone, so the file can be run by itself. Before
each call the free blocks of the allocator are filled with one value. A correct operator gives the
same bits whatever that value is, and differs from float32 by bf16 rounding only. Exit status 1 says
that at least one operator is wrong. Takes about ten seconds without --random.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FILLS = (0.0, torch.nan, 1e4)
ROUNDING = 0.03  # of the largest value; bf16 has 8 bits
OPERATORS = ("forward", "backward data", "backward weights")


@dataclass(frozen=True)
class Conv:
    """The sizes of a convolution; pairs are (height, width)."""

    batch: int
    channels: int
    filters: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int = 1
    dilation: int = 1

    def out_size(self) -> tuple[int, ...]:
        """Height and width of the output."""
        return tuple(
            (n + 2 * p - self.dilation * (k - 1) - 1) // s + 1
            for n, p, k, s in zip(self.size, self.padding, self.kernel, self.stride, strict=True)
        )

    def __str__(self) -> str:
        sizes = f"mb{self.batch} ic{self.channels} oc{self.filters} g{self.groups} "
        (h, w), (kh, kw) = self.size, self.kernel
        (sh, sw), (ph, pw), (oh, ow) = self.stride, self.padding, self.out_size()
        return (
            f"{sizes}ih{h} iw{w} oh{oh} ow{ow} kh{kh} kw{kw} sh{sh} sw{sw} ph{ph} pw{pw} "
            f"d{self.dilation}"
        )


NARROW_INPUT = (
    Conv(8, 8, 16, (1, 1), (3, 3), (2, 2), (1, 1)),  # the last stage of a ResNet on small images
    Conv(8, 64, 64, (1, 1), (3, 3), (2, 2), (1, 1)),
    Conv(8, 32, 32, (2, 2), (3, 3), (3, 3), (1, 1)),
    Conv(2, 8, 16, (7, 1), (1, 7), (2, 2), (0, 5)),
)
NARROW_OUTPUT = (
    Conv(8, 16, 16, (14, 2), (1, 3), (2, 2), (0, 1)),
    Conv(2, 64, 48, (14, 4), (3, 3), (2, 2), (0, 0), 2),
    Conv(8, 128, 64, (7, 7), (1, 7), (1, 2), (0, 0), 4),
)
ORDINARY = (
    Conv(8, 8, 16, (1, 1), (3, 3), (1, 1), (1, 1)),
    Conv(8, 8, 16, (2, 2), (3, 3), (2, 2), (1, 1)),
    Conv(8, 16, 32, (7, 7), (3, 3), (2, 2), (1, 1), 4),
    Conv(8, 16, 16, (14, 14), (3, 3), (1, 1), (1, 1)),
)
CASES = (
    ("input narrower than the stride", NARROW_INPUT),
    ("output one pixel wide, stride > 1", NARROW_OUTPUT),
    ("neither", ORDINARY),
)


def fill_free_memory(value: float) -> None:
    """Allocate blocks of many sizes, write `value` to them, and give them back."""
    for n in [*range(8, 200, 16), *range(256, 32_768, 256), 2**16, 2**18, 2**20]:
        blocks = [torch.full((n,), value, dtype=torch.bfloat16) for _ in range(2)]
        del blocks


def run(conv: Conv, fill: float | None, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and weight, in the dtype of what is given."""
    pair = [conv.dilation, conv.dilation]
    sizes = (list(conv.stride), list(conv.padding), pair)
    if fill is not None:
        fill_free_memory(fill)
    y = torch.nn.functional.conv2d(x, weight, None, *sizes, conv.groups)
    if fill is not None:
        fill_free_memory(fill)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, [0], *sizes, False, [0, 0], conv.groups, [True, True, False]
    )
    return [y, dx, dw]


def check(conv: Conv, repeats: int) -> dict[str, tuple[int, int, int]]:
    """For each operator how many calls are wrong, hold NaN, and differ from the first call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (conv.batch, conv.channels, *conv.size),
        (conv.filters, conv.channels // conv.groups, *conv.kernel),
        (conv.batch, conv.filters, *conv.out_size()),
    ]
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    expected = run(conv, None, *(tensor.float() for tensor in tensors))
    calls = [run(conv, fill, *tensors) for _ in range(repeats) for fill in FILLS]
    table = {}
    for number, operator in enumerate(OPERATORS):
        values = [call[number] for call in calls]
        limit = ROUNDING * float(expected[number].abs().max().clamp(min=1e-6))
        worst = [float((value.float() - expected[number]).abs().max()) for value in values]
        table[operator] = (
            sum(not error < limit for error in worst),
            sum(not bool(value.isfinite().all()) for value in values),
            sum(not torch.equal(value, values[0]) for value in values[1:]),
        )
    return table


def random_conv(draw: random.Random) -> Conv | None:
    """A small convolution of random sizes, None where its output would be empty."""
    kernel = draw.choice([(1, 1), (3, 3), (5, 5), (7, 7), (2, 2), (1, 3), (3, 1), (1, 7), (4, 4)])
    stride = draw.choice([1, 2, 2, 3, 4])
    groups, height = draw.choice([1, 1, 1, 2, 4, 8]), draw.choice([1, 1, 2, 3, 4, 7, 8, 14])
    conv = Conv(
        batch=draw.choice([1, 2, 3, 8, 16]),
        channels=groups * draw.choice([1, 2, 4, 8, 12, 16, 32]),
        filters=groups * draw.choice([1, 2, 4, 8, 16, 24, 32, 64]),
        size=(height, draw.choice([height, height, 1, 2, 4])),
        kernel=kernel,
        stride=(stride, draw.choice([stride, stride, 1, 2])),
        padding=(draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2)),
        groups=groups,
        dilation=draw.choice([1, 1, 1, 2, 3]),
    )
    fits = all(
        n + 2 * p > conv.dilation * (k - 1)
        for n, p, k in zip(conv.size, conv.padding, conv.kernel, strict=True)
    )
    return conv if fits else None


def kind_of(conv: Conv) -> str:
    """The case that a convolution belongs to, by its last axis."""
    if conv.stride[1] > 1 and conv.size[1] < conv.stride[1]:
        return CASES[0][0]
    if conv.stride[1] > 1 and conv.out_size()[1] == 1:
        return CASES[1][0]
    return CASES[2][0]


def describe_machine() -> str:
    """Versions, and what of the CPU decides which kernels run."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    model = re.search(r"^model\s*: (\d+)", text, re.MULTILINE)
    onednn = re.search(r"MKL-DNN (v\S+)", torch.__config__.show())
    flags = sorted(set(re.findall(r"\b(?:amx|avx512)_?\w+", text)))
    return (
        f"torch {torch.__version__}, oneDNN {onednn.group(1) if onednn else 'none'}, "
        f"{torch.get_num_threads()} threads\n"
        f"CPU {name.group(1) if name else platform.processor()}, "
        f"model {model.group(1) if model else '?'}\n{' '.join(flags)}\n"
    )


def main() -> int:
    """Print the tables; 1 where an operator is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="calls per fill value")
    parser.add_argument("--random", type=float, default=0, help="seconds of random convolutions")
    parser.add_argument("--seed", type=int, default=0, help="of the random convolutions")
    options = parser.parse_args()
    print(describe_machine())
    n_calls, wrong_at_all = options.repeats * len(FILLS), False
    print(
        f"{n_calls} equal calls each: wrong values / with NaN or infinity / not as the first call"
    )
    for kind, convs in CASES:
        print(f"\n{kind}")
        for conv in convs:
            table = check(conv, options.repeats)
            wrong_at_all |= any(sum(counts) for counts in table.values())
            cells = ", ".join(f"{op} {'/'.join(map(str, c))}" for op, c in table.items())
            print(f"  {conv}: {cells}")
    if options.random:
        wrong_at_all |= print_random(options.random, options.seed)
    return int(wrong_at_all)


def print_random(seconds: float, seed: int) -> bool:
    """Check random convolutions for some time and print how many were wrong, by case."""
    draw, deadline = random.Random(seed), time.monotonic() + seconds
    counts = {kind: [0, *(0 for _ in OPERATORS)] for kind, _ in CASES}
    while time.monotonic() < deadline:
        conv = random_conv(draw)
        if conv is None:
            continue
        row = counts[kind_of(conv)]
        row[0] += 1
        for number, cell in enumerate(check(conv, 1).values()):
            row[1 + number] += sum(cell) > 0
    print(f"\nrandom convolutions: number, then how many are wrong ({', '.join(OPERATORS)})")
    for kind, row in counts.items():
        print(f"  {kind}: {row[0]}, {row[1:]}")
    return any(sum(row[1:]) for row in counts.values())


if __name__ == "__main__":
    raise SystemExit(main())
