"""Predicted losses: exact at what was measured, monotone between, proportional beyond."""

from __future__ import annotations

import pytest

from legocompress.compress.losses import FormLoss, LayerSensitivity, Sensitivity
from legocompress.errors import SpecError


def form(weight_error: float, loss: float) -> FormLoss:
    return FormLoss(m=0.5, o=2, k=1, weight_error=weight_error, output_error=None, loss=loss)


def layer(
    *pairs: tuple[float, float], name: str = "a", run: float | None = None
) -> LayerSensitivity:
    forms = tuple(form(*pair) for pair in pairs)
    return LayerSensitivity(name=name, forms=forms, measured_loss=run)


def collect(*layers: LayerSensitivity) -> Sensitivity:
    return Sensitivity(images=30, sha256="", seed=0, divergence=True, layers=layers)


def test_predictions_pass_through_the_forms() -> None:
    found = layer((0.5, 0.2), (0.1, 0.01), (0.7, 0.9))
    for error, loss in ((0.1, 0.01), (0.5, 0.2), (0.7, 0.9)):
        assert found.predict(error**2) == pytest.approx(loss)
    assert found.predict(0.05**2) == pytest.approx(0.0025)
    assert found.predict(1.4**2) == pytest.approx(3.6)
    middle = (0.1 * 0.5) ** 1.0  # the squared error halfway between on a logarithmic scale
    assert found.predict(middle) == pytest.approx((0.01 * 0.2) ** 0.5)
    assert found.predict(0) < 1e-9


def test_predictions_never_fall_as_the_error_grows() -> None:
    found = layer((0.3, 0.5), (0.4, 0.1), (0.6, 0.7))
    losses = [found.predict((step / 50) ** 2) for step in range(1, 60)]
    assert losses == sorted(losses)


def test_a_run_corrects_all_forms_of_the_layer() -> None:
    found = layer((0.5, 0.2), (0.1, 0.01), run=0.1)
    assert found.correction == pytest.approx(0.5)
    assert found.predict(0.5**2) == pytest.approx(0.1)
    assert found.predict(0.1**2) == pytest.approx(0.005)
    assert layer((0.5, 0.2), run=1e9).correction == 8
    assert layer((0.5, 0.0), run=1.0).correction == 1


def test_losses_add_up_over_layers() -> None:
    found = collect(layer((0.5, 0.2)), layer((0.5, 0.4), name="b"))
    assert found.add_up({"a": 0.5, "b": 0.25}) == pytest.approx(0.3)
    assert Sensitivity.model_validate_json(found.model_dump_json()) == found


def test_a_layer_without_forms_counts_as_the_median() -> None:
    found = collect(layer((0.5, 0.25)), layer((0.5, 0.75), name="b"), layer(name="c"))
    assert found.predict("c", 0.04) == pytest.approx(0.08)
    with pytest.raises(SpecError, match="no layer that could be measured"):
        collect(layer(name="c")).predict("c", 0.04)


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(SpecError, match=r"knows no layer 'x'.*--only"):
        collect(layer((0.5, 0.2))).predict("x", 0.04)
