"""Every rival computes the same function in its precision, or is left out with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.report.rivals import AGAINST, RIVALS, Against, build_rivals, table, torch_forms
from legocompress.report.rivals.form import LeftOut, Runner, Subject, import_library
from legocompress.report.rivals.instructions import describe_isa_limit
from tests.support.benchmarking import IMAGE, network


def ignore(name: str) -> None:
    """Receive the name of a form and do nothing."""


def build(model: nn.Module, x: Tensor, *against: Against) -> dict[str, Runner | str]:
    return {r.name: built for r, built in build_rivals(model, "nothing", x, against, ignore)}


def test_runtimes_compute_the_same() -> None:
    for package in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    model = lego.to_dense(network()).eval()
    x = torch.rand(2, 3, 32, 32)
    runners = build(model, x, "onnxruntime", "openvino")
    assert list(runners) == ["ONNX Runtime", "OpenVINO"]
    for runner in runners.values():
        assert not isinstance(runner, str), runner
        output = torch.as_tensor(runner.bind(x)())
        torch.testing.assert_close(output, model(x).detach(), rtol=1e-3, atol=1e-4)
        assert runner.count_bytes is not None
        assert runner.count_bytes() > 4 * sum(p.numel() for p in model.parameters())


def test_bf16_rounds_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_forms, "COMPILE_SECONDS", 0)
    model = lego.to_dense(network()).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    for name, runner in build(model, x, "torch-bf16").items():
        if "torch.compile" in name:
            assert "no " in str(runner)  # no time, or no bf16
            continue
        if runner == "not available on this CPU: no bf16":
            continue
        assert not isinstance(runner, str), runner
        error = (runner.predict(x).float() - expected).norm() / expected.norm()
        assert 0 < error < 0.05
        assert runner.count_bytes is not None
        assert runner.count_bytes() < 2.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_int8_is_smaller_and_near(capfd: pytest.CaptureFixture[str]) -> None:
    for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(package)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    ).eval()
    # Inputs as calibration has them: pixels under the preprocessing of the network.
    images = torch.cat(list(Subject(model, torch.rand(4, 3, 32, 32)).calibration_batches(4)))
    assert images.shape == (16, 3, 32, 32)
    x = images[:2]
    with torch.no_grad():
        expected = model(x)
    for runner in build(model, x, "onnxruntime-int8", "openvino-int8").values():
        assert not isinstance(runner, str), runner
        error = (runner.predict(x) - expected).norm() / expected.norm()
        assert 0 < error < 0.05
    assert "Statistics" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_form_that_fails_or_differs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_forms, "COMPILE_SECONDS", 0)
    builders = {
        "jit, frozen and optimized": lambda subject: Runner(lambda x: subject.dense(x) + 1),
        "ONNX Runtime": lambda subject: import_library("no_such"),
    }
    changed = tuple(replace(rival, build=builders.get(rival.name, rival.build)) for rival in RIVALS)
    monkeypatch.setattr(table, "RIVALS", changed)
    model = lego.to_dense(network()).eval()
    runners = build(model, IMAGE, "dense", "torchvision", "onnxruntime")
    assert runners["jit, frozen and optimized"] == "it computes something else"
    assert runners["torchvision"] == "torchvision has no network called 'nothing'"
    assert runners["ONNX Runtime"] == "no_such is not installed: pip install 'legocompress[rivals]'"
    assert isinstance(runners["eager"], Runner)


@pytest.mark.slow
def test_a_network_that_does_not_convert_is_left_out() -> None:
    for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(package)

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
                raise RuntimeError("this network cannot be traced")
            return x.mean((2, 3))

    reasons = build(Branches(), IMAGE, "onnxruntime-int8", "openvino-int8")
    assert "the network does not convert to ONNX: " in str(reasons["ONNX Runtime int8"])
    assert "OpenVINO does not convert the network: " in str(reasons["OpenVINO int8"])


def test_a_limit_of_the_instructions_leaves_bf16_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_vnni")
    reasons = build(nn.Flatten(), IMAGE, "torch-bf16")
    assert set(reasons.values()) == {
        "not available under ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI: no bf16"
    }
    assert "ONNX Runtime has no such limit" in str(describe_isa_limit())


def test_a_package_that_is_missing_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(table.PACKAGES, "openvino-int8", ("no_such_package",))
    with pytest.raises(UsageError, match=r"no_such_package.*pip install 'legocompress\[rivals\]'"):
        table.check_packages(("dense", "openvino-int8"))
    with pytest.raises(LeftOut, match=r"legocompress\[rivals\]"):
        import_library("no_such_package")


def test_each_rival_has_a_name_of_its_own_and_each_group_a_rival() -> None:
    names = [rival.name for rival in RIVALS]
    assert len(set(names)) == len(names)
    assert {rival.group for rival in RIVALS} == set(AGAINST)
