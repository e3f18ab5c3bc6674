"""The compiled library: instruction sets, forked processes, sanitizers."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from legocompress import kernels
from tests.support.int8_cases import Int8Case, random_int8_case
from tests.support.kernel_cases import (
    ACTIVATIONS,
    SIZES,
    Case,
    compiled,
    make_case,
    random_case,
    random_grouped_case,
    random_winograd_case,
)

FORKED = """
import multiprocessing, torch
from legocompress import kernels
from legocompress.lego.shape import UnitShape

shape = UnitShape(32, 16, (3, 3), 1, 16, 2, 1)
packed = kernels.pack(shape, torch.randn(16, 8, 3, 3), torch.randint(0, 16, (2, 32, 1)), None)
x = torch.randn(1, 16, 40, 40)

def run(_):
    y = kernels.lego_conv2d(x, packed, None, None, (1, 1), (1, 1), (1, 1), "none")
    return y[0, :, 5, 6].tolist()

torch.set_num_threads(2)
with torch.inference_mode():
    expected = run(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(y == expected for y in pool.map(run, range(4)))
"""


@pytest.mark.slow
@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_run_the_kernels() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("isa", ["portable", "avx2", "sse9"])
def test_an_instruction_set_can_be_chosen_by_name(isa: str) -> None:
    if isa == "avx2" and isa not in runnable_isas():
        pytest.skip("this CPU has no AVX2")
    code = "from legocompress import kernels as k; print(k.why_unavailable() or k.isa())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=60, env={**os.environ, "LEGOCOMPRESS_ISA": isa},
    )  # fmt: skip
    assert ("sse9" in done.stdout) if isa == "sse9" else (done.stdout.strip() == isa)


def encode_calls(cases: list[tuple[Case, str, int]]) -> bytes:
    """Encode calls for tests/support/kernel_driver.cpp: expected status, buffers, numbers.

    Args:
        cases: a case, its transform, and how many bytes to cut off the packed buffer.
    """
    parts = [struct.pack("=q", len(cases))]
    for case, transform, cut in cases:
        packed = kernels.pack(
            case.shape,
            case.lego_filters,
            case.index,
            case.coefficients,
            transform=transform,
            stride=case.stride[0],
        ).flatten()
        if cut:
            packed = packed[:-cut].clone()
        channels_last = not case.x.is_contiguous()
        expected = case.expected().float()
        parts.append(struct.pack("=q", 1 if cut else 0))
        for tensor in (packed, case.x, case.bias, case.residual, expected):
            if tensor is None:
                parts.append(struct.pack("=q", 0))
                continue
            if tensor.dim() == 4 and channels_last:
                tensor = tensor.permute(0, 2, 3, 1)
            parts.append(struct.pack("=q", tensor.numel()) + tensor.contiguous().numpy().tobytes())
        code = list(ACTIVATIONS).index(case.activation)
        sizes = (case.x.shape[0], *case.x.shape[2:], *expected.shape[2:])
        numbers = (*sizes, *case.stride, *case.padding, *case.dilation, channels_last, code)
        parts.append(struct.pack("=15q", case.x.shape[1], *numbers, 1 + len(parts) % 2))
    return b"".join(parts)


def encode_int8_calls(cases: list[Int8Case]) -> bytes:
    """Encode calls of lego_int8_conv for the driver, each for `sanitized_int8_isas`.

    The first conv is also called with a packed buffer that was cut short.
    """
    parts: list[bytes] = []
    count = 0

    def add(*tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            data = b"" if tensor is None else tensor.contiguous().numpy().tobytes()
            parts.append(struct.pack("=q", len(data)) + data)

    for number, case in enumerate(cases):
        expected = case.expected()
        y = kernels.lay_out_map(expected, case.out_border, 9)
        is_pixel = kernels.lay_out_map(torch.ones_like(expected), case.out_border, 0)
        x = kernels.lay_out_map(case.x, case.border, case.conv.x_zero)
        residual = None
        if case.residual is not None:
            residual = kernels.lay_out_map(case.residual, case.out_border, 0).data
        for isa in sanitized_int8_isas():
            code = kernels.int8_isas()[isa]
            with kernels.use_int8_isa(isa):
                packed = kernels.pack_integer_conv(
                    case.conv, case.stride, case.padding, case.dilation
                ).data
            for cut in (0, 64) if number == 0 else (0,):
                parts.append(struct.pack("=q", 1 if cut else 0))
                add(packed[: len(packed) - cut], x.data, residual, y.data, is_pixel.data)
                sizes = (case.x.shape[0], *case.x.shape[2:], case.border, *expected.shape[2:])
                parts.append(struct.pack("=9q", *sizes, case.out_border, 9, code + 1))
                count += 1
    return struct.pack("=q", count) + b"".join(parts)


SOURCES = Path(kernels.__file__).parent / "src"
SUPPORT = Path(__file__).parents[1] / "support"
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}
INT8_FLAGS = {
    "avx2": ["-mavx2"],
    "avx_vnni": ["-mavx2", "-mavxvnni"],
    "avx512": ISA_FLAGS["avx512"],
    "avx512_vnni": [*ISA_FLAGS["avx512"], "-mavx512vnni"],
    "amx": [
        *ISA_FLAGS["avx512"], "-mavx512vnni", "-mavx512vbmi", "-mamx-tile", "-mamx-int8",
    ],
}  # fmt: skip


def sanitized_int8_isas() -> list[str]:
    """The portable int8 kernels and the best ones; the others share their code."""
    return ["portable", *([kernels.int8_isa()] if kernels.int8_isa() != "portable" else [])]


def runnable_isas() -> list[str]:
    """The instruction sets that this CPU runs: portable, and those with flags in ISA_FLAGS."""
    best = kernels.isa() if kernels.available() else "portable"
    return [
        "portable",
        *(["avx2"] if best in ISA_FLAGS else []),
        *(["avx512"] if best == "avx512" else []),
    ]


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    rnd = random.Random(0)
    cases = [(random_case(rnd), "direct", 0) for _ in range(60)]
    cases += [(random_winograd_case(rnd), "winograd", 0) for _ in range(40)]
    cases += [(random_grouped_case(rnd), "direct", 0) for _ in range(20)]
    for size in SIZES:
        cases.append((make_case(c=5, size=(2, *size)), "winograd", 0))
        for batch in (1, 3):
            pixels = make_case(c=5, kernel=(1, 1), padding=(0, 0), size=(batch, *size))
            cases.append((pixels, "direct", 0))
            cases.append((make_case(c=5, stride=(2, 2), size=(batch, *size)), "direct", 0))
    cases += [(make_case(channels_last=True), "winograd", 0)]
    cases += [(make_case(), "direct", cut) for cut in (1, 300, 100000)]
    torch.manual_seed(0)
    kinds = ["lego", "lego", "dense", "grouped", "grouped lego", "depthwise"]
    int8_cases = [random_int8_case(rnd, kind) for kind in kinds for _ in range(4)]
    (tmp_path / "calls").write_bytes(encode_calls(cases) + encode_int8_calls(int8_cases))
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-ffp-contract=fast", "-Wno-psabi", "-pthread", f"-I{SOURCES}"]
    isas = runnable_isas()
    isa_flags = {f"kernel_{isa}.cpp": opts for isa, opts in ISA_FLAGS.items() if isa in isas}
    for isa in sanitized_int8_isas():
        isa_flags[f"int8_{isa}.cpp"] = INT8_FLAGS.get(isa, [])
    builds = []
    for source in [*SOURCES.glob("*.cpp"), SUPPORT / "kernel_driver.cpp"]:
        target = str(tmp_path / f"{source.stem}.o")
        command = [
            compiler,
            *flags,
            *isa_flags.get(source.name, []),
            "-c",
            str(source),
            "-o",
            target,
        ]
        builds.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for _, build in builds:
        _, messages = build.communicate(timeout=300)
        if build.returncode and "sanitize" in messages:
            pytest.skip("this compiler has no sanitizers")
        assert build.returncode == 0, messages[-2000:]
    program = str(tmp_path / "driver")
    objects = [target for target, _ in builds]
    linked = subprocess.run([compiler, *flags, *objects, "-o", program], capture_output=True)
    assert linked.returncode == 0, linked.stderr[-2000:]
    for isa in isas:
        ran = subprocess.run(
            [program, str(tmp_path / "calls")],
            capture_output=True, text=True, timeout=300, env={"LEGOCOMPRESS_ISA": isa},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
        assert f"{isa}: {len(cases)} calls" in ran.stdout
