"""Dense forms and other merges compute the same function."""

from __future__ import annotations

import pytest
import torch

import legocompress as lego
from benchmarks.common import merges
from legocompress.report import rivals as forms
from tests.support.benchmarking import network


def test_runtimes_compute_the_same() -> None:
    for package in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    model = lego.to_dense(network()).eval()
    x = torch.rand(2, 3, 32, 32)
    found = dict(forms.rivals(model, None, x, ("onnxruntime", "openvino"), lambda name: None))
    for form in found.values():
        assert not isinstance(form, str), form
        torch.testing.assert_close(torch.as_tensor(form()), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_other_merges_compute_the_same() -> None:
    model = network().eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        merged = dict(merges.list_merges(model, x))
        assert len(merged) == 3
        for run in merged.values():
            torch.testing.assert_close(run(), model(x), rtol=1e-4, atol=1e-5)
