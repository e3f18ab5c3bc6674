"""Write the page: gather its values, fill the template, keep it below its size limit."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from torch import nn

from legocompress.data.images import Images
from legocompress.errors import OutputError
from legocompress.files import write_atomically
from legocompress.finetune.run_folder import RunFolder
from legocompress.models.source import source_of
from legocompress.report.html.charts import draw_layers, draw_training, shorten
from legocompress.report.html.gallery import check_original, draw_all_filters, draw_pairs
from legocompress.report.html.photos import Comparison, compare_on_photos
from legocompress.report.html.sizes import compare_sizes
from legocompress.report.html.summary import group_reasons, summarise
from legocompress.report.numbers import (
    format_count,
    format_error,
    format_ratio,
    format_shape,
    format_size,
)
from legocompress.report.results import Report
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state

MAX_PAGE_BYTES = 2_000_000
PICTURE_BYTES = 1_000_000  # of all pictures of filters; the first layers get theirs
MAX_TEXT = 20_000  # characters of a recipe or spec
MAX_ROWS = 1500  # layers in the chart and the table


@dataclass(frozen=True)
class ReportSources:
    """What the page can show beside the compressed network; what is None is left out.

    Attributes:
        original: the network before compression, on the same device. It gives the pictures of
            original filters and, with photos, the disagreements.
        photos: images for both networks, preprocessed, as `open_images` returns them.
        photos_calibrated: the calibration has used these photos, so they flatter the network.
        class_names: one per output; by default those in the network's configuration, or ImageNet's.
        run_folder: folder of the fine-tuning, whose curves are shown.
        sensitivity: a value per layer name; larger means that the layer matters more.
    """

    original: nn.Module | None = None
    photos: Images | None = None
    photos_calibrated: bool = False
    class_names: Sequence[str] | None = None
    run_folder: Path | None = None
    sensitivity: Mapping[str, float] | None = None


def write_html_report(
    model: nn.Module,
    target: str | Path,
    report: Report,
    sources: ReportSources | None = None,
    force: bool = False,
    on_photos: Callable[[int], None] | None = None,
) -> Path:
    """Write one HTML file about a compressed network, for a person to read and to pass on.

    The file holds its pictures, needs no network and runs no script. It is at most
    `MAX_PAGE_BYTES` long; pictures are left out where it would get longer.

    Args:
        model: the compressed network.
        target: path of the file.
        report: what `measure` returned for the network.
        sources: what else to show.
        force: replace an existing file.
        on_photos: called with the number of photos that both networks have seen, after each batch.

    Raises:
        UsageError: the original does not fit the network.
        DataError: a photo cannot be read.
        OutputExistsError: `target` exists and `force` is not given.
        OutputError: the file cannot be written.
    """
    sources = sources or ReportSources()
    comparison = None
    if sources.original is not None:
        check_original(model, sources.original)
        if sources.photos is not None:
            comparison = compare_on_photos(
                model, sources.original, sources.photos, sources.class_names, on_photos
            )
    path = Path(target)
    page = _render(model, report, sources, comparison, PICTURE_BYTES)
    if len(page) > MAX_PAGE_BYTES:
        page = _render(model, report, sources, comparison, 0)
    if len(page) > MAX_PAGE_BYTES:
        raise OutputError(
            f"the page would be {len(page):,} bytes long, over the limit of {MAX_PAGE_BYTES:,}; "
            "use --json for a network of so many layers"
        )
    with write_atomically(path, force) as file:
        file.write_bytes(page)
    return path


def _render(
    model: nn.Module,
    report: Report,
    sources: ReportSources,
    comparison: Comparison | None,
    picture_bytes: int,
) -> bytes:
    """Fill the template; all that it gets are plain values, which it escapes."""
    state = lego_state(model)
    source = source_of(model)
    record = state.conversion if isinstance(state.conversion, ConversionRecord) else None
    name = shorten(source.architecture or type(model).__name__, 80)
    layers = [row for row in report.rows if row.weight_shape][:MAX_ROWS]
    epochs = [] if sources.run_folder is None else RunFolder(sources.run_folder).read_summary()
    calibration = state.calibration
    values: dict[str, Any] = {
        "name": name,
        "report": report,
        "totals": report.totals(),
        "summary": summarise(report, calibration, comparison, sources.photos_calibrated),
        "sizes": compare_sizes(report),
        "layers": layers,
        "n_hidden": sum(1 for row in report.rows if row.weight_shape) - len(layers),
        "chart": draw_layers(layers, calibration, sources.sensitivity),
        "sensitivity": sources.sensitivity,
        "filters": draw_all_filters(model, layers, picture_bytes),
        "pairs": draw_pairs(model, sources.original, layers) if picture_bytes else [],
        "has_original": sources.original is not None,
        "comparison": comparison,
        "photos_calibrated": sources.photos_calibrated,
        "calibration": calibration,
        "curves": draw_training(epochs),
        "n_epochs": len(epochs),
        "reasons": group_reasons(report),
        "spec": None if record is None else _dump(record.spec.model_dump(mode="json")),
        "seed": None if record is None else record.seed,
        "recipe": None if record is None or record.recipe is None else _dump(record.recipe),
        "source": source,
        "versions": _list_versions(),
    }
    return _open_template().render(values).encode("utf-8", "backslashreplace")


@cache
def _open_template() -> jinja2.Template:
    """Open the template; it escapes every value, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("legocompress.report.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {
            "count": format_count,
            "size": format_size,
            "error": format_error,
            "percent": _format_percent,
            "shape": format_shape,
            "shorten": shorten,
        }
    )
    environment.globals["ratio"] = format_ratio
    return environment.get_template("page.html")


def _format_percent(share: float) -> str:
    """Write a share as a percentage, a small one as '<1 %' rather than 0."""
    return "<1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _dump(values: Mapping[str, Any]) -> str:
    return shorten(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), MAX_TEXT)


def _list_versions() -> dict[str, str]:
    packages = ("legocompress", "torch", "torchvision", "timm")
    return {**{name: version(name) for name in packages}, "Python": platform.python_version()}
