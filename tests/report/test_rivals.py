"""Every rival computes the same function, or is left out with a reason."""

from __future__ import annotations

import pytest
import torch

import legocompress as lego
from legocompress.report import rivals
from tests.support.benchmarking import IMAGE, network


def ignore(name: str) -> None:
    """Receive the name of a form and do nothing."""


def test_runtimes_compute_the_same() -> None:
    for package in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    model = lego.to_dense(network()).eval()
    x = torch.rand(2, 3, 32, 32)
    forms = dict(rivals.build_rivals(model, None, x, ("onnxruntime", "openvino"), ignore))
    assert list(forms) == ["ONNX Runtime", "OpenVINO"]
    for form in forms.values():
        assert not isinstance(form, str), form
        torch.testing.assert_close(torch.as_tensor(form()), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_form_that_fails_or_differs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "COMPILE_SECONDS", 0)
    monkeypatch.setattr(rivals, "_build_scripted", lambda model, x: lambda: model(x) + 1)
    monkeypatch.setattr(
        rivals, "_build_onnxruntime", lambda model, x: rivals._import_library("no_such", "no-such")
    )
    model = lego.to_dense(network()).eval()
    forms = dict(rivals.build_rivals(model, "nothing", IMAGE, rivals.AGAINST[:3], ignore))
    assert forms["jit, frozen and optimized"] == "it computes something else"
    assert forms["torchvision"] == "torchvision has no network called 'nothing'"
    assert forms["ONNX Runtime"] == "no-such is not installed: pip install no-such"
    assert callable(forms["eager"])


def test_each_rival_has_a_name_of_its_own_and_each_group_a_rival() -> None:
    names = [rival.name for rival in rivals.RIVALS]
    assert len(set(names)) == len(names)
    assert {rival.group for rival in rivals.RIVALS} == set(rivals.AGAINST)
