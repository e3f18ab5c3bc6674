"""Time a compressed network against dense forms of three precisions, in interleaved runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy import Deployment, deploy_, undeploy_
from legocompress.deploy.backends import DENSE_ROUTES
from legocompress.deploy.timing import cool_down_seconds, time_interleaved
from legocompress.errors import UsageError
from legocompress.lego.surgery import to_dense
from legocompress.models.checks import check_network
from legocompress.models.inputs import check_one_input
from legocompress.models.probe import default_input
from legocompress.models.source import source_of
from legocompress.report.benchmark_run import LEGO, BenchmarkRun, FormTime, JudgedBy, LayerTime
from legocompress.report.judge import Judge, Score
from legocompress.report.measurement import measure
from legocompress.report.memory import measure_peak_bytes
from legocompress.report.results import LayerReport, Report
from legocompress.report.rivals.form import Form, Precision, Runner
from legocompress.report.rivals.instructions import describe_isa_limit
from legocompress.report.rivals.table import AGAINST, RIVALS, Against, Rival, build_rivals
from legocompress.state.model_state import lego_state

# After a form has run, its threads keep spinning for a while on the cores that the next form needs.
# So each form runs untimed for this long before it is timed.
COOL_DOWN_SECONDS = 0.1


def benchmark(
    model: nn.Module,
    batch: int = 1,
    threads: int | None = None,
    against: tuple[Against, ...] = AGAINST,
    rounds: int = 15,
    seconds: float = 120.0,
    image: Tensor | None = None,
    also: Callable[[nn.Module, Tensor], Iterator[tuple[str, Form]]] | None = None,
    on_form: Callable[[str], None] | None = None,
    judge: Judge | None = None,
) -> BenchmarkRun:
    """Deploy a compressed network and time it against the dense network with the same weights.

    All forms run in this process, in turns, on the same random images and number of threads. With
    one thread, CPU time is measured, because other processes do not disturb it; with more threads,
    wall-clock time.

    Args:
        model: a converted network on the CPU; it is deployed for this batch and thread count.
        batch: images per run.
        threads: CPU threads; by default torch's current number, which is restored at the end.
        against: groups of rivals, see `legocompress.report.rivals`.
        rounds: timed runs of each form.
        seconds: once the timing has taken this long, no further round starts.
        image: one image (1, c, H, W) that gives the size; the default is the size in the network's
            configuration.
        also: builds further forms of the compressed network for the images, as pairs (name, what
            runs it). They are timed too, but never count as a dense form.
        on_form: called with the name of each form before it is built.
        judge: the original network and photos, as `open_judge` returns them. The dense forms have
            the original's weights then, int8 forms are calibrated with the photos, and the accuracy
            of each form is measured. Without it, int8 forms show their speed only.

    Raises:
        UsageError: the network is not on the CPU, does not take one input of images, is wrapped,
            compiled or scripted, or holds a lazy layer; or the photos have another size.
        DataError: photos cannot be read, or labels do not fit the outputs.
    """
    check_network(model)
    check_one_input(model, "benchmark")
    sample = default_input(model) if image is None else image
    if sample is None or sample.device.type != "cpu":
        raise UsageError("the benchmark runs networks of images on the CPU; move the model there")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        x = _random_images(sample, batch)
        _check_photos(judge, x)
        return _run_benchmark(model, x, against, rounds, seconds, also, on_form, judge)
    finally:
        torch.set_num_threads(before)


def _random_images(sample: Tensor, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, *sample.shape[1:], generator=generator).to(sample.dtype)


def _check_photos(judge: Judge | None, x: Tensor) -> None:
    """Raise UsageError if the photos have another size than the images of the benchmark."""
    if judge is None:
        return
    image = next(iter(judge.calibration.batches(1)))[0][0]
    if image.shape != x.shape[1:]:
        raise UsageError(
            f"the photos become images of {tuple(image.shape)} by the preprocessing of the "
            f"original, but the benchmark runs on {tuple(x.shape[1:])}; leave out the image size"
        )


def _run_benchmark(
    model: nn.Module,
    x: Tensor,
    against: tuple[Against, ...],
    rounds: int,
    seconds: float,
    also: Callable[[nn.Module, Tensor], Iterator[tuple[str, Form]]] | None,
    on_form: Callable[[str], None] | None,
    judge: Judge | None,
) -> BenchmarkRun:
    announce = on_form or (lambda name: None)
    announce(LEGO)
    dense = to_dense(model).eval() if judge is None else judge.original.eval()
    theory = measure(model, example_input=x)
    with torch.no_grad():
        extra = dict(also(undeploy_(model), x)) if also is not None else {}
    deploy_(model, x, remeasure=True)
    deployment: Deployment = lego_state(model).deployment  # type: ignore[assignment]
    rivals: dict[str, tuple[Rival, Runner]] = {}
    left_out: dict[str, str] = {}
    architecture = source_of(model).architecture
    for rival, built in build_rivals(dense, architecture, x, against, announce, judge):
        if isinstance(built, str):
            left_out[rival.name] = built
        else:
            rivals[rival.name] = rival, built
    bound = {name: runner.bind(x) for name, (_, runner) in rivals.items()}
    forms: dict[str, Form] = {LEGO: lambda: model(x), **extra, **bound}
    with torch.no_grad():
        cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
        form_times = time_interleaved(
            forms, x.device, rounds, seconds, warm=True, cool_down=cool_down
        )
        peaks = {name: _measure_peak(name, form) for name, form in forms.items()}
        scores = _score_forms(judge, model, rivals, x.shape[0], announce)
    run = _summarize_run(x, theory, deployment, form_times, peaks, [r for r, _ in rivals.values()])
    return replace(
        run,
        left_out=left_out,
        forms=tuple(
            replace(form, agreement=scores[form.form].agreement, top1=scores[form.form].top1)
            if form.form in scores
            else form
            for form in run.forms
        ),
        judged_by=_describe_judge(judge),
        notes=(*run.notes, *_precision_notes(run, judge)),
    )


def _score_forms(
    judge: Judge | None,
    model: nn.Module,
    rivals: dict[str, tuple[Rival, Runner]],
    batch: int,
    announce: Callable[[str], None],
) -> dict[str, Score]:
    """Measure the accuracy of every form that has the original's weights, and of the network."""
    if judge is None:
        return {}
    predicts: dict[str, Callable[[Tensor], Any]] = {LEGO: model}
    predicts |= {name: r.predict for name, (rival, r) in rivals.items() if rival.same_weights}
    scores = {}
    for name, predict in predicts.items():
        announce(f"{name}, accuracy")
        scores[name] = judge.score(predict, batch)
    return scores


