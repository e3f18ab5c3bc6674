"""The fused kernel and its fall-back against nn.Conv2d with the assembled weight, in float64."""

from __future__ import annotations

import math
import os
import random
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import Tensor

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.spec import UnitShape
from legocompress.unit import assemble, used_filters

# SiLU of minus infinity is not a number in PyTorch, and its limit 0 elsewhere.
SILU_OF = ("silu", math.inf)
compiled = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_unavailable()))
ACTIVATIONS = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}


@dataclass
class Case:
    """One unit and one call of it."""

    shape: UnitShape
    lego_filters: Tensor
    index: Tensor
    coefficients: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activation: str

    def expected(self) -> Tensor:
        """By the assembled weight, in float64."""

        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        weight = assemble(
            self.shape, self.lego_filters.double(), self.index, double(self.coefficients)
        )
        conv = (self.stride, self.padding, self.dilation)
        y = F.conv2d(self.x.double(), weight, double(self.bias), *conv)
        return ACTIVATIONS[self.activation](y if self.residual is None else y + self.residual)

    def run(self, transform: str = "direct") -> Tensor:
        """By the compiled kernel."""
        unit = (self.shape, self.lego_filters, self.index, self.coefficients)
        packed = kernels.pack(*unit, transform=transform)
        conv = (self.stride, self.padding, self.dilation)
        return torch.ops.legocompress.lego_conv2d(
            self.x, packed, self.bias, self.residual, *conv, self.activation
        )


