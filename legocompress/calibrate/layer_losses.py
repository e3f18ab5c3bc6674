"""Measure how much each layer matters: what its Lego forms cost the outputs, after a fit.

1. One pass over two thirds of the images gives the moments of many layers, to which a few forms of
   each layer are fitted (`layer_fits.py`).
2. One backward pass per remaining image gives the losses of all these forms (`quadratic.py`).
3. The network is run with the first form of each layer alone; that corrects the estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from legocompress.calibrate.journal import RowJournal, hash_states, hash_tensors
from legocompress.calibrate.layer_fits import (
    FittedForm,
    LayerMoments,
    count_channels,
    count_moment_bytes,
    fit_form,
)
from legocompress.calibrate.preconditions import check_images, check_runs
from legocompress.calibrate.quadratic import estimate_losses
from legocompress.compress.convert import fuse_for_plan, select_planned_layers, summarise_reasons
from legocompress.compress.forms import read_settings, size_form
from legocompress.compress.losses import FormLoss, LayerSensitivity, Sensitivity
from legocompress.compress.plan_types import LayerPlan
from legocompress.compress.planning import plan
from legocompress.compress.sizing import explain_no_gain
from legocompress.errors import PlanError
from legocompress.lego.shape import UnitShape
from legocompress.models.checks import check_network
from legocompress.models.in_place import explain_in_place
from legocompress.models.inputs import check_one_input
from legocompress.models.output_errors import OutputComparison
from legocompress.models.probe import evaluating
from legocompress.spec import LegoSpec

FEWEST = 10  # images: 7 to fit, 3 to judge
JUDGED = 3  # one image of so many judges
SETTINGS = ((0.5, 2), (0.75, 1), (0.25, 2), (0.125, 4))  # m and o of the forms; the first is run
MOST_LAYERS = 16  # that are measured together, so that an interruption loses no more
MOST_BYTES = 1 << 29  # of the moments and changes of the layers that are measured together

Layer = nn.Conv2d | nn.Linear


def sensitivity(
    model: nn.Module,
    images: Tensor,
    spec: LegoSpec | None = None,
    *,
    n_run: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    journal: str | Path | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure what compressing each layer alone costs the outputs, on images without labels.

    Forms with m and o of `SETTINGS` and k of the spec are clustered and fitted to the layer's
    inputs, since that is what calibration does. `allocate` spends a budget by these losses.

    Args:
        model: the dense network, which stays as it is; its training flags are restored.
        images: (N, c, H, W), preprocessed; a third of them judges what the others fit.
        spec: k, storage dtypes, and which layers; its m and o are not used.
        n_run: judging images on which the network is also run with the first form of each layer;
            0 leaves the estimates uncorrected and without agreement.
        batch_size: images that run at once.
        seed: of the clustering, sampled pixels and random vectors.
        journal: folder for finished layers. An interrupted run that is called again with the same
            network, images and settings continues from it.
        on_layer: called with the number of layers done and the number of all layers.

    Raises:
        PlanError: no layer can be converted, or the model is converted already.
        DataError: there are fewer than ten images, or the network refuses them.
        UsageError: the network takes more than one input, is wrapped, compiled or scripted, or
            holds a lazy layer.
        TrainingError: the network changes a value in place that the gradients need.
        ConversionError: a layer's weights hold NaN or infinity, or are on the meta device.
    """
    check_network(model)
    check_one_input(model, "sensitivity")
    check_images(images, FEWEST)
    spec = LegoSpec() if spec is None else spec
    base = plan(model, spec.model_copy(update={"m": SETTINGS[0][0], "o": SETTINGS[0][1]}))
    if not base.layers:
        raise PlanError(f"no layer can be converted: {summarise_reasons(base)}")
    network = fuse_for_plan(model) if base.reparameterize else model
    layers = select_planned_layers(network, base)
    images = images.to(next(network.parameters()).device)
    judged = torch.arange(len(images)) % JUDGED == JUDGED - 1
    sha256 = hash_tensors(images)
    key = f"{sha256} {hash_states(network)} {spec.model_dump_json()} {n_run} {batch_size} {seed}"
    store = None if journal is None else RowJournal(Path(journal), key)
    with evaluating(network):
        has_logits = check_runs(network, images[:2])
        run = _Run(network, images[~judged], images[judged], n_run, batch_size, seed)
        rows: dict[str, LayerSensitivity] = {}
        for name in base.layers:
            row = None if store is None else store.take(name, LayerSensitivity)
            if row is not None:
                rows[name] = row
        jobs = [_Job(row, layers[name], list_shapes(row)) for name, row in base.layers.items()]
        for chunk in _divide([job for job in jobs if job.row.name not in rows]):
            for found in run.measure(chunk):
                rows[found.name] = found
                if store is not None:
                    store.put(found.name, found)
                if on_layer is not None:
                    on_layer(len(rows), len(jobs))
    return Sensitivity(
        images=len(images),
        sha256=sha256,
        seed=seed,
        divergence=has_logits,
        layers=tuple(rows[name] for name in base.layers),
    )


