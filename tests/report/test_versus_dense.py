"""The benchmark times what it says: the same function in every form, theory beside measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import legocompress as lego
from benchmarks.common import merges, speed_tables
from legocompress.errors import UsageError
from legocompress.report import rivals as forms
from tests.support.benchmarking import IMAGE, network


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "COMPILE_SECONDS", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_forms_theory_and_layers_of_one_run() -> None:
    model, threads = network(), torch.get_num_threads()
    told: list[str] = []
    run = lego.benchmark(
        model, 2, threads + 1, ("dense", "torchvision"), 3, 60, IMAGE, on_form=told.append
    )
    assert torch.get_num_threads() == threads
    assert (run.batch, run.threads, run.input_shape, run.rounds) == (
        2,
        threads + 1,
        (2, 3, 32, 32),
        3,
    )
    names = [form.form for form in run.forms]
    assert names[0] == "lego"
    assert set(names) | run.left_out.keys() == set(told)
    assert {"eager", "oneDNN prepacked, norms folded", "deployed dense", "torchvision"} <= set(
        names
    )
    assert run.left_out["torch.compile"] == "no time was given to compile"
    totals = lego.measure(model, example_input=IMAGE).totals()
    assert run.bound == totals["dense_macs"] / totals["macs"] > 1
    assert run.bound_used >= run.bound
    times = {form.form: form for form in run.forms}
    assert run.strongest == min(names[1:], key=lambda name: times[name].median_ms)
    for form in run.forms:
        assert form.quartiles_ms[0] <= form.median_ms <= form.quartiles_ms[1]
        assert form.ratio == pytest.approx(times[run.strongest].median_ms / form.median_ms)
    assert run.ratio == times["lego"].ratio
    assert {layer.name for layer in run.layers} == {name for name, _ in lego.lego_modules(model)}
    for layer in run.layers:
        assert layer.ratio == pytest.approx(layer.dense_ms / layer.ms)
        assert layer.route == lego.lego_state(model).deployment.choices.routes[layer.name]
    assert json.loads(json.dumps(run.to_dict()))["ratio"] == run.ratio


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_form_that_fails_or_differs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_scripted", lambda model, x: lambda: model(x) + 1)
    monkeypatch.setattr(
        forms, "_onnxruntime", lambda model, x: forms._library("no_such", "no-such")
    )
    model = lego.to_dense(network()).eval()
    found = dict(forms.rivals(model, "nothing", IMAGE, forms.AGAINST[:3], lambda name: None))
    assert found["jit, frozen and optimized"] == "it computes something else"
    assert found["torchvision"] == "torchvision has no network called 'nothing'"
    assert found["ONNX Runtime"] == "no-such is not installed: pip install no-such"
    assert callable(found["eager"])


@pytest.mark.slow
def test_the_table_of_the_script(tmp_path: Path, quick: None) -> None:
    run = lego.benchmark(
        network(), 1, 1, ("dense",), 2, 60, IMAGE, also=merges.list_merges
    ).to_dict()
    key = dict(zip(speed_tables.KEY, ("resnet50", "m0.5-o2", 1, 1), strict=True))
    lines = speed_tables.format_speeds([{**key, "run": run}]).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert f"**{run['ratio']:.2f}**" in lines[2]
    assert "resnet50 | m0.5-o2 | 1 | 1" in lines[2]


def test_only_images_on_the_cpu() -> None:
    with pytest.raises(UsageError, match="CPU"):
        lego.benchmark(network().to("meta"), image=IMAGE.to("meta"))
