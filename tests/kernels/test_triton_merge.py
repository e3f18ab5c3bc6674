"""The GPU form, run on the CPU by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import torch, torch.nn.functional as F
from legocompress.kernels.triton_merge import lego_conv2d_triton
from legocompress.lego.algebra import assemble
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit

torch.manual_seed(0)
shape = UnitShape(5, 6, (3, 3), 1, 3, 2, 2)
lego_filters, index = torch.randn(3, 3, 3, 3), torch.randint(0, 3, (2, 5, 2))
coefficients, bias, x = torch.randn(2, 5, 2), torch.randn(5), torch.randn(2, 6, 18, 17)
weight = assemble(shape, LegoUnit(lego_filters.double(), index, coefficients.double()))
acts = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
for residual in (None, torch.randn(2, 5, 18, 17)):
    for name, act in acts.items():
        conv = ((1, 1), (1, 1), (1, 1))
        expected = F.conv2d(x.double(), weight, bias.double(), *conv)
        expected = act(expected if residual is None else expected + residual)
        unit = (lego_filters, index, coefficients)
        y = lego_conv2d_triton(x, *unit, bias, residual, *conv, name)
        assert (y - expected).abs().max() < 1e-4, name
print("merged")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_merge_equals_the_dense_conv() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "merged", done.stderr[-2000:]
