"""The benchmark reports each form and layer, with what theory says beside what was measured."""

from __future__ import annotations

import json

import pytest
import torch

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.report.rivals import torch_forms
from tests.support.benchmarking import IMAGE, network


@pytest.mark.slow
def test_forms_theory_and_layers_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_forms, "COMPILE_SECONDS", 0)
    model, threads = network(), torch.get_num_threads()
    announced: list[str] = []
    run = lego.benchmark(
        model, 2, threads + 1, ("dense", "torchvision"), 3, 60, IMAGE, on_form=announced.append
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
    assert set(names) | run.left_out.keys() == set(announced)
    assert {"eager", "oneDNN prepacked, norms folded", "deployed dense", "torchvision"} <= set(
        names
    )
    assert run.left_out["torch.compile"] == "no time was given to compile"
    totals = lego.measure(model, example_input=IMAGE).totals()
    assert run.bound == totals["dense_macs"] / totals["macs"] > 1
    assert run.bound_used >= run.bound
    times = {form.form: form for form in run.forms}
    assert run.fastest_fp32 == min(names[1:], key=lambda name: times[name].median_ms)
    for form in run.forms:
        assert form.quartiles_ms[0] <= form.median_ms <= form.quartiles_ms[1]
        assert form.ratio == pytest.approx(times[run.fastest_fp32].median_ms / form.median_ms)
    assert run.ratio == times["lego"].ratio
    assert {layer.name for layer in run.layers} == {name for name, _ in lego.lego_modules(model)}
    for layer in run.layers:
        assert layer.ratio == pytest.approx(layer.dense_ms / layer.ms)
        assert layer.route == lego.lego_state(model).deployment.choices.routes[layer.name]
    assert json.loads(json.dumps(run.to_dict()))["ratio"] == run.ratio


def test_a_network_that_is_not_on_the_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="CPU"):
        lego.benchmark(network().to("meta"), image=IMAGE.to("meta"))
