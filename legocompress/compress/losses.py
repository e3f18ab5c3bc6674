"""What the outputs of a network lose by compressing one layer, as measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from legocompress.errors import SpecError

TINY = 1e-12  # smallest squared error, whose logarithm is finite
MOST_CORRECTION = 8.0  # a run of the network may change the estimates by at most this factor


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FormLoss(_Value):
    """What one Lego form of one layer costs the outputs, after the layer has been fitted.

    Attributes:
        m: Lego filters per output channel.
        o: splits.
        k: terms per slot.
        weight_error: relative error of the weight as clustered.
        output_error: relative error of the layer's outputs on images that the fit did not see; None
            where the layer could not be fitted, and counts as clustered.
        loss: estimated KL(original || compressed) per image in nats; for outputs other than
            classes, the squared relative error of the outputs.
    """

    m: float
    o: int
    k: int
    weight_error: float
    output_error: float | None
    loss: float


class LayerSensitivity(_Value):
    """The losses of the forms of one layer, while all other layers stay as they are.

    Attributes:
        name: of the layer.
        forms: what was estimated; empty where no form pays.
        measured_loss: the loss of the first form, by running the network with it; None if not run.
        agreement: percentage of images with the same first class in that run.
        note: why something is missing.
    """

    name: str
    forms: tuple[FormLoss, ...] = ()
    measured_loss: float | None = None
    agreement: float | None = None
    note: str | None = None

    @property
    def correction(self) -> float:
        """Factor from estimated to measured losses; 1 where the network was not run."""
        if self.measured_loss is None or self.forms[0].loss <= 0:
            return 1.0
        factor = max(self.measured_loss, TINY) / self.forms[0].loss
        return min(max(factor, 1 / MOST_CORRECTION), MOST_CORRECTION)

    @cached_property
    def _points(self) -> list[tuple[float, float]]:
        """Logarithms of squared weight error and of loss, by increasing error, never falling."""
        points: list[tuple[float, float]] = []
        for form in sorted(self.forms, key=lambda form: form.weight_error):
            error = math.log(max(form.weight_error**2, TINY))
            loss = math.log(max(self.correction * form.loss, TINY))
            if points and error <= points[-1][0]:
                continue
            points.append((error, max(loss, points[-1][1]) if points else loss))
        return points

    def predict(self, squared_error: float) -> float:
        """Predict the loss of a form from the squared relative error of its weight.

        Between the estimated forms it is interpolated on a logarithmic scale; beyond them the loss
        is proportional to the squared error.
        """
        error, points = math.log(max(squared_error, TINY)), self._points
        if error <= points[0][0] or error >= points[-1][0]:
            nearest = points[0] if error <= points[0][0] else points[-1]
            return math.exp(nearest[1] + error - nearest[0])
        (a, low), (b, high) = next(pair for pair in pairwise(points) if error <= pair[1][0])
        return math.exp(low + (high - low) * (error - a) / (b - a))


class Sensitivity(_Value):
    """How much each layer of a network matters to its outputs, measured on images without labels.

    Attributes:
        images: number of images.
        sha256: over the preprocessed images.
        seed: of everything random.
        divergence: whether losses are KL divergences; otherwise squared relative errors.
        layers: in the order in which they run.
    """

    images: int
    sha256: str
    seed: int
    divergence: bool
    layers: tuple[LayerSensitivity, ...]

    @cached_property
    def by_name(self) -> dict[str, LayerSensitivity]:
        """The layers by their names."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _per_error(self) -> float:
        """The median over the layers of loss per squared weight error."""
        ratios = [
            layer.correction * form.loss / max(form.weight_error**2, TINY)
            for layer in self.layers
            for form in layer.forms
        ]
        return statistics.median(ratios)

    def predict(self, name: str, squared_error: float) -> float:
        """Predict the loss that a layer causes alone, from the squared relative weight error.

        A layer without estimated forms counts as the median of the others.

        Raises:
            SpecError: the layer is unknown, or no layer has estimated forms.
        """
        layer = self.by_name.get(name)
        if layer is None:
            raise SpecError(
                f"the sensitivity knows no layer {name!r}; measure it on this network, with the "
                "same --only, --skip and --linear"
            )
        if layer.forms:
            return layer.predict(squared_error)
        if not any(other.forms for other in self.layers):
            raise SpecError("the sensitivity holds no layer that could be measured")
        return self._per_error * squared_error

    def add_up(self, weight_errors: Mapping[str, float] | Iterable[tuple[str, float]]) -> float:
        """Add up the losses of layers of these relative weight errors, each as if alone."""
        return sum(self.predict(name, error**2) for name, error in dict(weight_errors).items())