class _Job:
    """One layer to measure, with the shapes of its forms."""

    def __init__(
        self, row: LayerPlan, layer: Layer, shapes: list[tuple[UnitShape, LegoSpec]]
    ) -> None:
        self.row, self.layer, self.shapes = row, layer, shapes

    @property
    def n_bytes(self) -> int:
        """Bytes of its moments and of the changes of its weight."""
        if not self.shapes:
            return 0
        return count_moment_bytes(self.shapes[0][0]) + 4 * len(self.shapes) * (
            self.layer.weight.numel()
        )


def list_shapes(row: LayerPlan) -> list[tuple[UnitShape, LegoSpec]]:
    """List the forms of a layer that are measured: those that pay and pad the channels alike."""
    assert row.spec is not None
    shapes: dict[UnitShape, LegoSpec] = {}
    for m, o in SETTINGS:
        shape, spec = size_form(row, m, o, row.spec.k)
        alike = not shapes or count_channels(shape) == count_channels(next(iter(shapes)))
        if alike and explain_no_gain(shape, spec, row.dense_bits) is None:
            shapes.setdefault(shape, spec)
    return list(shapes.items())


def _divide(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Divide layers into chunks that are few and small enough to be measured together."""
    chunk: list[_Job] = []
    for job in jobs:
        if chunk and (
            len(chunk) == MOST_LAYERS or sum(j.n_bytes for j in [*chunk, job]) > MOST_BYTES
        ):
            yield chunk
            chunk = []
        chunk.append(job)
    if chunk:
        yield chunk


class _Run:
    """A network and the images to fit to and to judge by."""

    def __init__(
        self,
        network: nn.Module,
        fitted: Tensor,
        judged: Tensor,
        n_run: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.network, self.fitted, self.judged, self.seed = network, fitted, judged, seed
        self.batch_size = batch_size
        self.batches = torch.split(judged[:n_run], batch_size) if n_run else ()
        self.targets = [network(images) for images in self.batches]

    def measure(self, jobs: Sequence[_Job]) -> Iterator[LayerSensitivity]:
        """Measure some layers together."""
        able = [job for job in jobs if job.shapes]
        for job in jobs:
            if not job.shapes:
                yield LayerSensitivity(name=job.row.name, note="no measured form pays")
        if not able:
            return
        layers = {job.row.name: (job.layer, job.shapes[0][0]) for job in able}
        moments = LayerMoments(layers, len(self.fitted), self.seed)
        moments.add_images(self.network, torch.split(self.fitted, self.batch_size))
        forms, notes = {}, {}
        for job in able:
            forms[job.row.name], notes[job.row.name] = self._fit(job, moments)
        changes = {
            job.layer.weight: torch.stack([form.change for form in forms[job.row.name]])
            for job in able
        }
        with explain_in_place():
            losses = estimate_losses(self.network, changes, self.judged, self.seed)
        for job, values in zip(able, losses, strict=True):
            name = job.row.name
            loss, agreement = self._run_with(job.layer, forms[name][0].change)
            yield LayerSensitivity(
                name=name,
                forms=tuple(map(_describe, forms[name], values.tolist())),
                measured_loss=loss,
                agreement=agreement,
                note=notes[name],
            )

    def _fit(self, job: _Job, moments: LayerMoments) -> tuple[list[FittedForm], str | None]:
        found = moments.finish(job.row.name)
        note = found if isinstance(found, str) else None
        sums = None if isinstance(found, str) else found
        return [fit_form(job.layer, s, spec, sums, self.seed) for s, spec in job.shapes], note

    def _run_with(self, layer: Layer, change: Tensor) -> tuple[float | None, float | None]:
        """Run the network with one weight changed: the loss, and the agreement in percent."""
        if not self.batches:
            return None, None
        weight = layer.weight.detach().clone()
        comparison = OutputComparison()
        try:
            layer.weight.add_(change)
            for images, target in zip(self.batches, self.targets, strict=True):
                comparison.add(self.network(images), target, len(images))
        finally:
            layer.weight.copy_(weight)
        errors = comparison.compute()
        loss = errors.relative**2 if errors.divergence is None else errors.divergence
        return loss, errors.agreement


def _describe(form: FittedForm, loss: float) -> FormLoss:
    m, o, k = read_settings(form.shape)
    return FormLoss(
        m=m, o=o, k=k, weight_error=form.weight_error, output_error=form.output_error, loss=loss
    )