def _describe_judge(judge: Judge | None) -> JudgedBy | None:
    if judge is None:
        return None
    return JudgedBy(
        calibration=judge.calibration.size,
        held_out=judge.held_out.size,
        labelled=0 if judge.labelled is None else judge.labelled.size,
        original_top1=judge.original_score.top1,
    )


def _precision_notes(run: BenchmarkRun, judge: Judge | None) -> Iterator[str]:
    """Yield what limits the comparison of precisions and of instruction sets."""
    if judge is None and any(form.precision == "int8" for form in run.forms):
        yield "int8 forms were calibrated with random images, so they show speed only; give photos"
    limit = describe_isa_limit()
    if limit is not None:
        yield limit


def _summarize_run(
    x: Tensor,
    theory: Report,
    deployment: Deployment,
    form_times: dict[str, list[float]],
    peaks: dict[str, int | None],
    rivals: list[Rival],
) -> BenchmarkRun:
    """Reduce the `form_times` (seconds, by form) to the figures of the report."""
    medians = {name: statistics.median(times) for name, times in form_times.items()}
    fp32 = [rival.name for rival in rivals if rival.precision == "fp32"]
    fastest = min(fp32 or [LEGO], key=lambda name: medians[name])
    precisions: dict[str, Precision] = {rival.name: rival.precision for rival in rivals}
    totals = theory.totals()
    machine = deployment.choices.machine
    return BenchmarkRun(
        batch=x.shape[0],
        threads=machine.threads,
        input_shape=tuple(x.shape),
        dtype=machine.dtype,
        processor=machine.processor,
        instructions=machine.instructions,
        clock="CPU time" if machine.threads == 1 else "wall clock",
        rounds=min(map(len, form_times.values())),
        fastest_fp32=fastest,
        bound=totals["dense_macs"] / totals["macs"],
        bound_used=totals["dense_macs"] / totals["macs_used_only"],
        forms=tuple(
            _form_time(name, precisions.get(name, "fp32"), times, medians[fastest], peaks[name])
            for name, times in form_times.items()
        ),
        left_out={},
        layers=tuple(_layer_times(deployment, theory.rows)),
        notes=(*deployment.notes, *_kernel_notes()),
    )


def _kernel_notes() -> tuple[str, ...]:
    why = kernels.why_unavailable()
    return () if why is None else (f"the fused kernel is missing: {why}",)


def _measure_peak(name: str, form: Callable[[], object]) -> int | None:
    """Measure the peak memory of a form, unless its runtime keeps memory from run to run."""
    if any(rival.keeps_memory for rival in RIVALS if rival.name == name):
        return None
    return measure_peak_bytes(form)


def _form_time(
    name: str, precision: Precision, times: list[float], fastest: float, peak: int | None
) -> FormTime:
    """Reduce the times of one form; all times are in seconds."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return FormTime(
        form=name,
        precision=precision,
        median_ms=1e3 * median,
        quartiles_ms=(1e3 * low, 1e3 * high),
        ratio=fastest / median,
        spread=(high - low) / median,
        peak_bytes=peak,
    )


def _layer_times(deployment: Deployment, rows: tuple[LayerReport, ...]) -> Iterator[LayerTime]:
    """Yield the times of the Lego layers that `deploy_` has timed.

    A layer that runs several times is timed as 'name', 'name#2' and so on.
    """
    choices = deployment.choices
    theory = {row.name: row for row in rows if row.n_lego is not None and row.macs}
    for name, times in deployment.milliseconds.items():
        row = theory.get(name.partition("#")[0])
        if row is None:
            continue
        # Formats are chosen per traced graph; the layer is in the innermost one that contains it.
        graphs = [g for g in choices.formats if not g or name == g or name.startswith(f"{g}.")]
        route, layout = choices.routes[name], choices.formats[max(graphs, key=len)]
        ms = times[f"{route}, {layout}"]
        dense = [t for form, t in times.items() if form.partition(",")[0] in DENSE_ROUTES]
        assert row.dense_macs is not None
        yield LayerTime(
            name=name,
            route=route,
            ms=ms,
            dense_ms=min(dense, default=ms),
            ratio=min(dense, default=ms) / ms,
            bound=row.dense_macs / (row.macs or 1),
            bound_used=row.dense_macs / (row.macs_used_only or 1),
        )