def case(
    n: int = 8,
    c: int = 6,
    kernel: tuple[int, int] = (3, 3),
    m: int = 4,
    o: int = 2,
    k: int = 1,
    size: tuple[int, int, int] = (1, 9, 11),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    channels_last: bool = False,
    coefficients: bool = True,
    bias: bool = True,
    residual: bool = False,
    activation: str = "none",
) -> Case:
    shape = UnitShape(n, c, kernel, 1, m, o, k)
    x = torch.randn(size[0], c, size[1], size[2])
    spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    out = [(size[1 + i] + 2 * padding[i] - spans[i]) // stride[i] + 1 for i in (0, 1)]
    return Case(
        shape,
        torch.randn(m, shape.width, *kernel),
        torch.randint(0, m, (o, n, k)),
        torch.randn(o, n, k) if coefficients else None,
        torch.randn(n) if bias else None,
        torch.randn(size[0], n, *out) if residual else None,
        x.to(memory_format=torch.channels_last) if channels_last else x,
        stride,
        padding,
        dilation,
        activation,
    )


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    assert found.shape == expected.shape
    worst = (found - expected).abs().max() if found.numel() else torch.tensor(0.0)
    return bool(worst <= tolerance * (1 + expected.abs().max()))


def random_case(rnd: random.Random) -> Case:
    while True:
        kernel = rnd.choice([(1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (5, 5), (1, 7)])
        c, n = rnd.randint(1, 40), rnd.randint(1, 50)
        padding = rnd.choice([(kernel[0] // 2, kernel[1] // 2), (0, 0), (1, 2), (3, 3)])
        dilation = rnd.choice([(1, 1), (1, 1), (2, 2), (1, 3)])
        size = (rnd.choice([1, 1, 2, 3, 9]), *rnd.choice(SIZES))
        if any(size[1 + i] + 2 * padding[i] <= dilation[i] * (kernel[i] - 1) for i in (0, 1)):
            continue
        return case(
            n=n, c=c, kernel=kernel, m=rnd.randint(1, n), o=min(c, rnd.randint(1, 4)),
            k=rnd.randint(1, 4), size=size, stride=rnd.choice(STRIDES),
            padding=padding, dilation=dilation, channels_last=rnd.random() < 0.4,
            coefficients=rnd.random() < 0.7, bias=rnd.random() < 0.5, residual=rnd.random() < 0.4,
            activation=rnd.choice(list(ACTIVATIONS)),
        )  # fmt: skip


STRIDES = [(1, 1), (1, 1), (2, 2), (2, 1), (3, 2)]
SIZES = [(1, 1), (7, 7), (14, 14), (5, 9), (13, 17), (28, 28), (56, 56), (9, 64), (3, 61)]


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_random_units_equal_the_dense_conv(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(30 if threads == 2 else 80):
            one = random_case(rnd)
            y = one.run()
            assert close(y, one.expected()), one
            channels_last = not one.x.is_contiguous()
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert y.is_contiguous(memory_format=layout)
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_random_winograd_units_equal_the_dense_conv(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(40):
            c, n = rnd.randint(1, 40), rnd.randint(1, 50)
            size = (rnd.choice([1, 2, 5]), *rnd.choice(SIZES))
            one = case(
                n=n, c=c, m=rnd.randint(1, n), o=min(c, rnd.randint(1, 4)), k=rnd.randint(1, 3),
                size=size, padding=rnd.choice([(1, 1), (1, 1), (2, 3)]),
                channels_last=rnd.random() < 0.3, residual=rnd.random() < 0.4,
                activation=rnd.choice(list(ACTIVATIONS)),
            )  # fmt: skip
            assert close(one.run("winograd"), one.expected(), 2e-4), one
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 14, 14), (1, 28, 28), (1, 32, 32), (1, 15, 15), (3, 14, 14)])
def test_pixels_are_read_in_place_and_uneven_tiles_are_shared(
    size: tuple[int, int, int], threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        for n, residual in ((512, True), (20, False)):
            one = case(
                n=n, c=12, kernel=(1, 1), padding=(0, 0), m=n // 2, size=size, residual=residual
            )
            assert close(one.run(), one.expected())
        deep = case(n=30, c=40, m=15, size=size)
        assert close(deep.run("winograd"), deep.expected(), 2e-4)
    finally:
        torch.set_num_threads(1)


@compiled
def test_a_dense_conv_is_a_unit_of_one_split() -> None:
    weight = torch.randn(16, 8, 3, 3)
    shape = UnitShape(16, 8, (3, 3), 1, 16, 1, 1)
    packed = kernels.pack(shape, weight, torch.arange(16).reshape(1, 16, 1), None)
    x = torch.randn(1, 8, 12, 12)
    y = kernels.lego_conv2d(x, packed, None, None, (1, 1), (1, 1), (1, 1), "none")
    assert close(y, F.conv2d(x.double(), weight.double(), padding=1))


@compiled
def test_filters_that_no_slot_names_are_left_out() -> None:
    one = case(m=8, n=8, o=2)
    one.index.fill_(3)
    few = kernels.pack(one.shape, one.lego_filters, one.index, None)
    one.index.copy_(torch.arange(8).reshape(1, 8, 1).expand(2, 8, 1))
    every = kernels.pack(one.shape, one.lego_filters, one.index, None)
    assert few.numel() < every.numel()
    one.index.fill_(3)
    assert close(one.run(), one.expected())


@compiled
def test_views_are_read_as_what_they_show() -> None:
    one = case(size=(2, 8, 10), residual=True, activation="silu")
    expected = one.expected()
    one.x = one.x.transpose(2, 3).contiguous().transpose(2, 3)
    one.residual = one.residual.transpose(0, 1).contiguous().transpose(0, 1)
    one.bias = torch.stack([one.bias, one.bias], 1)[:, 0]
    assert not one.x.is_contiguous()
    assert close(one.run(), expected)


@compiled
@pytest.mark.parametrize(
    ("activation", "bad"),
    [(name, bad) for name in ACTIVATIONS for bad in (math.nan, math.inf) if (name, bad) != SILU_OF],
)
def test_what_is_not_finite_stays_so(activation: str, bad: float) -> None:
    one = case(kernel=(1, 1), padding=(0, 0), activation=activation, size=(1, 5, 5))
    one.x[0, 1, 2, 3] = bad
    found, expected = one.run(), one.expected()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())


@compiled
def test_the_direct_call_and_the_operator_are_one_function() -> None:
    one = case()
    packed = kernels.pack(one.shape, one.lego_filters, one.index, one.coefficients)
    call = (one.x, packed, one.bias, None, (1, 1), (1, 1), (1, 1), "relu")
    with torch.inference_mode():
        assert torch.equal(kernels.lego_conv2d(*call), torch.ops.legocompress.lego_conv2d(*call))


@compiled
@pytest.mark.parametrize("transform", ["direct", "winograd"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_residual_is_overwritten_where_it_may_be(transform: str, channels_last: bool) -> None:
    for size in SIZES:
        one = case(size=(2, *size), residual=True, channels_last=channels_last, activation="relu")
        packed = kernels.pack(
            one.shape, one.lego_filters, one.index, one.coefficients, transform=transform
        )
        expected, conv = one.expected(), (one.stride, one.padding, one.dilation)
        with torch.no_grad():
            kept = kernels.lego_conv2d(one.x, packed, one.bias, one.residual, *conv, "relu")
            assert close(kept, expected, 1e-4)
            assert one.residual is not None
            layout = torch.channels_last if channels_last else torch.contiguous_format
            spare = one.residual.clone(memory_format=layout)
            found = kernels.lego_conv2d(one.x, packed, one.bias, spare, *conv, "relu", True)
        assert torch.equal(found, kept)
        assert torch.equal(found, spare)
        assert found.data_ptr() == spare.data_ptr() != kept.data_ptr()


@compiled
def test_opcheck() -> None:
    for channels_last in (False, True):
        one = case(channels_last=channels_last, residual=True)
        packed = kernels.pack(one.shape, one.lego_filters, one.index, one.coefficients)
        conv = ((1, 1), (1, 1), (1, 1))
        call = (one.x, packed, one.bias, one.residual, *conv, "relu")
        torch.library.opcheck(torch.ops.legocompress.lego_conv2d.default, call)
        unit = (one.lego_filters, one.index, one.coefficients, one.bias)
        torch.library.opcheck(
            torch.ops.legocompress.lego_conv2d_table.default, (one.x, *unit, *conv, 1)
        )


class Layer(torch.nn.Module):
    """A module that runs one unit by the compiled kernel."""

    def __init__(self, one: Case) -> None:
        super().__init__()
        packed = kernels.pack(one.shape, one.lego_filters, one.index, one.coefficients)
        self.register_buffer("packed", packed)
        self.conv = (one.stride, one.padding, one.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.lego_conv2d(x * 1.0, self.packed, None, None, *self.conv, "relu") + 0.0


@compiled
def test_export_keeps_the_operator() -> None:
    one = case(bias=False, activation="relu")
    program = torch.export.export(Layer(one), (one.x,))
    assert "legocompress.lego_conv2d" in str(program.graph)
    assert close(program.module()(one.x), one.expected())


@compiled
def test_compile_sees_through_it() -> None:
    one = case(bias=False, activation="relu", channels_last=True)
    compiled_layer = torch.compile(Layer(one), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled_layer(one.x), one.expected())


@compiled
def test_fvcore_counts_it_within_three_hundredths() -> None:
    one = case(n=64, c=64, m=32, o=2, size=(1, 14, 14), bias=False)
    analysis = FlopCountAnalysis(Layer(one), one.x).set_op_handle(**kernels.FVCORE_HANDLES)
    analysis.unsupported_ops_warnings(False).tracer_warnings("none")
    macs = (used_filters(one.shape, one.index) * 32 * 9 + 64 * 2) * 14 * 14
    counted = analysis.by_operator()["lego_conv2d"]
    assert macs <= counted <= 1.03 * macs


@compiled
def test_a_gradient_is_refused() -> None:
    one = case()
    one.x.requires_grad_()
    with pytest.raises(KernelError, match="route 'assemble'"):
        one.run().sum().backward()


@compiled
def test_an_index_out_of_range_is_refused() -> None:
    one = case()
    for bad in (-1, 4):
        index = one.index.clone()
        index[1, 3, 0] = bad
        with pytest.raises(KernelError, match=f"index holds {bad}"):
            kernels.pack(one.shape, one.lego_filters, index, None)


def test_units_that_do_not_fit_are_refused() -> None:
    one = case()
    grouped = UnitShape(8, 3, (3, 3), 2, 4, 1, 1)
    assert not kernels.supports(grouped, (1, 1), (1, 1), (1, 1), "direct")
    assert not kernels.supports(one.shape, (1, 1), "same", (1, 1), "direct")
    assert kernels.supports(one.shape, (1, 1), (1, 1), (1, 1), "winograd")
    assert not kernels.supports(one.shape, (2, 2), (1, 1), (1, 1), "winograd")
    with pytest.raises(KernelError, match="groups=2"):
        kernels.pack(grouped, one.lego_filters, one.index, None)
    with pytest.raises(KernelError, match="index is"):
        kernels.pack(one.shape, one.lego_filters, one.index[:, :4], None)
    with pytest.raises(KernelError, match="float32; index has integers"):
        kernels.pack(one.shape, one.lego_filters, one.index.float(), None)
    with pytest.raises(KernelError, match="not finite"):
        kernels.pack(one.shape, one.lego_filters * float("nan"), one.index, None)
    with pytest.raises(KernelError, match="'fft' is not known"):
        kernels.pack(one.shape, one.lego_filters, one.index, None, transform="fft")


@compiled
def test_calls_that_do_not_fit_are_refused() -> None:
    one = case()
    packed = kernels.pack(one.shape, one.lego_filters, one.index, None)

    def call(x: Tensor = one.x, packed: Tensor = packed, **changes: Any) -> None:
        given = {"bias": None, "residual": None, "activation": "none", **changes}
        conv = ((1, 1), (1, 1), (1, 1))
        kernels.lego_conv2d(x, packed, given["bias"], given["residual"], *conv, given["activation"])

    with pytest.raises(KernelError, match="float64"):
        call(one.x.double())
    with pytest.raises(KernelError, match="do not fit"):
        call(one.x[:, :5].contiguous())
    with pytest.raises(KernelError, match="bias is"):
        call(bias=torch.zeros(7))
    with pytest.raises(KernelError, match="residual is"):
        call(residual=torch.zeros(1, 8, 9, 10))
    with pytest.raises(KernelError, match="activation 'gelu'"):
        call(activation="gelu")
    with pytest.raises(KernelError, match="leaves no output"):
        call(torch.zeros(1, 6, 0, 4))
    for place in (0, 3, 8, 100, 12 * 8, 14 * 8):
        damaged = packed.clone()
        damaged.view(-1)[place] ^= 0xFF
        with pytest.raises(KernelError, match="packed buffer"):
            call(packed=damaged)
    assert (
        kernels.lego_conv2d(one.x[:0], packed, None, None, (1, 1), (1, 1), (1, 1), "none").shape[0]
        == 0
    )


@compiled
def test_several_python_threads_at_once() -> None:
    cases = [case(n=32, c=16, size=(1, 20, 20), m=9) for _ in range(4)]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as workers:
            found = list(workers.map(lambda one: [one.run() for _ in range(5)], cases))
    finally:
        torch.set_num_threads(1)
    for one, ys in zip(cases, found, strict=True):
        assert all(close(y, one.expected()) for y in ys)


FORKED = """
import multiprocessing, torch
from legocompress import kernels
from legocompress.spec import UnitShape

shape = UnitShape(32, 16, (3, 3), 1, 16, 2, 1)
packed = kernels.pack(shape, torch.randn(16, 8, 3, 3), torch.randint(0, 16, (2, 32, 1)), None)
x = torch.randn(1, 16, 40, 40)

def run(_):
    y = kernels.lego_conv2d(x, packed, None, None, (1, 1), (1, 1), (1, 1), "none")
    return y[0, :, 5, 6].tolist()

torch.set_num_threads(2)
with torch.inference_mode():
    mine = run(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(other == mine for other in pool.map(run, range(4)))
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_run_it() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@compiled
@pytest.mark.parametrize("isa", ["portable", "avx2", "sse9"])
def test_an_instruction_set_can_be_asked_for(isa: str) -> None:
    if isa == "avx2" and isa not in runnable_isas():
        pytest.skip("this CPU has no AVX2")
    code = "from legocompress import kernels as k; print(k.why_unavailable() or k.isa())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=60, env={**os.environ, "LEGOCOMPRESS_ISA": isa},
    )  # fmt: skip
    assert ("sse9" in done.stdout) if isa == "sse9" else (done.stdout.strip() == isa)


def recorded(cases: list[tuple[Case, str, int]]) -> bytes:
    """Calls for tests/kernel_driver.cpp: status, buffers, numbers."""
    parts = [struct.pack("=q", len(cases))]
    for one, transform, damage in cases:
        packed = kernels.pack(
            one.shape, one.lego_filters, one.index, one.coefficients, transform=transform
        ).flatten()
        if damage:
            packed = packed[:-damage].clone()
        channels_last = not one.x.is_contiguous()
        expected = one.expected().float()
        parts.append(struct.pack("=q", 1 if damage else 0))
        for tensor in (packed, one.x, one.bias, one.residual, expected):
            if tensor is None:
                parts.append(struct.pack("=q", 0))
                continue
            if tensor.dim() == 4 and channels_last:
                tensor = tensor.permute(0, 2, 3, 1)
            parts.append(struct.pack("=q", tensor.numel()) + tensor.contiguous().numpy().tobytes())
        code = list(ACTIVATIONS).index(one.activation)
        sizes = (one.x.shape[0], *one.x.shape[2:], *expected.shape[2:])
        numbers = (*sizes, *one.stride, *one.padding, *one.dilation, channels_last, code)
        parts.append(struct.pack("=15q", one.x.shape[1], *numbers, 1 + len(parts) % 2))
    return b"".join(parts)


SOURCES = Path(kernels.__file__).parent / "src"
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}


def runnable_isas() -> list[str]:
    """Every instruction set that this CPU runs, of those whose code needs flags of its own."""
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
    for size in SIZES:
        cases.append((case(c=5, size=(2, *size)), "winograd", 0))
        for batch in (1, 3):
            pixels = case(c=5, kernel=(1, 1), padding=(0, 0), size=(batch, *size))
            cases.append((pixels, "direct", 0))
            cases.append((case(c=5, stride=(2, 2), size=(batch, *size)), "direct", 0))
    cases += [(case(channels_last=True), "winograd", 0)]
    cases += [(case(), "direct", cut) for cut in (1, 300, 100000)]
    (tmp_path / "calls").write_bytes(recorded(cases))
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-ffp-contract=fast", "-Wno-psabi", "-pthread", f"-I{SOURCES}"]
    isas = runnable_isas()
    own = {f"kernel_{isa}.cpp": opts for isa, opts in ISA_FLAGS.items() if isa in isas}
    builds = []
    for source in [*SOURCES.glob("*.cpp"), Path(__file__).parent / "kernel_driver.cpp"]:
        target = str(tmp_path / f"{source.stem}.o")
        command = [compiler, *flags, *own.get(source.name, []), "-c", str(source), "-o", target]
        builds.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for _, build in builds:
        _, said = build.communicate(timeout=300)
        if build.returncode and "sanitize" in said:
            pytest.skip("this compiler has no sanitizers")
        assert build.returncode == 0, said[-2000:]
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


def table(one: Case, **changes: Any) -> Tensor:
    unit = (one.lego_filters, one.index, one.coefficients, one.bias)
    conv = (one.stride, one.padding, one.dilation, one.shape.groups)
    return torch.ops.legocompress.lego_conv2d_table(one.x, *unit, *conv)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("coefficients", [True, False])
def test_the_table_form_equals_the_dense_conv(k: int, coefficients: bool) -> None:
    one = case(k=k, c=7, coefficients=coefficients, size=(2, 5, 6), stride=(2, 1))
    assert close(table(one), one.expected())
